"""Families of models in vLLM, each steered in mixed batches to the tokens of transformers.

One stands for each mechanism every day: GPT-2 has no gate, and Phi is run by transformers' code with vLLM's linears.
Such an engine changes transformers' classes of that family in this process: it builds none afterwards.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from serving.steered import MIXED, Case, Prompt, answers, case_of, engine, prompts
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from vllm.lora.utils import parse_fine_tuned_lora_name

from hones_steer import export_lora
from serving import checkpoints

MODES: dict[str, dict[str, Any]] = {
    "eager": {"max_num_batched_tokens": 64},
    "compiled": {"enforce_eager": False, "max_num_batched_tokens": 64},
    # Each worker scales its share of the neurons, which its share of the down-projection takes.
    "tensor parallel": {"tensor_parallel_size": 2},
    "pipeline": {"pipeline_parallel_size": 2, "max_num_batched_tokens": 8},
}
EVERY_DAY = [("gpt2", "compiled"), ("phi", "eager"), ("phi", "compiled")]
PAIRS = [(name, mode) for name in checkpoints.UNGATED for mode in MODES]
PAIRS.remove(("gpt_bigcode", "pipeline"))  # vLLM's later stages run it without its embedding of positions, and fail
PAIRS += [(name, mode) for name in checkpoints.GATED for mode in ("eager", "compiled")]  # in parallel: Llama's tests


def marks(name: str, mode: str) -> list[Any]:
    """Marks of a case; the V2 runner has each family eager."""
    everyday = (name, mode) in EVERY_DAY
    return ([] if everyday else [pytest.mark.matrix]) + ([pytest.mark.both_runners] if mode == "eager" else [])


@pytest.fixture(scope="module")
def text(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Case of a text model by its `model_type`."""
    folder = checkpoints.text_model(tmp_path_factory.mktemp(request.param), request.param)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return case_of(folder, model, prompts(len(MIXED), longest=30))


@pytest.fixture(scope="module")
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Case of a VLM by its name, with an image in each request."""
    folder = checkpoints.VLMS[request.param](tmp_path_factory.mktemp(request.param))
    processor = AutoProcessor.from_pretrained(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (len(MIXED), 16, 32, 3), dtype=np.uint8)
    asked: list[Prompt] = []
    for i, image in enumerate(pixels):
        words = {"type": "text", "text": f"what is the color of w{10 * i} w{i + 20} ?"}
        messages = [{"role": "user", "content": [{"type": "image"}, words]}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        asked.append((prompt, Image.fromarray(image[:, : 16 + 16 * (i % 2)])))
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return case_of(folder, model, asked, processor)


# vLLM's client leaves its ZeroMQ context to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # GPT-BigCode's attention
@pytest.mark.parametrize(
    ("text", "mode"),
    [pytest.param(*pair, marks=marks(*pair)) for pair in PAIRS],
    indirect=["text"],
    scope="module",  # or each mode would have a case of its own
)
def test_each_request_of_a_mixed_batch_is_right(text: Case, mode: str) -> None:
    with engine(text.folder, text.profiles, **MODES[mode]) as llm:
        assert answers(llm, text.asked, MIXED) == text.expected


@pytest.mark.matrix
@pytest.mark.parametrize("mode", [pytest.param("eager", marks=pytest.mark.both_runners), "compiled"])
@pytest.mark.parametrize("vlm", checkpoints.VLMS, indirect=True)
def test_with_images(vlm: Case, mode: str, tmp_path: Path) -> None:
    """Checks as well that vLLM finds every module of an exported LoRA: it leaves out unknown ones without a word."""
    export_lora(vlm.of["vqa"], vlm.model, tmp_path / "lora")
    with engine(vlm.folder, vlm.profiles, **MODES[mode]) as llm:
        assert answers(llm, vlm.asked, MIXED) == vlm.expected
        assert llm.apply_model(lambda model: unknown(model, tmp_path / "lora")) == [set()]


def unknown(model: Any, adapter: Path) -> set[str]:
    """Names of the modules of a LoRA adapter that a model of vLLM's does not have."""
    mapper, keys = getattr(model, "hf_to_vllm_mapper", None), load_file(adapter / "adapter_model.safetensors")
    return {parse_fine_tuned_lora_name(key, mapper)[0] for key in keys} - dict(model.named_modules()).keys()
