"""Preparations before a rank starts: DeepSpeed's JSON, commands, ranks, and which checkpoint is sound."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig

from pipeline.config import DeepSpeedConfig, Recipe, TrainConfig
from pipeline.config.loading import load_recipe
from pipeline.runtime.child_processes import child_environment
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.special_ids import SpecialIds
from schemas.manifest import Manifest
from stage2_student.data import order
from stage2_student.distributed.deepspeed_config import deepspeed_config
from stage2_student.distributed.rank_environment import first_host, rank_environment, started_as_rank
from stage2_student.launch import launch
from stage2_student.launch.launch import launch_command, launch_student
from stage2_student.model.context_length import sized
from stage2_student.model.initial_student import export_start
from stage2_student.runs import folder
from stage2_student.runs.checkpoint_files import Inventory, find_damage, write_inventory
from stage2_student.runs.checkpoints import checkpoint_steps, set_aside
from stage2_student.runs.identity import RunVersions, counts_key, run_identity
from stage2_student.training.loss_scale import GROWTH_STEPS, MAX_FACTOR, LossScale, first_scale
from stage2_student.training.rank_batches import uses_turns
from stage2_student.training.train import build_student
from tests.support.small_dumps import make_dump, make_recipe
from tests.support.tiny import tiny_model

ROOT = Path(__file__).parents[3]


def recipe(tmp_path: Path, **train: Any) -> Recipe:
    return make_recipe(tmp_path / "dump", tmp_path / "model", tmp_path / "run", train)


def deepspeed(tmp_path: Path, given: Any = None, **values: Any) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a recipe with this operator's JSON."""
    if given is not None:
        (tmp_path / "own.json").write_text(given if isinstance(given, str) else json.dumps(given))
        values["config"] = str(tmp_path / "own.json")
    return deepspeed_config(recipe(tmp_path, grad_clip=0.5, deepspeed=values), 4)


def test_the_derived_json_says_stage_offload_and_clipping(tmp_path: Path) -> None:
    derived = deepspeed(tmp_path, zero_stage=3, offload_optimizer="cpu", offload_parameters="cpu")
    assert derived["gradient_clipping"] == 0.5 and derived["train_batch_size"] == 4
    zero = derived["zero_optimization"]
    assert zero["stage"] == 3 and zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu"}
    assert "offload_optimizer" not in deepspeed(tmp_path)["zero_optimization"]


