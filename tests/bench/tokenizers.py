"""Every supported tokenizer over 1,000 documents: are its tokens the document's bytes, and how fast is it?

    .venv/bin/python -m tests.bench.tokenizers [--documents 1000] [--only gpt2 --only gemma3]

Downloads up to 0.4 GB once (Gemma's weights are 238 MB of it, SmolLM2's 93 MB). A document that is not spelled exactly,
by a teacher or by a student, ends the run with an error, unless the tokenizer refuses it for a reason that is known of
it.
"""

import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from tests.bench import texts
from tests.support import families
from tests.support.unicode_texts import hostile, words

UNIGRAM = "unigram"
MAX_CHARACTERS = 4000  # of a document; whole modules of the standard library are some 20 kB


def documents(num_documents: int) -> tuple[list[bytes], list[bytes]]:
    """Return documents: fourteen twentieths real text, of all cells; then six generated, half of them hostile."""
    part = num_documents // 20
    cells = [
        *texts.encyclopaedic(3 * part),
        *texts.news(3 * part),
        *texts.code(3 * part),
        *texts.non_latin(4 * part),
        *texts.short(part),
    ]
    real = [text.decode()[:MAX_CHARACTERS].encode() for _, text in cells]
    num_hostile = num_documents - len(real) - 3 * part
    generated = [words(seed, 200) for seed in range(3 * part)] + [hostile(seed) for seed in range(num_hostile)]
    return real, [text.encode() for text in generated]


def rate(tokenizer: ByteTokenizer, corpus: list[bytes], rounds: int = 3) -> float:
    """Return the median seconds of one `encode_batch` of all documents, checks included."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        tokenizer.encode_batch(corpus)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def load(name: str) -> ByteTokenizer:
    if name != UNIGRAM:
        return families.load(name)
    with tempfile.TemporaryDirectory() as folder:
        return families.load_sentencepiece(families.train_sentencepiece(Path(folder) / "unigram.model"))


def describe(name: str, counts: Counter[str]) -> str:
    """Format `700 exact; 3 left out: reason`.

    Raises ValueError for a reason not known of that tokenizer.
    """
    known = (families.SPACE_MARK,) if name == UNIGRAM else families.FAMILIES[name].left_out
    reasons = {reason: number for reason, number in counts.items() if reason != "exact"}
    if not set(reasons) <= set(known):
        raise ValueError(f"{name} leaves documents out for reasons that are not known of it: {reasons}")
    return "; ".join([f"{counts['exact']} exact", *(f"{n} left out: {reason}" for reason, n in reasons.items())])


def main(
    documents_: Annotated[int, typer.Option("--documents", help="documents, at least 20")] = 1000,
    only: Annotated[list[str] | None, typer.Option(help="tokenizers; default: all")] = None,
) -> None:
    """Print the table."""
    real, generated = documents(documents_)
    corpus = real + generated
    num_bytes = sum(map(len, corpus))
    print(f"{len(corpus)} documents, {num_bytes} bytes; speed is of `encode_batch` over all, the check included\n")
    print(f"| tokenizer | kind | ids | {len(real)} of text | {len(generated)} generated | docs/s | MB/s | load s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    kinds = {name: family.kind for name, family in families.FAMILIES.items()}
    kinds[UNIGRAM] = "SentencePiece Unigram, trained here, dummy prefix"
    for name in only or kinds:
        started = time.perf_counter()
        tokenizer = load(name)
        load_seconds = time.perf_counter() - started
        found = [describe(name, families.check(tokenizer, part)) for part in (real, generated)]
        seconds = rate(tokenizer, corpus)
        print(
            f"| {name} | {kinds[name]} | {len(tokenizer.token_bytes)} | {found[0]} | {found[1]} "
            f"| {len(corpus) / seconds:.0f} | {num_bytes / seconds / 1e6:.2f} | {load_seconds:.1f} |",
            flush=True,
        )
        families.load.cache_clear()


if __name__ == "__main__":
    typer.run(main)
