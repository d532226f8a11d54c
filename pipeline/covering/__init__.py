"""Covering: rows of token probabilities summed exactly into next-byte distributions.

May import `pipeline.runtime`, `pipeline.config`, `pipeline.tokenization` and `schemas`.
"""
