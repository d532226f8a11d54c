"""What students learn, by method: each at its best settings beside plain cross-entropy, on the same text, steps and batch.

    .venv/bin/python -m tests.bench.quality [--recipe pipeline/recipes/demo.yaml] [--methods "sft; linear"] [--steps 40] [--seeds 3]

Settings (learning rates) are searched by successive halving, the same budget for every method: all of them for a quarter of the steps, the
better half for half (where they are within 3 % of each other), judged by the Jensen-Shannon divergence to the teacher on held-out text that
the table does not use. The best one is trained with each seed. `--no-search` takes each method's first setting that the recipe's learning
rate is in. Measures: divergence to the teacher on held-out text of the corpus' kind and of another (`eval`), bits per byte, accuracy on
multiple-choice questions; differences to `sft` with 95 % intervals over documents and seeds. Resumable: what is there is not done again.
"""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from pipeline.config import Recipe, student_config
from pipeline.recipe import load_recipe, save_recipe
from pipeline.source import resolve_model
from stage1_teacher.teacher import load_tokenizer, resolve_ids
from stage2_student.start import end_tokens, export_start, student_tokenizer
from tests.bench.quality_measures import Figures, gap_closed, measure, paired_interval
from tests.bench.quality_methods import METHODS, method_of

SEARCH_SKIP = {"in_domain": 500, "out_of_domain": 200}  # held-out documents that the table does not use
SEARCH_DOCUMENTS = {"in_domain": 16, "out_of_domain": 6}
CONTROL = "sft"
TIE = 0.03  # settings that are further behind the best are out


def bld(*arguments: str) -> None:
    """One command of the product, as an operator would run it."""
    print("$ bld " + " ".join(arguments), flush=True)
    subprocess.run([sys.executable, "-m", "pipeline", *arguments], check=True)


class Run(NamedTuple):
    """A student to be trained."""

    method: str
    setting: tuple[str, ...]
    steps: int
    seed: int

    @property
    def name(self) -> str:
        digest = hashlib.sha256("\n".join(self.setting).encode()).hexdigest()[:8]
        return f"{self.method.split()[0]}-{digest}-{self.steps}-{self.seed}"


