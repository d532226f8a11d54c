"""A linear head of 16-bit weights whose logits are float32, on a CPU or a GPU.

Models in 16 bits round their logits to 16 bits, which costs as much as storing them does (a KL of 7e-5 nats in
bfloat16). The products here are those of the same numbers, summed and kept in float32.

Shape legend: R rows, D hidden size, V token ids.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Let float32 matrix products on a CPU round their factors to bfloat16, and still accumulate in float32.

    Exact for factors that are bfloat16 numbers, and faster: oneDNN has kernels for it, which torch's default does not
    use (0.6 of the time on an AMD EPYC). The switch applies to the whole process, not to the thread; the engine's
    thread is the only one that multiplies matrices.
    """
    backend: Any = torch.backends.mkldnn  # whose stubs lack `matmul`
    products = backend.matmul
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


class Float32Head:
    """The head. On a CPU it holds a float32 copy of its weights, and a buffer: fresh pages cost as much as products."""

    def __init__(self, weight_VD: Tensor, bias_V: Tensor | None) -> None:
        self._dtype = weight_VD.dtype
        self._weight_VD = weight_VD.float() if weight_VD.device.type == "cpu" else weight_VD
        self._bias_V = None if bias_V is None else bias_V.float()
        self._buffer: Tensor | None = None

    def reorder(self, order_V: Tensor) -> None:
        """Put the products of the first ids into another order, on a CPU; those of further rows stay where they are.

        Args:
            order_V: the id, among today's, whose product each column is to hold.
        """
        rest = torch.arange(len(order_V), len(self._weight_VD))
        order_V = torch.cat([order_V, rest])
        self._weight_VD = self._weight_VD.index_select(0, order_V)
        if self._bias_V is not None:
            self._bias_V = self._bias_V.index_select(0, order_V)

    def __call__(self, states_RD: Tensor) -> Tensor:
        """Return the products, R x V float32. On a CPU the next call overwrites them."""
        if states_RD.device.type == "cpu":
            products_RV = self._buffer_of(len(states_RD))
            are_exact = self._dtype == states_RD.dtype == torch.bfloat16
            with bfloat16_products() if are_exact else nullcontext():
                torch.mm(states_RD.float(), self._weight_VD.T, out=products_RV)
        else:
            products_RV = torch.mm(states_RD, self._weight_VD.T, out_dtype=torch.float32)
        if self._bias_V is not None:
            products_RV += self._bias_V
        return products_RV

    def _buffer_of(self, num_rows: int) -> Tensor:
        if self._buffer is None or len(self._buffer) < num_rows:
            self._buffer = torch.empty(num_rows, len(self._weight_VD), dtype=torch.float32)
        return self._buffer[:num_rows]
