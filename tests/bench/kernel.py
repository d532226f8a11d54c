"""Time of the GPU's row reduction against the bandwidth of a copy on the same GPU.

    .venv/bin/python -m tests.bench.kernel [--rows 1024] [--rounds 20]

The bar is 60 % of copy bandwidth: logits are read once, so bytes are rows x columns x 4, and a copy reads and writes
each of its own.
"""

import statistics
from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

VOCABULARIES = {"SmolLM2": 49_152, "Llama 3": 128_256, "Qwen 2": 151_936, "Gemma 2": 262_144}
RANGES_PER_NODE = (170, 110, 50, 20, 10)  # from the root down; about as many as on English with SmolLM2


def milliseconds(run: Callable[[], object], rounds: int) -> float:
    """Return the median of `rounds` by the GPU's own clock, after three warm-up rounds."""
    times = []
    for number in range(rounds + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if number >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def copy_bandwidth(rounds: int) -> float:
    """Return bytes per second, read and written, of a device-to-device copy of 1 GiB."""
    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source), rounds) * 1e3


def nested_ranges(num_rows: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (row, first, last): five nested nodes per row, each a tenth as wide as the one around it."""
    rng = np.random.default_rng(0)
    rows, firsts, lasts = [], [], []
    for row in range(num_rows):
        low, high = 0, width
        for num_ranges in RANGES_PER_NODE:
            cuts = np.unique(rng.integers(low, high + 1, size=num_ranges + 1))
            rows.append(np.full(len(cuts) - 1, row))
            firsts.append(cuts[:-1])
            lasts.append(cuts[1:])
            size = max(4, (high - low) // 10)
            low = int(rng.integers(low, high - size + 1))
            high = low + size
    return np.concatenate(rows), np.concatenate(firsts), np.concatenate(lasts)


def main(
    rows: Annotated[int, typer.Option(help="rows reduced at once")] = 1024,
    rounds: Annotated[int, typer.Option(help="timed rounds; the median counts")] = 20,
) -> None:
    """Print a table: vocabulary, time per row, bytes per second, share of copy bandwidth."""
    if not torch.cuda.is_available():
        raise SystemExit("tests.bench.kernel times the reduction on a GPU, and torch finds none on this machine.")
    from stage1_teacher.reduction.triton_kernel import range_probs

    copied = copy_bandwidth(rounds)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; copy: {copied / 1e9:.0f} GB/s read and written\n"
    )
    print("| vocabulary | columns | microseconds/row | GB/s | share of copy |\n| --- | --- | --- | --- | --- |")
    for name, width in VOCABULARIES.items():
        logits_RV = torch.randn(rows, width, device="cuda") * 4
        row_J, first_J, last_J = (torch.from_numpy(a.astype(np.int32)).cuda() for a in nested_ranges(rows, width))
        order_C = torch.randperm(width, device="cuda", dtype=torch.int32)
        given = (logits_RV, order_C, row_J, first_J, last_J)
        spent = milliseconds(lambda: range_probs(*given), rounds)  # noqa: B023
        rate = logits_RV.nbytes / spent * 1e3
        print(f"| {name} | {width} | {spent / rows * 1e3:.2f} | {rate / 1e9:.0f} | {rate / copied:.0%} |", flush=True)
        check(*given)


def check(logits_RV: Tensor, order_C: Tensor, row_J: Tensor, first_J: Tensor, last_J: Tensor) -> None:
    """Check the first row's ranges against float64 prefix sums: a fast wrong kernel is useless."""
    from stage1_teacher.reduction.triton_kernel import range_probs

    found_J = range_probs(logits_RV, order_C, row_J, first_J, last_J)[0][row_J == 0].double()
    probs_C = logits_RV[0].double().softmax(0)[order_C.long()]
    sums_C = torch.cat([probs_C.new_zeros(1), probs_C.cumsum(0)])
    expected_J = sums_C[last_J[row_J == 0].long()] - sums_C[first_J[row_J == 0].long()]
    torch.testing.assert_close(found_J, expected_J, rtol=1e-4, atol=1e-12)


if __name__ == "__main__":
    typer.run(main)
