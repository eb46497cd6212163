"""Tiny mixtures of experts with random weights, as in `tiny_models.py`: four experts, of which a token goes to two."""

from tiny_models import _QWEN_TOKENS, GROUPED, IMAGE, TEXT, VIDEO, VISION_END, VISION_START, _build, mixtral
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    NemotronHConfig,
    NemotronHForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from hones_steer.ffns import FfnRun

CHOSEN = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}


def qwen3_moe(seed=0, **overrides):
    """Its second layer is dense."""
    config = Qwen3MoeConfig(**{**GROUPED, **CHOSEN, "num_experts": 4, "mlp_only_layers": [1], **overrides})
    return _build(Qwen3MoeForCausalLM, config, seed)


def qwen3_vl_moe(seed=0):
    config = Qwen3VLMoeConfig(
        text_config={
            **GROUPED,
            **CHOSEN,
            "num_experts": 4,
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
    return _build(Qwen3VLMoeForConditionalGeneration, config, seed)


def qwen3_5_moe(seed=0):
    """A shared expert, of another width than the routed ones, with a gate of its own; layers of linear attention."""
    config = Qwen3_5MoeTextConfig(
        **{key: value for key, value in GROUPED.items() if key != "intermediate_size"},
        **CHOSEN,
        num_experts=4,
        shared_expert_intermediate_size=40,
        head_dim=8,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    return _build(Qwen3_5MoeForCausalLM, config, seed)


def llama4(seed=0):
    """Every expert computes every token, weighted before instead of after; the first layer is dense."""
    config = Llama4TextConfig(
        **{**GROUPED, "intermediate_size": 48},
        intermediate_size_mlp=96,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        moe_layers=[1, 2],
    )
    return _build(Llama4ForCausalLM, config, seed)


def gpt_oss(seed=0):
    """Gate and up alternate, have biases and an activation of their own."""
    config = GptOssConfig(
        **{**GROUPED, "intermediate_size": 48}, head_dim=8, num_local_experts=4, num_experts_per_tok=2
    )
    return _build(GptOssForCausalLM, config, seed)


def deepseek_v3(seed=0):
    """Two shared experts, kept as one; the first layer is dense."""
    config = DeepseekV3Config(
        **TEXT,
        **CHOSEN,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_shared_experts=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    )
    return _build(DeepseekV3ForCausalLM, config, seed)


def glm4v_moe(seed=0):
    config = Glm4vMoeConfig(
        text_config={
            **GROUPED,
            **CHOSEN,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "image_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 32,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=VISION_START,
        image_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    return _build(Glm4vMoeForConditionalGeneration, config, seed)


def nemotron_h_moe(seed=0):
    """Experts without a gate, and a shared one; each layer is a state-space mixer, an attention or a mixture."""
    config = NemotronHConfig(
        **GROUPED,
        **CHOSEN,
        head_dim=8,
        layers_block_type=["linear_attention", "moe", "full_attention", "moe"],
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=4,
        n_groups=1,
        n_routed_experts=4,
        n_shared_experts=1,
        moe_shared_expert_intermediate_size=40,
        moe_latent_size=None,
    )
    return _build(NemotronHForCausalLM, config, seed)


def _experts(first, stop, **others):
    return FfnRun(first, stop, experts=4, expert_width=48, **others)


# Models, and the FFNs that they have.
MIXTURES = {
    "qwen3_moe": (qwen3_moe, (_experts(0, 1), FfnRun(1, 2, dense=96), _experts(2, 3))),
    "qwen3_vl_moe": (qwen3_vl_moe, (_experts(0, 3),)),
    "qwen3_5_moe": (qwen3_5_moe, (_experts(0, 3, shared=40),)),
    "mixtral": (mixtral, (FfnRun(0, 3, experts=2, expert_width=96),)),
    "llama4": (llama4, (FfnRun(0, 1, dense=96), _experts(1, 3, shared=48))),
    "gpt_oss": (gpt_oss, (_experts(0, 3),)),
    "deepseek_v3": (deepseek_v3, (FfnRun(0, 1, dense=96), _experts(1, 3, shared=96))),
    "glm4v_moe": (glm4v_moe, (FfnRun(0, 1, dense=96), _experts(1, 3, shared=48))),
    "nemotron_h": (nemotron_h_moe, (_experts(1, 2, shared=40), _experts(3, 4, shared=40))),
}