def test_an_operators_json_is_merged_over_the_derived_one(tmp_path: Path) -> None:
    own = {
        "zero_optimization": {"overlap_comm": True},
        "optimizer": {"params": {"torch_adam": False}},
        "comms_logger": {"enabled": True},
    }
    merged = deepspeed(tmp_path, own, zero_stage=2)
    assert merged["zero_optimization"] == {"stage": 2, "contiguous_gradients": True, "overlap_comm": True}
    assert merged["optimizer"]["params"]["torch_adam"] is False and merged["optimizer"]["params"]["lr"] == 1e-3
    assert merged["comms_logger"] == {"enabled": True}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"train_batch_size": 8}, "sets train_batch_size, .* set train.batch_tokens instead"),
        ({"gradient_accumulation_steps": 2}, "set train.batch_tokens and train.micro_batch_tokens"),
        ({"zero_optimization": {"stage": 3}}, "sets zero_optimization.stage, .* set train.deepspeed.zero_stage"),
        ({"optimizer": {"params": {"lr": 1}}}, "set train.lr"),
        ({"fp16": {"enabled": True}}, "set train.dtype"),
        ({"scheduler": {}}, "set train.warmup_steps and"),
        ({"checkpoint": {"load_universal": True}}, "sets checkpoint, which cannot be set"),
        ([1], "must hold an object"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_an_operators_json_may_not_say_what_the_recipe_says(tmp_path: Path, given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        deepspeed(tmp_path, given)


def test_offload_without_its_stage_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"offload_parameters: cpu needs .*zero_stage 3 or more, not 2"):
        DeepSpeedConfig(zero_stage=2, offload_parameters="cpu")
    with pytest.raises(ValidationError, match="offload_optimizer: cpu needs"):
        DeepSpeedConfig(offload_optimizer="cpu")


def test_of_deepspeeds_settings_those_that_decide_the_result_are_part_of_the_identity(tmp_path: Path) -> None:
    make_dump(tmp_path / "dump", num_records=3)
    manifest = Manifest.load(tmp_path / "dump")

    def identity(given: Any = None, **values: Any) -> dict[str, Any]:
        (tmp_path / "own.json").write_text(json.dumps(given or {}))
        values = {"deepspeed": {"zero_stage": 2, "config": str(tmp_path / "own.json")} | values}
        return run_identity(recipe(tmp_path, **values), manifest, "s", SpecialIds(1, (1,)))

    plain = identity()
    assert plain == identity({"zero_optimization": {"overlap_comm": True}, "tensorboard": {"enabled": True}})
    assert plain == identity(offload_optimizer="cpu")
    assert plain != identity({"optimizer": {"params": {"eps": 1e-6}}})
    assert plain != identity({"communication_data_type": "bf16"})
    assert plain != identity(zero_stage=1)
    assert identity(zero_stage=3)["deepspeed"] == {"zero_stage": 3}


def test_a_run_that_took_its_documents_in_another_order_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dump(tmp_path / "dump", num_records=3)
    identity = run_identity(recipe(tmp_path), Manifest.load(tmp_path / "dump"), "s", SpecialIds(1, (1,)))
    run = tmp_path / "run"
    (run / "checkpoints" / "step-000001").mkdir(parents=True)
    before_it_was_told = {name: value for name, value in identity.items() if name != "data_order"}
    (run / "identity.json").write_text(json.dumps(before_it_was_told))
    with pytest.raises(ValueError, match=r"data_order: None there, 4 here.* new student.path"):
        folder.claim(run, identity)


def test_a_run_that_began_with_whole_chats_goes_on_with_them_and_with_what_it_counted(tmp_path: Path) -> None:
    make_dump(tmp_path / "dump", num_records=3)
    manifest, run = Manifest.load(tmp_path / "dump"), tmp_path / "run"
    now = run_identity(recipe(tmp_path), manifest, "s", SpecialIds(1, (1,)))
    begun = {**now, "data_order": 3}
    (run / "checkpoints" / "step-000001").mkdir(parents=True)
    (run / "identity.json").write_text(json.dumps(begun))
    assert folder.data_order(run) == order.WHOLE_CHATS == 3 and not uses_turns(3) and uses_turns(order.VERSION)
    decisive = {"dump": begun["dump"], "other_dumps": None, "tokenizer_sha256": "s", "template_sha256": None}
    decisive |= {"pieces": 1, "max_tokens": begun["train"]["max_tokens"]}
    key = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    assert counts_key(begun) == key != counts_key(now)


def test_a_run_that_began_before_records_were_cut_goes_on_as_it_began(tmp_path: Path) -> None:
    make_dump(tmp_path / "dump", num_records=3)
    manifest, run = Manifest.load(tmp_path / "dump"), tmp_path / "run"
    now = run_identity(recipe(tmp_path), manifest, "s", SpecialIds(1, (1,)))
    begun = {**now, "data_order": order.WHOLE_RECORDS}
    (run / "checkpoints" / "step-000001").mkdir(parents=True)
    (run / "identity.json").write_text(json.dumps(begun))
    assert folder.data_order(run) == order.WHOLE_RECORDS
    ours = run_identity(
        recipe(tmp_path), manifest, "s", SpecialIds(1, (1,)), versions=RunVersions(folder.data_order(run))
    )
    folder.claim(run, ours)  # does not raise
    shorter = {**now, "train": now["train"] | {"max_tokens": 9}}
    assert counts_key(now) != counts_key(shorter)
    assert counts_key(begun) == counts_key(shorter | {"data_order": order.WHOLE_RECORDS})
    (run / "checkpoints" / "step-000001").rmdir()  # nothing to go on with
    assert folder.data_order(run) == order.VERSION == now["data_order"]


@pytest.mark.parametrize(("positions", "found"), [(512, 512), (4096, 2048)])
def test_what_the_student_reads_at_once_is_by_default_what_it_has_positions_for(
    tmp_path: Path, positions: int, found: int
) -> None:
    model = tmp_path / "model"
    LlamaConfig(max_position_embeddings=positions).save_pretrained(model)
    plain = recipe(tmp_path, max_tokens=None)  # its student is in that folder
    given, remark = sized(plain)
    assert given.train.max_tokens == given.train.piece_tokens == found
    assert (remark is not None) == (found < 2048) and (remark is None or "train.max_tokens is 512" in remark)
    explicit = plain.model_copy(update={"train": plain.train.model_copy(update={"max_tokens": 3000})})
    assert sized(explicit) == (explicit, None)


def test_a_loss_scale_halves_on_overflow_and_doubles_after_a_thousand_clean_steps() -> None:
    assert first_scale("bfloat16") is None and first_scale("float32") is None
    scale = first_scale("float16")
    assert scale == LossScale(2.0**16)
    scale = scale.after_step().after_overflow()
    assert scale == LossScale(2.0**15)
    for _ in range(GROWTH_STEPS):
        scale = scale.after_step()
    assert scale == LossScale(2.0**16)
    assert LossScale(MAX_FACTOR, GROWTH_STEPS - 1).after_step() == LossScale(MAX_FACTOR)
    assert not LossScale(1.0).can_shrink


def test_a_hostfile_starts_deepspeeds_launcher_over_its_machines(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    train = recipe(tmp_path, hostfile=str(hostfile), num_processes=3).train
    command = " ".join(launch_command(Path("r.yaml"), train, 1234))
    assert f"-m deepspeed.launcher.runner --quiet --hostfile={hostfile} --master_port=1234" in command
    assert command.endswith("--no_local_rank " + str(ROOT / "stage2_student/launch/rank.py") + " --recipe r.yaml")
    with pytest.raises(ValueError, match=r"train.hostfile: .* is not a file"):
        launch_student(recipe(tmp_path, hostfile=str(hostfile)), dry_run=True)


def test_deepspeeds_own_launcher_understands_both_commands(tmp_path: Path) -> None:
    from deepspeed.launcher import runner

    (tmp_path / "hosts").write_text("alpha slots=2\nbeta slots=4\n")
    train = recipe(tmp_path, hostfile=str(tmp_path / "hosts")).train
    command = launch_command(Path("r.yaml"), train, 1234)
    read = runner.parse_args(command[command.index("deepspeed.launcher.runner") + 1 :])
    assert (read.user_script, read.user_args) == (str(ROOT / "stage2_student/launch/rank.py"), ["--recipe", "r.yaml"])
    assert not read.module and read.no_local_rank and read.launcher == "pdsh"
    assert dict(runner.fetch_hostfile(read.hostfile)) == {"alpha": 2, "beta": 4}


SLURM = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[003-004]", "SLURM_JOB_ID": "123456",
}  # fmt: skip


@pytest.mark.parametrize("gpu", [False, True])
def test_on_a_cpu_the_ranks_keep_freed_memory_unless_the_operator_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, gpu: bool
) -> None:
    monkeypatch.setattr(launch, "has_nvidia_gpu", lambda: gpu)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    for name in ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    found = launch._environment(TrainConfig())
    assert found["MALLOC_TRIM_THRESHOLD_"] == "1"
    assert [found.get(name) for name in ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_")] == (
        [None, None] if gpu else ["glibc.malloc.hugetlb=1", str(8 << 30)]
    )


