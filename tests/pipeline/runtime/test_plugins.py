"""Plug-ins that import the project's modules by their names in the last release."""

from importlib import import_module
from pathlib import Path

import pytest

from pipeline.runtime.plugins import _MOVED, run_file
from stage2_student.data import examples
from stage2_student.losses import divergences


@pytest.mark.parametrize("old", _MOVED)
@pytest.mark.parametrize("how", ["import {old} as found", "from {package} import {name} as found"])
def test_a_file_goes_on_under_the_old_name_of_a_module_and_is_told_the_new_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, how: str
) -> None:
    package, name = old.rsplit(".", 1)
    file = tmp_path / "own.py"
    file.write_text(f"{how.format(old=old, package=package, name=name)}\nwanted = vars(found)\n")
    found = run_file(str(file), "wanted")
    for module in map(import_module, _MOVED[old]):
        held = {
            key: value for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__
        }
        assert held and all(found[key] is value for key, value in held.items())
    assert f"{old} has moved to {' and '.join(_MOVED[old])};" in capsys.readouterr().err


def test_a_file_that_imports_what_never_was_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("import pipeline.runtime\nfrom stage2_student.nowhere import nothing\n")
    with pytest.raises(ValueError, match=r"own\.py, line 2: ModuleNotFoundError"):
        run_file(str(file), "wanted")


def test_a_name_of_a_module_that_is_a_package_now_is_found_and_its_new_place_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "own.py"
    file.write_text("from stage2_student.losses import MIN_TAIL, NO_SYMBOL, alm, class_divergence\nwanted = vars()\n")
    found = run_file(str(file), "wanted")
    assert found["class_divergence"] is divergences.class_divergence and found["NO_SYMBOL"] is examples.NO_SYMBOL
    told = capsys.readouterr().err
    assert "stage2_student.losses.class_divergence has moved to stage2_student.losses.divergences;" in told
    assert "stage2_student.losses.NO_SYMBOL has moved to stage2_student.data.examples;" in told
    assert "losses.alm" not in told  # a module of the package
    file.write_text("from stage2_student.losses import nothing\n")
    with pytest.raises(ValueError, match=r"own\.py, line 1: ImportError: cannot import name 'nothing'"):
        run_file(str(file), "wanted")


def test_whoever_imports_a_module_that_has_moved_is_told_where_to_look(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    for line in ("from stage2_student.align import segments", "import pipeline.logs"):
        file.write_text(f"{line}\n")
        with pytest.raises(ValueError, match=r"ModuleNotFoundError: .*; modules of this project have moved since"):
            run_file(str(file), "wanted")
    file.write_text("import nowhere_at_all\n")
    with pytest.raises(ValueError, match=r"No module named 'nowhere_at_all'$"):
        run_file(str(file), "wanted")
