"""Tiny random models of every text and image-text architecture that transformers' auto classes name.

A configuration is shrunk by the names of its fields, the parts of composite ones too: `hidden_size` becomes 32 wherever
it stands, `num_hidden_layers` 3, a list with a value for each layer is cut so that each kind of layer stays.
`EXCEPTIONS` has what names do not tell, `VARIANTS` settings that make another architecture of the same class. Sizes
that meet are equal in all parts of a model (a vision tower's hidden size and the decoder's): none is computed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import tiny_models
import transformers
from tiny_models import IMAGE, VIDEO, VISION_END, VISION_START, VOCABULARY
from transformers import GenerationMixin, PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HIDDEN, NEURONS, LAYERS, HEADS, HEAD = 32, 96, 3, 4, 8
AUDIO, OTHER = 8, 9

# Names of fields and what these become; the first that matches the whole name counts.
_RULES: tuple[tuple[str, int], ...] = (
    # token ids
    (r"pad_token_id", 0),
    (r"bos_token_id", 1),
    (r"(eos|decoder_start|forced_eos|sep)_token_id", 2),
    (r"(image|img)_token_(id|index)|image_patch_id", IMAGE),
    (r"video_token_(id|index)", VIDEO),
    (r"(vision_start|image_start|boi|im_start|image_bos)(_token)?_(id|index)", VISION_START),
    (r"(vision_end|image_end|eoi|im_end)(_token)?_(id|index)", VISION_END),
    (r"audio_token_(id|index)", AUDIO),
    (r"\w+_token_(id|index)|im_newline_id|(unk|mask)_index", OTHER),
    (r"vocab_offset", VOCABULARY - 8),
    (
        r"(?!type_|task_type_|n_?gram_)\w*vocab_size\w*|encoder_hash_byte_group_vocab|num_embeddings|codebook_size",
        VOCABULARY,
    ),
    # layers
    (r"(num_|n_)?(encoder_|decoder_|hidden_|global_)?layers?|(conf_)?num_hidden_layers|depth|num_blocks", LAYERS),
    (r"resampler_depth|num_layers_per_stack|aligner_num_add_layers", 1),
    # heads
    (r"qk_head_dim", 2 * HEAD),
    (r"(\w*_)?head_dim|\w*_head_size|d_kv|(\w+_)?d_head|\w*dim_head|kv_channels|mamba_headdim", HEAD),
    (r"(swa_)?(num_)?(key_value|kv)_heads|num_key_value_heads|kv_n_heads|swa_num_key_value_heads", 2),
    (r"(\w*_)?(attention_|query_|n_|resampler_|mamba_|linear_num_)?(n_)?heads?|linear_num_(key|value)_heads", HEADS),
    (r"rotary_dim", HEAD // 2),
    (r"(q|kv|o)_lora_rank|laurel_rank|gated_norm_rank|adapter_rank|hc_lowrank", 16),
    # widths
    (r"hidden_size_per_layer_input|ple_embed_dim", HEAD),
    (
        r"\w*(intermediate_size|ffn_dim|ffn_hidden_size|feed_forward_size|intermediate_size_mlp)|d_ff|dff|dim_ff",
        NEURONS,
    ),
    (r"d_inner|n_inner|mlp_dim|ffn_size|shared_expert_intermediate_size|share_expert_dim", NEURONS),
    (
        r"\w*hidden_size\w*|d_model|n_embd|\w*embed(ding)?_dim|emb_dim|embedding_size|\w+_embedding_size|dim_model",
        HIDDEN,
    ),
    (r"\w*projection_dim|\w+_output_dim|output_dim|\w+_proj_dim|projector_\w+_dim|lru_width|mamba_d_ssm", HIDDEN),
    (r"latent_channels|base_channels|output_channels|input_size|codebook_dim|num_filters|scale", HIDDEN),
    (r"projection_hidden_size|projector_hidden_size|vector_quantization_hidden_dimension|upsample_groups", HIDDEN),
    (r"(mamba_)?(d_|ssm_)?state(_size|_dim)?|mamba_d_state|(mamba_)?(dt|time_step)_rank|conv_kernel|mamba_d_conv", 4),
    (r"(mamba_)?n_?groups", 1),
    # experts
    (r"(topk_group|n_group|num_expert_group|(num_|n_)?shared_experts|moe_num_shared_experts)", 1),
    (r"(num_experts_per_tok\w*|num_experts_per_token|moe_topk|moe_top_k|moe_k)", 2),
    (r"\w*(num|n)_(\w+_)?experts|zero_expert_num", 4),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    # lengths
    (r"max_position_embeddings|n_positions|max_seq_len|n_ctx|context_length|max_target_positions|seq_len", 256),
    (r"model_max_length|max_source_positions|max_2d_position_embeddings|relative_max_distance", 256),
    (r"sliding_window(_size)?|attention_window_size|local_attention", 8),
    # images
    (r"image_size|resolution|crop_size|window_size", 16),
    (r"(?!temporal_|video_)\w*patch_size", 8),
    (r"num_position_embeddings|\w*num_patches", 16),
    (r"(max_)?num_tiles", 1),
    (r"num_query_tokens|latent_query_num|\w+n_latents|resampler_num_latents|num_image_tokens|mm_tokens_per_image", 4),
    (r"(image|vision|video)_seq_length|vision_soft_tokens_per_image|audio_soft_tokens_per_image", 4),
    (r"index_topk", 64),  # more tokens than there are, so that attribution has nothing to refuse
    (r"index_topk\w*|index_block_size|mamba_chunk_size|chunk_size|block_size", 8),
)
_RULE = [(re.compile(pattern), value) for pattern, value in _RULES]
_KEPT = ("chunk_size_feed_forward", "max_window_layers", "num_nextn_predict_layers", "no_rope_layer_interval")
_LAYER_NUMBERS = re.compile(
    r"deepstack_visual_indexes|fullatt_block_indexes|global_attn_indexes|cross_attention_layers|hybrid_layer_ids"
    r"|intermediate_layers_indices|attn_layer_indices|spatial_target_layers"
)

# What a configuration needs beyond its names, by model type; dotted names are fields of its parts.
_DRAFTER = {
    "text_config.num_kv_shared_layers": LAYERS,
    "text_config.hidden_size_per_layer_input": 0,
    "text_config.vocab_size_per_layer_input": 0,
}
_ONE_TILE = {"image_grid_pinpoints": [[16, 16]]}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
_MROPE = (
    "glm4v",
    "glm_ocr",
    "paddleocr_vl",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen2_5_omni",
)  # their sections are written in the model
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": 16, "attn_layer_indices": [1]},
    "blip-2": {"image_token_index": IMAGE},
    "chameleon": {
        "vocabulary_map": {"<image>": IMAGE, **{f"IMGIMG{letter}Z": 20 + i for i, letter in enumerate("ABCDEFGHIJ")}},
        "vq_config.num_embeddings": 10,
        "vq_config.channel_multiplier": [1] * 4,
    },
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {**_ROPE, "mrope_section": [2, 1, 1]} for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {"attn_config.rope_theta": 10000.0},
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse", "sparse"],
        "text_config.num_experts_per_tok": 2,
        "vision_config.sam_config.downsample_channels": [32, 32],
    },
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": NEURONS,
        "vision_config": {"model_type": "gemma4_vision"},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "glm4v_moe_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "emu3": {  # with fewer codes, or in more dimensions, random weights give any image the same ones
        "vocabulary_map": {
            "<image>": IMAGE,
            "<|extra_200|>": OTHER,
            **{f"<|visual token {i:06}|>": 20 + i for i in range(100)},
        },
        "vq_config.codebook_size": 100,
        "vq_config.embed_dim": 1,
        "vq_config.channel_multiplier": [1] * 4,
    },
    "ernie4_5_vl_moe": {"text_config.rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}},
    "fast_vlm": {"vision_config": {"model_type": "siglip_vision_model"}},
    "gemma3n_text": {"num_kv_shared_layers": 1},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "num_hidden_layers": LAYERS,
            "num_kv_shared_layers": LAYERS,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        },
        **_DRAFTER,
    },
    "gemma4_unified_assistant": {"text_config": {"model_type": "gemma4_unified_text"}, **_DRAFTER},
    "gemma4": {
        "vision_config": {"model_type": "gemma4_vision"},
        "vision_config.pooling_kernel_size": 2,
        "vision_config.image_size": 32,
    },
    "gemma4_unified": {
        "vision_config": {"model_type": "gemma4_unified_vision"},
        "vision_config.pooling_kernel_size": 1,
        "vision_config.output_proj_dims": HIDDEN,
    },
    "gemma4_text": {"global_head_dim": HEAD},
    "glm5_next": {"text_config.index_kpool": 4, "text_config.qk_rope_head_dim": 0, "text_config.qk_head_dim": HEAD},
    "gpt_neo": {
        "attention_types": [[["global", "local", "global"], 1]],
        "attention_layers": ["global", "local", "global"],
    },
    "granite4_vision": {
        "text_config": {"model_type": "granite"},
        "deepstack_layer_map": [[0, 1]],
        "spatial_target_layers": [1],
        "downsample_rate": "1/2",
        **_ONE_TILE,
        "vision_feature_select_strategy": "full",
    },
    "granite": {"logits_scaling": 4.0},
    "granitemoehybrid": {"mamba_d_head": 16},
    "hunyuan_vl": {
        "text_config.rope_parameters": {**_ROPE, "mrope_section": [1] * 4},
        "vision_config.max_image_size": 32,
        "vision_config.min_image_size": 16,
    },
    "instructblip": {"image_token_index": IMAGE},
    "instructblipvideo": {"image_token_index": IMAGE, "video_token_index": IMAGE},
    "internvl": {"image_seq_length": 1},
    "janus": {"vq_config.channel_multiplier": [1]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "llava_next": _ONE_TILE,
    "llava_next_video": _ONE_TILE,
    "llava_onevision": _ONE_TILE,
    "mamba2": {"head_dim": 16},
    "minicpmv4_6": {"image_token_id": IMAGE, "vision_config.image_size": 32},
    "minicpmv4_7": {"image_token_id": IMAGE, "vision_config.image_size": 32},
    "mistral3": {"vision_config.image_size": 32},
    "mllama": {
        "vision_config.max_num_tiles": 1,
        "vision_config.supported_aspect_ratios": [[1, 1]],
        "vision_config.vision_output_dim": 2 * HIDDEN,
    },
    "mpt": {"expansion_ratio": 3},
    "muse_glimmer": {"vision_config.out_hidden_size": 4 * HIDDEN},
    "nemotron": {"num_key_value_heads": 2},
    # Heads below the experts, so that these have an importance.
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "moe"]},
    "nemotron_h_omni": {"vision_config.video_temporal_patch_size": 2, "vision_config.max_img_size": 32},
    "perception_lm": {
        "vision_config": {"model_type": "siglip_vision_model"},
        "vision_config.model_args": {"embed_dim": HIDDEN},
    },
    "phi4_multimodal": {
        "audio_config.ext_pw_out_channel": 32,
        "audio_config.depthwise_separable_out_channel": 32,
        "audio_config.nemo_conv_channels": 32,
    },
    "pp_formulanet": {
        "vision_config.post_conv_in_channels": 32,
        "vision_config.post_conv_mid_channels": 32,
        "vision_config.post_conv_out_channels": 32,
    },
    "qwen4_exp_text": {"ngram_vocab_size_base": VOCABULARY, "make_ngram_vocab_size_divisible_by": 1, **_INDEXER},
    **{f"{name}_text": {"rope_parameters": _ROPE | {"mrope_section": [2, 1, 1]}} for name in _MROPE},
    "qwen2_5_omni_thinker": {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END},
    "reformer": {"axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 16]},
    "vipllava": {"vision_feature_layers": [-2, -1]},
    "vision-encoder-decoder": {"encoder": {"model_type": "vit"}, "decoder": {"model_type": "gpt2"}},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["mamba", "mamba", "hybrid"],
        "attn_layer_offset": 2,
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba"],
        "hybrid_layer_ids": [1],
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD,
        "n_mamba_heads": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}

OTHER_TOWER = ("fast_vlm", "perception_lm")
"""Model types whose own vision tower needs the timm package, and stands in `EXCEPTIONS` replaced by another."""

# Rows beside those of the default configurations: model type, a note for the row's name, and settings.
VARIANTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (
        "gemma4_text",
        "experts",
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 96},
    ),
    ("gemma4_text", "shared keys and values", {"num_kv_shared_layers": 1}),
    ("gemma4_text", "use_double_wide_mlp", {"use_double_wide_mlp": True, "num_kv_shared_layers": 1}),
    ("glm_moe_dsa", "dense", {"mlp_layer_types": ["dense"] * LAYERS}),
    (
        "granitemoehybrid",
        "dense",
        {"num_local_experts": 0, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
)


@dataclass(frozen=True)
class Architecture:
    """A row: model type, class and, for a variant, what is special."""

    model_type: str
    class_name: str
    note: str = ""
    image: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """The row's name, the same as the model type where that tells it."""
        return self.model_type + (f" ({self.note})" if self.note else "")


