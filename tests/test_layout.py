"""The tree follows the design, and each part imports only what it may."""

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from pipeline.config import Recipe
from schemas.columns import COLUMNS
from tests.support.source_tree import (
    PACKAGES,
    ROOT,
    dotted,
    functions,
    importers,
    imports,
    modules,
    num_statements,
    parameters,
    run_at_import,
    section_of,
    sections,
)

# Lower lines import higher ones, never the reverse; rooms of one line do not know each other. The roof is what only the
# command line imports.
SHARED = ("schemas.storage", "schemas")
GROUND = (
    "pipeline.runtime",
    "pipeline.config",
    "pipeline.tokenization",
    "pipeline.sources",
    "pipeline.covering",
    "pipeline.dumps",
    "pipeline.corpus",
    "pipeline.planning",
)
ROOF = ("pipeline.evaluation", "pipeline.reports", "pipeline.rounds", "pipeline.setup", "pipeline.cli")
CONTENT = (
    "stage1_teacher.reduction",
    "stage1_teacher.engines",
    "stage1_teacher.inputs",
    "stage1_teacher.targets",
)
TEACHER = (
    *CONTENT,
    "stage1_teacher.coordination",
    "stage1_teacher.dump",
    "stage1_teacher.generation",
    "stage1_teacher.processes",
    "stage1_teacher.ray",
)
CHECKS = ("stage1_teacher.verification", "stage1_teacher.calibration")
STUDENT = (
    "stage2_student.data",
    "stage2_student.interfaces",
    "stage2_student.losses",
    "stage2_student.acceleration",
    "stage2_student.model",
    "stage2_student.library",
    "stage2_student.evaluation",
    "stage2_student.distributed",
    "stage2_student.runs",
    "stage2_student.training",
    "stage2_student.launch",
)
ORDER = (*SHARED, *GROUND, *TEACHER, *CHECKS, *STUDENT, *ROOF)
MAX_MODULES = 15
MAX_PARAMETERS = 6
MANY_PARAMETERS = {  # functions that have more, and why
    "pipeline/cli/generation.py: generate": "a command, which has its options",
    "stage1_teacher/inputs/chat_windows.py: cut_chat": "a chat, what writes it, how it is cut, what of it is learned",
    "stage1_teacher/inputs/turn_windows.py: cut_conversation": "those of `cut_chat`",
    "stage1_teacher/dump/shard_writer.py: make_shards": "what its callers hold, each part from another place",
    "stage1_teacher/engines/tree_attention.py: attend": "transformers calls it, with these names",
    "stage1_teacher/targets/teacher.py: Teacher.__init__": "what `open_teacher` has opened, each part of its own kind",
    "stage2_student/interfaces/token_marginal/trie.py: row_cells": "it hands arrays to its compiled half",
}
TOP_LEVEL = {"pyproject.toml", "README.md", "Makefile", "LICENSE", "CHANGELOG.md", *PACKAGES, "tests"}


@cache
def room_imports() -> dict[tuple[str, str], list[str]]:
    """Map each pair of rooms, the first importing the second anywhere, to the modules that do so."""
    names = {dotted(path) for path in modules(*PACKAGES)}
    found: dict[tuple[str, str], list[str]] = {}
    for path in modules(*PACKAGES):
        for imported in imports(path) & names:
            pair = room(dotted(path)), room(imported)
            if pair[0] != pair[1]:
                found.setdefault(pair, []).append(f"{dotted(path)} imports {imported}")
    return found


def room(module: str) -> str:
    """Return the longest room of `ORDER` that a module is in; else its package, which is in none."""
    return max(
        (name for name in ORDER if module == name or module.startswith(f"{name}.")),
        key=len,
        default=module.split(".")[0],
    )


def test_imports_go_down_the_order_of_rooms() -> None:
    wrong = [
        said
        for (above, below), modules_that_do in room_imports().items()
        if above in ORDER and below in ORDER and ORDER.index(above) < ORDER.index(below)
        for said in modules_that_do
    ]
    assert not wrong


