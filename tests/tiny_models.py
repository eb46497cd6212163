"""Tiny models with random weights, one function per architecture: eval mode, float32, the same for the same seed.

Norms are perturbed (or a check of their weights would pass vacuously) and weights are large enough that steering
changes greedy outputs. Ids: 0 pad, 1 bos, 2 eos, from 3 to 9 special, the rest are plain words.
"""

import numpy as np
import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from hones_steer.ffns import DENSE, SHARED, Ffn
from hones_steer.profile import ModelIdentity, Profile

VOCABULARY = 160
FIRST_WORD = 10
IMAGE, VIDEO, VISION_START, VISION_END = 4, 5, 6, 7

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def llama(seed=0, **overrides):
    return _build(LlamaForCausalLM, LlamaConfig(**{**GROUPED, **overrides}), seed)


def qwen2(seed=0):
    return _build(Qwen2ForCausalLM, Qwen2Config(**GROUPED), seed)


def qwen3(seed=0):
    return _build(Qwen3ForCausalLM, Qwen3Config(**GROUPED, head_dim=8), seed)


def mistral(seed=0):
    return _build(MistralForCausalLM, MistralConfig(**GROUPED), seed)


def gemma3_text(seed=0):
    return _build(Gemma3ForCausalLM, Gemma3TextConfig(**GROUPED, head_dim=8), seed)


def phi3(seed=0):
    return _build(Phi3ForCausalLM, Phi3Config(**GROUPED), seed)


def gpt2(seed=0):
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_inner=96,
        n_layer=3,
        n_head=4,
        n_positions=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return _build(GPT2LMHeadModel, config, seed)


def opt(seed=0):
    text = {key: value for key, value in TEXT.items() if key != "intermediate_size"}
    return _build(OPTForCausalLM, OPTConfig(**text, ffn_dim=96, word_embed_proj_dim=32), seed)


def mixtral(seed=0):
    """A mixture of two experts, to both of which every token goes."""
    return _build(MixtralForCausalLM, MixtralConfig(**GROUPED, num_local_experts=2), seed)


def llava(seed=0):
    config = LlavaConfig(
        text_config=LlamaConfig(**GROUPED),
        vision_config=CLIPVisionConfig(**VISION, projection_dim=16),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return _build(LlavaForConditionalGeneration, config, seed)


def qwen2_5_vl(seed=0):
    config = Qwen2_5_VLConfig(
        text_config={**GROUPED, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 16,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        **_QWEN_TOKENS,
    )
    return _build(Qwen2_5_VLForConditionalGeneration, config, seed)


def qwen3_vl(seed=0):
    config = Qwen3VLConfig(
        text_config={
            **GROUPED,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        **_QWEN_TOKENS,
    )
    return _build(Qwen3VLForConditionalGeneration, config, seed)


def gemma3(seed=0):
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**GROUPED, head_dim=8),
        vision_config=SiglipVisionConfig(**VISION),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
        tie_word_embeddings=False,
    )
    return _build(Gemma3ForConditionalGeneration, config, seed)


def paligemma(seed=0):
    """Its prompts attend to themselves in both directions."""
    config = PaliGemmaConfig(
        text_config={"model_type": "gemma", **GROUPED, "head_dim": 8},
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )
    return _build(PaliGemmaForConditionalGeneration, config, seed)


def idefics3(seed=0):
    config = Idefics3Config(
        text_config=LlamaConfig(**GROUPED), vision_config=VISION, image_token_id=IMAGE, pad_token_id=0
    )
    return _build(Idefics3ForConditionalGeneration, config, seed)


def smolvlm(seed=0):
    config = SmolVLMConfig(
        text_config=LlamaConfig(**GROUPED), vision_config=VISION, image_token_id=IMAGE, pad_token_id=0
    )
    return _build(SmolVLMForConditionalGeneration, config, seed)


def internvl(seed=0):
    config = InternVLConfig(
        text_config=Qwen2Config(**GROUPED),
        vision_config=VISION,
        image_token_id=IMAGE,
        image_seq_length=1,
        tie_word_embeddings=False,
    )
    return _build(InternVLForConditionalGeneration, config, seed)


_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "tie_word_embeddings": False,
}

