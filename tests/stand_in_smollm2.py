"""A stand-in for SmolLM2-135M-Instruct: its architecture, tied embeddings and special tokens, tiny and random."""

from pathlib import Path
from typing import Any

import tiny_models
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<gh_stars>")


def write(folder: Path, seed: int = 0, special: tuple[str, ...] = SPECIAL, **overrides: Any) -> Path:
    """Write what examples.smollm2.get_model would; the tokenizer reads bytes, and heads are as wide as vLLM wants."""
    known = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate(known)}, merges=[]))
    raw.add_special_tokens([AddedToken(token, special=True) for token in special])
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    shape = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "head_dim": 32,
        "num_hidden_layers": 2,
        "max_position_embeddings": 4096,
    }
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    llama = tiny_models.llama(
        seed, **{**shape, **ids, "vocab_size": len(known), "tie_word_embeddings": True, **overrides}
    )
    with torch.no_grad():
        llama.model.embed_tokens.weight.mul_(0.05)  # as small as logits want embeddings that are tied to them
    llama.save_pretrained(folder)
    ends = {"bos_token": special[1], "eos_token": special[2], "pad_token": special[2]}
    PreTrainedTokenizerFast(tokenizer_object=raw, **ends).save_pretrained(folder)
    return folder
