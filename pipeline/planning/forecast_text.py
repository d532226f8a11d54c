"""A forecast for reading: a line for each figure, with how sure it is, and beside it what a finished dump took."""

from collections.abc import Iterator
from typing import Any

from pipeline.planning.estimates import Estimate
from pipeline.planning.forecast import Calibration, Forecast
from schemas import dump_files
from schemas.manifest import read_json
from schemas.storage.locations import Location

Line = tuple[str, str]  # what, and what is expected of it


def forecast_lines(found: Forecast, measured: Calibration, num_workers: int) -> Iterator[Line]:
    """± is half of the 95 % interval, as a share; what has none was counted."""
    text = found.text_bytes.value
    num_shards = len(measured.shape.shards)
    sampled = sum(part.text_bytes for part in measured.parts)
    yield (
        "calibration",
        f"{sampled:,} bytes of text dumped in {sum(p.seconds for p in measured.parts):.1f} s, {len(measured.parts)} parts; ± is the 95 % interval",
    )
    yield "documents", f"{number(found.documents)}, {text:,.0f} bytes of text in {num_shards:,} shards"
    yield (
        "teacher tokens",
        f"{number(found.teacher_tokens)}, {found.teacher_tokens.value / text:.4f} a byte of text; the covering computes "
        f"{found.computed_per_token.value:.3f}{spread(found.computed_per_token)} for each",
    )
    yield "stored", f"{number(found.stored_bytes)} bytes, {found.stored_bytes.value / text:.2f} a byte of text"
    rate = found.teacher_tokens.value / found.work_seconds.value
    yield "work", f"{duration(found.work_seconds)} on {measured.devices}, {rate:,.0f} tokens/s"
    kind = "GPU-hours" if "x " in measured.devices else "hours of such a machine"
    workers = f"{num_workers} worker{'' if num_workers == 1 else 's'}"
    yield (
        f"{workers}",
        (
            f"{found.device_hours.value:,.4g}{spread(found.device_hours)} {kind}; {duration(found.wall_seconds)} by the clock, "
            f"each worker's start of {measured.load_seconds + measured.warm_seconds:.0f} s included"
        ),
    )


def number(found: Estimate) -> str:
    return f"{found.value:,.0f}{spread(found)}"


def spread(found: Estimate) -> str:
    return f" ± {found.share:.1%}".replace("%", " %") if found.share >= 0.0005 else ""


def duration(found: Estimate) -> str:
    """`1:02:03 ± 4.0 %`, or `71.2 s` below two minutes."""
    seconds = found.value
    if seconds < 120:
        return f"{seconds:.1f} s{spread(found)}"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,}:{minutes:02}:{rest:02} h{spread(found)}"


def took(dump: Location) -> dict[str, Any] | None:
    """What the summary of a finished dump says that it took; None where there is none, or its shards do not tell."""
    path = dump / dump_files.SUMMARY
    summary = read_json(path) if path.exists() else {}
    return read_json(path, "teacher_tokens", "stored_bytes") if "cost" in summary else None


def compared(found: Forecast, summary: dict[str, Any]) -> str:
    """A finished dump's figures, and how far the forecast is from each."""
    pairs = (
        (summary["teacher_tokens"], found.teacher_tokens, "tokens"),
        (summary["stored_bytes"], found.stored_bytes, "bytes"),
        (summary["cost"]["seconds"], found.work_seconds, "s of work"),
    )
    told = (f"{took:,} {unit} ({estimate.value / took - 1:+.1%} forecast)" for took, estimate, unit in pairs)
    return ", ".join(told) + f" on {', '.join(summary['cost']['by_devices'])}"
