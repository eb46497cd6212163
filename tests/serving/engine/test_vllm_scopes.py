"""Scopes in real engines: tokens before or after the prompt's end are steered, by their positions, in every phase.

The reference is transformers without any of our code, which computes the whole sequence anew for each token.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hones_offline.data.scenes import scenes
from reference_steering import generated_in_scope
from serving.engines import V2
from serving.steered import (
    NEW_TOKENS,
    Prompt,
    engine,
    logprobs_of,
    prompts,
    request,
    sampling,
    schedule_ahead,
    tokens_of,
    words,
    write_profiles,
)
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from hones_steer import ProfileStore, RoutingError

# A mixed batch: (expression, scope).
MIXED = (
    ("vqa", "prompt"),
    ("vqa", "generated"),
    (None, None),
    ("vqa", None),
    ("ocr", "generated"),
    ("vqa@0.5+ocr", "prompt"),
    ("none", "prompt"),
    ("ocr", "all"),
)
PROMPTS = prompts(len(MIXED), longest=30)
BLOCK = 32
IN_PROCESSES = [
    pytest.mark.matrix,
    pytest.mark.both_runners,
    # vLLM's client leaves its ZeroMQ context to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
MODES = [
    pytest.param({"max_num_batched_tokens": 8}, id="chunked prefill", marks=pytest.mark.both_runners),
    pytest.param(
        {"enforce_eager": False, "max_num_batched_tokens": 16}, id="compiled chunked prefill", marks=pytest.mark.matrix
    ),
    pytest.param({"pipeline_parallel_size": 2, "max_num_batched_tokens": 8}, id="pipeline", marks=IN_PROCESSES),
    pytest.param({"tensor_parallel_size": 2, "max_num_batched_tokens": 8}, id="tensor parallel", marks=IN_PROCESSES),
]
# Its answer: the tokens of a prompt under an expression and a scope.
Alone = Callable[..., list[int]]


@pytest.fixture(scope="module")
def alone(llama: Path, profiles: Path) -> Alone:
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    store = ProfileStore(profiles)

    def answer(prompt: list[int], expression: str | None, scope: str | None, count: int = NEW_TOKENS) -> list[int]:
        inputs = {"input_ids": torch.tensor([prompt])}
        (tokens,) = generated_in_scope(model, inputs, [store.resolve(expression or "none")], [scope or "all"], count)
        return tokens

    return answer


@pytest.fixture(scope="module")
def expected(alone: Alone) -> list[list[int]]:
    """The reference's tokens for the mixed batch; each scope makes its own answer."""
    tokens = [alone(prompt, *named) for prompt, named in zip(PROMPTS, MIXED, strict=True)]
    for i in (0, 1, 4, 5):
        others = [alone(PROMPTS[i], expression, "all") for expression in (MIXED[i][0], None)]
        assert tokens[i] not in others
    return tokens


def answers(llm: Any, prompts: Sequence[Prompt], mixed: Sequence[tuple[str | None, str | None]]) -> list[list[int]]:
    """The tokens of one mixed batch."""
    params = [sampling(expression, scope) for expression, scope in mixed]
    return tokens_of(llm.generate([request(prompt) for prompt in prompts], params, use_tqdm=False))


@pytest.mark.parametrize("options", MODES)
def test_each_request_of_a_mixed_batch_is_right(
    options: dict[str, Any], llama: Path, profiles: Path, expected: list[list[int]]
) -> None:
    with engine(llama, profiles, **options) as llm:
        assert answers(llm, PROMPTS, MIXED) == expected
        singly = [answers(llm, [prompt], [named])[0] for prompt, named in zip(PROMPTS, MIXED, strict=True)]
        assert singly == expected


@pytest.mark.both_runners
def test_unsteered_requests_beside_them_are_bit_equal(llama: Path, profiles: Path) -> None:
    """A request of the scope `prompt` without a second token is one that is steered throughout, bit for bit."""

    def logprobs(llm: Any, mixed: Sequence[tuple[str | None, str | None]], **options: Any) -> list[Any]:
        assert llm.reset_prefix_cache()
        params = [sampling(*named, logprobs=5, **options) for named in mixed]
        return logprobs_of(llm.generate([request(prompt) for prompt in PROMPTS], params, use_tqdm=False))

    with engine(llama, profiles) as llm:
        plain = logprobs(llm, [(None, None)] * len(MIXED))
        mixed = logprobs(llm, MIXED)
        whole = logprobs(llm, [(expression, "all") for expression, _ in MIXED], max_tokens=1)
        first = logprobs(llm, MIXED, max_tokens=1)
    for i, (expression, scope) in enumerate(MIXED):
        steered = expression not in (None, "none")
        assert (mixed[i] == plain[i]) != steered
        assert first[i][0] == (plain if steered and scope == "generated" else whole)[i][0], (expression, scope)


