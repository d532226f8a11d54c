"""Benefit of branch rows: a covering's distance to a wide one, against the teacher tokens it takes.

    .venv/bin/python -m tests.bench.frontier [--cell encyclopaedic --documents 200]
        [--recipe pipeline/recipes/demo_gemma.yaml]

Each document is cut to `--tokens` teacher tokens and read from its start. The reference covering has 32 branches per
offset above 1e-4 of the mass, merged with the canonical row after 8 shared tokens; every candidate takes its rows from
the same forwards, so that nothing but the choice of rows tells them apart. Per position: KL(reference, candidate) in
nats (the candidate floored at 1e-12), Jensen-Shannon divergence, total variation. Tokens really computed per document
token are counted twice: with a tree attention (a branch row is one token) and with a prefix cache in blocks of 16, as
vLLM's own (a branch computes its path's unfinished block; ours in vLLM's blocks computes only the branch's tokens).

Resumable: a document's rows and its figures lie in two files under `--out`. The rows cost the forwards; where only the
figures are deleted, other candidates are measured on the same rows in a second a document. `--table` prints what is
there.
"""

import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from pipeline.config import CoveringConfig, Recipe
from pipeline.config.loading import load_recipe
from pipeline.covering.branches import Path as TokenPath
from pipeline.covering.covering import Covering, ReducedRow
from pipeline.covering.dropped_mass import redistribute
from pipeline.covering.targets import Targets
from pipeline.runtime.child_processes import end_children_with_me
from schemas import END, NUM_SYMBOLS
from tests.bench.frontier_rows import BranchingTeacher, DocumentRows
from tests.bench.pages import show
from tests.bench.texts import CELLS
from tests.support.row_nodes import row_nodes

REFERENCE = CoveringConfig(beam_width=32, branch_threshold=1e-4, rejoin_after_tokens=8)
FLOOR = 1e-12
BLOCK_TOKENS = 16


def candidates(never_merged: bool) -> dict[str, CoveringConfig]:
    """Return coverings by name. Branches that never merge live on for hundreds of rounds."""
    found = {"canonical": CoveringConfig(beam_width=0)}
    for threshold in (0.3, 0.1, 0.05, 0.03, 0.01, 0.003):
        found[f"branches > {threshold}"] = CoveringConfig(
            beam_width=10, branch_threshold=threshold, rejoin_after_tokens=4
        )
    found["branches > 0.03, merged at once"] = CoveringConfig(
        beam_width=10, branch_threshold=0.03, rejoin_after_tokens=0
    )
    found["paper (beam 10, 0.01), merged after 8"] = CoveringConfig(
        beam_width=10, branch_threshold=0.01, rejoin_after_tokens=8
    )
    if never_merged:
        found["paper (beam 10, 0.01)"] = CoveringConfig(beam_width=10, branch_threshold=0.01, rejoin_after_tokens=None)
    return found


def naive(covering: Covering, rows: Sequence[ReducedRow]) -> np.ndarray:
    """Return P x V: each position from the latest canonical row alone."""
    probs_PV = np.zeros((len(covering.document) + 1, NUM_SYMBOLS))
    ends = [*covering.offsets[1:].tolist(), len(covering.document) + 1]
    for row, next_offset in zip(rows, ends, strict=True):
        nodes, at = row_nodes(covering, row.offset), 0
        for height, node in enumerate(nodes):
            position = row.offset + len(nodes) - 1 - height
            if position < next_offset:
                masses = row.masses_I[at + node.num_complete : at + len(node.labels)]
                probs_PV[position, node.labels[node.num_complete :]] = masses
            at += len(node.labels)
        probs_PV[row.offset, END] += row.end
    total_P1 = probs_PV.sum(axis=1, keepdims=True)
    return np.divide(probs_PV, total_P1, out=np.zeros_like(probs_PV), where=total_P1 > 0)


def distances(reference_PV: np.ndarray, candidate_PV: np.ndarray) -> np.ndarray:
    """Return 3 x P: KL, Jensen-Shannon divergence, total variation."""
    mean_PV = (reference_PV + candidate_PV) / 2
    kl_P = _kl(reference_PV, np.maximum(candidate_PV, FLOOR))
    js_P = (_kl(reference_PV, mean_PV) + _kl(candidate_PV, mean_PV)) / 2
    return np.stack([kl_P, js_P, np.abs(reference_PV - candidate_PV).sum(axis=1) / 2])


