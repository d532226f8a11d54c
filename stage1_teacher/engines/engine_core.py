"""vLLM's engine core where it is a process of its own, as on a GPU: calls that wait for it end if it is killed.

vLLM notices that its core is gone (killed for memory, a crash in CUDA), but tells only the next call, not the one that
waits for an answer: a dump would wait forever, without a word.
"""

import signal
from concurrent.futures import InvalidStateError
from contextlib import suppress
from multiprocessing.connection import wait
from threading import Thread
from typing import Any


def end_waits_with(core: Any) -> None:
    """Let calls of vLLM's client `core` that wait for an answer fail when the core's process ends.

    Does nothing for a core in this process.
    """
    processes = _processes(core)
    if not processes:
        return
    # Not `core` itself, which ends its process when nothing refers to it.
    outputs, results = core.outputs_queue, core.utility_results

    def tell() -> None:
        wait([process.sentinel for process in processes])
        gone = RuntimeError("vLLM's engine core has ended")
        outputs.put_nowait(gone)
        for result in list(results.values()):
            with suppress(InvalidStateError):  # answered just before
                result.set_exception(gone)

    Thread(target=tell, name="engine-core-end", daemon=True).start()


def describe_kill(core: Any) -> str | None:
    """Return which process of the core was killed, and how; None if none was."""
    for process in _processes(core):
        if process.exitcode is not None and process.exitcode < 0:
            name = signal.Signals(-process.exitcode).name
            return f"vLLM's engine core (process {process.pid}) was killed by {name}"
    return None


def _processes(core: Any) -> list[Any]:
    manager = getattr(getattr(core, "resources", None), "engine_manager", None)
    return list(getattr(manager, "processes", ()))
