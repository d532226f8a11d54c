"""A check at every start of an engine: on a probe text, does our head give the model's own log-probabilities?

We read the head's weights from the checkpoint and apply them ourselves. A model that does more than we know of
(normalises its weights, adds a layer, has another head) would silently be dumped wrong, and nothing that uses the same
code would notice. So the model's own log-probabilities, over its whole vocabulary, are compared with those of our head.

Shape legend: R rows (tokens of the probe), V token ids.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.config import TeacherConfig
from pipeline.config.engines import other_engine
from pipeline.covering.covering import Covering
from pipeline.tokenization.byte_tokenizer import ByteTokenizer, SpellingError
from stage1_teacher.engines.base import Engine
from stage1_teacher.reduction.reducer import Reducer
from stage1_teacher.reduction.types import Rows

PROBE = (
    "In 1687, the Principia was published; its 3 laws are taught to this day. def main():\n"
    "    return {'a': 1}\nÜber uns: こんにちは"
)
MAX_ROWS = 48
# Nats, of the worst row. Rounding logits to bfloat16 costs half the variance of a rounding error, 1e-3 at a logit of
# 30; wrong heads have cost 0.3 and more. For a larger model whose own output varies by more between runs (experts
# chosen differently), that variation sets the limit.
LIMIT_NATS = 0.05
# Share of a row's spread. KL alone misses a wrong scale in a row that is almost certain: its KL to an even more certain
# one is negligible. Rounding logits of 30 to bfloat16 gives 0.02; leaving out a soft cap of 30 from logits of 15 gives
# 0.1; a wrong scale gives its deviation from 1.
LIMIT_SPREAD = 0.08
TIMES_CONTROL = 3.0
MAX_AHEAD_FLOAT32, MAX_AHEAD = 1e-3, 0.05  # share of the largest log-probability
MAX_BATCH_EFFECT_FLOAT32 = 1e-3  # share of the largest log-probability; engines that keep prompts apart differ by 1e-6
SMALLEST_SHARE = 1e-9  # probability of a class of tokens; anything below is rounding


def probe_tokens(tokenizer: ByteTokenizer, max_tokens: int) -> list[int]:
    """Return at most `max_tokens` ids of the probe text, or of text tokens if the tokenizer cannot spell it."""
    try:
        return tokenizer.encode(PROBE.encode())[:max_tokens]
    except SpellingError:
        text_tokens = [token for token, spelled in enumerate(tokenizer.token_bytes) if spelled]
        return text_tokens[:: max(1, len(text_tokens) // max_tokens)][:max_tokens]


def check_engine(
    engine: Engine, reducer: Reducer, tokenizer: ByteTokenizer, start: int | None, teacher: TeacherConfig, model: str
) -> None:
    """Raise ValueError if our rows are not the model's own.

    Args:
        teacher: its `max_tokens` and `dtype` are used.
        model: the model's name in the error: its source and its architecture.
    """
    before = [] if start is None else [start]
    tokens = probe_tokens(tokenizer, min(MAX_ROWS, teacher.max_tokens) - 1)
    prompt = [*before, *tokens]
    if start is None:
        tokens = tokens[1:]  # the row before the first token does not exist
    if not tokens:
        raise ValueError(
            f"{model}: {engine.name} cannot be checked: {len(prompt)} tokens of a probe text are too few. "
            f"teacher.max_tokens is {teacher.max_tokens}, and the tokenizer spells "
            f"{sum(map(bool, tokenizer.token_bytes))} tokens of text; both have to be at least 2"
        )
    own_RV, again_RV = engine.own_logprobs(prompt), engine.own_logprobs(prompt)
    [states_RD] = engine.hidden_states([prompt])
    column_V = torch.from_numpy(reducer.vocabulary.column)
    if len(column_V) < own_RV.shape[1] or own_RV.shape[0] != len(prompt):
        raise ValueError(
            f"{model}: {engine.name} returns {tuple(own_RV.shape)} log-probabilities for {len(prompt)} tokens, and the "
            f"checkpoint's head has {len(column_V)} rows"
        )
    _check_causal(engine, prompt, own_RV, _others(prompt, tokenizer), teacher.dtype, model)
    ours_RV = reducer.head.logits(states_RD).log_softmax(-1).cpu()[:, column_V][:, : own_RV.shape[1]]
    control = max_kl(own_RV, again_RV)
    apart = max(max_kl(own_RV, ours_RV), max_kl(*_reduced(states_RD, own_RV, reducer, tokens, tokenizer)))
    limit = max(LIMIT_NATS, TIMES_CONTROL * control)
    share = max_relative_deviation(own_RV, ours_RV)
    max_share = max(LIMIT_SPREAD, TIMES_CONTROL * max_relative_deviation(own_RV, again_RV))
    if not (apart <= limit and share <= max_share):
        raise ValueError(
            f"{model}: the log-probabilities made from its hidden states are not {engine.name}'s own. On a text of "
            f"{len(prompt)} tokens the worst row is {apart:.3g} nats from the model's own (KL; limit {limit:.3g}; two "
            f"runs of it differ by {control:.3g}), and the log-probabilities of a row differ by {share:.3g} of their "
            f"spread (limit {max_share:.3g}). Its targets would be wrong, so nothing is dumped. Try the other local "
            f"engine (teacher.engine: {other_engine(engine.name)}), or let `vllm serve` give its own log-probabilities "
            "(teacher.engine: openai)"
        )
    _check_batch(engine, reducer, _beside(prompt, start is not None), teacher.dtype, model)


def _beside(prompt: Sequence[int], has_start: bool) -> list[list[int]]:
    """Return four prompts of three lengths, including the probe; a short one first: no prompt precedes the first."""
    before, tokens = list(prompt[:has_start]), list(prompt[has_start:])
    half, quarter = len(tokens) // 2, len(tokens) // 4
    return [[*before, *part] for part in (tokens[half:], tokens, tokens[::-1], tokens[quarter:])]


def _check_batch(engine: Engine, reducer: Reducer, prompts: Sequence[Sequence[int]], dtype: str, model: str) -> None:
    """Raise ValueError if a prompt's log-probabilities depend on the other prompts in its batch.

    Some models that vLLM runs through transformers' code silently see the end of the previous prompt in their first
    rows. The first rows are the most wrong, so the mean over rows counts; rounding and differently chosen experts
    change less than the limits for a row.
    """
    column_V = torch.from_numpy(reducer.vocabulary.column)
    batch = engine.hidden_states(prompts)
    for prompt, states_TD in zip(prompts, batch, strict=True):
        own_TV = engine.own_logprobs(prompt)
        ours_TV = reducer.head.logits(states_TD).log_softmax(-1).cpu()[:, column_V][:, : own_TV.shape[1]]
        apart, share = float(row_kl(own_TV, ours_TV).mean()), float(relative_deviations(own_TV, ours_TV).mean())
        finite_TV = torch.isfinite(own_TV) & torch.isfinite(ours_TV)
        worst, largest = (float(values_TV[finite_TV].abs().max()) for values_TV in (own_TV - ours_TV, own_TV))
        exact = dtype != "float32" or worst <= MAX_BATCH_EFFECT_FLOAT32 * largest
        if not (apart <= LIMIT_NATS and share <= LIMIT_SPREAD and exact):
            raise ValueError(
                f"{model}: {engine.name}'s output for a prompt changes with the other prompts in its batch. Of "
                f"{len(prompts)} short prompts in one batch, one of {len(prompt)} tokens is on average {apart:.3g} "
                f"nats from the model's own output for it alone (KL; limit {LIMIT_NATS}), a row's log-probabilities "
                f"differ by {share:.3g} of their spread (limit {LIMIT_SPREAD}), and the worst of them by {worst:.3g} "
                f"nats of {largest:.3g} (limit in float32: {MAX_BATCH_EFFECT_FLOAT32:g} of that). Every dump is made "
                "in batches, so its targets would be wrong; a server of the same engine would answer the same. "
                f"Use the other local engine (teacher.engine: {other_engine(engine.name)})"
            )


def _others(prompt: Sequence[int], tokenizer: ByteTokenizer) -> list[int]:
    """Return another text token for each token.

    The same tokens in another order would hardly differ for a model that looks ahead and is insensitive to positions.
    """
    text_tokens = [token for token, spelled in enumerate(tokenizer.token_bytes) if spelled]
    index_of = {token: i for i, token in enumerate(text_tokens)}
    half = len(text_tokens) // 2
    return [text_tokens[(index_of.get(token, i) + half) % len(text_tokens)] for i, token in enumerate(prompt)]


def _check_causal(
    engine: Engine, prompt: Sequence[int], own_RV: Tensor, others: Sequence[int], dtype: str, model: str
) -> None:
    """Raise ValueError for a model that looks ahead: its first rows change with the tokens that follow.

    Both prompts have the same length, so that little is rounded differently (see `pipeline.runtime.causality`).
    """
    kept = max(1, len(prompt) // 4)
    before_RV, after_RV = own_RV[:kept], engine.own_logprobs([*prompt[:kept], *others[kept:]])[:kept]
    finite_RV = torch.isfinite(before_RV) & torch.isfinite(after_RV)
    apart, largest = (float(values_RV[finite_RV].abs().max()) for values_RV in (before_RV - after_RV, before_RV))
    if apart > (MAX_AHEAD_FLOAT32 if dtype == "float32" else MAX_AHEAD) * largest:
        raise ValueError(
            f"{model} looks ahead: its log-probabilities after {kept} tokens (up to {largest:.3g}) change by up to "
            f"{apart:.3g} nats with the tokens that follow. It is not a causal language model; choose one that is, or, "
            "if its config has is_decoder, set that to true"
        )


def max_kl(own_RV: Tensor, other_RV: Tensor) -> float:
    """Return the largest KL(own || other) of a row, nats."""
    return float(row_kl(own_RV, other_RV).max())


def row_kl(own_RV: Tensor, other_RV: Tensor) -> Tensor:
    """Return KL(own || other) of each row, nats; infinite where the other has 0, or nan, for an id that has mass."""
    own_RV, other_RV = own_RV.double(), other_RV.double()
    mass_RV = own_RV.exp()
    nats_R = torch.where(mass_RV > 0, mass_RV * (own_RV - other_RV), 0.0).sum(-1)
    return nats_R.nan_to_num(nan=torch.inf, posinf=torch.inf)


def max_relative_deviation(own_RV: Tensor, other_RV: Tensor) -> float:
    """Return the largest of `relative_deviations`."""
    return float(relative_deviations(own_RV, other_RV).max())


def relative_deviations(own_RV: Tensor, other_RV: Tensor) -> Tensor:
    """Return the standard deviation of other - own in each row, as a share of that of the own log-probabilities.

    Over the ids of a row with nonzero own probability; infinite where the other has 0 or nan.
    """
    shares = []
    for own_V, other_V in zip(own_RV.double(), other_RV.double(), strict=True):
        finite_V = torch.isfinite(own_V)
        share = (other_V - own_V)[finite_V].std() / own_V[finite_V].std().clamp(min=SMALLEST_SHARE)
        shares.append(share.nan_to_num(nan=torch.inf, posinf=torch.inf))
    return torch.stack(shares)


def _reduced(
    states_RD: Tensor, own_RV: Tensor, reducer: Reducer, tokens: Sequence[int], tokenizer: ByteTokenizer
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of the next token, of END and of the rest in each row but the last.

    The first tensor is the model's own, the second from the dump's reduction. Their KL cannot exceed that of the full
    rows.
    """
    spelled = b"".join(tokenizer.token_bytes[token] or b"" for token in tokens)
    covering = Covering(reducer.vocabulary, tokens, spelled)
    first = len(states_RD) - len(covering.offsets)
    [rows] = reducer.reduce([Rows(covering, covering.offsets, states_RD[first:])])
    probs_RV = own_RV[first:-1].double().exp()
    ends = [end for end in reducer.vocabulary.end_ids if end < probs_RV.shape[1]]
    own = torch.stack([probs_RV[torch.arange(len(tokens)), torch.tensor(tokens)], probs_RV[:, ends].sum(-1)])
    ours = torch.tensor([[row.token for row in rows[:-1]], [row.end for row in rows[:-1]]], dtype=torch.float64)
    own_R3, ours_R3 = (
        torch.cat([two, 1 - two.sum(0, keepdim=True)]).clamp(min=SMALLEST_SHARE).log().T for two in (own, ours)
    )
    return own_R3, ours_R3
