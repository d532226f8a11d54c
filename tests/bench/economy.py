"""What a dump costs and what a student loses by it: stored bytes, divergence and the gradient's angle, over ways to store targets.

    .venv/bin/python -m tests.bench.economy [--recipe pipeline/recipes/demo_gemma.yaml] [--documents 40] [--layers 3]

The teacher's dense targets are computed once a document and kept under `--out`. A setting's shard is written as a dump's is, and read
back. Gradients are of the student's KL term (`stage2_student.losses`) by the weights of its trunk, all of them or the last `--layers`
layers', after its interface alone was trained on other documents; angle and length are beside those of the dense target (Sparse Logit
Sampling's test, arXiv 2503.16870). `--no-gradient` leaves them out: they take most of the time.

Shape legend: P positions, V symbols (256), E entries, O entries besides the first of each position.
"""

import io
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer

from pipeline.config import Recipe
from pipeline.corpus import Corpus, Document
from pipeline.recipe import load_recipe
from schemas import coding
from schemas.shard import Record, Segment, commit_shard, read_shard, to_table
from stage1_teacher.pieces import cut_pieces, spelled_lengths
from stage1_teacher.sparsify import sparsify
from stage1_teacher.teacher import load_tokenizer, open_teacher
from stage2_student.batches import Masks, MicroBatch, collate, make_example
from stage2_student.interfaces.linear import LinearInterface
from stage2_student.losses import sparse_kl
from stage2_student.reader import encode_records
from stage2_student.start import end_tokens, export_start, load_start, student_config, student_tokenizer
from tests.bench.texts import news

SETTINGS = [
    (256, 0.0),
    (16, 0.001),
    (4, 0.001),
    (16, 0.002),
    (16, 0.005),
    (16, 0.01),
    (16, 0.02),
    (16, 0.03),
    (16, 0.05),
]
TINY = 1e-12


@dataclass(frozen=True)
class Dense:
    """A record's targets, all of them."""

    record: Record  # its entries are to be replaced
    probs_PV: np.ndarray
    dropped_P: np.ndarray
    token_end_P: np.ndarray
    doubt_P: np.ndarray
    token_logprobs: np.ndarray

    def stored(self, top_k: int, min_prob: float) -> Record:
        coded = coding.encode_entries(sparsify(self.probs_PV, self.record.realised(), top_k, min_prob))
        return replace(self.record, **coded._asdict())


@dataclass(frozen=True)
class ExactRecord(Record):
    """A record whose entries are those that were to be stored, not coded."""

    exact: tuple[np.ndarray, np.ndarray, np.ndarray] = ()  # type: ignore[assignment]

    @property
    def _entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # type: ignore[override]
        return self.exact


def exact(dense: Dense, top_k: int, min_prob: float) -> ExactRecord:
    counts_P, symbols_E, probs_E = sparsify(dense.probs_PV, dense.record.realised(), top_k, min_prob)
    logprobs_E = np.log(np.maximum(probs_E, 1e-35)).astype(np.float32)
    return ExactRecord(**vars_of(dense.record), exact=(counts_P, symbols_E, logprobs_E))


def vars_of(record: Record) -> dict[str, Any]:
    return {name: getattr(record, name) for name in Record.__dataclass_fields__}


