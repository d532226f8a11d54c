"""Attention over prompts and the branches that leave them: each token is computed once, whatever path it is on.

Prompts are packed, without padding. A branch token attends to its prompt up to where its path leaves it, to the branch
tokens before it on its path, and to itself. So a branch row costs one token's forward pass, at its position on the
path.

This is an attention function in transformers' registry (`AttentionInterface`). It works for any model whose layers are
all attention and look it up there. A model that keeps more of a path than keys and values (convolutions, states) is
refused, as is one that passes arguments unknown here.

Shape legend: H query heads, K key/value heads, G query heads per key head, E head size, T tokens of a prompt, N branch
tokens, A ancestors on a branch (itself included).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from pipeline.runtime.huggingface import learned_positions
from stage1_teacher.engines.base import BranchToken
from stage1_teacher.engines.own_logits import OwnLogits

NAME = "bld_tree"
# Tensors that layers pass to every attention function, without effect in it.
_KNOWN = ("position_ids", "cache_position")


class Tree:
    """Prompts and their branches in one model: keys and values of everything computed so far.

    Raises ValueError for a model that does not support this.
    """

    def __init__(self, own: OwnLogits, prompts: Sequence[Sequence[int]]) -> None:
        model = own.model
        if not model.is_backend_compatible():
            raise ValueError(f"{type(model).__name__} has an attention of its own, which cannot branch")
        self._own, self._model = own, model
        self._prompt_ends: list[int] = []
        self._layers: dict[int, _Layer] = {}
        self._paths: list[tuple[int, ...]] = []  # branch tokens on the path of each branch token, itself last
        self._leaves: list[tuple[int, int]] = []
        self.num_tokens = 0  # computed so far
        self.longest = learned_positions(model.config)
        self.states = self._prefill(prompts)  # a T x D tensor for each prompt, of `OwnLogits.states`

    @torch.inference_mode()
    def _prefill(self, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        lengths = [len(prompt) for prompt in prompts]
        self._prompt_ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
        positions = torch.cat([torch.arange(length) for length in lengths])
        hidden_TD = self._forward([token for prompt in prompts for token in prompt], positions, _Prefill(self))
        if len(self._layers) < self._model.config.get_text_config().num_hidden_layers:
            raise ValueError(f"{type(self._model).__name__} has layers that are not attention, which cannot branch")
        return list(hidden_TD.split(lengths))

    @torch.inference_mode()
    def extend(self, tokens: Sequence[BranchToken]) -> Tensor:
        """Return the state after each new branch token, N x D.

        Branch tokens are numbered consecutively over all calls.
        """
        order = sorted(range(len(tokens)), key=lambda i: tokens[i].prompt)
        first = len(self._paths)
        numbers = [first + i for i in range(len(tokens))]
        for number, token in zip(numbers, tokens, strict=True):
            before = () if token.parent is None else self._paths[token.parent]
            leaves = token.leaves if token.parent is None else self._leaves[token.parent][1]
            self._paths.append((*before, number))
            self._leaves.append((token.prompt, leaves))
        depth = [self._leaves[number][1] + len(self._paths[number]) - 1 for number in numbers]
        positions = torch.tensor([depth[i] for i in order])
        step = _Extend(self, [numbers[i] for i in order])
        hidden_ND = self._forward([tokens[i].token for i in order], positions, step)
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(len(order))
        return hidden_ND[back.to(hidden_ND.device)]

    def _forward(self, tokens: Sequence[int], positions: Tensor, step: "_Prefill | _Extend") -> Tensor:
        self.num_tokens += len(tokens)
        device = self._model.device
        ids = torch.tensor([tokens], dtype=torch.long, device=device)
        usual = self._model.config._attn_implementation
        AttentionInterface.register(NAME, attend)
        self._model.set_attn_implementation(NAME)
        try:
            states_BTD = self._own.states(
                input_ids=ids,
                position_ids=positions[None].to(device),
                use_cache=False,
                bld_step=step,
                attention_mask=None,
            )
        finally:
            self._model.set_attn_implementation(usual)
        return states_BTD[0]

    def layer(self, index: int) -> "_Layer":
        return self._layers.setdefault(index, _Layer())


class _Layer:
    """One layer's keys and values: those of the prompts, packed, and those of the branch tokens, by number."""

    def __init__(self) -> None:
        self.prompt_keys_TKE = torch.empty(0)
        self.prompt_values_TKE = torch.empty(0)
        self.keys_NKE = torch.empty(0)
        self.values_NKE = torch.empty(0)

    def append(self, keys_NKE: Tensor, values_NKE: Tensor, numbers: Tensor) -> None:
        size = int(numbers.max()) + 1
        if size > len(self.keys_NKE):
            capacity = max(2 * len(self.keys_NKE), size, 256)
            self.keys_NKE = _grown(self.keys_NKE, keys_NKE, capacity)
            self.values_NKE = _grown(self.values_NKE, values_NKE, capacity)
        self.keys_NKE[numbers] = keys_NKE
        self.values_NKE[numbers] = values_NKE


