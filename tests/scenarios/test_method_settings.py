"""The benchmark of methods: what it trains with is valid, and no method has more to search than another."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.loading import load_recipe
from stage2_student.evaluation.divergence import DocumentDivergence
from tests.bench import results
from tests.bench.kept_figures import documents_of, figures_of, read_figures
from tests.bench.method_settings import PAIRS, SAME, methods_of
from tests.bench.method_tables import tables, weights_of
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


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int, str]]:
    """Replace what takes hours by made-up figures; returns which runs are asked for."""
    runs: list[tuple[str, int, int, str]] = []

    def figures(self: Methods, run: Run, split: str) -> Figures:
        runs.append((run.method, run.steps, run.seed, split))
        return measured(1.0 + abs(run.steps - 4) / 8 - 0.1 * (run.method == "strict") + run.seed / 100)

    monkeypatch.setattr(Methods, "prepare", lambda *_: None)
    monkeypatch.setattr(Methods, "figures", figures)
    monkeypatch.setattr(Methods, "reference", lambda self, name: measured({"teacher": 0.5, "start": 2.0}[name]))
    monkeypatch.setattr(Methods, "dump_bytes", lambda self: {"stored": 3, "text": 1})
    monkeypatch.setattr(Methods, "costs", lambda self, run: {"step_seconds": 1.5, "memory_bytes": 2.0})
    return runs


def test_the_benchmark_keeps_every_document_and_stops_the_control_where_validation_is_best(
    tmp_path: Path, asked: list[tuple[str, int, int, str]]
) -> None:
    main(methods="sft; strict", steps=8, seeds=2, out=tmp_path)
    kept = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert kept["methods"]["sft"]["steps"] == 4 and kept["methods"]["strict"]["steps"] == 8
    assert set(kept["methods"]["strict"]["seeds"]) == {"0", "1"}
    assert len(kept["methods"]["sft"]["seeds"]["1"]["out_of_domain"]["nats"]) == 8
    assert [row["method"] for row in kept["table"]] == ["teacher", "start", "sft", "strict"]
    assert {split for method, _, _, split in asked if method == "strict"} == {"search", "table"}


def test_a_file_of_results_grows_by_methods_and_seeds_and_says_what_does_not_fit(
    tmp_path: Path, asked: list[tuple[str, int, int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("load", "save"):
        monkeypatch.setattr(results, name, partial(getattr(results, name), folder=tmp_path / "results"))
    main(methods="sft; strict", steps=8, seeds=1, out=tmp_path / "first", save="grown")
    before = results.load("grown")
    asked.clear()
    main(methods="strict; bpm", steps=8, seeds=2, out=tmp_path / "another machine", save="grown")
    assert [(method, seed) for method, _, seed, split in asked if split == "table"] == [
        ("strict", 1),
        ("bpm", 0),
        ("bpm", 1),
    ]
    assert "strict" not in {method for method, *_, split in asked if split == "search"}
    grown = results.load("grown")
    assert grown["methods"]["sft"] == before["methods"]["sft"]
    assert grown["methods"]["strict"]["seeds"]["0"] == before["methods"]["strict"]["seeds"]["0"]
    by_method = {row["method"]: row for row in grown["table"]}
    assert [by_method[name]["seeds"] for name in ("sft", "strict", "bpm")] == [1, 1, 1]  # those of the control's seeds
    assert by_method["strict"]["bits/byte out of domain"]["difference"] != 0
    asked.clear()
    main(methods="strict", steps=6, seeds=1, out=tmp_path / "other steps", save="grown")
    assert ("strict", 6, 0, "table") in asked and set(results.load("grown")["methods"]["strict"]["seeds"]) == {"0"}

    def others(self: Methods, name: str) -> Figures:
        return Figures({"in_domain": [measured(1.0).documents["in_domain"][0]]}, {})

    monkeypatch.setattr(Methods, "reference", others)
    with pytest.raises(ValueError, match="other documents"):
        main(methods="strict", steps=8, seeds=1, out=tmp_path / "other documents", save="grown")


def test_ours_is_compared_with_each_other_method_on_their_shared_seeds_and_by_kind_of_text(
    tmp_path: Path, asked: list[tuple[str, int, int, str]]
) -> None:
    main(methods="sft; strict", steps=8, seeds=2, out=tmp_path)
    kept = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert "against" not in kept  # it has no `token_marginal`
    made = tables(kept, ours="strict")
    (less,) = made["against"]
    bits = {
        name: np.mean([
            sum(kept["methods"][name]["seeds"][seed]["out_of_domain"]["nats"])
            / sum(kept["documents"]["out_of_domain"]["bytes"])
            for seed in ("0", "1")
        ]) / np.log(2)
        for name in ("sft", "strict")
    }  # fmt: skip
    cell = less["bits/byte out of domain"]
    assert less["strict, 1 strict_kl, less"] == "sft" and less["seeds"] == 2
    assert cell["value"] == pytest.approx(bits["strict"] - bits["sft"], abs=1e-4)
    assert cell["interval"][0] <= cell["value"] <= cell["interval"][1]
    assert {row["bits/byte of"]: row["d0"] for row in made["kinds"]}["start"] == pytest.approx(
        measured(2.0).documents["out_of_domain"][0].token_nats / 10 / np.log(2), abs=1e-3
    )


def test_a_row_names_the_weights_that_its_overrides_end_with() -> None:
    first = "train.objectives={ce: 0.3, byte_ce: 0.0, kl: 1, a/b/own_kl.py: 0.5}"
    assert weights_of(["train.lr=1", first]) == "1 kl + 0.5 own_kl + 0.3 ce"
    assert weights_of([first, "train.objectives.ce=0"]) == "1 kl + 0.5 own_kl"


def test_kept_figures_are_read_back() -> None:
    fields = {"doc_id": "a", "positions": 7, "jsd_nats": 0.1234567891, "clear": 5, "kl_clear_nats": 0.25}
    record = DocumentDivergence(**fields, num_bytes=6, token_nats=3.5)
    found = Figures({"in_domain": [record, record._replace(doc_id="b")]}, {})
    back = read_figures(documents_of(found), figures_of(found))
    assert back.documents["in_domain"][1]._replace(jsd_nats=record.jsd_nats, doc_id="a") == record
    assert back.documents["in_domain"][0].jsd_nats == 0.123457


def test_a_steps_cost_is_read_from_the_runs_own_figures(tmp_path: Path) -> None:
    bench = Methods("gpt2", [], tmp_path, 2, 250)
    run = Run("strict", ("a",), 3, 0)
    (tmp_path / "runs" / run.name).mkdir()
    lines = [{"step": i, "seconds": at, "memory_bytes": i} for i, at in enumerate((5.0, 6.0, 8.0, 9.0))]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "runs" / run.name / "metrics.jsonl").write_text(text, encoding="utf-8")
    assert bench.costs(run) == {"step_seconds": 1.0, "memory_bytes": 3.0}
