"""Caches of engines, which never serve another steering: blocks of the prefix cache, and compiled code."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hones_offline.data.scenes import scenes
from serving.engines import fresh_cache
from serving.steered import (
    MIXED,
    Reference,
    answers,
    changed,
    engine,
    generate,
    prompts,
    request,
    sampling,
    tokens_of,
    words,
    write_profiles,
)
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from hones_steer import save_profile

BLOCK = 32
PROMPT = words(3 * BLOCK + 4)
SEQUENCE = (None, "vqa", "ocr", "vqa", "none")


@pytest.fixture(scope="module")
def profiles(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the usual profiles, and of `twin` with the contents of `vqa`."""
    folder = tmp_path_factory.mktemp("llama_profiles") / "profiles"
    vqa = write_profiles(AutoModelForCausalLM.from_pretrained(llama), folder)["vqa"]
    save_profile(dataclasses.replace(vqa, task="twin", description="another text"), folder / "twin.safetensors")
    return folder


@pytest.mark.both_runners
def test_the_same_image_under_several_tasks(embedded: Path, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(embedded)
    model = AutoModelForImageTextToText.from_pretrained(embedded)
    write_profiles(model, tmp_path / "profiles", fraction=0.9)
    (scene,) = scenes("test", 1)
    content = [{"type": "image"}, {"type": "text", "text": 4 * scene.prompt("caption")}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    prompt = (text, scene.image())
    reference = Reference(model, tmp_path / "profiles", processor)
    expected = reference.answers([prompt] * len(SEQUENCE), SEQUENCE)
    assert len({*map(tuple, expected)}) == 3
    with engine(embedded, tmp_path / "profiles", block_size=BLOCK) as llm:
        outputs = [generate(llm, [prompt], [expression])[0] for expression in SEQUENCE]
    assert tokens_of(outputs) == expected
    assert [output.num_cached_tokens > 0 for output in outputs] == [False, False, False, True, True]


def test_compiled_code_is_not_shared_with_an_engine_without_hones(llama: Path, profiles: Path, tmp_path: Path) -> None:
    """Runs the compiler that production runs, with its cache on disk.

    On a CPU vLLM stores compiled code, fails to load it and compiles again, so tokens alone would not show a mix-up:
    the test counts the stored folders as well.
    """
    batch = prompts(len(MIXED))
    reference = Reference(AutoModelForCausalLM.from_pretrained(llama), profiles)
    unsteered = reference.answers(batch, [None] * len(MIXED))
    steered = reference.answers(batch, MIXED)
    assert changed(steered, unsteered, MIXED) >= 0.8
    reference.steering.detach()
    env = {"VLLM_CPU_CI_ENV": "0", "VLLM_CACHE_ROOT": fresh_cache(tmp_path)}
    stored = tmp_path / "torch_compile_cache" / "torch_aot_compile"  # one folder per key
    with engine(llama, None, env, enforce_eager=False) as llm:
        assert answers(llm, batch, [None] * len(MIXED)) == unsteered
    assert len(list(stored.iterdir())) == 1
    with engine(llama, profiles, env, enforce_eager=False) as llm:
        assert answers(llm, batch, MIXED) == steered
    assert len(list(stored.iterdir())) == 2


# The prefix cache of one engine -------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(llama: Path, profiles: Path) -> Reference:
    return Reference(AutoModelForCausalLM.from_pretrained(llama), profiles)


@pytest.fixture(scope="module")
def one_engine(
    llama: Path,
    profiles: Path,
    reference: Reference,  # noqa: ARG001 -- attached before the engine starts
) -> Iterator[Any]:
    with engine(llama, profiles, block_size=BLOCK) as llm:
        yield llm


@pytest.fixture
def llm(one_engine: Any) -> Any:
    """An engine whose prefix cache is empty."""
    assert one_engine.reset_prefix_cache()
    return one_engine


def ask(llm: Any, expression: str | None, **salt: str) -> tuple[list[int], int]:
    """The answer to PROMPT, and the number of the prompt's tokens that were in the cache."""
    (output,) = llm.generate([request(PROMPT, **salt)], sampling(expression), use_tqdm=False)
    return list(output.outputs[0].token_ids), output.num_cached_tokens


@pytest.mark.both_runners(everyday=True)
def test_across_tasks(llm: Any, reference: Reference) -> None:
    check_across_tasks(llm, reference)


# vLLM's client leaves its ZeroMQ context to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.matrix
@pytest.mark.both_runners
def test_across_tasks_in_a_pipeline(llama: Path, profiles: Path, reference: Reference) -> None:
    with engine(llama, profiles, block_size=BLOCK, pipeline_parallel_size=2) as llm:
        check_across_tasks(llm, reference)


def check_across_tasks(llm: Any, reference: Reference) -> None:
    expected = reference.answers([PROMPT] * len(SEQUENCE), SEQUENCE)
    assert len({*map(tuple, expected)}) == 3
    outputs = [ask(llm, expression) for expression in SEQUENCE]
    assert [tokens for tokens, _ in outputs] == expected
    assert [cached for _, cached in outputs] == [0, 0, 0, 3 * BLOCK, 3 * BLOCK]


def test_without_the_salt_answers_are_wrong(llm: Any, reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hones_serving.vllm.front.salted", lambda profile, salt: salt)  # noqa: ARG005
    outputs = [ask(llm, expression) for expression in SEQUENCE]
    assert outputs[1][1] == 3 * BLOCK
    assert [tokens for tokens, _ in outputs] != reference.answers([PROMPT] * len(SEQUENCE), SEQUENCE)


def test_a_users_own_salt_separates_what_it_separated_before(llm: Any, reference: Reference) -> None:
    expected = reference.tokens(PROMPT, "vqa")
    for salt, cached in (({}, 0), ({"cache_salt": "a"}, 0), ({"cache_salt": "b"}, 0), ({"cache_salt": "a"}, 3 * BLOCK)):
        assert ask(llm, "vqa", **salt) == (expected, cached)
    assert ask(llm, None, cache_salt="a") == (reference.tokens(PROMPT, None), 0)
    assert ask(llm, "none", cache_salt="a") == (reference.tokens(PROMPT, None), 3 * BLOCK)


def test_a_users_salt_cannot_pass_for_ours(llm: Any, reference: Reference) -> None:
    digest = llm.llm_engine.input_processor.hones_front.registry.profiles()[-1]["digest"]
    ask(llm, "vqa")
    ask(llm, "vqa", cache_salt="x")
    ask(llm, None, cache_salt="hones:y")
    for salt in (f"hones:{digest}", f"hones:{digest}:x", "hones:none:hones:y"):
        assert ask(llm, None, cache_salt=salt) == (reference.tokens(PROMPT, None), 0), salt


@pytest.mark.parametrize(
    ("first", "second"),
    [("vqa", "twin"), ("vqa@0.5+ocr", "ocr+twin@0.5"), ("vqa", "vqa@0.5+vqa@0.5"), (None, "vqa@0"), ("none", None)],
)
def test_equal_contents_share_their_blocks(
    llm: Any, reference: Reference, first: str | None, second: str | None
) -> None:
    expected = reference.tokens(PROMPT, first)
    assert ask(llm, first) == (expected, 0)
    assert ask(llm, second) == (expected, 3 * BLOCK)
