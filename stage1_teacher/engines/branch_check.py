"""Are an engine's branches what their paths are by themselves: asked at the start of an engine that is to give some.

Branches are computed otherwise than prompts: packed side by side, on keys and values or blocks that are shared. A model
that keeps more of a path than that (a convolution, a state, a window that only its mask knows) gives wrong rows without
a word, and no document has its own answer for them. So some branches of a probe text are held against the model's own
log-probabilities of their whole paths.

Shape legend: R rows, D hidden size, V token ids.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipeline.config import TeacherConfig
from pipeline.config.engines import other_engine
from pipeline.runtime import log
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage1_teacher.engines.base import BranchToken, Engine, close_failed, free_memory
from stage1_teacher.engines.self_check import MAX_ROWS, TIMES_CONTROL, probe_tokens, row_kl
from stage1_teacher.reduction.reducer import Reducer

SHORT_TOKENS = 12  # of the second prompt, which lies beside the first
BEYOND = 16  # tokens that the first prompt is longer than the shortest window of the model's layers, and than a block
# Nats, mean over the rows: float32 differs from itself by 1e-10, SmolLM2-135M in bfloat16 by 8e-3, so unlikely are
# these paths.
LIMIT_FLOAT32_NATS, LIMIT_NATS = 1e-5, 0.05
_WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size")


def branching_fault(
    engine: Engine, reducer: Reducer, tokenizer: ByteTokenizer, start: int | None, teacher: TeacherConfig, config: Any
) -> str | None:
    """Why the engine's branches are not to be used; None where they are what the model says of their paths.

    Args:
        teacher: its `max_tokens` and `dtype` are read.
        config: the model's; its windows are read.
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
    try:
        branches = engine.branches([first, second])
    except ValueError as error:
        return f"{engine.name} does not branch with it: {error}"
    states_RD = torch.cat([branches.extend(tokens), branches.extend(deeper)])

    def ask_own() -> Tensor:
        return torch.cat([engine.own_logprobs(path, len(path) - 1) for path in paths])

    own_RV = ask_own()
    on_branches = _mean_nats(own_RV, states_RD, reducer)
    on_prompts = max(
        _mean_nats(engine.own_logprobs(prompt, max(0, len(prompt) - MAX_ROWS)), hidden_TD[-MAX_ROWS:], reducer)
        for prompt, hidden_TD in zip((first, second), branches.hidden, strict=True)
    )
    apart, limit = max(on_branches, on_prompts), LIMIT_FLOAT32_NATS if teacher.dtype == "float32" else LIMIT_NATS
    if (
        apart > limit
    ):  # a model that differs from itself by more, asked again or in a batch (experts chosen otherwise), is held to that
        batched_RD = torch.stack([states_TD[-1] for states_TD in engine.hidden_states(paths)])
        control = max(float(row_kl(own_RV, ask_own()).mean()), _mean_nats(own_RV, batched_RD, reducer))
        limit = max(limit, TIMES_CONTROL * control)
    if apart <= limit:
        return None
    return (
        f"{engine.name} computes branches otherwise than the model does their paths: on a probe of {len(first)} and {len(second)} tokens rows are "
        f"on average {on_branches:.3g} nats (branches) and {on_prompts:.3g} nats (prompts) from the model's own (KL; limit {limit:.3g})"
    )


def with_branches(
    open_it: Callable[[bool], Engine], fault_of: Callable[[Engine], str | None], required: bool, model: str
) -> Engine:
    """An engine that is to branch, checked. One that fails where it branches, which may leave it broken, is opened anew
    without.

    Args:
        open_it: opens an engine, so that it can branch or not.
        required: there is no use for it without branches; else only the audit wants them.
        model: what the error calls it: its source and its architecture.
    Raises:
        ValueError: branches are required, and cannot be had.
    """
    engine, failed = open_it(True), False
    try:
        engine.cannot_branch = fault_of(engine)
    except Exception as error:
        failed = True
        engine.cannot_branch = f"{engine.name} fails where it branches: {type(error).__name__}: {error}"
    except BaseException:
        engine.close()
        raise
    fault = engine.cannot_branch
    if fault is None:
        return engine
    if required:
        engine.close()
        raise ValueError(
            f"{model}: {fault}. Dump its canonical rows alone (dump.covering.beam_width: 0), or try the other local engine "
            f"(teacher.engine: {other_engine(engine.name)})"
        )
    log.warning(f"{model}: it is audited without branches: {fault}")
    if failed:
        close_failed(engine)
        del engine
        free_memory()
        engine = open_it(False)
        engine.cannot_branch = fault
    return engine


def _prompts(
    tokenizer: ByteTokenizer, start: int | None, max_tokens: int, config: Any, shared_tokens: int
) -> tuple[list[int], list[int]]:
    """A prompt that is longer than the model's shortest window and than what branches share at a time, where windows of
    the dump are; and a short one.
    """
    text = config.get_text_config()
    windows = [found for name in _WINDOWS if isinstance(found := getattr(text, name, None), int) and found > 0]
    met = [size for size in (min(windows, default=0), shared_tokens) if size < max_tokens]
    length = min(max_tokens, max([MAX_ROWS, *(size + BEYOND for size in met)]))
    before = [] if start is None else [start]
    tokens = probe_tokens(tokenizer, MAX_ROWS)
    spelled = [*before, *(tokens * (length // len(tokens) + 1))][:length]
    return spelled, [*before, *tokens[::-1]][: min(SHORT_TOKENS, length)]


def _mean_nats(own_RV: Tensor, states_RD: Tensor, reducer: Reducer) -> float:
    """KL(own || ours), mean over rows; infinite where it is no number."""
    column_V = torch.from_numpy(reducer.vocabulary.column)
    ours_RV = reducer.head.logits(states_RD).log_softmax(-1).cpu()[:, column_V][:, : own_RV.shape[1]]
    return float(row_kl(own_RV, ours_RV).mean())
