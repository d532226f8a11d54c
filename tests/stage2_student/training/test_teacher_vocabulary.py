"""Runs whose objectives compare tokens: what they read of a dump, from its shards to the loss."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import Recipe
from pipeline.config.dump import TokensConfig
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.special_ids import SpecialIds
from schemas.manifest import Manifest, ShardPlan
from schemas.shard import commit_shard, to_table
from schemas.token_vocabulary import write_vocabulary
from stage2_student.data.reader import DumpReader
from stage2_student.data.union import Member
from stage2_student.losses.objectives import ON_TOKENS
from stage2_student.runs.dump_tokens import check_planned_tokens, check_tokens
from stage2_student.training.building.student import build_student
from stage2_student.training.rank_batches import BatchBuilder, Sources
from stage2_student.training.teacher_vocabulary import tokenizer_pair
from tests.support.micro_batches import count_all
from tests.support.small_dumps import make_recipe
from tests.support.tiny import save_tiny, tiny_model, tiny_tokenizer
from tests.support.token_records import TEACHER_MERGES, pair_of, taught

PAIR = pair_of()
ACROSS = {name: 1.0 for name in ON_TOKENS if name != "token_kl"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a student, a teacher's folder, and a dump of 12 documents with the teacher's tokens."""
    folder = tmp_path_factory.mktemp("work")
    tiny_model(folder / "model")
    save_tiny(folder / "teacher", tiny_tokenizer(TEACHER_MERGES), 1)
    (folder / "start").symlink_to(folder / "model")
    dump = folder / "dump"
    (dump / "shards").mkdir(parents=True)
    assert isinstance(PAIR.teacher, ByteTokenizer)
    teacher = {"model": "t", "tokenizer_sha256": PAIR.teacher.sha256, "end_ids": list(PAIR.teacher_ends)}
    identity = {"teacher": teacher, "tokens": {"top_k": 5, "min_prob": 0.0}}
    records = [taught(PAIR, seed).encoded.record for seed in range(12)]
    plan = ShardPlan(index=0, first_document=0, num_documents=12, num_bytes=0, sha256="0")
    Manifest(identity=identity, corpus_counts={"used": 12}, shards=(plan,)).save(dump)
    commit_shard(to_table(records, identity), plan.path(dump), 3)
    write_vocabulary(dump, PAIR.teacher.token_bytes)
    return folder


def recipe_of(work: Path, objectives: dict[str, float], **train: Any) -> Recipe:
    zeros = {"ce": 0.0, "byte_ce": 0.0, "kl": 0.0, "alm": 0.0}
    recipe = make_recipe(work / "dump", work / "model", work, {"objectives": zeros | objectives, **train})
    return recipe.with_values(teacher=recipe.teacher.model_copy(update={"model": str(work / "teacher")}))


def test_a_run_reads_tokens_from_shards_and_computes_every_objective_with_a_gradient(work: Path) -> None:
    recipe = recipe_of(work, {**ACROSS, "alm": 1.0}, alm_space=True, alm_end=True, balance="gradient")
    reader = DumpReader(work / "dump", 0)
    tokenizer, ids = ByteTokenizer.load(str(work / "model")), SpecialIds(268, (268,))
    check_tokens(recipe, [reader.manifest])
    student = build_student(recipe, tokenizer, ids, [reader.manifest])
    assert student.interface is None and set(student.on_tokens) == set(ACROSS)
    sources = Sources([Member(reader)], tokenizer, None, ids)
    builder = BatchBuilder(recipe, sources, None, "on", 0, 1, on_tokens=student.on_tokens)
    [(_, batches)] = islice(builder.steps([count_all(reader, tokenizer)]), 1)
    for batch in batches:
        nats, sums = student(batch)
        found = dict(zip(student.sums_names, sums.tolist(), strict=True))
        assert all(found[name] > 0 for name in (*ACROSS, "alm"))
        [gradient] = torch.autograd.grad(nats, student.lm.get_input_embeddings().weight)
        assert torch.isfinite(gradient).all() and gradient.any()


