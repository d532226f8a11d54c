"""Is what we make of an engine's states what its model says itself: asked at every start of an engine, on a probe text.

The head's weights are read from the checkpoint by us, and applied by us. A model that does more than we know of (it
norms its weights, adds a layer, has another head) would be dumped wrong without a word, and nothing that applies the
same code would notice. So the model's own log-probabilities are compared, of its whole vocabulary, with those that our
head gives.

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

PROBE = "In 1687, the Principia was published; its 3 laws are taught to this day. def main():\n    return {'a': 1}\nÜber uns: こんにちは"
MAX_ROWS = 48
# Nats, of the worst row. Rounding logits to bfloat16 costs half the variance of a rounding error, 1e-3 at a logit of
# 30; heads that were wrong have cost 0.3 and more. A larger model that differs from itself by more (experts chosen
# otherwise) is held to that.
LIMIT_NATS = 0.05
# Of a row's spread: a row that is as good as sure has no divergence to speak of from one that is surer still by a
# factor. Rounding logits of 30 to bfloat16 leaves 0.02; a soft cap of 30 that is left out of logits of 15 makes 0.1, a
# wrong scale its own deviation from 1.
LIMIT_SPREAD = 0.08
TIMES_CONTROL = 3.0
MAX_AHEAD_FLOAT32, MAX_AHEAD = 1e-3, 0.05  # of the largest log-probability
MAX_BATCH_EFFECT_FLOAT32 = 1e-3  # of the largest log-probability; engines that kept prompts apart differ by 1e-6
SMALLEST_SHARE = 1e-9  # of a class of tokens; what is below is rounding


def probe_tokens(tokenizer: ByteTokenizer, most: int) -> list[int]:
    """At most so many ids of the probe text, or of the tokens that spell something where the tokenizer cannot spell
    that.
    """
    try:
        return tokenizer.encode(PROBE.encode())[:most]
    except SpellingError:
        spelling = [token for token, spelled in enumerate(tokenizer.token_bytes) if spelled]
        return spelling[:: max(1, len(spelling) // most)][:most]


def check_engine(
    engine: Engine, reducer: Reducer, tokenizer: ByteTokenizer, start: int | None, teacher: TeacherConfig, model: str
) -> None:
    """Raise ValueError where our rows are not the model's own.

    Args:
        teacher: its `max_tokens` and `dtype` are read.
        model: what the error calls it: its source and its architecture.
    """
    before = [] if start is None else [start]
    tokens = probe_tokens(tokenizer, min(MAX_ROWS, teacher.max_tokens) - 1)
    prompt = [*before, *tokens]
    if start is None:
        tokens = tokens[1:]  # the row before the first token does not exist
    own_RV, again_RV = engine.own_logprobs(prompt), engine.own_logprobs(prompt)
    [states_RD] = engine.hidden_states([prompt])
    column_V = torch.from_numpy(reducer.vocabulary.column)
    if len(column_V) < own_RV.shape[1] or own_RV.shape[0] != len(prompt):
        raise ValueError(
            f"{model}: {engine.name} answers {tuple(own_RV.shape)} log-probabilities for {len(prompt)} tokens, and the checkpoint's head has "
            f"{len(column_V)} rows"
        )
    _check_causal(engine, prompt, own_RV, _others(prompt, tokenizer), teacher.dtype, model)
    ours_RV = reducer.head.logits(states_RD).log_softmax(-1).cpu()[:, column_V][:, : own_RV.shape[1]]
    control = max_kl(own_RV, again_RV)
    apart = max(max_kl(own_RV, ours_RV), max_kl(*_reduced(states_RD, own_RV, reducer, tokens, tokenizer)))
    limit = max(LIMIT_NATS, TIMES_CONTROL * control)
    share, most = (
        max_relative_deviation(own_RV, ours_RV),
        max(LIMIT_SPREAD, TIMES_CONTROL * max_relative_deviation(own_RV, again_RV)),
    )
    if not (apart <= limit and share <= most):
        raise ValueError(
            f"{model}: what is made of its hidden states is not what {engine.name} itself says. On a text of {len(prompt)} tokens the "
            f"worst row is {apart:.3g} nats from the model's own (KL; limit {limit:.3g}; asked twice it differs by {control:.3g}), "
            f"and the log-probabilities of a row are apart by {share:.3g} of their spread (limit {most:.3g}). Its "
            "targets would be wrong, so nothing is dumped. "
            f"Try the other local engine (teacher.engine: {other_engine(engine.name)}), or let "
            "`vllm serve` say its own log-probabilities (teacher.engine: openai)"
        )
    _check_batch(engine, reducer, _beside(prompt, start is not None), teacher.dtype, model)


def _beside(prompt: Sequence[int], has_start: bool) -> list[list[int]]:
    """Four prompts of three lengths with the probe's own among them, the shortest first: nothing stands before the
    first of a batch.
    """
    before, tokens = list(prompt[:has_start]), list(prompt[has_start:])
    half, quarter = len(tokens) // 2, len(tokens) // 4
    return [[*before, *part] for part in (tokens[half:], tokens, tokens[::-1], tokens[quarter:])]


def _check_batch(engine: Engine, reducer: Reducer, prompts: Sequence[Sequence[int]], dtype: str, model: str) -> None:
    """Raise ValueError where what is made of a prompt's states depends on the prompts beside it.

    Some that vLLM runs by transformers' code see the end of the prompt before them in their first rows, and say nothing
    of it. The first rows are off most, so rows count by their mean; what rounding and experts chosen otherwise change
    is less than the limits of a row.
    """
    column_V = torch.from_numpy(reducer.vocabulary.column)
    batch = engine.hidden_states(prompts)
    for prompt, states_TD in zip(prompts, batch, strict=True):
        own_TV = engine.own_logprobs(prompt)
        ours_TV = reducer.head.logits(states_TD).log_softmax(-1).cpu()[:, column_V][:, : own_TV.shape[1]]
        apart, share = float(row_kl(own_TV, ours_TV).mean()), float(relative_deviations(own_TV, ours_TV).mean())
        said_TV = torch.isfinite(own_TV) & torch.isfinite(ours_TV)
        worst, largest = (float(found[said_TV].abs().max()) for found in (own_TV - ours_TV, own_TV))
        exact = dtype != "float32" or worst <= MAX_BATCH_EFFECT_FLOAT32 * largest
        if not (apart <= LIMIT_NATS and share <= LIMIT_SPREAD and exact):
            raise ValueError(
                f"{model}: what {engine.name} makes of a prompt changes with the prompts that run beside it. Of {len(prompts)} short prompts "
                f"in one batch, one of {len(prompt)} tokens is on average {apart:.3g} nats from the model's own, asked alone (KL; limit "
                f"{LIMIT_NATS}), a row's log-probabilities are apart by {share:.3g} of their spread (limit {LIMIT_SPREAD}), and the worst of "
                f"them by {worst:.3g} nats of {largest:.3g} (limit in float32: {MAX_BATCH_EFFECT_FLOAT32:g} of that). Every dump is made in "
                "batches, so its targets would be wrong; a server of the same engine would answer the same. "
                f"Use the other local engine (teacher.engine: {other_engine(engine.name)})"
            )


def _others(prompt: Sequence[int], tokenizer: ByteTokenizer) -> list[int]:
    """For each token another one that spells something: the same ones in another order are as good as the same to a
    model that looks ahead and minds positions little.
    """
    spelling = [token for token, spelled in enumerate(tokenizer.token_bytes) if spelled]
    place = {token: i for i, token in enumerate(spelling)}
    return [spelling[(place.get(token, i) + len(spelling) // 2) % len(spelling)] for i, token in enumerate(prompt)]


def _check_causal(
    engine: Engine, prompt: Sequence[int], own_RV: Tensor, others: Sequence[int], dtype: str, model: str
) -> None:
    """Raise ValueError for a model that looks ahead: its first rows change with the tokens that follow.

    Both prompts are of one length, so that little is rounded otherwise (see `pipeline.runtime.causality`).
    """
    kept = max(1, len(prompt) // 4)
    before_RV, after_RV = own_RV[:kept], engine.own_logprobs([*prompt[:kept], *others[kept:]])[:kept]
    said_RV = torch.isfinite(before_RV) & torch.isfinite(after_RV)
    apart, largest = (float(found[said_RV].abs().max()) for found in (before_RV - after_RV, before_RV))
    if apart > (MAX_AHEAD_FLOAT32 if dtype == "float32" else MAX_AHEAD) * largest:
        raise ValueError(
            f"{model} looks ahead: what it says after {kept} tokens changes by up to {apart:.3g} nats with those that follow (its "
            f"log-probabilities: up to {largest:.3g}). It is no causal language model; choose one that is, or where its config has "
            "is_decoder, set that to true"
        )


def max_kl(own_RV: Tensor, other_RV: Tensor) -> float:
    """The largest KL(own || other) of a row, nats."""
    return float(row_kl(own_RV, other_RV).max())


def row_kl(own_RV: Tensor, other_RV: Tensor) -> Tensor:
    """KL(own || other) of each row, nats; infinite where the other has 0, or no number, for what has mass."""
    own_RV, other_RV = own_RV.double(), other_RV.double()
    mass_RV = own_RV.exp()
    nats_R = torch.where(mass_RV > 0, mass_RV * (own_RV - other_RV), 0.0).sum(-1)
    return nats_R.nan_to_num(nan=torch.inf, posinf=torch.inf)


def max_relative_deviation(own_RV: Tensor, other_RV: Tensor) -> float:
    """The largest of `relative_deviations`."""
    return float(relative_deviations(own_RV, other_RV).max())


def relative_deviations(own_RV: Tensor, other_RV: Tensor) -> Tensor:
    """Over all ids of a row that have any probability: the deviation of what is between the two, as a share of that of
    the own log-probabilities. Infinite where the other has 0, or no number.
    """
    shares = []
    for own_V, other_V in zip(own_RV.double(), other_RV.double(), strict=True):
        said_V = torch.isfinite(own_V)
        share = (other_V - own_V)[said_V].std() / own_V[said_V].std().clamp(min=SMALLEST_SHARE)
        shares.append(share.nan_to_num(nan=torch.inf, posinf=torch.inf))
    return torch.stack(shares)


def _reduced(
    states_RD: Tensor, own_RV: Tensor, reducer: Reducer, tokens: Sequence[int], tokenizer: ByteTokenizer
) -> tuple[Tensor, Tensor]:
    """Log-shares of the next token, of END and of all else in each row but the last: the model's own, and as the dump's
    reduction has them.

    Sums of classes cannot lie further apart than the rows do.
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
