"""Tiny random checkpoints that load in transformers and in vLLM alike: each function writes one to a folder.

Attention on a CPU wants heads of 32, so these are a little wider than `tiny_models.py`. Their tokenizers know words
only: `w17 w42` is a prompt of two tokens, unknown words are all the same token. Norms are random, so that a profile's
sketch tells one seed from another.
"""

import json
from pathlib import Path

from tiny_models import GROUPED, IMAGE, VIDEO, VISION_END, VISION_START, _build
from tiny_models import llama as build_llama
from tiny_processors import CHAT, qwen2_5_vl_processor, text_tokenizer
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

TEXT = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "head_dim": 32,
    "max_position_embeddings": 1024,
}


def llama(folder: Path, seed: int = 0) -> Path:
    """Write a Llama of 4 layers x 256 FFN neurons, hidden size 128, 4 heads, 300 tokens, with a chat template."""
    model = build_llama(seed, **TEXT)
    tokenizer = text_tokenizer(model.config)
    tokenizer.chat_template = CHAT
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def qwen2_5_vl(folder: Path, seed: int = 0) -> Path:
    """Write a Qwen2.5-VL with a language model like `llama`'s. An image has one token per 8 x 8 pixels, at most 12.

    To load it, vLLM needs torchvision (`engines.TORCHVISION`), and so does transformers for the processor:
    `tiny_processors.qwen2_5_vl_processor(config)` makes the same processor, for images, without it.
    """
    config = Qwen2_5_VLConfig(
        text_config={**GROUPED, **TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]}},
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 16,
            "out_hidden_size": TEXT["hidden_size"],
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    model = _build(Qwen2_5_VLForConditionalGeneration, config, seed)
    processor = qwen2_5_vl_processor(config)
    model.save_pretrained(folder)
    processor.tokenizer.chat_template = processor.chat_template
    processor.tokenizer.save_pretrained(folder)
    # By hand: vLLM insists on a video processor, and making one takes torchvision.
    pixels = processor.image_processor.to_dict()
    processors = {
        "processor_class": "Qwen2_5_VLProcessor",
        "image_processor": {**pixels, "image_processor_type": "Qwen2VLImageProcessor"},
        "video_processor": {**pixels, "video_processor_type": "Qwen2VLVideoProcessor"},
    }
    (folder / "processor_config.json").write_text(json.dumps(processors))
    return folder
