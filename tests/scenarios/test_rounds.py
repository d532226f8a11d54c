"""Rounds with the real commands: the teacher writes, then the student, and each text is dumped and learned."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from pipeline.cli.app import app
from pipeline.config.loading import load_recipe
from pipeline.rounds.run import run_rounds
from tests.stage1_teacher.generation.test_run import rows_of, texts, write_recipe
from tests.support.ascii_models import ascii_model
from tests.support.small_dumps import make_dump
from tests.support.tiny import END_OF_TEXT, tiny_tokenizer

PROMPTS = [f"the thing {i} and é" for i in range(8)]


class Killed(BaseException):
    """As SIGKILL."""


def bld(arguments: Sequence[str]) -> None:
    assert not app(list(arguments), standalone_mode=False)


def test_a_cold_start_and_a_round_are_run_by_the_real_commands_and_resumed_between_them(tmp_path: Path) -> None:
    teacher = ascii_model(tmp_path / "teacher", tiny_tokenizer(), END_OF_TEXT)
    student = ascii_model(tmp_path / "student", tiny_tokenizer(), END_OF_TEXT, seed=1)
    path = write_recipe(tmp_path, teacher, texts(PROMPTS), completions=2)
    values = yaml.safe_load(path.read_text())
    make_dump(tmp_path / "dump", 12, 2)
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts(["in a thing", "the river"])))
    values |= {
        "student": {"model": str(student), "path": str(tmp_path / "run"), "start": END_OF_TEXT, "end": END_OF_TEXT},
        "train": {
            "batch_tokens": 200, "micro_batch_tokens": 200, "dtype": "float32", "lr": 1e-3, "warmup_steps": 0,
            "objectives": {"ce": 1.0, "kl": 1.0},
        },
        "eval": {"source": str(tmp_path / "held.jsonl")},
        "rounds": {
            "path": str(tmp_path / "rounds"), "count": 1, "steps": 2, "cold_start": True, "replay": 0.25,
            "max_regression": 100.0,
        },
    }  # fmt: skip
    path.write_text(yaml.safe_dump(values))
    recipe, done = load_recipe(path), list[str]()

    def until_the_second_dump(arguments: Sequence[str]) -> None:
        done.append(arguments[0])
        if done.count("teacher") == 2:
            raise Killed
        bld(arguments)

    with pytest.raises(Killed):
        run_rounds(recipe, until_the_second_dump)
    zero, one = (tmp_path / "rounds" / f"round-0{number}" for number in range(2))
    written = rows_of(one / "text")
    first, second = run_rounds(recipe, bld)

    assert rows_of(one / "text") == written  # by the student of round 0, however often it is asked for
    writers = [json.loads((folder / "text/corpus.json").read_text())["identity"]["writer"] for folder in (zero, one)]
    assert writers[0]["weights_sha256"] != writers[1]["weights_sha256"]
    assert [load_recipe(folder / "text/recipe.yaml").generate.writer for folder in (zero, one)] == [  # type: ignore[union-attr]
        "teacher",
        "student",
    ]
    assert first.by_text.keys() == second.by_text.keys() == {"held_out"} and first.mean != second.mean
    identity = json.loads((tmp_path / "run/identity.json").read_text())
    assert {name: of["share"] for name, of in identity["corpora"].items()} == {"first": 0.25, "round": 0.75}
    [change] = identity["trained_on"]
    assert change["from_step"] == 2 and any(field.startswith("corpora.round.") for field in change["changed"])
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert steps[2]["epoch/round"] > steps[1]["epoch/round"]  # of another text
    best = json.loads((tmp_path / "rounds/rounds.json").read_text())["best"]
    exported = (tmp_path / "rounds" / f"round-0{best}/export/model.safetensors").read_bytes()
    assert (tmp_path / "rounds/export/model.safetensors").read_bytes() == exported
