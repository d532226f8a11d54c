"""Extension of vLLM's worker processes: a pooler beside the model's own head. The second module that imports vLLM.

vLLM's own conversion of a model for pooling discards its head. `Worker` is vLLM's `worker_extension_cls`: a worker of
any kind (in this process, spawned, Ray's) imports it by name before it loads the model, and from then on a model is
converted by `with_own_head` instead. The output for a prompt is the head's input, or, for a prompt that requests it
(`OWN_LOGPROBS` in the `extra_kwargs` of its parameters), the model's own log-probabilities.

Shape legend: T tokens, D hidden size, V token ids.
"""

from typing import Any

import numpy as np
import torch
import vllm.model_executor.models.adapters as adapters
from torch import Tensor, nn
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.models.interfaces_base import VllmModelForPooling

from stage1_teacher.engines.base import OWN_LOGPROBS
from stage1_teacher.reduction.logit_rule import PROBE_ROWS, LogitRule, fit_rule, probe_products


class Worker:
    """Methods added to vLLM's worker, called through `LLM.collective_rpc`."""

    def bld_logit_rule(self) -> tuple[float, float, list[int]] | str | None:
        """Return the model's `LogitRule`, or why it has none; None in a process that has no head."""
        model: Any = self.get_model()  # type: ignore[attr-defined]
        try:
            rule = logit_rule(model)
        except ValueError as error:
            return str(error)
        return None if rule is None else (rule.scale, rule.soft_cap, list(rule.suppressed))


def with_own_head(cls: type[nn.Module]) -> type[nn.Module]:
    """Return a model's class as vLLM's pooling runs it, with its head left in place."""

    class OwnHead(cls, VllmModelForPooling):  # type: ignore[valid-type,misc]
        is_pooling_model = True

        def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
            config = vllm_config.model_config
            self.pooler = RowPooler(self, config.get_hidden_size(), config.dtype)

    OwnHead.__name__ = OwnHead.__qualname__ = cls.__name__
    return OwnHead


adapters.as_embedding_model = with_own_head


class RowPooler(Pooler):
    """A pooler that returns, for every position, the head's input in the model's dtype, or own log-probabilities."""

    def __init__(self, model: nn.Module, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.__dict__["model"] = model  # not as a submodule: the model holds us
        self.hidden_size, self.dtype = hidden_size, dtype

    def get_supported_tasks(self) -> set[Any]:
        return {"token_embed"}

    def forward(self, hidden_states: Tensor, pooling_metadata: Any) -> list[Tensor | None]:
        """Return T x D, or T x V float32, for each request.

        None before a request's last chunk, and in a process that does not get the logits.
        """
        states_TD = head_inputs(self.model, hidden_states)
        cursor = pooling_metadata.get_pooling_cursor()
        lengths = cursor.num_scheduled_tokens_cpu.tolist()
        answers: list[Tensor | None] = []
        for state, before_TD, part_TD, end, is_last, params in zip(
            pooling_metadata.pooling_states,
            hidden_states.split(lengths),
            states_TD.split(lengths),
            cursor.seq_lens_cpu.tolist(),
            cursor.get_finished_mask(),
            pooling_metadata.pooling_params,
            strict=True,
        ):
            rows: Tensor | None
            if params.extra_kwargs and OWN_LOGPROBS in params.extra_kwargs:
                first = params.extra_kwargs[OWN_LOGPROBS] - (end - len(before_TD))  # in this chunk
                requested_TD = before_TD[max(first, 0) :]
                rows = own_logprobs(self.model, requested_TD) if len(requested_TD) else None
            else:
                rows = part_TD.clone()  # the next step may overwrite it
            if rows is None:
                answers.append(None)
                continue
            state.hidden_states_cache.append(rows)
            answers.append(torch.cat(state.hidden_states_cache) if is_last else None)
            if is_last:
                state.clean()
        return answers


class _HeadReachedError(Exception):
    """Ends `compute_logits` at the head, and carries the head's input."""

    def __init__(self, states_TD: Tensor) -> None:
        self.states_TD = states_TD


def _processors(model: nn.Module) -> list[LogitsProcessor]:
    return [module for module in model.modules() if isinstance(module, LogitsProcessor)]


def head_inputs(model: Any, hidden_TD: Tensor) -> Tensor:
    """Return the head's input, T x D; MiMo and Step-3.5 normalise their states only in `compute_logits`."""

    def end(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        raise _HeadReachedError(arguments[1] if len(arguments) > 1 else named["hidden_states"])

    hooks = [processor.register_forward_pre_hook(end, with_kwargs=True) for processor in _processors(model)]
    try:
        model.compute_logits(hidden_TD)
    except _HeadReachedError as reached:
        return reached.states_TD
    finally:
        for hook in hooks:
            hook.remove()
    return hidden_TD  # the model uses no such module; the check at the start decides whether these states will do


def own_logprobs(model: Any, hidden_TD: Tensor) -> Tensor | None:
    """Return the model's own log-probabilities, T x V float32; None on a rank that does not get the logits."""
    logits_TV = model.compute_logits(hidden_TD)
    return None if logits_TV is None else logits_TV.float().log_softmax(-1)


@torch.inference_mode()
def logit_rule(model: Any) -> LogitRule | None:
    """Return what the model does to its head's products; None if its last layers are in another process.

    Raises ValueError if no `LogitRule` describes it.
    """
    if not get_pp_group().is_last_rank:
        return None
    name = type(model).__name__
    processors = _processors(model)
    given: list[Tensor] = []

    def instead(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        given.append(torch.from_numpy(probe_products(width)).to(hidden_states.device))
        return given[-1].clone()  # some models scale them in place

    width = processors[0].org_vocab_size if processors else 0
    device = next(model.parameters()).device
    for processor in processors:
        processor._get_logits = instead
    try:
        zeros_TD = torch.zeros(PROBE_ROWS, model.pooler.hidden_size, dtype=model.pooler.dtype, device=device)
        logits_TV = model.compute_logits(zeros_TD)
    finally:
        for processor in processors:
            del processor._get_logits
    if not given or logits_TV.shape != given[-1].shape:
        raise ValueError(f"{name} does not make each logit from one product of its head; use teacher.engine: openai")
    products, logits = (np.asarray(tensor.float().cpu()) for tensor in (given[-1], logits_TV))
    return fit_rule(products, logits, name, logits_TV.dtype in (torch.bfloat16, torch.float16))
