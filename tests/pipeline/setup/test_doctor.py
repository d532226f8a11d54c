"""The doctor's checks on simulated machines."""

import json
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pipeline.setup import doctor


def levels(findings: object) -> dict[str, str]:
    return {finding.what: finding.level for finding in findings}  # type: ignore[attr-defined]


def test_matching_builds_are_fine() -> None:
    assert set(levels(doctor.check_engine(None, "0.32.0", "2.13.0+cpu", [])).values()) == {"ok"}
    assert set(levels(doctor.check_engine("0.32.0", None, "2.13.0", [])).values()) == {"ok"}


def test_both_builds_of_vllm_fail() -> None:
    (finding,) = doctor.check_engine("0.32.0", "0.32.0", "2.13.0", [])
    assert finding.level == "fail" and "overwrite" in finding.text and finding.remedy


def test_no_engine_fails_and_names_the_other() -> None:
    (finding,) = doctor.check_engine(None, None, "2.13.0", [])
    assert finding.level == "fail" and "teacher.engine: transformers" in finding.remedy


def test_a_cpu_torch_under_the_gpu_build_fails() -> None:
    assert levels(doctor.check_engine("0.32.0", None, "2.13.0+cpu", []))["torch"] == "fail"


def test_torchvision_beside_the_cpu_build_fails() -> None:
    *_, finding = doctor.check_engine(None, "0.32.0", "2.13.0+cpu", ["torchvision"])
    assert finding.level == "fail" and "uninstall" in finding.remedy


def test_versions_out_of_range_or_missing_fail() -> None:
    wanted = [Requirement("numpy<1"), Requirement("no-such-package>=1"), Requirement("pytest>=1")]
    found = levels(doctor.check_packages(wanted))
    assert found == {"numpy": "fail", "no-such-package": "fail"}
    assert levels(doctor.check_packages(wanted[2:])) == {"packages": "ok"}


def test_the_engines_of_stage_1_are_counted_from_the_gpus_that_it_can_see(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "runs 4, one on each visible GPU (0,1,2,3)" in doctor.check_visible(4, None).text
    assert "runs 2, one on each visible GPU (2,3)" in doctor.check_visible(4, "2,3").text
    hidden = doctor.check_visible(4, "")
    assert hidden.level == "warn" and "hides all GPUs" in hidden.text and hidden.remedy
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert "`bld teacher` runs 1, on all cores" in {f.what: f.text for f in doctor.check_devices()}["engines"]


def test_little_room_is_a_warning(tmp_path: Path) -> None:
    assert levels(doctor.check_space(tmp_path, 10**18, 10**18)) == {"disk": "warn", "memory": "warn"}
    assert levels(doctor.check_space(tmp_path, 0, 0)) == {"disk": "ok", "memory": "ok"}


def test_a_cache_that_cannot_be_made_fails(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert levels(doctor.check_cache(tmp_path / "file" / "cache")) == {"cache": "fail"}
    assert levels(doctor.check_cache(tmp_path / "new" / "cache")) == {"cache": "ok"}


def test_an_import_that_fails_is_reported_with_its_last_line() -> None:
    good, bad = doctor.check_imports(("json", "no_such_module"))
    assert good.level == "ok"
    assert bad.level == "fail" and "No module named" in bad.text


def test_every_problem_comes_with_a_remedy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "installed", lambda package: None)
    monkeypatch.setattr(sys, "version_info", (3, 14, 0))
    assert not doctor.diagnose(deep=False, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert all(finding["remedy"] for finding in found if finding["level"] != "ok")
