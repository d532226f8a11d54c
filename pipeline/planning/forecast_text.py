"""A forecast as readable lines, one per figure with its interval, and the comparison with a finished dump."""

from collections.abc import Iterator
from typing import Any

from pipeline.planning.estimates import Estimate
from pipeline.planning.forecast import Calibration, Forecast
from pipeline.runtime.format import clock_time, count_of
from schemas import dump_files
from schemas.manifest import read_json
from schemas.storage.locations import Location

Line = tuple[str, str]  # a figure's name, and what is expected of it


def forecast_lines(expected: Forecast, measured: Calibration, num_workers: int) -> Iterator[Line]:
    """Yield a line per figure. ± is half of the 95 % interval, as a share; figures without it were counted."""
    text = expected.text_bytes.value
    num_shards = len(measured.shape.shards)
    sampled = sum(part.text_bytes for part in measured.parts)
    yield (
        "calibration",
        f"{sampled:,} bytes of text dumped in {sum(p.seconds for p in measured.parts):.1f} s, "
        f"{count_of(len(measured.parts), 'part')}; ± is the 95 % interval",
    )
    yield (
        "documents",
        f"{number(expected.documents)}, {text:,.0f} bytes of text in {count_of(num_shards, 'shard', ',')}",
    )
    yield (
        "teacher tokens",
        f"{number(expected.teacher_tokens)}, {expected.teacher_tokens.value / text:.4f} per byte of text; the covering "
        f"computes {expected.computed_per_token.value:.3f}{spread(expected.computed_per_token)} for each",
    )
    yield "stored", f"{number(expected.stored_bytes)} bytes, {expected.stored_bytes.value / text:.2f} per byte of text"
    rate = expected.teacher_tokens.value / expected.work_seconds.value
    yield "work", f"{duration(expected.work_seconds)} on {measured.devices}, {rate:,.0f} tokens/s"
    kind = "GPU-hours" if "x " in measured.devices else "hours of such a machine"
    workers = f"{num_workers} worker{'' if num_workers == 1 else 's'}"
    yield (
        f"{workers}",
        (
            f"{expected.device_hours.value:,.4g}{spread(expected.device_hours)} {kind}; "
            f"{duration(expected.wall_seconds)} wall time, including each worker's start-up of "
            f"{measured.load_seconds + measured.warm_seconds:.0f} s"
        ),
    )


def number(estimate: Estimate) -> str:
    """Format an estimate as an integer with its interval: `25,000 ± 1.2 %`."""
    return f"{estimate.value:,.0f}{spread(estimate)}"


def spread(estimate: Estimate) -> str:
    """Format an estimate's interval: ` ± 1.2 %`; empty below 0.05 %."""
    return f" ± {estimate.share:.1%}".replace("%", " %") if estimate.share >= 0.0005 else ""


def duration(estimate: Estimate) -> str:
    """Format a time: `1:02:03 h ± 4.0 %`, or `71.2 s` below two minutes."""
    seconds = estimate.value
    if seconds < 120:
        return f"{seconds:.1f} s{spread(estimate)}"
    return f"{clock_time(seconds)} h{spread(estimate)}"


def measured_cost(dump: Location) -> dict[str, Any] | None:
    """Read the cost of a finished dump from its summary; None without a summary, or if the shards do not record it."""
    path = dump / dump_files.SUMMARY
    summary = read_json(path) if path.exists() else {}
    return read_json(path, "teacher_tokens", "stored_bytes") if "cost" in summary else None


def forecast_error(expected: Forecast, summary: dict[str, Any]) -> str:
    """Return a finished dump's figures, each with the relative error of the forecast."""
    pairs = (
        (summary["teacher_tokens"], expected.teacher_tokens, "tokens"),
        (summary["stored_bytes"], expected.stored_bytes, "bytes"),
        (summary["cost"]["seconds"], expected.work_seconds, "s of work"),
    )
    figures = (f"{actual:,} {unit} ({estimate.value / actual - 1:+.1%} forecast)" for actual, estimate, unit in pairs)
    return ", ".join(figures) + f" on {', '.join(summary['cost']['by_devices'])}"
