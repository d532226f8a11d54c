"""Byte views of tokenizers, and conversations as their chat templates write them.

May import `pipeline.runtime`, `pipeline.config` and `schemas`.
"""
