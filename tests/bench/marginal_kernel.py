"""Time and memory of head and `token_marginal` on a GPU, forward and backward, beside a fused cross-entropy.

    .venv/bin/python -m tests.bench.marginal_kernel [--tokens 4096] [--hidden 896] [--rounds 20]

The states are random, the rows those of this project's texts in a vocabulary of 151,936 columns. One line of JSON a
way: milliseconds (the median), GiB at most, and the time as a multiple of cross-entropy's in one chunk of torch's own
operations; of Liger's too, if it is installed. The ways take turns. It also says how far the Triton kernels' loss and
gradient are from those of torch's own operations.
"""

import importlib
import json
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from stage2_student.data.examples import NO_LABEL
from stage2_student.interfaces import OrderableHead
from stage2_student.interfaces.token_marginal.node_sums import Memory
from tests.bench.bytes_moved import WIDTH, Batch, make_batch

Way = Callable[[], Tensor]


def measure(way: Way, head: nn.Linear, states: Tensor) -> tuple[float, float]:
    """Return the milliseconds of a loss and its gradient, and the GiB at most."""
    head.weight.grad = states.grad = None
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    started = time.perf_counter()
    with torch.autocast("cuda", torch.bfloat16):
        loss = way()
    loss.backward()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started), torch.cuda.max_memory_allocated() / 2**30


def marginal(batch: Batch, head: nn.Linear, states: Tensor) -> Way:
    """Return what computes bytes and tokens of a micro-batch."""
    interface, micro = batch.interface.cuda(), batch.micro.to("cuda")

    def way() -> Tensor:
        orderable = OrderableHead(lambda some: head(some), head, lambda logits: logits)
        scores = interface.scores(states, micro, orderable)
        assert scores.token_nats_N is not None
        chosen = scores.logits_PV.gather(1, micro.symbols_P[:, None].long().clamp(max=255))
        return scores.token_nats_N.sum() - chosen.sum()

    return way


def main(
    tokens: Annotated[int, typer.Option(help="tokens of the micro-batch")] = 4096,
    hidden: Annotated[int, typer.Option(help="width of the states")] = 896,
    rounds: Annotated[int, typer.Option(help="timed steps of each way")] = 20,
) -> None:
    """Measure, and print a line for each way."""
    if not torch.cuda.is_available():
        raise SystemExit("tests.bench.marginal_kernel needs a GPU, and torch finds none on this machine.")
    from stage2_student.interfaces.token_marginal import kernel_triton

    torch.manual_seed(0)
    head = nn.Linear(hidden, WIDTH, bias=False, device="cuda")
    kept, none = (Memory(number, tokens) for number in (2 * tokens, 0))
    batches = {
        "triton, kept": make_batch(tokens, (kernel_triton.KERNELS, kept)),
        "triton, computed again": make_batch(tokens, (kernel_triton.KERNELS, none)),
        "torch": make_batch(tokens, None),
    }
    micro = batches["torch"].micro
    states = torch.randn(*micro.tokens_BL.shape, hidden, device="cuda", requires_grad=True)
    labels = micro.labels_BL.cuda()

    def plain() -> Tensor:
        logits = head(states.flatten(0, 1))
        return cross_entropy(logits, labels.flatten(), ignore_index=NO_LABEL, reduction="sum")

    ways: dict[str, Way] = {"cross-entropy": plain}
    if find_spec("liger_kernel") is not None:
        fused = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(reduction="sum")
        ways["cross-entropy, liger"] = lambda: fused(head.weight, states.flatten(0, 1), labels.flatten())
    ways |= {name: marginal(batch, head, states) for name, batch in batches.items()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    gradients = {}
    for number in range(rounds + 2):
        for name, way in ways.items():
            measured = measure(way, head, states)
            if number == 0:  # Triton compiles
                assert head.weight.grad is not None
                gradients[name] = head.weight.grad.flatten()[:: 1 + head.weight.numel() // 10_000_000].clone()
            if number > 1:
                found[name].append(measured)
    for name, values in found.items():
        milliseconds, gib = (statistics.median(column) for column in zip(*values, strict=True))
        line = {"way": name, "ms": round(milliseconds, 2), "GiB": round(gib, 2)}
        for base in ("cross-entropy", "cross-entropy, liger"):
            if base in found:
                ratio = statistics.median(own[0] / other[0] for own, other in zip(values, found[base], strict=True))
                line[f"of {base}"] = round(ratio, 3)
        if name.startswith("triton"):
            line["cosine to torch"] = round(float(cosine_similarity(gradients[name], gradients["torch"], dim=0)), 6)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    typer.run(main)