def shrunk(kind: type[PreTrainedConfig], settings: Mapping[str, Any]) -> PreTrainedConfig:
    """A tiny configuration of a class; `settings` come on top of what its names and `EXCEPTIONS` give."""
    given = {**EXCEPTIONS.get(kind.model_type, {}), **settings}
    own = {name: value for name, value in given.items() if "." not in name}
    parts = {name: value for name, value in own.items() if isinstance(value, dict) and "model_type" in value}
    as_dicts = getattr(kind, "has_no_defaults_at_init", False)
    default = kind(
        **{
            name: part.copy() if as_dicts else CONFIG_MAPPING[part["model_type"]](**part)
            for name, part in parts.items()
        }
    )
    values: dict[str, Any] = {}
    layers = next((n for name in _LAYER_COUNTS if isinstance(n := getattr(default, name, None), int)), None)
    for name, value in default.to_dict().items():
        inner = {key.partition(".")[2]: x for key, x in given.items() if key.partition(".")[0] == name and "." in key}
        part = getattr(default, name) if isinstance(value, dict) else None
        if isinstance(part, PreTrainedConfig):
            small = shrunk(type(part), inner)
            values[name] = small.to_dict() if as_dicts else small
        elif name == "head_dim" and value is None:
            values[name] = HEAD
        elif name in ("num_key_value_heads", "num_kv_heads") and value == getattr(default, "num_attention_heads", None):
            values[name] = HEADS
        elif (small := _small(name, value, layers)) is not None:
            values[name] = small
    values |= {name: value for name, value in own.items() if name not in parts}
    if isinstance(rope := getattr(default, "rope_parameters", None), dict) and _rope(rope) != rope:
        values.setdefault("rope_parameters", _rope(rope))
    return kind(**values)


