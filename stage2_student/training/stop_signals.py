"""SIGTERM and SIGINT during training: all ranks finish and save the current step.

A signal may reach one rank first, or only one rank. Ranks therefore never act on a signal locally: it is all-reduced at
the end of each step (`stage2_student.training.loop`).
"""

import signal
from types import FrameType, TracebackType

STOPPING = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """The run stopped for a signal, with a checkpoint. Not an Exception: nothing went wrong.

    Attributes:
        exit_code: 128 + the signal's number, as in a shell.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class StopRequest:
    """A context in which SIGTERM and SIGINT are only recorded.

    However often they arrive: a launcher sends them again to ranks that are saving.
    """

    def __init__(self) -> None:
        self.received = 0  # the signal's number; 0: none
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
