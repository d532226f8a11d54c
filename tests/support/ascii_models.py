"""A tiny random model that writes ASCII text and sometimes ends it; most random models write bytes that are no text."""

from pathlib import Path

import torch
from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

from pipeline.tokenization.byte_tokenizer import ByteTokenizer

NEVER, OFTEN = -60.0, 1.0  # added to logits


def ascii_model(folder: Path, tokenizer: PreTrainedTokenizerFast, end: str, seed: int = 0) -> Path:
    """Write a model whose head's bias forbids all tokens but ASCII text and the end token."""
    torch.manual_seed(seed)
    end_id = tokenizer.convert_tokens_to_ids(end)
    config = PhiConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=end_id,
    )
    model = PhiForCausalLM(config)
    spelled = ByteTokenizer.from_wrapped(tokenizer, "tiny").token_bytes
    with torch.no_grad():
        for token, content in enumerate(spelled):
            is_text = content is not None and content.isascii() and (content.isalpha() or content.isspace())
            model.lm_head.bias[token] = 0.0 if is_text else NEVER
        model.lm_head.bias[end_id] = OFTEN
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
