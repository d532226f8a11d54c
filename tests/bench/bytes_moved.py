"""Bytes that pass through a GPU's memory in a step's head and `token_marginal`, counted from the sizes of tensors.

    .venv/bin/python -m tests.bench.bytes_moved [--tokens 1024] [--save bytes-moved]

Nothing is timed, and no GPU is needed: an operation is taken to read each of its tensors once and to write its result
once, a Triton kernel what it loads and stores. Counted are the sums over the head's columns, the byte distributions,
the objectives and their gradients, as they run, on text of this project in a vocabulary of 151,936 columns; the head's
products, for a hidden width of 896 and 4,096 tokens a micro-batch, follow from their shapes. The fused cross-entropy
beside it is the best that keeps logits in memory: one chunk, each logit written, read for its row's total, read and
overwritten by its gradient, read twice for the gradients of states and weights.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from pipeline.config import StudentConfig, TrainConfig
from stage2_student.data.examples import Encoded, Masks, make_example
from stage2_student.data.micro_batch import MicroBatch, collate
from stage2_student.data.spans import token_spans
from stage2_student.interfaces import OrderableHead, StudentShape
from stage2_student.interfaces.token_marginal import cells as marginal_cells
from stage2_student.interfaces.token_marginal.interface import TokenMarginal
from stage2_student.interfaces.token_marginal.kernel_twins import list_cells
from stage2_student.interfaces.token_marginal.node_sums import Backward, Kernels, Memory, Order
from stage2_student.interfaces.token_marginal.nodes import Chunk, Listed, NodePlan, Rows, Tables
from stage2_student.interfaces.token_marginal.types import Sums
from stage2_student.losses.objectives import ObjectiveInputs, active_objectives
from stage2_student.losses.weighted_loss import weighted_loss
from stage2_student.model.initial_student import end_tokens, student_tokenizer
from tests.bench import results
from tests.bench.interfaces import TOKENIZERS
from tests.support.small_dumps import make_record

WIDTH, HIDDEN, TOKENS, ITEM = 151_936, 896, 4096, 2  # columns, and a micro-batch in bfloat16
DOCUMENT = 512  # tokens
TEXTS = ("README.md", "stage2_student/README.md", "stage2_student/method.md", "pipeline/README.md")
_PRODUCTS = {"mm", "addmm", "bmm", "_scaled_mm"}
_NO_BYTES = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_local_scalar_dense"}
_GATHERS = {"index", "index_select", "gather", "embedding"}  # which read no more of the first than they return


class BytesMoved(TorchDispatchMode):
    """Bytes that all operations but products read and write, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.by_name.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and name not in _NO_BYTES | _PRODUCTS:
            made = sum(map(size, tensors(found)))
            given = [size(one) for one in tensors((args, kwargs or {}))]
            if name in _GATHERS and given:
                given[0] = min(given[0], made)
            self.by_name[name] += made + sum(given)
        return found


