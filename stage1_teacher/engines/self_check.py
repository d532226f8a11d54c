"""A check at every start of an engine: on a probe text, do its reduced rows sum the model's own log-probabilities?

A dump's rows are computed in batches and chunks and summed by fast code, the model's own log-probabilities for one
prompt alone and over the whole vocabulary. An engine whose prompts see each other, that hands over other rows than
those requested, or whose sums are wrong would silently be dumped wrong, and nothing that uses the same code would
notice. So the reduced rows are compared with the model's own, summed by the slow twin in float64.

Shape legend: R rows (tokens of the probe), V token ids, S classes that a row is summed into.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.config import TeacherConfig
from pipeline.config.engines import other_engine
from pipeline.covering.covering import ReducedRow, reduce_probs
from pipeline.covering.vocabulary import Vocabulary
from pipeline.tokenization.byte_tokenizer import ByteTokenizer, SpellingError
from stage1_teacher.engines.base import Engine
from stage1_teacher.reduction.types import NOT_FINITE, RowsAlong

PROBE = (
    "In 1687, the Principia was published; its 3 laws are taught to this day. def main():\n"
    "    return {'a': 1}\nÜber uns: こんにちは"
)
PROBE_AHEAD = b" and so on"  # text along which the last rows are summed
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
LEAST_COMPARED = -60.0  # log-probability of a class; below it the reduction's own floor comes near


def probe_tokens(tokenizer: ByteTokenizer, max_tokens: int) -> list[int]:
    """Return at most `max_tokens` ids of the probe text, or of text tokens if the tokenizer cannot spell it."""
    try:
        return tokenizer.encode(PROBE.encode())[:max_tokens]
    except SpellingError:
        text_tokens = [token for token, spelled in enumerate(tokenizer.token_bytes) if spelled]
        return text_tokens[:: max(1, len(text_tokens) // max_tokens)][:max_tokens]


class Comparison(NamedTuple):
    """Distances of an engine's reduced rows from the model's own.

    Attributes:
        nats_R: KL(own || reduced) of each row, over its classes.
        shares_R: `relative_deviations` of the classes' log-probabilities.
        worst, largest: the largest difference of a class' log-probability, and the largest log-probability (nats).
    """

    nats_R: Tensor
    shares_R: Tensor
    worst: float
    largest: float


def check_engine(
    engine: Engine, tokenizer: ByteTokenizer, start: int | None, teacher: TeacherConfig, model: str
) -> None:
    """Raise ValueError if the engine's reduced rows are not the model's own, or not numbers.

    Args:
        teacher: its `max_tokens` and `dtype` are used.
        model: the model's name in the error: its source and its architecture.
    """
    before = [] if start is None else [start]
    prompt = [*before, *probe_tokens(tokenizer, min(MAX_ROWS, teacher.max_tokens) - 1)]
    if len(prompt) < 2:
        raise ValueError(
            f"{model}: {engine.name} cannot be checked: {len(prompt)} tokens of a probe text are too few. "
            f"teacher.max_tokens is {teacher.max_tokens}, and the tokenizer spells "
            f"{sum(map(bool, tokenizer.token_bytes))} tokens of text; both have to be at least 2"
        )
    own_RV, again_RV = engine.own_logprobs(prompt), engine.own_logprobs(prompt)
    width = len(engine.vocabulary.order)
    if own_RV.shape != (len(prompt), width):
        raise ValueError(
            f"{model}: {engine.name} returns {tuple(own_RV.shape)} log-probabilities for {len(prompt)} tokens and "
            f"{width} token ids"
        )
    if own_RV.isnan().any():
        raise ValueError(f"{model}: {NOT_FINITE}")
    _check_causal(engine, prompt, own_RV, _others(prompt, tokenizer), teacher.dtype, model)
    request = probe_rows(prompt, tokenizer, engine.vocabulary)
    [[rows]] = engine.reduced_rows([prompt], [[request]])
    found = compare_rows(own_RV, rows, request, engine.vocabulary)
    apart, control = float(found.nats_R.max()), max_kl(own_RV, again_RV)
    limit = max(LIMIT_NATS, TIMES_CONTROL * control)
    share = float(found.shares_R.max())
    max_share = max(LIMIT_SPREAD, TIMES_CONTROL * max_relative_deviation(own_RV, again_RV))
    if not (apart <= limit and share <= max_share):
        raise ValueError(
            f"{model}: the rows that {engine.name} sums are not its own log-probabilities. On a text of {len(prompt)} "
            f"tokens the worst row is {apart:.3g} nats from the model's own (KL; limit {limit:.3g}; two runs of it "
            f"differ by {control:.3g}), and the log-probabilities of a row differ by {share:.3g} of their spread "
            f"(limit {max_share:.3g}). Its targets would be wrong, so nothing is dumped. Try the other local engine "
            f"(teacher.engine: {other_engine(engine.name)}), or let `vllm serve` give its own log-probabilities "
            "(teacher.engine: openai)"
        )
    _check_batch(engine, _beside(prompt, start is not None), tokenizer, teacher.dtype, model)


def probe_rows(
    prompt: Sequence[int], tokenizer: ByteTokenizer, vocabulary: Vocabulary, first: int = 0, ahead: bytes = PROBE_AHEAD
) -> RowsAlong:
    """Return a request for the rows after all tokens of a prompt from `first` on.

    Each is summed along the bytes of the tokens that follow it, and the last ones along `ahead` too.
    """
    following = prompt[first + 1 :]
    spelled = [tokenizer.token_bytes[token] or b"" for token in following]
    known = [int(vocabulary.column[token]) if spells else -1 for token, spells in zip(following, spelled, strict=True)]
    offsets = np.cumsum([0, *map(len, spelled)])
    return RowsAlong(first, b"".join(spelled) + ahead, offsets.astype(np.int64), np.array([*known, -1], dtype=np.int64))


def own_rows(own_RV: Tensor, request: RowsAlong, vocabulary: Vocabulary) -> list[ReducedRow]:
    """Return the model's own rows, summed by the slow twin in float64."""
    probs_RV = own_RV.double().exp().numpy()
    probs_RC = np.pad(probs_RV[:, vocabulary.order], ((0, 0), (0, 1)))
    return reduce_probs(vocabulary, request.intervals(vocabulary.trie), probs_RC)


