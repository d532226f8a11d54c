"""Other programs read a moved student with the tokenizer it was trained with, whatever its type."""

import json
import random
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, RobertaConfig, RobertaForCausalLM

from pipeline.sources.resolve import resolve_tokenizer
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage2_student.model.initial_student import export_start
from stage2_student.model.tokenizer_folder import read_tokenizer, save_tokenizer
from tests.support import families
from tests.support.small_dumps import make_recipe
from tests.zoo.models import save_tiny
from tests.zoo.spellings import small

WORDS = (
    "1987",
    "3.14159",
    "日本語",
    "中文字符",
    "한국어",
    "def f(x_1):\n",
    "\t\treturn  x**2 != 0  # it's\r\n\n",
    " naïve",
    "e",
    "I'LL",
)


def random_texts(count: int = 40) -> list[str]:
    chance = random.Random()
    return ["".join(chance.choice(("", " ", "  ")) + chance.choice(WORDS) for _ in range(12)) for _ in range(count)]


def as_written(wrapped: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    return [found.ids for found in wrapped.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]


def as_read(folder: Path, texts: list[str], **options: bool) -> list[list[int]]:
    return AutoTokenizer.from_pretrained(folder, **options)(texts, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["gpt2", "mistral-v1"])
@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_any_tokenizer_beside_any_type_is_read_as_it_was_written(name: str, model_type: str, tmp_path: Path) -> None:
    from vllm.tokenizers.registry import get_tokenizer

    wrapped = AutoTokenizer.from_pretrained(resolve_tokenizer(families.FAMILIES[name].source))
    save_tiny(tmp_path, model_type, wrapped)
    save_tokenizer(wrapped, tmp_path)
    texts = random_texts()
    expected = as_written(wrapped, texts)
    assert as_read(tmp_path, texts) == expected
    assert as_read(tmp_path, texts, trust_remote_code=False) == expected
    assert as_read(tmp_path, texts, trust_remote_code=True) == expected
    assert get_tokenizer(str(tmp_path))(texts, add_special_tokens=False)["input_ids"] == expected
    assert (tmp_path / "tokenizer_as_written.py").exists() == (model_type == "qwen2")
    again = tmp_path / "again"  # as an export is made of a start
    again.mkdir()
    shutil.copy(tmp_path / "config.json", again)
    sha256 = ByteTokenizer.from_wrapped(wrapped, name).sha256
    save_tokenizer(read_tokenizer(tmp_path, sha256), again)
    assert as_read(again, texts) == as_read(again, texts, trust_remote_code=True) == expected


@pytest.mark.parametrize("name", ["byte-bpe", "sp-bpe"])
def test_a_student_that_an_earlier_release_moved_is_exported_with_what_it_learnt(name: str, tmp_path: Path) -> None:
    spelling = small(name, tmp_path)
    save_tiny(tmp_path / "start", "qwen2", spelling.wrapped)  # as it was written then
    save_tiny(tmp_path / "export", "qwen2", spelling.wrapped)
    sha256 = ByteTokenizer.from_wrapped(spelling.wrapped, name).sha256
    save_tokenizer(read_tokenizer(tmp_path / "start", sha256), tmp_path / "export")
    texts = random_texts()
    assert as_read(tmp_path / "export", texts) == as_written(spelling.wrapped, texts)


def test_a_qwen2_student_that_moved_is_read_with_its_new_tokenizer_and_moves_on(tmp_path: Path) -> None:
    old, new, newest = (small(name, tmp_path) for name in ("ranks", "sp-bpe", "byte-bpe"))
    texts = [text for text in random_texts() if "e" in text]

    def moved(model: Path, tokenizer: str | None, path: Path) -> Path:
        asked = {} if tokenizer is None else {"tokenizer": tokenizer}
        return export_start(make_recipe(tmp_path / "dump", model, path, {}, **asked))

    first = moved(save_tiny(tmp_path / "model", "qwen2", old.wrapped), new.folder, tmp_path / "first")
    assert as_read(first, texts) == as_written(new.wrapped, texts)
    kept = moved(first, None, tmp_path / "kept")  # a student made of one that we wrote
    assert as_read(kept, texts) == as_written(new.wrapped, texts)
    assert json.loads((kept / "transfer.json").read_text()) == {}
    second = moved(kept, newest.folder, tmp_path / "second")
    assert as_read(second, texts) == as_written(newest.wrapped, texts)


def test_a_tokenizer_that_would_be_read_as_another_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = small("byte-bpe", tmp_path).wrapped
    Qwen2Config(vocab_size=len(wrapped)).save_pretrained(tmp_path)
    monkeypatch.setattr("stage2_student.model.tokenizer_folder._read_back", lambda folder, trust: "another")
    with pytest.raises(ValueError, match="beside a model of type qwen2"):
        save_tokenizer(wrapped, tmp_path)


def test_a_model_that_counts_positions_from_the_id_that_pads_is_not_moved(tmp_path: Path) -> None:
    wrapped = small("byte-bpe", tmp_path).wrapped
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = RobertaConfig(vocab_size=len(wrapped), is_decoder=True, pad_token_id=1, **sizes)
    RobertaForCausalLM(config).save_pretrained(tmp_path / "model")
    wrapped.save_pretrained(tmp_path / "model")
    target = small("sp-bpe", tmp_path).folder
    with pytest.raises(ValueError, match="of type roberta counts its positions from the id that pads"):
        export_start(make_recipe(tmp_path / "dump", tmp_path / "model", tmp_path / "run", {}, tokenizer=target))
    assert not (tmp_path / "run" / "start").exists()
