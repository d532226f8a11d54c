"""Loss scaling for float16: the loss is multiplied so that small gradients do not vanish, and the gradient divided
again.

A gradient that overflows costs a second pass over the same batch at half the scale: no step is skipped, no document is
lost.
"""

from dataclasses import dataclass

INITIAL = 2.0**16
GROWTH_STEPS = 1000  # steps without overflow after which the scale doubles
LARGEST = 2.0**24  # float32 sums of scaled gradients stay far from their own limit


@dataclass(frozen=True)
class LossScale:
    """The factor, and for how many steps it has held. A value: what holds after a step is stored in its checkpoint."""

    factor: float
    clean_steps: int = 0

    def after_step(self) -> "LossScale":
        """After a step whose gradient was finite."""
        if self.clean_steps + 1 < GROWTH_STEPS:
            return LossScale(self.factor, self.clean_steps + 1)
        return LossScale(min(2 * self.factor, LARGEST))

    def after_overflow(self) -> "LossScale":
        """For the next try at the same batch."""
        assert self.can_shrink
        return LossScale(self.factor / 2)

    @property
    def can_shrink(self) -> bool:
        """Whether an overflow may be the scale's fault: at 1 it is the gradient's own."""
        return self.factor > 1


def first_scale(dtype: str) -> LossScale | None:
    """At the start of a run; None where the dtype needs none: bfloat16 has float32's range."""
    return LossScale(INITIAL) if dtype == "float16" else None
