"""An engine's branches are used only if they are what the model says of their paths."""

from pathlib import Path

import pytest

from pipeline.config.loading import load_recipe
from schemas.manifest import read_json
from stage1_teacher.engines.huggingface import TransformersEngine
from stage1_teacher.engines.tree_attention import Tree
from stage1_teacher.targets.opening import open_teacher
from stage1_teacher.targets.resolved import load_tokenizer
from stage1_teacher.targets.teacher import Teacher
from tests.stage1_teacher.dump.test_run import TEXTS, dump, write_recipe
from tests.support.tiny import tiny_tokenizer
from tests.zoo.models import save_tiny

BRANCHES = {"beam_width": 4, "branch_threshold": 0.01}


def opened(folder: Path, model: Path, branches: bool = False) -> Teacher:
    recipe = load_recipe(write_recipe(folder, model, ["text"], **({"covering": BRANCHES} if branches else {})))
    return open_teacher(recipe, *load_tokenizer(recipe), branches=True)


@pytest.mark.parametrize(
    ("family", "values", "why"),
    [
        ("zaya", {}, "computes branches differently from how the model"),  # a convolution inside its attention
        ("phimoe", {"sliding_window": 20}, "computes branches differently"),  # a window that only its mask knows
        (
            "llama4_text",
            {"attention_chunk_size": 16, "layer_types": ["chunked_attention"] * 2},
            "computes branches differently",
        ),
        ("granitemoehybrid", {}, "has layers that are not attention"),
        ("nemotron", {}, "does not pass keyword arguments"),
        ("bloom", {}, "has an attention of its own"),
    ],
)  # fmt: skip
def test_a_teacher_whose_branches_would_be_wrong_is_refused_with_them_and_audited_without(
    tmp_path: Path, family: str, values: dict[str, object], why: str
) -> None:
    model = save_tiny(tmp_path / "model", family, tiny_tokenizer(), **values)
    with pytest.raises(ValueError, match=rf"model \(.*\): .*{why}.*dump\.covering\.beam_width: 0"):
        opened(tmp_path, model, branches=True)
    folder = dump(write_recipe(tmp_path, model, TEXTS[:4]))  # canonical rows, and the default audit
    audit = read_json(folder / "audit.json")
    assert audit["wide_covering"]["documents"] == 0
    assert why in audit["wide_covering"]["not_compared"][0]
    assert audit["models_own_tokens"]["half_mean_square_nats"] < 1e-3


@pytest.mark.parametrize("family", ["deepseek_v3", "minicpm3", "gpt_oss", "llama"])
def test_a_teacher_of_latent_attention_or_with_sinks_branches_and_is_audited(tmp_path: Path, family: str) -> None:
    model = save_tiny(tmp_path / "model", family, tiny_tokenizer())
    assert opened(tmp_path, model, branches=True).engine.cannot_branch is None  # type: ignore[union-attr]
    audit = read_json(dump(write_recipe(tmp_path, model, TEXTS[:4])) / "audit.json")
    assert audit["wide_covering"]["documents"] == 1 and audit["wide_covering"]["not_compared"] == []


def test_branch_rows_that_are_anothers_are_noticed(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extend = Tree.extend
    monkeypatch.setattr(Tree, "extend", lambda self, tokens: extend(self, tokens).flip(0))
    with pytest.raises(ValueError, match=r"rows differ on average by \S+ nats \(branches\) and \S+ nats \(prompts\)"):
        opened(tmp_path, model, branches=True)
    monkeypatch.undo()
    hidden = Tree._prefill
    monkeypatch.setattr(Tree, "_prefill", lambda self, prompts: [states.flip(0) for states in hidden(self, prompts)])
    teacher = opened(tmp_path, model)
    assert isinstance(teacher.engine, TransformersEngine)
    with pytest.raises(ValueError, match="computes branches differently"):
        teacher.engine.branches([[1, 2, 3]], [[]])


def test_an_engine_that_fails_where_it_branches_is_opened_anew_without(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine's kernels may fail so for a model, and nothing else of it is known to be whole then."""
    closed: list[TransformersEngine] = []

    def fail(*_: object) -> None:
        raise IndexError("index 10 is out of bounds")

    monkeypatch.setattr(Tree, "extend", fail)
    monkeypatch.setattr(TransformersEngine, "close", lambda self: closed.append(self))
    teacher = opened(tmp_path, model)
    assert len(closed) == 1 and teacher.engine is not closed[0]
    with pytest.raises(ValueError, match="fails when it branches: IndexError: index 10 is out of bounds"):
        teacher.engine.branches([[1, 2, 3]], [[]])  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"model \(LlamaForCausalLM\): .*fails when it branches.*beam_width: 0"):
        opened(tmp_path, model, branches=True)
