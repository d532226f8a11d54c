"""Monitoring of a training run, and which of its checkpoints are kept."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from pipeline.config import MlflowConfig, Recipe, TasksConfig
from pipeline.config.loading import save_recipe
from pipeline.reports.page import page
from pipeline.reports.runs import read_run
from pipeline.runtime.harness_figures import task_figures
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage2_student.evaluation.lm_eval_tasks import run_tasks
from stage2_student.launch.launch import free_port
from stage2_student.runs import retention
from stage2_student.runs.checkpoint_store import stored_steps
from stage2_student.runs.checkpoints import checkpoint_steps, remove_partial_checkpoints
from stage2_student.runs.export import export
from stage2_student.runs.retention import Evaluation, best_step, prune
from stage2_student.runs.step_log import RunLog, where_to_look
from stage2_student.training.held_out import _sha256
from tests.support.local_tasks import write_three
from tests.support.scoring import score
from tests.support.small_dumps import make_dump, make_recipe
from tests.support.tiny import END_OF_TEXT, tiny_model

ROOT = Path(__file__).parents[2]
# Unlike the training text, so that it becomes ever less likely: the best checkpoint is not the last.
TEXT = ["QZXJ VKWQ", "## ZZ %% QQ", "ÀÈ Ж QZXJ", "x" * 600, "QQ", "not asked for"]
TIMES = {"tokens_per_second", "data_wait_share", "memory_bytes", "seconds"}
TRAIN_EACH = (
    "import sys\nfrom pipeline.config.loading import load_recipe\nfrom stage2_student.training.train import train\n"
    "for path in sys.argv[1:]: train(load_recipe(path))\n"
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make two runs that differ only in what is watched, and one for comparing two ranks with."""
    work = tmp_path_factory.mktemp("work")
    tiny_model(work / "model")
    make_dump(work / "dump")
    (work / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT))
    save_recipe(recipe(work, "plain", save_every=100, eval_every=0), work / "plain.yaml")
    save_recipe(recipe(work, "watched", **copied(work, "copies")), work / "watched.yaml")
    save_recipe(recipe(work, "one", **SHARED), work / "one.yaml")
    (work / "other.jsonl").write_text('{"text": "QQ ##"}\n')
    values = recipe(work, "early", **EARLY).model_dump()
    save_recipe(Recipe.model_validate(values | {"eval": {"source": str(work / "other.jsonl")}}), work / "early.yaml")
    assert train_each(work, "plain", "watched", "one", "early", "early").wait() == 0
    return work


EARLY = {
    "eval_every": 1, "keep_last": 0, "patience": 2, "ema": 0.5, "steps": 9, "validation": {"source": "text.jsonl"},
    "samples": {"prompts": ["the river", "in a"], "every": 2, "max_new_tokens": 5}, "min_lr_ratio": 1.0,
}  # fmt: skip


def copied(work: Path, store: str) -> dict[str, Any]:
    """Return keys of a run that is asked tasks, and whose checkpoints are copied."""
    tasks = {"names": ["three"], "include_path": str(write_three(work / "tasks")), "every": 2}
    return {"checkpoints": f"file://{work / store}", "tasks": tasks}


SHARED = {"lr": 1e-3, "steps": 3, "micro_batch_tokens": 30}


def train_each(work: Path, *names: str, **environment: str) -> "subprocess.Popen[bytes]":
    """Train several recipes in turn in one process."""
    command = [sys.executable, "-c", TRAIN_EACH, *(str(work / f"{name}.yaml") for name in names)]
    values = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=values, cwd=work)


def recipe(work: Path, name: str, **train: Any) -> Recipe:
    made = make_recipe(work / "dump", work / "model", work / name, {"lr": 0.02}, interface="causal").model_dump()
    watching = {"eval_every": 3, "eval_documents": 5, "save_every": 1, "keep_last": 1}
    values = {"train": made["train"] | watching | train, "eval": {"source": str(work / "text.jsonl")}}
    return Recipe.model_validate(made | values)


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def test_evaluation_leaves_every_loss_as_it_is_to_the_bit(work: Path) -> None:
    beside = ("eval_bits_per_byte", "task/three")
    watched = [{k: v for k, v in line.items() if k not in beside} for line in metrics(work / "watched")]
    assert watched == metrics(work / "plain")


