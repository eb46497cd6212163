"""Tiny random checkpoints that load in transformers and in vLLM alike: each function writes one to a folder.

Attention on a CPU wants heads of 32, so these are a little wider than `tiny_models.py`. Their tokenizers know words
only: `w17 w42` is a prompt of two tokens, unknown words are all the same token. Norms are random, so that a profile's
sketch tells one seed from another.
"""

import copy
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tiny_models import GROUPED, IMAGE, VIDEO, VISION_END, VISION_START, _build
from tiny_models import TEXT as ALIKE
from tiny_models import llama as build_llama
from tiny_processors import (
    CHAT,
    gemma3_processor,
    idefics3_processor,
    internvl_processor,
    qwen2_5_vl_processor,
    qwen3_vl_processor,
    text_tokenizer,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
)

TEXT = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "head_dim": 32,
    "max_position_embeddings": 1024,
}
GROUPED_TEXT = {**GROUPED, **TEXT}


def llama(folder: Path, seed: int = 0) -> Path:
    """Write a Llama of 4 layers x 256 FFN neurons, hidden size 128, 4 heads, 300 tokens, with a chat template."""
    model = build_llama(seed, **TEXT)
    tokenizer = text_tokenizer(model.config)
    tokenizer.chat_template = CHAT
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": TEXT["hidden_size"],
}
INTERLEAVED = {"rope_type": "default", "mrope_interleaved": True}  # transformers does so anyway, vLLM if it is said
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def qwen2_5_vl(folder: Path, seed: int = 0) -> Path:
    """Write a Qwen2.5-VL with a language model like `llama`'s. An image has one token per 8 x 8 pixels, at most 12.

    To load it, vLLM needs torchvision (`engines.TORCHVISION`), and so does transformers for the processor:
    `tiny_processors.qwen2_5_vl_processor(config)` makes the same processor, for images, without it.
    """
    config = Qwen2_5_VLConfig(
        text_config={**GROUPED_TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]}},
        vision_config={**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
        **QWEN_TOKENS,
        tie_word_embeddings=False,
    )
    model = _build(Qwen2_5_VLForConditionalGeneration, config, seed)
    return _write(folder, model, qwen2_5_vl_processor(config), "Qwen2_5_VLProcessor", "Qwen2VL", "Qwen2VL")


