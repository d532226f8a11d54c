"""Requests of `bld eval`: the models, text and tasks, and the tables of results.

Only `pipeline.cli` imports this room."""
