"""Cost of alternatives of the teacher's tokens in a dump: stored bytes by column, coding error, and the dump's time.

    make bench BENCH=token_columns [ARGS="--recipe pipeline/recipes/demo_gemma.yaml --documents 20 --rounds 3"]

One engine makes a shard of the same documents for each setting in turn, `--rounds` times over, so that a machine whose
speed varies is the same for all; the CPU time of a setting is the median of its ratios to the plain dump of its round.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import typer

from pipeline.config import Recipe
from pipeline.config.loading import load_recipe
from pipeline.corpus.documents import Corpus, Document
from schemas.manifest import ShardPlan
from schemas.shard import read_shard
from schemas.token_alternatives import COLUMNS, TokenAlternatives
from stage1_teacher.calibration.calibrate import trial_identity
from stage1_teacher.dump.shard_writer import encode, make_shards
from stage1_teacher.engines.base import Engine, ListingEngine
from stage1_teacher.inputs.encoded_windows import token_lengths
from stage1_teacher.inputs.fit_windows import with_fitting_windows
from stage1_teacher.targets.assembly import assemble
from stage1_teacher.targets.opening import open_teacher
from stage1_teacher.targets.records import sparse_spans
from stage1_teacher.targets.resolved import load_tokenizer
from stage1_teacher.targets.teacher import Teacher
from tests.bench import pages, results

SETTINGS = ["", "16,0", "16,0.001", "16,0.01", "8,0.001", "64,0.001"]  # top_k,min_prob; empty: bytes alone


def with_tokens(recipe: Recipe, setting: str) -> Recipe:
    top_k, _, min_prob = setting.partition(",")
    tokens = {"top_k": int(top_k), "min_prob": float(min_prob)} if setting else None
    return Recipe.model_validate(recipe.model_dump() | {"dump": recipe.dump.model_dump() | {"tokens": tokens}})


def classes(tokens: TokenAlternatives) -> tuple[np.ndarray, np.ndarray]:
    """Return the probabilities of all alternatives and of the tokens' tails."""
    return np.exp(tokens.log_probs.astype(np.float64)), np.maximum(tokens.tails, 1e-12)


def coding_error(exact: TokenAlternatives, stored: TokenAlternatives) -> float:
    """Compute the mean of KL(exact || stored) over a token's alternatives and its tail, nats."""
    by_id = [np.lexsort((tokens.ids, tokens.token_of_alternatives())) for tokens in (exact, stored)]
    (p_A, p_T), (q_A, q_T) = classes(exact), classes(stored)
    nats = (p_A[by_id[0]] * np.log(p_A[by_id[0]] / q_A[by_id[1]])).sum() + (p_T * np.log(p_T / q_T)).sum()
    return float(nats) / len(p_T)


def error_of(teacher: Teacher, recipe: Recipe, documents: list[Document]) -> float:
    """Compute the coding error of some documents' tokens, whose rows are computed once more."""
    errors, lengths = [], token_lengths(teacher.tokenizer)
    for window in encode(documents, teacher, {}):
        [spans] = sparse_spans([window], teacher.run_for_dump([window], recipe.dump), teacher, recipe.dump)
        exact, stored = (assemble(window, spans, lengths, exact).tokens for exact in (True, False))
        assert exact is not None and stored is not None
        errors.append(coding_error(exact, stored))
    return float(np.mean(errors))


