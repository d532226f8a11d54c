"""A sample of the matrix of families and tokenizers: the product agrees with the model, or refuses by name.

Some cells are drawn anew each day (`BLD_ZOO_SEED` repeats a draw), the known-hard ones are always there; `make bench
BENCH=zoo` runs all.
"""

import datetime
import json
import os
import random
import subprocess
from functools import cache
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from tests.bench.zoo import measure_apart, read, record
from tests.support import brute_force
from tests.zoo.cells import SMALL_KINDS, Cell, Outcome, all_cells
from tests.zoo.checks import Targets
from tests.zoo.measure import names_it, run
from tests.zoo.spellings import SMALL, Spelling, small
from tests.zoo.subject import TEXTS, Place
from tests.zoo.table import figures

SEED = int(os.environ.get("BLD_ZOO_SEED", datetime.date.today().toordinal()))
SLOW = ("longcat_flash",)  # tens of seconds
DRAWN = {"targets": 4, "eval": 3, "moved": 4}


HARD = [
    Cell(
        "targets", "modernbert-decoder", "byte-bpe", "transformers"
    ),  # layers between the trunk and the head's product
    Cell("targets", "llama4_text", "byte-bpe", "transformers"),  # no trunk under the usual name
    Cell("targets", "falcon_h1", "sp-bpe", "transformers"),  # the head times 0.04
    Cell("targets", "hyperclovax", "byte-bpe", "transformers"),  # logits_scaling multiplies
    Cell("targets", "granite", "byte-bpe", "transformers"),  # logits_scaling divides
    Cell("targets", "recurrent_gemma", "byte-bpe", "transformers"),  # logits_soft_cap
    Cell("targets", "xlstm", "byte-bpe", "transformers"),  # output_logit_soft_cap
    Cell("eval", "cohere", "byte-bpe"),
    Cell("eval", "granite", "sp-bpe"),
    Cell("moved", "llama", "sp-bpe", target="byte-bpe"),  # rows of byte-fallback tokens
    Cell("moved", "llama", "byte-bpe", target="sp-bpe"),  # twins of single characters
    Cell("moved", "phi", "sp-unigram", target="bytes"),
    Cell("moved", "qwen2", "ranks", target="byte-bpe"),  # transformers reads every tokenizer beside a qwen2 as Qwen's
    Cell("moved", "qwen2", "byte-bpe", target="sp-bpe"),
]


# What no engine makes right of it, and must be refused by name.
REFUSED = [
    Cell("targets", "xlnet", "byte-bpe", "transformers"),
    Cell("eval", "bert", "byte-bpe"),  # reads what follows
    Cell("eval", "xlnet", "byte-bpe"),
    Cell("eval", "qwen2", "sp-bpe"),  # transformers reads every tokenizer beside a qwen2 as Qwen's
    Cell("moved", "xglm", "sp-bpe", target="byte-bpe"),  # takes the id that pads for a position
]


def drawn() -> list[Cell]:
    """Draw a few cells of each cheap check, by the seed."""
    chance = random.Random(SEED)
    cells = [cell for cell in all_cells(with_real=False, with_vllm=False) if cell not in (*HARD, *REFUSED)]
    cells = [cell for cell in cells if cell.family not in SLOW]
    return [
        cell
        for check, number in DRAWN.items()
        for cell in chance.sample([cell for cell in cells if cell.check == check], number)
    ]


@pytest.fixture(scope="module")
def spelled(tmp_path_factory: pytest.TempPathFactory):
    work = tmp_path_factory.mktemp("tokenizers")
    return cache(lambda name: small(name, work))


@pytest.mark.parametrize("cell", [*HARD, *drawn()], ids=str)
def test_what_the_product_says_is_what_the_model_says_or_it_refuses_by_name(
    cell: Cell, spelled, tmp_path: Path
) -> None:
    outcome = run(cell, Place(tmp_path, spelled, SEED))
    assert outcome.status in ("right", "refused"), f"{cell}, BLD_ZOO_SEED={SEED}: {outcome.detail}"


@pytest.mark.parametrize("cell", REFUSED, ids=str)
def test_what_cannot_be_right_is_refused_by_name(cell: Cell, spelled, tmp_path: Path) -> None:
    outcome = run(cell, Place(tmp_path, spelled, SEED))
    assert outcome.status == "refused", outcome.detail


