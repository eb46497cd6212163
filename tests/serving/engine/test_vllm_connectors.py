"""KV connectors that keep blocks outside the engine: what one steering has stored, no other finds."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hones_serving.settings import Settings
from hones_serving.vllm import compat
from serving.offloading import move_on_a_cpu
from serving.steered import MIXED, Reference, answers, engine, request, sampling, words
from transformers import AutoModelForCausalLM

from hones_steer.errors import StateError

BLOCK = 32
PROMPT = words(3 * BLOCK + 4)
SEQUENCE = (None, "vqa", "ocr", "vqa", "none")
SPACE = {"cpu_bytes_to_use": 1 << 25}
ANSWERS = {"offload_prompt_only": False}  # of OffloadingConnector: else no block that reaches into an answer is stored
CONNECTORS: dict[str, dict[str, Any]] = {
    name: {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": SPACE}
    for name in ("OffloadingConnector", "SimpleCPUOffloadConnector")
}
CONNECTORS["MultiConnector"] = {
    "kv_connector": "MultiConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"connectors": list(CONNECTORS.values())},
}


@pytest.fixture(scope="module")
def reference(llama: Path, profiles: Path) -> Reference:
    return Reference(AutoModelForCausalLM.from_pretrained(llama), profiles)


@pytest.fixture
def movers() -> Iterator[None]:
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    with pytest.MonkeyPatch.context() as patch:
        move_on_a_cpu(patch)
        yield
    ensure_kv_transfer_shutdown()  # an engine that did not start has left its connector to the next one


def ask(
    llm: Any, expression: str | None, prompt: list[int], scope: str | None = None, **options: Any
) -> tuple[list[int], int]:
    """The answer, and the number of the prompt's tokens that came from the store; the engine's cache is empty."""
    assert llm.reset_prefix_cache()
    (output,) = llm.generate([request(prompt)], sampling(expression, scope, **options), use_tqdm=False)
    return list(output.outputs[0].token_ids), output.num_cached_tokens


@pytest.mark.usefixtures("movers")
@pytest.mark.both_runners
@pytest.mark.parametrize(
    "name", ["OffloadingConnector", *(pytest.param(name, marks=pytest.mark.matrix) for name in [*CONNECTORS][1:])]
)
def test_across_tasks(name: str, llama: Path, profiles: Path, reference: Reference) -> None:
    """Shows as well that the test would see a wrong hit: without the salt there are some."""
    expected = reference.answers([PROMPT] * len(SEQUENCE), SEQUENCE)
    mixed = reference.answers([PROMPT] * len(MIXED), MIXED)
    other = words(3 * BLOCK + 4, seed=6)
    right = reference.answers([other] * len(SEQUENCE), SEQUENCE)
    assert len({*map(tuple, expected)}) == len({*map(tuple, right)}) == 3
    with engine(llama, profiles, block_size=BLOCK, kv_transfer_config=CONNECTORS[name]) as llm:
        outputs = [ask(llm, expression, PROMPT) for expression in SEQUENCE]
        assert [tokens for tokens, _ in outputs] == expected
        assert [cached for _, cached in outputs] == [0, 0, 0, 3 * BLOCK, 3 * BLOCK]
        for _ in range(2):
            assert llm.reset_prefix_cache()
            assert answers(llm, [PROMPT] * len(MIXED), MIXED) == mixed
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hones_serving.vllm.front.salted", lambda profile, salt: salt)  # noqa: ARG005
            outputs = [ask(llm, expression, other) for expression in SEQUENCE]
    assert outputs[1][1] == 3 * BLOCK
    assert [tokens for tokens, _ in outputs] != right


@pytest.mark.usefixtures("movers")
@pytest.mark.matrix
@pytest.mark.both_runners
@pytest.mark.parametrize("name", ["OffloadingConnector", "SimpleCPUOffloadConnector"])
def test_a_second_turn_finds_the_first_ones_prompt_but_not_an_answer_of_another_scope(
    name: str, llama: Path, profiles: Path, reference: Reference
) -> None:
    first = words(BLOCK + 8)
    connector = {**CONNECTORS[name], "kv_connector_extra_config": {**SPACE, **ANSWERS}}
    with engine(llama, profiles, block_size=BLOCK, kv_transfer_config=connector) as llm:
        for scope, cached in (("all", 3 * BLOCK), ("prompt", BLOCK), ("generated", BLOCK)):
            answer, _ = ask(llm, "vqa", first, scope, max_tokens=2 * BLOCK)
            assert answer == reference.tokens(first, "vqa", 2 * BLOCK, scope)
            second = first + answer + words(5, seed=6)
            assert ask(llm, "vqa", second, scope) == (reference.tokens(second, "vqa", scope=scope), cached), scope


# Refused ------------------------------------------------------------------------------------------


def transfer(name: str, module: str | None = None, **options: Any) -> Any:
    """VLLM's configuration of a connector."""
    from vllm.config import KVTransferConfig

    return KVTransferConfig(
        kv_connector=name, kv_role="kv_both", kv_connector_module_path=module, kv_connector_extra_config=options
    )


