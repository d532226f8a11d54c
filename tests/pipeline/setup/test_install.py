"""Decisions of set-up, without installing anything."""

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pipeline.setup import install, locks

PY311 = (3, 11)
PYPROJECT = """
[build-system]
requires = ["setuptools"]
[project]
name = "x"
dependencies = ["torch==2.13.0", "numpy{numpy}"]
[tool.ruff]
line-length = {length}
"""


def project(folder: Path, numpy: str = ">=2", length: int = 80) -> Path:
    (folder / "pyproject.toml").write_text(PYPROJECT.format(numpy=numpy, length=length))
    return folder


@pytest.mark.parametrize(
    ("asked", "found", "device"),
    [(None, False, "cpu"), (None, True, "gpu"), ("", True, "gpu"), ("cpu", True, "cpu"), ("gpu", False, "gpu")],
)
def test_the_operator_overrides_what_is_found(asked: str | None, found: bool, device: str) -> None:
    assert install.choose_device(asked, found) == device


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="BLD_DEVICE is 'tpu'; give cpu or gpu"):
        install.choose_device("tpu", False)


def test_a_folder_of_wheels_is_tried_before_pytorchs_index_and_on_a_cpu_only() -> None:
    known = {"UV_FIND_LINKS": "/links"}
    assert install.torch_sources("cpu", known) == [["--no-index", "--no-deps"], ["--torch-backend", "cpu"]]
    assert install.torch_sources("cpu", {}) == [["--torch-backend", "cpu"]]
    assert install.torch_sources("gpu", known) == [["--torch-backend", "auto"]]


Commands = list[tuple[list[list[str]], dict[str, str]]]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Collect the commands that an installation would run, with `/links` as pip's folder of wheels."""
    found: Commands = []
    monkeypatch.setattr(install, "find_environment", lambda python: {"UV_FIND_LINKS": "/links"})
    monkeypatch.setattr(install, "run", lambda tried, remedy, environment: found.append((tried, environment)))
    return found


def test_torch_comes_alone_and_first_and_each_build_leaves_the_others_out(commands: Commands) -> None:
    pin = install.torch_requirement(install.ROOT)
    for device, links, excluded in (("cpu", "/links", True), ("gpu", "", False)):
        install.install(Path("venv"), device)  # type: ignore[arg-type]
        (torch, environment), ([project], whole) = commands[-2:]
        assert all(pin in command and "-e" not in command for command in torch)
        assert environment["UV_FIND_LINKS"] == links and whole["UV_FIND_LINKS"] == "/links"
        assert project[project.index("-e") + 1] == f".[{device},eval,dev]" and "--compile-bytecode" in project
        assert all(("--excludes" in command) is excluded for command in (*torch, project))
        locked = [Path(after).name for before, after in pairwise(project) if before == "--constraint"]
        assert locked == ["common.txt", f"{device}.txt"]