FULL_MATRIX = {"llama": llama, "llava": llava, "qwen2_5_vl": qwen2_5_vl}
ALL = {
    **FULL_MATRIX,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "mistral": mistral,
    "gemma3_text": gemma3_text,
    "gemma3": gemma3,
    "phi3": phi3,
    "gpt2": gpt2,
    "opt": opt,
    "qwen3_vl": qwen3_vl,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "internvl": internvl,
}


def text_inputs(rows=4, length=7, seed=0):
    """Token ids and attention mask `[rows, length]`; row i is left-padded by i % 3 positions."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST_WORD, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        ids[row, : row % 3] = 0
        mask[row, : row % 3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def llava_inputs(rows=4, length=7, seed=0):
    """As `text_inputs`, each row with an image of its own in front (4 image tokens)."""
    text = text_inputs(rows, length, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    pixels = torch.randn(rows, 3, 16, 16, generator=generator)
    return {**_with_image_tokens(text, torch.full((rows, 4), IMAGE)), "pixel_values": pixels}


def qwen2_5_vl_inputs(rows=4, length=7, seed=0):
    """As `text_inputs`, each row with an image of its own in front (a grid of 4 x 8 patches: 8 image tokens)."""
    text = text_inputs(rows, length, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    image = torch.tensor([[VISION_START, *[IMAGE] * 8, VISION_END]]).repeat(rows, 1)
    inputs = _with_image_tokens(text, image)
    return {
        **inputs,
        "pixel_values": torch.randn(rows * 32, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 8]] * rows),
        "mm_token_type_ids": (inputs["input_ids"] == IMAGE).int(),
    }


def _with_image_tokens(text, image):
    rows = []
    for ids, mask, tokens in zip(text["input_ids"], text["attention_mask"], image, strict=True):
        rows.append(torch.cat([ids[mask == 0], tokens, ids[mask == 1]]))
    mask = torch.ones(len(rows), len(rows[0]), dtype=torch.int64)
    for row, length in enumerate((text["attention_mask"] == 0).sum(1)):
        mask[row, :length] = 0
    return {"input_ids": torch.stack(rows), "attention_mask": mask}


def select_row(inputs, row):
    """One row of a batch made by one of the functions above, as a batch of one."""
    rows = len(inputs["input_ids"])
    return {
        name: value.view(rows, -1, *value.shape[1:])[row] if len(value) != rows else value[row : row + 1]
        for name, value in inputs.items()
    }


def random_profile(model, seed, task="random", fraction=0.3):
    """A profile that scales a random share of all neurons by factors from -2 to 3."""
    identity = ModelIdentity.from_model(model)
    generator = np.random.default_rng(seed)
    layers = {}
    for run in identity.runs:
        for ffn in (
            Ffn(layer, part) for layer in range(run.first, run.stop) for part in (DENSE, SHARED, *range(run.experts))
        ):
            if width := identity.width(ffn):
                neurons = np.flatnonzero(generator.random(width) < fraction).astype(np.int32)
                layers[ffn] = (neurons, generator.uniform(-2, 3, len(neurons)).astype(np.float32))
    return Profile(task=task, layers=layers, base_model=identity)


def _build(kind, config, seed):
    torch.manual_seed(seed)
    model = kind(config)
    _randomise(model, seed)
    # A row that ended early would only be padding from there on.
    model.generation_config.eos_token_id = None
    return model.eval()


def _randomise(model, seed):
    """Weights of unit gain, perturbed norms, and FFNs that outweigh the embeddings."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:  # norms start at 1 (Gemma's at 0), biases at 0
                parameter.add_(0.3 * noise)
            elif "embed" in name or "wte" in name or "wpe" in name:
                parameter.copy_(noise)
            elif "experts" in name and parameter.dim() == 3:  # a matrix for each
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            if any(
                part in name for part in ("down_proj.weight", "mlp.c_proj.weight", "fc2.weight", "experts.down_proj")
            ):
                parameter.mul_(4)
