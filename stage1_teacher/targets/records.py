"""Sparse targets, and records, of windows from an engine's output."""

from collections.abc import Sequence

from pipeline.config import DumpConfig
from pipeline.covering.targets import Targets
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from schemas import levels
from schemas.record import Record
from stage1_teacher.inputs.encoded_windows import EncodedWindow, token_lengths
from stage1_teacher.reduction.sparse_targets import SparseTargets, Sparsity, sparse_targets
from stage1_teacher.targets.assembly import assemble
from stage1_teacher.targets.engine_output import EngineOutput, SparseOutput, span_requests, sparsity_of
from stage1_teacher.targets.teacher import Teacher


def sparse_spans(
    windows: Sequence[EncodedWindow], output: EngineOutput | SparseOutput, teacher: Teacher, dump: DumpConfig
) -> list[list[SparseTargets]]:
    """Return the sparse targets of each window's spans, from the engine's output."""
    if isinstance(output, SparseOutput):
        sparse = iter(output.spans)
    else:
        requests = [request for of_window in span_requests(windows) for request in of_window]
        targets, sparsity = teacher.targets(windows, output), sparsity_of(dump)
        of_spans = zip(targets, requests, output.canonical_rows(), strict=True)
        sparse = iter([sparse_targets(of, request, sparsity, rows) for of, request, rows in of_spans])
    return [[next(sparse) for _ in window.spans] for window in windows]


def make_records(
    windows: Sequence[EncodedWindow], output: EngineOutput | SparseOutput, teacher: Teacher, dump: DumpConfig
) -> list[Record]:
    """Make the windows' records from the engine's output."""
    lengths, exact = token_lengths(teacher.tokenizer), dump.coding == levels.EXACT
    spans = sparse_spans(windows, output, teacher, dump)
    return [assemble(window, of_window, lengths, exact) for window, of_window in zip(windows, spans, strict=True)]


def make_record(
    window: EncodedWindow, targets: Sequence[Targets], tokenizer: ByteTokenizer, top_k: int, min_prob: float
) -> Record:
    """Make a window's record from the dense targets of its spans, which include the tokenizer's prefix."""
    [requests] = span_requests([window])
    sparse = [
        sparse_targets(of_span, request, Sparsity(top_k, min_prob))
        for of_span, request in zip(targets, requests, strict=True)
    ]
    return assemble(window, sparse, token_lengths(tokenizer))
