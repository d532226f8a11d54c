"""A teacher's targets before they are made sparse.

Computed once per document, kept in a folder, read by the storage benchmarks.

Shape legend: P positions, V symbols (256), T tokens of the teacher.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.config import Recipe
from pipeline.corpus.documents import Corpus, Document
from pipeline.covering.targets import Targets
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage1_teacher.inputs.encoded_windows import EncodedWindow, cut_document
from stage1_teacher.targets.opening import open_teacher
from stage1_teacher.targets.resolved import load_tokenizer
from tests.bench.texts import news

_NAMES = ("probs_PV", "log_prefix_mass_P", "dropped_P", "token_end_P", "doubt_P", "token_logprobs")


@dataclass(frozen=True)
class Dense:
    """A window of a document, its targets (the tokenizer's prefix included) and the tokenizer that cut it."""

    window: EncodedWindow
    targets: Targets
    tokenizer: ByteTokenizer

    @property
    def num_bytes(self) -> int:
        return self.window.num_supervised


def dense_targets(recipe: Recipe, cell: str, documents: int, out: Path) -> list[Dense]:
    """Return the first documents of the recipe's corpus (cell `corpus`) or of the news, with targets.

    Targets are read from `out` if they are there, otherwise computed by the teacher.
    """
    folder = out / Path(recipe.teacher.model).name / cell
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer, _ = load_tokenizer(recipe)
    options = recipe.teacher.max_tokens, recipe.teacher.overlap_tokens
    windows = [window for text in _texts(recipe, cell, documents) for window in cut_document(text, tokenizer, *options)]
    paths = [folder / f"{index:05d}.npz" for index in range(len(windows))]
    missing = [(window, path) for window, path in zip(windows, paths, strict=True) if not path.exists()]
    if missing:
        with open_teacher(recipe, model, tokenizer) as teacher:
            for window, path in missing:
                [targets] = teacher.targets([window], teacher.run_engine([window]))
                _save(targets, path)
    return [Dense(window, _load(path), tokenizer) for window, path in zip(windows, paths, strict=True)]


def _texts(recipe: Recipe, cell: str, documents: int) -> list[Document]:
    if cell == "news":
        return [Document(name, text, None) for name, text in news(documents)]
    return list(Corpus(recipe.corpus.model_copy(update={"limit": documents})).documents())


def _save(targets: Targets, path: Path) -> None:
    arrays = {name: getattr(targets, name) for name in _NAMES}
    with path.with_suffix(".partial").open("wb") as file:
        np.savez(file, **{**arrays, "probs_PV": targets.probs_PV.astype(np.float32)})
    path.with_suffix(".partial").replace(path)


def _load(path: Path) -> Targets:
    with np.load(path) as arrays:
        found = {name: arrays[name].astype(np.float64) for name in _NAMES}
    probs_PV = found.pop("probs_PV")
    return Targets(probs_PV=probs_PV / probs_PV.sum(axis=1, keepdims=True), **found)
