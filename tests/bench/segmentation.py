"""Which tokens a student writes a text with: its tokenizer's own, or others that spell the same bytes.

    .venv/bin/python -m tests.bench.segmentation [--pair gpt2] [--methods "sft; token_marginal"] [--steps 20]
        [--prompts 60] [--functions 60] [--tokens 96] [--save NAME]

A method that compares bytes alone does not see how they are spelled: a model may write `fire` and `wall` where its
tokenizer has `firewall`, and four spaces one by one, which it never read. Bits per byte of text in the tokenizer's own
tokens see it a little, a program's indentation all at once. Each student is trained as in `tests.bench.methods`, then
continues beginnings of news by sampling at temperature 1 and writes functions of Python's standard library from their
first lines and docstrings at 0.5, and `bld eval --generate` counts. Resumable: what is trained or written is kept.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.evaluation.python_functions import count_parsed
from pipeline.runtime.child_processes import end_children_with_me
from pipeline.sources.resolve import resolve_model
from schemas import dump_files
from schemas.manifest import read_json
from tests.bench import pages, results, texts
from tests.bench.method_settings import PAIRS
from tests.bench.method_tables import weights_of
from tests.bench.methods import Methods
from tests.bench.quality import REFERENCES, Run, bld

KINDS = ("white space", "words", "digits", "other")
PROMPT_BYTES = 200
METHODS = "sft; token_marginal; token_marginal train.objectives.ce=0; alm_weighed; linear"


class Writing:
    """The part of the benchmark's folder that models write in."""

    def __init__(self, out: Path, pair: str, prompts: int, functions: int, tokens: int) -> None:
        self.recipe = PAIRS[pair].recipe
        self.folder, self.functions, self.tokens = out / "written", functions, tokens
        self.folder.mkdir(parents=True, exist_ok=True)
        self.prompts = self.folder / f"news-{prompts}.jsonl"
        rows = [
            json.dumps({"id": doc_id, "text": text[:PROMPT_BYTES].decode(errors="ignore").rsplit(" ", 1)[0]})
            for doc_id, text in texts.CELLS["news"](prompts)
        ]
        self.prompts.write_text("\n".join(rows) + "\n", encoding="utf-8")

    def of_model(self, name: str, model: str) -> dict[str, Any]:
        """Let a model write prose and code, if it has not, and return what its row shows."""
        prose = self._written(f"{name}-prose", model, ["temperature: 1.0"], [])
        code = self._written(f"{name}-code", model, ["temperature: 0.5"], ["--python", str(self.functions)])
        found = {f"prose, {kind}": share for kind, share in shares(prose).items()}
        found |= {f"code, {kind}": share for kind, share in shares(code).items()}
        parsed = count_parsed(code)
        return found | {"functions that parse": parsed.functions, "functions": parsed.completions}

    def _written(self, name: str, model: str, how: list[str], more: list[str]) -> Path:
        """Return the folder of what a model wrote."""
        out = self.folder / f"{name}-{self.tokens}"
        corpus = [f"path: {out}", f"prompts: {{source: {self.prompts}, id_field: id}}"]
        section = ", ".join([*corpus, f"max_new_tokens: {self.tokens}", "unfinished: keep", *how])
        bld(
            "eval",
            model,
            "--recipe",
            self.recipe,
            "-o",
            f"generate={{{section}}}",
            "--generate",
            "--out",
            str(out),
            *more,
        )
        [summary] = out.rglob(dump_files.SUMMARY)
        return summary.parent


def shares(folder: Path) -> dict[str, float | None]:
    """Return which share of the written tokens is the tokenizer's own encoding, in percent, by kind and of all."""
    counts: Mapping[str, tuple[int, int]] = read_json(folder / dump_files.SUMMARY)["segmentation"]
    found = {"all": tuple(map(sum, zip(*counts.values(), strict=True))), **{kind: counts.get(kind) for kind in KINDS}}
    return {kind: round(100 * count[0] / count[1], 1) if count and count[1] else None for kind, count in found.items()}


def main(
    pair: Annotated[str, typer.Option(help=f"Of models: {', '.join(PAIRS)}.")] = "gpt2",
    methods: Annotated[str, typer.Option(help="As in the benchmark methods, separated by semicolons.")] = METHODS,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 20,
    seeds: Annotated[int, typer.Option(help="Students of each method.")] = 1,
    prompts: Annotated[int, typer.Option(help="Beginnings of news.")] = 60,
    functions: Annotated[int, typer.Option(help="Functions of Python's standard library.")] = 60,
    tokens: Annotated[int, typer.Option(help="The most that a model writes on a prompt.")] = 96,
    out: Annotated[Path | None, typer.Option(help="Default: runs/methods-PAIR.")] = None,
    save: Annotated[str, typer.Option(help="Keep the table as tests/bench/results/SAVE.json.")] = "",
) -> None:
    """Let the teacher, the start and each method's students write, then print the table."""
    end_children_with_me()
    folder = out or Path(f"runs/methods-{pair}")
    bench = Methods(pair, [], folder, num_documents=1, num_bytes=1)
    bench.prepare([])
    writing = Writing(folder, pair, prompts, functions, tokens)
    models = {"teacher": resolve_model(bench.base.teacher.source).source, "start": str(bench.start())}
    rows = [{"method": name, "weights": "", "seed": None} | writing.of_model(name, models[name]) for name in REFERENCES]
    for method in (name.strip() for name in methods.split(";")):
        setting = bench.unsearched(method)
        for run in (Run(method, setting, steps, seed) for seed in range(seeds)):
            about = {"method": method.split()[0], "weights": weights_of(setting), "seed": run.seed}
            rows.append(about | writing.of_model(run.name, str(bench.train(run))))
            if save:
                told = f"{prompts} beginnings of news, {functions} functions; at most {tokens} tokens on each"
                results.save(save, {"table": rows}, documents=told, seeds=seeds)
    print(pages.table(rows, pages.headings(rows)))


if __name__ == "__main__":
    typer.run(main)
