"""Messages between the process that an operator started and the process of an engine.

The engine's process is first given its task. It sends `Ready` once, then `Ask` for each shard and `Made` after each
batch. The answer to `Ask` is a shard with its documents, or None: there is none now, so make what you have and ask
again as idle. `Failed` is the last thing that it sends.
"""

from collections.abc import Mapping
from typing import NamedTuple

from stage1_teacher.coordination.shard_work import ShardProgress


class Ready(NamedTuple):
    """The engine is open."""


class Ask(NamedTuple):
    """A request for a shard.

    Attributes:
        is_idle: every earlier shard has been made, and the answer may take any time.
    """

    is_idle: bool


class Made(NamedTuple):
    """A batch has been made.

    Attributes:
        failures: what went wrong since the last message and was dealt with, by kind; see `metrics.Figures.failures`.
    """

    progress: ShardProgress
    failures: Mapping[str, int]


class Failed(NamedTuple):
    """The engine's process gives up.

    Attributes:
        ends_all: any other engine would meet the same error: a wrong setting, a folder that cannot be written.
    """

    error: str
    ends_all: bool


Message = Ready | Ask | Made | Failed
