"""The covering: rows of token probabilities summed into next-byte distributions, exactly.

May import `pipeline.runtime`, `pipeline.config`, `pipeline.tokenization` and `schemas`."""
