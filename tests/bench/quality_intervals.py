"""95 % intervals of the quality benchmark: over documents, and over seeds where there are several.

Documents and seeds are both samples of what could have been: a method is trained with a few seeds and measured on the
same documents. The variance of a mean over both is the documents' part and the seeds' part together. Each is known from
few (12 documents, 3 seeds), and documents differ with a long tail, so that neither normal quantiles nor a bootstrap's
percentiles hold what they promise (`coverage` below counts it): the documents' quantiles are those of a studentised
bootstrap, which knows of tails, the seeds' those of Student's t, at the degrees of freedom that both together have.
With one seed there is nothing to say how seeds differ, and the interval is over documents alone.

    .venv/bin/python -m tests.bench.quality_intervals [--trials 400]

counts how often the intervals hold the truth where that is known.

Sources: the studentised bootstrap, Efron & Tibshirani 1993, An Introduction to the Bootstrap, section 12.5; degrees of
freedom of a sum of variances, Satterthwaite 1946, Biometrics Bulletin 2(6).

Shape legend: M methods, S seeds, D documents, B bootstrap samples.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import numpy as np
import typer
from scipy.stats import t as student_t

RESAMPLES = 1000
WORLDS = ((12, 1, 0.0), (12, 1, 0.2), (12, 2, 0.2), (12, 3, 0.2), (24, 2, 0.0), (24, 2, 0.2), (40, 3, 0.2))
MIN_DOCUMENTS = 6  # of fewer too many bootstrap samples hold one document alone
_BOTH = 0.975  # 2.5 % lie beyond it on either side

OfRatios = Callable[[np.ndarray], np.ndarray]  # M x ... ratios to the figure, element by element


class Interval(NamedTuple):
    """A figure with the bounds of its 95 % interval; not numbers where documents are fewer than `MIN_DOCUMENTS`."""

    value: float
    low: float
    high: float


def interval(methods: Sequence[Sequence[np.ndarray]], of_ratios: OfRatios) -> Interval:
    """Compute `of_ratios` of the methods' ratios of sums, with its interval.

    Args:
        methods: for each method and seed documents x 2 (sum, divisor): the same documents in the same order, and what
            windows of one document hold is one row, for they are no documents of their own.
    """
    figures = np.stack([np.stack(seeds) for seeds in methods]).astype(float)  # M x S x D x 2
    num_seeds, num_documents = figures.shape[1:3]
    ratio_M = _ratios(figures.sum((1, 2)))
    value = float(of_ratios(ratio_M))
    if num_documents < MIN_DOCUMENTS:
        return Interval(value, float("nan"), float("nan"))
    sums = figures.sum(1)  # M x D x 2
    documents = float(_variance(sums[:, None], of_ratios)[0])
    seeds = _seed_variance(figures, ratio_M, of_ratios)
    freedom_D, freedom_S = num_documents - 1, num_seeds - 1
    total = documents + seeds
    if not total > 0:
        return Interval(value, value, value)
    freedom = total**2 / (documents**2 / freedom_D + (seeds**2 / freedom_S if freedom_S else 0.0))
    quantile = float(student_t.ppf(_BOTH, freedom))
    # How much further from the middle a long tail of documents puts a bound than Student's t would.
    below, above = _document_quantiles(sums, value, of_ratios) / student_t.ppf(_BOTH, freedom_D)
    low, high = (quantile * np.sqrt(documents * stretch**2 + seeds) for stretch in (below, above))
    return Interval(value, value - float(low), value + float(high))


def over_seeds(methods: Sequence[Sequence[np.ndarray]], of_ratios: OfRatios) -> Interval | None:
    """Compute `interval` for these very documents: Student's t over seeds alone; None with one seed."""
    figures = np.stack([np.stack(seeds) for seeds in methods]).astype(float)
    num_seeds = figures.shape[1]
    if num_seeds < 2:
        return None
    ratio_M = _ratios(figures.sum((1, 2)))
    value = float(of_ratios(ratio_M))
    half = float(student_t.ppf(_BOTH, num_seeds - 1)) * _seed_variance(figures, ratio_M, of_ratios) ** 0.5
    return Interval(value, value - half, value + half)


def _ratios(sums: np.ndarray) -> np.ndarray:
    ratios: np.ndarray = sums[..., 0] / sums[..., 1]
    return ratios


def _slopes(ratios: np.ndarray, of_ratios: OfRatios) -> np.ndarray:
    """Return the figure's slope in each method's ratio; ratios and slopes are M x ...."""
    slopes = np.empty_like(ratios)
    for method in range(len(ratios)):
        step = np.zeros_like(ratios)
        step[method] = 1e-6 * np.maximum(np.abs(ratios[method]), 1e-12)
        slopes[method] = (of_ratios(ratios + step) - of_ratios(ratios - step)) / (2 * step[method])
    return slopes


def _variance(sums: np.ndarray, of_ratios: OfRatios) -> np.ndarray:
    """Return B variances of the figure over documents, linearised; sums are M x B x D x 2."""
    num = sums.shape[2]
    means = sums.mean(2)  # M x B x 2
    ratios = _ratios(means)
    residuals = (sums[..., 0] - ratios[..., None] * sums[..., 1]) / means[..., 1, None]
    influence_BD = (_slopes(ratios, of_ratios)[..., None] * residuals).sum(0)
    variance: np.ndarray = (influence_BD**2).sum(1) / (num * (num - 1))
    return variance


