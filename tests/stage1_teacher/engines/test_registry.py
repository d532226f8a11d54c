"""Engines from a file of one's own: the page's example dumped, audited, verified and resumed; errors of faulty ones."""

import re
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.loading import load_recipe
from pipeline.dumps.licence import with_licence
from pipeline.planning.dry_run import print_plan
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from schemas import END
from schemas.manifest import Manifest, read_json
from schemas.shard import read_shard
from stage1_teacher.dump.run import run_teacher
from stage1_teacher.engines.base import EngineRequest
from stage1_teacher.engines.registry import engine_name, open_engine
from stage1_teacher.verification.verify import verify_dump
from tests.stage1_teacher.dump.test_run import TEXTS, content, dump, write_recipe

PAGE = Path(__file__).parents[3] / "stage1_teacher/README.md"
# All that transformers gives, by the protocol's names.
INNER = """
import transformers
from pipeline.config import EngineSpec
from stage1_teacher.engines.huggingface import TransformersEngine

ENGINE = EngineSpec(branches=BRANCHES, packages=("transformers",))

def make_engine(request):
    return TransformersEngine(request)
"""


@pytest.fixture
def bigram(tmp_path: Path) -> Path:
    [text] = re.findall(r"<!-- file: bigram.py -->\n```python\n(.*?)```\n", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "bigram.py").write_text(text, encoding="utf-8")
    return tmp_path / "bigram.py"


def overrides(engine: Path, model: Path) -> list[str]:
    return [
        f"teacher.engine={engine}",
        "teacher.model=bigram",
        f"teacher.tokenizer={model}",
        "teacher.prompt_logprobs=269",
    ]


def test_the_pages_engine_is_dumped_audited_verified_and_resumed(
    bigram: Path, tmp_path: Path, model: Path, tokenizer: ByteTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:6], top_k=256, min_prob=0.0)
    loaded = load_recipe(recipe, overrides(bigram, model))
    print_plan(loaded)
    assert "bigram at" in capsys.readouterr().out
    run_teacher(loaded)
    folder = tmp_path / "dump"
    identity = Manifest.load(folder).identity["teacher"]
    assert re.fullmatch(r"bigram\.py-[0-9a-f]{16}", identity["engine"])
    assert identity["weights_sha256"] is identity["dtype"] is None and identity["prompt_logprobs"] == 269
    assert read_json(folder / "audit.json")["documents"]
    made = content(folder)
    (folder / "shards" / "part-00001.parquet").unlink()
    run_teacher(loaded)
    assert content(folder) == made and verify_dump(folder, against_teacher=2) == []
    # The first symbol of each document, by brute force: the table's row of the start token, summed over what the tokens
    # begin with.
    end = tokenizer.control["<|endoftext|>"]
    request = EngineRequest("bigram", loaded.teacher, loaded.placement, tokenizer, ends=(end,))
    row_V = np.exp(open_engine(request).logprobs[end])  # type: ignore[union-attr]
    expected_S = np.zeros(256)
    expected_S[END] = row_V[end]
    for token, spelled in enumerate(tokenizer.token_bytes):
        if spelled and spelled[0] != END:  # no text holds a byte 0xFF
            expected_S[spelled[0]] += row_V[token]
    records = [record for path in (folder / "shards").glob("*.parquet") for record in read_shard(path)]
    assert len(records) == 6
    for record in records:
        first = slice(0, int(record.entry_counts[0]))
        stored = np.exp(record.logprobs[first].astype(np.float64))
        np.testing.assert_allclose(stored, (expected_S / expected_S.sum())[record.symbols[first]], rtol=1e-3)


def test_another_content_of_the_file_is_refused_by_name_on_resume_or_accepted(
    bigram: Path, tmp_path: Path, model: Path
) -> None:
    loaded = load_recipe(write_recipe(tmp_path, model, TEXTS[:6]), overrides(bigram, model))
    run_teacher(loaded)
    bigram.write_text(bigram.read_text() + "# the same, said otherwise\n")
    assert any("which is another one" in fault for fault in verify_dump(tmp_path / "dump", 1))
    (tmp_path / "dump" / "shards" / "part-00001.parquet").unlink()
    said = (
        r"holds another dump: teacher\.engine: 'bigram\.py-\w{16}' there, 'bigram\.py-\w{16}' here"
        r".*--accept-engine bigram\.py-"
    )
    with pytest.raises(ValueError, match=said):
        run_teacher(loaded)
    run_teacher(loaded, accept_engine=engine_name(loaded.teacher, loaded.placement))
    assert verify_dump(tmp_path / "dump", against_teacher=1) == []
    bigram.write_text(bigram.read_text().replace("default_rng(0)", "default_rng(1)"))  # another table
    (tmp_path / "dump" / "shards" / "part-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"from the model's own"):
        run_teacher(loaded, accept_engine=engine_name(loaded.teacher, loaded.placement))


def test_opening_a_dump_runs_nothing_of_the_file_that_made_it(bigram: Path, tmp_path: Path, model: Path) -> None:
    loaded = load_recipe(write_recipe(tmp_path, model, TEXTS[:6]), overrides(bigram, model))
    run_teacher(loaded)
    marked = bigram.read_text()
    bigram.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{marked}")
    read = load_recipe(tmp_path / "dump" / "recipe.yaml")
    assert with_licence(read, "bigram") == read and verify_dump(tmp_path / "dump") == []
    assert any("another one" in fault for fault in verify_dump(tmp_path / "dump", 1))  # held against its hash first
    assert not (tmp_path / "ran").exists()
    bigram.unlink()
    load_recipe(tmp_path / "dump" / "recipe.yaml")
    assert verify_dump(tmp_path / "dump") == []


def test_an_engine_that_came_with_a_dump_is_not_run_to_verify_it(bigram: Path, tmp_path: Path, model: Path) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:6])
    run_teacher(load_recipe(recipe, overrides(bigram, model)))
    inside = bigram.rename(tmp_path / "dump" / "bigram.py")
    made_by = tmp_path / "dump" / "recipe.yaml"
    made_by.write_text(made_by.read_text().replace(str(bigram), str(inside)))
    with pytest.raises(ValueError, match=r"bigram\.py lies in the dump"):
        verify_dump(tmp_path / "dump", against_teacher=1)


