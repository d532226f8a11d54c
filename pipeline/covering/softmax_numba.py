"""Parts of a softmax over float32 logits, compiled by numba for one core: maximum, exponentials, sums of ranges.

Columns are summed in float32 runs short enough to keep six digits, and the runs are summed in float64.
"""

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from pipeline.covering.covering import MIN_LOGIT

# Columns per float32 run, in at least 16 lanes: the error is below 256 ulp at worst, in practice 1e-6.
_RUN = 4096
_MIN_LOGIT = np.float32(MIN_LOGIT)
_LOG2_E = np.float32(1.4426950408889634)
_ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding it leaves the nearest integer in a float32's low bits
# 2**r on -0.5..0.5 to 1e-7 relative.
_P1, _P2, _P3 = np.float32(0.693147182), np.float32(0.240226462), np.float32(0.0555034801)
_P4, _P5, _P6 = np.float32(0.00961812911), np.float32(0.00133988), np.float32(0.000154353)


@intrinsic
def float_of_bits(_typing: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.int32), generate


@intrinsic
def bits_of_float(_typing: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.int32))

    return types.int32(types.float32), generate


# "contract" allows fused multiply-adds only: reordering would cancel `_ROUND` away.
@njit(fastmath={"contract"}, error_model="numpy")
def exp32(logit: Any) -> Any:
    """Compute exp of a float32 <= 0 to 4e-6 relative; written out so that the compiler vectorises it."""
    scaled = max(logit, _MIN_LOGIT) * _LOG2_E
    shifted = scaled + _ROUND
    r = scaled - (shifted - _ROUND)
    power = _P6 * r + _P5
    power = power * r + _P4
    power = power * r + _P3
    power = power * r + _P2
    power = power * r + _P1
    power = power * r + np.float32(1.0)
    return float_of_bits(bits_of_float(power) + (bits_of_float(shifted) << np.int32(23)))


@njit(error_model="numpy")
def largest32(bits_C: Any) -> Any:
    """Find the maximum of float32 values given as int32: non-negative floats are ordered like their bits."""
    largest = bits_C[0]
    for c in range(bits_C.shape[0]):
        largest = max(largest, bits_C[c])
    if largest < 0:  # all are negative: their bits decrease as the values increase
        for c in range(bits_C.shape[0]):
            largest = min(largest, bits_C[c])
    return float_of_bits(largest)


@njit(error_model="numpy")
def has_nan32(bits_C: Any) -> Any:
    """Return whether any of some float32 values, given as int32, is nan, of either sign."""
    largest = np.int32(0)
    for c in range(bits_C.shape[0]):
        largest = max(largest, bits_C[c] & np.int32(0x7FFFFFFF))
    return largest > np.int32(0x7F800000)  # the bits of infinity


@njit(fastmath={"reassoc", "nsz", "contract"}, error_model="numpy")
def sum32(probs_C: Any, first: int, last: int) -> Any:
    """Sum columns `first .. last - 1`, in float64."""
    total = 0.0
    for run in range(first, last, _RUN):
        part: Any = np.float32(0.0)
        for c in range(run, min(run + _RUN, last)):
            part += probs_C[c]
        total += part
    return total
