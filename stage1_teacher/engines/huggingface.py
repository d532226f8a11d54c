"""The engine on transformers, for tests and for machines without vLLM."""

from collections.abc import Sequence

import torch
import transformers
from torch import Tensor

from pipeline.config import PlacementConfig, TeacherConfig
from pipeline.covering.covering import ReducedRow
from pipeline.covering.vocabulary import Vocabulary
from pipeline.runtime.devices import compute_device
from pipeline.runtime.huggingface import load_model
from pipeline.runtime.padding import padded_groups
from stage1_teacher.engines.base import BranchToken, EngineRequest
from stage1_teacher.engines.batch_sizes import step_tokens
from stage1_teacher.engines.own_logits import OwnLogits
from stage1_teacher.engines.tree_attention import Tree
from stage1_teacher.reduction.reducer import ComputedRows, PromptRows, Reducer
from stage1_teacher.reduction.types import RowsAlong


def engine_name(_: TeacherConfig, __: PlacementConfig) -> str:
    """Return the engine's name and version, as in `transformers-5.1.0`."""
    return f"transformers-{transformers.__version__}"


def make_engine(request: EngineRequest) -> "TransformersEngine":
    """Open the engine, with its model loaded."""
    return TransformersEngine(request)


class TransformersEngine:
    """A teacher in this process; prompts of similar length are padded together."""

    def __init__(self, request: EngineRequest) -> None:
        teacher = request.teacher
        self.name = engine_name(teacher, request.placement)
        self.cannot_branch: str | None = None
        self.shared_tokens = 1
        self._device = torch.device(compute_device())
        whole = load_model(teacher.source.at(request.model), getattr(torch, teacher.dtype))
        if getattr(whole.config.get_text_config(), "attn_logit_softcapping", None):
            # Gemma 2: the other implementations silently leave the soft cap out.
            whole.set_attn_implementation("eager")
        self._model = OwnLogits(whole.to(self._device).eval(), teacher.head_dtype == "float32")
        width = self._whole_logits([0]).shape[-1]
        self.vocabulary = Vocabulary(request.tokenizer.token_bytes, request.ends, width)
        self._reducer = Reducer(self.vocabulary, self._device, request.placement.reduce_rows)
        self._batch_tokens = step_tokens(request.placement)
        if not self._model.is_split:  # all logits of a batch exist at once
            self._batch_tokens = min(self._batch_tokens, self._reducer.chunk)

    @torch.inference_mode()
    def reduced_rows(
        self, prompts: Sequence[Sequence[int]], requests: Sequence[Sequence[RowsAlong]]
    ) -> list[list[list[ReducedRow]]]:
        rows = [PromptRows.along(of_prompt, self.vocabulary) for of_prompt in requests]
        for batch in padded_groups([len(prompt) for prompt in prompts], self._batch_tokens):
            length = max(len(prompts[i]) for i in batch)
            ids_BT = torch.zeros(len(batch), length, dtype=torch.long, device=self._device)
            mask_BT = torch.zeros_like(ids_BT)
            for row, index in enumerate(batch):
                ids_BT[row, : len(prompts[index])] = torch.tensor(prompts[index])
                mask_BT[row, : len(prompts[index])] = 1
            states_BTD = self._model.states(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
            self._reduce([rows[index] for index in batch], list(states_BTD))
        return [of_prompt.rows() for of_prompt in rows]

    def _reduce(self, rows: Sequence[PromptRows], states: Sequence[Tensor]) -> None:
        """Reduce the rows of some prompts, given the states at all their tokens."""
        computed = [
            ComputedRows(of_prompt, 0, states_TD[torch.from_numpy(of_prompt.index_R).to(self._device)])
            for of_prompt, states_TD in zip(rows, states, strict=True)
        ]
        self._reducer.reduce(computed, self._model.logits)

    @torch.inference_mode()
    def _whole_logits(self, prompt: Sequence[int]) -> Tensor:
        return self._model.whole_logits(torch.tensor([prompt], device=self._device))[0]

    def own_logprobs(self, prompt: Sequence[int], first: int = 0) -> Tensor:
        return self._whole_logits(prompt)[first:].float().log_softmax(-1).cpu()

    def branches(
        self, prompts: Sequence[Sequence[int]], requests: Sequence[Sequence[RowsAlong]]
    ) -> "TransformersBranches":
        if self.cannot_branch is not None:
            raise ValueError(self.cannot_branch)
        return TransformersBranches(self, prompts, requests)

    def close(self) -> None:
        del self._model


class TransformersBranches:
    """Branches in a tree of attention (`stage1_teacher.engines.tree_attention`)."""

    def __init__(
        self, engine: TransformersEngine, prompts: Sequence[Sequence[int]], requests: Sequence[Sequence[RowsAlong]]
    ) -> None:
        self._engine = engine
        self._tree = Tree(engine._model, prompts)
        self.longest = self._tree.longest
        rows = [PromptRows.along(of_prompt, engine.vocabulary) for of_prompt in requests]
        with torch.inference_mode():
            engine._reduce(rows, self._tree.states)
        self.rows = [of_prompt.rows() for of_prompt in rows]

    @property
    def num_tokens(self) -> int:
        return self._tree.num_tokens

    @torch.inference_mode()
    def extend(self, tokens: Sequence[BranchToken], requests: Sequence[RowsAlong]) -> list[ReducedRow]:
        states_ND = self._tree.extend(tokens)
        rows = [PromptRows.along([request._replace(first=0)], self._engine.vocabulary) for request in requests]
        self._engine._reduce(rows, list(states_ND[:, None]))
        return [row for of_branch in rows for [row] in of_branch.rows()]
