"""Tiny models with random weights, as in `tiny_models.py`: one or more for each mechanism beyond a plain decoder.

Their names say the architecture; what is special about each stands beside it.
"""

import unusual_models
from tiny_models import GROUPED, TEXT, VOCABULARY, _build
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    BioGptConfig,
    BioGptForCausalLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MiniCPM3Config,
    MiniCPM3ForCausalLM,
    NanoChatConfig,
    NanoChatForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    OlmoHybridConfig,
    OlmoHybridForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    XGLMConfig,
    XGLMForCausalLM,
)


def granite(seed=0):
    """Its logits are divided by a number."""
    return _build(GraniteForCausalLM, GraniteConfig(**GROUPED, logits_scaling=4.0), seed)


def cohere(seed=0):
    """Its logits are multiplied by a number."""
    return _build(CohereForCausalLM, CohereConfig(**GROUPED, logit_scale=0.25), seed)


def cohere2(seed=0):
    return _build(Cohere2ForCausalLM, Cohere2Config(**GROUPED, logit_scale=0.25), seed)


def minicpm3(seed=0):
    """Its hidden states are divided by a number before the unembedding."""
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    return _build(MiniCPM3ForCausalLM, MiniCPM3Config(**TEXT, **latent, dim_model_base=8), seed)


def nanochat(seed=0):
    """Its norms have no weights."""
    return _build(NanoChatForCausalLM, NanoChatConfig(**GROUPED), seed)


def biogpt(seed=0):
    return _build(BioGptForCausalLM, BioGptConfig(**TEXT), seed)


def xglm(seed=0):
    config = XGLMConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        ffn_dim=96,
        num_layers=3,
        attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return _build(XGLMForCausalLM, config, seed)


def qwen3_5_text(seed=0):
    """Layers of linear attention, which have no heads, beside one with heads."""
    config = Qwen3_5TextConfig(
        **GROUPED,
        head_dim=8,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    return _build(Qwen3_5ForCausalLM, config, seed)


def lfm2(seed=0):
    """Layers of short convolutions beside one with heads."""
    config = Lfm2Config(
        **{**GROUPED, "intermediate_size": 96},
        block_auto_adjust_ff_dim=False,
        layer_types=["conv", "full_attention", "conv"],
    )
    return _build(Lfm2ForCausalLM, config, seed)


def bamba(seed=0):
    """State-space mixers beside one layer with heads."""
    config = BambaConfig(
        **GROUPED, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=4, mamba_n_groups=1
    )
    return _build(BambaForCausalLM, config, seed)


def olmo_hybrid(seed=0):
    config = OlmoHybridConfig(
        **GROUPED,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    return _build(OlmoHybridForCausalLM, config, seed)


def nemotron_h(seed=0):
    """Each layer is a state-space mixer, an attention or an FFN."""
    config = NemotronHConfig(
        **GROUPED,
        head_dim=8,
        layers_block_type=["linear_attention", "mlp", "full_attention", "mlp"],
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=4,
        n_groups=1,
    )
    return _build(NemotronHForCausalLM, config, seed)


def gemma4_shared(seed=0):
    """Each layer looks the tokens up again, and the last one uses keys and values of the first, which is like it."""
    config = Gemma4TextConfig(
        **GROUPED,
        head_dim=8,
        global_head_dim=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        num_kv_shared_layers=1,
    )
    return _build(Gemma4ForCausalLM, config, seed)


def gemma4_wide(seed=0):
    """As Gemma 4 above; the layer that uses another's keys and values has an FFN of twice the width."""
    config = Gemma4TextConfig(
        **GROUPED,
        head_dim=8,
        global_head_dim=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        num_kv_shared_layers=1,
        use_double_wide_mlp=True,
    )
    return _build(Gemma4ForCausalLM, config, seed)


def gemma3n(seed=0):
    """As Gemma 4, with several residual streams."""
    config = Gemma3nTextConfig(
        **{**GROUPED, "num_hidden_layers": 4},
        head_dim=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        num_kv_shared_layers=1,
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
    )
    return _build(Gemma3nForCausalLM, config, seed)


FURTHER = {
    "granite": granite,
    "cohere": cohere,
    "cohere2": cohere2,
    "minicpm3": minicpm3,
    "nanochat": nanochat,
    "biogpt": biogpt,
    "xglm": xglm,
    "qwen3_5_text": qwen3_5_text,
    "lfm2": lfm2,
    "bamba": bamba,
    "olmo_hybrid": olmo_hybrid,
    "nemotron_h": nemotron_h,
    "falcon_h1": unusual_models.falcon_h1,
    "gemma4_text": unusual_models.gemma4_text,
    "gemma4_shared": gemma4_shared,
    "gemma4_wide": gemma4_wide,
    "gemma3n": gemma3n,
}
