"""Probe of a student's starts: where each stands after some steps of training, not before the first.

    .venv/bin/python -m tests.bench.transfer [--recipe pipeline/recipes/demo_mistral.yaml]
        [--starts "mean mean keep; lexicon lexicon keep; lexicon first_likelihood untie"] [--steps 50] [--seeds 2]
        [--objectives "ce 0.3 kl 1; ce 1 kl 0"] [--split validation]

Two starts that are apart at step 0 may not be after 50 steps, and two that are not may come apart: what counts is what
training does not repair. Each start is made once and trained with every objective and seed by the recipe. Measured on
text that no dump holds, `validation` (which no table of methods reports) or `test`: bits per byte, by kind of token
(`pipeline.evaluation`'s `start_figures`), and the divergence to the teacher. Resumable: what is there is not done
again. Figures: `tests/bench/results/transfer-RECIPE.json`.
"""

import itertools
import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from pipeline.config import CorpusConfig, Recipe, TransferConfig, student_config
from pipeline.config.loading import load_recipe
from schemas import dump_files
from schemas.manifest import write_json
from stage2_student.evaluation.asked_positions import records_of
from stage2_student.evaluation.divergence import ByteModel, document_divergence
from stage2_student.evaluation.start_figures import start_figures
from stage2_student.model.initial_student import end_tokens, export_start, student_tokenizer
from stage2_student.runs.start import asked_models
from tests.bench import results
from tests.bench.pages import table
from tests.bench.quality import SEARCH_SKIP, Quality

# Documents that are measured: validation is what settings are chosen by, test is reported.
DOCUMENTS = {"validation": {"in_domain": 40, "out_of_domain": 16}, "test": {"in_domain": 60, "out_of_domain": 20}}
SKIP = {"validation": SEARCH_SKIP, "test": {"in_domain": 700, "out_of_domain": 300}}
JSD_DOCUMENTS = {"in_domain": 8, "out_of_domain": 3}  # the divergence costs five times as much as the bits
Objective = str  # "ce 0.3 kl 1"


class Trained(NamedTuple):
    """A student of the probe. With `steps` 0 it is the start itself, and `objective` and `seed` have no part."""

    start: str
    objective: Objective
    steps: int
    seed: int

    @property
    def name(self) -> str:
        parts = [self.start] if self.steps == 0 else [self.start, self.objective, str(self.steps), str(self.seed)]
        return " ".join(parts).replace(" ", "-")


class Probe:
    """The starts of one recipe, in a folder."""

    def __init__(self, recipe: str, overrides: Sequence[str], out: Path, split: str) -> None:
        self.bench = Quality(recipe, overrides, out, 0)
        self.recipe, self.overrides, self.out, self.split = recipe, list(overrides), out, split
        self.bench.prepare(["search"])

    def corpora(self) -> dict[str, CorpusConfig]:
        """Return the text to measure on."""
        held_out = self.bench.base.eval
        assert held_out is not None, "the recipe has no eval section"
        corpora = {"in_domain": held_out.corpus}
        if held_out.out_of_domain is not None:
            corpora["out_of_domain"] = held_out.out_of_domain
        return {
            name: corpus.model_copy(
                update={"skip": corpus.skip + SKIP[self.split][name], "limit": DOCUMENTS[self.split][name]}
            )
            for name, corpus in corpora.items()
        }

    def figures(self, trained: Trained) -> dict[str, Any]:
        """Make the start, train the student and measure it, if that is not done."""
        file = self.out / "figures" / f"{trained.name}.{self.split}.json"
        if not file.exists():
            start = self._start(trained.start)
            recipe = self._recipe(trained)
            folder, model = Path(student_config(recipe).path), start
            if trained.steps:
                self._train(recipe, start, trained.name)
                model = folder / "export"
            write_json(file, self._measured(recipe, model))
            if trained.steps:
                shutil.rmtree(folder)
        found = dict(json.loads(file.read_text(encoding="utf-8")))
        if not trained.steps:
            found["rows"] = json.loads((self._start(trained.start) / dump_files.TRANSFER).read_text(encoding="utf-8"))
        return found

    def _start(self, start: str) -> Path:
        return export_start(self._recipe(Trained(start, "", 0, 0)))

    def _recipe(self, trained: Trained) -> Recipe:
        values = dict(zip(TransferConfig.model_fields, trained.start.split(), strict=True))
        overrides = [*self.overrides, f"student.path={self.out / 'runs' / trained.name}"]
        if trained.steps:
            weights = dict.fromkeys(("ce", "byte_ce", "kl"), 0.0)
            parts = trained.objective.split()
            weights |= {name: float(weight) for name, weight in zip(parts[::2], parts[1::2], strict=True)}
            overrides += [
                f"train.objectives={weights}",
                f"train.steps={trained.steps}",
                f"train.save_every={trained.steps}",
                f"train.warmup_steps={max(1, trained.steps // 4)}",
                f"train.seed={trained.seed}",
            ]
        recipe = load_recipe(self.recipe, overrides)
        student = student_config(recipe).model_copy(update={"transfer": TransferConfig.model_validate(values)})
        return recipe.with_values(student=student)

    def _train(self, recipe: Recipe, start: Path, name: str) -> None:
        folder = Path(student_config(recipe).path)
        if not (folder / dump_files.START).exists():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copytree(start, folder / dump_files.START)
        self.bench.run("student", recipe, name)

    def _measured(self, recipe: Recipe, model: Path) -> dict[str, Any]:
        student = student_config(recipe)
        ids = end_tokens(student, student_tokenizer(student).tokenizer)
        before, after, is_made_V = asked_models(student, model, ids, chats=False, max_tokens=None)
        text = {name: start_figures(after, before, is_made_V, corpus) for name, corpus in self.corpora().items()}
        if self.split == "validation":
            byte_model = ByteModel.load(str(model), ids)
            for name, dump in self.bench.dumps_of["search"].items():
                records = list(itertools.islice(records_of(dump), JSD_DOCUMENTS[name]))
                found = [document_divergence(byte_model, record) for record in records]
                text[name]["jsd"] = sum(d.jsd_nats for d in found) / sum(d.positions for d in found)
        return {"text": text}


