"""Tasks of the harness: its figures are those of its own `hf` and of plain arithmetic.

Text that spells a control token is text.
"""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.cli import main
from pipeline.config import TasksConfig
from pipeline.config.loading import load_recipe, recipe_names
from pipeline.tokenization.chat_template import TODAY
from stage2_student.evaluation.lm_eval_tasks import LOCAL_TASKS, TextModel, _with_all_tasks, run_tasks
from tests.support.chats import CHAT_FAMILIES, chat, chat_model, chat_tokenizer
from tests.support.local_tasks import END, QUESTIONS, write_three
from tests.support.tiny import save_tiny, tiny_model

PROMPT = "Question: {}\nAnswer:"
CHOICES = [["the thing", "an éin,\nwhich thes"], ["er", f"{END} the"], ["an", "an"]]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder with a task of three questions, made of the local PIQA's file."""
    return write_three(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def chat_lms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextModel]:
    folder = tmp_path_factory.mktemp("chats")
    return {name: TextModel(str(chat_model(folder / name, name)), device="cpu") for name in CHAT_FAMILIES}


def option_nats(model: Path, question: dict[str, str], option: str, start: list[int]) -> float:
    """Return ln p(option | question) in float64, token by token."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    lm: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    texts = PROMPT.format(question["question"]), f"{PROMPT.format(question['question'])} {option}"
    context, whole = (start + tokenizer.encode(text, split_special_tokens=True) for text in texts)
    with torch.inference_mode():
        logprobs_LV = lm(torch.tensor([whole])).logits[0].log_softmax(-1)
    return math.fsum(float(logprobs_LV[i - 1, whole[i]]) for i in range(len(context), len(whole)))


@pytest.mark.parametrize("start", [None, END])
def test_an_option_scores_what_plain_arithmetic_gives_it(model: Path, tasks: Path, start: str | None) -> None:
    group = TasksConfig(names=("three",), include_path=str(tasks), start=start)
    found = run_tasks(str(model), {"group": group}, log_samples=True)["group"]
    before = [] if start is None else [AutoTokenizer.from_pretrained(model).convert_tokens_to_ids(start)]
    right = {"acc": 0, "acc_bytes": 0}
    for row, question, choices in zip(found["samples"]["three"], QUESTIONS, CHOICES, strict=True):
        slow = [option_nats(model, question, option, before) for option in choices]
        assert [float(answer[0][0]) for answer in row["resps"]] == pytest.approx(slow, abs=1e-3)
        per_byte = [nats / len(option.encode()) for nats, option in zip(slow, choices, strict=True)]
        answer = "AB".index(question["answer"][0])
        right["acc"] += slow.index(max(slow)) == answer
        right["acc_bytes"] += per_byte.index(max(per_byte)) == answer
    for metric, number in right.items():
        assert found["results"]["three"][f"{metric},none"] == pytest.approx(number / 3)


def test_figures_are_those_of_the_harness_own_model_unless_text_spells_a_control_token(
    model: Path, tasks: Path
) -> None:
    group = TasksConfig(names=("three",), include_path=str(tasks), batch_size=1)
    ours = run_tasks(str(model), {"group": group}, log_samples=True)["group"]["samples"]["three"]
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(HFLM(str(model), device="cpu"), tasks=["three"], task_manager=manager)
    theirs = json.loads(json.dumps(found["samples"]["three"], default=handle_non_serializable))
    assert [a["resps"] == b["resps"] for a, b in zip(ours, theirs, strict=True)] == [True, False, True]
    assert ours[0] == theirs[0] and ours[2] == theirs[2]


@pytest.mark.parametrize("family", CHAT_FAMILIES)
def test_a_chat_is_encoded_as_its_tokenizer_does(chat_lms: dict[str, TextModel], family: str) -> None:
    lm = chat_lms[family]
    messages = chat("Is the thing there?", "It is.", "And  an éin?\n")
    rendered = lm.apply_chat_template(messages)
    own = lm.tokenizer.apply_chat_template(messages, strftime_now=TODAY.strftime)["input_ids"]  # no other day's
    assert lm.tok_encode(rendered) == own
    context, continuation = lm._encode_pair(rendered, " the and")
    assert context + continuation == lm.tokenizer.encode(f"{rendered[1:]} the and", add_special_tokens=False)


@pytest.mark.parametrize("family", CHAT_FAMILIES)
def test_a_message_that_spells_a_control_token_is_text(chat_lms: dict[str, TextModel], family: str) -> None:
    lm, spelled = chat_lms[family], CHAT_FAMILIES[family].control
    control = set(lm.tokenizer.convert_tokens_to_ids(list(spelled)))
    words = f"the {' and '.join(spelled)} an"
    plain, nasty = (lm.apply_chat_template(chat(said, said, said)) for said in ("the and an", words))
    found = lm.tok_encode(nasty)
    assert [i for i in found if i in control] == [i for i in lm.tok_encode(plain) if i in control]
    assert lm.tokenizer.decode(found) == plain[1:].replace("the and an", words)
    _, continuation = lm._encode_pair(plain, f" {words}")
    # The harness moves white space at a context's end into what follows.
    assert not control & set(continuation) and lm.tokenizer.decode(continuation).lstrip() == words
    assert not control & set(lm.tok_encode(words, add_special_tokens=False))
    batch, mask = lm.tok_batch_encode([nasty, words])
    assert batch[0].tolist() == found and not control & set(batch[1][mask[1].bool()].tolist())


@pytest.mark.parametrize("family", CHAT_FAMILIES)
def test_an_answer_in_a_chat_ends_with_the_templates_end_of_a_turn(
    chat_lms: dict[str, TextModel], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = chat_lms[family]
    end = lm.tokenizer.convert_tokens_to_ids(CHAT_FAMILIES[family].end)
    own = lm.model.generation_config.eos_token_id
    said: list[list[int]] = []
    generate = lm.model.generate

    def end_at_once(**options: Any) -> Any:
        others = [index for index in range(len(lm.tokenizer)) if index != end]
        found = generate(**options, suppress_tokens=others)
        said.append(found[0, options["input_ids"].shape[1] :].tolist())
        return found

    monkeypatch.setattr(lm.model, "generate", end_at_once)
    lm.ask_with(TasksConfig(names=("any",), apply_chat_template=True))
    request = (lm.apply_chat_template(chat("the")), {"until": [], "max_gen_toks": 2})
    [answer] = lm.generate_until([Instance("generate_until", {}, request, 0)], disable_tqdm=True)
    assert said == [[end]] and answer == ""
    lm.ask_with(TasksConfig(names=("any",)))
    assert lm.model.generation_config.eos_token_id == own


def test_a_control_token_that_is_looked_for_in_normalised_text_is_refused_in_a_message(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("qwen")
    tokenizer.add_tokens([AddedToken("<|mark|>", special=True, normalized=True)], special_tokens=True)
    lm = TextModel(str(save_tiny(tmp_path / "model", tokenizer, 0)), device="cpu")
    lm.apply_chat_template(chat("the <|mark| and"))
    with pytest.raises(ValueError, match=r"spells the control token '<\|mark\|>'.* leave apply_chat_template out"):
        lm.apply_chat_template(chat("the <|mark|> and"))


def test_batches_on_a_cpu_are_of_so_many_tokens_and_nothing_is_tried_out(
    chat_lms: dict[str, TextModel], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = chat_lms["smollm2"]
    monkeypatch.setattr("stage2_student.evaluation.lm_eval_tasks._CPU_TOKENS", 64)
    shapes: list[tuple[int, int]] = []
    call = lm._model_call

    def watched(inputs: torch.Tensor, **options: Any) -> Any:
        shapes.append((inputs.shape[0], inputs.shape[1]))
        return call(inputs, **options)

    monkeypatch.setattr(lm, "_model_call", watched)
    lm.ask_with(TasksConfig(names=("any",)))
    texts = [" the" * number for number in (40, 30, 6, 5, 4, 3, 2, 1)]
    lm.loglikelihood([Instance("loglikelihood", {}, (text, " and"), 0) for text in texts], disable_tqdm=True)
    assert sum(rows for rows, _ in shapes) == len(texts)
    assert all(rows == 1 or rows * length <= 64 for rows, length in shapes) and max(shapes)[0] > 1
    assert capsys.readouterr().out == ""


def test_what_a_model_lacks_is_named(model: Path, chat_lms: dict[str, TextModel]) -> None:
    plain = TextModel(str(model), device="cpu")
    with pytest.raises(ValueError, match="has no chat template"):
        plain.ask_with(TasksConfig(names=("any",), apply_chat_template=True))
    with pytest.raises(ValueError, match=r"no control token '<|endoftxt|>'; the nearest: <\|endoftext\|>"):
        plain.ask_with(TasksConfig(names=("any",), start="<|endoftxt|>"))


def test_tasks_are_looked_up_before_weights_are_loaded(tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        run_tasks("some/model", {"group": TasksConfig(names=("three",), include_path=str(tmp_path / "none"))})
    (tmp_path / "gone.yaml").write_text((tasks / "three.yaml").read_text().replace("three.jsonl", "gone.jsonl"))
    with pytest.raises(ValueError, match="gone"):
        run_tasks("some/model", {"group": TasksConfig(names=("three",), include_path=str(tmp_path))})


def test_the_recipes_name_tasks_that_the_harness_has() -> None:
    with pytest.raises(ValueError, match=r"no task 'piqua'; the nearest: piqa.*Tasks that need no hub: bld_boolq"):
        run_tasks("some/model", {"group": TasksConfig(names=("piqua",))})
    known = set(_with_all_tasks(str(LOCAL_TASKS)).all_tasks)
    for recipe in map(load_recipe, recipe_names()):
        named = {name for group in (recipe.eval.tasks if recipe.eval else {}).values() for name in group.names}
        published = {task for figures in (recipe.eval.published if recipe.eval else {}).values() for task in figures}
        assert published <= named <= known


@pytest.mark.parametrize("name", ["bld_piqa", "bld_siqa", "bld_openbookqa", "bld_boolq", "bld_mmlu_sample"])
def test_a_local_task_asks_what_its_rows_say(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"question": f"q{i}", "options": "A. w\nB. x\n y\nC. z\nD. z", "answer": "D. z", "passage": "p"}
        for i in range(2)
    ]
    if name.startswith("bld_boolq"):
        rows = [{"question": f"q{i}", "title": "t", "passage": "p", "answer": "True"} for i in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("pipeline.tasks.questions.resolve_file", lambda _: tmp_path / "rows.jsonl")
    manager = TaskManager(include_path=str(LOCAL_TASKS), include_defaults=False)
    task: Any = manager.load([name])["tasks"][name]
    doc = next(iter(task.test_docs()))
    asked = {
        "bld_piqa": ("Question: q0\nAnswer:", ["w", "x\n y", "z", "z"], 3),
        "bld_siqa": ("Q: p q0\nA:", ["w", "x\n y", "z", "z"], 3),
        "bld_openbookqa": ("q0", ["w", "x\n y", "z", "z"], 3),
        "bld_boolq": ("t -- p\nQuestion: q0?\nAnswer:", ["no", "yes"], 1),
        "bld_mmlu_sample": ("q0\nA. w\nB. x\n y\nC. z\nD. z\nAnswer:", ["A", "B", "C", "D"], 3),
    }
    assert (task.doc_to_text(doc), task.doc_to_choice(doc), task.doc_to_target(doc)) == asked[name]


@pytest.mark.parametrize("natural", ["float32", "bfloat16"])
def test_auto_is_what_the_weights_are_saved_in_where_the_cpu_can(
    model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, natural: str
) -> None:
    saved = shutil.copytree(model, tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(saved)
    monkeypatch.setattr("stage2_student.evaluation.lm_eval_tasks.natural_dtype", lambda: natural)
    group = TasksConfig(names=("three",), include_path=str(tasks), limit=1)
    found = run_tasks(str(saved), {"group": group})["group"]
    assert found["config"]["model_dtype"] == f"torch.{natural}"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["bld", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0)

    yield run


def test_the_command_writes_the_harness_json(
    command: Any, model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = ("eval", str(model), "--tasks", "three", "--include-path", str(tasks), "--dtype", "bfloat16")
    assert (
        command(
            *named, "--task-limit", "2", "--num_fewshot", "1", "--seed", "5", "--out", str(tmp_path), "--log-samples"
        )
        == 0
    )
    found = json.loads((tmp_path / "tasks.json").read_text(encoding="utf-8"))
    assert found["n-samples"]["three"] == {"original": 3, "effective": 2}
    assert found["n-shot"]["three"] == 1 and found["config"]["fewshot_seed"] == 5
    assert found["config"]["model_dtype"] == "torch.bfloat16"
    assert found["lm_eval_version"] and "acc_norm,none" in found["results"]["three"]
    assert len((tmp_path / "tasks.three.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    assert "acc_norm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--task-limit", "2", "--num-fewshot", "1"), "error: --num-fewshot, --task-limit: these need --tasks"),
        (("--tasks", "three", "--json", "out.json"), "--json out.json is for figures on text"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    command: Any, arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("eval", "some/model", *arguments) == 1
    assert said in capsys.readouterr().err
