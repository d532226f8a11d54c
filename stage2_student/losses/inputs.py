"""The inputs of an objective, and the student's head applied to a part of its states at a time.

Shape legend: B rows, L tokens, D hidden width, N supervised tokens, R states, V vocabulary, F what is kept of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.config import TrainConfig
from stage2_student.data.micro_batch import MicroBatch
from stage2_student.interfaces import ByteScores, Head

CHUNK_ROWS = 256


@dataclass(frozen=True)
class ObjectiveInputs:
    """The inputs of an objective for one micro-batch.

    Attributes:
        batch: the micro-batch; `symbols_P` is the document's symbol at each position, `entry_symbols_PE` and
            `entry_logprobs_PE` are the dump's entries there, `kl_P` says where they may be trusted, `measures_P` has
            the dump's further measures, by column.
        scores: the interface's output; None if no objective needs it.
        nats_N: -ln p of the supervised tokens, in the order of `labels_BL`, float32; None if no objective needs them.
        train: the recipe's section.
        hidden_BLD: the student's last hidden states; state `l` of a document predicts its token `l`.
        head: the student's own token logits of states, (n, D) -> (n, V); see `rows_of_head`.
    """

    batch: MicroBatch
    scores: ByteScores | None
    nats_N: Tensor | None
    train: TrainConfig

    hidden_BLD: Tensor | None = None
    head: Head | None = None

    def rows_of_head(self, state_R: Tensor, keep: Callable[..., Tensor], *values_R: Tensor) -> Tensor:
        """Apply the head to states, and keep of their logits what `keep` returns.

        Only the logits of `CHUNK_ROWS` states are held at once, and computed again for the gradient: all of them in
        float32 would be larger than a small student.

        Args:
            state_R: int64, indices of the flattened B x L states.
            keep: (r, V) float32 logits and r of each of `values_R` to (r, F), or to a sum of shape (1,).
        Returns:
            (R, F), or the sums of the parts.
        """
        assert self.hidden_BLD is not None and self.head is not None
        head, hidden_RD = self.head, self.hidden_BLD.flatten(0, 1)[state_R]

        def kept(hidden_rD: Tensor, *values_r: Tensor) -> Tensor:
            return keep(head(hidden_rD).float(), *values_r)

        # At least one part, even if empty: on a rank without rows the head must still get a (zero) gradient.
        parts = [range(first, first + CHUNK_ROWS) for first in range(0, max(len(state_R), 1), CHUNK_ROWS)]
        found = []
        for part in parts:
            inside = slice(part.start, part.stop)
            values = (hidden_RD[inside], *(value_R[inside] for value_R in values_R))
            found.append(checkpoint(kept, *values, use_reentrant=False) if torch.is_grad_enabled() else kept(*values))
        return torch.cat(found)


Objective = Callable[[ObjectiveInputs], Tensor]  # a scalar: nats, summed over the micro-batch
