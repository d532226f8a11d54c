"""SIGTERM raised as an exception, like SIGINT: partial work is cleaned up, and `bld` says how to continue."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(BaseException):
    """SIGTERM. It is not an Exception, so that no code takes it for a failure to retry."""


@contextmanager
def terminable() -> Iterator[None]:
    """Raise `Terminated` at the first SIGTERM within the context; a second one ends the process at once.

    Does nothing outside the main thread. C extensions that ignore a pending exception (Ray's `wait`) make Python raise
    SystemError; it is unwrapped here.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    except SystemError as error:
        if isinstance(error.__cause__, (Terminated, KeyboardInterrupt)):
            raise error.__cause__ from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _raise(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise Terminated