def dense_targets(recipe: Recipe, cell: str, documents: int, out: Path) -> list[Dense]:
    """The first documents' targets, from `out` or from the teacher."""
    folder = out / recipe.teacher.model.replace("/", "_") / cell
    folder.mkdir(parents=True, exist_ok=True)
    if cell == "news":
        texts = [Document(name, text, None) for name, text in news(documents)]
    else:
        texts = list(Corpus(recipe.corpus.model_copy(update={"limit": documents})).documents())
    model, tokenizer = load_tokenizer(recipe)
    pieces = [
        p for d in texts for p in cut_pieces(d, tokenizer, recipe.teacher.max_tokens, recipe.teacher.overlap_tokens)
    ]
    paths = [folder / f"{index:05d}.npz" for index in range(len(pieces))]
    teacher = None
    for piece, path in zip(pieces, paths, strict=True):
        if path.exists():
            continue
        teacher = teacher or open_teacher(recipe, model, tokenizer)
        [targets] = teacher.targets([piece], teacher.ask([piece]))
        targets = targets.drop_prefix(len(tokenizer.prefix))
        with path.with_suffix(".partial").open("wb") as file:
            names = ("dropped_P", "token_end_P", "doubt_P", "token_logprobs")
            arrays = {name: getattr(targets, name) for name in names}
            np.savez(file, probs_PV=targets.probs_PV.astype(np.float32), **arrays)
        path.with_suffix(".partial").replace(path)
    found = []
    for piece, path in zip(pieces, paths, strict=True):
        window = piece.window
        segment = Segment(window.supervised - window.start, window.end - window.supervised, window.has_end)
        taken = slice(segment.start, segment.start + segment.num_positions)
        with np.load(path) as arrays:
            probs_PV, *shares = (
                arrays[n][taken].astype(np.float64) for n in ("probs_PV", "dropped_P", "token_end_P", "doubt_P")
            )
            token_logprobs = arrays["token_logprobs"]
        lengths = np.array(spelled_lengths(tokenizer, piece.tokens), dtype=np.int32)
        none = np.empty(0, np.uint8)
        record = Record(
            piece.doc_id, window.start, piece.text, (segment,), lengths, coding.encode_token_logprobs(token_logprobs),
            *(coding.encode_shares(share) for share in shares), none, none, none, none, none,
        )  # fmt: skip
        found.append(Dense(record, probs_PV / probs_PV.sum(axis=1, keepdims=True), *shares, token_logprobs))
    return found


def column_bytes(values: np.ndarray, num_bytes: int, level: int = 15, **options: Any) -> float:
    """A column's size in Parquet and zstd, per byte of text."""
    options = options or {"use_dictionary": False, "use_byte_stream_split": True}
    file = io.BytesIO()
    pq.write_table(pa.table({"x": pa.array(values)}), file, compression="zstd", compression_level=level, **options)
    size: int = pq.read_metadata(file).row_group(0).column(0).total_compressed_size
    return size / num_bytes


def write(records: Sequence[Record], level: int = 15) -> tuple[list[Record], dict[str, int], float]:
    """The records read back, the size of each column in bytes, and the seconds it took to write."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.parquet"
        started = time.thread_time()
        commit_shard(to_table(records, {}), path, level)
        seconds = time.thread_time() - started
        group = pq.read_metadata(path).row_group(0)
        columns = [group.column(i) for i in range(group.num_columns)]
        return (
            list(read_shard(path)),
            {c.path_in_schema.split(".")[0]: c.total_compressed_size for c in columns},
            seconds,
        )


def coding_error(stored: Record, wanted: Record) -> np.ndarray:
    """P: KL(entries and tail as they were to be stored || as they are), nats."""
    _, symbols_E, logprobs_E = stored._entries
    position_E = np.arange(stored.num_positions).repeat(stored.entry_counts)
    q_PV, p_PV = (np.zeros((stored.num_positions, 257)) for _ in range(2))
    q_PV[position_E, symbols_E] = np.exp(logprobs_E.astype(np.float64))
    p_PV[position_E, wanted.symbols] = np.exp(wanted.logprobs.astype(np.float64))  # as many entries at each position
    for probs_PV in (p_PV, q_PV):
        probs_PV[:, 256] = np.maximum(1 - probs_PV.sum(axis=1), 0.0)
        probs_PV[stored.entry_counts == 256, 256] = 0.0
        np.maximum(probs_PV, TINY, out=probs_PV)
    found: np.ndarray = (p_PV * np.log(p_PV / q_PV)).sum(axis=1)
    return found


def settings_table(
    dense: Sequence[Dense], settings: Sequence[tuple[int, float]], gradients: "Gradients | None"
) -> Iterator[str]:
    num_bytes = sum(sum(s.length for s in d.record.segments) for d in dense)
    num_tokens = sum(len(d.token_logprobs) for d in dense)
    yield f"{len(dense)} records, {num_bytes} bytes of text, {num_bytes / num_tokens:.2f} bytes a token"
    yield "| top_k | min_prob | entries | mean tail | bytes / text byte | bytes / token | coding error (nats) | angle, as stored | length ratio | angle, not coded |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for top_k, min_prob in settings:
        stored, sizes, _ = write([d.stored(top_k, min_prob) for d in dense])
        wanted = [exact(d, top_k, min_prob) for d in dense]
        wanted = [replace(w, exact=_ordered(w, s)) for w, s in zip(wanted, stored, strict=True)]
        error = np.concatenate([coding_error(s, w) for s, w in zip(stored, wanted, strict=True)]).mean()
        counts = np.concatenate([record.entry_counts for record in stored])
        tails = np.concatenate([(record.tail_codes / 100.0) ** 2 for record in stored]).mean()
        size = sum(sizes.values())
        angles = "| | |" if gradients is None else gradients.compare(stored, wanted)
        yield (
            f"| {top_k} | {min_prob} | {counts.mean():.2f} | {tails:.4f} | {size / num_bytes:.2f} | {size / num_tokens:.1f} "
            f"| {error:.1e} {angles}"
        )


def _ordered(wanted: ExactRecord, stored: Record) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The exact entries in the order in which they come back from the shard: the top first."""
    counts_P, symbols_E, logprobs_E = wanted.exact
    position_E = np.arange(len(counts_P)).repeat(counts_P)
    is_top_E = symbols_E == stored.top_symbols[position_E]
    order = np.lexsort((symbols_E, ~is_top_E, position_E))
    return counts_P, symbols_E[order], logprobs_E[order]


