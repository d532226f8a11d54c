"""A model's mass on tokens that its tokenizer never yields, and how many of them it writes.

    .venv/bin/python -m tests.bench.reach runs/demo_mistral/student/start runs/demo_mistral/student/export
        [--recipe pipeline/recipes/demo_mistral.yaml]

On held-out text of the recipe's `eval` section, cut at 900 bytes in domain and 1,500 out; samples at temperature 1 from
the start token.
"""

import math
from itertools import islice
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor

from pipeline.config import CorpusConfig, student_config
from pipeline.config.loading import load_recipe
from pipeline.corpus.documents import Corpus
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.yielded_tokens import reachable
from stage2_student.model.initial_student import end_tokens, load_start


class Measured(NamedTuple):
    """Figures of some documents.

    Bits per byte of the model's own tokens, and the mean share of its mass on tokens that are not reached.
    """

    bits_per_byte: float
    unreachable: float


@torch.no_grad()
def measured(model: Any, tokenizer: ByteTokenizer, start_id: int, never_V: Tensor, documents: list[bytes]) -> Measured:
    nats, num_bytes, shares = 0.0, 0, []
    for document in documents:
        tokens_L = torch.tensor([start_id, *tokenizer.encode(document)])
        logprobs_LV = model(tokens_L[None]).logits[0].float().log_softmax(-1)
        nats -= float(logprobs_LV[:-1].gather(-1, tokens_L[1:, None]).sum())
        num_bytes += len(document)
        shares.append(logprobs_LV[:, never_V].exp().sum(-1))
    return Measured(nats / num_bytes / math.log(2), float(torch.cat(shares).mean()))


def cut(document: bytes, most: int) -> bytes:
    return document[:most].decode("utf-8", errors="ignore").encode()


def texts(corpus: CorpusConfig, count: int, skip: int, most: int) -> list[bytes]:
    return [
        cut(document.text, most)
        for document in islice(Corpus(corpus.model_copy(update={"limit": None, "skip": skip})).documents(), count)
    ]


def main(
    models: Annotated[list[str], typer.Argument(help="Folders of models with their tokenizer.")],
    recipe: str = "pipeline/recipes/demo_mistral.yaml",
    in_domain: Annotated[int, typer.Option(help="Documents of the corpus' kind.")] = 14,
    out_of_domain: Annotated[int, typer.Option(help="Documents of the other kind.")] = 6,
    skip: Annotated[str, typer.Option(help="Documents passed over first, of each kind.")] = "700,300",
    samples: Annotated[int, typer.Option(help="Texts that are written.")] = 16,
    sample_tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 128,
) -> None:
    """Print a line for each model."""
    base = load_recipe(recipe)
    assert base.eval is not None and base.eval.out_of_domain is not None
    skips = [int(part) for part in skip.split(",")]
    text = {
        "in": texts(base.eval.corpus, in_domain, skips[0], 900),
        "out": texts(base.eval.out_of_domain, out_of_domain, skips[1], 1500),
    }
    print(
        "| model | bits/byte in | bits/byte out | mass in | mass out | written |\n| --- | --- | --- | --- | --- | --- |"
    )
    for folder in models:
        model, tokenizer = load_start(folder, False).eval(), ByteTokenizer.load(folder)  # type: ignore[arg-type]
        start_id = end_tokens(student_config(base), tokenizer).start
        spells_V = torch.tensor([bool(spelled) for spelled in tokenizer.token_bytes])
        never_V = spells_V & ~torch.from_numpy(reachable(tokenizer))
        found = {name: measured(model, tokenizer, start_id, never_V, documents) for name, documents in text.items()}
        torch.manual_seed(0)
        starts = torch.full((samples, 1), start_id)
        written = model.generate(
            starts, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=sample_tokens, use_cache=True
        )[:, 1:]
        kept = written[spells_V[written]]
        share = float(never_V[kept].float().mean())
        bits = " | ".join(f"{found[name].bits_per_byte:.4f}" for name in text)
        masses = " | ".join(f"{found[name].unreachable:.2%}" for name in text)
        print(f"| {folder} | {bits} | {masses} | {share:.2%} of {len(kept)} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
