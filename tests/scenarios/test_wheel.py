"""The wheel, built and installed away from the checkout: everything that a command needs is in it.

Also in a folder that has packages named as ours, and where vLLM and DeepSpeed are not installed.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.support.small_dumps import make_dump
from tests.support.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "schemas", "stage1_teacher", "stage2_student")
OTHERS = ("pyproject.toml", "README.md", "LICENSE")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command; return its output. AssertionError with all its output if it fails."""
    code, said = result_of(*command, cwd=cwd, **environment)
    assert code == 0, said
    return said


def result_of(*command: str | Path, cwd: Path, **environment: str) -> tuple[int, str]:
    """Run a command; return its exit code and its output, with its errors if it fails."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GIT_", "BLD_"))}
    done = subprocess.run(command, cwd=cwd, env=known | environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + (done.stderr if done.returncode else "")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the working tree into a checkout of one commit.

    A build leaves folders behind, and a release has a revision.
    """
    folder = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "REVISION"))
    for name in OTHERS:
        shutil.copy(ROOT / name, folder)
    (folder / ".gitignore").write_text("__pycache__\nbuild/\n*.egg-info/\n", encoding="utf-8")
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    for arguments in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "release"]):
        run("git", *arguments, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    script = f"from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})"
    run(sys.executable, "-c", script, cwd=source)
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an environment with the wheel in it and everything else of this one; return its `bin`."""
    return installed(wheel, tmp_path_factory.mktemp("installed"), Path(sysconfig.get_path("purelib")))


@pytest.fixture(scope="module")
def bin_without_extras(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an environment as `bin_folder`, without vLLM and DeepSpeed; return its `bin`."""
    others = tmp_path_factory.mktemp("others")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if path.suffix != ".pth" and not path.name.lower().startswith(("vllm", "deepspeed")):
            (others / path.name).symlink_to(path)
    return installed(wheel, tmp_path_factory.mktemp("without"), others)


def installed(wheel: Path, folder: Path, others: Path) -> Path:
    """Install a wheel alone into a new environment, which has other packages from a folder; return its `bin`."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--disable-pip-version-check", wheel, cwd=folder)
    site = next(folder.glob("lib/python*/site-packages"))
    # A path alone: what an editable install of the checkout does on start-up is not done again.
    (site / "others.pth").write_text(f"{others}\n", encoding="utf-8")
    return folder / "bin"


def test_the_wheel_holds_the_packages_their_data_and_nothing_of_the_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in PACKAGES:
        ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
        ours |= {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.yaml")}
        assert ours <= names, ours - names
    assert {"schemas/README.md", "pipeline/REVISION"} <= names
    assert not [name for name in names if name.startswith("tests")]


def test_an_installed_bld_says_the_revision_that_its_wheel_was_built_from(
    source: Path, bin_folder: Path, tmp_path: Path
) -> None:
    revision = run("git", "rev-parse", "HEAD", cwd=source).strip()
    said = run(bin_folder / "bld", "--version", cwd=tmp_path).strip()
    version, _, short = said.removesuffix(")").partition(" (")
    assert version.startswith("bld 0.") and len(short) >= 7 and revision.startswith(short)


def test_an_installed_bld_finds_its_recipes_pins_and_modules(bin_folder: Path, tmp_path: Path) -> None:
    script = (
        "from importlib.util import find_spec; from pipeline.config.loading import *; "
        "print(find_spec('stage2_student.interfaces.linear').origin); "
        "print(*[load_recipe(name).teacher.model for name in recipe_names()], sep='\\n')"
    )
    where, *models = run(bin_folder / "python", "-c", script, cwd=tmp_path).splitlines()
    assert Path(where).is_relative_to(bin_folder.parent) and len(models) >= 6
    assert "to be downloaded" in run(bin_folder / "bld", "plan", "demo", cwd=tmp_path, BLD_CACHE=str(tmp_path / "none"))


RECIPE = """
corpus: {source: text.jsonl}
teacher: {model: model, engine: ENGINE}
dump: {path: dump}
student: {model: model, path: run}
"""
# A training loop in a folder with packages of its own under the names of ours, with and without using them.
LOOP = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from stage2_student.library import DistillationCollator, DumpDataset, byte_distillation_loss
model, tokenizer = AutoModelForCausalLM.from_pretrained("model"), AutoTokenizer.from_pretrained("model")
records = DumpDataset("dump")
batch = DistillationCollator(tokenizer, {"kl": 1.0})([records[0], records[1]])
loss = byte_distillation_loss(model(input_ids=batch["input_ids"]).logits, batch)
print(len(records), float(loss.nats) > 0)
"""


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a dump and a model in a folder that has packages named as ours."""
    folder = tmp_path_factory.mktemp("own")
    for name in ("pipeline", "schemas"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("WHOSE = 'the operator'\n", encoding="utf-8")
    tiny_model(folder / "model")
    make_dump(folder / "dump")
    (folder / "text.jsonl").write_text('{"text": "the thing"}\n', encoding="utf-8")
    for engine in ("vllm", "transformers"):
        (folder / f"{engine}.yaml").write_text(RECIPE.replace("ENGINE", engine), encoding="utf-8")
    return folder


def test_the_command_and_the_library_are_ours_in_a_folder_that_has_packages_of_the_same_names(
    bin_folder: Path, own_folder: Path
) -> None:
    assert "positions" in run(bin_folder / "bld", "inspect", "dump", cwd=own_folder)
    (own_folder / "loop.py").write_text(LOOP, encoding="utf-8")
    assert run(bin_folder / "python", "loop.py", cwd=own_folder).split() == ["24", "True"]
    (own_folder / "both.py").write_text("import pipeline\n" + LOOP, encoding="utf-8")
    code, said = result_of(bin_folder / "python", "both.py", cwd=own_folder)
    assert code == 1 and f"but {own_folder}/pipeline/__init__.py has been imported under that name" in said


def test_without_vllm_and_deepspeed_a_command_that_wants_them_says_what_to_install(
    bin_without_extras: Path, own_folder: Path
) -> None:
    def refused(*command: str) -> str:
        code, said = result_of(bin_without_extras / "bld", *command, cwd=own_folder)
        assert code == 1 and "Traceback" not in said
        return said

    assert "pip install 'byte-level-distillation[gpu]'" in refused("teacher", "vllm.yaml", "-o", "dump.path=new")
    assert "training needs DeepSpeed, which is not installed" in refused("student", "transformers.yaml")
    assert "positions" in run(bin_without_extras / "bld", "inspect", "dump", cwd=own_folder)
    (own_folder / "loop.py").write_text(LOOP, encoding="utf-8")
    assert run(bin_without_extras / "python", "loop.py", cwd=own_folder).split() == ["24", "True"]
