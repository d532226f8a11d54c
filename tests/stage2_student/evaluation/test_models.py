"""`bld eval MODEL` measures the revision named, with the model's own code only if that is trusted."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
from transformers import dynamic_module_utils
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config.evaluated import EvaluatedModel
from pipeline.reports.runs import read_run
from pipeline.runtime.model_source import ModelSource
from stage2_student.evaluation.bits_per_byte import run_eval
from tests.support.tiny import tiny_model

TEXT = "and the thing\nin the end\n"
CODE = "from transformers import LlamaForCausalLM\n\nclass Own(LlamaForCausalLM):\n    pass\n"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a hub's cache, offline, with `some/model`; return its snapshots.

    Its branch `small` has other weights and another tokenizer.
    """
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "cache" / "models--some--model"
    (repo / "refs").mkdir(parents=True)
    for name, commit, merges in (("main", "a" * 40, None), ("small", "b" * 40, ["t h", "th e"])):
        (repo / "refs" / name).write_text(commit, encoding="utf-8")
        tiny_model(repo / "snapshots" / commit, seed=len(name), merges=merges)
    return repo / "snapshots"


def figures(target: str, text: Path, *options: str) -> dict[str, float]:
    out = text.with_name("figures.json")
    command = ["eval", target, "--corpus", str(text), "--json", str(out), *options]
    CliRunner().invoke(app, command, catch_exceptions=False)
    figures: dict[str, float] = json.loads(out.read_text())[target][text.name]
    return figures


def test_a_revision_decides_weights_and_tokenizer(hub: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    main, small = figures("some/model", text), figures("some/model", text, "--revision", "small")
    assert main == figures(str(hub / ("a" * 40)), text) and small == figures(str(hub / ("b" * 40)), text)
    assert main["num_tokens"] < small["num_tokens"]
    with pytest.raises(ValueError, match="revision 'small' needs a hub name"):
        run_eval([EvaluatedModel("m", ModelSource(str(hub / ("b" * 40)), "small"))], {})


def test_code_of_a_models_own_runs_only_where_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    plain = tiny_model(tmp_path / "plain")
    folder = Path(shutil.copytree(plain, tmp_path / "own"))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "own.Own"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "own.py").write_text(CODE, encoding="utf-8")
    assert figures(str(folder), text, "--trust-remote-code") == figures(str(plain), text)


def test_a_recipe_says_revision_and_trust_itself() -> None:
    with pytest.raises(ValueError, match=r"belong to a MODEL; a recipe says them as teacher\.revision"):
        CliRunner().invoke(app, ["eval", "demo", "--revision", "x"], catch_exceptions=False)


def test_the_window_is_the_recipes_unless_the_command_names_one(tmp_path: Path) -> None:
    model, text = tiny_model(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("and the thing in the end " * 6, encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"corpus: {{source: c.txt}}\nteacher: {{model: t}}\ndump: {{path: d}}\n"
        f"eval: {{source: {text}, max_tokens: 16}}\n"
    )
    own, named = (figures(str(model), text, "--recipe", str(recipe), *more) for more in ((), ("--max-tokens", "32")))
    assert (own["max_tokens"], named["max_tokens"]) == (16, 32)
    assert own["num_windows"] > named["num_windows"] > 1 and own["num_bytes"] == named["num_bytes"]


def test_figures_on_a_text_of_the_command_line_stand_beside_those_of_the_recipes_own(tmp_path: Path) -> None:
    texts = {name: tmp_path / name / "text.txt" for name in ("own", "other", "third")}
    for name, path in texts.items():
        path.parent.mkdir()
        path.write_text(f"{TEXT} {name}", encoding="utf-8")
    run = tmp_path / "run"
    for name in ("start", "export"):
        tiny_model(run / name, seed=len(name))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"corpus: {{source: {texts['own']}}}\nteacher: {{model: {run / 'start'}}}\n"
        f"dump: {{path: {tmp_path / 'dump'}}}\n"
        f"student: {{model: {run / 'start'}, path: {run}}}\neval: {{source: {texts['own']}}}\n"
    )
    CliRunner().invoke(app, ["eval", str(recipe)], catch_exceptions=False)
    own = (run / "eval.json").read_bytes()
    for name in ("other", "third"):
        CliRunner().invoke(app, ["eval", str(recipe), "--corpus", str(texts[name])], catch_exceptions=False)
    assert (run / "eval.json").read_bytes() == own and len(list(run.glob("eval-text.txt-*.json"))) == 2
    found = read_run(run).evaluation
    assert found["student"]["held_out"] == json.loads(own)["student"]["held_out"]
    assert len(found["student"]) == 3 and "text.txt" in found["student"]
    assert len({figures["text_sha256"] for figures in found["student"].values()}) == 3
    CliRunner().invoke(
        app, ["eval", str(recipe), "--corpus", str(texts["other"]), "--limit", "1"], catch_exceptions=False
    )
    assert len(list(run.glob("eval-*.json"))) == 2  # the same text, measured anew