def _grown(old: Tensor, like: Tensor, capacity: int) -> Tensor:
    new = torch.empty(capacity, *like.shape[1:], dtype=like.dtype, device=like.device)
    new[: len(old)] = old.to(new) if old.numel() else 0
    return new


class _Scoring(NamedTuple):
    """A layer's rule from products of queries and keys to attention weights.

    Attributes:
        cap, window: 0 for none.
        sinks_H: for each head, a score that takes its share of the softmax and contributes nothing.
    """

    scale: float
    cap: float
    window: int
    sinks_H: Tensor | None


class _Prefill:
    """Each prompt attends to itself, causally."""

    def __init__(self, tree: Tree) -> None:
        self._tree, self._done = tree, set[int]()

    def attend(self, index: int, query_HNE: Tensor, key_KNE: Tensor, value_KNE: Tensor, scoring: _Scoring) -> Tensor:
        if index in self._done:
            raise ValueError("one of its layers attends twice, which cannot branch")
        self._done.add(index)
        layer = self._tree.layer(index)
        layer.prompt_keys_TKE = key_KNE.transpose(0, 1).contiguous()
        layer.prompt_values_TKE = value_KNE.transpose(0, 1).contiguous()
        out_HNE = query_HNE.new_empty(*query_HNE.shape[:2], value_KNE.shape[-1])
        window = scoring.window
        ends = self._tree._prompt_ends
        for start, end in pairwise(ends):
            part = slice(start, end)
            length = end - start
            query, key, value = query_HNE[:, part], key_KNE[:, part], value_KNE[:, part]
            if scoring.cap or scoring.sinks_H is not None or (window and window < length):
                position = torch.arange(length, device=query.device)
                back = position[:, None] - position[None, :]
                seen = (back >= 0) & ((back < window) if window else True)
                out_HNE[:, part] = _attend_masked(query, key, value, seen, scoring)
            else:
                out_HNE[:, part] = scaled_dot_product_attention(
                    query[None], key[None], value[None], is_causal=True, scale=scoring.scale, enable_gqa=True
                )[0]
        return out_HNE


def _attend_masked(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scoring: _Scoring) -> Tensor:
    groups = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    scores = _capped(_wide(query @ key.transpose(1, 2)) * scoring.scale, scoring.cap).masked_fill(~seen, -torch.inf)
    return _shares(scores, scoring.sinks_H).to(value.dtype) @ value


def _shares(scores: Tensor, sinks_H: Tensor | None) -> Tensor:
    """Return the softmax over the last axis and the head's sink, without the sink's share.

    The axes before the last two are the heads.
    """
    if sinks_H is None:
        return scores.softmax(-1)
    sinks = sinks_H.to(scores).reshape(*scores.shape[:-2], 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]


