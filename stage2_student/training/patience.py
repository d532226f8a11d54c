"""Memory of what the evaluations of a run have shown so far, for stopping it early; a part of the training state."""

from typing import Any, NamedTuple

from stage2_student.runs.retention import Evaluation


class Progress(NamedTuple):
    """The lowest bits per byte so far, of which text, and how many evaluations have come since."""

    best: float
    text_sha256: str
    num_since: int

    @classmethod
    def after(cls, before: "Progress | None", evaluation: Evaluation) -> "Progress":
        """Return the progress after one more evaluation; on another text it begins anew."""
        bits_per_byte, text_sha256, _ = evaluation
        if before is None or before.text_sha256 != text_sha256 or bits_per_byte < before.best:
            return cls(bits_per_byte, text_sha256, 0)
        return before._replace(num_since=before.num_since + 1)

    @classmethod
    def from_list(cls, values: list[Any] | None) -> "Progress | None":
        """Restore what a checkpoint stores; None of a run without evaluations, or of an earlier release."""
        return None if values is None else cls(*values)


def is_exhausted(progress: Progress | None, patience: int) -> bool:
    """Tell whether training ends: the last `patience` evaluations were no better than one before. 0: never."""
    return bool(patience) and progress is not None and progress.num_since >= patience
