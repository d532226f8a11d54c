"""A tiny random Llama with a tiny byte-level BPE, as a plain Hugging Face folder."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

MERGES = ["t h", "th e", "i n", "a n", "an d", "Ġ the", "Ġ and", "e r", "Ġ a", "in g", "Ã ©", "Ġ Ã©"]
END_OF_TEXT = "<|endoftext|>"


def tiny_tokenizer(merges: list[str] | None = None) -> PreTrainedTokenizerFast:
    """Make a tokenizer of 256 bytes, a few merges (one of half a character), and a control token, the last id."""
    merges = MERGES if merges is None else merges
    tokens = [*bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, [tuple(m.split(" ")) for m in merges]))  # type: ignore[misc]
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def tiny_model(
    folder: Path, seed: int = 0, merges: list[str] | None = None, dtype: torch.dtype = torch.float32
) -> Path:
    """Write model and tokenizer to `folder`; logits are spread wide enough to have likely and unlikely tokens."""
    return save_tiny(folder, tiny_tokenizer(merges), seed, dtype)


def save_tiny(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    dtype: torch.dtype = torch.float32,
    positions: int = 512,
) -> Path:
    """Write a model as `tiny_model` does, with any tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