@pytest.mark.parametrize("branches", [False, True])
def test_an_engine_of_ones_own_that_sums_rows_makes_the_dump_of_the_one_that_it_wraps(
    tmp_path: Path, model: Path, branches: bool
) -> None:
    own = tmp_path / "inner.py"
    own.write_text(INNER.replace("BRANCHES", str(branches)))
    plain = dump(write_recipe(tmp_path / "plain", model, TEXTS[:6]))
    mine = dump(write_recipe(tmp_path / "mine", model, TEXTS[:6]), f"teacher.engine={own}")
    theirs, ours = (read_json(folder / "audit.json") for folder in (plain, mine))
    for name in content(plain):
        for one, other in zip(read_shard(plain / "shards" / name), read_shard(mine / "shards" / name), strict=True):
            np.testing.assert_array_equal(one.symbols, other.symbols)
            np.testing.assert_array_equal(one.logprobs, other.logprobs)
    assert (theirs == ours) == branches  # without branches there is no wide covering to compare with
    assert re.fullmatch(r"inner\.py-transformers-[\d.]+-\w{16}", Manifest.load(mine).identity["teacher"]["engine"])
    if not branches:
        with pytest.raises(ValueError, match=r"inner\.py computes no branches; use dump\.covering\.beam_width=0"):
            dump(tmp_path / "mine" / "recipe.yaml", f"teacher.engine={own}", "dump.covering.beam_width=2")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ENGINE = EngineSpec(served=True, whole_softmax=False)\n", "defines no `make_engine`; .*README"),
        ("def make_engine(r): ...\n", "defines no `ENGINE`; stage1_teacher/README.md has an example"),
        ("x = 1\nENGINE = EngineSpec(served=bool(x))\n", r"mine.py, line 2: `ENGINE` must be EngineSpec\(keyword"),
        ("ENGINE = EngineSpec(serves=True)\n", "mine.py: ENGINE.serves: Extra inputs"),
        ("ENGINE = EngineSpec(module='m')\n", "mine.py: ENGINE.module: leave it out"),
        ("ENGINE = EngineSpec(served=True)\n", "a served engine gives no whole softmax"),
        ("ENGINE = EngineSpec(\n", "mine.py, line 1: SyntaxError"),
        (
            "from pipeline.config import EngineSpec\nENGINE = EngineSpec(served=True, whole_softmax=False)\n"
            "def make_engine(r):\n"
            "    return object()\n",
            "mine.py: make_engine returns a object without listed_rows, close, "
            "which stage1_teacher.engines.base.ListingEngine",
        ),
        (
            "from typing import NamedTuple\nfrom pipeline.config import EngineSpec\n"
            "ENGINE = EngineSpec(served=True, whole_softmax=False)\n"
            "class Mine(NamedTuple):\n"
            "    def listed_rows(self, prompts): ...\n"
            "    def close(self): ...\n"
            "def make_engine(r):\n"
            "    return Mine()\n",
            "mine.py: make_engine returns a Mine whose `name` and `cannot_branch` cannot be set",
        ),
        (
            "from pipeline.config import EngineSpec\nENGINE = EngineSpec(served=True, whole_softmax=False)\n"
            "def make_engine(r):\n"
            "    return 1 / 0\n",
            "mine.py, line 4: ZeroDivisionError",
        ),
        (
            "ENGINE = EngineSpec(served=True, whole_softmax=False, packages=('no-such-thing',))\n",
            "names the package no-such-thing, which is not installed",
        ),
    ],
)
def test_a_faulty_file_is_named_with_what_it_lacks(tmp_path: Path, model: Path, text: str, said: str) -> None:
    if "import" not in text and "make_engine`" in said:
        text = f"from pipeline.config import EngineSpec\n{text}"
    (tmp_path / "mine.py").write_text(text)
    recipe = write_recipe(tmp_path, model, TEXTS[:2])
    with pytest.raises(ValueError, match=said):
        run_teacher(load_recipe(recipe, overrides(tmp_path / "mine.py", model)))