def test_the_stages_and_the_ground_import_nothing_of_the_roof() -> None:
    below = {*SHARED, *GROUND, *TEACHER, *CHECKS, *STUDENT, "stage1_teacher", "stage2_student"}
    assert not [said for (above, under), said in room_imports().items() if above in below and under in ROOF]


def test_what_decides_content_never_imports_what_decides_placement() -> None:
    placement = ("stage1_teacher.coordination", "stage1_teacher.processes", "stage1_teacher.ray")
    assert not [said for (above, below), said in room_imports().items() if above in CONTENT and below in placement]


def folders() -> list[Path]:
    return sorted({path.parent for path in modules(*PACKAGES)} - {ROOT / "pipeline/recipes"})


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_room_is_small_and_says_what_belongs_there_and_what_it_may_import(folder: Path) -> None:
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= MAX_MODULES
    said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
    assert said, folder
    if dotted(folder / "__init__.py") in ORDER:
        assert re.search(r"(?i)import|standard library", said), (
            f"{folder}/__init__.py does not say what the room may import"
        )


def test_the_tests_mirror_the_tree() -> None:
    for package in PACKAGES:
        for path in (ROOT / "tests" / package).rglob("test_*.py"):
            assert (ROOT / path.parent.relative_to(ROOT / "tests")).is_dir(), path


def test_the_stages_meet_only_in_schemas_and_pipeline() -> None:
    assert not [name for name in importers("stage2_student") if name.startswith("stage1_teacher")]
    assert not [name for name in importers("stage1_teacher") if name.startswith("stage2_student")]


def test_only_the_roof_imports_a_stage() -> None:
    for stage in ("stage1_teacher", "stage2_student"):
        assert not [name for name in importers(stage) if not name.startswith((stage, "pipeline/cli/"))]


def test_nothing_imports_the_roof() -> None:
    assert [name for name in importers("pipeline.cli") if not name.startswith("pipeline/cli/")] == [
        "pipeline/__main__.py"
    ]


