"""What set-up decides, without installing anything."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pipeline.setup import install, locks
from pipeline.setup.install import PipSettings, Stamp

PY311 = (3, 11)
WHEEL = "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl"
PYPROJECT = """
[build-system]
requires = ["setuptools"]
[project]
name = "x"
dependencies = ["torch==2.13.0", "numpy{numpy}"]
[tool.ruff]
line-length = {length}
"""


def settings(*links: str, index: str | None = None, extras: tuple[str, ...] = ()) -> PipSettings:
    return PipSettings(find_links=links, main_index=index, extra_indexes=extras, cert=None)


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


def test_a_wheel_that_pip_knows_is_used_on_a_cpu_only(tmp_path: Path) -> None:
    (tmp_path / WHEEL).touch()
    pip = settings(str(tmp_path), "elsewhere")
    cpu = install.torch_arguments("cpu", pip, "2.13.0", PY311)
    assert cpu == ["--find-links", str(tmp_path), "--find-links", "elsewhere"]
    gpu = install.torch_arguments("gpu", pip, "2.13.0", PY311)
    assert gpu == ["--find-links", "elsewhere", "--torch-backend", "auto"]


@pytest.mark.parametrize(("version", "python"), [("2.14.0", PY311), ("2.1", PY311), ("2.13.0", (3, 12))])
def test_a_wheel_of_another_version_or_python_is_not_enough(
    tmp_path: Path, version: str, python: tuple[int, int]
) -> None:
    (tmp_path / WHEEL).touch()
    assert "--torch-backend" in install.torch_arguments("cpu", settings(str(tmp_path)), version, python)


def test_without_find_links_uv_finds_the_cpu_build() -> None:
    assert install.torch_arguments("cpu", settings(), "2.13.0", PY311) == ["--torch-backend", "cpu"]


def test_torch_comes_alone_where_its_own_index_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLD_LOCK", "off")
    torch = ["--find-links", "elsewhere", "--torch-backend", "cpu"]
    first, second = install.install_commands(["uv"], "cpu", torch, ["--index", "i"], "2.13.0")
    assert first == ["uv", "torch==2.13.0", *torch, "--index", "i"]
    assert second == ["uv", "-e", ".[cpu,eval,dev]", "--find-links", "elsewhere", "--index", "i"]
    links = ["--find-links", "wheels"]
    assert install.install_commands(["uv"], "cpu", links, [], "2.13.0") == [["uv", "-e", ".[cpu,eval,dev]", *links]]


def test_pip_settings_are_read_environment_first() -> None:
    listing = (
        ":env:.find-links='/env/links'\n:env:.timeout='9'\nglobal.cert='/cert.pem'\n"
        "global.extra-index-url='\\nfile:///folder\\nhttps://extra.example/simple'\n"
        "global.find-links='/links /env/links'\n"
    )
    found = install.parse_pip_config(listing)
    assert found.find_links == ("/env/links", "/links")
    assert found.extra_indexes == ("file:///folder", "https://extra.example/simple")
    assert (found.main_index, found.cert) == (None, "/cert.pem")


def test_indexes_follow_pip_unless_uv_has_its_own() -> None:
    pip = settings(index="https://mirror.example/simple", extras=("file:///folder", "https://extra.example/simple"))
    assert install.index_arguments(pip, {}) == [
        *("--default-index", "https://mirror.example/simple"),
        *("--index", "https://extra.example/simple", "--index-strategy", "unsafe-best-match"),
    ]
    assert install.index_arguments(pip, {"UV_DEFAULT_INDEX": "https://own.example"}) == []
    assert install.index_arguments(settings(), {}) == []


def test_the_digest_follows_what_is_installed_and_nothing_else(tmp_path: Path) -> None:
    first = install.environment_digest(project(tmp_path), "cpu", PY311)
    assert install.environment_digest(project(tmp_path, length=100), "cpu", PY311) == first
    assert install.environment_digest(project(tmp_path, numpy=">=3"), "cpu", PY311) != first
    assert install.environment_digest(project(tmp_path), "gpu", PY311) != first
    assert install.environment_digest(project(tmp_path), "cpu", (3, 12)) != first


def test_a_half_made_environment_has_no_stamp(tmp_path: Path) -> None:
    path = tmp_path / "stamp.json"
    assert install.read_stamp(path) is None
    install.write_stamp(path, Stamp("cpu", "abc"))
    assert install.read_stamp(path) == Stamp("cpu", "abc")


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


def test_the_pin_of_torch_is_found_in_the_real_project() -> None:
    assert install.pinned_torch(install.ROOT)[0].isdigit()


def block(name: str, version: str, digits: str = "a", marker: str = "") -> str:
    return f"{name}=={version}{marker} \\\n    --hash=sha256:{digits * 64} \\\n    --hash=sha256:{'b' * 64}"


def test_what_is_installed_or_wanted_is_held_to_the_locks(tmp_path: Path) -> None:
    common = [block("a-a", "1"), block("b", "2", marker=" ; sys_platform == 'nowhere'"), "c==3", block("torch", "9")]
    (tmp_path / "common.txt").write_text("# head\n" + "\n".join(common) + "\n")
    (tmp_path / "cpu.txt").write_text(block("d", "4") + "\n")
    pins = locks.read_pins(tmp_path, "cpu")
    assert [(str(pin.requirement), pin.num_hashes) for pin in pins] == [("a-a==1", 2), ("c==3", 0), ("d==4", 2)]
    wanted = [Requirement(text) for text in ("A.a>=1", "d>=5", "e", "torch==2.13.0")]
    assert list(locks.faults(pins, wanted, {"a-a": "1.1", "d": "4", "own": "7"})) == [
        "a-a 1.1 is installed, a-a==1 is locked: rm -rf .venv; make setup",
        "c==3 is locked without a hash: run `make lock`",
        "d>=5 of pyproject.toml, locked is 4: run `make lock`",
        "e of pyproject.toml, locked is nothing: run `make lock`",
    ]


def test_the_locks_of_the_project_have_hashes_for_all_that_it_asks_for() -> None:
    for device in ("cpu", "gpu"):
        assert not list(
            locks.faults(locks.read_pins(install.LOCKS, device), locks.requirements(install.ROOT, device), {})
        )


def test_uv_is_held_to_the_locks_unless_asked_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    [command] = install.install_commands(["uv"], "gpu", ["--find-links", "w"], [], "2.13.0")
    assert [Path(path).name for path in command if path.endswith(".txt")] == ["common.txt", "gpu.txt"]
    monkeypatch.setenv("BLD_LOCK", "off")
    [command] = install.install_commands(["uv"], "gpu", ["--find-links", "w"], [], "2.13.0")
    assert "--constraint" not in command


def test_a_lock_that_is_neither_on_nor_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLD_LOCK", "none")
    with pytest.raises(ValueError, match="BLD_LOCK is 'none'; give on or off"):
        install.lock_files("cpu")
