"""Estimates of totals from a sample, each with its 95 % interval.

Source: the ratio estimator, Cochran, Sampling Techniques (1977), chapter 6, with the jackknife variance: the one of
section 6.4 is too small for few units of different sizes. Student's t by the Cornish-Fisher expansion, Abramowitz
& Stegun 26.7.5; its degrees of freedom from the effective number of units, Kish, Survey Sampling (1965).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.runtime.format import are, count_of

MIN_UNITS = 3  # in a sample, to estimate its variation
_NORMAL = 1.959964  # the 97.5 % quantile of the normal distribution


class Estimate(NamedTuple):
    """A quantity and the half-width of its 95 % interval, which is 0 if the quantity was counted."""

    value: float
    half: float

    def times(self, other: "Estimate | float") -> "Estimate":
        """Multiply two independent quantities: their relative variances add."""
        if not isinstance(other, Estimate):
            return Estimate(self.value * other, self.half * abs(other))
        value = self.value * other.value
        return Estimate(value, math.hypot(self.half * other.value, other.half * self.value))

    def plus(self, other: "Estimate | float") -> "Estimate":
        """Add two independent quantities: their variances add."""
        if not isinstance(other, Estimate):
            return Estimate(self.value + other, self.half)
        return Estimate(self.value + other.value, math.hypot(self.half, other.half))

    @property
    def share(self) -> float:
        """Return the half-width as a share of the value."""
        return self.half / abs(self.value) if self.value else 0.0


def counted(value: float) -> Estimate:
    """Return a counted quantity as an estimate without uncertainty."""
    return Estimate(value, 0.0)


def ratio(amounts: Sequence[float], sizes: Sequence[float], population: int | None = None) -> Estimate:
    """Estimate the amount per size from a random sample of units (documents, batches) of different sizes.

    Args:
        population: number of units in all; only those outside the sample are uncertain. None: infinite.
    Raises:
        ValueError: fewer than `MIN_UNITS`, or fewer than two of any size.
    """
    num = len(amounts)
    if num < MIN_UNITS or sum(sizes) <= max(sizes):
        raise ValueError(
            f"{count_of(num, 'sample')} {are(num)} too few to estimate their variation; at least {MIN_UNITS} are needed"
        )
    value = sum(amounts) / sum(sizes)
    without = [(sum(amounts) - amount) / (sum(sizes) - size) for amount, size in zip(amounts, sizes, strict=True)]
    unseen = 1.0 if population is None else max(0.0, 1 - num / population)
    deviation = math.sqrt(unseen * (num - 1) / num * sum((other - value) ** 2 for other in without))
    # If a few large units dominate, only their number counts, not that of all units.
    effective = sum(sizes) ** 2 / sum(size**2 for size in sizes)
    return Estimate(value, student_t(max(2.0, effective - 1)) * deviation)


def student_t(freedom: float) -> float:
    """Return the 97.5 % quantile of Student's t, within 1 % for 2 or more degrees of freedom."""
    z = _NORMAL
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))
