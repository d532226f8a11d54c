"""Where models, tokenizers and texts come from: local paths, hub names, files out of packages, converted on the way.

May import what `pipeline.tokenization` may, and that."""