class Quality:
    """The benchmark's folder: dumps of held-out text, runs, figures."""

    def __init__(self, recipe: str, overrides: Sequence[str], out: Path, num_questions: int) -> None:
        self.recipe, self.overrides, self.out, self.num_questions = recipe, list(overrides), out, num_questions
        self.base = load_recipe(recipe, self.overrides)
        for folder in ("recipes", "figures", "dumps", "runs"):
            (out / folder).mkdir(parents=True, exist_ok=True)

    def dumps(self, split: str) -> dict[str, Path]:
        """Held-out text with everything stored, made where it is missing: `search` or `table`."""
        assert self.base.eval is not None, "the recipe has no eval section"
        corpora = {"in_domain": self.base.eval.corpus}
        if self.base.eval.out_of_domain is not None:
            corpora["out_of_domain"] = self.base.eval.out_of_domain
        found = {}
        for name, corpus in corpora.items():
            if split == "search":
                part = {"skip": corpus.skip + SEARCH_SKIP[name], "limit": SEARCH_DOCUMENTS[name]}
                corpus = corpus.model_copy(update=part)
            found[name] = self.out / "dumps" / f"{split}-{name}"
            stored = {"path": str(found[name]), "top_k": 256, "min_prob": 0.0, "audit_documents": 0}
            self._bld(
                "teacher",
                self.base.with_values(corpus=corpus, dump=self.base.dump.model_copy(update=stored)),
                f"{split}-{name}",
            )
        return found

    def _bld(self, command: str, recipe: Recipe, name: str) -> None:
        path = self.out / "recipes" / f"{name}.yaml"
        save_recipe(recipe, path)
        bld(command, str(path))

    def figures(self, run: Run, split: str) -> Figures:
        """Train a student and measure it, where that is not done. Its weights are deleted after a search, and kept else."""
        file = self.out / "figures" / f"{run.name}.{split}.json"
        folder = self.out / "runs" / run.name
        recipe = self._recipe(run, folder)
        if not file.exists():
            if recipe.dump != self.base.dump:  # a method that learns from a dump of its own
                self._bld("teacher", recipe, f"{run.name}-dump")
            self._bld("student", recipe, run.name)
        student = student_config(recipe)
        ends = end_tokens(student, student_tokenizer(student).tokenizer)
        found = self._measure(str(folder / "export"), ends.start, (ends.end,), split, file)
        for name in ("checkpoints", "start", *(["export"] if split == "search" else [])):
            shutil.rmtree(folder / name, ignore_errors=True)
        return found

    def _recipe(self, run: Run, folder: Path) -> Recipe:
        schedule = [
            f"train.steps={run.steps}",
            f"train.save_every={run.steps}",
            f"train.warmup_steps={max(1, run.steps // 4)}",
        ]
        own = [f"train.seed={run.seed}", f"student.path={folder}"]
        return load_recipe(self.recipe, [*self.overrides, *schedule, *run.setting, *own])

    def _measure(self, model: str, start: int, ends: tuple[int, ...], split: str, file: Path) -> Figures:
        return measure(model, start, ends, self.dumps_of[split], self.num_questions if split == "table" else 0, file)

    def prepare(self, splits: Sequence[str]) -> None:
        """The dump that students learn from, and those of held-out text."""
        self._bld("teacher", self.base, "dump")
        self.dumps_of = {split: self.dumps(split) for split in splits}

    def start_and_teacher(self) -> dict[str, Figures]:
        """The table's first two lines."""
        recipe = self.base.with_values(
            student=student_config(self.base).model_copy(update={"path": str(self.out / "runs/start")})
        )
        student = student_config(recipe)
        ends = end_tokens(student, student_tokenizer(student).tokenizer)
        figures = self.out / "figures"
        start = self._measure(str(export_start(recipe)), ends.start, (ends.end,), "table", figures / "start.json")
        first, last = resolve_ids(recipe, load_tokenizer(recipe)[1])
        assert first is not None
        model = resolve_model(recipe.teacher.model, recipe.teacher.revision)
        return {"teacher": self._measure(model, first, last, "table", figures / "teacher.json"), "start": start}

    def search(self, method: str, steps: int) -> tuple[str, ...]:
        """The method's best setting, by successive halving."""
        left = method_of(method).settings()
        for share, kept in ((4, 2), (2, 1)):
            scores = {setting: self._score(Run(method, setting, max(1, steps // share), 0)) for setting in left}
            best = min(scores.values())
            left = sorted(left, key=lambda setting: scores[setting])[:kept]
            left = [setting for setting in left if scores[setting] <= (1 + TIE) * best]
            for setting in left:
                print(
                    f"{method}, {steps // share} steps: {scores[setting]:.4f} nats with {' '.join(setting)}", flush=True
                )
            if len(left) == 1:
                break
        return left[0]

    def _score(self, run: Run) -> float:
        found = self.figures(run, "search")
        return sum(found.mean(name, "jsd") for name in found.documents) / len(found.documents)

    def unsearched(self, method: str) -> tuple[str, ...]:
        settings = method_of(method).settings()
        rate = f"train.lr={self.base.train.lr:.1e}"
        return next((setting for setting in settings if rate in setting), settings[0])


def lines(name: str, found: Sequence[Figures], control: Sequence[Figures] | None) -> str:
    """A line of the table: means over seeds; the difference to the control where both were trained."""
    first = found[0]

    def mean(dump: str, what: str) -> str:
        return f"{sum(f.mean(dump, what) for f in found) / len(found):.4f}" if dump in first.documents else ""

    def apart(dump: str, what: str, scale: float = 1.0) -> str:
        if control is None or dump not in first.documents:
            return ""
        pair = [[f.per_document(dump, what) for f in figures] for figures in (found, control)]
        middle, low, high = (scale * value for value in paired_interval(*pair))
        return f" ({middle:+.4f} [{low:+.4f}, {high:+.4f}])"

    bits = 1 / 0.6931471805599453
    cells = [
        mean("in_domain", "jsd") + apart("in_domain", "jsd"),
        mean("out_of_domain", "jsd") + apart("out_of_domain", "jsd"),
        mean("out_of_domain", "kl_clear"),
        mean("out_of_domain", "bits_per_byte") + apart("out_of_domain", "bits_per_byte", bits),
        *(f"{100 * sum(f.accuracy(task) for f in found) / len(found):.1f}" for task in first.right),
        mean("in_domain", "bits_per_byte"),
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


def gap(name: str, found: Sequence[Figures], control: Sequence[Figures], teacher: Figures) -> str:
    """In words, how much of the control's distance to the teacher a method takes away, out of domain."""
    seeds = [[f.per_document("out_of_domain", "bits_per_byte") for f in figures] for figures in (found, control)]
    share, low, high = gap_closed(*seeds, teacher.per_document("out_of_domain", "bits_per_byte"))
    return f"{name}: {share:.0%} [{low:.0%}, {high:.0%}] of the gap in bits/byte out of domain between {CONTROL} and the teacher"


def main(
    recipe: str = "pipeline/recipes/demo.yaml",
    override: Annotated[list[str] | None, typer.Option("-o", help="section.key=value, for every run.")] = None,
    methods: Annotated[
        str, typer.Option(help="Separated by semicolons, each a name, or a name and overrides; default: all.")
    ] = "",
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; default: the recipe's.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of each method's best setting.")] = 3,
    search: Annotated[bool, typer.Option(help="Search settings first.")] = True,
    num_questions: Annotated[int, typer.Option(help="Of each multiple-choice task; 0: none.")] = 300,
    out: Path = Path("runs/quality"),
) -> None:
    """Run everything that is missing, then print the table."""
    bench = Quality(recipe, override or [], out, num_questions)
    num_steps = steps or bench.base.train.steps
    chosen = [name.strip() for name in methods.split(";")] if methods else list(METHODS)
    try:
        for text in chosen:
            method_of(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    bench.prepare(["search", "table"] if search else ["table"])
    table = {name: [figures] for name, figures in bench.start_and_teacher().items()}
    settings = {}
    for name in chosen:
        settings[name] = bench.search(name, num_steps) if search else bench.unsearched(name)
        table[name] = [bench.figures(Run(name, settings[name], num_steps, seed), "table") for seed in range(seeds)]
    for name, setting in settings.items():
        print(f"{name}: {' '.join(setting)}")
    tasks = list(next(iter(table.values()))[0].right)
    print(
        "\n| model | JSD in domain, nats | JSD out of domain | KL, clear, out of domain | bits/byte out of domain | "
        + "".join(f"{t}, % | " for t in tasks)
        + "bits/byte in domain |"
    )
    print("| --- " * (6 + len(tasks)) + "|")
    for name, found in table.items():
        control = table.get(CONTROL) if name not in ("teacher", "start", CONTROL) else None
        print(lines(name, found, control), flush=True)
    if CONTROL in table and "out_of_domain" in table[CONTROL][0].documents:
        for name in chosen:
            if name != CONTROL:
                print(gap(name, table[name], table[CONTROL], table["teacher"][0]))


if __name__ == "__main__":
    typer.run(main)