def test_what_is_trained_and_exported_and_what_vllm_serves_is_what_the_model_says(tmp_path: Path) -> None:
    families = ("llama", "mixtral", "gpt_neox", "qwen3", "gemma2")
    trained = Cell("trained", random.Random(SEED).choice(families), "byte-bpe")
    # A norm that is a part of the head; logits that are scaled in place.
    served = [Cell("targets", family, "byte-bpe", "vllm") for family in ("mimo", "cohere")]
    cells = [trained, *served]
    measure_apart([trained], tmp_path / "zoo.jsonl", SEED)
    measure_apart(served, tmp_path / "zoo.jsonl", SEED)
    found = read(tmp_path / "zoo.jsonl")
    assert set(found) == set(cells)
    for cell, outcome in found.items():
        assert outcome.status in ("right", "refused"), f"{cell}, BLD_ZOO_SEED={SEED}: {outcome.detail}"


def test_a_cell_whose_process_ends_is_wrong_and_the_cells_after_it_are_measured(tmp_path: Path, monkeypatch) -> None:
    out, asked = tmp_path / "zoo.jsonl", []
    cells = [Cell("eval", family, "byte-bpe") for family in ("llama", "gpt2", "opt")]

    def dies_at_the_second(command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
        asked.append([Cell(*json.loads(part)) for part in command if part.startswith("[")])
        if len(asked) == 1:
            record(out, cells[0], Outcome("right", ""))
            return subprocess.CompletedProcess(command, -11)
        for cell in asked[-1]:
            record(out, cell, Outcome("right", ""))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", dies_at_the_second)
    measure_apart(cells, out, 0)
    assert asked == [cells, cells[2:]]
    assert [outcome.status for outcome in read(out).values()] == ["right", "wrong", "right"]


@pytest.mark.parametrize(
    ("message", "is_one"),
    [
        ("falcon_h1: its logits are not the head's; use another teacher", True),
        ("FalconH1ForCausalLM scales its logits; give another engine", True),
        ("the head differs by 3.1; use another teacher", False),  # does not say whose
        ("falcon_h1: the head differs by 3.1", False),  # no way out
    ],
)
def test_a_refusal_names_what_it_refuses_and_a_way_out(message: str, is_one: bool) -> None:
    assert names_it(message, Cell("targets", "falcon_h1", "byte-bpe", "transformers")) == is_one


def test_the_zoo_has_thirty_families_and_every_kind_of_tokenizer_in_both_directions() -> None:
    cells = all_cells(with_real=False, with_vllm=False)
    for check in ("targets", "eval", "moved", "trained"):
        assert len({cell.family for cell in cells if cell.check == check}) >= 30
    assert {(cell.tokenizer, cell.target) for cell in cells if cell.check == "moved"} == set(permutations(SMALL, 2))
    assert tuple(SMALL) == SMALL_KINDS


def test_targets_by_brute_force_are_those_of_the_other_brute_force(spelled) -> None:
    """Two that know nothing of each other, on random distributions."""
    spelling: Spelling = spelled("sp-bpe")
    generator = np.random.default_rng(SEED)
    ids = spelling.encode(TEXTS[0])
    logprobs_RV = np.log(generator.dirichlet(np.full(len(spelling.token_bytes), 0.05), len(ids) + 1) + 1e-12)
    end = spelling.token_bytes.index(None)
    rows = {tuple(ids[:length]): np.exp(logprobs_RV[length]) for length in range(len(ids) + 1)}
    text = spelling.prefix + TEXTS[0].encode()
    expected = brute_force.canonical_targets(rows.__getitem__, spelling.token_bytes, {end}, ids, text)
    found = Targets(spelling, [end]).of(logprobs_RV, ids, TEXTS[0].encode())
    np.testing.assert_allclose(found, expected[len(spelling.prefix) :], rtol=1e-9, atol=1e-15)


def test_the_tables_say_the_worst_of_each_cell_and_name_apart_who_is_right_in_all() -> None:
    found = {
        Cell("targets", "llama", "byte-bpe", "transformers"): Outcome("right", ""),
        Cell("targets", "llama", "sp-bpe", "transformers"): Outcome("wrong", ""),
        Cell("targets", "gpt2", "byte-bpe", "transformers"): Outcome("right", ""),
        Cell("eval", "gpt2", "sp-bpe"): Outcome("right", ""),
        Cell("eval", "bert", "sp-bpe"): Outcome("refused", ""),
    }
    tables = figures(found)
    [counted] = tables["counts"]
    assert [counted[name] for name in ("families", "cells", "right", "refused", "wrong")] == [3, 5, 3, 1, 1]
    assert tables["right"] == [{"families with everything right": "`gpt2`"}]
    assert tables["families"] == [
        {"family": "`bert`", "teacher, transformers": None, "`bld eval`": "refused"},
        {"family": "`llama`", "teacher, transformers": "**WRONG**", "`bld eval`": None},
    ]
    assert "tokenizers" not in tables
