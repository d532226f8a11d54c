"""Time and memory of a training step with each interface, beside a step of plain cross-entropy on the same batch.

    .venv/bin/python -m tests.bench.interfaces [--dump runs/demo/dump] [--rounds 7] [--tokens 1024] [--vocabulary qwen]

A step is forward, backward and AdamW, in bfloat16 as the demo's. The variants take turns on the same weights and batch;
memory is the peak of the whole process within a step, weights and optimizer included. `--vocabulary gpt2` has 50k
tokens, `qwen` 150k.
"""

import ctypes
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer

from pipeline.config import Objectives, Recipe
from pipeline.config.loading import load_recipe
from pipeline.tokenization.special_ids import SpecialIds
from stage2_student.data.examples import NO_LABEL, Encoded, Masks, make_example
from stage2_student.data.micro_batch import MicroBatch, collate
from stage2_student.data.packing import plan_micro_batches
from stage2_student.data.reader import DumpReader
from stage2_student.interfaces import INTERFACES, Interface, StudentShape, make_interface
from stage2_student.model.initial_student import end_tokens, export_start, load_start, student_tokenizer
from stage2_student.model.student import Student
from tests.support.micro_batches import global_batches

TOKENIZERS = {
    "gpt2": "pypi:openai-whisper==20250625/whisper/assets/gpt2.tiktoken",
    "qwen": "pypi:dashscope==2.0.2/dashscope/resources/qwen.tiktoken",
}
CE_ONLY = Objectives(ce=1.0, byte_ce=0.0, kl=0.0)
WITH_BYTES = Objectives(ce=0.3, byte_ce=1.0, kl=1.0)


class Variant(NamedTuple):
    """A way to train."""

    name: str
    student: Student
    micro: MicroBatch
    prepare_seconds: float


class Figures(NamedTuple):
    """Figures of one step."""

    seconds: float
    cpu_seconds: float  # of all threads of this process: other processes matter less there
    peak_bytes: int


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory since `reset_peak`: the process's on a CPU, the allocator's on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) << 10


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what another variant has freed is not this one's
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def step(variant: Variant, optimizer: torch.optim.Optimizer, device: torch.device) -> Figures:
    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    optimizer.zero_grad(set_to_none=True)
    reset_peak(device)
    synchronise()
    started, cpu_started = time.monotonic(), time.process_time()
    nats, _ = variant.student(variant.micro)
    (nats / variant.micro.num_bytes).backward()
    optimizer.step()
    synchronise()
    return Figures(time.monotonic() - started, time.process_time() - cpu_started, peak_bytes(device))


def variants(
    recipe: Recipe, interfaces: Sequence[str], tokens: int, device: torch.device
) -> tuple[list[Variant], torch.optim.Optimizer]:
    """Return cross-entropy alone and these interfaces, on one model."""
    config = recipe.student
    assert config is not None
    tokenizer = student_tokenizer(config).tokenizer
    ids = end_tokens(config, tokenizer)
    lm = load_start(export_start(recipe), False).to(device).train()
    shape = StudentShape.of(lm, tokenizer, ids)
    batch = next(global_batches(DumpReader(Path(recipe.dump.path), 0), tokenizer, 8 * tokens, 512))
    lengths = [document.num_tokens for document in batch.documents]
    # Of micro-batches as the trainer packs them the fullest: with padding the model is charged for what no head sees.
    fullest = max(plan_micro_batches(lengths, tokens, 1)[0], key=lambda rows: sum(lengths[i] for [i] in rows))
    documents = [batch.documents[i] for [i] in fullest]
    found = []
    for name in (None, *interfaces):
        interface = None if name is None else make_interface(config.model_copy(update={"interface": name}), shape)
        objectives = CE_ONLY if interface is None else WITH_BYTES
        student = Student(lm, interface, recipe.train.model_copy(update={"objectives": objectives})).to(device)
        micro, seconds = _prepared(documents, interface, ids)
        found.append(Variant(name or "ce only", student, micro.to(device), seconds))
    parameters = {parameter: None for variant in found for parameter in variant.student.parameters()}
    return found, torch.optim.AdamW(parameters, lr=1e-6)


def _prepared(documents: Sequence[Encoded], interface: Interface | None, ids: SpecialIds) -> tuple[MicroBatch, float]:
    """Return a micro-batch and the seconds the interface took to prepare it, its caches warm."""
    masks = Masks(1.0, 0.05)
    max_bytes = 0 if interface is None else interface.max_bytes
    examples = [make_example(document, ids.document_start, ids.end, max_bytes, masks) for document in documents]
    micro = collate(examples)
    if interface is None:
        return micro, 0.0
    interface.prepare(documents, examples, micro)
    started = time.monotonic()
    extra = interface.prepare(documents, examples, micro)
    return replace(micro, extra=extra), time.monotonic() - started


def recipe_for(vocabulary: str, dump: Path, out: Path) -> Recipe:
    """Return the demo's student moved to another tokenizer."""
    recipe = load_recipe(Path("pipeline/recipes/demo.yaml"))
    assert recipe.student is not None
    student = recipe.student.model_copy(update={"tokenizer": TOKENIZERS[vocabulary], "path": str(out / vocabulary)})
    (out / vocabulary).mkdir(parents=True, exist_ok=True)
    return recipe.with_values(student=student, dump=recipe.dump.model_copy(update={"path": str(dump)}))


def main(
    dump: Annotated[Path, typer.Option(help="documents and targets to train on")] = Path("runs/demo/dump"),
    vocabulary: Annotated[str, typer.Option(help=f"one of {', '.join(TOKENIZERS)}")] = "gpt2",
    interface: Annotated[list[str] | None, typer.Option(help="which to measure, one or more; default: all")] = None,
    tokens: Annotated[int, typer.Option(help="student tokens of a step at most, padding included")] = 1024,
    rounds: Annotated[int, typer.Option(help="timed steps of each variant; the median counts")] = 7,
    out: Annotated[Path, typer.Option(help="where the moved student is kept")] = Path("runs/interfaces"),
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found, optimizer = variants(recipe_for(vocabulary, dump, out), interface or list(INTERFACES), tokens, device)
    steps: dict[str, list[Figures]] = {variant.name: [] for variant in found}
    for number in range(rounds + 1):
        for variant in found:
            figures = step(variant, optimizer, device)
            print(f"round {number}: {variant.name} {figures.seconds:.2f} s", file=sys.stderr, flush=True)
            if number:  # the first of each compiles and fills caches
                steps[variant.name].append(figures)
    report(found, steps)


def report(found: Sequence[Variant], steps: dict[str, list[Figures]]) -> None:
    """Print one line per variant; ratios are medians of each round's own, since a shared machine drifts."""
    floor = steps[found[0].name]
    micro = found[0].micro
    tokens = int((micro.labels_BL != NO_LABEL).sum())
    print(f"{tokens} supervised tokens, {micro.tokens_BL.numel()} with padding, {micro.num_bytes} bytes", flush=True)
    print("| interface | step, s | of ce only | CPU, s | of ce only | peak, GiB | of ce only | prepared in, s |")
    print("|" + " --- |" * 8)
    for variant in found:
        columns = []
        for own, base in zip(zip(*steps[variant.name], strict=True), zip(*floor, strict=True), strict=True):
            ratio = statistics.median(a / b for a, b in zip(own, base, strict=True))
            columns += [statistics.median(own), ratio]
        columns[4] /= 2**30
        figures = " | ".join(f"{value:.3f}" for value in [*columns, variant.prepare_seconds])
        print(f"| {variant.name} | {figures} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
