"""An engine that fails in the middle of a batch is started again, and the batch is asked for again: nothing is lost."""

from collections.abc import Callable
from typing import TypeVar

from pipeline.runtime.log import warn
from pipeline.runtime.metrics import count_failure
from stage1_teacher.targets.teacher import Teacher

Answer = TypeVar("Answer")


class EngineError(OSError):
    """The engine failed too often in a row; the cause is chained."""


def persist(teacher: Teacher, ask: Callable[[], Answer], attempts: int) -> Answer:
    """What `ask` gives, with the teacher's engine restarted after each failure.

    A ValueError is no failure of the engine: it says what is wrong with weights, settings or text, and would come again.

    Raises:
        EngineError: `attempts` failures in a row, or one of an engine that cannot be restarted here.
    """
    for attempt in range(1, attempts + 1):
        try:
            if attempt > 1:
                teacher.restart()
            return ask()
        except ValueError:
            raise
        except Exception as error:
            if attempt == attempts or not teacher.can_restart:
                raise EngineError(
                    f"the teacher's engine failed {attempt} times in a row (placement.engine_attempts), the last time with "
                    f"{_describe(error)}. Shards that are complete stay; mend the cause (less memory: lower "
                    "placement.engine_batch_tokens), then run the same command again. --debug shows where it failed."
                ) from error
            count_failure("engine")
            warn(f"the teacher's engine failed with {_describe(error)}; starting it again ({attempt + 1}/{attempts})")
    raise AssertionError("attempts is at least 1")


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")
