"""The contract between the stages: shards and manifest, version 1. Nothing else knows these names."""

SCHEMA_VERSION = 1
END = 0xFF  # the symbol "the document (or the assistant's turn) ends here"; UTF-8 never contains it
NUM_SYMBOLS = 256
