"""Every supported tokenizer over 1,000 documents: are its tokens the document's bytes, and how fast are they made?

    .venv/bin/python -m tests.bench.tokenizers [--documents 1000] [--only gpt2 --only gemma3]

Downloads up to 0.4 GB once (Gemma's weights are 238 MB of it, SmolLM2's 93 MB). A document that is not spelled exactly, by a
teacher or by a student, ends the run with an error, unless the tokenizer refuses it for a reason that is known of it.
"""

import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from pipeline.tokenizer_bytes import ByteTokenizer
from tests import families
from tests.bench import texts
from tests.unicode_texts import hostile, words

UNIGRAM = "unigram"
MAX_CHARACTERS = 8000  # of a document; whole modules of the standard library are some 20 kB


def documents(num_documents: int) -> list[bytes]:
    """Fourteen twentieths real text, of all cells; six generated, half of these hostile."""
    part = num_documents // 20
    real = [
        *texts.encyclopaedic(3 * part),
        *texts.news(3 * part),
        *texts.code(3 * part),
        *texts.non_latin(4 * part),
        *texts.short(part),
    ]
    found = [text.decode()[:MAX_CHARACTERS].encode() for _, text in real]
    found += [words(seed, 200).encode() for seed in range(3 * part)]
    return found + [hostile(seed).encode() for seed in range(num_documents - len(found))]


def rate(tokenizer: ByteTokenizer, corpus: list[bytes], rounds: int = 3) -> float:
    """Median seconds of one `encode_batch` of all documents, checks included."""
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


def describe(counts: Counter[str]) -> str:
    return "; ".join(f"{number} {reason}" for reason, number in counts.items()) or "-"


def main(
    documents_: Annotated[int, typer.Option("--documents", help="documents, at least 20")] = 1000,
    only: Annotated[list[str] | None, typer.Option(help="tokenizers; default: all")] = None,
) -> None:
    """Print the table."""
    corpus = documents(documents_)
    num_bytes = sum(map(len, corpus))
    print(f"{len(corpus)} documents, {num_bytes} bytes\n")
    print("| tokenizer | kind | tokens | exact | left out, by reason | docs/s | MB/s | load s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    kinds = {name: family.kind for name, family in families.FAMILIES.items()}
    kinds[UNIGRAM] = "SentencePiece Unigram, trained here, dummy prefix"
    allowed = {name: family.left_out for name, family in families.FAMILIES.items()} | {UNIGRAM: (families.SPACE_MARK,)}
    for name in only or kinds:
        started = time.perf_counter()
        tokenizer = load(name)
        load_seconds = time.perf_counter() - started
        counts = families.check(tokenizer, corpus)
        seconds = rate(tokenizer, corpus)
        exact = counts.pop("exact", 0)
        unexpected = set(counts) - set(allowed[name])
        if unexpected:
            raise ValueError(f"{name} leaves documents out for reasons that are not known of it: {unexpected}")
        print(
            f"| {name} | {kinds[name]} | {len(tokenizer.token_bytes)} | {exact} | {describe(counts)} "
            f"| {len(corpus) / seconds:.0f} | {num_bytes / seconds / 1e6:.2f} | {load_seconds:.1f} |",
            flush=True,
        )
        families.load.cache_clear()


if __name__ == "__main__":
    typer.run(main)
