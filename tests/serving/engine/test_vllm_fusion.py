"""The code that Inductor generates for the scaling in a compiled vLLM engine."""

import re
from pathlib import Path

from serving.engines import fresh_cache
from serving.steered import engine
from tiny_models import random_profile
from transformers import AutoModelForCausalLM

from hones_steer import save_profile

LAYERS = 4
CALL = re.compile(r"^\s*(cpp_fused\w*)\(", re.MULTILINE)


def test_the_scaling_is_fused_with_the_activation(llama: Path, tmp_path: Path) -> None:
    """Checks in the generated code that each layer's activation kernel looks the scales up itself."""
    (tmp_path / "profiles").mkdir()
    model = AutoModelForCausalLM.from_pretrained(llama)
    save_profile(random_profile(model, 0, "vqa"), tmp_path / "profiles" / "vqa.safetensors")
    env = {"VLLM_CPU_CI_ENV": "0", "VLLM_CACHE_ROOT": fresh_cache(tmp_path)}
    with engine(llama, tmp_path / "profiles", env, enforce_eager=False):
        pass
    codes = [file.read_text() for file in tmp_path.rglob("*.py")]
    kernels = [kernel for code in codes for kernel in CALL.findall(code)]
    activations = [kernel for kernel in kernels if "silu" in kernel]
    assert len(activations) == LAYERS
    assert all("index_select" in kernel for kernel in activations)
    lookups = [kernel for kernel in kernels if "index_select" in kernel and "silu" not in kernel]
    assert len(lookups) == LAYERS, "rotary embeddings look up as well, once per layer, and nothing else does"