def _wide(scores: Tensor) -> Tensor:
    """Cast to at least float32, as the softmax needs."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _capped(scores: Tensor, cap: float) -> Tensor:
    return torch.tanh(scores / cap) * cap if cap else scores


class _Extend:
    """Branch tokens, sorted by prompt, attend to their prompt's head and to their own branch."""

    def __init__(self, tree: Tree, numbers: Sequence[int]) -> None:
        self._tree = tree
        self._parts: list[tuple[int, slice]] = []
        for at, number in enumerate(numbers):
            prompt = tree._leaves[number][0]
            if self._parts and self._parts[-1][0] == prompt:
                self._parts[-1] = (prompt, slice(self._parts[-1][1].start, at + 1))
            else:
                self._parts.append((prompt, slice(at, at + 1)))
        depth = max(len(tree._paths[number]) for number in numbers)
        # Padded with the token itself: masked entries have share 0, but 0 times uninitialised memory may be nan.
        paths = torch.tensor(list(numbers))[:, None].repeat(1, depth)
        real = torch.zeros(len(numbers), depth, dtype=torch.bool)
        for at, number in enumerate(numbers):
            path = tree._paths[number]
            paths[at, depth - len(path) :] = torch.tensor(path)
            real[at, depth - len(path) :] = True
        device = tree._model.device
        self._numbers = torch.tensor(list(numbers), device=device)
        self._paths_NA, self._real_NA = paths.to(device), real.to(device)
        self._leaves_N = torch.tensor([tree._leaves[number][1] for number in numbers], device=device)

    def attend(self, index: int, query_HNE: Tensor, key_KNE: Tensor, value_KNE: Tensor, scoring: _Scoring) -> Tensor:
        layer = self._tree.layer(index)
        layer.append(key_KNE.transpose(0, 1), value_KNE.transpose(0, 1), self._numbers)
        out_HNE = query_HNE.new_empty(*query_HNE.shape[:2], value_KNE.shape[-1])
        for prompt, part in self._parts:
            start, end = self._tree._prompt_ends[prompt], self._tree._prompt_ends[prompt + 1]
            keys_TKE, values_TKE = layer.prompt_keys_TKE[start:end], layer.prompt_values_TKE[start:end]
            out_HNE[:, part] = self._attend_part(layer, keys_TKE, values_TKE, query_HNE[:, part], part, scoring)
        return out_HNE

    def _attend_part(
        self,
        layer: _Layer,
        keys_TKE: Tensor,
        values_TKE: Tensor,
        query_HNE: Tensor,
        part: slice,
        scoring: _Scoring,
    ) -> Tensor:
        scale, cap, window = scoring.scale, scoring.cap, scoring.window
        paths_NA, real_NA, leaves_N = self._paths_NA[part], self._real_NA[part], self._leaves_N[part]
        keys_T = keys_TKE[: int(leaves_N.max())]
        values_T = values_TKE[: len(keys_T)]
        num_heads, num_rows, size = query_HNE.shape
        query_KGNE = query_HNE.reshape(keys_T.shape[1], -1, num_rows, size)
        before_KGNT = _wide(torch.einsum("kgne,tke->kgnt", query_KGNE, keys_T)) * scale
        at_T = torch.arange(len(keys_T), device=leaves_N.device)
        seen_NT = at_T[None] < leaves_N[:, None]
        if window:
            # The row's own position is that of its last ancestor.
            position_N = leaves_N + real_NA.sum(1) - 1
            seen_NT &= position_N[:, None] - at_T[None] < window
            real_NA = real_NA & (torch.arange(paths_NA.shape[1] - 1, -1, -1, device=leaves_N.device)[None] < window)
        keys_NAKE, values_NAKE = layer.keys_NKE[paths_NA], layer.values_NKE[paths_NA]
        own_KGNA = _wide(torch.einsum("kgne,nake->kgna", query_KGNE, keys_NAKE)) * scale
        scores = torch.cat(
            [
                _capped(before_KGNT, cap).masked_fill(~seen_NT, -torch.inf),
                _capped(own_KGNA, cap).masked_fill(~real_NA, -torch.inf),
            ],
            dim=-1,
        )
        shares = _shares(scores, scoring.sinks_H).to(values_T.dtype)
        out_KGNE = torch.einsum("kgnt,tke->kgne", shares[..., : len(keys_T)], values_T)
        out_KGNE += torch.einsum("kgna,nake->kgne", shares[..., len(keys_T) :], values_NAKE)
        return out_KGNE.reshape(num_heads, num_rows, -1)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    bld_step: _Prefill | _Extend | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute attention as transformers' registry requires; `bld_step` comes through the model's keyword arguments.

    Raises ValueError for a layer that passes arguments unknown here.
    """
    if bld_step is None:
        raise ValueError(
            f"the model does not pass keyword arguments to its {type(module).__name__}, so it cannot branch"
        )
    unknown = [name for name, value in others.items() if isinstance(value, Tensor) and name not in _KNOWN]
    unknown += [] if attention_mask is None else ["attention_mask"]
    if unknown:
        raise ValueError(f"{type(module).__name__} passes {', '.join(unknown)} to its attention, so it cannot branch")
    index = module.layer_idx
    assert isinstance(index, int)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scoring = _Scoring(scale, softcap or 0.0, sliding_window or 0, s_aux)
    out_HNE = bld_step.attend(index, query[0], key[0], value[0], scoring)
    return out_HNE.transpose(0, 1)[None].contiguous(), None