def test_tasks_are_asked_every_so_many_steps_and_are_those_of_the_exported_model(work: Path) -> None:
    asked = {line["step"]: line["task/three"] for line in metrics(work / "watched") if "task/three" in line}
    assert sorted(asked) == [2, 4, 6]
    group = TasksConfig(names=("three",), include_path=str(work / "tasks"), dtype="float32")
    results = run_tasks(str(work / "watched" / "export"), {"tasks": group})
    assert asked[6] == pytest.approx(task_figures(results, {})["three"].value)
    assert 'aria-label="Task three over steps"' in page([read_run(work / "watched")], ["watched"])


def test_a_run_goes_on_from_its_store_in_an_empty_folder_to_the_same_bits(work: Path) -> None:
    """From its best checkpoint, as if the newest had not arrived."""
    steps = stored_steps(work / "copies")
    assert steps == checkpoint_steps(work / "watched") and len(steps) == 2 and steps[-1] == 6
    shutil.copytree(work / "copies", work / "fewer")
    (work / "fewer" / "step-000006" / "complete.json").unlink()
    save_recipe(recipe(work, "elsewhere", **copied(work, "fewer")), work / "elsewhere.yaml")
    assert train_each(work, "elsewhere").wait() == 0
    assert metrics(work / "elsewhere") == metrics(work / "watched")
    ours, theirs = (load_file(work / name / "export" / "model.safetensors") for name in ("elsewhere", "watched"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert stored_steps(work / "fewer") == steps


def test_the_evaluation_is_that_of_the_exported_model(work: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(work / "watched" / "export").eval()
    tokenizer = ByteTokenizer.load(str(work / "watched" / "export"))
    documents = [text.encode() for text in TEXT[:5]]
    found = score(model, tokenizer, documents, tokenizer.token_id(END_OF_TEXT) or 0, max_tokens=512)
    assert found["num_windows"] == 6 and found["num_documents"] == 5 and found["left_out"] == {}
    assert metrics(work / "watched")[-1]["eval_bits_per_byte"] == pytest.approx(found["bits_per_byte"], rel=1e-6)


def test_figures_of_runs_of_before_compare_where_no_document_is_cut() -> None:
    texts = [b"one", [{"role": "user", "content": "two"}]]
    before = hashlib.sha256("".join(repr(text) + "\n" for text in texts).encode()).hexdigest()
    assert _sha256(texts, "") == before != _sha256(texts, "windows of 512 tokens")


def test_every_checkpoint_is_measured_and_the_best_stays_with_the_newest(work: Path, tmp_path: Path) -> None:
    run = work / "watched"
    measured = {line["step"]: line["eval_bits_per_byte"] for line in metrics(run)}
    assert sorted(measured) == [1, 2, 3, 4, 5, 6]
    best = min(measured, key=lambda step: measured[step])
    assert checkpoint_steps(run) == sorted({best, 6}) and best != 6
    assert (run / "checkpoints" / "best").read_text() == f"step-{best:06d}"
    exported = export(run, tmp_path / "best", best=True)
    assert json.loads((exported / "distilled.json").read_text()) == {"step": best, "newest": 6}
    assert f"step {best}, {measured[best]:.4f} bits/byte" in where_to_look(run) and "--best" in where_to_look(run)
    assert "best" not in where_to_look(work / "plain") and "bld report" in where_to_look(work / "plain")
    with pytest.raises(ValueError, match="cannot be combined"):
        export(run, tmp_path / "both", step=6, best=True)
    with pytest.raises(ValueError, match=r"none of \[6\] was evaluated"):
        export(work / "plain", tmp_path / "none", best=True)


def raw_weights(run: Path, step: int) -> dict[str, Any]:
    """Return the trained weights of a checkpoint, not averaged."""
    values = torch.load(run / "checkpoints" / f"step-{step:06d}" / "mp_rank_00_model_states.pt", weights_only=False)
    return {name.removeprefix("lm."): value for name, value in values["module"].items() if name.startswith("lm.")}


def test_a_run_ends_after_evaluations_without_a_better_one_and_its_best_average_is_exported(work: Path) -> None:
    """The command ran twice: the second time it found that the run had ended."""
    run, lines = work / "early", metrics(work / "early")
    measured = [line["eval_bits_per_byte"] for line in lines]
    best = 1 + measured.index(min(measured))
    assert len(lines) == best + 2 < 9 and [line["step"] for line in lines] == list(range(1, best + 3))
    assert json.loads((run / "export" / "distilled.json").read_text()) == {"step": best, "newest": best + 2}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["ended_early"] and summary["progress"][::2] == [min(measured), 2]
    assert read_run(run).state == f"ended early: step {best + 2} of 9"
    mean = {name: value.double() for name, value in load_file(run / "start" / "model.safetensors").items()}
    for step in range(1, best + 1):
        decay = min(0.5, (1 + step) / (10 + step))
        mean = {name: decay * value + (1 - decay) * raw_weights(run, step)[name] for name, value in mean.items()}
    exported = load_file(run / "export" / "model.safetensors")
    assert exported.keys() == mean.keys() and not torch.equal(
        exported["model.norm.weight"], raw_weights(run, best)["model.norm.weight"]
    )
    for name, value in exported.items():
        torch.testing.assert_close(value.double(), mean[name], rtol=1e-5, atol=1e-6)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(run / "export").eval(),
        ByteTokenizer.load(str(run / "export")),
    )
    found = score(model, tokenizer, [text.encode() for text in TEXT[:5]], 268, max_tokens=512)
    assert min(measured) == pytest.approx(found["bits_per_byte"], rel=1e-5)


def test_samples_are_what_the_averaged_student_writes_and_change_no_loss(work: Path, tmp_path: Path) -> None:
    run = work / "early"
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    last = metrics(run)[-1]["step"]
    steps = sorted({*range(2, int(last), 2), last})
    assert [(one["step"], one["prompt"]) for one in samples] == [
        (s, p) for s in steps for p in EARLY["samples"]["prompts"]
    ]  # type: ignore[index]
    model = AutoModelForCausalLM.from_pretrained(export(run, tmp_path / "two", step=2)).eval()
    tokenizer = ByteTokenizer.load(str(tmp_path / "two"))
    tokens = [268, *tokenizer.encode(b"the river")]
    for _ in range(5):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == 268:
            break
    spelled = b"".join(tokenizer.token_bytes[token] or b"" for token in tokens[1:])
    assert "the river" + samples[0]["text"] == spelled.decode(errors="replace")
    ignored = {"eval_bits_per_byte", "lr"}
    for ours, theirs in zip(metrics(run)[:3], metrics(work / "plain")[:3], strict=True):
        assert {k: v for k, v in ours.items() if k not in ignored} == {
            k: v for k, v in theirs.items() if k not in ignored
        }


def test_two_ranks_of_zero_3_share_the_documents_and_find_the_same(work: Path) -> None:
    save_recipe(recipe(work, "two", **SHARED, num_processes=2, deepspeed={"zero_stage": 3}), work / "two.yaml")
    world = {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [train_each(work, "two", RANK=rank, LOCAL_RANK=rank, **world) for rank in "01"]
    assert [rank.wait() for rank in ranks] == [0, 0]
    assert len(metrics(work / "two")) == 3
    for ours, theirs in zip(metrics(work / "two"), metrics(work / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def fake_checkpoint(run: Path, step: int, bits: float | None, text: str = "t") -> None:
    folder = run / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "weights").write_text("w")
    if bits is not None:
        retention.record(run, folder.name, Evaluation(bits, text))


def test_only_evaluations_of_the_same_text_are_compared(tmp_path: Path) -> None:
    assert best_step(tmp_path) is None
    fake_checkpoint(tmp_path, 1, None)
    assert best_step(tmp_path) is None
    for step, bits, text in ((2, 0.5, "another"), (3, 2.0, "t"), (4, 1.5, "t"), (5, 1.5, "t"), (6, None, "t")):
        fake_checkpoint(tmp_path, step, bits, text)
    assert best_step(tmp_path) == 4
    prune(tmp_path, 0)
    assert checkpoint_steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    prune(tmp_path, 2)
    assert checkpoint_steps(tmp_path) == [4, 5, 6]


def test_a_checkpoint_whose_removal_is_cut_off_does_not_look_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        fake_checkpoint(tmp_path, step, None)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("stage2_student.runs.retention.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, 1)
    monkeypatch.undo()
    assert checkpoint_steps(tmp_path) == [2, 3]
    remove_partial_checkpoints(tmp_path)
    prune(tmp_path, 1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


FIGURES = {
    "loss": 10.2575, "ce": 10.6978, "byte_ce": 10.5763, "kl": 0.0481, "alm": 0.1234, "bits_per_byte": 11.0067,
    "eval_bits_per_byte": 11.1067, "uncounted_share": 0.13, "kl_share": 0.8, "lr": 3.08e-5, "grad_norm": 123.27,
    "tokens_per_second": 123456.0, "data_wait_share": 0.0123, "memory_bytes": 78 * 2**30, "epoch": 0,
}  # fmt: skip


def test_a_line_has_every_figure_and_fits_into_120_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = make_recipe(tmp_path, tmp_path, tmp_path, {"steps": 1500})
    with RunLog(tmp_path, 0, wanted) as log:
        log.write(1400, FIGURES)
        log.write(1401, {key: value for key, value in FIGURES.items() if key != "eval_bits_per_byte"})
    lines = capsys.readouterr().err.splitlines()
    *legend, head, first, second = [line.partition(": ")[2] for line in lines if " bld" in line]
    assert "nats per supervised byte" in legend[0] and all(len(line) <= 120 for line in legend)
    assert len(head) == len(first) <= 120
    assert head.split() == [
        *("step", "loss", "ce", "byte_ce", "kl", "alm", "bits/byte", "held", "out", "uncount", "lr", "grad"),
        *("tokens/s", "wait", "GiB", "left"),
    ]
    shown = "1400/1500 10.2575 10.6978 10.5763 0.0481 0.1234 11.0067 11.1067 13% 3.1e-05 123.27 123,456 1% 78.0 0:00"
    assert first.split() == shown.split()
    assert "11.1067" not in second
    [board] = (tmp_path / "tensorboard").iterdir()
    events = EventAccumulator(str(board)).Reload()
    assert events.Scalars("eval_bits_per_byte")[0].step == 1400


def test_the_seconds_of_a_run_go_on_after_a_resume(tmp_path: Path) -> None:
    wanted = make_recipe(tmp_path, tmp_path, tmp_path, {"steps": 9})
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "seconds": 50.0}\n')
    with RunLog(tmp_path, 1, wanted) as log:
        log.write(2, FIGURES)
    assert 50 < json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["seconds"] < 60


def wandb_recipe(run: Path, **wandb: Any) -> Recipe:
    return make_recipe(run, run, run, {"steps": 9, "wandb": {"project": "bytes", **wandb}})


def test_weights_and_biases_gets_what_metrics_hold_and_the_same_run_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []
    run = SimpleNamespace(
        log=lambda values: calls.append(("log", values)),
        define_metric=lambda name, **more: calls.append(("define", (name, more))),
        finish=lambda: calls.append(("finish", None)),
    )

    def init(**given: Any) -> Any:
        calls.append(("init", given))
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for first in (0, 1):
        with RunLog(tmp_path, first, wandb_recipe(tmp_path, mode="offline")) as log:
            log.write(first + 1, FIGURES)
    inits = [given for what, given in calls if what == "init"]
    assert inits[0] == inits[1] and len(inits[0]["id"]) == 32
    assert (inits[0]["project"], inits[0]["mode"], inits[0]["resume"]) == ("bytes", "offline", "allow")
    assert inits[0]["config"]["train"]["steps"] == 9 and "placement" not in inits[0]["config"]
    logged = [values for what, values in calls if what == "log"]
    assert logged == [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert ("define", ("*", {"step_metric": "step"})) in calls and calls[-1] == ("finish", None)


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("wandb", "mlflow"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ValueError, match=r"needs the package wandb.*pip install wandb"):
        RunLog(tmp_path, 0, wandb_recipe(tmp_path))
    with pytest.raises(ValueError, match=r"train.mlflow needs the package mlflow,.*pip install mlflow-skinny"):
        RunLog(tmp_path, 0, mlflow_recipe(tmp_path))


def mlflow_recipe(run: Path, **mlflow: Any) -> Recipe:
    return make_recipe(run, run, run, {"steps": 9, "mlflow": {"experiment": "bytes", **mlflow}})


class FakeMlflow:
    """The functions of MLflow 3 that are called, with their signatures."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def set_tracking_uri(self, uri: str | Path) -> None:
        self.calls.append(("uri", uri))

    def set_experiment(
        self, experiment_name: str | None = None, experiment_id: str | None = None, trace_location: Any = None
    ) -> None:
        self.calls.append(("experiment", experiment_name))

    def start_run(
        self,
        run_id: str | None = None,
        experiment_id: str | None = None,
        run_name: str | None = None,
        nested: bool = False,
        parent_run_id: str | None = None,
        tags: dict[str, Any] | None = None,
        description: str | None = None,
        log_system_metrics: bool | None = None,
    ) -> Any:
        self.calls.append(("start", (run_id, run_name)))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "0123abcd"))

    def log_params(self, params: dict[str, Any], synchronous: bool | None = None, run_id: str | None = None) -> None:
        assert len(params) <= 100 and run_id == "0123abcd"
        self.calls.append(("params", params))

    def log_metrics(
        self,
        metrics: dict[str, float],
        step: int | None = None,
        synchronous: bool | None = None,
        run_id: str | None = None,
        timestamp: int | None = None,
        model_id: str | None = None,
        dataset: Any = None,
    ) -> None:
        self.calls.append(("metrics", (step, run_id, metrics)))

    def end_run(self, status: str = "FINISHED") -> None:
        self.calls.append(("end", status))


def test_mlflow_gets_what_metrics_hold_and_the_same_run_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    figures = {**FIGURES, "loss/code (new)": 1.0}
    for first in (0, 1):
        with RunLog(tmp_path, first, mlflow_recipe(tmp_path, tracking_uri="http://tracker:5000")) as log:
            log.write(first + 1, figures)
    starts = [given for what, given in fake.calls if what == "start"]
    assert starts == [(None, "/".join(tmp_path.parts[-2:])), ("0123abcd", "/".join(tmp_path.parts[-2:]))]
    assert ("uri", "http://tracker:5000") in fake.calls and ("experiment", "bytes") in fake.calls
    params = {name: value for what, given in fake.calls if what == "params" for name, value in given.items()}
    assert params["train.steps"] == "9" and params["train.objectives.kl"] == "0.1"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logged = [given for what, given in fake.calls if what == "metrics"]
    assert [(step, run) for step, run, _ in logged] == [(1, "0123abcd"), (2, "0123abcd")]
    for (step, _, metrics), line in zip(logged, lines, strict=True):
        assert metrics.pop("loss/code _new_") == line.pop("loss/code (new)")
        assert {"step": step, **metrics} == line
    assert fake.calls[-1] == ("end", "FINISHED")


def test_an_address_of_mlflow_with_a_password_is_refused() -> None:
    with pytest.raises(ValueError, match="no user"):
        MlflowConfig(experiment="bytes", tracking_uri="http://me:secret@tracker:5000")


def test_evaluation_needs_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no eval section"):
        make_recipe(tmp_path, tmp_path, tmp_path, {"eval_every": 5})