def dumped(teacher: Teacher, recipe: Recipe, documents: list[Document], folder: Path) -> tuple[Path, float]:
    """Make a shard of these documents in a new folder; return its path, and the CPU seconds that it took."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "shards").mkdir(parents=True)
    num_bytes = sum(len(document.text) for document in documents)
    plan = ShardPlan(index=0, first_document=0, num_documents=len(documents), num_bytes=num_bytes, sha256="")
    started = time.process_time()
    for _ in make_shards([(plan, documents)], teacher, recipe, trial_identity(recipe), folder):
        pass
    return plan.path(folder), time.process_time() - started


def rows_of(
    teacher: Teacher, recipes: dict[str, Recipe], documents: list[Document], rounds: int, folder: Path
) -> Iterator[dict[str, Any]]:
    num_bytes = sum(len(document.text) for document in documents)
    engine = teacher.engine
    assert not isinstance(engine, ListingEngine)
    teachers = {setting: again(teacher, engine, recipe) for setting, recipe in recipes.items()}
    paths: dict[str, Path] = {}
    seconds: dict[str, list[float]] = {setting: [] for setting in recipes}
    for number in range(rounds + 1):  # the first compiles
        for setting, recipe in recipes.items():
            paths[setting], spent = dumped(teachers[setting], recipe, documents, folder / (setting or "bytes"))
            seconds[setting] += [spent] if number else []
    for setting, recipe in recipes.items():
        records, sizes = list(read_shard(paths[setting])), column_bytes(paths[setting])
        ratio = statistics.median(a / b for a, b in zip(seconds[setting], seconds[""], strict=True))
        stored = [record.tokens for record in records if record.tokens is not None]
        row: dict[str, Any] = {
            "`top_k`, `min_prob`": setting.replace(",", ", ") or "bytes alone",
            "alternatives per token": None,
            "mean tail": None,
            "bytes per byte": round(sum(sizes.values()) / num_bytes, 2),
            **{f"`{name}`": round(sizes[name] / num_bytes, 2) if stored else None for name in COLUMNS},
            "rounding, nats per token": None,
            "CPU time": round(ratio, 3),
        }
        if stored:
            row["alternatives per token"] = round(float(np.concatenate([t.counts for t in stored]).mean()), 1)
            row["mean tail"] = round(float(np.concatenate([t.tails for t in stored]).mean()), 3)
            error = error_of(teachers[setting], recipe, documents[:8])
            row["rounding, nats per token"] = float(f"{error:.2g}")
        yield row


def again(teacher: Teacher, engine: Engine, recipe: Recipe) -> Teacher:
    """Return a teacher of another recipe on the same engine."""
    return Teacher(recipe, engine, teacher.vocabulary, teacher.tokenizer, teacher.start)


def column_bytes(path: Path) -> dict[str, int]:
    group = pq.read_metadata(path).row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    return {column.path_in_schema.split(".")[0]: column.total_compressed_size for column in columns}


def main(
    recipe: Annotated[str, typer.Option(help="Recipe of the teacher and the corpus.")] = "pipeline/recipes/demo.yaml",
    documents: Annotated[int, typer.Option(help="Documents of the corpus.")] = 20,
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 3,
    setting: Annotated[list[str] | None, typer.Option(help="top_k,min_prob")] = None,
    engine: Annotated[str, typer.Option(help="vllm or transformers")] = "vllm",
    save: Annotated[str | None, typer.Option(help="Name of the file of figures.")] = None,
) -> None:
    """Print a table."""
    loaded = load_recipe(recipe, [f"teacher.engine={engine}"])
    named = load_tokenizer(loaded)
    loaded = with_fitting_windows(loaded, named.model)
    found = list(islice(Corpus(loaded.corpus).documents(), documents))
    with open_teacher(loaded, *named) as teacher, tempfile.TemporaryDirectory() as folder:
        num_tokens = sum(len(window.tokens) for window in encode(found, teacher, {}))
        num_bytes = sum(len(document.text) for document in found)
        recipes = {one: with_tokens(loaded, one) for one in ["", *(setting or SETTINGS[1:])]}
        rows = list(rows_of(teacher, recipes, found, rounds, Path(folder)))
    of_text = f"{len(found)} documents, {num_bytes:,} bytes, {num_tokens:,} teacher tokens"
    print(f"{of_text}\n\n{pages.table(rows, pages.headings(rows))}")
    if save is not None:
        results.save(save, {"rows": rows}, documents=of_text)


if __name__ == "__main__":
    typer.run(main)
