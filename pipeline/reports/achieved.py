"""Sentences on what runs have achieved, in figures of their evaluation, and on what to do next."""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.reports.runs import Run
from pipeline.reports.tables import figure_of, same_text
from pipeline.runtime.format import count_of
from schemas import dump_files

_BITS = "bits_per_byte"
_EXPORT = "export"  # in a run: the trained model


def achieved(runs: Sequence[Run], page: Path) -> Iterator[str]:
    """Yield a sentence on each run, and one on what to do next.

    Args:
        page: the report that was written.
    """
    told = [of_run(run) for run in runs]
    yield from (sentence for sentence in told if sentence is not None)
    if all(sentence is None for sentence in told):
        yield f"next: `bld eval RECIPE` measures what the student has learned; then report again, and open {page}"
        return
    yield "bits per byte: how many bits a model needs for a byte of text; fewer is better, and 8 is to know nothing"
    exports = [run.folder / _EXPORT for run in runs if (run.folder / _EXPORT).is_dir()]
    model = f"; {exports[0]} is the student, a plain Hugging Face model" if len(exports) == 1 else ""
    recipe = shlex.quote(str(runs[0].folder / dump_files.RECIPE))
    yield (
        f"next: open {page} in a browser{model}; for your own text and models, copy {recipe} and change its sources "
        "and paths"
    )


def of_run(run: Run) -> str | None:
    """Return what a student has learned, on each text that its start and its teacher are measured on too.

    None if there is no such text.
    """
    parts = []
    for corpus in run.evaluation.get("student", {}):
        values = [figure_of(run, model, corpus, _BITS) for model in ("start", "student", "teacher")]
        comparable = all(
            value is not None and same_text((run, "student"), (run, model), corpus)
            for model, value in zip(("start", "student", "teacher"), values, strict=True)
        )
        if comparable:
            start, student, teacher = (value for value in values if value is not None)
            parts.append(_on_text(corpus.replace("_", " "), start, student, teacher))
    if not parts:
        return None
    moved = ", moved to another tokenizer," if run.start else ""
    return f"{run.folder}: after {count_of(run.step, 'step', ',')} the student{moved} needs {'; '.join(parts)}"


def _on_text(name: str, start: float, student: float, teacher: float) -> str:
    figures = f"{student:.3f} bits per byte on {name} text, {start:.3f} before training, its teacher {teacher:.3f}"
    if teacher >= start:
        return f"{figures}: it began no worse than its teacher"
    share = (start - student) / (start - teacher)
    if share < 0:
        return f"{figures}: it is now further from its teacher than at its start"
    return f"{figures}: {share:.0%} of the way to its teacher"
