"""The page on plug-ins, followed to the letter, and the errors it quotes for faulty files.

Plug-ins are interfaces, objectives, tokenizer families and starts of new rows of one's own.
"""

import colorsys
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pipeline.config import Objectives
from pipeline.config.loading import load_recipe, save_recipe
from pipeline.config.student import INTERFACES as NAMES
from pipeline.runtime.plugins import run_file
from stage2_student.interfaces import INTERFACES
from stage2_student.losses.objectives import OBJECTIVES, ON_TOKENS
from tests.support.small_dumps import make_dump, make_recipe
from tests.support.tiny import tiny_model

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "stage2_student/interfaces/README.md"
FILE = re.compile(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```\n", re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the page's files, and a stand-in for the demo: a recipe of a tiny model and a dump."""
    folder = tmp_path_factory.mktemp("mine")
    for name, text in FILE.findall(PAGE.read_text(encoding="utf-8")):
        (folder / name).write_text(text, encoding="utf-8")
    tiny_model(folder / "model")
    make_dump(folder / "dump")
    tiny = make_recipe(folder / "dump", folder / "model", folder / "run", {"steps": 2, "objectives": {"ce": 1.0}})
    save_recipe(tiny, folder / "demo.yaml")
    return folder


def python(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_has_a_file_of_each_kind_a_recipe_and_the_command() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert [name for name, _ in FILE.findall(page)] == [
        "places.py",
        "focal.py",
        "wordy.py",
        "round_trip.py",
        "shared_first.py",
        "mine.yaml",
    ]
    assert "bld student demo -o mine.yaml\n" in page


def test_the_pages_tokenizer_spells_a_document_back(folder: Path) -> None:
    assert python(folder, "round_trip.py").endswith("it spells every document\n")


def test_the_pages_interface_objective_tokenizer_and_rows_train_a_student(folder: Path) -> None:
    recipe = load_recipe(folder / "demo.yaml", [str(folder / "mine.yaml"), "train.objectives.alm=0"])
    save_recipe(recipe, folder / "all.yaml")
    python(folder, "-m", "stage2_student.training.train", "--recipe", "all.yaml")
    run = folder / "runs/mine"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(0 < line["focal"] < line["byte_ce"] for line in lines)
    parts = sum(weight * lines[0][name] for name, weight in recipe.train.objectives.weights.items() if weight)
    assert math.isclose(lines[0]["loss"], parts, rel_tol=1e-6) and lines[1]["byte_ce"] < lines[0]["byte_ce"]
    identity = json.loads((run / "identity.json").read_text())
    assert set(identity["own_code"]) == {"places.py", "focal.py"}
    assert set(identity["student"]["rows_sha256"]) == {"shared_first.py"}
    assert json.loads((run / "start/transfer.json").read_text())["input"] == "shared_first.py"
    weights = load_file(run / "export" / "model.safetensors")
    assert weights["model.embed_tokens.weight"].shape[0] == 256 + 9 + 1 and not [n for n in weights if "place" in n]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("objective = 1 / 0\n", "error: bad.py, line 1: ZeroDivisionError"),
        (
            "import torch\ndef objective(seen):\n    return torch.empty(1 << 55)\n",
            "error: out of memory: .*tried to allocate .*Lower train.micro_batch_tokens",
        ),
    ],
)
def test_a_rank_says_what_is_wrong_in_a_line_without_traceback(folder: Path, code: str, said: str) -> None:
    (folder / "bad.py").write_text(code, encoding="utf-8")
    save_recipe(load_recipe(folder / "demo.yaml", ["train.objectives={bad.py: 1}"]), folder / "bad.yaml")
    command = [sys.executable, "-m", "stage2_student.training.train", "--recipe", "bad.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and re.search(said, done.stderr)
    assert "Traceback" not in done.stderr


def test_a_file_that_is_faulty_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    with pytest.raises(ValueError, match="is not a file"):
        run_file(str(file), "objective")
    for text, said in [
        ("x = 1\ny = undefined\n", r"mine.py, line 2: NameError: name 'undefined'"),
        ("x = 1\n\nif\n", r"mine.py, line 3: SyntaxError"),
        ("x = 1\n", r"mine.py defines no `objective`; .*README.md"),
    ]:
        file.write_text(text)
        with pytest.raises(ValueError, match=said):
            run_file(str(file), "objective")


def test_names_that_are_neither_known_nor_a_files_are_refused() -> None:
    assert set(NAMES) == set(INTERFACES) and set(Objectives.model_fields) == {*OBJECTIVES, *ON_TOKENS}
    for weights, said in [
        ({"cee": 1}, "'cee' is no objective; did you mean 'ce'"),
        ({"a/kl.py": 1}, "two objectives are called kl"),
        ({"mine.py": -1}, "greater than or equal to 0"),
        ({"mine.py": True}, "valid number"),
    ]:
        with pytest.raises(ValueError, match=said):
            Objectives.model_validate(weights)
    assert Objectives.model_validate({"mine.py": 0}).files == {}


def test_a_file_may_import_what_lies_beside_it_but_nothing_there_takes_the_place_of_what_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir("/")
    (tmp_path / "own_scale_of_mine.py").write_text("SCALE = 3\n")
    (tmp_path / "colorsys.py").write_text("rgb_to_hsv = None\n")
    file = tmp_path / "mine.py"
    file.write_text(
        "from colorsys import rgb_to_hsv\nfrom own_scale_of_mine import SCALE\nobjective = SCALE, rgb_to_hsv\n"
    )
    assert run_file(str(file), "objective") == (3, colorsys.rgb_to_hsv)