def _kl(p_PV: np.ndarray, q_PV: np.ndarray) -> np.ndarray:
    ratio_PV = np.divide(p_PV, q_PV, out=np.ones_like(p_PV), where=p_PV > 0)
    total: np.ndarray = (p_PV * np.log(ratio_PV)).sum(axis=1)
    return total


def block_tokens(paths: Sequence[TokenPath], num_start: int) -> int:
    """Count tokens that branches compute with a prefix cache: those beyond a path's shared full blocks."""
    shared = [(num_start + path.num_canonical) // BLOCK_TOKENS * BLOCK_TOKENS for path in paths]
    return sum(
        num_start + path.num_canonical + len(path.tokens) - cached for path, cached in zip(paths, shared, strict=True)
    )


def measure(teacher: BranchingTeacher, document: DocumentRows, never_merged: bool) -> dict[str, Any]:
    """Return arrays of one document, without its last position: a cut document does not end there."""
    covering = document.covering
    taken = slice(len(teacher.tokenizer.prefix), len(covering.document))
    reference = document.cover(REFERENCE)[0].targets().probs_PV
    num_start = len(teacher.start)
    found: dict[str, Any] = {"num_tokens": len(document.tokens) + num_start}

    def keep(name: str, probs_PV: np.ndarray, paths: Sequence[TokenPath]) -> None:
        found[f"{name}/distances"] = distances(reference[taken], probs_PV[taken]).astype(np.float32)
        found[f"{name}/computed"] = np.array([len(paths), block_tokens(paths, num_start)])

    keep("naive", naive(covering, document.canonical), [])
    for name, config in candidates(never_merged).items():
        branching, paths = document.cover(config)
        targets = branching.targets()
        keep(name, targets.probs_PV, paths)
        keep(f"{name}, spread", redistribute(targets, covering, branching.off_boundaries()).probs_PV, paths)
        if name == "canonical":
            found["doubt"], found["token_end"] = _shares(targets, taken)
    return found


def _shares(targets: Targets, taken: slice) -> tuple[np.ndarray, np.ndarray]:
    return targets.doubt_P[taken].astype(np.float32), targets.token_end_P[taken].astype(np.float32)


_teacher: BranchingTeacher | None = None


def _open(recipe: Recipe, num_threads: int) -> None:
    global _teacher
    _teacher = BranchingTeacher(recipe, num_threads)


def _measure(job: tuple[Path, bytes], max_tokens: int, never_merged: bool) -> Path:
    path, text = job
    assert _teacher is not None
    document = DocumentRows(_teacher, text, max_tokens, path.with_suffix(".rows"))
    found = measure(_teacher, document, never_merged)
    document.save()
    partial_path = path.with_suffix(".partial")
    with partial_path.open("wb") as file:
        np.savez_compressed(file, **found)
    partial_path.replace(path)
    return path


def names_in(files: Sequence[Path]) -> list[str]:
    with np.load(files[0]) as arrays:
        return [key.removesuffix("/distances") for key in arrays if key.endswith("/distances")]


def rows(files: Sequence[Path]) -> list[dict[str, str | float]]:
    """Return the figures of each covering, over all positions of the documents."""
    loaded = [np.load(file) for file in files]
    num_tokens = sum(int(arrays["num_tokens"]) for arrays in loaded)
    found: list[dict[str, str | float]] = []
    for name in names_in(files):
        kl, js, tv = np.concatenate([arrays[f"{name}/distances"] for arrays in loaded], axis=1).astype(np.float64)
        computed, blocks = np.sum([arrays[f"{name}/computed"] for arrays in loaded], axis=0)
        found.append(
            {
                "covering": name,
                "tokens computed, tree": round(float(1 + computed / num_tokens), 3),
                "blocks of 16": round(float(1 + blocks / num_tokens), 2),
                "KL, nats": round(float(kl.mean()), 5),
                "JSD, nats": round(float(js.mean()), 6),
                "TV > 0.05, %": round(float(100 * (tv > 0.05).mean()), 2),
                "mean TV": round(float(tv.mean()), 5),
            }
        )
    return found


def calibration(files: Sequence[Path]) -> Iterator[str]:
    """Yield the canonical covering's error by decile of its doubt, and what masking leaves in error and loses."""
    loaded = [np.load(file) for file in files]
    doubt = np.concatenate([arrays["doubt"] for arrays in loaded]).astype(np.float64)
    token_end = np.concatenate([arrays["token_end"] for arrays in loaded]).astype(np.float64)
    tv = np.concatenate([arrays["canonical/distances"][2] for arrays in loaded]).astype(np.float64)
    correlation = np.corrcoef(doubt, tv)[0, 1]
    yield f"doubt: mean {doubt.mean():.4f}, total variation: mean {tv.mean():.4f}; correlation {correlation:.3f}"
    yield "| decile of doubt | mean doubt | mean total variation |\n| --- | --- | --- |"
    for decile, part in enumerate(np.array_split(np.argsort(doubt, kind="stable"), 10)):
        yield f"| {decile + 1} | {doubt[part].mean():.4f} | {tv[part].mean():.4f} |"
    yield "| masked | positions lost | mean total variation left | above 0.05 left |\n| --- | --- | --- | --- |"
    for name, share in (("doubt", doubt), ("token_end", token_end)):
        for threshold in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5):
            kept = tv[share <= threshold]
            lost = 100 * (1 - len(kept) / len(tv))
            yield f"| {name} > {threshold} | {lost:.1f} % | {kept.mean():.4f} | {100 * (kept > 0.05).mean():.2f} % |"


