"""Probes of a transformers model's head: its input, the rule applied to its products, the model's own output.

Shape legend: B prompts, T tokens, D hidden size, V token ids.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from stage1_teacher.reduction.logit_rule import PROBE_ROWS, LogitRule, fit_rule, probe_products


class _HeadReachedError(Exception):
    """Ends a forward pass at the head, and carries the head's input."""

    def __init__(self, states_BTD: Tensor) -> None:
        self.states_BTD = states_BTD


def head_inputs(model: Any, **inputs: Any) -> Tensor:
    """Return the input of a causal language model's head, B x T x D, without running the head.

    Some models scale or normalise their last hidden states once more before the head, so these are not always the
    trunk's.

    Raises:
        ValueError: the model does not use its output embeddings as a module.
    """

    def end(_: Any, arguments: tuple[Any, ...]) -> None:
        raise _HeadReachedError(arguments[0])

    hook = model.get_output_embeddings().register_forward_pre_hook(end)
    try:
        model(**inputs)
    except _HeadReachedError as reached:
        return reached.states_BTD
    finally:
        hook.remove()
    raise ValueError(
        f"{type(model).__name__} does not apply its head as a module, so its hidden states cannot be obtained; "
        "use teacher.engine: vllm or openai"
    )


@torch.inference_mode()
def own_logprobs(model: Any, prompt_BT: Tensor, first: int = 0) -> Tensor:
    """Return the model's own log-probabilities after each token from `first` on: B x T x V float32, natural logs."""
    logits_BTV: Tensor = model(input_ids=prompt_BT, use_cache=False).logits
    return logits_BTV[:, first:].float().log_softmax(-1)


@torch.inference_mode()
def logit_rule(model: Any) -> LogitRule:
    """Return what the model does to its head's products. Raises ValueError if no `LogitRule` describes it."""
    given: list[Tensor] = []

    def replace(_: Any, __: Any, products_BTV: Tensor) -> Tensor:
        given.append(torch.from_numpy(probe_products(products_BTV.shape[-1])).to(products_BTV.device)[None])
        return given[0].clone()  # some models scale them in place

    hook = model.get_output_embeddings().register_forward_hook(replace)
    try:
        ids_BT = torch.zeros(1, PROBE_ROWS, dtype=torch.long, device=model.device)
        logits_BTV: Tensor = model(input_ids=ids_BT, use_cache=False).logits
    finally:
        hook.remove()
    name = type(model).__name__
    if not given or given[0].shape != logits_BTV.shape:
        raise ValueError(f"{name} does not make each logit from one product of its head; use teacher.engine: openai")
    products, logits = (np.asarray(tensor[0].float().cpu()) for tensor in (given[0], logits_BTV))
    return fit_rule(products, logits, name, logits_BTV.dtype in (torch.bfloat16, torch.float16))
