"""`bld`: the operator's commands. A stage is imported only inside the command that runs it: `--help` is fast."""

from pipeline.cli.app import app, main

__all__ = ["app", "main"]