def row(name: str, seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a row of the table: means over seeds, with a standard deviation where there are several."""
    cells: dict[str, Any] = {"start; objective": name}
    for text, first in seeds[0]["text"].items():
        where = text.replace("_", " ")
        bits = [found["text"][text]["bits_per_byte"] for found in seeds]
        deviation = {"error": round(statistics.stdev(bits), 4)} if len(bits) > 1 else {}
        cells[f"bits/byte {where}"] = {"value": round(statistics.mean(bits), 4), **deviation}
        cells[f"{where}: {', '.join(first['buckets'])}"] = [
            round(statistics.mean(found["text"][text]["buckets"][kind]["bits"] for found in seeds), 3)
            for kind in first["buckets"]
        ]
        if "jsd" in first:
            jsd = statistics.mean(found["text"][text]["jsd"] for found in seeds)
            cells[f"JSD {where}, nats"] = round(jsd, 4)
    return cells


def main(
    recipe: str = "pipeline/recipes/demo.yaml",
    starts: Annotated[
        str, typer.Option(help="Values of student.transfer: input, output and tie of each, with semicolons between.")
    ] = "mean mean keep; lexicon lexicon keep; lexicon first_likelihood untie",
    objectives: Annotated[
        str, typer.Option(help="Weights of train.objectives, with semicolons between.")
    ] = "ce 0.3 kl 1; ce 1 kl 0",
    steps: Annotated[int, typer.Option(help="Optimizer steps of the recipe; 0: the starts alone.")] = 50,
    seeds: Annotated[int, typer.Option(help="Seeds of each start and objective.")] = 2,
    split: Annotated[str, typer.Option(help="validation, or test for the start that was chosen.")] = "validation",
    override: Annotated[list[str] | None, typer.Option("-o", help="section.key=value, for every run.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of runs; default: runs/transfer/RECIPE.")] = None,
) -> None:
    """Run everything that is missing, and print a line for each start and objective."""
    if split not in DOCUMENTS:
        raise typer.BadParameter(f"--split is {split}, but must be one of {', '.join(DOCUMENTS)}")
    name = Path(recipe).stem
    probe = Probe(recipe, override or [], out or Path("runs/transfer") / name, split)
    ways, weights = ([part.strip() for part in text.split(";") if part.strip()] for text in (starts, objectives))
    wanted = {way: [Trained(way, "", 0, 0)] for way in ways}
    if steps:
        wanted |= {
            f"{way}; {objective}; {steps} steps": [Trained(way, objective, steps, seed) for seed in range(seeds)]
            for objective in weights
            for way in ways
        }
    known = results.load(f"transfer-{name}")
    for label, runs in wanted.items():
        found = [probe.figures(run) for run in runs]
        known.setdefault(split, {})[label] = found
        known[f"{split}_rows"] = [row(one, runs_of) for one, runs_of in known[split].items()]
        results.save(f"transfer-{name}", known)
        print(table([row(label, found)], list(row(label, found))), flush=True)


if __name__ == "__main__":
    typer.run(main)
