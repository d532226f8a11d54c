"""The causal interface: a small recurrent decoder over the bytes of a token.

Shape legend: B documents, L tokens, D hidden width, R runs (the supervised bytes of one token, or one END), P
supervised byte positions, W the decoder's width, V symbols (256).
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from schemas import NUM_SYMBOLS
from stage2_student.data.micro_batch import MicroBatch
from stage2_student.interfaces.base import ByteScores, Head, Interface, StudentShape

FIRST = NUM_SYMBOLS  # input before a token's first byte


class CausalInterface(Interface):
    """A GRU that starts from the state that predicts the token and reads the token's bytes one by one.

    It is as wide as the student's states: 1.2 % of the parameters of a student of 135 million. A transformer layer in
    its place learnt less in the same time. Its output map starts at zero, like the linear interface's, so that no noise
    reaches the trunk in the first steps.
    """

    max_bytes = None

    def __init__(self, shape: StudentShape, byte_width: int = 128) -> None:
        super().__init__()
        width = shape.hidden_size
        self.start = nn.Linear(shape.hidden_size, width)
        self.before = nn.Embedding(NUM_SYMBOLS + 1, byte_width)
        self.decoder = nn.GRU(byte_width, width)
        self.symbols = nn.Linear(width, NUM_SYMBOLS, bias=False)
        nn.init.zeros_(self.symbols.weight)

    def forward(self, hidden_BLD: Tensor, batch: MicroBatch, head: Head) -> ByteScores:
        """Implement `Interface.forward`; every position counts."""
        # One extra run: a rank that only waits must call every module too (ZeRO-3 gathers their weights).
        state_P, offset_P, symbols_P = (
            torch.cat([values_P, values_P.new_zeros(1)])
            for values_P in (batch.state_P, batch.offset_P, batch.symbols_P)
        )
        is_first_P = offset_P == 0
        run_P = is_first_P.cumsum(0) - 1
        before_P = torch.where(is_first_P, FIRST, symbols_P.roll(1))
        # A packed sequence: runs by length, longest first, and positions by offset. Nothing is padded.
        longest_first_R = torch.argsort(torch.bincount(run_P), descending=True, stable=True)
        rank_R = torch.empty_like(longest_first_R)
        rank_R[longest_first_R] = torch.arange(len(rank_R), device=rank_R.device)
        order_P = torch.argsort(offset_P * len(rank_R) + rank_R[run_P])
        start_RD = hidden_BLD.flatten(0, 1)[state_P[is_first_P][longest_first_R]]
        with torch.autocast(hidden_BLD.device.type, enabled=False):
            start_RW = torch.tanh(self.start(start_RD.float()))
            packed = PackedSequence(self.before(before_P)[order_P], torch.bincount(offset_P).cpu())
            states_PW, _, _, _ = self.decoder(packed, start_RW[None])[0]
            logits_PV = self.symbols(states_PW)
        logits_PV = torch.empty_like(logits_PV).index_copy(0, order_P, logits_PV)[:-1]
        return ByteScores(logits_PV, torch.ones_like(batch.kl_P))
