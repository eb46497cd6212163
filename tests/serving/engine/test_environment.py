"""Unsteered, vLLM and transformers generate the same tokens, so that a difference in other tests is due to steering."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hones_offline.data.scenes import scenes
from PIL import Image
from serving.engines import V2, offline
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

NEW_TOKENS = 16


@pytest.fixture(autouse=True)
def _without_steering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HONES_PROFILES", raising=False)


def by_transformers(model: Any, inputs: Any) -> list[int]:
    """Greedy tokens of transformers for one prompt; an end token does not end them."""
    model.generation_config.eos_token_id = None
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    return tokens[0, inputs["input_ids"].shape[1] :].tolist()


def by_vllm(folder: Path, prompts: list[Any]) -> list[list[int]]:
    """Greedy tokens of vLLM for all prompts at once."""
    from vllm import SamplingParams

    with offline(folder) as llm:
        assert llm.llm_engine.vllm_config.use_v2_model_runner == V2
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True))
    return [list(output.outputs[0].token_ids) for output in outputs]


def check_with_images(folder: Path, images: list[Image.Image], texts: list[str]) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for text in texts
    ]
    expected = [
        by_transformers(model, processor(images=image, text=prompt, return_tensors="pt"))
        for image, prompt in zip(images, prompts, strict=True)
    ]
    requests = [
        {"prompt": prompt, "multi_modal_data": {"image": image}} for image, prompt in zip(images, prompts, strict=True)
    ]
    assert by_vllm(folder, requests) == expected


@pytest.mark.both_runners
def test_llama(llama: Path) -> None:
    prompts = ["w17 w42 w3", "a red circle", "what color is the square on the left ?"]
    tokenizer = AutoTokenizer.from_pretrained(llama)
    model = AutoModelForCausalLM.from_pretrained(llama)
    expected = [by_transformers(model, tokenizer(prompt, return_tensors="pt")) for prompt in prompts]
    assert by_vllm(llama, prompts) == expected


@pytest.mark.both_runners
def test_the_embedded_llava(embedded: Path) -> None:
    drawn = scenes("test", 3)
    check_with_images(embedded, [scene.image() for scene in drawn], [scene.prompt("caption") for scene in drawn])


@pytest.mark.matrix
@pytest.mark.both_runners
def test_qwen2_5_vl(qwen2_5_vl: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 32, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels[0]), Image.fromarray(pixels[1, :, :16])]
    check_with_images(qwen2_5_vl, images, ["what is the color of the square ?", "w17 w18"])


def test_engines_of_one_process_see_the_variables_of_their_time(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = {}
    for gigabytes in (1, 2):
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", str(gigabytes))
        with offline(llama) as llm:
            blocks[gigabytes] = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    assert blocks[2] == pytest.approx(2 * blocks[1], abs=2)
