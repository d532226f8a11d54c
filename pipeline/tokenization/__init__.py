"""Tokenizers seen as bytes, and conversations as their chat templates write them.

May import `pipeline.runtime`, `pipeline.config` and `schemas`."""