def test_a_rank_of_srun_finds_the_others_by_what_slurm_says() -> None:
    assert started_as_rank(SLURM)
    assert rank_environment(SLURM) == {
        "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "4",
        "MASTER_ADDR": "gpu003", "MASTER_PORT": "23456",
    }  # fmt: skip
    assert (
        rank_environment(SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"})
        .keys()
        .isdisjoint({"MASTER_ADDR", "MASTER_PORT"})
    )
    alone = SLURM | {"SLURM_STEP_NUM_TASKS": "1"}
    assert not started_as_rank(alone) and rank_environment(alone)["WORLD_SIZE"] == "1"
    batch_script = {name: value for name, value in SLURM.items() if "STEP" not in name}
    assert not started_as_rank(batch_script) and rank_environment(batch_script)["RANK"] == "0"


def test_a_rank_of_torchrun_keeps_what_torchrun_says() -> None:
    told = {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }
    assert started_as_rank(told | {"TORCHELASTIC_RUN_ID": "none"})
    assert rank_environment(told) == {"LOCAL_SIZE": "2"}
    assert not started_as_rank({})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node7", "node7"), ("gpu[003-004,007],big1", "gpu003"), ("a-1,b-2", "a-1"), ("rack[1-2]n[10-12]", "rack1n10")],
)
def test_the_first_host_of_a_slurm_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


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


