"""HTML pages, each one self-contained file: the report on runs, and a document of a dump.

Only `pipeline.cli` imports this room."""
