"""`bld`: the command line. A stage is imported only inside the command that runs it, so that `--help` is fast.

The composition root: may import every room.
"""

from pipeline.cli.app import app, main

__all__ = ["app", "main"]