def test_the_roof_imports_a_stage_only_inside_a_command() -> None:
    for path in modules("pipeline/cli"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert not [name for name in top if str(name).startswith("stage")], path


@pytest.mark.parametrize("engine", ["deepspeed", "ray", "obstore"])
def test_an_engine_is_imported_in_one_module(engine: str) -> None:
    assert len(importers(engine)) == 1, importers(engine)


def test_vllm_is_imported_where_it_is_driven_and_in_what_runs_in_its_workers() -> None:
    assert importers("vllm") == ["stage1_teacher/engines/vllm.py", "stage1_teacher/engines/vllm_worker.py"]


def test_schemas_know_nothing_of_the_rest() -> None:
    for package in ("pipeline", "stage1_teacher", "stage2_student"):
        assert not [name for name in importers(package) if name.startswith("schemas")]


def test_no_module_imports_itself_through_others() -> None:
    """Imports in functions included."""
    names = {dotted(path) for path in modules(*PACKAGES)}
    graph = {dotted(path): (imports(path) & names) - {dotted(path)} for path in modules(*PACKAGES)}
    for name, found in graph.items():  # `from a.b import c` is an import of a.b.c alone where that is a module
        graph[name] = {one for one in found if not any(other.startswith(f"{one}.") for other in found)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("package", PACKAGES)
def test_public_classes_and_functions_of_more_than_three_statements_have_docstrings(package: str) -> None:
    """Shorter functions say what they do; methods that have none do what their class or protocol says."""
    silent = []
    for path in modules(package):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        silent += [str(path)] if tree.body and ast.get_docstring(tree) is None else []
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                speaks = isinstance(node, ast.FunctionDef) and num_statements(node) <= 3
                silent += [] if speaks or ast.get_docstring(node) else [f"{path}:{node.lineno} {node.name}"]
    assert not silent


def takes_what_others_decide(path: Path, function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether it is a command, which has its options, or a kernel, which numba or Triton compiles."""
    is_command = path.is_relative_to(ROOT / "pipeline/cli") and "typer." in ast.unparse(function.args)
    return is_command or any(
        re.match(r"njit\b|triton\.jit\b", ast.unparse(decorator)) for decorator in function.decorator_list
    )


def test_a_function_has_few_parameters_or_a_reason() -> None:
    many = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in modules(*PACKAGES)
        for name, function in functions(path).items()
        if len(parameters(function)) > MAX_PARAMETERS and not takes_what_others_decide(path, function)
    }
    assert many <= set(MANY_PARAMETERS)


def test_a_model_goes_from_function_to_function_as_one_value() -> None:
    """A source without its revision loads another model. Only the command line takes them separately."""
    apart = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in modules(*PACKAGES)
        for name, function in functions(path).items()
        if {"revision", "trust_remote_code"} <= set(parameters(function))
    ]
    assert apart == ["pipeline/cli/evaluation.py: evaluate"]


def test_every_field_of_a_recipe_is_described_and_read() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in modules(*PACKAGES)]
    read = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    read |= {(column.stored_where or "").rpartition(".")[2] for column in COLUMNS}  # asks for a column by its key
    for section in sections(Recipe):
        assert section.__doc__, section
        for name, field in section.model_fields.items():
            assert name in read, f"{section.__name__}.{name} is read nowhere"
            assert field.description or section_of(field.annotation), f"{section.__name__}.{name} has no description"


def test_the_installer_needs_only_the_standard_library() -> None:
    shared = "pipeline.runtime.devices"
    devices = run_at_import(ROOT / "pipeline/runtime/devices.py")
    asked = {name.split(".")[0] for name in imports(ROOT / "pipeline/setup/install.py") if not name.startswith(shared)}
    asked |= {alias.name for node in devices if isinstance(node, ast.Import) for alias in node.names}
    asked |= {str(node.module) for node in devices if isinstance(node, ast.ImportFrom)}
    assert asked <= sys.stdlib_module_names


# Names that change or ask something beyond the module, with the modules that do so when they are imported.
AT_IMPORT = {
    r"environ|getenv|putenv": set(),
    r"cuda|backends|get_accelerator|is_available|device_count": set(),
    r"register|Gauge|CollectorRegistry|getLogger|addHandler|basicConfig|filterwarnings": set(),
    r"run|Popen|system|chdir|mkdir|open|write_text|read_text|start|Thread": set(),
    r"seed|manual_seed|set_\w+|setattr|setdefault|append|insert": {"pipeline/setup/install.py"},  # a script's own path
    r"add_constructor|add_implicit_resolver": {"pipeline/config/loading.py"},  # of our own YAML loader
    r"command|callback": {"pipeline/cli/app.py"},  # of our own command line
}


@pytest.mark.parametrize("names", AT_IMPORT)
def test_importing_a_module_does_nothing_but_define_what_it_holds(names: str) -> None:
    """A name that is read counts as a call: what is passed on is called too."""
    found = set()
    for path in modules(*PACKAGES):
        for node in run_at_import(path):
            is_read = isinstance(getattr(node, "ctx", None), ast.Load)
            name = getattr(node, "attr", getattr(node, "id", "")) if is_read else ""
            if re.fullmatch(names, name):
                found.add(str(path.relative_to(ROOT)))
    assert found == AT_IMPORT[names]


def test_one_module_asks_what_device_this_is() -> None:
    """DeepSpeed's accelerator says which device a rank has; the doctor lists all of them."""
    asks = re.compile(r"cuda\.(is_available|device_count|get_device_\w+)|/dev/nvidia")
    found = [str(p.relative_to(ROOT)) for p in modules(*PACKAGES) if asks.search(p.read_text(encoding="utf-8"))]
    assert found == ["pipeline/runtime/devices.py"]


def test_the_top_level_is_as_designed() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout: what is tracked cannot be told from what was built")
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {name.split("/")[0] for name in listing.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL
