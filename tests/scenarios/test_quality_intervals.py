"""The benchmark's 95 % intervals have about that coverage, and one document counts as one."""

import math

import numpy as np
import pytest

from stage2_student.evaluation.divergence import DocumentDivergence
from tests.bench import pages, quality_intervals
from tests.bench.quality import row, way_from_start
from tests.bench.quality_intervals import World, coverage, difference, interval, over_seeds, percentiles
from tests.bench.quality_measures import Figures, closed, gap_closed, paired_interval


@pytest.mark.parametrize(
    "world",
    [
        World(12, 2),
        World(12, 3),
        World(24, 2),
        World(12, 1, seed_effect=0.0),
        World(12, 3, tail="lognormal"),
        World(24, 2, tail="normal"),
    ],
)
def test_an_interval_holds_the_truth_as_often_as_it_says(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_intervals, "RESAMPLES", 300)
    held, _ = coverage(world, trials=300)
    before, _ = coverage(world, trials=300, kind=percentiles)
    assert before < held - 0.01
    assert 0.90 < held < 0.985  # of 300 trials at 95 % these are -4 and +3 standard errors


def test_one_seed_says_nothing_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_intervals, "RESAMPLES", 300)
    held, _ = coverage(World(12, 1), trials=300)
    assert held < 0.9
    assert over_seeds(World(12, 1).draw(np.random.default_rng(0)), difference) is None


def test_windows_of_a_document_are_one_document() -> None:
    def record(doc_id: str, nats: float, size: int) -> DocumentDivergence:
        return DocumentDivergence(doc_id, size, nats, size, nats, size, nats)

    found = Figures({"d": [record("a", 1.0, 10), record("b", 2.0, 20), record("a", 3.0, 5)]}, {})
    assert found.per_document("d", "jsd").tolist() == [[4.0, 15.0], [2.0, 20.0]]
    assert found.mean("d", "jsd") == pytest.approx(6 / 35)


def test_figure_and_width_are_those_of_the_formulas_where_documents_are_alike_in_size() -> None:
    random = np.random.default_rng(3)
    values_SD = random.normal(2.0, 0.5, (3, 12))
    ours = [np.stack([row, np.ones(12)], axis=1) for row in values_SD]
    theirs = [np.stack([np.zeros(12), np.ones(12)], axis=1)] * 3
    found = paired_interval(ours, theirs)
    assert found.value == pytest.approx(values_SD.mean())
    # Student's t, by hand: variances of the document means and of the seed means.
    documents = values_SD.mean(0).var(ddof=1) / 12
    seeds = values_SD.mean(1).var(ddof=1) / 3
    freedom = (documents + seeds) ** 2 / (documents**2 / 11 + seeds**2 / 2)
    half = quality_intervals.student_t.ppf(0.975, freedom) * math.sqrt(documents + seeds)
    assert (found.high - found.low) / 2 == pytest.approx(
        half, rel=0.15
    )  # normal values: the bootstrap has little to add
    of_seeds = over_seeds((ours, theirs), difference)
    assert of_seeds is not None and of_seeds.high - of_seeds.value == pytest.approx(
        4.302653 * math.sqrt(seeds), rel=1e-4
    )


def test_the_share_of_a_gap_has_the_interval_that_its_slopes_give() -> None:
    world = World(40, 3, document_effect=0.05, seed_effect=0.01)
    control, ours = world.draw(np.random.default_rng(0))
    best = control[0] - np.array([4.0, 0.0]) * control[0][:, 1:]
    found = gap_closed(ours, control, best)
    between = paired_interval(ours, control)
    gap = paired_interval([best] * 3, control).value
    assert found.value == pytest.approx(between.value / gap)
    assert 0.5 < (found.high - found.low) / ((between.high - between.low) / abs(gap)) < 2
    again = interval((ours, control, [best] * 3), closed)
    assert again == found


def test_a_few_documents_have_no_interval() -> None:
    found = interval(World(5, 3).draw(np.random.default_rng(0)), difference)
    assert math.isfinite(found.value) and math.isnan(found.low) and math.isnan(found.high)


def test_a_row_of_the_table_has_the_difference_to_the_control_and_the_way_from_the_start() -> None:
    generator = np.random.default_rng(0)
    hard = generator.uniform(0.5, 1.5, 40)

    def model(bits: float) -> Figures:
        documents = [
            DocumentDivergence(str(i), 100, bits * one, 50, bits * one, 100, 100 * math.log(2) * bits * one)
            for i, one in enumerate(hard / hard.mean())
        ]
        return Figures({"in_domain": documents, "out_of_domain": documents}, {})

    start, teacher = model(2.0), model(1.0)
    found = row("halfway", [model(1.5), model(1.5)], [model(1.75), model(1.75)])
    bits = found["bits/byte out of domain"]
    assert (bits["value"], bits["difference"]) == (1.5, -0.25) and bits["interval"][0] <= -0.25 <= bits["interval"][1]
    assert found["JSD in domain, nats"]["value"] == pytest.approx(0.015) and found["bits/byte in domain"] == 1.5
    assert row("control", [model(1.75)], None)["bits/byte out of domain"] == 1.75
    assert way_from_start([model(1.5)], start, teacher)["value"] == 50.0
    assert way_from_start([model(2.25)], start, teacher)["value"] == -25.0  # what a method loses is not hidden
    [_, _, line] = pages.table([found], list(found)).splitlines()
    assert line.startswith("| halfway | 0.0150 (-0.0025 [")