def _seed_variance(figures: np.ndarray, ratio_M: np.ndarray, of_ratios: OfRatios) -> float:
    """Return the variance of the figure over seeds; 0 with one, which says nothing."""
    num_seeds = figures.shape[1]
    if num_seeds < 2:
        return 0.0
    ratio_MS = _ratios(figures.sum(2))
    influence_S = (_slopes(ratio_M, of_ratios)[:, None] * ratio_MS).sum(0)
    return float(influence_S.var(ddof=1)) / num_seeds


def _document_quantiles(sums: np.ndarray, value: float, of_ratios: OfRatios) -> np.ndarray:
    """Return how many standard errors below and above the figure the bounds lie, by documents alone.

    A studentised bootstrap.
    """
    num = sums.shape[1]
    drawn = np.random.default_rng(0).integers(num, size=(RESAMPLES, num))
    again = sums[:, drawn]  # M x B x D x 2
    apart = of_ratios(_ratios(again.sum(2))) - value
    with np.errstate(divide="ignore", invalid="ignore"):
        studentised = apart / np.sqrt(_variance(again, of_ratios))
    # If all draws are one document there is no error, and the difference counts as infinite.
    studentised = np.where(np.isnan(studentised), 0.0, studentised)
    low, high = np.quantile(studentised, [1 - _BOTH, _BOTH])
    return np.array([high, -low])


def percentiles(methods: Sequence[Sequence[np.ndarray]], of_ratios: OfRatios) -> Interval:
    """Compute the interval used before, which covers too seldom.

    Percentiles of a bootstrap that redraws seeds and documents together.
    """
    figures = np.stack([np.stack(seeds) for seeds in methods]).astype(float)
    random, (num_seeds, num_documents) = np.random.default_rng(0), figures.shape[1:3]
    often_BS = random.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), RESAMPLES)
    often_BD = random.multinomial(num_documents, np.full(num_documents, 1 / num_documents), RESAMPLES)
    again = of_ratios(_ratios(np.einsum("msdk,bs,bd->mbk", figures, often_BS, often_BD, optimize=True)))
    low, high = np.quantile(again, [1 - _BOTH, _BOTH])
    return Interval(float(of_ratios(_ratios(figures.sum((1, 2))))), float(low), float(high))


class World(NamedTuple):
    """A world in which the truth is known: the mean difference of two methods is 1.

    Attributes:
        document_effect, seed_effect: standard deviations.
        tail: of the documents: exponential, lognormal or normal.
    """

    documents: int
    seeds: int
    document_effect: float = 0.6
    seed_effect: float = 0.2
    tail: str = "exponential"

    def draw(self, random: np.random.Generator) -> list[list[np.ndarray]]:
        """Draw two methods' figures on documents of unlike sizes; the second is the control."""
        effect_D = {
            "exponential": random.exponential(size=self.documents) - 1,
            "lognormal": _lognormal(random, self.documents),
            "normal": random.normal(size=self.documents),
        }[self.tail] * self.document_effect
        size_D = random.lognormal(0.0, 0.4, self.documents)
        hard_D = random.normal(5.0, 1.0, self.documents)  # what both methods find hard cancels out
        effect_S = self.seed_effect * random.normal(size=self.seeds)
        control = np.stack([size_D * hard_D, size_D], axis=1)
        ours = [np.stack([size_D * (hard_D + 1 + effect_D + own), size_D], axis=1) for own in effect_S]
        return [ours, [control] * self.seeds]


def _lognormal(random: np.random.Generator, size: int) -> np.ndarray:
    """Draw values of mean 0 and deviation 1, with the tail of one whose deviation is 0.6 of its mean."""
    sigma = np.sqrt(np.log(1 + 0.36))
    return (random.lognormal(-(sigma**2) / 2, sigma, size) - 1) / 0.6


def difference(ratios: np.ndarray) -> np.ndarray:
    """Return how far the first method's ratio is above the second's."""
    apart: np.ndarray = ratios[0] - ratios[1]
    return apart


def coverage(
    world: World,
    trials: int,
    seed: int = 0,
    kind: Callable[[Sequence[Sequence[np.ndarray]], OfRatios], Interval] = interval,
) -> tuple[float, float]:
    """Return how often a kind of interval holds the truth, and its mean width."""
    random = np.random.default_rng(seed)
    found = [kind(world.draw(random), difference) for _ in range(trials)]
    held = np.mean([one.low <= 1 <= one.high for one in found])
    return float(held), float(np.mean([one.high - one.low for one in found]))


def main(trials: Annotated[int, typer.Option(help="Of each world.")] = 400) -> None:
    """Print a line for each world."""
    print(
        "| documents | seeds | seeds' effect | exponential | normal | percentiles, exponential |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    for documents, seeds, effect in WORLDS:
        worlds = [World(documents, seeds, 0.6, effect, tail) for tail in ("exponential", "normal")]
        found = [coverage(world, trials) for world in worlds] + [coverage(worlds[0], trials, kind=percentiles)]
        cells = " | ".join(f"{held:.1%} ({width:.2f})" for held, width in found)
        print(f"| {documents} | {seeds} | {effect:g} | {cells} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
