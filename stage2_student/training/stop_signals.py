"""SIGTERM and SIGINT while training: the step under way is finished and saved, on all ranks alike.

A signal may reach one rank first, or one rank alone. So no rank acts on what it was told itself: what any of them was
told is what all of them agree on at the end of a step (`stage2_student.training.train`).
"""

import signal
from types import FrameType, TracebackType

STOPPING = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """The run stopped for a signal, with a checkpoint; `exit_code` is a shell's for it. Not an Exception: nothing went
    wrong.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class StopRequest:
    """Within it SIGTERM and SIGINT are only noted, however often they come: a launcher sends them again to ranks that
    are saving.
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
