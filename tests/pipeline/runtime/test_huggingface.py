"""Models and tokenizers come whole, as safetensors, and without running what lies beside them; or not at all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig

from pipeline.config import Recipe
from pipeline.runtime.huggingface import check_positions, learned_positions, load_model, load_tokenizer, max_positions
from stage2_student.model.initial_student import export_start
from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("loading") / "good")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def only_a_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    no_weights(folder)


def cut_off(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def another_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def unknown_architecture(folder: Path, **more: object) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nosuch"} | more), encoding="utf-8")


def code_of_its_own(folder: Path) -> None:
    unknown_architecture(folder, auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    (folder / "own.py").write_text("raise SystemExit('this code must not run')\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (no_weights, "holds no model.safetensors"),
        (only_a_pickle, "holds no model.safetensors.*save_pretrained"),
        (cut_off, "SafetensorError"),
        (without_a_tensor, r"lacks weights of the model.*q_proj\.weight"),
        (another_shape, "model.norm.weight"),
        (unknown_architecture, "nosuch"),
        (code_of_its_own, "set trust_remote_code: true where the recipe names the model"),
    ],
)
def test_a_model_that_is_not_whole_is_refused_by_name(
    damage: Callable[[Path], None], said: str, good: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "damaged"))
    damage(folder)
    with pytest.raises(ValueError, match=f"(?s)damaged: .*{said}"):
        load_model(str(folder), torch.float32)


def test_a_tied_head_is_not_missing(good: Path) -> None:
    model = load_model(str(good), torch.float32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_damaged_tokenizer_is_refused_by_name(good: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "damaged"))
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="damaged: its tokenizer cannot be loaded"):
        load_tokenizer(str(folder))


def test_a_student_whose_head_is_smaller_than_its_tokenizer_is_refused(good: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "small"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(200)
    model.save_pretrained(folder)
    sections = {"corpus": {"source": "c"}, "teacher": {"model": "t"}, "dump": {"path": "d"}}
    student = {"model": str(folder), "path": str(tmp_path / "run")}
    with pytest.raises(ValueError, match="200 rows, fewer than the tokenizer's 269 tokens"):
        export_start(Recipe.model_validate(sections | {"student": student}))


def test_more_tokens_than_a_model_has_positions_are_refused_with_the_number_that_fits() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    for config in (
        LlamaConfig(max_position_embeddings=64),
        Gemma3TextConfig(max_position_embeddings=64),
        GPT2Config(n_positions=64),
    ):
        check_positions(config, 64, "teacher.max_tokens")
        with pytest.raises(
            ValueError, match=r"teacher.max_tokens is 65, .* 64 positions .*; give teacher.max_tokens=64 or less"
        ):
            check_positions(config, 65, "teacher.max_tokens")
    check_positions(LlamaConfig(max_position_embeddings=64, rope_parameters=yarn), 65, "teacher.max_tokens")


@pytest.mark.parametrize(
    "kind",
    [
        "roberta",
        "roberta-prelayernorm",
        "camembert",
        "xlm-roberta",
        "xlm-roberta-xl",
        "data2vec-text",
        "xmod",
        "bert",
        "gpt2",
        "opt",
        "bart",
    ],
)
def test_a_model_takes_as_many_tokens_as_it_is_said_to_have_positions_and_no_more(kind: str) -> None:
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "is_decoder": True,
    }
    other = {
        "gpt2": {"n_positions": 24},
        "opt": {"ffn_dim": 16, "word_embed_proj_dim": 16},
        "bart": {"d_model": 16, "decoder_layers": 1},
    }
    extra = {"languages": ["en_XX"], "default_language": "en_XX"} if kind == "xmod" else other.get(kind, {})
    values = {"max_position_embeddings": 24} | sizes | extra
    for padding in (1, 5):
        config = CONFIG_MAPPING[kind](vocab_size=40, pad_token_id=padding, **values)
        model = AutoModelForCausalLM.from_config(config).eval()
        most = max_positions(config)
        assert most is not None and learned_positions(config) == most
        tokens_BL = torch.randint(6, 40, (2, most))
        with torch.no_grad():
            assert model(input_ids=tokens_BL, use_cache=False).logits.shape == (2, most, 40)
        with pytest.raises((IndexError, RuntimeError)), torch.no_grad():
            model(input_ids=torch.cat((tokens_BL, tokens_BL[:, :1]), 1), use_cache=False)
