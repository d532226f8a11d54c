"""Checks of stage 1 in a cell: targets, log-probabilities of tokens and their alternatives, through an engine."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.config import Recipe
from pipeline.corpus.documents import Document
from pipeline.covering.covering import MIN_LOGIT, ReducedRow
from pipeline.covering.targets import Targets
from stage1_teacher.engines.vllm import generate_engine
from stage1_teacher.inputs.encoded_windows import cut_document
from stage1_teacher.targets.opening import open_teacher
from stage1_teacher.targets.resolved import load_tokenizer
from tests.zoo import checks
from tests.zoo.cells import Cell
from tests.zoo.models import save_tiny
from tests.zoo.spellings import Spelling
from tests.zoo.subject import PADDING, Place, WrongError, control_id, own_model, recipe_of, spelled_texts


def check_targets(cell: Cell, place: Place) -> str:
    """Check targets, token log-probabilities and alternatives through an engine against the model's own logits."""
    spelling = place.spelling(cell.tokenizer)
    folder = save_tiny(place.work / "model", cell.family, spelling.wrapped, place.seed, padding=PADDING)
    texts = spelled_texts(spelling)
    recipe = recipe_of(cell, place, folder, texts)
    # Before the engine: if vLLM runs transformers' code, it leaves modified classes behind.
    own, start = own_model(folder), control_id(spelling, spelling.start)
    rows = [checks.row_logprobs(own, start, spelling.encode(text)) for text in texts]
    named = load_tokenizer(recipe)
    teacher = open_teacher(recipe, *named)
    try:
        windows = [
            window
            for text in texts
            for window in cut_document(Document(text, text.encode(), None), named.tokenizer, 64, 8)
        ]
        output = teacher.run_engine(windows)
        found = list(zip(teacher.targets(windows, output), output.canonical_rows(), strict=True))
    finally:
        teacher.engine.close()
    worst = _worst_difference(spelling, texts, found, rows)
    if worst.is_small or cell.engine != "vllm":
        return worst.held_right()
    together = _rows_of_vllm(recipe, folder, spelling, texts)
    served = _worst_difference(spelling, texts, found, together)
    return f"vLLM's own logits: {served.held_right()}; transformers' are others: {worst}"


class Difference(NamedTuple):
    """The largest differences of all documents: of a target's probability, and of a token's nats."""

    probability: float
    nats: float

    @property
    def is_small(self) -> bool:
        return self.probability < 1e-3 and self.nats < 5e-3

    def held_right(self) -> str:
        """Describe the differences. Raises WrongError if they are not small."""
        if not self.is_small:
            raise WrongError(str(self))
        return str(self)

    def __str__(self) -> str:
        return f"targets differ by {self.probability:.1e}, tokens by {self.nats:.1e} nats"


def _worst_difference(
    spelling: Spelling,
    texts: Sequence[str],
    found: Sequence[tuple[Targets, Sequence[ReducedRow]]],
    rows: Sequence[np.ndarray],
) -> Difference:
    """Compare what the product found with brute force from `rows`, the log-probabilities of each text's rows."""
    brute = checks.Targets(spelling, [control_id(spelling, spelling.end)])
    probability, nats = 0.0, 0.0
    for text, (targets, reduced), logprobs_RV in zip(texts, found, rows, strict=True):
        ids = spelling.encode(text)
        off = targets.probs_PV[len(spelling.prefix) :] - brute.of(logprobs_RV, ids, text.encode())
        probability = max(probability, float(np.abs(off).max()))
        tokens = targets.token_logprobs - checks.token_logprobs(logprobs_RV, ids)
        others = _of_alternatives(reduced, logprobs_RV, control_id(spelling, spelling.end))
        nats = max(nats, float(np.abs(tokens).max()), others)
    return Difference(probability, nats)


def _of_alternatives(reduced: Sequence[ReducedRow], logprobs_RV: np.ndarray, end: int) -> float:
    """Return the largest difference of a row's most probable tokens, and of END, from the model's own, nats."""
    worst = 0.0
    for row, logprobs_V in zip(reduced, np.maximum(logprobs_RV, MIN_LOGIT), strict=True):
        assert len(set(row.top_ids_K.tolist())) == len(row.top_ids_K) == 7
        largest_K, own_K = np.sort(logprobs_V)[::-1][:7], logprobs_V[row.top_ids_K]
        differences = [row.top_logprobs_K - largest_K, row.top_logprobs_K - own_K, np.log(row.end) - logprobs_V[[end]]]
        worst = max(worst, *(float(np.abs(difference).max()) for difference in differences))
    return worst


def _rows_of_vllm(recipe: Recipe, folder: Path, spelling: Spelling, texts: Sequence[str]) -> list[np.ndarray]:
    """Return [R, V] of each text: what vLLM itself says of a prompt's tokens, by its prompt log-probabilities."""
    width = len(spelling.token_bytes) + PADDING
    generate = generate_engine(str(folder), recipe.teacher, recipe.placement, max_logprobs=width)
    start = control_id(spelling, spelling.start)
    prompts = [[start, *spelling.encode(text), start] for text in texts]  # the last for the row before it
    found = []
    for output in generate(prompts, width, False):
        rows = np.full((len(output.prompt_logprobs) - 1, width), -np.inf)
        for row, listed in zip(rows, output.prompt_logprobs[1:], strict=True):
            for token, said in listed.items():
                row[token] = said.logprob
        found.append(rows)
    return found
