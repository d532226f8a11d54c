"""Cost of a dump and loss of a student, over ways to store targets.

Measured are stored bytes, coding error and the angle of the gradient.

    .venv/bin/python -m tests.bench.economy [--recipe pipeline/recipes/demo_gemma.yaml] [--cell news] [--layers 4]

The teacher's dense targets are computed once a document and kept under `--out`. A setting's shard is made as a dump's
is, written and read back. `--no-gradient` leaves the gradients out (`tests.bench.gradients`): they take most of the
time.

Shape legend: P positions, V symbols (256), E entries.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow.parquet as pq
import torch
import typer

from pipeline.config.loading import load_recipe
from schemas import NUM_SYMBOLS
from schemas.record import Record
from schemas.shard import commit_shard, read_shard, to_table
from stage1_teacher.reduction.sparsify import Entries, sparsify
from stage1_teacher.targets.records import make_record
from tests.bench.codings import DRAWS, codings_table, sampled
from tests.bench.dense_targets import Dense, dense_targets
from tests.bench.gradients import Gradients

SETTINGS = ["16,0.001", "16,0.01", "16,0.02", "16,0.03", "16,0.04", "16,0.05", "8,0.03", "4,0.03", "4,0.001"]
TINY = 1e-12


@dataclass(frozen=True)
class Setting:
    top_k: int
    min_prob: float

    def stored(self, dense: Dense) -> Record:
        return make_record(dense.window, [dense.targets], dense.tokenizer, self.top_k, self.min_prob)

    def exact(self, dense: Dense) -> Record:
        """Return the record with exact probabilities, not rounded to levels."""
        record = self.stored(dense)
        counts_P, symbols_E, probs_E = self.entries(dense, record)
        logprobs_E = np.log(np.maximum(probs_E, 1e-35)).astype(np.float32)
        return replace(record, entry_counts=counts_P, symbols=symbols_E, logprobs=logprobs_E)

    def entries(self, dense: Dense, record: Record) -> Entries:
        return sparsify(supervised(dense, record), record.realised(), self.top_k, self.min_prob)


def supervised(dense: Dense, record: Record) -> np.ndarray:
    """Return (P, 256) float64: the dense targets of the record's positions; rows sum to 1."""
    [span] = dense.window.spans
    [(first, last)] = span.kept
    return dense.targets.probs_PV[first:last]


EVERYTHING = Setting(NUM_SYMBOLS, 0.0)


def classes(record: Record) -> np.ndarray:
    """Return (P, 257) float64: the stored probabilities by symbol, and the tail."""
    probs_PV = np.zeros((record.num_positions, NUM_SYMBOLS + 1))
    position_E = np.arange(record.num_positions).repeat(record.entry_counts)
    probs_PV[position_E, record.symbols] = np.exp(record.logprobs.astype(np.float64))
    probs_PV[:, NUM_SYMBOLS] = np.where(record.entry_counts == NUM_SYMBOLS, 0.0, 1 - probs_PV.sum(axis=1))
    return np.maximum(probs_PV, TINY)


def coding_error(stored: Record, exact: Record) -> np.ndarray:
    """Return P values in nats: KL(entries and tail as they were to be stored || as they are)."""
    exact_PV, stored_PV = classes(exact), classes(stored)
    return np.asarray((exact_PV * np.log(exact_PV / stored_PV)).sum(axis=1))


