"""Comparison with genlm-bytes (Vieira et al., arXiv:2412.03719): cost and divergence.

Both run on one model and text.

    .venv/bin/python -m tests.bench.genlm_bytes --genlm-python /path/to/python
        [--documents 3] [--max-bytes 400] [--beam 5,10]

Both sides run the same weights in float32 on the same machine, one document at a time, after a warm-up; loading is not
timed. CPU seconds are those of all threads, for a machine that has other work. The divergences are to a covering that
is much wider than any of the others (`REFERENCE`), over all positions of all documents, the end's included. The last
column does not depend on that choice: a prefix mass that a method finds is a lower bound of the exact one. It says by
how many nats a document's own mass falls short of the reference's; negative is better than it. (`redistribute_dropped`
changes no mass; its figure differs from the canonical one because a mass is read off the target's symbol before it.)

One END for both sides: genlm-bytes has no tokens that spell nothing, and would read `<|im_end|>` as a `<`. So every
control token of the tokenizer means END here, in our targets and among genlm-bytes' `eos_byte_strings`. Both then let
it come only where a token may begin, nothing has to be masked or renormalised, and the distributions are compared over
all 256 symbols.

`contexts` are the distinct token paths that the model was asked about. A token costs us one forward whatever path it
stands on; genlm-bytes' transformers backend keeps results but no keys and values, so each context is computed from its
start: `tokens`, without padding. With a prefix cache (its vLLM backend) `contexts` is what would be left.
"""

import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from pipeline.config import CoveringConfig, Recipe
from pipeline.config.loading import load_recipe
from pipeline.corpus.documents import Document
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage1_teacher.inputs.encoded_windows import cut_document
from stage1_teacher.targets.opening import open_teacher
from stage1_teacher.targets.resolved import load_tokenizer
from stage1_teacher.targets.teacher import Teacher
from tests.bench.texts import encyclopaedic

REFERENCE = CoveringConfig(beam_width=32, branch_threshold=1e-4, rejoin_after_tokens=None)
OURS = {
    "canonical": CoveringConfig(),
    "canonical, redistribute_dropped": CoveringConfig(redistribute_dropped=True),
    "threshold 0.1, width 10": CoveringConfig(beam_width=10, branch_threshold=0.1),
    "threshold 0.03, width 10": CoveringConfig(beam_width=10, branch_threshold=0.03),
    "threshold 0.01, width 10": CoveringConfig(beam_width=10, branch_threshold=0.01),
}
FLOOR = 1e-12
HOW_TO_INSTALL = (
    "genlm-bytes needs a Python of its own, since its dependencies clash with ours: `python3.11 -m venv X && "
    "X/bin/pip install torch --index-url https://download.pytorch.org/whl/cpu && "
    "X/bin/pip install genlm-bytes==0.2.0`, "
    "then --genlm-python X/bin/python"
)


@dataclass(frozen=True)
class Result:
    """One method's distributions, and what they took."""

    probs: list[np.ndarray]  # of each document, P x V
    log_mass: list[float]  # of each document, natural log
    calls: int
    contexts: int
    tokens: int
    seconds: float
    cpu_seconds: float  # of all threads


