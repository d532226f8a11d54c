"""The linear interface of Byte-Level Distillation (arXiv 2604.07466): ten parallel maps of one hidden state.

Shape legend: B documents, L tokens, D hidden width, J bytes of a token, S states, P supervised byte positions, V
symbols (256).
"""

import torch
from torch import Tensor, nn

from schemas import NUM_SYMBOLS
from stage2_student.data.micro_batch import MicroBatch
from stage2_student.interfaces.base import ByteScores, Head, Interface, StudentShape


class LinearInterface(Interface):
    """Ten linear maps of the state that predicts a token; map `j` predicts byte `j`, and sees no earlier byte.

    The maps start at zero: every byte is equally likely, and the first steps train the maps before any of their
    gradient reaches the trunk, instead of pushing noise into it.
    """

    max_bytes = 10

    def __init__(self, shape: StudentShape) -> None:
        super().__init__()
        self.maps = nn.Linear(shape.hidden_size, self.max_bytes * NUM_SYMBOLS, bias=False)
        nn.init.zeros_(self.maps.weight)

    def forward(self, hidden_BLD: Tensor, batch: MicroBatch, head: Head) -> ByteScores:
        """Implement `Interface.forward`; every position counts."""
        # Each state once, all ten maps together: the maps are 1-3 % of a student, and a gather per map would cost more.
        states, row_P = torch.unique(batch.state_P, return_inverse=True)
        logits_SJV = self.maps(hidden_BLD.flatten(0, 1)[states]).unflatten(-1, (self.max_bytes, NUM_SYMBOLS))
        return ByteScores(logits_SJV[row_P, batch.offset_P].float(), torch.ones_like(batch.kl_P))
