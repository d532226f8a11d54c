"""Quality of students by training method, each at the best of the settings searched, beside plain cross-entropy.

Text, steps and batch are the same for all.

    .venv/bin/python -m tests.bench.quality [--recipe pipeline/recipes/demo.yaml]
        [--methods "sft; linear"] [--steps 40] [--seeds 3] [--save quality]

Settings (learning rates and weights) are searched by successive halving, the same budget for every method: all of them
for a quarter of the steps, the best two for half (where they are within 0.005 bits of each other), judged by the bits
per byte of held-out text of the other kind, which the table does not use. (Not by the divergence to the teacher: by
that, plain cross-entropy is best at the lowest rate, with more bits.) The best one is trained with each seed.
`--no-search` takes each method's first setting that the recipe's learning rate is in. `--jobs` trains and measures
several students at once, each in processes of its own: one as small as these leaves a GPU idle. Measures: divergence to
the teacher on held-out text of the corpus' kind and of another (`eval`), bits per byte, accuracy on multiple-choice
questions; differences to `sft` with 95 % intervals over documents and seeds, over documents alone where there is one
seed (`tests.bench.quality_intervals`). Resumable: what is there is not done again.
"""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import typer

from pipeline.config import Recipe, student_config
from pipeline.config.loading import load_recipe, save_recipe
from pipeline.runtime.child_processes import end_children_with_me
from pipeline.sources.resolve import resolve_model
from pipeline.tokenization.special_ids import SpecialIds
from schemas import dump_files
from stage1_teacher.targets.resolved import load_tokenizer, resolve_ids
from stage2_student.model.initial_student import end_tokens, export_start, student_tokenizer
from stage2_student.model.start_identity import is_made, start_identity
from tests.bench import pages
from tests.bench.quality_measures import SCALES, Figures, gap_closed, measure, paired_interval
from tests.bench.quality_methods import METHODS, Method, method_of

SEARCH_SKIP = {"in_domain": 500, "out_of_domain": 200}  # held-out documents that the table does not use
SEARCH_DOCUMENTS = {"in_domain": 16, "out_of_domain": 6}
REFERENCES = ("teacher", "start")  # the table's first two lines
CONTROL = "sft"
Wanted = TypeVar("Wanted")
Found = TypeVar("Found")
TIE = 0.005  # bits per byte, what a seed changes at most; settings that are further behind the best are out


