"""The benchmark of methods: what it trains with is valid, and no method has more to search than another."""

import json
from pathlib import Path

import pytest

from pipeline.config.loading import load_recipe
from stage2_student.evaluation.divergence import DocumentDivergence
from tests.bench.method_settings import PAIRS, SAME, methods_of
from tests.bench.methods import Methods, main
from tests.bench.quality import Run
from tests.bench.quality_measures import Figures
from tests.bench.quality_methods import NUM_SETTINGS


@pytest.mark.parametrize("pair", PAIRS)
def test_every_setting_of_every_method_is_a_recipe_and_each_has_as_many(pair: str) -> None:
    recipe, overrides = PAIRS[pair]
    for name, method in methods_of(pair).items():
        settings = method.settings()
        assert len(set(settings)) == NUM_SETTINGS, name
        for setting in settings[-2:]:
            weights = load_recipe(recipe, [*overrides, "dump.tokens={top_k: 16}", *setting]).train.objectives.weights
            assert any(weights.values()), name


def test_the_bound_has_a_student_with_the_teachers_tokenizer() -> None:
    recipe, overrides = PAIRS[SAME]
    student = load_recipe(recipe, list(overrides)).student
    assert student is not None and student.tokenizer is None and len(student.drop_layers) == 4


def measured(bits: float) -> Figures:
    """Return made-up figures of eight documents of each kind."""
    fields = dict.fromkeys(DocumentDivergence._fields, 1.0)
    records = [
        DocumentDivergence(**{**fields, "doc_id": f"d{i}", "token_nats": 10 * bits + i / 10, "num_bytes": 10})
        for i in range(8)
    ]
    return Figures({"in_domain": records, "out_of_domain": records}, {})


def test_the_benchmark_keeps_every_document_and_stops_the_control_where_validation_is_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int, str]] = []

    def figures(self: Methods, run: Run, split: str) -> Figures:
        asked.append((run.method, run.steps, split))
        return measured(1.0 + abs(run.steps - 4) / 8 - 0.1 * (run.method == "strict") + run.seed / 100)

    monkeypatch.setattr(Methods, "prepare", lambda *_: None)
    monkeypatch.setattr(Methods, "figures", figures)
    monkeypatch.setattr(Methods, "reference", lambda self, name: measured({"teacher": 0.5, "start": 2.0}[name]))
    monkeypatch.setattr(Methods, "dump_bytes", lambda self: {"stored": 3, "text": 1})
    monkeypatch.setattr(Methods, "costs", lambda self, run: {"step_seconds": 1.5, "memory_bytes": 2.0})
    main(methods="sft; strict", steps=8, seeds=2, out=tmp_path)
    kept = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert kept["methods"]["sft"]["steps"] == 4 and kept["methods"]["strict"]["steps"] == 8
    assert set(kept["methods"]["strict"]["seeds"]) == {"0", "1"}
    assert len(kept["methods"]["sft"]["seeds"]["1"]["out_of_domain"]) == 8
    assert [row["method"] for row in kept["table"]] == ["teacher", "start", "sft", "strict"]
    assert {split for method, _, split in asked if method == "strict"} == {"search", "table"}


def test_a_steps_cost_is_read_from_the_runs_own_figures(tmp_path: Path) -> None:
    bench = Methods("gpt2", [], tmp_path, 2, 250)
    run = Run("strict", ("a",), 3, 0)
    (tmp_path / "runs" / run.name).mkdir()
    lines = [{"step": i, "seconds": at, "memory_bytes": i} for i, at in enumerate((5.0, 6.0, 8.0, 9.0))]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "runs" / run.name / "metrics.jsonl").write_text(text, encoding="utf-8")
    assert bench.costs(run) == {"step_seconds": 1.0, "memory_bytes": 3.0}