def compare_rows(own_RV: Tensor, rows: Sequence[ReducedRow], request: RowsAlong, vocabulary: Vocabulary) -> Comparison:
    """Compare reduced rows with the model's own log-probabilities, over the classes that a row is summed into.

    The classes overlap: the bytes that may follow, what follows those that the text has, the next token, END, and all
    that is none of the first; so KL is the largest of those over classes that do not.
    """
    nats, shares, worst, largest = [], [], [0.0], [0.0]
    size = int(vocabulary.trie.start_N[1])  # intervals of the root, a row's last node: they and END do not overlap
    for own, ours in zip(own_rows(own_RV, request, vocabulary), rows, strict=True):
        firsts = [_with_rest([*row.masses_I[len(row.masses_I) - size :], row.end]) for row in (own, ours)]
        nexts = [_with_rest([row.end] if np.isnan(row.token) else [row.token, row.end]) for row in (own, ours)]
        nats.append(max(_kl(*firsts), _kl(*nexts)))
        own_S, ours_S = (
            torch.from_numpy(np.concatenate([row.masses_I, of_row[size:], of_next])).clamp(min=0).log()
            for row, of_row, of_next in zip((own, ours), firsts, nexts, strict=True)
        )
        own_S = torch.where(own_S < LEAST_COMPARED, -torch.inf, own_S)
        shares.append(relative_deviations(own_S[None], ours_S[None])[0])
        finite_S = torch.isfinite(own_S) & torch.isfinite(ours_S)
        worst.append(float((own_S - ours_S)[finite_S].abs().max()))
        largest.append(float(own_S[finite_S].abs().max()))
    return Comparison(torch.tensor(nats), torch.stack(shares), max(worst), max(largest))


def _with_rest(probs: Sequence[float]) -> np.ndarray:
    """Return probabilities that do not overlap and what is left of 1, each at least `SMALLEST_SHARE`."""
    return np.maximum([*probs, 1.0 - sum(probs)], SMALLEST_SHARE)


def _kl(own_S: np.ndarray, other_S: np.ndarray) -> float:
    nats = float((own_S * np.log(own_S / other_S)).sum())
    return nats if np.isfinite(nats) else float("inf")


def _beside(prompt: Sequence[int], has_start: bool) -> list[list[int]]:
    """Return four prompts of three lengths, including the probe; a short one first: no prompt precedes the first."""
    before, tokens = list(prompt[:has_start]), list(prompt[has_start:])
    half, quarter = len(tokens) // 2, len(tokens) // 4
    return [[*before, *part] for part in (tokens[half:], tokens, tokens[::-1], tokens[quarter:])]


def _check_batch(
    engine: Engine, prompts: Sequence[Sequence[int]], tokenizer: ByteTokenizer, dtype: str, model: str
) -> None:
    """Raise ValueError if a prompt's log-probabilities depend on the other prompts in its batch.

    Some models that vLLM runs through transformers' code silently see the end of the previous prompt in their first
    rows. The first rows are the most wrong, so the mean over rows counts; rounding and differently chosen experts
    change less than the limits for a row.
    """
    requests = [probe_rows(prompt, tokenizer, engine.vocabulary) for prompt in prompts]
    batch = engine.reduced_rows(prompts, [[request] for request in requests])
    for prompt, request, [rows] in zip(prompts, requests, batch, strict=True):
        found = compare_rows(engine.own_logprobs(prompt), rows, request, engine.vocabulary)
        apart, share = float(found.nats_R.mean()), float(found.shares_R.mean())
        exact = dtype != "float32" or found.worst <= MAX_BATCH_EFFECT_FLOAT32 * found.largest
        if not (apart <= LIMIT_NATS and share <= LIMIT_SPREAD and exact):
            raise ValueError(
                f"{model}: {engine.name}'s output for a prompt changes with the other prompts in its batch. Of "
                f"{len(prompts)} short prompts in one batch, one of {len(prompt)} tokens is on average {apart:.3g} "
                f"nats from the model's own output for it alone (KL; limit {LIMIT_NATS}), a row's log-probabilities "
                f"differ by {share:.3g} of their spread (limit {LIMIT_SPREAD}), and the worst of them by "
                f"{found.worst:.3g} nats of {found.largest:.3g} (limit in float32: {MAX_BATCH_EFFECT_FLOAT32:g} of "
                "that). Every dump is made in batches, so its targets would be wrong; a server of the same engine "
                f"would answer the same. Use the other local engine (teacher.engine: {other_engine(engine.name)})"
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
