"""Gradient of a student from stored targets, compared with the gradient from dense ones.

Of the KL term (`stage2_student.losses.divergences`) by the weights of the trunk, after the interface alone was trained
on other documents: angle and ratio of lengths, Sparse Logit Sampling's test (arXiv 2503.16870).

Shape legend: B documents, L tokens, D hidden width, P positions, V symbols (256).
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.nn.functional import cosine_similarity

from pipeline.config import Recipe, student_config
from schemas.record import Record
from stage2_student.data.encode import encode_records
from stage2_student.data.examples import Masks, make_example
from stage2_student.data.micro_batch import MicroBatch, collate
from stage2_student.interfaces import StudentShape
from stage2_student.interfaces.linear import LinearInterface
from stage2_student.losses.divergences import class_divergence
from stage2_student.model.initial_student import end_tokens, export_start, load_start, student_tokenizer


class Beside(NamedTuple):
    """A gradient beside the dense targets'."""

    degrees: float
    length_ratio: float


class Gradients:
    """A student whose interface has been trained a little, and its gradient from the dense targets.

    Args:
        dense: records that hold all symbols; the gradient is taken on these.
        others: records that the interface is trained on before.
        layers: take the gradient by the last so many layers' weights; None: by all of the trunk's.
    """

    def __init__(
        self, recipe: Recipe, dense: Sequence[Record], others: Sequence[Record], layers: int | None, steps: int
    ) -> None:
        student = student_config(recipe)
        self.tokenizer = student_tokenizer(student).tokenizer
        self.ids = end_tokens(student, self.tokenizer)
        self.masks = Masks(student.max_doubt, student.max_token_end)
        lm = load_start(export_start(recipe), student.trust_remote_code)
        self.trunk = lm.base_model
        lm.requires_grad_(False)
        chosen = self.trunk if layers is None else self.trunk.layers[-layers:]
        self.weights = [weight.requires_grad_() for weight in chosen.parameters()]
        self.head = lm.get_output_embeddings()
        shape = StudentShape(
            lm.config.hidden_size, len(self.head.weight), tuple(self.tokenizer.token_bytes), b"", self.ids.ends
        )
        self.interface = LinearInterface(shape)
        self._train(others, steps)
        self.batch = self._batch(dense)
        self.hidden_BLD = self.trunk(input_ids=self.batch.tokens_BL, use_cache=False).last_hidden_state
        self.reference, nats = self._gradient(self.batch)
        self.nats_per_position = nats / int(self.batch.kl_P.sum())

    def beside(self, records: Sequence[Record]) -> Beside:
        """Compare the gradient from other targets of the same documents with the dense one.

        The dense records' masks decide which positions count.
        """
        found, _ = self._gradient(replace(self._batch(records), kl_P=self.batch.kl_P))
        cosine = float(cosine_similarity(found.double(), self.reference.double(), dim=0))
        return Beside(math.degrees(math.acos(min(1.0, cosine))), float(found.norm() / self.reference.norm()))

    def _batch(self, records: Sequence[Record]) -> MicroBatch:
        found = []
        for encoded in encode_records(records, self.tokenizer, 10**9):
            assert not isinstance(encoded, str), encoded
            found.append(
                make_example(encoded, self.ids.document_start, self.ids.end, self.interface.max_bytes, self.masks)
            )
        return collate(found)

    def _train(self, records: Sequence[Record], steps: int) -> None:
        """Train only the interface's maps, on fixed states."""
        batches = [self._batch([record]) for record in records]
        with torch.no_grad():
            hidden = [self.trunk(input_ids=batch.tokens_BL, use_cache=False).last_hidden_state for batch in batches]
        optimizer = torch.optim.Adam(self.interface.parameters(), lr=1e-3)
        order = torch.Generator().manual_seed(0)
        for _ in range(steps):
            for index in torch.randint(len(batches), (2,), generator=order).tolist():
                self._kl(hidden[index], batches[index]).div(len(batches[index].state_P)).backward()
            optimizer.step()
            optimizer.zero_grad()

    def _kl(self, hidden_BLD: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        logits_PV = self.interface(hidden_BLD, batch, self.head).logits_PV
        return class_divergence(logits_PV, batch.entry_symbols_PE, batch.entry_logprobs_PE, batch.kl_P)

    def _gradient(self, batch: MicroBatch) -> tuple[torch.Tensor, float]:
        leaf_BLD = self.hidden_BLD.detach().requires_grad_()
        nats = self._kl(leaf_BLD, batch)
        (states_BLD,) = torch.autograd.grad(nats, leaf_BLD)
        parts = torch.autograd.grad(self.hidden_BLD, self.weights, states_BLD, retain_graph=True, allow_unused=True)
        return torch.cat([part.flatten() for part in parts if part is not None]), float(nats.detach())