def codings_table(dense: Sequence[Dense], top_k: int, min_prob: float) -> Iterator[str]:
    """Bytes per text byte of single columns, stored in other ways."""
    num_bytes = sum(sum(s.length for s in d.record.segments) for d in dense)
    entries = [sparsify(d.probs_PV, d.record.realised(), top_k, min_prob) for d in dense]
    counts_P, symbols_E, probs_E = (np.concatenate([e[i] for e in entries]) for i in range(3))
    position_E = np.arange(len(counts_P)).repeat(counts_P)
    falling = np.lexsort((-probs_E, position_E))
    first = np.zeros(len(probs_E), dtype=bool)
    first[np.cumsum(counts_P) - counts_P] = True
    realised_E = np.concatenate([d.record.realised() for d in dense])[position_E]
    is_top = np.zeros(len(probs_E), dtype=bool)
    is_top[falling[first]] = True
    codes = {scale: np.rint(scale * np.sqrt(probs_E)).astype(np.uint8) for scale in (64, 100, 128, 255)}
    logs_E = np.log(np.maximum(probs_E, 1e-35))
    falling_codes = codes[100][falling].astype(np.int16)
    deltas = np.where(first, 0, np.append(0, -np.diff(falling_codes))).astype(np.uint8)
    columns = {
        "symbols, falling probability": symbols_E[falling],
        "symbols, falling probability, without the realised one": symbols_E[falling][
            (symbols_E != realised_E)[falling]
        ],
        "symbols, rising": symbols_E,
        "symbols, top apart: the top": symbols_E[is_top],
        "symbols, top apart: the others, rising": symbols_E[~is_top],
        "probabilities, float16 logs, falling": logs_E[falling].astype(np.float16),
        "probabilities, uint8 logs in steps of 0.04, falling": np.clip(np.rint(-logs_E[falling] / 0.04), 0, 255).astype(
            np.uint8
        ),
        "probabilities, uint8 logs in steps of 0.1, falling, without the top": np.clip(
            np.rint(-logs_E[falling][~first] / 0.1), 0, 255
        ).astype(np.uint8),
        "probabilities, square roots in hundredths, falling, differences": deltas[~first],
        "probabilities, square roots in hundredths, falling": codes[100][falling][~first],
    }
    for scale, values in codes.items():
        columns[f"probabilities, square roots in {scale}ths, by symbol"] = values[~is_top]
    for name in ("dropped_P", "token_end_P", "doubt_P"):
        share = np.concatenate([getattr(d, name) for d in dense])
        columns[f"{name}, float16"] = share.astype(np.float16)
        for scale in (27, 36, 45, 64):
            columns[f"{name}, square roots in {scale}ths"] = np.ceil(np.sqrt(share) * scale).astype(np.uint8)
    token_logprobs = np.concatenate([d.token_logprobs for d in dense])
    columns["token log-probabilities, float32"] = token_logprobs.astype(np.float32)
    columns["token log-probabilities, float16"] = token_logprobs.astype(np.float16)
    columns["token log-probabilities, in 64ths"] = coding.encode_token_logprobs(token_logprobs)
    yield "| column | split bytes | dictionary | plain | delta |"
    yield "| --- | --- | --- | --- | --- |"
    for name, values in columns.items():
        ways: list[dict[str, Any]] = [{}, {"use_dictionary": True}, {"use_dictionary": False}]
        if values.dtype.kind == "u":
            ways.append({"use_dictionary": False, "column_encoding": {"x": "DELTA_BINARY_PACKED"}})
        yield f"| {name} | " + " | ".join(f"{column_bytes(values, num_bytes, **way):.3f}" for way in ways) + " |"


