"""A document's teacher rows by their paths, each computed once and kept in a file.

Coverings choose among them.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from pipeline.config import CoveringConfig, Recipe
from pipeline.covering.branches import Branching
from pipeline.covering.branches import Path as TokenPath
from pipeline.covering.covering import Covering, ReducedRow
from pipeline.covering.vocabulary import Vocabulary
from pipeline.runtime.huggingface import load_config
from pipeline.sources.resolve import resolve_model, resolve_tokenizer
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage1_teacher.engines.base import Branches, BranchToken, EngineRequest
from stage1_teacher.engines.huggingface import TransformersEngine
from stage1_teacher.reduction.types import RowsAlong
from stage1_teacher.targets.resolved import resolve_ids

ROWS_AT_ONCE = 512


class BranchingTeacher:
    """A teacher that branches, in this process.

    Its trunk is computed when a row is needed that no file holds.
    """

    def __init__(self, recipe: Recipe, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._recipe, teacher = recipe, recipe.teacher
        source = resolve_model(teacher.source)
        self._model = source.source
        self.tokenizer = ByteTokenizer.load(resolve_tokenizer(teacher.tokenizer) if teacher.tokenizer else self._model)
        start, ends = resolve_ids(recipe, self.tokenizer)
        self.start = [] if start is None else [start]
        config = load_config(source).get_text_config()
        self.vocabulary = Vocabulary(self.tokenizer.token_bytes, ends, config.vocab_size)
        self._ends = ends

    @cached_property
    def engine(self) -> TransformersEngine:
        teacher, placement = self._recipe.teacher, self._recipe.placement
        return TransformersEngine(
            EngineRequest(self._model, teacher, placement, self.tokenizer, ends=self._ends, branches=True)
        )

    def covering(self, tokens: Sequence[int]) -> Covering:
        spelled = b"".join(self.tokenizer.token_bytes[token] or b"" for token in tokens)
        return Covering(self.vocabulary, tokens, spelled)


class DocumentRows:
    """Rows of one document requested so far; `file` keeps them from one run to the next."""

    def __init__(self, teacher: BranchingTeacher, text: bytes, max_tokens: int, file: Path) -> None:
        self._teacher, self._file = teacher, file
        self.tokens = teacher.tokenizer.encode(text)[:max_tokens]
        self.covering = teacher.covering(self.tokens)
        self.canonical: list[ReducedRow] = []
        self._rows: dict[TokenPath, ReducedRow] = {}
        self._numbers: dict[TokenPath, int] = {}
        self._branches: Branches | None = None
        if file.exists():
            self._load()
        else:
            [[self.canonical]] = self._opened().rows

    def cover(self, config: CoveringConfig) -> tuple[Branching, list[TokenPath]]:
        """Return the whole covering, and the paths of its branch rows."""
        branching = Branching(self.covering, self.tokens, config)
        branching.add_canonical(self.canonical)
        paths: list[TokenPath] = []
        while wanted := branching.branches_to_expand():
            round_paths = [branching.path(branch) for branch in wanted]
            new = [
                (path, branch.end) for path, branch in zip(round_paths, wanted, strict=True) if path not in self._rows
            ]
            for first in range(0, len(new), ROWS_AT_ONCE):
                self._compute(new[first : first + ROWS_AT_ONCE])
            branching.add(wanted, [self._rows[path] for path in round_paths])
            paths += round_paths
        return branching, paths

    def _opened(self) -> Branches:
        if self._branches is None:
            prompt, requests = [*self._teacher.start, *self.tokens], [RowsAlong.canonical(self.covering, 0)]
            self._branches = self._teacher.engine.branches([prompt], [requests])
        return self._branches

    def _compute(self, new: Sequence[tuple[TokenPath, int]]) -> None:
        """Compute rows, and recompute those on the way to them that only the file holds."""
        branches, tokens, taken, along = self._opened(), [], [], []
        for path, end in new:
            for length in range(1, len(path.tokens) + 1):
                part = TokenPath(path.num_canonical, path.tokens[:length])
                if part not in self._numbers:
                    parent = self._numbers.get(TokenPath(path.num_canonical, path.tokens[: length - 1]))
                    tokens.append(
                        BranchToken(0, len(self._teacher.start) + path.num_canonical, part.tokens[-1], parent)
                    )
                    self._numbers[part] = len(self._numbers)
                    # Those on the way may be along anything: their rows are not used.
                    along.append(RowsAlong.single(self.covering, end, 0))
            taken.append(len(tokens) - 1)
        rows = branches.extend(tokens, along)
        for (path, end), number in zip(new, taken, strict=True):
            self._rows[path] = rows[number]._replace(offset=end)

    def save(self) -> None:
        """Save masses as float32, flat; a row's intervals follow from its offset."""
        rows = [*self.canonical, *self._rows.values()]
        partial_file = self._file.with_suffix(".rows.partial")
        with partial_file.open("wb") as file:
            np.savez(
                file,
                masses=np.concatenate([row.masses_I for row in rows]).astype(np.float32),
                ends=np.array([row.end for row in rows]),
                next_tokens=np.array([row.token for row in rows]),
                offsets=np.array([row.offset for row in rows]),
                leaves=np.array([path.num_canonical for path in self._rows], dtype=np.int64),
                lengths=np.array([len(path.tokens) for path in self._rows], dtype=np.int64),
                tokens=np.array([token for path in self._rows for token in path.tokens], dtype=np.int64),
            )
        partial_file.replace(self._file)

    def _load(self) -> None:
        with np.load(self._file) as arrays:
            kept = {name: arrays[name] for name in arrays}
        offsets = kept["offsets"].tolist()
        edges = self.covering.intervals(offsets).row_intervals
        masses = np.split(kept["masses"].astype(np.float64), edges[1:-1])
        rows = [
            ReducedRow(*row)
            for row in zip(offsets, masses, kept["ends"].tolist(), kept["next_tokens"].tolist(), strict=True)
        ]
        bounds = pairwise(np.cumsum([0, *kept["lengths"].tolist()]).tolist())
        tokens = [tuple(kept["tokens"][first:last].tolist()) for first, last in bounds]
        paths = [TokenPath(*path) for path in zip(kept["leaves"].tolist(), tokens, strict=True)]
        self.canonical = rows[: len(self.covering.offsets)]
        self._rows = dict(zip(paths, rows[len(self.canonical) :], strict=True))