_LAYER_COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "decoder_layers",
    "layers",
    "num_decoder_layers",
)


def _small(name: str, value: Any, layers: int | None) -> Any:
    """The value that a field gets; None if it keeps its default."""
    if name in _KEPT or isinstance(value, bool):
        return None
    if isinstance(value, list | tuple) and value:
        if _LAYER_NUMBERS.fullmatch(name):
            return [1] if name != "intermediate_layers_indices" else [0]
        if layers and len(value) in (layers, layers + 1):
            return _of_layers(name, list(value))
        if all(isinstance(item, int) and not isinstance(item, bool) for item in value):
            small = _number(name)
            return None if small is None else small if "token" in name else [small] * len(value)
        return None
    return _number(name) if isinstance(value, int) else None


def _of_layers(name: str, values: list[Any]) -> list[Any]:
    """A value for each of `LAYERS` layers, every kind among them."""
    if all(isinstance(value, int) for value in values) and (small := _number(name)) is not None:
        return [small] * LAYERS
    kinds = list(dict.fromkeys(map(_hashable, values)))
    chosen = [next(value for value in values if _hashable(value) == kind) for kind in kinds]
    return [chosen[i % len(chosen)] for i in range(LAYERS)]


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _number(name: str) -> int | None:
    return next((value for pattern, value in _RULE if pattern.fullmatch(name)), None)


