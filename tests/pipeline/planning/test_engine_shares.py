"""GPUs of a machine, divided among its engines."""

from pathlib import Path

import pytest

from pipeline.config import Recipe
from pipeline.planning import engine_shares as module
from pipeline.planning.dry_run import plan
from pipeline.planning.engine_shares import describe_shares, divide_gpus, engine_shares, num_independent, unused_gpus
from pipeline.runtime.devices import named_gpus

UUIDS = ["GPU-aa", "GPU-bb", "GPU-cc"]


def numbers(count: int) -> list[str]:
    return [str(index) for index in range(count)]


@pytest.mark.parametrize(
    ("gpus", "per_engine", "asked", "shares"),
    [
        (numbers(8), 1, None, [(name,) for name in numbers(8)]),
        (numbers(8), 2, None, [("0", "1"), ("2", "3"), ("4", "5"), ("6", "7")]),
        (numbers(3), 2, None, [("0", "1")]),
        (["5", "2", "7"], 1, None, [("5",), ("2",), ("7",)]),
        (UUIDS, 2, None, [("GPU-aa", "GPU-bb")]),
        (UUIDS, 1, 2, [("GPU-aa",), ("GPU-bb",)]),
        ([], 1, None, [()]),
        ([], 4, 3, [(), (), ()]),
        (numbers(2), 4, None, [("0", "1")]),  # the engine says what it lacks
        (numbers(2), 1, 5, [("0",), ("1",), ("0",), ("1",), ("0",)]),
        (numbers(5), 2, 3, [("0", "1"), ("2", "3"), ("0", "1")]),
    ],
)
def test_each_engine_gets_its_gpus_in_the_order_of_what_is_visible(
    gpus: list[str], per_engine: int, asked: int | None, shares: list[tuple[str, ...]]
) -> None:
    assert divide_gpus(gpus, per_engine, asked) == shares
    assert {name for share in shares for name in share} | set(unused_gpus(gpus, shares)) == set(gpus)


def test_several_engines_where_not_one_fits_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"engines is 2, but one engine takes 4 GPUs .* and 3 GPUs can be seen"):
        divide_gpus(numbers(3), 4, 2)


@pytest.mark.parametrize(
    ("number", "visible", "names"),
    [
        (3, None, ["0", "1", "2"]),
        (2, "4,6", ["4", "6"]),
        (2, " 4 , 6 ", ["4", "6"]),
        (1, "3,-1,4", ["3"]),  # CUDA stops at the first that does not exist
        (2, "GPU-aa,GPU-bb", ["GPU-aa", "GPU-bb"]),
        (1, "MIG-aa,MIG-bb", ["MIG-aa", "MIG-bb"]),  # a process sees one part of a GPU, another process another one
        (0, "", []),
    ],
)
def test_gpus_have_the_names_that_the_operator_made_visible(number: int, visible: str | None, names: list[str]) -> None:
    assert named_gpus(number, visible) == names


def recipe(tmp_path: Path, engine: str = "vllm", **placement: object) -> Recipe:
    (tmp_path / "text.jsonl").write_text('{"text": "the"}\n')
    (tmp_path / "model").mkdir(exist_ok=True)
    return Recipe.model_validate(
        {
            "corpus": {"source": str(tmp_path / "text.jsonl")},
            "teacher": {"model": str(tmp_path / "model"), "engine": engine, "max_tokens": 64},
            "dump": {"path": str(tmp_path / "dump")},
            "placement": placement,
        }
    )


def test_a_plan_names_the_engines_their_gpus_and_those_that_hold_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "visible_gpus", lambda: numbers(5))

    def planned(**placement: object) -> str:
        return dict(plan(recipe(tmp_path, **placement)))["placement"]

    assert planned() == "5 engines on 5 GPUs: 0 | 1 | 2 | 3 | 4"
    assert (
        planned(tensor_parallel=2) == "2 engines on 4 GPUs: 0,1 | 2,3; 1 GPU without an engine (an engine takes 2): 4"
    )
    assert planned(engines=1) == "1 engine on 1 GPU: 0; 4 GPUs without an engine (placement.engines): 1,2,3,4"
    assert planned(engines=6) == "6 engines on 5 GPUs: 0 | 1 | 2 | 3 | 4; several engines share a GPU"


def test_a_cpu_or_a_server_has_one_engine_unless_more_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "visible_gpus", list)
    assert engine_shares(recipe(tmp_path)) == [()]
    two = engine_shares(recipe(tmp_path, engines=2))
    assert two == [(), ()] and describe_shares(recipe(tmp_path), two) == "2 engines" and num_independent(two) == 1
    assert "placement" not in dict(plan(recipe(tmp_path)))
    monkeypatch.setattr(module, "visible_gpus", lambda: numbers(4))
    assert engine_shares(recipe(tmp_path, "openai", base_url="http://127.0.0.1:1")) == [()]
    assert num_independent(engine_shares(recipe(tmp_path, engines=8))) == 4