def tensors(values: Any) -> list[Tensor]:
    """Return all tensors in nested containers."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    return [one for value in values for one in tensors(value)] if isinstance(values, list | tuple) else []


def size(tensor: Tensor) -> int:
    """Return the bytes of a tensor that are there: one that is expanded has fewer than it has elements."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class Counted:
    """Kernels that are counted instead of run; their results have no meaning."""

    def __init__(self, moved: BytesMoved) -> None:
        self.moved = moved

    @property
    def kernels(self) -> Kernels:
        return Kernels(self.list_cells, self.sums, self.gradient, self.take_rows)

    def list_cells(self, nodes: NodePlan, rows: Rows, unique_Q: Tensor, tables: Tables, num_cells: int) -> Listed:
        with _disable_current_modes():
            listed = list_cells(nodes, rows, unique_Q, tables, num_cells)
        of_trie = num_cells * (2 + 4 + 4) + len(nodes.node_N) * (4 + 4 + 4 + 4 + 8)
        self.moved.by_name["_list_cells"] += of_trie + sum(map(size, (*rows[1:], *listed)))
        return listed

    def sums(self, logits: Tensor, order: Order, chunk: Chunk, tables: Tables) -> tuple[Sums, Tensor]:
        num_rows, num_cells = len(logits), len(chunk.cells.first_I)
        mass_I = torch.full((num_cells,), 1e-3, dtype=torch.float64)
        found = Sums(mass_I, torch.full((num_rows,), 1e-3).double(), torch.zeros(num_rows, 2).double())
        log_total_R = torch.zeros(num_rows).double()
        # A mass and the largest logit are stored and read, and then the mass is stored.
        own = (
            size(logits)
            + num_cells * (8 + 4 + 8 + 4 + 8)
            + sum(map(size, (found.end_R, found.logprob_R2, log_total_R)))
        )
        self.moved.by_name["_sum_rows"] += own + self._rows(order, chunk, tables)
        return found, log_total_R

    def gradient(self, logits: Tensor, order: Order, chunk: Chunk, tables: Tables, given: Backward) -> Tensor:
        num_cells = len(chunk.cells.first_I)
        # A cell's gradient and mass are read for the sum, its gradient again, its coefficient is stored and read.
        own = (
            2 * size(logits)
            + num_cells * (8 + 8 + 8 + 4 + 4)
            + sum(map(size, (*given.grad_sums[1:], given.log_total_R)))
        )
        self.moved.by_name["_spread_rows"] += own + self._rows(order, chunk, tables)
        return logits if given.in_place else torch.empty_like(logits)

    def take_rows(self, matrix: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        taken = torch.empty(len(index), matrix.shape[1], dtype=dtype)
        self.moved.by_name["_take_rows"] += size(matrix) + size(index) + size(taken)
        return taken

    def _rows(self, order: Order, chunk: Chunk, tables: Tables) -> int:
        """Return the bytes of what a pass reads beside logits and masses: a table of columns is shared by all rows."""
        columns = (tables.common_C,) if order.in_order else (tables.common_C, order.columns.token_C)
        return sum(map(size, (*columns, *chunk.rows[1:], chunk.cells.tokens_R2)))


class Batch(NamedTuple):
    """A micro-batch of text, and its interface."""

    interface: TokenMarginal
    micro: MicroBatch
    train: TrainConfig
    num_tokens: int


def make_batch(tokens: int, by_nodes: tuple[Kernels, Memory] | None) -> Batch:
    """Return a micro-batch of this project's texts in the vocabulary of Qwen, for an interface."""
    config = StudentConfig(model="m", path="p", tokenizer=TOKENIZERS["qwen"])
    tokenizer = student_tokenizer(config).tokenizer
    ids = end_tokens(config, tokenizer)
    shape = StudentShape(8, WIDTH, tokenizer.token_bytes, tokenizer.prefix, ids.ends)
    interface = TokenMarginal(shape, 1.0)
    if by_nodes is not None:
        interface.use_nodes(*by_nodes)
    text = b"".join(Path(name).read_bytes() for name in TEXTS)
    all_tokens = tokenizer.encode(text[: 8 * tokens])[:tokens]
    documents = [encoded(all_tokens[at : at + DOCUMENT], tokenizer.token_bytes) for at in range(0, tokens, DOCUMENT)]
    examples = [make_example(document, ids.document_start, ids.end, None, Masks(1.0, 1.0)) for document in documents]
    micro = collate(examples)
    micro = replace(micro, extra=interface.prepare(documents, examples, micro))
    return Batch(interface, micro, TrainConfig(dtype="bfloat16"), len(micro.labels_BL.flatten()))


def encoded(tokens: Sequence[int], token_bytes: Sequence[bytes | None]) -> Encoded:
    """Return a document of these tokens, with targets that are drawn."""
    spelled = [token_bytes[token] or b"" for token in tokens]
    document = b"".join(spelled)
    spans = token_spans(spelled, document, b"")
    starts, ends = (np.array([getattr(s, name) for s in spans], dtype=np.int64) for name in ("start", "stop"))
    record = make_record("d", document, np.random.default_rng(0), None)
    return Encoded(record, np.array(tokens, dtype=np.int64), starts, ends)


def count(batch: Batch, moved: BytesMoved) -> float:
    """Return the bytes for each logit that head, interface and objectives move beside the head's products."""
    linear = nn.Linear(8, WIDTH, bias=False)
    head = OrderableHead(lambda states: linear(states), linear, lambda logits: logits)
    hidden_BLD = torch.randn(*batch.micro.tokens_BL.shape, 8, requires_grad=True)
    terms = active_objectives(batch.train.objectives, {})
    with torch.autocast("cpu", torch.bfloat16), moved:
        scores = batch.interface.scores(hidden_BLD, batch.micro, head)
        inputs = ObjectiveInputs(batch.micro, scores, scores.token_nats_N, batch.train, hidden_BLD, head)
        nats, _ = weighted_loss(inputs, terms)
        nats.backward()
    return moved.total / (batch.num_tokens * WIDTH)


def products(chunks: int, again: int, casts: int) -> float:
    """Return the bytes for each logit of the head's products, forward and backward, and of its weight's copies.

    Args:
        chunks: of the micro-batch, each of which reads the weight, and adds to its gradient.
        again: how many of these are multiplied again for the gradient.
        casts: how often the weight is copied to bfloat16.
    """
    logits, weight, states = TOKENS * WIDTH, WIDTH * HIDDEN, TOKENS * HIDDEN
    written = ITEM * logits * (1 + again / chunks)
    read = 2 * ITEM * logits + ITEM * weight * (2 * chunks + again) + ITEM * states * (3 + again / chunks)
    gradient = ITEM * weight * (chunks + 3 * (chunks - 1)) + ITEM * states
    copies = (4 + ITEM) * weight * (casts + 1)  # and that of the gradient to float32
    return (written + read + gradient + copies) / logits


def main(
    tokens: Annotated[int, typer.Option(help="tokens of the micro-batch that is counted")] = 1024,
    save: Annotated[str, typer.Option(help="file of results to write; none: print alone")] = "",
) -> None:
    """Count, and print a line for each way."""
    torch.manual_seed(0)
    chunks = TOKENS // 256
    fused = (3 * ITEM, products(1, 0, 1), 0.0)
    rows = [row("fused cross-entropy", fused, fused)]
    ways = {"`token_marginal`, torch's own operations": (None, products(chunks, chunks, 1 + chunks))}
    ways["`token_marginal`, Triton, logits computed again"] = (Memory(0, TOKENS), products(1, 1, 1))
    ways["`token_marginal`, Triton, logits kept"] = (Memory(TOKENS, TOKENS), products(1, 0, 1))
    plain = (marginal_cells.sum_cells, marginal_cells.softmax_sums_backward)
    for name, (memory, of_products) in ways.items():
        moved = BytesMoved()
        batch = make_batch(tokens, None if memory is None else (Counted(moved).kernels, memory))
        own = nullcontext() if memory is not None else mock.patch.object(marginal_cells, "_kernels", lambda _: plain)
        with own:
            beside = count(batch, moved)
        shipped = sum(map(size, batch.micro.extra.values())) / batch.num_tokens
        rows.append(row(name, (beside, of_products, shipped), fused))
        print(name, [(key, round(value / batch.num_tokens / WIDTH, 3)) for key, value in moved.by_name.most_common(8)])
    for one in rows:
        print(one)
    if save:
        documents = f"{tokens:,} tokens of this project's texts; products for {TOKENS:,} tokens, width {HIDDEN}"
        results.save(
            save, {"rows": rows}, documents=documents, remark="Counted from the sizes of tensors; nothing is timed."
        )


def row(name: str, parts: tuple[float, float, float], fused: tuple[float, float, float]) -> dict[str, Any]:
    beside, of_products, shipped = parts
    total = beside + of_products
    return {
        "bytes for each of 151,936 logits of a token": name,
        "beside the head's products": f"{beside:.1f}",
        "with these": f"{total:.1f}",
        "of fused cross-entropy": f"{total / (fused[0] + fused[1]):.2f} x",
        "shipped, bytes a token": f"{shipped:,.0f}" if shipped else "",
    }


if __name__ == "__main__":
    typer.run(main)