def levels_table(records: Sequence[Record]) -> Iterator[str]:
    num_bytes = sum(sum(s.length for s in r.segments) for r in records)
    yield "| zstd level | bytes / text byte | text bytes / s written |\n| --- | --- | --- |"
    for level in (1, 3, 6, 9, 12, 15, 19):
        _, sizes, seconds = write(records, level)
        yield f"| {level} | {sum(sizes.values()) / num_bytes:.3f} | {num_bytes / seconds:,.0f} |"
    _, sizes, _ = write(records)
    yield "\n| column | bytes / text byte at level 15 |\n| --- | --- |"
    yield from (f"| {name} | {size / num_bytes:.3f} |" for name, size in sizes.items())


def speed(dense: Sequence[Dense], top_k: int, min_prob: float, rounds: int = 5) -> str:
    """Positions per second of one core, the best of some rounds: dense to codes, and codes to padded training arrays."""
    encode = decode = math.inf
    for _ in range(rounds):
        started = time.thread_time()
        records = [d.stored(top_k, min_prob) for d in dense]
        encode = min(encode, time.thread_time() - started)
        started = time.thread_time()
        for record in records:
            _padded(record)
        decode = min(decode, time.thread_time() - started)
    num_positions = sum(d.record.num_positions for d in dense)
    return f"one core: encode {num_positions / encode:,.0f} positions/s, decode into padded arrays {num_positions / decode:,.0f}"


def _padded(record: Record) -> tuple[np.ndarray, np.ndarray]:
    from stage2_student.batches import _entries

    return _entries(record, np.arange(record.num_positions))


