"""Checkpoints whose files are whole, damaged, or set aside."""

from pathlib import Path

import pytest
import torch

from stage2_student.runs.checkpoint_files import Inventory, find_damage, write_inventory
from stage2_student.runs.checkpoints import checkpoint_steps, set_aside


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "step-000002"
    folder.mkdir()
    for rank in range(2):
        torch.save({"weights": torch.arange(1000.0) + rank}, folder / f"rank_{rank}.pt")
    (folder / "zero_to_fp32.py").write_text("print()\n")
    write_inventory(folder, 2)
    return folder


def test_a_whole_checkpoint_has_no_damage(checkpoint: Path) -> None:
    assert find_damage(checkpoint) is None
    assert Inventory.load(checkpoint).world == 2


def test_a_checkpoint_that_lost_a_file_is_damaged(checkpoint: Path) -> None:
    (checkpoint / "rank_1.pt").unlink()
    assert find_damage(checkpoint, 0, 2) == find_damage(checkpoint, 1, 2) == "rank_1.pt is missing"


def test_a_checkpoint_whose_file_is_cut_off_is_damaged(checkpoint: Path) -> None:
    content = (checkpoint / "rank_0.pt").read_bytes()
    (checkpoint / "rank_0.pt").write_bytes(content[:-1])
    assert find_damage(checkpoint) == f"rank_0.pt has {len(content) - 1} bytes, not {len(content)}"


@pytest.mark.parametrize("name", ["files.json", "rank_0.pt"])
def test_a_checkpoint_that_may_not_be_read_or_lists_nothing_is_damaged(checkpoint: Path, name: str) -> None:
    size = (checkpoint / name).stat().st_size
    (checkpoint / name).write_bytes(b"\0" * size)
    assert (find_damage(checkpoint) or "").startswith(f"{name}: ")


def test_every_byte_of_the_weights_is_guarded_and_the_ranks_share_the_reading(checkpoint: Path) -> None:
    content = (checkpoint / "rank_1.pt").read_bytes()
    at = content.index(torch.arange(1.0, 1001.0).numpy().tobytes()) + 1234
    (checkpoint / "rank_1.pt").write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    found = [find_damage(checkpoint, part, 3) for part in range(3)]
    assert [cause is not None for cause in found] == [False, True, False]
    assert "was altered" in str(found[1])


def test_damaged_checkpoints_are_set_aside_and_never_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "checkpoints"
    for name in ("step-000002", "step-000004", "step-000004.damaged", "step-000006"):
        (folder / name).mkdir(parents=True)
    set_aside(tmp_path, {6: "a.pt is missing", 4: "b.pt is missing"}, 2)
    assert checkpoint_steps(tmp_path) == [2]
    assert {path.name for path in folder.glob("*.damaged*")} == {
        "step-000006.damaged", "step-000004.damaged", "step-000004.damaged-2"
    }  # fmt: skip
    assert (folder / "latest").read_text() == "step-000002"
    said = capsys.readouterr().err
    assert (
        "step-000006 cannot be loaded (a.pt is missing); kept as step-000006.damaged, going back to step-000002" in said
    )