def bld(*arguments: str) -> None:
    """Run one command of the product, as an operator would."""
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

    methods: Mapping[str, Method] = METHODS

    def __init__(self, recipe: str, overrides: Sequence[str], out: Path, num_questions: int, jobs: int = 1) -> None:
        self.recipe, self.overrides, self.out = recipe, list(overrides), out
        self.num_questions, self.jobs = num_questions, jobs
        self.base = load_recipe(recipe, self.overrides)
        self.dumps_of: dict[str, dict[str, Path]] = {}
        for folder in ("recipes", "figures", "dumps", "runs"):
            (out / folder).mkdir(parents=True, exist_ok=True)

    def _held_out(self, split: str) -> dict[str, tuple[Path, Recipe]]:
        """Return where each held-out text is dumped in full, and what dumps it: `search` or `table`."""
        assert self.base.eval is not None, "the recipe has no eval section"
        corpora = {"in_domain": self.base.eval.corpus}
        if self.base.eval.out_of_domain is not None:
            corpora["out_of_domain"] = self.base.eval.out_of_domain
        found = {}
        for name, corpus in corpora.items():
            if split == "search":
                part = {"skip": corpus.skip + SEARCH_SKIP[name], "limit": SEARCH_DOCUMENTS[name]}
                corpus = corpus.model_copy(update=part)
            path = self.out / "dumps" / f"{split}-{name}"
            stored = {"path": str(path), "top_k": 256, "min_prob": 0.0, "audit_documents": 0}
            found[name] = (
                path,
                self.base.with_values(corpus=corpus, dump=self.base.dump.model_copy(update=stored)),
            )
        return found

    def run(self, command: str, recipe: Recipe, name: str) -> None:
        """Run a command with a recipe, which is kept under this name."""
        path = self.out / "recipes" / f"{name}.yaml"
        save_recipe(recipe, path)
        bld(command, str(path))

    def figures(self, run: Run, split: str) -> Figures:
        """Train a student and measure it, if that is not done.

        Its weights are deleted after a search, otherwise kept.
        """
        file = self.out / "figures" / f"{run.name}.{split}.json"
        folder = self.out / "runs" / run.name
        if not file.exists():
            self.train(run)
        student = student_config(self._recipe(run, folder))
        ids = end_tokens(student, student_tokenizer(student).tokenizer)
        found = self._measure(str(folder / "export"), ids, split, file)
        for name in ("checkpoints", "start", *(["export"] if split == "search" else [])):
            shutil.rmtree(folder / name, ignore_errors=True)
        return found

    def train(self, run: Run) -> Path:
        """Train a student as far as that is not done, and return its export."""
        folder = self.out / "runs" / run.name
        if (folder / "export").exists():
            return folder / "export"
        recipe = self._recipe(run, folder)
        if recipe.dump != self.base.dump:  # a method that learns from a dump of its own
            self.run("teacher", recipe, f"{run.name}-dump")
        self._give_start(recipe, folder)
        self.run("student", recipe, run.name)
        return folder / "export"

    def _give_start(self, recipe: Recipe, folder: Path) -> None:
        """Copy the start that all have, if it is this recipe's too: making one takes minutes."""
        shared = self.out / "runs/start" / dump_files.START
        student = student_config(recipe)
        tokenizer = student_tokenizer(student).tokenizer
        identity = start_identity(student, tokenizer.sha256, end_tokens(student, tokenizer), None)
        if shared.exists() and is_made(shared, identity) and not (folder / dump_files.START).exists():
            folder.mkdir(exist_ok=True)
            shutil.copytree(shared, folder / dump_files.START)

    def _recipe(self, run: Run, folder: Path) -> Recipe:
        schedule = [
            f"train.steps={run.steps}",
            f"train.save_every={run.steps}",
            f"train.warmup_steps={max(1, run.steps // 4)}",
        ]
        own = [f"train.seed={run.seed}", f"student.path={folder}"]
        return load_recipe(self.recipe, [*self.overrides, *schedule, *run.setting, *own])

    def _measure(self, model: str, ids: SpecialIds, split: str, file: Path) -> Figures:
        return measure(model, ids, self.dumps_of[split], self.num_questions if split == "table" else 0, file)

    def prepare(self, splits: Sequence[str], training: bool = True) -> None:
        """Make the dumps of held-out text and the one that students learn from, `jobs` at a time."""
        wanted = {"dump": self.base} if training else {}
        for split in splits:
            held_out = self._held_out(split)
            self.dumps_of[split] = {name: path for name, (path, _) in held_out.items()}
            wanted |= {f"{split}-{name}": recipe for name, (_, recipe) in held_out.items()}
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda name: self.run("teacher", wanted[name], name), wanted))

    def reference(self, name: str) -> Figures:
        """Measure one of `REFERENCES`."""
        file = self.out / "figures" / f"{name}.json"
        if name == "teacher":
            ids = resolve_ids(self.base, load_tokenizer(self.base).tokenizer)
            model = resolve_model(self.base.teacher.source).source
            return self._measure(model, ids, "table", file)
        student = student_config(self.base)
        ids = end_tokens(student, student_tokenizer(student).tokenizer)
        return self._measure(str(self.start()), ids, "table", file)

    def start(self) -> Path:
        """Return the model that all students start from."""
        student = student_config(self.base).model_copy(update={"path": str(self.out / "runs/start")})
        return Path(export_start(self.base.with_values(student=student)))

    def search(self, methods: Sequence[str], steps: int) -> dict[str, tuple[str, ...]]:
        """Find each method's best setting, by successive halving."""
        left = {method: method_of(method, self.methods).settings() for method in methods}
        for share, kept in ((4, 2), (2, 1)):
            runs = [
                Run(method, setting, max(1, steps // share), 0)
                for method, settings in left.items()
                for setting in settings
                if len(settings) > 1
            ]
            found = dict(zip(runs, self.of_all(self._searched, runs), strict=True))
            scores = {run: judged(figures) for run, figures in found.items()}
            for method in {run.method: None for run in runs}:
                ranked = sorted((run for run in runs if run.method == method), key=scores.__getitem__)
                near = [run for run in ranked[:kept] if scores[run] <= scores[ranked[0]] + TIE]
                for run in ranked:
                    measured = "; ".join(
                        f"{name} {found[run].mean(name, 'bits_per_byte'):.4f} bits, "
                        f"JSD {found[run].mean(name, 'jsd'):.4f}"
                        for name in found[run].documents
                    )
                    kind = "stays" if run in near else "out"
                    print(f"{method}, {run.steps} steps, {kind}: {measured} with {' '.join(run.setting)}", flush=True)
                left[method] = [run.setting for run in near]
        return {method: settings[0] for method, settings in left.items()}

    def of_table(self, wanted: str | Run) -> Figures:
        """Return the figures of a line of the table, or of one seed of it."""
        return self.reference(wanted) if isinstance(wanted, str) else self.figures(wanted, "table")

    def of_all(self, what: Callable[[Wanted], Found], wanted: Sequence[Wanted]) -> list[Found]:
        """Call `what` for each, `jobs` at a time.

        With more than one job, all are tried before an error of one is raised.
        """
        if self.jobs == 1:
            return [what(one) for one in wanted]
        with ProcessPoolExecutor(self.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
            return list(pool.map(what, wanted))

    def _searched(self, run: Run) -> Figures:
        return self.figures(run, "search")

    def unsearched(self, method: str) -> tuple[str, ...]:
        settings = method_of(method, self.methods).settings()
        rate = f"train.lr={self.base.train.lr:.1e}"
        return next((setting for setting in settings if rate in setting), settings[0])


def judged(found: Figures) -> float:
    """Return what the search minimises: bits per byte out of domain, or in domain if there is no other text."""
    return found.mean("out_of_domain" if "out_of_domain" in found.documents else "in_domain", "bits_per_byte")


def row(name: str, found: Sequence[Figures], control: Sequence[Figures] | None) -> dict[str, Any]:
    """Return a row of the table: means over seeds; the difference to the control if both were trained."""
    first = found[0]

    def mean(dump: str, what: str) -> float | None:
        return round(sum(f.mean(dump, what) for f in found) / len(found), 4) if dump in first.documents else None

    def compared(dump: str, what: str) -> dict[str, Any] | float | None:
        value = mean(dump, what)
        if control is None or value is None:
            return value
        pair = [[f.per_document(dump, what) for f in figures] for figures in (found, control)]
        middle, low, high = (SCALES.get(what, 1.0) * bound for bound in paired_interval(*pair))
        return {"value": value, "difference": round(middle, 4), "interval": [round(low, 4), round(high, 4)]}

    accuracies = [round(100 * sum(f.accuracy(task) for f in found) / len(found), 1) for task in first.right]
    return {
        "method": name,
        "JSD in domain, nats": compared("in_domain", "jsd"),
        "JSD out of domain, nats": compared("out_of_domain", "jsd"),
        "KL, clear, out of domain, nats": mean("out_of_domain", "kl_clear"),
        "bits/byte out of domain": compared("out_of_domain", "bits_per_byte"),
        "bits/byte in domain": mean("in_domain", "bits_per_byte"),
        **({f"{', '.join(first.right)}, %": accuracies} if accuracies else {}),
    }


def lines(name: str, found: Sequence[Figures], control: Sequence[Figures] | None) -> str:
    """Format a row of the table."""
    cells = row(name, found, control)
    return pages.table([cells], list(cells)).splitlines()[-1]


def way_from_start(found: Sequence[Figures], start: Figures, teacher: Figures) -> dict[str, Any]:
    """Return how far a method goes from the untrained start to the teacher in bits out of domain, in percent.

    The control has no part in this figure: a share of what lies between the control and the teacher would count what
    the control has lost.
    """
    ours = [f.per_document("out_of_domain", "bits_per_byte") for f in found]
    first, best = (figures.per_document("out_of_domain", "bits_per_byte") for figures in (start, teacher))
    share, low, high = (round(100 * bound, 1) for bound in gap_closed(ours, [first] * len(ours), best))
    return {"value": share, "interval": [low, high]}


def main(
    recipe: str = "pipeline/recipes/demo.yaml",
    override: Annotated[list[str] | None, typer.Option("-o", help="section.key=value, for every run.")] = None,
    methods: Annotated[
        str, typer.Option(help="Separated by semicolons, each a name, or a name and overrides; default: all.")
    ] = "",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 40,
    seeds: Annotated[int, typer.Option(help="Seeds of each method's best setting.")] = 3,
    search: Annotated[bool, typer.Option(help="Search settings first.")] = True,
    num_questions: Annotated[int, typer.Option(help="Of each multiple-choice task; 0: none.")] = 300,
    jobs: Annotated[int, typer.Option(help="Students trained and measured at once.")] = 1,
    out: Path = Path("runs/quality"),
    save: Annotated[str, typer.Option(help="Keep the table as tests/bench/results/SAVE.json.")] = "",
) -> None:
    """Run everything that is missing, then print the table."""
    end_children_with_me()
    bench = Quality(recipe, override or [], out, num_questions, jobs)
    chosen = [name.strip() for name in methods.split(";")] if methods else list(METHODS)
    try:
        for text in chosen:
            method_of(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    bench.prepare(["search", "table"] if search else ["table"])
    settings = bench.search(chosen, steps) if search else {name: bench.unsearched(name) for name in chosen}
    runs = [Run(name, setting, steps, seed) for seed in range(seeds) for name, setting in settings.items()]
    wanted: list[str | Run] = [*REFERENCES, *runs]
    found = dict(zip(wanted, bench.of_all(bench.of_table, wanted), strict=True))
    table = {name: [found[name]] for name in REFERENCES}
    table |= {name: [found[run] for run in runs if run.method == name] for name in chosen}
    for name, setting in settings.items():
        print(f"{name}: {' '.join(setting)}")
    first = next(iter(table.values()))[0]
    rows = [
        row(name, figures, table.get(CONTROL) if name in chosen and name != CONTROL else None)
        for name, figures in table.items()
    ]
    if "out_of_domain" in first.documents:
        for of_method in rows[len(REFERENCES) :]:
            way = way_from_start(table[of_method["method"]], table["start"][0], table["teacher"][0])
            of_method["from start to teacher, %"] = way
    counted = ", ".join(f"{len(first.per_document(name, 'jsd'))} {name}" for name in first.documents)
    over = "documents and seeds" if seeds > 1 else "documents; how seeds differ, one does not say"
    print(f"\n{counted}; {seeds} seeds. In brackets the difference to {CONTROL} with its 95 % interval over {over}.\n")
    pages.show(rows, save, documents=counted, seeds=seeds)


if __name__ == "__main__":
    typer.run(main)
