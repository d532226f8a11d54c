"""What a run says: a line a step, the same in metrics.jsonl and TensorBoard.

Units: losses in nats per supervised byte; memory in bytes; tokens are the student's.
"""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from stage2_student.model import PARTS


class RunLog:
    """Opened by rank 0. A bar on a terminal, plain lines where the output is a file."""

    def __init__(self, run: Path, first_step: int, num_steps: int) -> None:
        self.first_step, self.num_steps = first_step, num_steps
        self.started = time.monotonic()
        self._file = (run / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)
        self._bar: Progress | None = None
        if Console().is_terminal:
            columns = (TextColumn("step"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns)
            self._bar.start()
            self._task = self._bar.add_task("train", total=num_steps, completed=first_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One step's figures, everywhere."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        line = self._line(step, values)
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
            self._bar.console.print(line, highlight=False)
        else:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    def _line(self, step: int, v: Mapping[str, float]) -> str:
        left = (time.monotonic() - self.started) / (step - self.first_step) * (self.num_steps - step)
        parts = " ".join(f"{name} {v[name]:.4f}" for name in PARTS if name in v)
        bits = f"{v['bits_per_byte']:.4f} bits/byte  " if "bits_per_byte" in v else ""
        uncounted = f"uncounted {v['uncounted_share']:.0%}  " if v.get("uncounted_share") else ""
        return (
            f"step {step}/{self.num_steps}  loss {v['loss']:.4f} nats/byte ({parts})  {bits}{uncounted}"
            f"lr {v['lr']:.2e}  grad {v['grad_norm']:.2f}  "
            f"{v['tokens_per_second']:.0f} tokens/s  data wait {v['data_wait_share']:.0%}  "
            f"{v['memory_bytes'] / 2**30:.1f} GiB  {left:.0f} s left"
        )

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._file.close()
        self._board.close()
