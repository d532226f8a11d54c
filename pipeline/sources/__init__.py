"""Sources of models, tokenizers and texts: local paths, hub names and files in packages, converted where needed.

May import `pipeline.tokenization`, and whatever that may import.
"""
