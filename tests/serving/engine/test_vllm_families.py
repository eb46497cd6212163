"""Families of models in vLLM, each steered in mixed batches to the tokens of transformers.

One stands for each mechanism every day: GPT-2 in vLLM's own code has no gate, and Phi is run by transformers' code.
"""

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from serving.steered import MIXED, Prompt, Reference, answers, changed, engine, prompts, write_profiles
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from serving import checkpoints

EVERY_DAY = ("gpt2", "phi")
EAGER = {"max_num_batched_tokens": 16}  # in chunks
COMPILED = {"enforce_eager": False}


@dataclass(frozen=True)
class Case:
    """A checkpoint, a folder of profiles for it, requests, and their steered tokens."""

    model: Path
    profiles: Path
    asked: list[Prompt]
    expected: list[list[int]]


def case_of(here: Path, folder: Path, model: Any, asked: list[Prompt], processor: Any = None) -> Case:
    write_profiles(model, here / "profiles", fraction=0.5)
    reference = Reference(model, here / "profiles", processor)
    expected = reference.answers(asked, MIXED)
    assert changed(expected, reference.answers(asked, [None] * len(MIXED)), MIXED) >= 0.8
    reference.steering.detach()
    return Case(folder, here / "profiles", asked, expected)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name in EVERY_DAY else pytest.mark.matrix)
        for name in (*checkpoints.UNGATED, *checkpoints.GATED)
    ],
)
def text(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    here = tmp_path_factory.mktemp(request.param)
    folder = checkpoints.text_model(here / "model", request.param)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    yield case_of(here, folder, model, [*prompts(len(MIXED), longest=30)])
    gc.unfreeze()  # engines keep all that was there


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.matrix) for name in checkpoints.VLMS])
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    here = tmp_path_factory.mktemp(request.param)
    folder = checkpoints.VLMS[request.param](here / "model")
    processor = AutoProcessor.from_pretrained(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (len(MIXED), 16, 32, 3), dtype=np.uint8)
    asked: list[Prompt] = []
    for i, image in enumerate(pixels):
        words = {"type": "text", "text": f"what is the color of w{10 * i} w{i + 20} ?"}
        messages = [{"role": "user", "content": [{"type": "image"}, words]}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        asked.append((prompt, Image.fromarray(image[:, : 16 + 16 * (i % 2)])))
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return case_of(here, folder, model, asked, processor)


@pytest.mark.parametrize("options", [EAGER, COMPILED], ids=["eager", "compiled"])
def test_each_request_of_a_mixed_batch_is_right(text: Case, options: dict[str, Any]) -> None:
    with engine(text.model, text.profiles, **options) as llm:
        assert answers(llm, text.asked, MIXED) == text.expected


# vLLM's client leaves its ZeroMQ context to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.matrix
def test_tensor_parallel(text: Case) -> None:
    """Each worker scales its share of the neurons, which its share of the down-projection takes."""
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with engine(text.model, text.profiles, env, tensor_parallel_size=2) as llm:
        assert answers(llm, text.asked, MIXED) == text.expected


@pytest.mark.parametrize("options", [{"max_num_batched_tokens": 64}, COMPILED], ids=["eager", "compiled"])
def test_with_images(vlm: Case, options: dict[str, Any]) -> None:
    with engine(vlm.model, vlm.profiles, **options) as llm:
        assert answers(llm, vlm.asked, MIXED) == vlm.expected