def main(
    recipe: Annotated[str, typer.Option(help="Recipe whose teacher is asked.")] = "pipeline/recipes/demo.yaml",
    cell: Annotated[list[str] | None, typer.Option(help="Kinds of text; default: all.")] = None,
    documents: Annotated[int, typer.Option(help="Documents of each.")] = 30,
    tokens: Annotated[int, typer.Option(help="Teacher tokens of a document.")] = 512,
    workers: Annotated[int | None, typer.Option(help="Processes; default: one a core.")] = None,
    never_merged: Annotated[bool, typer.Option(help="Also the paper's beam as it is: minutes a document.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the figures.")] = Path("runs/frontier"),
    save: Annotated[str, typer.Option(help="Keep the coverings' table as tests/bench/results/SAVE.json.")] = "",
    only_table: Annotated[bool, typer.Option("--table", help="Print what is there.")] = False,
) -> None:
    end_children_with_me()
    loaded = load_recipe(recipe, [])
    num_workers = workers or os.cpu_count() or 1
    names = cell or list(CELLS)
    jobs: list[tuple[Path, bytes]] = []
    for name in names:
        folder = out / loaded.teacher.model.replace("/", "_") / name
        folder.mkdir(parents=True, exist_ok=True)
        texts = [] if only_table else CELLS[name](documents)
        jobs += [(folder / f"{index:04d}.npz", text) for index, (_, text) in enumerate(texts)]
    todo = [job for job in jobs if not job[0].exists()]
    if todo:
        context = multiprocessing.get_context("spawn")
        threads = max(1, (os.cpu_count() or 1) // num_workers)
        with ProcessPoolExecutor(num_workers, context, _open, (loaded, threads)) as pool:
            for done, path in enumerate(
                pool.map(partial(_measure, max_tokens=tokens, never_merged=never_merged), todo), 1
            ):
                print(f"{done}/{len(todo)} {path}", flush=True)
    for name in names:
        files = sorted((out / loaded.teacher.model.replace("/", "_") / name).glob("*.npz"))
        if files:
            print(f"\n{json.dumps(loaded.teacher.model)}, {name}, {len(files)} documents of at most {tokens} tokens\n")
            show(
                rows(files),
                save,
                "rows" if len(names) == 1 else name,
                documents=f"{len(files)} documents of {tokens} tokens",
            )
            print("\n".join(["", *calibration(files)]), flush=True)


if __name__ == "__main__":
    typer.run(main)
