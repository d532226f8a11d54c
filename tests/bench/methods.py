"""Every method from one dump: the same start, steps, batch and documents, each at its own best settings.

    .venv/bin/python -m tests.bench.methods [--pair gpt2] [--methods "sft; strict"] [--steps 40] [--seeds 3]
        [--documents 60] [--search / --no-search]

Settings (rates and weights, the same number for each method) are searched by successive halving on *validation*
documents; the best is trained with each seed, and measured once on *test* documents. The control `sft` is also searched
over its number of steps (a quarter, half, all), and so stopped early where that is better. Text held out is short
(`--bytes`): the beginnings of encyclopaedic passages (the corpus' kind), and of news, code and questions.

Resumable: a run that is finished is not made again, and figures per seed and document are written after each method: to
`results.json` of the folder, and with `--save methods-PAIR` to `tests/bench/results`, where methods and seeds that the
file holds are not made again either. With `--pair same-tokenizer`: how much a byte costs where the teacher's own tokens
could be used.
"""

import json
import os
import shutil
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.config import CorpusConfig, Recipe
from pipeline.runtime.child_processes import end_children_with_me
from pipeline.sources.resolve import resolve_model
from schemas.manifest import write_json
from tests.bench import pages, results, texts
from tests.bench.kept_figures import KeptSeeds, documents_of, figures_of
from tests.bench.method_settings import PAIRS, SAME, methods_of
from tests.bench.method_tables import OURS, tables
from tests.bench.quality import CONTROL, Quality, Run, judged
from tests.bench.quality_measures import Figures
from tests.bench.quality_methods import method_of

IN_DOMAIN = "encyclopaedic"
OUT_OF_DOMAIN = ("news", "code", "short")
CONTROL_SHARES = (4, 2, 1)  # of the steps, for the control