@pytest.mark.both_runners(everyday=True)
def test_a_generated_token_that_is_computed_again_is_a_generated_one(
    llama: Path, profiles: Path, expected: list[list[int]]
) -> None:
    """Preempts requests, whose tokens so far are then computed like a prompt."""
    options = {"num_gpu_blocks_override": 9, "block_size": BLOCK, "max_model_len": 64, "enable_prefix_caching": False}
    with engine(llama, profiles, disable_log_stats=False, **options) as llm:
        assert answers(llm, PROMPTS, MIXED) == expected
        (preemptions,) = (metric for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
        assert preemptions.value > 0


@pytest.mark.both_runners
def test_async_scheduling_in_chunks(
    llama: Path, profiles: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule_ahead(monkeypatch)
    with engine(llama, profiles, max_num_batched_tokens=16) as llm:
        assert type(llm.llm_engine.engine_core.engine_core.scheduler).__name__ == "AsyncScheduler"
        assert answers(llm, PROMPTS, MIXED) == expected


@pytest.mark.matrix
@pytest.mark.both_runners
def test_drafted_tokens_are_generated_ones(llama: Path, profiles: Path, expected: list[list[int]]) -> None:
    speculative = {"method": "draft_model", "model": str(llama), "num_speculative_tokens": 3}
    with engine(llama, profiles, speculative_config=speculative) as llm:
        assert answers(llm, PROMPTS, MIXED) == expected


@pytest.mark.matrix
@pytest.mark.both_runners
def test_images_are_a_part_of_the_prompt(embedded: Path, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(embedded)
    model = AutoModelForImageTextToText.from_pretrained(embedded).eval()
    folder = tmp_path / "profiles"
    write_profiles(model, folder, fraction=0.9)
    requests: list[Prompt] = []
    for scene in scenes("test", len(MIXED)):
        content = [{"type": "image"}, {"type": "text", "text": scene.prompt("caption")}]
        chat = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        requests.append((text, scene.image()))
    expected = []
    for (text, image), (expression, scope) in zip(requests, MIXED, strict=True):
        inputs = dict(processor(images=image, text=text, return_tensors="pt"))
        profile = ProfileStore(folder).resolve(expression or "none")
        expected += generated_in_scope(model, inputs, [profile], [scope or "all"], NEW_TOKENS)
    for options in [{"max_num_batched_tokens": 64}, {"enforce_eager": False}][: 1 if V2 else 2]:
        with engine(embedded, folder, **options) as llm:
            assert answers(llm, requests, MIXED) == expected


# The prefix cache ---------------------------------------------------------------------------------

FIRST = words(BLOCK + 8)
ANSWER = 2 * BLOCK  # tokens
NEXT = words(5, seed=6)  # what is said after the first answer


@pytest.fixture(scope="module")
def one_engine(llama: Path, profiles: Path, alone: Alone) -> Iterator[Any]:  # noqa: ARG001 -- before the engine
    with engine(llama, profiles, block_size=BLOCK) as llm:
        yield llm


@pytest.fixture
def llm(one_engine: Any) -> Any:
    """An engine whose prefix cache is empty."""
    assert one_engine.reset_prefix_cache()
    return one_engine


def ask(
    llm: Any, prompt: list[int], expression: str | None, scope: str | None, **options: Any
) -> tuple[list[int], int]:
    """The answer, and the number of the prompt's tokens that were in the cache."""
    (output,) = llm.generate([request(prompt)], sampling(expression, scope, **options), use_tqdm=False)
    return list(output.outputs[0].token_ids), output.num_cached_tokens


@pytest.mark.both_runners(everyday=True)
@pytest.mark.parametrize(("scope", "cached"), [("all", 3 * BLOCK), ("prompt", BLOCK), ("generated", BLOCK)])
def test_a_second_turn_reuses_the_first_ones_prompt_but_not_its_answer(
    llm: Any, alone: Alone, scope: str, cached: int
) -> None:
    """The first answer's tokens are a part of the second prompt, and its cache is of tokens that were generated."""
    first, _ = ask(llm, FIRST, "vqa", scope, max_tokens=ANSWER)
    assert first == alone(FIRST, "vqa", scope, ANSWER)
    second = FIRST + first + NEXT
    assert ask(llm, second, "vqa", scope) == (alone(second, "vqa", scope), cached)
    assert ask(llm, FIRST, "vqa", scope, max_tokens=ANSWER) == (first, BLOCK)


def test_without_the_keys_of_blocks_a_second_turn_is_wrong(
    llm: Any, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hones_serving.vllm.front.block_keys", lambda _request, _end: ())
    first, _ = ask(llm, FIRST, "vqa", "generated", max_tokens=ANSWER)
    second = FIRST + first + NEXT
    tokens, cached = ask(llm, second, "vqa", "generated")
    assert cached == 3 * BLOCK
    assert tokens != alone(second, "vqa", "generated")


@pytest.mark.both_runners
def test_a_prompt_is_shared_by_all_who_would_compute_the_same(llm: Any, alone: Alone) -> None:
    """Asks for answers to one prompt, of as many blocks as the prompt, under each kind of steering in turn."""
    prompt = words(2 * BLOCK, seed=7) + NEXT
    named = (
        (None, None),
        ("vqa", "generated"),
        ("ocr", "generated"),
        ("vqa", "all"),
        ("vqa", "prompt"),
        ("ocr", "prompt"),
    )
    for (expression, scope), cached in zip(named, (0, 2 * BLOCK, 2 * BLOCK, 0, 2 * BLOCK, 0), strict=True):
        found = ask(llm, prompt, expression, scope, max_tokens=ANSWER)
        assert found == (alone(prompt, expression, scope, ANSWER), cached), (expression, scope)


@pytest.mark.both_runners
def test_an_answer_that_nobody_steered_is_a_prompt_that_nobody_steers(llm: Any, alone: Alone) -> None:
    first, _ = ask(llm, FIRST, None, None, max_tokens=ANSWER)
    second = FIRST + first + NEXT
    assert ask(llm, second, "vqa", "generated") == (alone(second, "vqa", "generated"), 3 * BLOCK)
    assert ask(llm, second, "vqa", "prompt") == (alone(second, "vqa", "prompt"), 0)
    assert ask(llm, second + NEXT, "vqa", "all")[1] == 3 * BLOCK  # which the prompt before was steered by, too


def test_one_tokens_difference_in_where_the_prompt_ends(llm: Any, alone: Alone) -> None:
    """The second prompt is the first with the answer's first token: all later tokens are the same, and generated."""
    first, _ = ask(llm, FIRST, "vqa", "generated", max_tokens=ANSWER)
    second = FIRST + first[:1]
    assert ask(llm, second, "vqa", "generated", max_tokens=ANSWER)[0] == alone(second, "vqa", "generated", ANSWER)


def test_several_answers_to_one_prompt(llm: Any, alone: Alone) -> None:
    """Draws two from the likeliest token alone; the second finds the first's prompt."""
    for scope in ("prompt", "generated"):
        drawn = sampling("vqa", scope, temperature=1, top_k=1, n=2)
        (output,) = llm.generate([request(FIRST)], drawn, use_tqdm=False)
        assert [list(answer.token_ids) for answer in output.outputs] == [alone(FIRST, "vqa", scope)] * 2


# Refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "scope", "message"),
    [
        ("vqa", "answer", "the scope is 'answer'; give 'all', 'prompt' or 'generated'"),
        ("vqa", 1, "the scope is 1; give"),
        (None, "prompt", "hones_scope is 'prompt', but nothing steers this request; name 'hones_task'"),
    ],
)
def test_what_means_nothing(llm: Any, expression: str | None, scope: Any, message: str) -> None:
    with pytest.raises(RoutingError, match=message):
        ask(llm, FIRST, expression, scope)


def test_a_connector_that_finds_blocks_by_salt(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hones_serving.vllm import connectors
    from vllm.config import KVTransferConfig

    inner = {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both"}
    transfer = KVTransferConfig(
        kv_connector="MultiConnector", kv_role="kv_both", kv_connector_extra_config={"connectors": [inner]}
    )
    assert connectors.by_salt(None) is None
    front = llm.llm_engine.input_processor.hones_front
    monkeypatch.setattr(front, "_by_salt", connectors.by_salt(transfer))
    with pytest.raises(RoutingError, match="LMCacheMPConnector finds blocks by a salt"):
        ask(llm, FIRST, "vqa", "prompt")
    assert ask(llm, FIRST, "vqa", "all")[1] == 0
    assert ask(llm, FIRST, "none", "prompt")[1] == 0
