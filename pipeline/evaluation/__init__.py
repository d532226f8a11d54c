"""Which models `bld eval` measures on which text and tasks, and the tables of what it finds.

Only `pipeline.cli` imports this room."""
