"""Pipeline parallelism: each worker has some layers and steers those, two steps being on their way at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from serving.steered import MIXED, Reference, answers, answers_alone, changed, engine, prompts
from transformers import AutoModelForCausalLM

# vLLM's client leaves its ZeroMQ context to the garbage collector.
pytestmark = [
    pytest.mark.matrix,
    pytest.mark.both_runners,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

ENV = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
PROMPTS = prompts(len(MIXED), longest=30)


@contextmanager
def staged(model: Path, profiles: Path, **options: Any) -> Iterator[Any]:
    """An engine of two pipeline stages."""
    with engine(model, profiles, ENV, pipeline_parallel_size=2, **options) as llm:
        # Where vLLM warms nothing up, the V1 runner has no room yet for what the first stage hands on.
        llm.collective_rpc("execute_dummy_batch")
        yield llm


@pytest.fixture(scope="module")
def expected(llama: Path, profiles: Path) -> list[list[int]]:
    reference = Reference(AutoModelForCausalLM.from_pretrained(llama), profiles)
    tokens = reference.answers(PROMPTS, MIXED)
    assert changed(tokens, reference.answers(PROMPTS, [None] * len(MIXED)), MIXED) >= 0.8
    reference.steering.detach()
    return tokens


@pytest.mark.parametrize("options", [{}, {"tensor_parallel_size": 2}], ids=str)
def test_each_request_of_a_mixed_batch_is_right(
    options: dict[str, Any], llama: Path, profiles: Path, expected: list[list[int]]
) -> None:
    with staged(llama, profiles, max_num_batched_tokens=8, **options) as llm:
        assert answers(llm, PROMPTS, MIXED) == expected
        assert answers_alone(llm, PROMPTS, MIXED) == expected