def _rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings whose sections, if it has any, fit a head of `HEAD`."""
    if any(isinstance(value, dict) for value in rope.values()):
        return {kind: _rope(value) if isinstance(value, dict) else value for kind, value in rope.items()}
    half = int(HEAD * (rope.get("partial_rotary_factor") or 1)) // 2
    if "mrope_section" in rope:
        third = half // 3
        rope = {**rope, "mrope_section": [half - 2 * third, third, third]}
    return rope


def architectures() -> list[Architecture]:
    """All rows, in the order of their names."""
    text, image = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    rows = []
    for model_type, names in text.items():
        class_name = names if isinstance(names, str) else names[0]
        if model_type not in image:
            rows.append(Architecture(model_type, class_name))
        elif class_name != image[model_type]:
            rows.append(Architecture(model_type, class_name, "text"))
    rows += [Architecture(model_type, class_name, image=True) for model_type, class_name in image.items()]
    by_type = {row.model_type: row for row in rows}
    rows += [replace(by_type[model_type], note=note, settings=settings) for model_type, note, settings in VARIANTS]
    return sorted(rows, key=lambda row: row.name.lower())


def build(row: Architecture, seed: int = 0) -> Any:
    """A tiny random model in eval mode, float32, as those of `tiny_models.py`."""
    kind = getattr(transformers, row.class_name)
    of_type = CONFIG_MAPPING[row.model_type]
    config = shrunk(of_type if issubclass(of_type, kind.config_class) else kind.config_class, row.settings)
    if getattr(config, "is_decoder", None) is False and not row.image:
        config.is_decoder = True  # of models that can also be encoders
    config.tie_word_embeddings = False
    if not issubclass(kind, GenerationMixin):
        raise TypeError(f"{row.class_name} writes no text: transformers gives it no generate()")
    return tiny_models._build(kind, config, seed)
