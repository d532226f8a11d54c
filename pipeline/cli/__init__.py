"""`bld`: the operator's commands. A stage is imported only inside the command that runs it: `--help` is fast.

The composition root: may import every room.
"""

from pipeline.cli.app import app, main

__all__ = ["app", "main"]