def test_uv_is_not_held_to_the_locks_where_that_is_asked(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLD_LOCK", "off")
    install.install(Path("venv"), "gpu")
    assert "--constraint" not in commands[-1][0][0]


def test_commands_are_tried_in_turn_and_a_failure_of_all_names_the_last(capfd: pytest.CaptureFixture[str]) -> None:
    install.run([["sh", "-c", "echo first; false"], ["sh", "-c", "echo second"], ["sh", "-c", "echo third"]], "")
    assert capfd.readouterr().out == ""  # what was not the last resort is silent
    with pytest.raises(SystemExit):
        install.run([["false"], ["sh", "-c", "echo why; exit 3"]], "ask elsewhere")
    said = capfd.readouterr()
    assert "why" in said.out and "this command failed: sh -c echo why; exit 3\nask elsewhere" in said.err


PIP = (
    ":env:.find-links='/env/links'\n:env:.timeout='9'\nglobal.cert='/cert.pem'\n"
    "global.extra-index-url='\\nfile:///folder\\nhttps://extra.example/simple'\n"
    "global.find-links='/links /env/links'\n"
)


def test_uv_looks_where_pip_does_the_environment_first() -> None:
    found = install.uv_environment(PIP, {"PATH": "/bin", "VIRTUAL_ENV": "/other"})
    assert found == {
        "PATH": "/bin",
        "UV_FIND_LINKS": "/env/links,/links",
        "UV_INDEX": "https://extra.example/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "SSL_CERT_FILE": "/cert.pem",
    }
    both = ":env:.index-url='https://mirror.example/simple'\nglobal.index-url='https://file.example/simple'\n"
    assert install.uv_environment(both, {}) == {"UV_DEFAULT_INDEX": "https://mirror.example/simple"}
    assert install.uv_environment("", {}) == {}


def test_what_is_set_for_uv_itself_wins() -> None:
    index = {"UV_INDEX_URL": "https://own.example"}
    assert not {"UV_DEFAULT_INDEX", "UV_INDEX", "UV_INDEX_STRATEGY"} & set(install.uv_environment(PIP, index))
    own = {"UV_FIND_LINKS": "/own", "SSL_CERT_FILE": "/own.pem"}
    assert own.items() <= install.uv_environment(PIP, own).items()


@pytest.mark.parametrize("name", ["PIP_INDEX_URL", "UV_INDEX_URL"])
def test_uv_asks_the_index_that_the_environment_gives(name: str, tmp_path: Path) -> None:
    """Through the real pip and uv: uv cannot reach an index that does not exist, with a lock or without."""
    nowhere = "http://127.0.0.1:9/simple"
    own = {**{k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_"))}, name: nowhere}
    listing = [sys.executable, "-m", "pip", "config", "list"]
    said = subprocess.run(listing, env={**own, "PIP_CONFIG_FILE": os.devnull}, capture_output=True, text=True)
    environment = install.uv_environment(said.stdout, own) | {"UV_CACHE_DIR": str(tmp_path), "UV_HTTP_RETRIES": "0"}
    (tmp_path / "lock.txt").write_text(block("six", "1.17.0") + "\n")
    uv = [str(Path(sys.executable).with_name("uv")), "pip", "install", "--dry-run", "--target", str(tmp_path / "to")]
    done = subprocess.run(
        [*uv, "six", "-c", str(tmp_path / "lock.txt")], env=environment, capture_output=True, text=True
    )
    assert done.returncode and f"{nowhere}/six/" in done.stderr


def test_the_digest_follows_what_is_installed_and_nothing_else(tmp_path: Path) -> None:
    first = install.environment_digest(project(tmp_path), "cpu", PY311)
    assert install.environment_digest(project(tmp_path, length=100), "cpu", PY311) == first
    assert install.environment_digest(project(tmp_path, numpy=">=3"), "cpu", PY311) != first
    assert install.environment_digest(project(tmp_path), "gpu", PY311) != first
    assert install.environment_digest(project(tmp_path), "cpu", (3, 12)) != first


def test_an_up_to_date_environment_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Path] = []
    monkeypatch.setattr(install, "ROOT", project(tmp_path))
    monkeypatch.setattr(install, "make_environment", lambda venv: (venv.mkdir(exist_ok=True), made.append(venv)))
    monkeypatch.setattr(install, "install", lambda venv, device: None)
    monkeypatch.setenv("BLD_DEVICE", "cpu")
    for _ in range(2):
        install.main()
    assert len(made) == 1
    assert "up to date" in capsys.readouterr().out
    monkeypatch.setenv("BLD_DEVICE", "gpu")  # never both builds of vLLM: the environment is made anew
    install.main()
    assert len(made) == 2
    (tmp_path / ".venv/bld-stamp").unlink()  # it is written last: this one was left half made
    install.main()
    assert len(made) == 3


def block(name: str, version: str, digits: str = "a", marker: str = "") -> str:
    return f"{name}=={version}{marker} \\\n    --hash=sha256:{digits * 64} \\\n    --hash=sha256:{'b' * 64}"


def test_what_is_installed_or_wanted_is_held_to_the_locks(tmp_path: Path) -> None:
    common = [block("a-a", "1"), block("b", "2", marker=" ; sys_platform == 'nowhere'"), "c==3", block("torch", "9")]
    (tmp_path / "common.txt").write_text("# head\n" + "\n".join(common) + "\n")
    (tmp_path / "cpu.txt").write_text(block("d", "4") + "\n")
    pins = locks.read_pins(tmp_path, "cpu")
    assert pins == {"a-a": "1", "c": "3", "d": "4"}
    wanted = [Requirement(text) for text in ("A.a>=1", "d>=5", "e", "torch==2.13.0")]
    assert list(locks.faults(pins, wanted, {"a-a": "1.1", "c": "3.0+cpu", "d": "4", "own": "7"})) == [
        "a-a 1.1 is installed, but a-a==1 is locked: rm -rf .venv; make setup",
        "pyproject.toml requires d>=5, but the lock has 4: run `make lock`",
        "pyproject.toml requires e, but the lock has nothing: run `make lock`",
    ]


def test_the_locks_of_the_project_have_hashes_for_all_that_it_asks_for() -> None:
    for device in ("cpu", "gpu"):
        assert not list(
            locks.faults(locks.read_pins(install.LOCKS, device), locks.project_requirements(install.ROOT, device), {})
        )
        text = (install.LOCKS / f"{device}.txt").read_text() + (install.LOCKS / "common.txt").read_text()
        assert not [pin for pin in locks.blocks(text) if not re.search(r"--hash=sha256:[0-9a-f]{64}\b", pin)]


def test_a_lock_that_is_neither_on_nor_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLD_LOCK", "none")
    with pytest.raises(ValueError, match="BLD_LOCK is 'none'; give on or off"):
        install.lock_files("cpu")