def write(records: Sequence[Record], level: int) -> tuple[list[Record], dict[str, int], float]:
    """Return the records read back, each column's size in bytes, and the seconds that writing took."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.parquet"
        started = time.thread_time()
        commit_shard(to_table(records, {}), path, level)
        seconds = time.thread_time() - started
        group = pq.read_metadata(path).row_group(0)
        columns = [group.column(i) for i in range(group.num_columns)]
        sizes = {column.path_in_schema.split(".")[0]: column.total_compressed_size for column in columns}
        return list(read_shard(path)), sizes, seconds


def settings_table(
    dense: Sequence[Dense], settings: Sequence[Setting], level: int, gradients: Gradients | None
) -> Iterator[str]:
    num_bytes = sum(d.num_bytes for d in dense)
    num_tokens = sum(len(d.window.tokens) for d in dense)
    bytes_per_token = num_bytes / num_tokens
    yield f"{len(dense)} records, {num_bytes} bytes of text, {bytes_per_token:.2f} bytes a token, zstd level {level}"
    yield (
        "| top_k | min_prob | entries | mean tail | bytes / text byte | bytes / token | coding error (nats) "
        "| angle, as stored | length ratio | angle, not coded |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for setting in settings:
        stored, sizes, _ = write([setting.stored(d) for d in dense], level)
        exact = [setting.exact(d) for d in dense]
        error = np.concatenate([coding_error(s, e) for s, e in zip(stored, exact, strict=True)]).mean()
        counts = np.concatenate([record.entry_counts for record in stored])
        tail = np.concatenate([classes(record)[:, NUM_SYMBOLS] for record in exact]).mean()
        size = sum(sizes.values())
        yield (
            f"| {setting.top_k} | {setting.min_prob} | {counts.mean():.2f} | {tail:.4f} | {size / num_bytes:.2f} "
            f"| {size / num_tokens:.1f} | {error:.1e} | {_angles(gradients, stored, exact)} |"
        )


def _angles(gradients: Gradients | None, stored: Sequence[Record], exact: Sequence[Record]) -> str:
    if gradients is None:
        return "| |"
    num = len(gradients.batch.doc_ids)
    coded, plain = gradients.beside(stored[:num]), gradients.beside(exact[:num])
    return f"{coded.degrees:.2f}° | {coded.length_ratio:.4f} | {plain.degrees:.2f}°"


def sampled_angles(dense: Sequence[Dense], stored: Sequence[Record], gradients: Gradients) -> Iterator[str]:
    """Return figures of symbols drawn instead of the most probable ones."""
    random = np.random.default_rng(0)
    pairs = list(zip(dense, stored, strict=True))[: len(gradients.batch.doc_ids)]
    yield "| draws | angle | length ratio |\n| --- | --- | --- |"
    for draws in DRAWS:
        found = gradients.beside([sampled(record, supervised(d, record), draws, random) for d, record in pairs])
        yield f"| {draws} | {found.degrees:.2f}° | {found.length_ratio:.4f} |"


def levels_table(records: Sequence[Record], num_bytes: int) -> Iterator[str]:
    yield "| zstd level | bytes / text byte | text bytes / s written |\n| --- | --- | --- |"
    for level in (1, 3, 6, 9, 12, 15, 17, 19):
        _, sizes, seconds = write(records, level)
        yield f"| {level} | {sum(sizes.values()) / num_bytes:.3f} | {num_bytes / seconds:,.0f} |"


def columns_table(records: Sequence[Record], num_bytes: int, level: int) -> Iterator[str]:
    yield f"| column | bytes / text byte, zstd level {level} |\n| --- | --- |"
    yield from (f"| {name} | {size / num_bytes:.3f} |" for name, size in write(records, level)[1].items())


def main(
    recipe: Annotated[str, typer.Option(help="Recipe of the teacher and the student.")] = "pipeline/recipes/demo.yaml",
    cell: Annotated[list[str] | None, typer.Option(help="corpus, news; default: both.")] = None,
    documents: Annotated[int, typer.Option(help="Documents of the corpus; of news, a quarter of them.")] = 24,
    gradient_documents: Annotated[int, typer.Option(help="How many of them the gradient is taken on.")] = 8,
    layers: Annotated[int | None, typer.Option(help="Gradient by the last layers' weights; default: all.")] = None,
    steps: Annotated[int, typer.Option(help="Steps that the interface is trained before.")] = 200,
    setting: Annotated[list[str] | None, typer.Option(help="top_k,min_prob; default: nine of them.")] = None,
    gradient: Annotated[bool, typer.Option(help="Measure gradients.")] = True,
    out: Annotated[Path, typer.Option(help="Folder of the dense targets and the student.")] = Path("runs/economy"),
) -> None:
    torch.manual_seed(0)
    pairs = [text.split(",") for text in setting or SETTINGS]
    settings = [Setting(int(top_k), float(min_prob)) for top_k, min_prob in pairs]
    loaded = load_recipe(recipe, ["teacher.engine=transformers", f"student.path={out / Path(recipe).stem}"])
    dump = loaded.dump
    for name in cell or ["corpus", "news"]:
        dense = dense_targets(loaded, name, documents if name == "corpus" else max(2, documents // 4), out)
        print(f"\n## {Path(loaded.teacher.model).name}, {name}\n", flush=True)
        gradients = None
        if gradient:
            whole, count = [EVERYTHING.exact(d) for d in dense], min(gradient_documents, len(dense) // 2)
            gradients = Gradients(loaded, whole[:count], whole[count:], layers, steps)
            print(
                f"gradients on {gradients.batch.tokens_BL.numel()} student tokens, "
                f"{int(gradients.batch.kl_P.sum())} positions; "
                f"the student's KL there: {gradients.nats_per_position:.3f} nats\n"
            )
        for line in settings_table(dense, settings, dump.zstd_level, gradients):
            print(line, flush=True)
        num_bytes = sum(d.num_bytes for d in dense)
        chosen = Setting(dump.top_k, dump.min_prob)
        stored, exact = [chosen.stored(d) for d in dense], [chosen.exact(d) for d in dense]
        whole_PV = [supervised(d, record) for d, record in zip(dense, stored, strict=True)]
        print(f"\nAt top_k {dump.top_k}, min_prob {dump.min_prob}:\n")
        tables = [
            columns_table(stored, num_bytes, dump.zstd_level),
            levels_table(stored, num_bytes),
            codings_table(stored, exact, whole_PV, num_bytes, dump.zstd_level),
            sampled_angles(dense, stored, gradients) if gradients else (),
        ]
        for table in tables:
            print("\n".join([*table, ""]), flush=True)


if __name__ == "__main__":
    typer.run(main)
