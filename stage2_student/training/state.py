"""The training state that a checkpoint stores beside weights and optimizer."""

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from stage2_student.data.batch_plan import BatchPlan, UnionPosition
from stage2_student.data.order import START, Position
from stage2_student.runs.retention import Evaluation
from stage2_student.training.loss_scale import LossScale
from stage2_student.training.patience import Progress


@dataclass
class State:
    """Everything a checkpoint stores beside weights and optimizer: totals since the run began and the data position."""

    step: int = 0
    position: Position | UnionPosition = START
    documents: int = 0
    tokens: int = 0
    num_bytes: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    loss_scale: LossScale | None = None  # of float16
    progress: Progress | None = None  # by evaluations

    def after_batch(self, batch: BatchPlan, num_bytes: int, loss_scale: LossScale | None) -> "State":
        """Return the state after a step on `batch` with `num_bytes` supervised bytes over all ranks."""
        return State(
            step=self.step + 1,
            position=batch.after,
            documents=self.documents + len(batch.documents),
            tokens=self.tokens + batch.num_tokens,
            num_bytes=self.num_bytes + num_bytes,
            left_out=self.left_out + batch.left_out,
            loss_scale=loss_scale,
            progress=self.progress,
        )

    def after_evaluation(self, evaluation: Evaluation) -> "State":
        """Return the state after an evaluation."""
        return replace(self, progress=Progress.after(self.progress, evaluation))

    def in_next_epoch(self, num_corpora: int) -> "State":
        """Return the state at the start of a new epoch of other data, where a position in this one has no meaning.

        Evaluations on the way to early stopping are counted anew.

        Args:
            num_corpora: of the other data.
        """
        at = self.position
        start = Position(1 + max(one.epoch for one in (at.of_corpora if isinstance(at, UnionPosition) else [at])), 0)
        position = start if num_corpora == 1 else UnionPosition((start,) * num_corpora, (0,) * num_corpora)
        return replace(self, position=position, progress=None)

    def as_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        scale = None if self.loss_scale is None else asdict(self.loss_scale)
        progress = None if self.progress is None else list(self.progress)
        inner = {"position": _to_json(self.position), "left_out": dict(self.left_out), "loss_scale": scale}
        return {**self.__dict__, **inner, "progress": progress}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "State":
        """Restore a state from `as_dict`."""
        scale = values["loss_scale"]
        inner = {
            "position": _from_json(values["position"]),
            "left_out": Counter(values["left_out"]),
            "loss_scale": None if scale is None else LossScale(**scale),
            "progress": Progress.from_list(values.get("progress")),
        }
        return cls(**{**values, **inner})


def _to_json(position: Position | UnionPosition) -> Any:
    if isinstance(position, Position):
        return list(position)
    return {"of_corpora": [list(one) for one in position.of_corpora], "num_bytes": list(position.num_bytes)}


def _from_json(values: Any) -> Position | UnionPosition:
    if isinstance(values, list):
        return Position(*values)
    return UnionPosition(tuple(Position(*one) for one in values["of_corpora"]), tuple(values["num_bytes"]))
