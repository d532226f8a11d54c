"""Accuracy of `bld plan --calibrate`. Calibration and dump alternate, since a machine's speed drifts.

    .venv/bin/python -m tests.bench.forecast [--recipe demo] [--seconds 60]

One process, one engine: a share of the calibration, a shard of the dump, and so on, until the dump is complete. Prints
what was forecast from the calibration beside what the dump's own summary says that it took, by the clock and in CPU
seconds of the process.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from pipeline.config import Recipe
from pipeline.config.loading import load_recipe
from pipeline.corpus.documents import Corpus
from pipeline.planning.forecast import Calibration, Forecast, SamplePart, forecast
from schemas.manifest import Manifest
from stage1_teacher.calibration import calibrate
from stage1_teacher.calibration.corpus_sample import survey
from stage1_teacher.dump import audit, planning, shard_cost
from stage1_teacher.dump.job import read_shards
from stage1_teacher.dump.shard_writer import make_shards
from stage1_teacher.dump.summary import summarise
from stage1_teacher.targets.opening import open_teacher
from stage1_teacher.targets.resolved import load_tokenizer
from stage1_teacher.targets.teacher import Teacher


class Turn(NamedTuple):
    """A share of the calibration and the shard after it; CPU seconds of this process."""

    parts: list[SamplePart]
    calibration_cpu: float
    dump_cpu: float


def turns(
    recipe: Recipe, planned: planning.Prepared, teacher: Teacher, scratch: Path, seconds: float
) -> Iterator[Turn]:
    """Dump all shards, with a share of the calibration before each."""
    shards = planned.manifest.shards
    found = survey(Corpus(recipe.corpus), int(recipe.dump.shard_bytes), None)
    _, again = calibrate.dump_first(found.sample, teacher, recipe, scratch)
    size = calibrate.part_bytes(again, recipe, seconds)
    groups = list(calibrate.grouped(found.sample, size))
    for number, shard in enumerate(shards):
        before = time.process_time()
        own = groups[number :: len(shards)]
        folder = scratch / f"parts-{number}"
        parts = list(calibrate.dump_parts(own, teacher, recipe, folder, seconds / len(shards)))
        between = time.process_time()
        read = read_shards([shard], Corpus(recipe.corpus).reader(), planned.places)
        made = make_shards(read, teacher, recipe, planned.manifest.identity, Path(recipe.dump.path), planned.audited)
        assert sum(one.stored_bytes for one in made)
        yield Turn(parts, between - before, time.process_time() - between)


def gathered(recipe: Recipe, teacher: Teacher, taken: list[Turn], scratch: Path, seconds: float) -> Calibration:
    """Return what `bld plan --calibrate` would measure, without the start: this process was warm."""
    found = survey(Corpus(recipe.corpus), int(recipe.dump.shard_bytes), None)
    parts = [part for turn in taken for part in turn.parts]
    paths = [path for number in range(len(taken)) for path in calibrate.part_paths(scratch / f"parts-{number}")]
    num_audited = min(recipe.dump.audit_documents, audit.affordable(found.shape.num_bytes))
    return Calibration(
        shape=found.shape,
        documents=calibrate.encoded(found.sample, teacher, seconds * calibrate.ENCODE_SHARE)[0],
        parts=parts,
        files=calibrate.joined(paths, [part.text_bytes for part in parts], scratch / "joined.parquet", recipe),
        load_seconds=0.0,
        warm_seconds=0.0,
        read_seconds=found.seconds,
        audit_seconds=calibrate.seconds_of_audit(found.sample, teacher, num_audited),
        devices=shard_cost.devices(recipe),
        num_devices=shard_cost.num_devices(recipe),
    )


def print_rounds(manifest: Manifest, folder: Path, taken: list[Turn]) -> None:
    print("\n| turn | calibration: tokens | us/token | CPU us/token | shard: tokens | us/token | CPU us/token |")
    print("| --- " * 7 + "|")
    for number, (turn, shard) in enumerate(zip(taken, manifest.shards, strict=True)):
        own = sum(part.teacher_tokens for part in turn.parts)
        spent = sum(part.seconds for part in turn.parts)
        of_shard = calibrate.read_part(shard, folder)
        cells = [own, spent / own * 1e6, turn.calibration_cpu / own * 1e6]
        cells += [of_shard.teacher_tokens, of_shard.seconds / of_shard.teacher_tokens * 1e6]
        cells += [turn.dump_cpu / of_shard.teacher_tokens * 1e6]
        print(f"| {number} | " + " | ".join(f"{cell:,.0f}" for cell in cells) + " |")


def print_comparison(found: Forecast, folder: Path, manifest: Manifest) -> None:
    summary = summarise(folder, manifest)
    rows = (
        ("documents", found.documents, summary["documents"]),
        ("teacher tokens", found.teacher_tokens, summary["teacher_tokens"]),
        ("stored bytes", found.stored_bytes, summary["stored_bytes"]),
        ("seconds", found.work_seconds, summary["cost"]["seconds"]),
    )
    print("\n| what | forecast | ± (95 %) | the dump took | forecast / took |\n| --- | --- | --- | --- | --- |")
    for name, estimate, took in rows:
        print(f"| {name} | {estimate.value:,.1f} | {estimate.share:.1%} | {took:,.1f} | {estimate.value / took:.3f} |")


def main(
    recipe: str = "demo",
    seconds: Annotated[float, typer.Option(help="of the calibration, all turns together")] = 60.0,
    override: Annotated[list[str] | None, typer.Option("-o", help="section.key=value of the recipe")] = None,
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        loaded = load_recipe(recipe, [*(override or []), f"dump.path={scratch}/dump"])
        (Path(scratch) / "dump" / "shards").mkdir(parents=True)
        named = load_tokenizer(loaded)
        planned = planning.prepare(loaded, Corpus(loaded.corpus), named)
        with open_teacher(loaded, *named, branches=bool(planned.audited)) as teacher:
            taken = list(turns(loaded, planned, teacher, Path(scratch), seconds))
            measured = gathered(loaded, teacher, taken, Path(scratch), seconds)
        print_rounds(planned.manifest, Path(scratch) / "dump", taken)
        print_comparison(forecast(measured, 1), Path(scratch) / "dump", planned.manifest)


if __name__ == "__main__":
    typer.run(main)