class Count:
    """Forwards of a model and the tokens in them."""

    def __init__(self, model: Any) -> None:
        self.calls = self.tokens = 0
        self.close = model.register_forward_pre_hook(self._add, with_kwargs=True).remove

    def _add(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls += 1
        self.tokens += kwargs["input_ids"].numel()


def cut(text: bytes, max_bytes: int) -> bytes:
    """Return the text's first bytes, at most that many, cut between two characters."""
    return text[:max_bytes].decode(errors="ignore").encode()


def same_teacher(path: str, max_bytes: int) -> tuple[Recipe, str, ByteTokenizer]:
    """Return the recipe, its model and its tokenizer for the comparison.

    The teacher runs in float32 through transformers, with every control token an END.
    """
    base = load_recipe(path, ["teacher.engine=transformers", "teacher.dtype=float32"])
    model, tokenizer, _ = load_tokenizer(base)
    # A token has at least one byte: each document is one window.
    update = {"end": tuple(sorted(tokenizer.control)), "max_tokens": max_bytes + 2, "overlap_tokens": 0}
    return base.with_values(teacher=base.teacher.model_copy(update=update)), model, tokenizer


def ours(opened: Teacher, recipe: Recipe, covering: CoveringConfig, documents: Sequence[bytes]) -> Result:
    """Return targets of the documents, each a batch of its own, from one teacher for all coverings."""
    recipe = recipe.with_values(dump=recipe.dump.model_copy(update={"covering": covering}))
    tokenizer = opened.tokenizer
    teacher = Teacher(recipe, opened.engine, opened.vocabulary, tokenizer, opened.start)
    count = Count(teacher.engine._model.model)  # type: ignore[union-attr]
    probs, log_mass, seconds, cpu_seconds = [], [], 0.0, 0.0
    for number, document in enumerate([documents[0][:40], *documents]):
        if number == 1:  # the first was the warm-up
            count.calls = count.tokens = 0
        started, cpu_started = time.perf_counter(), time.process_time()
        windows = cut_document(Document("", document, None), tokenizer, recipe.teacher.max_tokens, 0)
        [targets] = teacher.targets(windows, teacher.run_engine(windows))
        if number:
            seconds += time.perf_counter() - started
            cpu_seconds += time.process_time() - cpu_started
            probs.append(targets.probs_PV)
            # What was known just before the end: genlm-bytes, too, counts paths that it will not go on with.
            log_mass.append(float(np.log(targets.probs_PV[-2, document[-1]]) + targets.log_prefix_mass_P[-2]))
    count.close()
    return Result(probs, log_mass, count.calls, count.tokens, count.tokens, seconds, cpu_seconds)


def genlm(
    python: Path, recipe: Recipe, model: str, beam: int, prune_threshold: float, documents: Sequence[bytes]
) -> Result:
    """Run the same documents through genlm-bytes, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        lines = [json.dumps({"doc_id": str(n), "hex": text.hex()}) for n, text in enumerate(documents)]
        (Path(folder) / "documents.jsonl").write_text("\n".join(lines))
        out = Path(folder) / "out"
        # -I: no PYTHONPATH, so that it does not import our packages.
        command = [str(python), "-I", str(Path(__file__).with_name("genlm_worker.py"))]
        command += ["--documents", f"{folder}/documents.jsonl", "--model", model, "--out", str(out)]
        command += ["--beam", str(beam), "--prune-threshold", str(prune_threshold)]
        command += ["--start", str(recipe.teacher.start), "--end", *recipe.teacher.end]
        subprocess.run(command, check=True)
        counts = json.loads(out.with_suffix(".json").read_text())
        with np.load(out.with_suffix(".npz")) as found:
            probs = [np.exp(found[str(n)].astype(np.float64)) for n in range(len(documents))]
    log_mass = [counts["log_mass"][str(n)] for n in range(len(documents))]
    cost = (counts[key] for key in ("calls", "contexts", "tokens", "seconds", "cpu_seconds"))
    return Result(probs, log_mass, *cost)


def divergence(reference_PV: np.ndarray, probs_PV: np.ndarray) -> tuple[float, float, float]:
    """Return (KL(reference, probs), JSD, share of positions with a total variation above 0.05).

    KL and JSD are mean nats per position.
    """

    def kl(p_PV: np.ndarray, q_PV: np.ndarray) -> np.ndarray:
        return np.sum(p_PV * np.log(np.maximum(p_PV, FLOOR) / np.maximum(q_PV, FLOOR)), axis=1)

    middle_PV = (reference_PV + probs_PV) / 2
    jsd_P = (kl(reference_PV, middle_PV) + kl(probs_PV, middle_PV)) / 2
    variation_P = np.abs(reference_PV - probs_PV).sum(axis=1) / 2
    return float(kl(reference_PV, probs_PV).mean()), float(jsd_P.mean()), float((variation_P > 0.05).mean())


def row(name: str, result: Result, reference: Result, num_bytes: int) -> str:
    """Format a line of the table."""
    kl, jsd, far = divergence(np.concatenate(reference.probs), np.concatenate(result.probs))
    short = float(np.mean(np.subtract(reference.log_mass, result.log_mass)))
    cost = f"{result.calls / num_bytes:.3f} | {result.contexts / num_bytes:.2f} | {result.tokens / num_bytes:.2f}"
    speed = f"{num_bytes / result.seconds:.1f} | {num_bytes / result.cpu_seconds:.1f}"
    return f"| {name} | {cost} | {kl:.4f} | {jsd:.5f} | {far:.1%} | {speed} | {short:+.4f} |"


def main(
    genlm_python: Annotated[Path, typer.Option(help="a Python that has genlm-bytes 0.2.0")],
    documents: Annotated[int, typer.Option(help="encyclopaedic documents")] = 3,
    max_bytes: Annotated[int, typer.Option(help="bytes of each, at most")] = 400,
    beam: Annotated[str, typer.Option(help="genlm-bytes' K, several with commas")] = "5,10",
    # 0 is its default, 0.05 what its documentation shows.
    prune_threshold: Annotated[str, typer.Option(help="genlm-bytes' prune_threshold, several with commas")] = "0.05,0",
    recipe: Annotated[str, typer.Option(help="whose teacher to take")] = "pipeline/recipes/demo.yaml",
) -> None:
    """Print the table, a row as soon as it is known."""
    if not genlm_python.exists():
        raise typer.BadParameter(f"{genlm_python} does not exist. {HOW_TO_INSTALL}", param_hint="--genlm-python")
    if subprocess.run([str(genlm_python), "-I", "-c", "import genlm.bytes"], capture_output=True).returncode:
        raise typer.BadParameter(f"{genlm_python} has no genlm-bytes. {HOW_TO_INSTALL}", param_hint="--genlm-python")
    texts = [cut(text, max_bytes) for _, text in encyclopaedic(documents)]
    num_bytes = sum(map(len, texts))
    same, model, tokenizer = same_teacher(recipe, max_bytes)
    with open_teacher(same, model, tokenizer) as teacher:
        reference = ours(teacher, same, REFERENCE, texts)
        print(f"{documents} documents, {num_bytes} bytes; float32")
        print(
            "| method | calls per byte | contexts per byte | tokens per byte | KL(reference, target), nats | JSD, nats "
            "| total variation > 0.05 | bytes/s | bytes per CPU second | short of the reference's mass, nats |"
        )
        print("| --- " * 10 + "|", flush=True)
        print(row("reference", reference, reference, num_bytes), flush=True)
        for name, covering in OURS.items():
            print(row(name, ours(teacher, same, covering, texts), reference, num_bytes), flush=True)
    for threshold in map(float, prune_threshold.split(",")):
        for width in map(int, beam.split(",")):
            result = genlm(genlm_python, same, model, width, threshold, texts)
            print(row(f"genlm-bytes K={width}, prune {threshold:g}", result, reference, num_bytes), flush=True)


if __name__ == "__main__":
    typer.run(main)