class Methods(Quality):
    """The benchmark's folder for one pair of models."""

    def __init__(self, pair: str, overrides: list[str], out: Path, num_documents: int, num_bytes: int) -> None:
        self.pair, self.num_documents, self.num_bytes = pair, num_documents, num_bytes
        self.methods = methods_of(pair)
        recipe, changed = PAIRS[pair]
        tokens = ["dump.tokens={top_k: 16}", f"dump.path={out / 'dump'}"]
        super().__init__(recipe, [*changed, *tokens, *overrides], out, num_questions=0)

    def _held_out(self, split: str) -> dict[str, tuple[Path, Recipe]]:
        """Return where each held-out text is dumped in full, and what dumps it; `search` is of validation documents."""
        found = {}
        for name, kinds in (("in_domain", (IN_DOMAIN,)), ("out_of_domain", OUT_OF_DOMAIN)):
            source = self._texts(split, name, kinds)
            corpus = CorpusConfig(source=str(source), field="text", id_field="id")
            path = self.out / "dumps" / f"{split}-{name}"
            stored = {"path": str(path), "top_k": 256, "min_prob": 0.0, "audit_documents": 0, "tokens": None}
            dump = self.base.dump.model_copy(update=stored)
            found[name] = path, self.base.with_values(corpus=corpus, dump=dump)
        return found

    def _texts(self, split: str, name: str, kinds: tuple[str, ...]) -> Path:
        """Write the beginnings of documents: validation has the first of each source, test those after them."""
        file = self.out / "texts" / f"{split}-{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        rows = []
        for kind in kinds:
            documents = texts.CELLS[kind](2 * self.num_documents)
            part = documents[: self.num_documents] if split == "search" else documents[self.num_documents :]
            for doc_id, text in part:
                start = text[: self.num_bytes].decode("utf-8", errors="ignore")
                rows.append(json.dumps({"id": f"{kind}/{doc_id}", "text": start}))
        file.write_text("\n".join(rows) + "\n", encoding="utf-8")
        return file

    def settled(self, method: str, steps: int, search: bool) -> tuple[tuple[str, ...], int]:
        """Return a method's best setting and number of steps."""
        setting = self.search([method], steps)[method] if search else self.unsearched(method)
        if method != CONTROL or not search:
            return setting, steps
        lengths = sorted({max(1, steps // share) for share in CONTROL_SHARES})
        return setting, min(lengths, key=lambda length: judged(self.figures(Run(method, setting, length, 0), "search")))

    def tested(self, run: Run, keep: bool) -> Figures:
        """Return a run's figures on test documents; `keep` its weights."""
        found = self.figures(run, "table")
        if not keep:
            shutil.rmtree(self.out / "runs" / run.name / "export", ignore_errors=True)
        return found

    def costs(self, run: Run) -> dict[str, float]:
        """Return the median time of a step, and the most memory of a rank."""
        file = self.out / "runs" / run.name / "metrics.jsonl"
        steps = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        seconds = [after["seconds"] - before["seconds"] for before, after in pairwise(steps)]
        memory = [step["memory_bytes"] for step in steps if "memory_bytes" in step]
        return {
            "step_seconds": statistics.median(seconds) if seconds else float("nan"),
            "memory_bytes": float(max(memory, default=0)),
        }

    def dump_bytes(self) -> dict[str, int]:
        """Return the bytes of the shards that all learn from, and of their text."""
        summary = json.loads((self.out / "dump" / "summary.json").read_text(encoding="utf-8"))
        return {"stored": int(summary["stored_bytes"]), "text": int(summary["bytes"])}


def main(
    pair: Annotated[str, typer.Option(help=f"Of models: {', '.join(PAIRS)}.")] = "gpt2",
    override: Annotated[list[str] | None, typer.Option("-o", help="section.key=value, for every run.")] = None,
    methods: Annotated[str, typer.Option(help="Separated by semicolons, as in bench-quality; default: all.")] = "",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 40,
    seeds: Annotated[int, typer.Option(help="Seeds of each method's best setting.")] = 3,
    documents: Annotated[int, typer.Option(help="Of each kind of held-out text, in validation and test each.")] = 60,
    num_bytes: Annotated[int, typer.Option("--bytes", help="Of each of them.")] = 250,
    search: Annotated[bool, typer.Option(help="Search settings first.")] = True,
    out: Annotated[Path | None, typer.Option(help="Default: runs/methods-PAIR.")] = None,
    save: Annotated[str, typer.Option(help="Keep figures and table as tests/bench/results/SAVE.json.")] = "",
    ours: Annotated[str, typer.Option(help="Which of the methods is held against each other one.")] = OURS,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the students, for the benchmark segmentation.")] = False,
    retable: Annotated[bool, typer.Option("--tables", help="Only write the tables of SAVE anew.")] = False,
) -> None:
    """Run everything that is missing, method by method, then print the table."""
    if retable:
        kept_result = results.read(save)
        made = {**kept_result.figures, **tables(kept_result.figures, ours)}
        results.write(save, kept_result.model_copy(update={"figures": made}))
        return
    if pair not in PAIRS:
        raise typer.BadParameter(f"no pair {pair!r}; known: {', '.join(PAIRS)}")
    chosen = [name.strip() for name in methods.split(";")] if methods else list(methods_of(pair))
    try:
        for text in chosen:
            method_of(text, methods_of(pair))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    end_children_with_me()
    folder = out or Path(f"runs/methods-{pair}")
    bench = Methods(pair, override or [], folder, documents, num_bytes)
    if pair == SAME:
        os.environ["BLD_BENCH_TEACHER"] = resolve_model(bench.base.teacher.source).source
    bench.prepare(["search", "table"] if search else ["table"])
    references = {name: bench.reference(name) for name in ("teacher", "start")}
    figures: dict[str, Any] = {"dump": bench.dump_bytes(), "documents": documents_of(references["start"])}
    figures |= {name: figures_of(found) for name, found in references.items()}
    known = results.load(save) if save else {}
    kept = KeptSeeds(known)
    kept.check(figures["documents"])
    figures["methods"] = dict(known.get("methods", {}))
    for method in chosen:
        setting, length = kept.settled(method, search, steps) or bench.settled(method, steps, search)
        entry = {"seeds": {}} | kept.entry(method, setting, length)
        entry |= {"setting": list(setting), "steps": length, "searched": search, "asked_steps": steps}
        for run in (Run(method, setting, length, seed) for seed in range(seeds)):
            if str(run.seed) not in entry["seeds"]:
                entry["seeds"] |= {str(run.seed): figures_of(bench.tested(run, keep))}
                entry |= {"commit": results.commit(), **bench.costs(run)}
        print(f"{method}, {length} steps: {' '.join(setting)}", flush=True)
        figures["methods"][method] = entry
        figures |= tables(figures, ours)
        write_json(folder / "results.json", figures)
        if save:
            results.save(save, figures, documents=f"{documents} of each kind, {num_bytes} bytes each", seeds=seeds)
    print(pages.table(figures["table"], pages.headings(figures["table"])))


if __name__ == "__main__":
    typer.run(main)
