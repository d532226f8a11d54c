"""The engine on transformers, for tests and for machines without vLLM."""

from collections.abc import Sequence

import torch
import transformers
from torch import Tensor

from pipeline.config import PlacementConfig, TeacherConfig
from pipeline.runtime.devices import compute_device
from pipeline.runtime.huggingface import load_model
from pipeline.runtime.padding import padded_groups
from stage1_teacher.engines import model_head
from stage1_teacher.engines.base import EngineRequest
from stage1_teacher.engines.model_head import head_inputs
from stage1_teacher.engines.tree_attention import Tree
from stage1_teacher.reduction.logit_rule import LogitRule


def engine_name(_: TeacherConfig, __: PlacementConfig) -> str:
    """Return the engine's name and version, as in `transformers-5.1.0`."""
    return f"transformers-{transformers.__version__}"


def make_engine(request: EngineRequest) -> "TransformersEngine":
    """Open the engine, with its model loaded."""
    return TransformersEngine(request.model, request.teacher, request.placement, request.branches)


class TransformersEngine:
    """A teacher in this process; prompts of similar length are padded together."""

    def __init__(self, model: str, teacher: TeacherConfig, placement: PlacementConfig, branches: bool = False) -> None:
        self.name = engine_name(teacher, placement)
        self.cannot_branch: str | None = None
        self.shared_tokens = 1
        self._device = torch.device(compute_device())
        whole = load_model(teacher.source.at(model), getattr(torch, teacher.dtype))
        if getattr(whole.config.get_text_config(), "attn_logit_softcapping", None):
            # Gemma 2: the other implementations silently leave the soft cap out.
            whole.set_attn_implementation("eager")
        self._model = whole.to(self._device).eval()
        self._batch_tokens = placement.engine_batch_tokens

    @torch.inference_mode()
    def hidden_states(self, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        hidden: dict[int, Tensor] = {}
        for batch in padded_groups([len(prompt) for prompt in prompts], self._batch_tokens):
            length = max(len(prompts[i]) for i in batch)
            ids_BT = torch.zeros(len(batch), length, dtype=torch.long, device=self._device)
            mask_BT = torch.zeros_like(ids_BT)
            for row, index in enumerate(batch):
                ids_BT[row, : len(prompts[index])] = torch.tensor(prompts[index])
                mask_BT[row, : len(prompts[index])] = 1
            states_BTD = head_inputs(self._model, input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
            for row, index in enumerate(batch):
                hidden[index] = states_BTD[row, : len(prompts[index])]
        return [hidden[index] for index in range(len(prompts))]

    def logit_rule(self) -> LogitRule:
        return model_head.logit_rule(self._model)

    def own_logprobs(self, prompt: Sequence[int], first: int = 0) -> Tensor:
        return model_head.own_logprobs(self._model, torch.tensor([prompt], device=self._device), first)[0].cpu()

    def branches(self, prompts: Sequence[Sequence[int]]) -> Tree:
        if self.cannot_branch is not None:
            raise ValueError(self.cannot_branch)
        return Tree(self._model, prompts)

    def close(self) -> None:
        del self._model
