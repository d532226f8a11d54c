"""A transformers model in two halves: its trunk, and what the model itself makes of the trunk's output.

The second half is the model's own `forward` with its trunk replaced by one that returns states computed before. So
whatever a model does after its trunk (a norm, a projection, a factor, a soft cap) is done by its own code, for a chunk
of rows at a time. A model that does not behave so (found by trying) is run whole, and its logits are its states.

Shape legend: B prompts, T tokens, R rows, D width of the states, V token ids.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stage1_teacher.engines.float32_head import Float32Head

_PROBE = 7  # tokens
_CLOSE = 1e-3  # share of the largest logit; another way of splitting a product rounds 16-bit numbers differently


class _TrunkDoneError(Exception):
    """Ends a forward pass behind the trunk, and carries the trunk's output."""

    def __init__(self, output: Any) -> None:
        self.output = output


class OwnLogits:
    """A causal language model's own logits, in two halves.

    Args:
        model: on its device; its head is made to give float32 products if `float32_head`.
    """

    def __init__(self, model: PreTrainedModel, float32_head: bool = True) -> None:
        self.model = model
        if float32_head:
            _give_float32_products(model.get_output_embeddings())
        self._template: Any = None  # the trunk's output, for whatever else than states it holds
        self._trunk = next((trunk for trunk in _trunks(model) if self._can_split(trunk)), None)

    @property
    def is_split(self) -> bool:
        return self._trunk is not None

    def states(self, **inputs: Any) -> Tensor:
        """Return the states of a forward pass, B x T x D; of a model that is not split its logits, B x T x V."""
        if self._trunk is None:
            logits_BTV: Tensor = self.model(**inputs).logits
            return logits_BTV.float()
        self._template = self._run_trunk(self._trunk, **inputs)
        return _states(self._template)

    def logits(self, states_RD: Tensor) -> Tensor:
        """Return the model's own logits of some states, R x V. On a CPU the next call may overwrite them."""
        return states_RD if self._trunk is None else self._second_half(self._trunk, states_RD)

    def _second_half(self, trunk: nn.Module, states_RD: Tensor) -> Tensor:
        with _returning(trunk, _with_states(self._template, states_RD[None])):
            ids_BR = torch.zeros(1, len(states_RD), dtype=torch.long, device=states_RD.device)
            logits_BRV: Tensor = self.model(input_ids=ids_BR, use_cache=False).logits
        return logits_BRV[0]

    def whole_logits(self, ids_BT: Tensor) -> Tensor:
        """Return the logits of prompts from one ordinary forward pass, B x T x V."""
        logits_BTV: Tensor = self.model(input_ids=ids_BT, use_cache=False).logits
        return logits_BTV

    def _run_trunk(self, trunk: nn.Module, **inputs: Any) -> Any:
        def end(_module: Any, _arguments: Any, output: Any) -> None:
            raise _TrunkDoneError(output)

        hook = trunk.register_forward_hook(end)
        try:
            self.model(**inputs)
        except _TrunkDoneError as done:
            return done.output
        finally:
            hook.remove()
        raise ValueError(f"{type(self.model).__name__} does not run its trunk as a module")

    @torch.inference_mode()
    def _can_split(self, trunk: nn.Module) -> bool:
        """Return whether the two halves, the second in two chunks, make what the whole model makes."""
        ids_BT = torch.arange(_PROBE, device=self.model.device)[None]
        whole_TV = self.whole_logits(ids_BT)[0].float().clone()
        try:
            self._template = self._run_trunk(trunk, input_ids=ids_BT, use_cache=False)
            states_TD = _states(self._template)[0]
            parts = [self._second_half(trunk, states_TD[part]).float().clone() for part in (slice(3), slice(3, None))]
        except Exception:  # whatever it does with its trunk's output: it is run whole
            return False
        halves_TV = torch.cat(parts)
        largest = float(whole_TV.abs().nan_to_num(nan=0.0, posinf=0.0).max())
        return halves_TV.shape == whole_TV.shape and bool(
            torch.allclose(halves_TV, whole_TV, rtol=0, atol=_CLOSE * largest)
        )


def _trunks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules that may be the model's trunk, the most likely one first."""
    return [trunk for trunk in (model.base_model, model.get_decoder()) if trunk not in (None, model)]


@contextmanager
def _returning(module: nn.Module, output: Any) -> Iterator[None]:
    """Let a module return this output, whatever it is given."""
    module.forward = lambda *_, **__: output  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward


def _states(output: Any) -> Tensor:
    states_BTD = output[0]
    if not isinstance(states_BTD, Tensor) or states_BTD.dim() != 3:
        raise ValueError(f"a trunk's output begins with {type(states_BTD).__name__}, not with states of each token")
    return states_BTD


def _with_states(output: Any, states_BTD: Tensor) -> Any:
    """Return a trunk's output with other states."""
    if isinstance(output, tuple):
        return (states_BTD, *output[1:])
    changed = copy.copy(output)
    changed.last_hidden_state = states_BTD
    return changed


def _give_float32_products(head: nn.Module | None) -> None:
    """Let a plain linear head of 16-bit weights give float32 products; a quantized one is a class of its own."""
    if type(head) is not nn.Linear or head.weight.dtype not in (torch.bfloat16, torch.float16):
        return
    products: list[Float32Head] = []

    def forward(states: Tensor) -> Tensor:
        if not products:
            products.append(Float32Head(head.weight, head.bias))
        return products[0](states.flatten(0, -2)).unflatten(0, states.shape[:-1])

    head.forward = forward  # type: ignore[method-assign,assignment]
