"""The model before its move to another tokenizer: how likely its own tokens are, and what its states are like.

Shape legend: B texts, L tokens, N states, D hidden width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.runtime import log
from pipeline.runtime.causality import check_causal
from pipeline.runtime.devices import compute_device
from pipeline.runtime.huggingface import max_positions, without_own_sampling
from pipeline.runtime.padding import padded_groups
from stage2_student.model.drop_layers import drop_layers
from stage2_student.model.student import Precision, Student

_NUM_TEXTS, _TEXT_TOKENS = 32, 128
_TRAIN = TrainConfig.model_validate({"dtype": "float32", "objectives": {"ce": 1.0, "kl": 0.0}})


@dataclass(frozen=True)
class OldModel:
    """A causal language model with its old tokenizer's rows, in float32; it is loaded when it is first asked.

    Attributes:
        load: loads it, on the CPU.
        name: for messages.
        num_rows: of its embedding.
        start_id: the old token that begins a text; None if there is none.
        weights_sha256: of its files; None if they are not known, and nothing that is made of it is kept.
    """

    load: Callable[[], Any]
    name: str
    num_rows: int
    start_id: int | None
    weights_sha256: str | None = None

    @cached_property
    def student(self) -> Student:
        """The model, on the device that computes, with its scaling of logits.

        Raises:
            ValueError: it looks ahead, or does more to its logits than scaling or capping them.
        """
        model = self.load().eval().requires_grad_(False)
        check_causal(model, self.name)
        student = Student(model, None, _TRAIN).eval()
        student.find_logit_scale()
        return student.to(compute_device())

    @property
    def model(self) -> Any:
        return self.student.lm

    @cached_property
    def own_texts(self) -> Tensor:
        """Texts that the model writes itself, (32, 128) tokens including the start token, at temperature 1.

        The seed is fixed. Shorter if the model has fewer positions.
        """
        model = self.model
        log.info(f"{self.name}: writes {_NUM_TEXTS} texts of {_TEXT_TOKENS} tokens to learn what its states are like")
        starts_B = torch.linspace(0, self.num_rows - 1, _NUM_TEXTS).long()
        if self.start_id is not None:
            starts_B = torch.full_like(starts_B, self.start_id)
        length = min(_TEXT_TOKENS, max_positions(model.config) or _TEXT_TOKENS)
        with torch.random.fork_rng(), without_own_sampling(model):
            torch.manual_seed(0)
            written: Tensor = model.generate(
                starts_B[:, None].to(model.device),
                attention_mask=torch.ones_like(starts_B[:, None]).to(model.device),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=length - 1,
                max_new_tokens=length - 1,
                pad_token_id=0,
                use_cache=True,
            )
        return written

    @property
    def num_layers(self) -> int:
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def gives_states(self) -> bool:
        """Tell whether the family gives the states between its layers."""
        with torch.no_grad():
            token_11 = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
            found = self.model.base_model(input_ids=token_11, use_cache=False, output_hidden_states=True)
        return len(getattr(found, "hidden_states", None) or ()) > self.num_layers

    @torch.no_grad()
    def states_at_last(
        self, sequences: Sequence[Sequence[int]], depths: Sequence[int], max_tokens: int, precision: Precision
    ) -> Iterator[tuple[list[int], list[Tensor]]]:
        """Yield the states at the last token of each sequence, which follows the start token.

        The layers above are left out where the family can be cut.

        Args:
            depths: the numbers of layers after which states are taken, ascending.
            max_tokens: of a forward pass.
            precision: of its matrix products.
        Yields:
            indices of sequences, and for each depth their states (N, D), float32, on the model's device.
        Raises:
            ValueError: the family does not give the states between its layers.
        """
        start = [] if self.start_id is None else [self.start_id]
        lower = self._lowest(depths[-1] + 1)
        for group in padded_groups([len(start) + len(sequence) for sequence in sequences], max_tokens):
            rows = [[*start, *sequences[index]] for index in group]
            width = len(rows[0])
            tokens_BL = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.model.device)
            with precision.context(self.model.device.type):
                found = lower(input_ids=tokens_BL, use_cache=False, output_hidden_states=True).hidden_states
            if not found or len(found) <= depths[-1]:
                raise ValueError(
                    f"{self.name}: a model of type {self.model.config.model_type} does not give the states between its "
                    "layers, which student.transfer.input=lexicon reads; use another student.transfer.input"
                )
            last_B = torch.tensor([len(row) - 1 for row in rows], device=self.model.device)
            states_at = torch.arange(len(rows), device=self.model.device)
            yield group, [found[depth][states_at, last_B].float() for depth in depths]

    def _lowest(self, num_layers: int) -> Any:
        """Return the model without its head and, where it can be cut, without the layers above these."""
        try:
            return drop_layers(self.model, range(num_layers, self.num_layers)).base_model
        except ValueError as reason:
            log.info(f"{reason}; all layers are run")
            return self.model.base_model

    @torch.no_grad()
    def states(self, tokens_BL: Tensor) -> Tensor:
        """Return the last hidden states of texts, float32, on the CPU: of each token in turn."""
        hidden_BLD = self.model.base_model(input_ids=tokens_BL, use_cache=False).last_hidden_state
        return hidden_BLD.flatten(0, 1).float().cpu()
