"""Recipes: YAML files read, overridden and checked; errors name the key, the value and the closest known key."""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config import Recipe
from pipeline.config.renamed import with_new_names
from pipeline.config.section import models_in
from schemas import dump_files
from schemas.storage.locations import Location

_PACKAGED = Path(__file__).parents[1] / "recipes"
_SETTINGS = _PACKAGED / "settings"
_MAX_DEPTH, _MAX_VALUES = 30, 10_000  # of a recipe's YAML


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, and reads 1e-5 as a number (in YAML 1.1 it is text)."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise ValueError(f"line {key_node.start_mark.line + 1}: the key {key!r} is not text; put it in quotes")
        if key in seen:
            raise ValueError(f"line {key_node.start_mark.line + 1}: the key {key!r} is given twice; remove one")
        seen.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


def _check_size(node: yaml.Node | None) -> None:
    """Raise ValueError for YAML that is small on disk and huge in memory: aliases of aliases, or endless nesting."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, depth: int) -> int:
        if depth > _MAX_DEPTH:
            raise ValueError(f"line {node.start_mark.line + 1}: nested more than {_MAX_DEPTH} deep")
        if id(node) not in sizes:
            inside = (
                [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
            )
            sizes[id(node)] = 1 + sum(size(part, depth + 1) for part in inside if isinstance(part, yaml.Node))
        if sizes[id(node)] > _MAX_VALUES:
            raise ValueError(f"line {node.start_mark.line + 1}: its aliases expand to more than {_MAX_VALUES} values")
        return sizes[id(node)]

    if node is not None:
        size(node, 0)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe from a file, or a packaged one by its bare name (`demo`).

    `overrides` are applied in order. Each is `section.key=value` with the value in YAML, or a YAML file with some of a
    recipe's keys (packaged settings go by their bare name: `paper`). Raises ValueError that names what is wrong and
    where.
    """
    path = _find(path_or_name)
    return parse_recipe(_read(path), str(path), overrides, _is_stored(path))


def parse_recipe(text: str, where: str, overrides: Sequence[str] = (), is_stored: bool = False) -> Recipe:
    """Parse a recipe from YAML. Raises ValueError as `load_recipe` does.

    Args:
        where: the source, for errors.
        is_stored: it was stored with a dump or a run: old names of keys are read without a warning.
    """
    values = _parse(text, where)
    if not isinstance(values, dict):
        raise ValueError(f"{where} must hold sections (corpus:, teacher:, dump: ...), not {values!r}")
    with_new_names(values, Recipe, where, is_stored=is_stored)
    for override in overrides:
        if "=" in override:
            _apply(values, override)
            with_new_names(values, Recipe, f"override {override!r}", over=True)
        else:
            settings = _settings(override)
            with_new_names(settings, Recipe, override)
            _merge(values, settings)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ValueError(
            f"{where} is not a valid recipe:\n" + "\n".join(f"  {line}" for line in _explain(error))
        ) from None


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the recipe with every default spelled out, as YAML that `load_recipe` reads back as an equal recipe."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    path.write_text(text, encoding="utf-8")


def recipe_names() -> list[str]:
    """List the packaged recipes."""
    return sorted(path.stem for path in _PACKAGED.glob("*.yaml") if path.stem != "pins")


