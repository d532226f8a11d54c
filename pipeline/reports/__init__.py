"""Pages to look at, each one self-contained file: the report of runs, and a document of a dump.

Only `pipeline.cli` imports this room."""
