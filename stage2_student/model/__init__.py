"""The student model: loading, moving to its tokenizer, dropping layers, adapters.

May import `data`, `interfaces`, `losses`, `schemas`, and the parts of `pipeline` that both stages share.
"""
