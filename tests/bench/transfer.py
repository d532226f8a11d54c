"""Distance to the teacher before training of a student moved to another tokenizer.

By `student.averaged_row_scale`, with rows as means, and by other ways of making rows (`student.transfer`).

    .venv/bin/python -m tests.bench.transfer [--recipe pipeline/recipes/demo_mistral.yaml]
        [--scales 1.0,0.9,0.85,0.8,0.7] [--starts "lexicon lexicon keep; lexicon first_likelihood untie"]

On held-out text of the recipe's `eval` section, dumped with everything stored where that is not done; nats per byte
position and bits per byte.
"""

import itertools
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from pipeline.config import TransferConfig, student_config
from stage2_student.evaluation.asked_positions import records_of
from stage2_student.evaluation.divergence import ByteModel, document_divergence
from stage2_student.model.initial_student import end_tokens, export_start, student_tokenizer
from tests.bench.quality import Quality
from tests.bench.quality_measures import Figures


def start_figures(
    bench: Quality, values: dict[str, object], dumps: dict[str, Path], num_documents: dict[str, int]
) -> Figures:
    """Measure the recipe's student as it starts with these values of its section."""
    with tempfile.TemporaryDirectory() as folder:
        update = {**values, "path": folder}
        recipe = bench.base.with_values(student=student_config(bench.base).model_copy(update=update))
        student = student_config(recipe)
        ids = end_tokens(student, student_tokenizer(student).tokenizer)
        model = ByteModel.load(str(export_start(recipe)), ids)
        documents = {
            name: [
                document_divergence(model, record) for record in itertools.islice(records_of(dump), num_documents[name])
            ]
            for name, dump in dumps.items()
        }
    return Figures(documents, {})


def main(
    recipe: str = "pipeline/recipes/demo.yaml",
    scales: Annotated[
        str, typer.Option(help="Values of student.averaged_row_scale, with commas between.")
    ] = "1.0,0.9,0.85,0.8,0.7",
    starts: Annotated[
        str, typer.Option(help="Values of student.transfer: input, output and tie of each, with semicolons between.")
    ] = "lexicon lexicon keep; lexicon first_likelihood untie",
    in_domain: Annotated[int, typer.Option(help="Documents of the corpus' kind.")] = 16,
    out_of_domain: Annotated[int, typer.Option(help="Documents of the other kind.")] = 6,
    override: Annotated[list[str] | None, typer.Option("-o", help="section.key=value.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the held-out dumps; the quality benchmark's.")] = Path(
        "runs/quality"
    ),
) -> None:
    """Print a line for each scale, and for each start."""
    bench = Quality(recipe, override or [], out, 0)
    bench.prepare(["table"], training=False)
    dumps = bench.dumps_of["table"]
    num_documents = {"in_domain": in_domain, "out_of_domain": out_of_domain}
    print("| start | JSD in domain | JSD out | bits/byte in | bits/byte out |\n| --- | --- | --- | --- | --- |")
    means = TransferConfig(input="mean", output="mean", tie="keep")
    ways: dict[str, dict[str, object]] = {
        f"{scale:g} x the mean": {"averaged_row_scale": scale, "transfer": means}
        for scale in map(float, filter(None, scales.split(",")))
    }
    for start in filter(None, map(str.strip, starts.split(";"))):
        values = dict(zip(TransferConfig.model_fields, start.split(), strict=True))
        ways[start] = {"transfer": TransferConfig.model_validate(values)}
    for name, values_of_start in ways.items():
        found = start_figures(bench, values_of_start, dumps, num_documents)
        jsd, bits = ([found.mean(text, what) for text in dumps] for what in ("jsd", "bits_per_byte"))
        print(f"| {name} | " + " | ".join(f"{value:.4f}" for value in (*jsd, *bits)) + " |", flush=True)


if __name__ == "__main__":
    typer.run(main)
