"""Mixed batches in real engines: each request gets the tokens that it gets alone, and from transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hones_offline.data.scenes import scenes
from PIL import Image
from serving.engines import V2
from serving.steered import (
    MIXED,
    Reference,
    answers,
    answers_alone,
    engine,
    expected_tokens,
    generate,
    logprobs_of,
    prompts,
    schedule_ahead,
    tokens_of,
    write_profiles,
)
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

PROMPTS = prompts(len(MIXED), longest=30)
MATRIX = pytest.mark.matrix
# vLLM's client leaves its ZeroMQ context to the garbage collector.
UNRAISABLE = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
STAGES = {"pipeline_parallel_size": 2}
# Without a warm-up the first step would be compiled for its own number of tokens in all but the first stage.
COMPILED_AS_IT_WARMS_UP = {
    "env": {"VLLM_CPU_CI_ENV": "0"},
    "enforce_eager": False,
    "compilation_config": {"mode": 2, "backend": "eager"},  # once, whole, as vLLM does on a CPU
}
MODES = [  # eager, whole prompts: the test before
    pytest.param({"max_num_batched_tokens": 8}, id="chunked prefill", marks=pytest.mark.both_runners(everyday=True)),
    pytest.param({"enforce_eager": False, "max_num_batched_tokens": 16}, id="compiled chunked prefill"),
    pytest.param({"enforce_eager": False}, id="compiled", marks=MATRIX),
    # In chunks, so that two steps of different requests are on their way at once.
    pytest.param(
        {**STAGES, "max_num_batched_tokens": 8}, id="pipeline", marks=[UNRAISABLE, MATRIX, pytest.mark.both_runners]
    ),
    pytest.param(
        {**STAGES, "tensor_parallel_size": 2},
        id="pipeline and tensor parallel",
        marks=[UNRAISABLE, MATRIX, pytest.mark.both_runners],
    ),
    pytest.param({**STAGES, **COMPILED_AS_IT_WARMS_UP}, id="compiled pipeline", marks=[UNRAISABLE, MATRIX]),
]


@pytest.fixture(scope="module")
def expected(llama: Path, profiles: Path) -> list[list[int]]:
    """Transformers' tokens for the requests of the mixed batch."""
    return expected_tokens(Reference(AutoModelForCausalLM.from_pretrained(llama), profiles), PROMPTS)


@pytest.mark.both_runners
def test_unsteered_requests_are_bit_equal_to_an_engine_without_hones(
    llama: Path, profiles: Path, expected: list[list[int]]
) -> None:
    unsteered = [None] * len(MIXED)
    with engine(llama, None) as llm:
        without = generate(llm, PROMPTS, unsteered, logprobs=5)
    with engine(llama, profiles) as llm:
        idle = generate(llm, PROMPTS, unsteered, logprobs=5)
        mixed = generate(llm, PROMPTS, MIXED, logprobs=5)
        alone = answers_alone(llm, PROMPTS, MIXED)
    assert tokens_of(idle) == tokens_of(without)
    assert logprobs_of(idle) == logprobs_of(without)
    assert tokens_of(mixed) == alone == expected
    for row, expression in enumerate(MIXED):
        same = logprobs_of(mixed)[row] == logprobs_of(without)[row]
        assert same == (expression in (None, "none")), expression


@pytest.mark.parametrize("options", MODES)
def test_each_request_of_a_mixed_batch_is_right(
    options: dict[str, Any], llama: Path, profiles: Path, expected: list[list[int]]
) -> None:
    with engine(llama, profiles, **options) as llm:
        assert answers(llm, PROMPTS, MIXED) == expected
        assert answers_alone(llm, PROMPTS, MIXED) == expected


@pytest.mark.both_runners(everyday=True)
def test_preempted_requests_come_back_steered(llama: Path, profiles: Path, expected: list[list[int]]) -> None:
    # 8 blocks of 32 tokens: all requests start, but some need a second block before others have finished.
    options = {"num_gpu_blocks_override": 9, "block_size": 32, "max_model_len": 64, "enable_prefix_caching": False}
    with engine(llama, profiles, disable_log_stats=False, **options) as llm:
        assert answers(llm, PROMPTS, MIXED) == expected
        (preemptions,) = (metric for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
        assert preemptions.value > 0


@pytest.mark.both_runners(everyday=True)
def test_async_scheduling(
    llama: Path, profiles: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule_ahead(monkeypatch)
    with engine(llama, profiles) as llm:
        assert type(llm.llm_engine.engine_core.engine_core.scheduler).__name__ == "AsyncScheduler"
        assert answers(llm, PROMPTS, MIXED) == expected


@UNRAISABLE
@pytest.mark.both_runners
def test_tensor_parallel_in_processes_of_their_own(llama: Path, profiles: Path, expected: list[list[int]]) -> None:
    with engine(llama, profiles, tensor_parallel_size=2) as llm:
        assert answers(llm, PROMPTS, MIXED) == expected


@pytest.mark.both_runners
def test_the_embedded_llava(embedded: Path, tmp_path: Path) -> None:
    drawn = scenes("test", len(MIXED))
    texts, images = [scene.prompt("caption") for scene in drawn], [scene.image() for scene in drawn]
    # A trained model keeps its answers under a few scales.
    check_with_images(embedded, texts, images, tmp_path / "profiles", fraction=1)


@MATRIX
@pytest.mark.both_runners
def test_qwen2_5_vl(qwen2_5_vl: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (len(MIXED), 16, 32, 3), dtype=np.uint8)
    images = [Image.fromarray(image[:, : 16 + 16 * (i % 2)]) for i, image in enumerate(pixels)]  # 4 or 8 tokens each
    texts = [f"what is the color of w{10 * i} w{i + 20} ?" for i in range(len(MIXED))]
    check_with_images(qwen2_5_vl, texts, images, tmp_path / "profiles", fraction=0.3)


def check_with_images(folder: Path, texts: list[str], images: list[Any], profiles: Path, fraction: float) -> None:
    """Check mixed batches with an image in each request: eager, in chunks of a few tokens, and with V1 compiled."""
    processor = AutoProcessor.from_pretrained(folder)
    requests = [
        (
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
                add_generation_prompt=True,
                tokenize=False,
            ),
            image,
        )
        for text, image in zip(texts, images, strict=True)
    ]
    model = AutoModelForImageTextToText.from_pretrained(folder)
    write_profiles(model, profiles, fraction)
    expected = expected_tokens(Reference(model, profiles, processor), requests)
    for options in [{"max_num_batched_tokens": 64}, {"enforce_eager": False}][: 1 if V2 else 2]:
        with engine(folder, profiles, **options) as llm:
            assert answers(llm, requests, MIXED) == expected
            assert answers_alone(llm, requests, MIXED) == expected
