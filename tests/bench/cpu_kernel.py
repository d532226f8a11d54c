"""Time of a row's sums on a CPU, for logits by token id and in byte order: CPU microseconds of one core.

    .venv/bin/python -m tests.bench.cpu_kernel [--tokenizers gpt2,llama3,gemma3] [--rounds 9]

The rows are those of English text, their logits random. In byte order come the logits of a float32 head in vLLM's
worker (`stage1_teacher.engines.vllm_worker`); others come by token id.
"""

import time
from typing import Annotated

import numpy as np
import typer

from pipeline.covering.covering import Covering
from pipeline.covering.vocabulary import Vocabulary
from pipeline.sources.resolve import resolve_tokenizer
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage1_teacher.reduction.cpu_kernel import reduce_range
from stage1_teacher.reduction.types import Masses
from tests.bench.host_path import SPREAD
from tests.bench.texts import encyclopaedic
from tests.support.families import FAMILIES

ROWS = 64


def times(name: str, rounds: int) -> tuple[int, float, float]:
    """Return the columns, and the least microseconds of a row by token id and in byte order."""
    tokenizer = ByteTokenizer.load(resolve_tokenizer(FAMILIES[name].source))
    width = len(tokenizer.token_bytes) + 1
    vocabulary = Vocabulary(tokenizer.token_bytes, [width - 1], width)
    tokens = tokenizer.encode(next(iter(encyclopaedic(1)))[1])[: ROWS - 1]
    covering = Covering(vocabulary, tokens, b"".join(tokenizer.token_bytes[token] or b"" for token in tokens))
    intervals, masses = covering.canonical, Masses.empty(covering.canonical)
    by_id_RV = (SPREAD * np.random.default_rng(0).normal(size=(ROWS, width))).astype(np.float32)
    by_column_RV = np.ascontiguousarray(by_id_RV[:, vocabulary.order])
    spent: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds + 1):  # the first compiles
        for in_byte_order, logits_RV in ((False, by_id_RV), (True, by_column_RV)):
            started = time.thread_time()
            sizes = (vocabulary.num_text_tokens, vocabulary.num_end)
            order_C = vocabulary.order.astype(np.int32)
            assert reduce_range(logits_RV, order_C, in_byte_order, 0, 0, intervals, *sizes, *masses[:5])
            spent[in_byte_order].append((time.thread_time() - started) / ROWS * 1e6)
    return width, min(spent[False]), min(spent[True])


def main(
    tokenizers: Annotated[str, typer.Option(help="with commas between")] = "gpt2,llama3,gemma3",
    rounds: Annotated[int, typer.Option(help="of which the quickest counts")] = 9,
) -> None:
    """Print a table."""
    print("| tokenizer | columns | by token id, us | in byte order, us |\n| --- | --- | --- | --- |")
    for name in tokenizers.split(","):
        width, by_id, by_column = times(name, rounds)
        print(f"| {name} | {width:,} | {by_id:.1f} | {by_column:.1f} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
