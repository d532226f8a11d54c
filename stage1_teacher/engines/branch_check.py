"""A check at an engine's start, if it will compute branches: does a branch give what its whole path gives by itself?

Branches are computed differently from prompts: packed side by side, on shared keys and values or blocks. A model that
keeps more of a path than that (a convolution, a state, a window known only to its mask) silently gives wrong rows, and
no document contains the model's own answer for them. So some branches of a probe text are compared with the model's own
log-probabilities of their whole paths.

Shape legend: R rows, V token ids.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.config import TeacherConfig
from pipeline.config.engines import other_engine
from pipeline.covering.covering import ReducedRow
from pipeline.runtime import log
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage1_teacher.engines.base import BranchToken, Engine, close_failed, free_memory
from stage1_teacher.engines.self_check import (
    MAX_ROWS,
    TIMES_CONTROL,
    compare_rows,
    probe_rows,
    probe_tokens,
    row_kl,
)
from stage1_teacher.reduction.types import RowsAlong

SHORT_TOKENS = 12  # of the second prompt, which is computed beside the first
BEYOND = 16  # tokens by which the first prompt exceeds the shortest window of the model's layers, and a block
# Nats, mean over the rows. Two runs in float32 differ by 1e-10; SmolLM2-135M in bfloat16 by 8e-3, because these paths
# are so unlikely.
LIMIT_FLOAT32_NATS, LIMIT_NATS = 1e-5, 0.05
_WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size")


def branching_fault(
    engine: Engine, tokenizer: ByteTokenizer, start: int | None, teacher: TeacherConfig, config: Any
) -> str | None:
    """Return why the engine's branches must not be used; None if they equal the model's own output for their paths.

    Args:
        teacher: its `max_tokens` and `dtype` are used.
        config: the model's; its windows are used.
    """
    first, second = _prompts(tokenizer, start, teacher.max_tokens, config, engine.shared_tokens)
    ends, half = [len(first), len(second)], len(second) // 2
    tokens = [
        BranchToken(0, ends[0] - 2, first[1], None),
        BranchToken(1, half, second[-1], None),
        BranchToken(0, ends[0] - 1, second[half], None),
        BranchToken(1, ends[1] - 1, first[2], None),
    ]
    deeper = [BranchToken(1, half, second[1], 1), BranchToken(0, ends[0] - 2, second[-1], 0)]
    paths = [[*(first, second)[token.prompt][: token.leaves], token.token] for token in tokens]
    paths += [[*paths[1], second[1]], [*paths[0], second[-1]]]
    prompts = (first, second)
    of_prompts = [
        probe_rows(prompt, tokenizer, engine.vocabulary, max(0, len(prompt) - MAX_ROWS)) for prompt in prompts
    ]
    of_paths = [probe_rows(path, tokenizer, engine.vocabulary, len(path) - 1) for path in paths]
    try:
        branches = engine.branches(prompts, [[request] for request in of_prompts])
    except ValueError as error:
        return f"{engine.name} does not branch with it: {error}"
    if len(branches.rows) < len(prompts):
        return f"{engine.name} cannot hold two prompts of {len(first)} and {len(second)} tokens"
    rows = branches.extend(tokens, of_paths[: len(tokens)]) + branches.extend(deeper, of_paths[len(tokens) :])

    def mean_nats(own: Sequence[Tensor], found: Sequence[Sequence[ReducedRow]], of: Sequence[RowsAlong]) -> float:
        parts = zip(own, found, of, strict=True)
        return float(torch.cat([compare_rows(*part, engine.vocabulary).nats_R for part in parts]).mean())

    def compute_own() -> list[Tensor]:
        return [engine.own_logprobs(path, len(path) - 1) for path in paths]

    own = compute_own()
    on_branches = mean_nats(own, [[row] for row in rows], of_paths)
    on_prompts = max(
        mean_nats([engine.own_logprobs(prompt, request.first)], of_prompt, [request])
        for prompt, of_prompt, request in zip(prompts, branches.rows, of_prompts, strict=True)
    )
    apart, limit = max(on_branches, on_prompts), LIMIT_FLOAT32_NATS if teacher.dtype == "float32" else LIMIT_NATS
    if apart > limit:
        # The model's own output may vary by more, between runs or in a batch (experts chosen differently).
        batched = engine.reduced_rows(paths, [[request] for request in of_paths])
        again = float(row_kl(torch.cat(own), torch.cat(compute_own())).mean())
        limit = max(limit, TIMES_CONTROL * max(again, mean_nats(own, [of_path for [of_path] in batched], of_paths)))
    if apart <= limit:
        return None
    return (
        f"{engine.name} computes branches differently from how the model computes their paths: on a probe of "
        f"{len(first)} and {len(second)} tokens, rows differ on average by {on_branches:.3g} nats (branches) and "
        f"{on_prompts:.3g} nats (prompts) from the model's own (KL; limit {limit:.3g})"
    )


def with_branches(
    open_it: Callable[[], Engine], fault_of: Callable[[Engine], str | None], required: bool, model: str
) -> Engine:
    """Open an engine and check its branches.

    If branching raises an exception, which may leave the engine broken, it is opened again, not to branch.

    Args:
        open_it: opens an engine.
        required: the engine is useless without branches; otherwise only the audit uses them.
        model: the model's name in the error: its source and its architecture.
    Raises:
        ValueError: branches are required, and the engine cannot give them.
    """
    engine, failed = open_it(), False
    try:
        engine.cannot_branch = fault_of(engine)
    except Exception as error:
        failed = True
        engine.cannot_branch = f"{engine.name} fails when it branches: {type(error).__name__}: {error}"
    except BaseException:
        engine.close()
        raise
    fault = engine.cannot_branch
    if fault is None:
        return engine
    if required:
        engine.close()
        raise ValueError(
            f"{model}: {fault}. Dump its canonical rows alone (dump.covering.beam_width: 0), or try the other local "
            f"engine (teacher.engine: {other_engine(engine.name)})"
        )
    log.warning(f"{model}: it is audited without branches: {fault}")
    if failed:
        close_failed(engine)
        del engine
        free_memory()
        engine = open_it()
        engine.cannot_branch = fault
    return engine


def _prompts(
    tokenizer: ByteTokenizer, start: int | None, max_tokens: int, config: Any, shared_tokens: int
) -> tuple[list[int], list[int]]:
    """Return a long and a short prompt.

    The long one exceeds the model's shortest window and the unit in which branches share tokens, as far as the dump's
    windows do.
    """
    text = config.get_text_config()
    windows = [size for name in _WINDOWS if isinstance(size := getattr(text, name, None), int) and size > 0]
    to_exceed = [size for size in (min(windows, default=0), shared_tokens) if size < max_tokens]
    length = min(max_tokens, max([MAX_ROWS, *(size + BEYOND for size in to_exceed)]))
    before = [] if start is None else [start]
    tokens = probe_tokens(tokenizer, MAX_ROWS)
    spelled = [*before, *(tokens * (length // len(tokens) + 1))][:length]
    return spelled, [*before, *tokens[::-1]][: min(SHORT_TOKENS, length)]
