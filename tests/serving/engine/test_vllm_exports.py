"""Exports of `hones export` in a stock vLLM without our plugin, whose answers are those of steered transformers.

All requests of a batch have the adapter: on a CPU, vLLM gives requests without one its output too.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hones_offline.data.scenes import scenes
from PIL import Image
from serving.steered import NEW_TOKENS, Prompt, Reference, engine, prompts, request, sampling, tokens_of, write_profiles
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from vllm.lora.request import LoRARequest

from hones_steer import Profile, export_lora, merge_into
from serving import checkpoints

ROWS = 4


MATRIX = ("llama", *checkpoints.VLMS)


@pytest.fixture(scope="module", params=["embedded", *(pytest.param(name, marks=pytest.mark.matrix) for name in MATRIX)])
def case(
    request: pytest.FixtureRequest, llama: Path, embedded: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A checkpoint, a model loaded from it, a profile, requests, and their steered tokens."""
    here = tmp_path_factory.mktemp("profiles")
    folder = here / "profiles"
    if request.param == "llama":
        base, model, processor = llama, AutoModelForCausalLM.from_pretrained(llama), None
        asked: list[Prompt] = [*prompts(ROWS)]
    elif request.param in checkpoints.VLMS:
        base = checkpoints.VLMS[request.param](here / "model")
        model, processor = AutoModelForImageTextToText.from_pretrained(base), AutoProcessor.from_pretrained(base)
        asked = [(chat(processor, f"what is w{10 * i} ?"), noise(i)) for i in range(ROWS)]
    else:
        base, model = embedded, AutoModelForImageTextToText.from_pretrained(embedded, dtype="float32")
        processor = AutoProcessor.from_pretrained(embedded)
        asked = [(chat(processor, scene.prompt("caption")), scene.image()) for scene in scenes("test", ROWS)]
    profiles = write_profiles(model, folder, fraction=0.9 if request.param == "embedded" else 0.3)
    reference = Reference(model, folder, processor)
    expected = reference.answers(asked, ["vqa"] * ROWS)
    assert all(a != b for a, b in zip(expected, reference.answers(asked, [None] * ROWS), strict=True))
    reference.steering.detach()
    return {"base": base, "model": model, "profile": profiles["vqa"], "asked": asked, "expected": expected}


def chat(processor: Any, text: str) -> str:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    prompt: str = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return prompt


def noise(seed: int) -> Image.Image:
    """An image, 32 wide and 16 high."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 32, 3), dtype=np.uint8))


def answers(llm: Any, asked: list[Prompt], **options: Any) -> list[list[int]]:
    outputs = llm.generate([request(p) for p in asked], sampling(None), use_tqdm=False, **options)
    return tokens_of(outputs)


def test_the_lora_is_served(case: dict[str, Any], tmp_path: Path) -> None:
    profile: Profile = case["profile"]
    done = export_lora(profile, case["model"], tmp_path / "lora")
    rank = next(allowed for allowed in (128, 512) if max(done.ranks.values()) <= allowed)
    with engine(case["base"], None, enable_lora=True, max_lora_rank=rank) as llm:
        adapter = LoRARequest("vqa", 1, str(tmp_path / "lora"))
        assert answers(llm, case["asked"], lora_request=adapter) == case["expected"]


def test_the_merged_checkpoint_is_served(case: dict[str, Any], tmp_path: Path) -> None:
    merge_into(case["profile"], case["base"], tmp_path / "merged")
    with engine(tmp_path / "merged", None) as llm:
        tokens = answers(llm, case["asked"])
    assert all(len(row) == NEW_TOKENS for row in tokens)
    assert tokens == case["expected"]
