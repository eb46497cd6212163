"""Tiny models with random weights, as in `tiny_models.py`, of architectures that not all of hones-steer supports."""

from tiny_models import GROUPED, IMAGE, TEXT, VISION, VOCABULARY, _build
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GitConfig,
    GitForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    Kosmos2Config,
    Kosmos2ForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    MllamaConfig,
    MllamaForConditionalGeneration,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    ZambaConfig,
    ZambaForCausalLM,
)

_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_QFORMER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "encoder_hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def mamba(seed=0):
    """State-space mixers, and no FFN."""
    config = MambaConfig(**_TOKENS, hidden_size=32, state_size=4, num_hidden_layers=2, time_step_rank=4)
    return _build(MambaForCausalLM, config, seed)


def falcon_mamba(seed=0):
    config = FalconMambaConfig(**_TOKENS, hidden_size=32, state_size=4, num_hidden_layers=2, time_step_rank=4)
    return _build(FalconMambaForCausalLM, config, seed)


def zamba(seed=0):
    """Layers of state-space mixers alone, and some with an FFN that all of them share."""
    config = ZambaConfig(
        **{**TEXT, "num_attention_heads": 2},
        layers_block_type=["mamba", "mamba", "hybrid"],
        n_mamba_heads=2,
        mamba_d_state=4,
        mamba_dt_rank=4,
        attn_layer_offset=2,
    )
    return _build(ZambaForCausalLM, config, seed)


def rwkv(seed=0):
    """Its FFN also looks at the token before."""
    config = RwkvConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        attention_hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=3,
        context_length=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _build(RwkvForCausalLM, config, seed)


def recurrent_gemma(seed=0):
    """Recurrent blocks and attention, with FFNs of half the configured width in all layers."""
    config = RecurrentGemmaConfig(**{**GROUPED, "intermediate_size": 192}, lru_width=32, attention_window_size=16)
    return _build(RecurrentGemmaForCausalLM, config, seed)


def falcon_h1(seed=0):
    """Attention and a state-space mixer side by side, and an FFN."""
    config = FalconH1Config(
        **GROUPED, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=4
    )
    return _build(FalconH1ForCausalLM, config, seed)


def gemma4_text(seed=0):
    """Each layer looks the tokens up again."""
    config = Gemma4TextConfig(
        **GROUPED,
        head_dim=8,
        global_head_dim=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        num_kv_shared_layers=0,
    )
    return _build(Gemma4ForCausalLM, config, seed)


_INDEXED = {
    **TEXT,
    "mlp_layer_types": ["dense"] * 3,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
}


def glm_moe_dsa(seed=0):
    """Sparse attention with keys of its own to choose by; FFNs dense in all layers."""
    return _build(GlmMoeDsaForCausalLM, GlmMoeDsaConfig(**_INDEXED, index_topk=8), seed)


def deepseek_v32(seed=0):
    """The same; it may choose more tokens than a test has, and layers tell no other what they choose."""
    return _build(DeepseekV32ForCausalLM, DeepseekV32Config(**_INDEXED, index_topk=64), seed)


def mllama(seed=0):
    """Its layer 1 is cross-attention, which runs only with an image."""
    config = MllamaConfig(
        text_config={
            **GROUPED,
            "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
            "vision_output_dim": 32,
            "intermediate_layers_indices": [0],
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
        },
        image_token_index=IMAGE,
    )
    return _build(MllamaForConditionalGeneration, config, seed)


def idefics(seed=0):
    """Does not run without an image."""
    config = IdeficsConfig(
        **TEXT,
        additional_vocab_size=0,
        cross_layer_interval=1,
        use_resampler=False,
        vision_config={
            "embed_dim": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
    )
    return _build(IdeficsForVisionText2Text, config, seed)


def instructblip(seed=0):
    """Does not run without an image."""
    config = InstructBlipConfig(
        vision_config=VISION,
        qformer_config=_QFORMER,
        text_config={**GROUPED, "model_type": "llama"},
        num_query_tokens=2,
        image_token_index=IMAGE,
    )
    return _build(InstructBlipForConditionalGeneration, config, seed)


def blip2(seed=0):
    """Does not run without an image; its text decoder is inside an OPT model."""
    text = {key: value for key, value in TEXT.items() if key != "intermediate_size"}
    config = Blip2Config(
        vision_config=VISION,
        qformer_config=_QFORMER,
        text_config={**text, "model_type": "opt", "ffn_dim": 96, "word_embed_proj_dim": 32},
        num_query_tokens=2,
        image_token_index=IMAGE,
    )
    return _build(Blip2ForConditionalGeneration, config, seed)


def git(seed=0):
    """Its decoder is called an encoder, and embeds images itself."""
    return _build(GitForCausalLM, GitConfig(**TEXT, vision_config=VISION), seed)


def kosmos2(seed=0):
    """Wants an image, and told where it goes."""
    text = {"vocab_size": VOCABULARY, "embed_dim": 32, "layers": 3, "ffn_dim": 96, "attention_heads": 4}
    config = Kosmos2Config(text_config=text, vision_config=VISION, latent_query_num=2)
    return _build(Kosmos2ForConditionalGeneration, config, seed)