class Gradients:
    """A student whose interface has been trained a little, and the gradients of its KL term.

    Args:
        dense: the first `num_records` of them are compared, three times as many behind them train the interface.
    """

    def __init__(
        self, recipe: Recipe, dense: Sequence[Dense], num_records: int, layers: int | None, steps: int
    ) -> None:
        student = student_config(recipe)
        self.tokenizer, _ = student_tokenizer(student)
        self.ends, self.num_records = end_tokens(student, self.tokenizer), num_records
        self.masks = Masks(student.max_doubt, student.max_token_end)
        lm = load_start(export_start(recipe), student.trust_remote_code)
        self.trunk = lm.base_model
        lm.requires_grad_(False)
        chosen = self.trunk if layers is None else self.trunk.layers[-layers:]
        self.weights = [weight.requires_grad_() for weight in chosen.parameters()]
        self.interface = LinearInterface(lm.config.hidden_size)
        self._train([exact(d, 256, 0.0) for d in dense[num_records : 4 * num_records]], steps)
        self.dense = [exact(d, 256, 0.0) for d in dense[:num_records]]
        self.hidden_BLD = self.trunk(input_ids=self._batch(self.dense).tokens_BL, use_cache=False).last_hidden_state
        self.reference, nats = self._gradient(self.dense)
        batch = self._batch(self.dense)
        print(
            f"gradients on {batch.tokens_BL.numel()} student tokens, {int(batch.kl_P.sum())} positions; the student's KL there: "
            f"{nats / int(batch.kl_P.sum()):.3f} nats; {sum(w.numel() for w in self.weights):,} weights",
            flush=True,
        )

    def _batch(self, records: Sequence[Record]) -> MicroBatch:
        found = []
        for encoded in encode_records(records, self.tokenizer, 10**9):
            assert not isinstance(encoded, str), encoded
            found.append(make_example(encoded, self.ends.start, self.ends.end, self.interface.max_bytes, self.masks))
        return collate(found)

    def _train(self, records: Sequence[Record], steps: int) -> None:
        """The interface's maps alone, on states that stay as they are."""
        batches = [self._batch([record]) for record in records]
        with torch.no_grad():
            hidden = [self.trunk(input_ids=batch.tokens_BL, use_cache=False).last_hidden_state for batch in batches]
        optimizer = torch.optim.Adam(self.interface.parameters(), lr=1e-3)
        order = torch.Generator().manual_seed(0)
        for _ in range(steps):
            for index in torch.randint(len(batches), (2,), generator=order).tolist():
                self._kl(hidden[index], batches[index]).div(len(batches[index].state_P)).backward()
            optimizer.step()
            optimizer.zero_grad()

    def _kl(self, hidden_BLD: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        logits_PV = self.interface(hidden_BLD, batch.state_P, batch.offset_P)
        return sparse_kl(logits_PV, batch.entry_symbols_PE, batch.entry_logprobs_PE, batch.kl_P)

    def _gradient(self, records: Sequence[Record]) -> tuple[torch.Tensor, float]:
        leaf_BLD = self.hidden_BLD.detach().requires_grad_()
        batch = replace(self._batch(records), kl_P=self._batch(self.dense).kl_P)
        nats = self._kl(leaf_BLD, batch)
        (states_BLD,) = torch.autograd.grad(nats, leaf_BLD)
        parts = torch.autograd.grad(self.hidden_BLD, self.weights, states_BLD, retain_graph=True, allow_unused=True)
        return torch.cat([part.flatten() for part in parts if part is not None]), float(nats.detach())

    def compare(self, stored: Sequence[Record], wanted: Sequence[Record]) -> str:
        coded, plain = (self._gradient(records[: self.num_records])[0] for records in (stored, wanted))
        return f"| {self._angle(coded):.2f}° | {float(coded.norm() / self.reference.norm()):.4f} | {self._angle(plain):.2f}° |"

    def _angle(self, gradient: torch.Tensor) -> float:
        cosine = torch.nn.functional.cosine_similarity(gradient.double(), self.reference.double(), dim=0)
        return math.degrees(math.acos(min(1.0, float(cosine))))


def main(
    recipe: Annotated[str, typer.Option(help="Recipe of the teacher and the student.")] = "pipeline/recipes/demo.yaml",
    cell: Annotated[list[str] | None, typer.Option(help="corpus, news; default: both.")] = None,
    documents: Annotated[int, typer.Option(help="Documents of the corpus; of news, a fifth of them.")] = 40,
    gradient_documents: Annotated[int, typer.Option(help="How many of them the gradient is taken on.")] = 8,
    layers: Annotated[
        int | None, typer.Option(help="Take the gradient by the last layers' weights; default: all.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps that the interface is trained before.")] = 300,
    setting: Annotated[list[str] | None, typer.Option(help="top_k,min_prob; default: nine of them.")] = None,
    gradient: Annotated[bool, typer.Option(help="Measure gradients.")] = True,
    out: Annotated[Path, typer.Option(help="Folder of the dense targets and the student.")] = Path("runs/economy"),
) -> None:
    torch.manual_seed(0)
    pairs = (text.split(",") for text in setting or ())
    settings = [(int(top_k), float(min_prob)) for top_k, min_prob in pairs] or SETTINGS
    loaded = load_recipe(recipe, ["teacher.engine=transformers", f"student.path={out / Path(recipe).stem}"])
    for name in cell or ["corpus", "news"]:
        dense = dense_targets(loaded, name, documents if name == "corpus" else max(2, documents // 5), out)
        count = min(gradient_documents, len(dense) // 2)
        gradients = Gradients(loaded, dense, count, layers, steps) if gradient else None
        print(f"\n## {loaded.teacher.model}, {name}\n", flush=True)
        for line in settings_table(dense, settings, gradients):
            print(line, flush=True)
        chosen = loaded.dump.top_k, loaded.dump.min_prob
        print(f"\nAt top_k {chosen[0]}, min_prob {chosen[1]}, bytes per text byte:\n")
        print("\n".join([*codings_table(dense, *chosen), "", *levels_table([d.stored(*chosen) for d in dense])]))
        print("\n" + speed(dense, *chosen), flush=True)


if __name__ == "__main__":
    typer.run(main)
