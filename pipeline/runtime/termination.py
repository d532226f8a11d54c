"""SIGTERM as an exception, as SIGINT is one: what is half done is cleaned up, and `bld` says how to go on."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(BaseException):
    """SIGTERM. Not an Exception, so that nothing takes it for a failure to be tried again."""


@contextmanager
def terminable() -> Iterator[None]:
    """Within it the first SIGTERM raises `Terminated`; a second one ends the process at once. Elsewhere than in the
    main thread: nothing.

    Compiled code that does not look whether a handler raised gives back a result beside it, of which Python makes a
    SystemError (Ray's `wait` does): out of here it comes as what was raised.
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
