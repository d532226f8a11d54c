"""`bld plan`: what a recipe would do and cost."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.options import AsJson, Overrides, RecipeArgument, as_begun, load

if TYPE_CHECKING:
    from pipeline.config import Recipe


def show_plan(
    recipe: RecipeArgument,
    override: Overrides = None,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Dump a sample with the real teacher, and forecast the cost of the whole."),
    ] = False,
    seconds: Annotated[
        float, typer.Option(min=1, help="Time to spend on the sample, excluding engine start-up (with --calibrate).")
    ] = 60.0,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Machines, or groups of GPUs, like the one measured (with --calibrate; default: as many as this "
            "machine has).",
        ),
    ] = None,
    corpus_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Size of the whole corpus, e.g. 1TB, if reading all of it takes too long (with --calibrate).",
        ),
    ] = None,
    json: AsJson = False,
) -> None:
    """Check a recipe and print what it would download, make and write.

    Without --calibrate it needs no network and no weights.
    """
    from pipeline.planning.dry_run import plan, print_lines
    from schemas.json_text import json_text

    loaded = as_begun(load(recipe, override))
    remarks: list[str] = []
    if loaded.student is not None:
        from stage2_student.launch.launch import checked

        loaded, remarks = checked(loaded)
    lines = [*plan(loaded, cuts_records(loaded)), *(("train", remark) for remark in remarks)]
    if loaded.generate is not None:
        from stage1_teacher.generation.dry_run import settings_lines

        settings = [(f"generate: {what}", said) for what, said in settings_lines(loaded)]
        lines += [
            *settings,
            ("generate.prompts", "counted by `bld generate RECIPE --dry-run`, with shards and engines"),
        ]
    if loaded.student is not None and (Path(loaded.student.path) / "lengths").exists():
        from stage2_student.training.usable import counted_lines  # seconds to import

        lines += counted_lines(loaded)
    values: dict[str, Any] = {"plan": dict(lines)}
    if calibrate:
        forecast_lines, forecast_values = _forecast(loaded, seconds, workers, corpus_bytes)
        lines, values = lines + forecast_lines, values | forecast_values
    if json:
        typer.echo(json_text(values, indent=1))
    else:
        print_lines(lines)


def cuts_records(recipe: "Recipe") -> bool:
    """Return whether the recipe's student cuts long records; a run begun by an early release leaves them out."""
    if recipe.student is None:
        return True
    from stage2_student.data.order import WHOLE_RECORDS
    from stage2_student.runs.folder import data_order

    return data_order(Path(recipe.student.path)) > WHOLE_RECORDS


def _forecast(
    recipe: "Recipe", seconds: float, workers: int | None, corpus_bytes: str | None
) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Return a forecast as readable lines and as JSON values."""
    from pydantic import ByteSize, TypeAdapter

    from pipeline.planning import forecast_text
    from pipeline.planning.engine_shares import engine_shares, num_independent
    from pipeline.planning.forecast import forecast
    from schemas.storage.locations import location
    from stage1_teacher.calibration.calibrate import calibrate

    size = None if corpus_bytes is None else int(TypeAdapter(ByteSize).validate_python(corpus_bytes))
    workers = workers or num_independent(engine_shares(recipe))
    measured = calibrate(recipe, seconds, size)
    expected = forecast(measured, workers)
    lines = list(forecast_text.forecast_lines(expected, measured, workers))
    values: dict[str, Any] = {"workers": workers, "devices": measured.devices, "forecast": expected.as_dict()}
    if recipe.student is not None:
        from stage2_student.launch.memory_estimate import footprint_lines
        from stage2_student.training.usable import usable_lines

        student = [*footprint_lines(recipe), *usable_lines(recipe, measured.records)]
        lines += student
        values["student"] = dict(student)
    summary = forecast_text.measured_cost(location(recipe.dump.path))
    if summary is not None:
        lines.append(("dump.path took", forecast_text.forecast_error(expected, summary)))
        values["took"] = {key: summary[key] for key in ("teacher_tokens", "stored_bytes", "cost")}
    return lines, values
