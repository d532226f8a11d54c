"""Products of 16-bit weights in float32, against float64."""

import pytest
import torch

from stage1_teacher.engines.float32_head import Float32Head


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_of_16_bit_weights_are_summed_and_kept_in_float32(dtype: torch.dtype, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(300, 64, generator=generator).to(dtype)
    bias_V = torch.randn(300, generator=generator).to(dtype) if has_bias else None
    head = Float32Head(weight_VD, bias_V)
    for num_rows in (5, 2, 9):  # the buffer is used again, and grows
        states_RD = torch.randn(num_rows, 64, generator=generator).to(dtype)
        exact_RV = states_RD.double() @ weight_VD.double().T + (0 if bias_V is None else bias_V.double())
        torch.testing.assert_close(head(states_RD).double(), exact_RV, rtol=0, atol=2e-5)
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"


@pytest.mark.parametrize("has_bias", [False, True])
def test_products_in_another_order_are_the_same_and_those_of_padding_stay(has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_VD, bias_V = torch.randn(300, 64, generator=generator).bfloat16(), torch.randn(300, generator=generator)
    head, states_RD = Float32Head(weight_VD, bias_V if has_bias else None), torch.randn(5, 64).bfloat16()
    before_RV = head(states_RD).clone()
    order_V = torch.randperm(290, generator=generator)
    head.reorder(order_V)
    torch.testing.assert_close(head(states_RD), before_RV[:, [*order_V.tolist(), *range(290, 300)]])
    head.reorder(order_V.argsort())
    torch.testing.assert_close(head(states_RD), before_RV)
