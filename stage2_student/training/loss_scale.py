"""Loss scaling for float16: the loss is multiplied so that small gradients do not vanish; the gradient is divided.

After an overflow the same batch is processed again at half the scale: no step is skipped, no document is lost.
"""

from dataclasses import dataclass

INITIAL = 2.0**16
GROWTH_STEPS = 1000  # steps without overflow after which the scale doubles
MAX_FACTOR = 2.0**24  # keeps float32 sums of scaled gradients far below float32's maximum


@dataclass(frozen=True)
class LossScale:
    """The factor, and the number of steps since it last changed.

    Immutable: a checkpoint stores the value that applies after its step.
    """

    factor: float
    clean_steps: int = 0

    def after_step(self) -> "LossScale":
        """Return the scale after a step with a finite gradient."""
        if self.clean_steps + 1 < GROWTH_STEPS:
            return LossScale(self.factor, self.clean_steps + 1)
        return LossScale(min(2 * self.factor, MAX_FACTOR))

    def after_overflow(self) -> "LossScale":
        """Return the scale for the next attempt at the same batch."""
        assert self.can_shrink
        return LossScale(self.factor / 2)

    @property
    def can_shrink(self) -> bool:
        """True if the scale may have caused an overflow: at 1 the gradient itself overflows."""
        return self.factor > 1


def first_scale(dtype: str) -> LossScale | None:
    """Return the scale at the start of a run; None if the dtype needs none: bfloat16 has float32's range."""
    return LossScale(INITIAL) if dtype == "float16" else None
