"""An engine's process as the process that started it sees it: started with its GPUs, heard, stopped."""

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from typing import Any

from pipeline.planning.engine_shares import Share
from pipeline.runtime import log
from pipeline.runtime.child_processes import child_environment
from pipeline.runtime.devices import num_cores
from stage1_teacher.coordination.shard_work import ShardWork, Task
from stage1_teacher.processes.messages import Failed, Message
from stage1_teacher.processes.shard_queue import Attempt, Attempts

# By a call, not as a module: its classes would be those of `__main__`. -P: an operator's folder may hold our names.
_COMMAND = (sys.executable, "-P", "-c", "from stage1_teacher.processes.engine_process import main; main()")
_LAST_LINES = 20  # of what a process printed, kept to be repeated if it dies
_READ_BYTES = 1 << 16


class EngineChild:
    """One engine's process.

    Attributes:
        attempts: at shards that it was given and has not committed.
        ready: whether its engine is open.
        failed: its last message, if it gave up.
        last_lines: the last of what it printed.
    """

    def __init__(self, number: int, share: Share, num_engines: int, task: Task) -> None:
        """Start the process and give it its task. Raises OSError if no process can be started."""
        self.number, self.share = number, share
        self.attempts = Attempts()
        self.failed: Failed | None = None
        self.ready = False
        self.last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._rest = b""
        self._connection, theirs = Pipe()
        with theirs, _on_cores(number, num_engines, share):
            self._process = subprocess.Popen(
                [*_COMMAND, str(theirs.fileno())],
                env=_environment(number, share, num_engines),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a Ctrl-C at the terminal reaches the operator's process alone
            )
        assert self._process.stdout is not None
        self._printed = self._process.stdout
        os.set_blocking(self._printed.fileno(), False)
        self._send(task)

    @property
    def name(self) -> str:
        return f"engine {self.number}" + (f" (GPU {','.join(self.share)})" if self.share else "")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def streams(self) -> list[Any]:
        """Return what can be waited for: its messages, and what it prints."""
        return [stream for stream in (self._connection, self._printed) if not stream.closed]

    def give(self, attempt: Attempt | None) -> None:
        """Answer its request, with a shard or with none."""
        if attempt is None:
            self._send(None)
            return
        self.attempts.add(attempt)
        work: ShardWork = (attempt.shard.plan, attempt.shard.documents)
        self._send(work)

    def _send(self, what: object) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # it has died, which is noticed elsewhere
            self._connection.send(what)

    def messages(self) -> Iterator[Message]:
        """Yield the messages that have arrived."""
        try:
            while not self._connection.closed and self._connection.poll():
                message: Message = self._connection.recv()
                if isinstance(message, Failed):
                    self.failed = message
                yield message
        except (EOFError, ConnectionResetError):
            self._connection.close()

    def relay_lines(self) -> None:
        """Print what it has printed since the last call, in whole lines."""
        printed = b""
        while not self._printed.closed and (part := self._read()):
            printed += part
        *lines, self._rest = (self._rest + printed).split(b"\n")
        if self._printed.closed and self._rest:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            text = line.decode(errors="replace")
            self.last_lines.append(text)
            print(text, file=sys.stderr)

    def _read(self) -> bytes:
        try:
            part = os.read(self._printed.fileno(), _READ_BYTES)
        except BlockingIOError:
            return b""
        if not part:
            self._printed.close()
        return part

    def describe_end(self) -> str:
        """Return why it ended: its own words, or its exit code or signal."""
        if self.failed is not None:
            return self.failed.error
        code = self._process.poll()
        return f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"

    def stop(self, at_once: bool) -> None:
        """Ask it to end: now, or, if it is idle, by itself."""
        self._connection.close()
        if at_once and not self.has_ended:
            self._process.terminate()

    def kill(self) -> None:
        """Kill it if it is still there, and forget it."""
        if not self.has_ended:
            self._process.kill()
        self._process.wait()
        self.relay_lines()
        self._printed.close()
        self._connection.close()


def _environment(number: int, share: Share, num_engines: int) -> dict[str, str]:
    """Return the environment of an engine: its GPUs, and its part of the cores; each would use all of them."""
    defaults = {"OMP_NUM_THREADS": str(max(1, num_cores() // num_engines)), "TOKENIZERS_PARALLELISM": "true"}
    gpus = {"CUDA_VISIBLE_DEVICES": ",".join(share)} if share else {}
    # Its messages are the operator's: warnings and errors, marked as one engine's.
    level = {} if log.is_verbose() else {log.LEVEL: "quiet"}
    command = {log.COMMAND: f"{os.environ.get(log.COMMAND, '')} engine {number}".strip()}
    return defaults | child_environment() | gpus | level | command


@contextmanager
def _on_cores(number: int, num_engines: int, share: Share) -> Iterator[None]:
    """Let a process started in this context inherit its part of the cores, if engines compute on them."""
    cores: Sequence[int] = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if share or len(cores) < num_engines:
        yield
        return
    os.sched_setaffinity(0, cores[number - 1 :: num_engines])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
