"""Resources of an engine: what it reserves on which machines, and how many fit."""

import pytest

from pipeline.config import Recipe
from stage1_teacher.ray.resources import EngineResources, cross_machine_warning, engine_resources, with_writers

RECIPE = {"corpus": {"source": "c"}, "teacher": {"model": "m"}, "dump": {"path": "d"}}


def placed(teacher: dict[str, object], placement: dict[str, object]) -> Recipe:
    return Recipe.model_validate(RECIPE | {"teacher": RECIPE["teacher"] | teacher, "placement": placement})


def test_an_engine_takes_the_gpus_of_its_parallel_sizes_or_a_machine_without_gpus() -> None:
    split = {"tensor_parallel": 4, "pipeline_parallel": 2}
    gpus = [{"CPU": 64.0, "GPU": 8.0}, {"CPU": 8.0}]
    for teacher, placement, machines, wanted in (
        ({}, split, gpus, EngineResources(1, 8)),
        ({}, {}, gpus, EngineResources(1, 1)),
        ({}, {}, [{"CPU": 16.0}, {"CPU": 8.0}, {}], EngineResources(8, 0)),
        ({}, {"engine_gpus": 2, "engine_cpus": 3}, [], EngineResources(3, 2)),
        ({"engine": "openai"}, {"base_url": "http://h"}, gpus, EngineResources(1, 0)),
    ):
        assert engine_resources(placed(teacher, placement), machines) == wanted


def test_an_engine_that_no_machine_has_gpus_for_takes_a_bundle_for_each() -> None:
    split = {"tensor_parallel": 4, "pipeline_parallel": 3}
    four = {"CPU": 16.0, "GPU": 4.0}
    room = engine_resources(placed({}, split), [four])
    assert room == EngineResources(1, 12, over_machines=True)
    assert room.bundles == [{"CPU": 1, "GPU": 1}] + 11 * [{"GPU": 1}]
    assert [room.count(n * [four]) for n in (2, 3, 5, 6)] == [0, 1, 1, 2]
    assert room.count([four, four, {"GPU": 4.0}]) == 1  # its first process needs a core as well, the others none
    assert room.count(3 * [{"GPU": 4.0}]) == 0
    assert cross_machine_warning(room, 4, [four]) is None
    assert "Prefer tensor_parallel: 4" in (cross_machine_warning(room, 12, [four]) or "")
    with pytest.raises(ValueError, match=r"engine_gpus is 5, more than any machine .* has \(4\).*\(12\)"):
        engine_resources(placed({}, split | {"engine_gpus": 5}), [four])


def test_one_machine_holds_as_many_engines_as_its_scarcest_part_allows() -> None:
    assert (
        EngineResources(4, 2).count([{"CPU": 16.0, "GPU": 8.0}, {"CPU": 7.0, "GPU": 8.0}, {"CPU": 64.0}, {}]) == 4 + 1
    )
    assert EngineResources(4, 0).count([{"CPU": 16.0, "GPU": 8.0}, {"CPU": 7.0}]) == 4 + 1


def test_engines_share_the_cores_of_their_machine_among_their_writers() -> None:
    eight, few = {"CPU": 64.0, "GPU": 8.0}, {"CPU": 8.0, "GPU": 1.0}
    for placement, machines, writers in (
        ({}, [eight], 2),
        ({"tensor_parallel": 8}, [eight], 4),
        ({}, [eight, few], 2),
        ({}, [{"CPU": 8.0, "GPU": 8.0}], 1),
        ({"tensor_parallel": 16}, [eight, eight], 4),
        ({"writers": 0}, [eight], 0),
        ({}, [{"CPU": 64.0}], None),
        ({"engine_gpus": 1}, [], None),
    ):
        recipe = placed({}, placement)
        assert with_writers(recipe, engine_resources(recipe, machines), machines).placement.writers == writers
