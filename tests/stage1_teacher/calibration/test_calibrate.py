"""A calibration against the dump it forecasts, and a dump's record of its cost."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.loading import load_recipe
from pipeline.corpus.documents import Corpus
from pipeline.planning.estimates import student_t
from pipeline.planning.forecast import forecast
from pipeline.runtime import metrics
from schemas.manifest import Manifest
from stage1_teacher.calibration.calibrate import calibrate, grouped
from stage1_teacher.calibration.corpus_sample import survey
from stage1_teacher.dump.run import run_teacher
from stage1_teacher.dump.shard_cost import read_cost
from stage1_teacher.verification.verify import verify_dump
from tests.stage1_teacher.dump.test_run import dump, write_recipe
from tests.support.tiny import tiny_model

COUNTED = {
    "bld_documents_total": "documents",
    "bld_text_bytes_total": "bytes",
    "bld_positions_total": "positions",
    "bld_teacher_tokens_total": "teacher_tokens",
    "bld_stored_bytes_total": "stored_bytes",
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated")
    rng = np.random.default_rng(0)
    words = ["the", "and", "thing", "in", "other", "a", "é", "hand", "rather", "thin"]
    texts = [" ".join(rng.choice(words, rng.integers(4, 120))) + f" {i}" for i in range(60)]
    return write_recipe(folder, tiny_model(folder / "model"), texts, shard_bytes=3000)


def test_a_calibration_foretells_the_dump_and_the_metrics_count_it(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    found = forecast(calibrate(loaded, seconds=1.0), num_workers=1)
    counted = {name: metrics.figures().registry.get_sample_value(name) or 0.0 for name in COUNTED}
    folder = dump(recipe)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for name, key in COUNTED.items():
        assert (metrics.figures().registry.get_sample_value(name) or 0.0) - counted[name] == summary[key]
    assert found.documents == (summary["documents"], 0) and found.text_bytes == (summary["bytes"], 0)
    assert abs(found.teacher_tokens.value - summary["teacher_tokens"]) <= 2 * found.teacher_tokens.half + 1
    assert found.stored_bytes.value == pytest.approx(summary["stored_bytes"], rel=0.15)
    assert found.computed_per_token.value == 1
    assert not (folder / "shards").with_name("parts").exists()


def test_a_calibration_counts_the_bytes_of_alternatives(recipe: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe, [f"dump.path={tmp_path / 'dump'}", "dump.tokens.top_k=256", "dump.tokens.min_prob=0"])
    found = forecast(calibrate(loaded, seconds=0.5), num_workers=1)
    run_teacher(loaded)
    summary = json.loads((tmp_path / "dump" / "summary.json").read_text(encoding="utf-8"))
    plain = json.loads((dump(recipe) / "summary.json").read_text(encoding="utf-8"))
    assert found.stored_bytes.value == pytest.approx(summary["stored_bytes"], rel=0.15)
    assert summary["stored_bytes"] > 3 * plain["stored_bytes"]


def test_a_dump_tells_what_it_took_and_the_summary_adds_it_up(recipe: Path) -> None:
    folder = dump(recipe)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    told = [read_cost(folder, shard) for shard in Manifest.load(folder).shards]
    cost = summary["cost"]
    assert cost["seconds"] == pytest.approx(sum(took.seconds for took in told if took is not None)) and None not in told
    assert list(cost["by_devices"].values()) == [pytest.approx(cost["seconds"])] and cost["seconds"] > 0
    assert verify_dump(folder) == []
    shutil.rmtree(folder / "costs")  # as of a dump that was pulled
    assert verify_dump(folder) == []


def test_a_survey_of_a_part_says_how_many_documents_the_whole_has(recipe: Path) -> None:
    corpus = Corpus(load_recipe(recipe).corpus)
    whole = survey(corpus, 3000, None)
    assert sum(whole.shape.shards) == whole.shape.num_bytes and whole.shape.num_documents == (60, 0)
    part = survey(corpus, 3000, 10 * whole.shape.num_bytes, max_bytes=whole.shape.num_bytes // 2)
    assert sum(part.shape.shards) == 10 * whole.shape.num_bytes and 3 < len(part.sample) < 60
    # Of half the documents, in order; twice the half-width is 99.99 % of a normal one.
    assert abs(part.shape.num_documents.value - 600) < 2 * part.shape.num_documents.half


def test_the_sample_is_random_bounded_and_the_same_each_time(recipe: Path) -> None:
    corpus = Corpus(load_recipe(recipe).corpus)
    first, again = (survey(corpus, 3000, None, max_bytes=4000).sample for _ in range(2))
    assert first == again and sum(len(document.text) for document in first) <= 4000
    places = [int(document.doc_id) for document in survey(corpus, 3000, None).sample]
    assert sorted(places) == list(range(60)) and places != sorted(places)
    assert abs(np.mean(places[:20]) - 29.5) < student_t(19) * 18  # not the first ones


def test_groups_hold_all_documents_and_overflow_only_alone(recipe: Path) -> None:
    documents = list(Corpus(load_recipe(recipe).corpus).documents())
    groups = list(grouped(documents, 500))
    assert [document for group in groups for document in group] == documents
    assert all(len(group) == 1 or sum(len(d.text) for d in group) <= 500 for group in groups)
