"""Retries: an engine that fails in a batch is restarted, and the batch is run again, so that nothing is lost."""

from collections.abc import Callable
from typing import Protocol, TypeVar

from pipeline.runtime import log
from pipeline.runtime.metrics import count_failure

Output = TypeVar("Output")


class Restartable(Protocol):
    """A model with an engine that can be opened anew."""

    @property
    def can_restart(self) -> bool: ...
    def restart(self) -> None: ...


class EngineError(OSError):
    """An engine that failed too often in a row; the cause is chained."""


def retry_with_restart(teacher: Restartable, run: Callable[[], Output], max_failures: int) -> Output:
    """Return what `run` returns, restarting the teacher's engine after each failure.

    A ValueError is not an engine failure: it reports wrong weights, settings or text, and would be raised again.

    Args:
        max_failures: failures in a row at which to stop; at least 1.
    Raises:
        EngineError: that many failures in a row, or one failure of an engine that cannot be restarted here.
    """
    for failures in range(1, max_failures + 1):
        try:
            if failures > 1:
                teacher.restart()
            return run()
        except ValueError:
            raise
        except Exception as error:
            if failures == max_failures or not teacher.can_restart:
                times = "once" if failures == 1 else f"{failures} times in a row"
                raise EngineError(
                    f"the teacher's engine failed {times} (placement.max_engine_failures); last error: "
                    f"{_describe(error)}. Completed shards are kept; fix the cause (if it is memory, lower "
                    "placement.engine_batch_tokens) and rerun the same command. --debug shows the traceback."
                ) from error
            count_failure("engine")
            log.warning(
                f"the teacher's engine failed: {_describe(error)}; "
                f"restarting it (attempt {failures + 1}/{max_failures})"
            )
    raise AssertionError("max_failures is at least 1")


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")
