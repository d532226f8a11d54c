"""Parts of a softmax over float32 logits, compiled by numba for one core: maximum, exponentials, sums of ranges.

Columns are summed in float32 runs short enough to keep six digits, and the runs are summed in float64.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from pipeline.covering.covering import MIN_LOGIT

LANES = 16
# Columns per float32 run, in 16 lanes: the error is below 256 ulp at worst, in practice 1e-6.
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
def finite_largest32(bits_C: Any) -> Any:
    """Do what `largest32` does, or return nan if the maximum is not finite or any value is nan, of either sign."""
    largest, magnitude = bits_C[0], np.int32(0)
    for c in range(bits_C.shape[0]):
        largest = max(largest, bits_C[c])
        magnitude = max(magnitude, bits_C[c] & np.int32(0x7FFFFFFF))
    if magnitude > np.int32(0x7F800000):  # the bits of infinity
        return np.float32(np.nan)
    found = float_of_bits(largest) if largest >= 0 else largest32(bits_C)
    return found if np.isfinite(found) else np.float32(np.nan)


@intrinsic
def _sum_lanes(_typing: Any, values: Any, first: Any, last: Any) -> Any:
    """Sum float32 values `first .. last - 1` of at least `LANES`, in as many lanes.

    Written as vector instructions: a compiler adds what is left after the last whole vector one by one, which takes
    longer than all else in ranges of a few hundred columns.
    """
    if values.layout != "C" or values.dtype != types.float32:
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        first, last = args[1:]
        lanes_of, flags = ir.VectorType(ir.FloatType(), LANES), ["reassoc", "nsz"]
        index_of = ir.VectorType(first.type, LANES)
        zeros = ir.Constant(lanes_of, [0.0] * LANES)

        def load(index: Any) -> Any:
            loaded = builder.load(builder.bitcast(builder.gep(data, [index]), lanes_of.as_pointer()))
            loaded.align = 4
            return loaded

        def in_all_lanes(index: Any) -> Any:
            undefined = ir.Constant(index_of, ir.Undefined)
            one = builder.insert_element(undefined, index, ir.Constant(ir.IntType(32), 0))
            return builder.shuffle_vector(
                one, undefined, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
            )

        lanes = cgutils.alloca_once_value(builder, zeros)
        size = ir.Constant(first.type, LANES)
        rest = builder.add(first, builder.and_(builder.sub(last, first), ir.Constant(first.type, -LANES)))
        with cgutils.for_range_slice(builder, first, rest, size, first.type) as (index, _):
            builder.store(builder.fadd(builder.load(lanes), load(index), flags=flags), lanes)
        # The rest, in a vector that ends at `last`, or starts at the first value of all: within the array.
        back = builder.sub(last, size)
        zero = ir.Constant(first.type, 0)
        start = builder.select(builder.icmp_signed("<", back, zero), zero, back)
        columns = builder.add(in_all_lanes(start), ir.Constant(index_of, list(range(LANES))))
        is_rest = builder.and_(
            builder.icmp_signed(">=", columns, in_all_lanes(rest)),
            builder.icmp_signed("<", columns, in_all_lanes(last)),
        )
        all_lanes = builder.fadd(builder.load(lanes), builder.select(is_rest, load(start), zeros), flags=flags)
        of_lanes = ir.FunctionType(ir.FloatType(), [ir.FloatType(), lanes_of])
        add = cgutils.get_or_insert_function(builder.module, of_lanes, f"llvm.vector.reduce.fadd.v{LANES}f32")
        return builder.call(add, [ir.Constant(ir.FloatType(), 0.0), all_lanes], fastmath=flags)

    return types.float32(values, types.int64, types.int64), generate


@njit(error_model="numpy")
def sum32(probs_C: Any, first: int, last: int) -> Any:
    """Sum columns `first .. last - 1`, in float64."""
    total = 0.0
    if probs_C.shape[0] < LANES:
        for c in range(first, last):
            total += probs_C[c]
        return total
    for run in range(first, last, _RUN):
        total += _sum_lanes(probs_C, run, min(run + _RUN, last))
    return total