def read_values(path: Location) -> dict[str, Any]:
    """Read the plain values of the recipe stored beside a dump or a run, under today's names; empty if there is none.

    Raises ValueError, naming the file, if it holds no sections.
    """
    values = _parse(_read(path), str(path)) if path.exists() else {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it must hold sections (student:, train: ...). Restore it, or delete it")
    with_new_names(values, Recipe, str(path), is_stored=True)
    return values


def _is_stored(path: Path) -> bool:
    """Tell whether the file is the recipe that a dump or a run keeps, possibly of an earlier release."""
    beside = (dump_files.MANIFEST, dump_files.TEXT_MANIFEST, dump_files.RUN_IDENTITY)
    return path.name == dump_files.RECIPE and any((path.parent / name).exists() for name in beside)


def _find(path_or_name: str | Path) -> Path:
    path = Path(path_or_name).expanduser()
    if path.is_file():
        return path
    if str(path_or_name) in recipe_names():
        return _PACKAGED / f"{path_or_name}.yaml"
    raise ValueError(f"no recipe {str(path_or_name)!r}: give a YAML file, or one of {', '.join(recipe_names())}")


def _read(path: Location) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (its byte {error.start} is invalid): save it as UTF-8") from error


def _parse(text: str, where: str) -> Any:
    try:
        _check_size(yaml.compose(text, Loader=_Loader))
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError(f"{where}: nested more than {_MAX_DEPTH} deep") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _settings(path_or_name: str) -> dict[str, Any]:
    """Read some of a recipe's keys from a file."""
    names = sorted(path.stem for path in _SETTINGS.glob("*.yaml"))
    path = _SETTINGS / f"{path_or_name}.yaml" if path_or_name in names else Path(path_or_name).expanduser()
    if not path.is_file():
        raise ValueError(
            f"override {path_or_name!r} is neither of the form section.key=value, nor a YAML file, nor one of "
            f"{', '.join(names)}"
        )
    values = _parse(_read(path), str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold sections (student:, train: ...), not {values!r}")
    return values


def _merge(values: dict[str, Any], over: dict[str, Any]) -> None:
    """Merge the values of `over` into nested values, in place; keys that it does not name stay."""
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


def _apply(values: dict[str, Any], override: str) -> None:
    """Apply one `a.b=value` to nested values, in place. A number in the key is a list index."""
    key, _, text = override.partition("=")
    names = key.strip().split(".")
    if not all(names):
        raise ValueError(f"override {override!r} is not of the form section.key=value")
    target: Any = values
    for depth, name in enumerate(names[:-1]):
        target = _step(target, name, ".".join(names[: depth + 1]), override)
    value = _parse(text, f"override {override!r}")
    if isinstance(target, list):
        target[_index(target, names[-1], override)] = value
    else:
        target[names[-1]] = value


def _step(target: Any, name: str, path: str, override: str) -> Any:
    inner = target[_index(target, name, override)] if isinstance(target, list) else target.get(name)
    if inner is None:
        inner = {}
        target[int(name) if isinstance(target, list) else name] = inner
    if not isinstance(inner, dict | list):
        raise ValueError(f"override {override!r}: {path} is {inner!r}, which has no keys")
    return inner


def _index(target: list[Any], name: str, override: str) -> int:
    if not name.isdigit() or int(name) >= len(target):
        raise ValueError(f"override {override!r}: {name!r} is not an index below {len(target)}")
    return int(name)


def _explain(error: ValidationError) -> Iterator[str]:
    """Yield one line per fault: `section.key: value: what is expected`."""
    for fault in error.errors(include_url=False):
        location = ".".join(map(str, fault["loc"])) or "recipe"
        if fault["type"] == "extra_forbidden":
            section, known = _known_keys(fault["loc"][:-1])
            near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            yield f"{location}: {fault['loc'][-1]!r} is not a key of {section}; {hint}"
        elif fault["type"] == "missing":
            yield f"{location}: this key is missing; add it"
        elif fault["type"] == "value_error":
            yield f"{location}: {fault['msg'].removeprefix('Value error, ')}"
        else:
            yield f"{location}: {fault['input']!r}: {fault['msg']}"


def _known_keys(location: Sequence[str | int]) -> tuple[str, list[str]]:
    """Return the name and the keys of the section at a location in a recipe."""
    model: type[BaseModel] = Recipe
    for name in location:
        if isinstance(name, str) and name in model.model_fields:
            model = next(models_in(model.model_fields[name].annotation), model)
    names = ".".join(str(name) for name in location)
    return names or "a recipe", list(model.model_fields)