def test_a_dump_of_bytes_alone_is_refused_before_anything_is_loaded(work: Path) -> None:
    manifest = Manifest.load(work / "dump")
    without = manifest.model_copy(update={"identity": {"teacher": manifest.identity["teacher"]}})
    with pytest.raises(ValueError, match=r"gold compares the student's tokens.*holds bytes alone.*dump\.tokens="):
        check_tokens(recipe_of(work, {"gold": 1.0}), [without])
    with pytest.raises(ValueError, match="alm_end compares"):
        check_tokens(recipe_of(work, {"alm": 1.0}, alm_end=True), [without])
    check_tokens(recipe_of(work, {"alm": 1.0}), [without])
    check_tokens(recipe_of(work, {"gold": 1.0}), [manifest])


def test_a_dump_that_will_hold_bytes_alone_is_refused_before_it_is_made(work: Path, tmp_path: Path) -> None:
    recipe = recipe_of(work, {"gold": 1.0})
    check_planned_tokens(recipe)  # it is made, with tokens
    unmade = recipe.with_values(dump=recipe.dump.model_copy(update={"path": str(tmp_path / "none")}))
    with pytest.raises(ValueError, match=r"gold compares .*none will hold bytes alone"):
        check_planned_tokens(unmade)
    asked = unmade.dump.model_copy(update={"tokens": TokensConfig()})
    check_planned_tokens(unmade.with_values(dump=asked))
    manifest = Manifest.load(work / "dump")
    without = manifest.model_copy(update={"identity": {"teacher": manifest.identity["teacher"]}})
    (tmp_path / "none").mkdir()
    without.save(tmp_path / "none")
    with pytest.raises(ValueError, match="none holds bytes alone"):
        check_planned_tokens(unmade.with_values(dump=asked))


def test_corpora_whose_teachers_have_other_tokens_are_refused(work: Path) -> None:
    values = recipe_of(work, {"strict_kl": 1.0}).model_dump(mode="json")
    values["student"]["dumps"] = [{"path": name, "corpus": name} for name in ("a", "b")]
    recipe, manifest = Recipe.model_validate(values), Manifest.load(work / "dump")
    check_tokens(recipe, [manifest, manifest])
    teacher = manifest.identity["teacher"] | {"tokenizer_sha256": "another"}
    other = manifest.model_copy(update={"identity": manifest.identity | {"teacher": teacher}})
    with pytest.raises(ValueError, match="the teachers of a and b have different ones"):
        check_tokens(recipe, [manifest, other])


def test_a_projection_refuses_another_tokenizer_than_the_dumps(work: Path) -> None:
    recipe = recipe_of(work, {"xtoken_kl": 1.0})
    other = recipe.with_values(teacher=recipe.teacher.model_copy(update={"tokenizer": str(work / "model")}))
    tokenizer, ids = ByteTokenizer.load(str(work / "model")), SpecialIds(268, (268,))
    manifest = Manifest.load(work / "dump")
    pair = tokenizer_pair(other, [manifest], tokenizer, ids, 269)
    assert (pair.exact == replace(PAIR, student_end=268).exact).all()  # the vocabulary is the dump's own
    with pytest.raises(ValueError, match=r"is another \(.*than the dump's.*teacher\.tokenizer"):
        _ = pair.projection
    assert (tokenizer_pair(recipe, [manifest], tokenizer, ids, 269).projection[0] == PAIR.projection[0]).all()


def test_several_dumps_have_no_teacher_whose_tokens_could_be_compared(work: Path) -> None:
    values = recipe_of(work, {"strict_kl": 1.0}).model_dump(mode="json")
    values["student"]["dumps"] = [{"path": "a"}, {"path": "b"}]
    with pytest.raises(ValueError, match=r"strict_kl \(1\) matches one teacher's own tokens"):
        Recipe.model_validate(values)
