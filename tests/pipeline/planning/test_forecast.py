"""Forecasts against known populations and schedules."""

import itertools

import numpy as np
import pytest

from pipeline.planning.estimates import Estimate, counted, ratio, student_t
from pipeline.planning.forecast import (
    Calibration,
    CorpusShape,
    EncodedDocument,
    Forecast,
    SamplePart,
    TrialFile,
    forecast,
    makespan,
)
from pipeline.planning.forecast_text import forecast_error, forecast_lines


def made_by(seconds_per_token: float, shape: CorpusShape, **known: float) -> Calibration:
    """Return the figures of a teacher of constant speed, whose files cost 1,000 bytes and 5 for each of text."""
    sizes = (100, 200, 300, 400)
    return Calibration(
        shape=shape,
        documents=[EncodedDocument(size, size // 4) for size in sizes],
        parts=[SamplePart(size, size // 4, size // 2, 1000 + 5 * size, size / 4 * seconds_per_token) for size in sizes],
        files=[TrialFile(1000, 6000, 7000)],
        load_seconds=known.get("load", 0.0),
        warm_seconds=known.get("warm", 0.0),
        read_seconds=known.get("read", 0.0),
        audit_seconds=known.get("audit", 0.0),
        devices="2 x GPU",
        num_devices=2,
    )


def test_what_does_not_vary_is_forecast_exactly() -> None:
    shape = CorpusShape(counted(400), 100_000, [25_000] * 4)
    found = forecast(made_by(0.01, shape, load=30, warm=5, read=2, audit=3), num_workers=2)
    assert found.teacher_tokens == (25_000, 0) and found.computed_per_token == (2, 0)
    assert found.stored_bytes.value == pytest.approx(4 * 1000 + 5 * 100_000)
    assert found.work_seconds.value == pytest.approx(250 + 3 + 2 + 5) and found.work_seconds.half == pytest.approx(0)
    assert found.wall_seconds.value == pytest.approx(255 / 2 + 30 + 5 + 2)
    assert found.device_hours.value == pytest.approx((255 + 2 * 37) * 2 / 3600)


def test_the_interval_of_a_ratio_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(6, 1, 300)
    amounts = sizes * rng.normal(0.25, 0.03, 300)
    truth = amounts.sum() / sizes.sum()
    held = 0
    for _ in range(1000):
        some = rng.choice(300, 60, replace=False)
        found = ratio(amounts[some].tolist(), sizes[some].tolist(), population=300)
        held += abs(found.value - truth) <= found.half
    assert 900 < held < 985  # 95 % of endless normal samples; sizes of a long tail cost some


@pytest.mark.parametrize("num", [5, 12, 40])
def test_an_interval_of_few_units_of_unlike_size_holds_the_truth_as_often_as_it_says(num: int) -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        sizes = rng.lognormal(6, 1, num)
        found = ratio((sizes * rng.normal(0.25, 0.05, num)).tolist(), sizes.tolist())
        held += abs(found.value - 0.25) <= found.half
    assert 920 < held < 985


def test_a_sample_of_everything_is_certain_and_one_of_two_is_refused() -> None:
    assert ratio([1, 2, 6], [1, 1, 1], population=3).half == 0
    assert ratio([1, 2, 6], [1, 1, 1]).half > 0
    with pytest.raises(ValueError, match="too few"):
        ratio([1, 2], [1, 1])


@pytest.mark.parametrize(("freedom", "quantile"), [(2, 4.3027), (3, 3.1824), (5, 2.5706), (10, 2.2281), (100, 1.9840)])
def test_students_t_is_that_of_the_tables(freedom: int, quantile: float) -> None:
    assert student_t(freedom) == pytest.approx(quantile, rel=0.01)


def test_variances_of_products_and_sums_add() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(100, 2, 200_000), rng.normal(50, 3, 200_000)
    product, total = Estimate(100, 2).times(Estimate(50, 3)), Estimate(100, 2).plus(Estimate(50, 3))
    assert product.half == pytest.approx((a * b).std(), rel=0.02) and total.half == pytest.approx(
        (a + b).std(), rel=0.02
    )


def test_the_busiest_worker_is_that_of_a_plain_simulation() -> None:
    rng = np.random.default_rng(2)
    for num_workers in (1, 2, 3, 7):
        shards = rng.integers(1, 50, 20).tolist()
        clock, free, todo = 0, [0] * num_workers, list(shards)
        for clock in itertools.count():  # every tick, who is free takes the next
            for worker in range(num_workers):
                if free[worker] <= clock and todo:
                    free[worker] = clock + todo.pop(0)
            if not todo:
                break
        assert makespan(shards, num_workers) == max(free)


def test_workers_beyond_the_shards_gain_nothing() -> None:
    shape = CorpusShape(counted(400), 100_000, [60_000, 40_000])
    few, many = (forecast(made_by(0.01, shape), number) for number in (2, 50))
    assert few.wall_seconds == many.wall_seconds and few.wall_seconds.value == pytest.approx(150)


def test_the_lines_name_each_figure_and_a_finished_dump_stands_beside() -> None:
    shape = CorpusShape(counted(400), 100_000, [25_000] * 4)
    found: Forecast = forecast(made_by(0.01, shape), 3)
    said = "\n".join(": ".join(line) for line in forecast_lines(found, made_by(0.01, shape), 3))
    assert "25,000" in said and "504,000 bytes" in said and "3 workers" in said and "GPU-hours" in said
    took = {
        "teacher_tokens": 25_000,
        "stored_bytes": 560_000,
        "cost": {"seconds": 200.0, "by_devices": {"2 x GPU": 200.0}},
    }
    assert "(-10.0% forecast)" in forecast_error(found, took) and "(+25.0% forecast)" in forecast_error(found, took)