def within(*connectors: dict[str, Any]) -> Any:
    return transfer("MultiConnector", connectors=list(connectors))


EXAMPLE = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}


@pytest.fixture(scope="module")
def config(llama: Path) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(llama), dtype="float32", max_model_len=256).create_engine_config()


@pytest.mark.parametrize(
    ("connector", "message"),
    [
        (lambda: transfer("ExampleConnector"), r"ExampleConnector \(it finds blocks by their tokens alone"),
        (lambda: transfer("NixlConnector"), r"NixlConnector \(it takes over what another server has computed"),
        (lambda: transfer("HiSparseConnector"), r"HiSparseConnector \(hones-steer does not know by what"),
        (lambda: transfer("OffloadingConnector", "mine"), r"OffloadingConnector \(it is not vLLM's own"),
        (lambda: within(CONNECTORS["OffloadingConnector"], EXAMPLE), r"ExampleConnector \(it finds"),
        (lambda: within(CONNECTORS["MultiConnector"], EXAMPLE), r"ExampleConnector \(it finds"),
    ],
)
def test_connectors_refused_by_name(
    config: Any, profiles: Path, monkeypatch: pytest.MonkeyPatch, connector: Any, message: str
) -> None:
    monkeypatch.setattr(config, "kv_transfer_config", connector())
    with pytest.raises(StateError, match=f"does not support the KV connector {message}.*start vLLM without"):
        compat.refuse_unsupported(config, Settings(profiles, allow_untested=True))


@pytest.mark.parametrize(
    ("connector", "name"),
    [
        (lambda: transfer("MooncakeStoreConnector"), "the KV connector MooncakeStoreConnector"),
        (lambda: transfer("LMCacheMPConnector"), "the KV connector LMCacheMPConnector"),
        (lambda: transfer("OffloadingConnector", spec_name="Tiering"), "the offloading spec Tiering"),
        (lambda: transfer("SimpleCPUOffloadConnector", kv_offload_backend="disk"), "the offloading backend disk"),
    ],
)
def test_connectors_that_want_to_be_asked_for(
    config: Any, profiles: Path, monkeypatch: pytest.MonkeyPatch, connector: Any, name: str
) -> None:
    monkeypatch.setattr(config, "kv_transfer_config", connector())
    with pytest.raises(StateError, match=f"never run with {name}; start vLLM without, or"):
        compat.refuse_unsupported(config, Settings(profiles))
    compat.refuse_unsupported(config, Settings(profiles, allow_untested=True))


def test_every_connector_of_vllm_is_known_or_refused(config: Any, profiles: Path) -> None:
    """Goes through vLLM's own list: what is not certified is refused, unless it is asked for."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    started = set()
    for name in KVConnectorFactory._registry:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(config, "kv_transfer_config", transfer(name, connectors=[EXAMPLE]))
            try:
                compat.refuse_unsupported(config, Settings(profiles))
            except StateError:
                continue
            started.add(name)
    assert started == {"OffloadingConnector", "SimpleCPUOffloadConnector"}


def test_offloading_by_vllms_own_option(llama: Path, profiles: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    options = {"dtype": "float32", "max_model_len": 256, "kv_offloading_size": 1}
    config = EngineArgs(model=str(llama), **options).create_engine_config()
    assert config.kv_transfer_config.kv_connector == "OffloadingConnector"
    compat.refuse_unsupported(config, Settings(profiles))