def qwen3_vl(folder: Path, seed: int = 0) -> Path:
    """Write a Qwen3-VL like `qwen2_5_vl`'s; its decoder takes what the vision tower says in its first layer as well."""
    config = Qwen3VLConfig(
        text_config={**GROUPED_TEXT, "rope_parameters": {**INTERLEAVED, "mrope_section": [6, 5, 5]}},
        vision_config={**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **QWEN_TOKENS,
        tie_word_embeddings=False,
    )
    model = _build(Qwen3VLForConditionalGeneration, config, seed)
    return _write(folder, model, qwen3_vl_processor(config), "Qwen3VLProcessor", "Qwen2VL", "Qwen3VL")


def gemma3(folder: Path, seed: int = 0) -> Path:
    """Write a Gemma 3 with vision. An image has one token: the CPU build does not let several see each other."""
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**GROUPED_TEXT),
        vision_config=SiglipVisionConfig(**VISION),
        mm_tokens_per_image=1,
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
        tie_word_embeddings=False,
    )
    model = _build(Gemma3ForConditionalGeneration, config, seed)
    names = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"}
    newlines = ["\n" * count for count in range(1, 5)]  # which vLLM insists on
    smaller = copy.deepcopy(config)
    smaller.text_config.vocab_size -= len(newlines)
    processor = gemma3_processor(smaller)
    processor.tokenizer.add_tokens(newlines)
    _write(folder, model, processor, "Gemma3Processor", "Gemma3", names=names, image_seq_length=1)
    # Transformers 5 saves it without the level `vision_model`, which published files and vLLM have.
    file = folder / "model.safetensors"
    tensors = {key.replace("vision_tower.", "vision_tower.vision_model."): t for key, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def idefics3(folder: Path, seed: int = 0) -> Path:
    """Write an Idefics3; an image has 4 tokens."""
    config = Idefics3Config(
        text_config=LlamaConfig(**GROUPED_TEXT),
        vision_config=VISION,
        image_token_id=IMAGE,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = _build(Idefics3ForConditionalGeneration, config, seed)
    return _write(folder, model, idefics3_processor(config), "Idefics3Processor", "Idefics3", image_seq_len=4)


def internvl(folder: Path, seed: int = 0) -> Path:
    """Write an InternVL as transformers keeps it; an image has 4 tokens."""
    config = InternVLConfig(
        text_config=Qwen2Config(**GROUPED_TEXT),
        vision_config=VISION,
        image_token_id=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    model = _build(InternVLForConditionalGeneration, config, seed)
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<image>"}
    names["video_token"] = "<video>"
    processor = internvl_processor(config)
    return _write(folder, model, processor, "InternVLProcessor", "GotOcr2", "InternVL", names, image_seq_length=4)


VLMS = {
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "gemma3": gemma3,
    "idefics3": idefics3,
    "internvl": internvl,
}


def _write(
    folder: Path,
    model: Any,
    processor: Any,
    kind: str,
    images: str,
    videos: str | None = None,
    names: dict[str, str] | None = None,
    **more: Any,
) -> Path:
    """Write a model, its tokenizer with special tokens by `names`, and its processor of a `kind` with fields `more`.

    The processor is written by hand: vLLM insists on the video half, and making one takes torchvision.
    """
    model.save_pretrained(folder)
    processor.tokenizer.chat_template = processor.chat_template
    processor.tokenizer.save_pretrained(folder)
    if names:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "extra_special_tokens": names}))
    pixels = processor.image_processor.to_dict()
    processors = {"processor_class": kind, **more}
    processors["image_processor"] = {**pixels, "image_processor_type": f"{images}ImageProcessor"}
    if videos:
        processors["video_processor"] = {**pixels, "video_processor_type": f"{videos}VideoProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(processors))
    return folder


# Architectures of text models, by `model_type`: what a configuration needs besides `_WIDE`.
_WIDE = {**ALIKE, **TEXT, "num_hidden_layers": 3}
del _WIDE["head_dim"]  # 128 / 4 where nothing else is said
_GPT = {"n_embd": 128, "n_inner": 256, "n_layer": 3, "n_head": 4, "n_positions": 1024}
_HEADS = {"num_key_value_heads": 2, "head_dim": 32}
UNGATED: dict[str, dict[str, Any]] = {
    "gpt2": _GPT,
    "opt": {"ffn_dim": 256, "word_embed_proj_dim": 128},
    "phi": {},
    "gpt_neox": {},
    "falcon": {"ffn_hidden_size": 512},
    "starcoder2": {"num_key_value_heads": 2},
    "gptj": {**_GPT, "rotary_dim": 16},
    "gpt_bigcode": _GPT,
    "nemotron": _HEADS,
}
GATED: dict[str, dict[str, Any]] = {
    "mistral": _HEADS,
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": _HEADS,
    "phi3": {"num_key_value_heads": 2},
    "gemma": _HEADS,
    "gemma3_text": _HEADS,
    # Its last two layers, which use the keys and values of lower ones, have FFNs of twice the width.
    "gemma4_text": {
        **_HEADS,
        "num_hidden_layers": 5,
        "layer_types": [*["full_attention", "sliding_attention"] * 2, "full_attention"],
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 0,
    },
    "granite": {"num_key_value_heads": 2},
    "smollm3": {"num_key_value_heads": 2},
}

_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**_HEADS, **_EXPERTS, "mlp_only_layers": [1]},  # whose second layer is dense
    "qwen2_moe": {"num_key_value_heads": 2, **_EXPERTS, "shared_expert_intermediate_size": 96},
}


def text_model(folder: Path, model_type: str, seed: int = 0) -> Path:
    """Write a text model of any architecture of `UNGATED`, `GATED` or `MIXTURES`, as wide as `llama`'s."""
    config = AutoConfig.for_model(model_type, **{**_WIDE, **{**UNGATED, **GATED, **MIXTURES}[model_type]})
    model = _build(AutoModelForCausalLM.from_config, config, seed)
    model.save_pretrained(folder)
    text_tokenizer(config).save_pretrained(folder)
    return folder
