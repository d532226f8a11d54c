"""The benchmark of methods: what it trains with is valid, and no method has more to search than another."""

import pytest

from pipeline.config.loading import load_recipe
from tests.bench.method_settings import PAIRS, SAME, methods_of
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
