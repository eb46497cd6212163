"""Tiny models with random weights, as in `tiny_models.py`: one or more for each mechanism beyond a plain decoder.

Their names say the architecture; what is special about each stands beside it.
"""

from tiny_models import GROUPED, TEXT, VOCABULARY, _build
from transformers import (
    BioGptConfig,
    BioGptForCausalLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MiniCPM3Config,
    MiniCPM3ForCausalLM,
    NanoChatConfig,
    NanoChatForCausalLM,
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


FURTHER = {
    "granite": granite,
    "cohere": cohere,
    "cohere2": cohere2,
    "minicpm3": minicpm3,
    "nanochat": nanochat,
    "biogpt": biogpt,
    "xglm": xglm,
}