@pytest.mark.parametrize(("checkpointing", "passes"), [(False, 1), (True, 2)])
def test_with_gradient_checkpointing_a_block_is_computed_again_in_the_backward_pass(
    tmp_path: Path, checkpointing: bool, passes: int
) -> None:
    tokenizer = ByteTokenizer.load(str(tiny_model(tmp_path / "model")))
    wanted = recipe(tmp_path, gradient_checkpointing=checkpointing, objectives={"ce": 1.0, "byte_ce": 0, "kl": 0})
    export_start(wanted)
    student = build_student(wanted, tokenizer, SpecialIds(268, (268,)))
    calls = []
    # Before, not after: what is computed again ends inside the block, once nothing more is needed of it.
    student.lm.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    tokens_BL = torch.tensor([[268, 5, 6, 7]])
    student.lm(input_ids=tokens_BL).logits.sum().backward()
    assert len(calls) == passes


@pytest.mark.parametrize(("ignored", "code"), [(False, 143), (True, 0)])
def test_a_closed_terminal_is_a_sigterm_to_the_ranks_but_under_nohup(ignored: bool, code: int) -> None:
    launcher = "print('started', flush=True); input()"
    script = (
        f"import os, signal, sys; signal.signal(signal.SIGHUP, signal.{'SIG_IGN' if ignored else 'SIG_DFL'})\n"
        f"from stage2_student.launch import launch\n"
        f"sys.exit(launch._run([sys.executable, '-c', {launcher!r}], dict(os.environ))[0])\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGHUP)
        if ignored:
            process.stdin.write("on\n")
            process.stdin.close()
        assert process.wait(60) == code


def test_a_second_command_for_a_run_does_not_change_what_the_ranks_of_the_first_are_about_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[float] = []

    def ranks(command: list[str], environment: dict[str, str]) -> tuple[int, list[int]]:
        if not read:  # they are slow to start, and somebody else is quick
            read.append(0.0)
            launch_student(recipe(tmp_path, lr=0.5))
        read.append(load_recipe(command[command.index("--recipe") + 1]).train.lr)
        return 0, []

    monkeypatch.setattr(launch, "_run", ranks)
    monkeypatch.setattr(launch, "end_children_with_me", lambda: None)
    launch_student(recipe(tmp_path, lr=0.25))
    assert read == [0.0, 0.5, 0.25]
    assert not list((tmp_path / "run").glob("launch*"))


def test_a_rank_imports_this_project_where_deepspeed_puts_the_operators_folder_first(tmp_path: Path) -> None:
    for name in ("pipeline", "schemas"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the operator has a package of that name')\n")
    command = launch_command(Path("r.yaml"), TrainConfig(), 1234)
    rank = command[command.index("--no_local_rank") + 1 : -2]
    asked = [sys.executable, "-u", *(["-m"] if rank[0] == "--module" else []), rank[-1], "--help"]
    # As DeepSpeed's launcher of several machines has it.
    environment = {**child_environment(), "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(asked, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Train a student from a dump" in done.stdout, done.stderr
