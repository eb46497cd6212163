"""Each token is scaled by its own request's profile: tables and slots by themselves, then in engines."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hones_serving.registry import CapacityError
from hones_serving.vllm import scaling
from hones_serving.vllm.layout import _projection
from hones_serving.vllm.scaling import SteeredInput, TokenSlots
from hypothesis import given, settings
from hypothesis import strategies as st
from serving.reference_slots import scale_tokens
from serving.steered import MIXED, Reference, answers, engine, prompts, sampling, words, write_profiles
from torch import nn
from transformers import AutoModelForCausalLM
from vllm.exceptions import VLLMValidationError

from hones_steer import ModelIdentity, Profile, RoutingError, save_profile
from hones_steer.errors import StateError
from hones_steer.ffns import DENSE, Ffn
from hones_steer.slots import ScaleTables
from serving import steered

# Tables and slots ---------------------------------------------------------------------------------

WIDTH, SLOTS, LAYERS, MAX_TOKENS = 12, 4, 2, 64
MODEL = ModelIdentity(
    name="", revision=None, model_type="llama", num_layers=LAYERS, intermediate_size=WIDTH, hidden_size=8, sketch=None
)
STEPS = st.lists(st.lists(st.tuples(st.integers(0, SLOTS), st.integers(1, 5)), min_size=1, max_size=12), max_size=6)


def small_profile(seed: int) -> Profile:
    """A profile with scales for a few neurons of layer 1 and none for layer 0."""
    generator = np.random.default_rng(seed)
    neurons = np.flatnonzero(generator.random(WIDTH) < 0.5).astype(np.int32)
    scales = generator.uniform(-2, 3, len(neurons)).astype(np.float32)
    return Profile(task="small", layers={1: (neurons, scales)}, base_model=MODEL)


PROFILES = {slot: small_profile(slot) for slot in range(1, SLOTS + 1)}


def tables_of(shard: slice | None = None) -> ScaleTables:
    place = torch.device("cpu"), shard or slice(0, WIDTH)
    tables = ScaleTables({Ffn(layer, DENSE): place for layer in range(LAYERS)}, SLOTS + 1)
    for slot, profile in PROFILES.items():
        tables.write(slot, profile)
    return tables


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [WIDTH, 7 * WIDTH, 2**22])
@settings(deadline=None, max_examples=60)
@given(steps=STEPS)
def test_step_after_step_each_token_gets_its_slot(
    eager: bool, dtype: torch.dtype, chunk: int, steps: list[list[tuple[int, int]]]
) -> None:
    """Tries steered and unsteered, longer and shorter steps, with one run of equally steered tokens, a few, or many."""
    tokens = TokenSlots(MAX_TOKENS, torch.device("cpu"))
    parts = [SteeredInput(table, tokens, eager=eager) for table in tables_of().tables.values()]
    assert 1 < scaling._FEW_RUNS < 12  # so steps have fewer runs than that, and more
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "_CHUNK", chunk)
        for step in steps:
            slots, counts = zip(*step, strict=True)
            tokens.write(slots, counts)
            each = np.repeat(slots, counts).tolist()
            z = torch.randn(len(each), WIDTH, generator=torch.Generator().manual_seed(len(each))).to(dtype)
            for layer, part in enumerate(parts):
                expected = scale_tokens(z, each, PROFILES, layer)
                assert torch.equal(part(z.clone()), expected)
                assert torch.equal(part(z.clone()[None]), expected[None])  # as transformers' code has it


def test_compiled_code_follows_the_slots_without_being_compiled_again() -> None:
    tokens = TokenSlots(MAX_TOKENS, torch.device("cpu"))
    part = SteeredInput(tables_of().tables[1, DENSE], tokens, eager=False)
    compiled = torch.compile(part, backend="eager", fullgraph=True)
    z = torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(0))
    tokens.write([1, 2], [5, 5])
    assert torch.equal(compiled(z), scale_tokens(z, [1] * 5 + [2] * 5, PROFILES, 1))
    with torch.compiler.set_stance("fail_on_recompile"):
        for slots in ([3, 0], [0, 0], [0, 4], [2, 2]):
            tokens.write(slots, [4, 6])
            each = [slots[0]] * 4 + [slots[1]] * 6
            assert torch.equal(compiled(z), scale_tokens(z, each, PROFILES, 1))


def test_shards_put_together_are_the_whole() -> None:
    """Compares the ranks' scaled halves with the whole, and checks that exchanged halves differ."""
    tokens = TokenSlots(MAX_TOKENS, torch.device("cpu"))
    slots = [0, 1, 2, 3, 4]
    tokens.write(slots, [1] * len(slots))
    z = torch.randn(len(slots), WIDTH, generator=torch.Generator().manual_seed(0))

    def sharded(shards: Sequence[slice]) -> torch.Tensor:
        parts = z.split(WIDTH // len(shards), dim=1)
        tables = [tables_of(shard).tables[1, DENSE] for shard in shards]
        pairs = zip(tables, parts, strict=True)
        return torch.cat([SteeredInput(table, tokens, eager=False)(part) for table, part in pairs], dim=1)

    ranks = [_projection(linear(rank)) for rank in (0, 1)]
    halves = [rank.shard for rank in ranks]
    assert [rank.width for rank in ranks] == [WIDTH, WIDTH]
    assert halves == [slice(0, WIDTH // 2), slice(WIDTH // 2, WIDTH)]
    assert torch.equal(sharded(halves), scale_tokens(z, slots, PROFILES, 1))
    assert not torch.equal(sharded(halves[::-1]), scale_tokens(z, slots, PROFILES, 1))


def linear(rank: int, *, parallel: bool = True) -> Any:
    """The attributes of a row-parallel down-projection of WIDTH neurons, on one of two ranks."""
    half = WIDTH // 2
    return SimpleNamespace(input_size=WIDTH, input_is_parallel=parallel, input_size_per_partition=half, tp_rank=rank)


def test_a_down_projection_that_splits_its_input_itself_is_given_all_neurons() -> None:
    whole = _projection(linear(1, parallel=False))
    assert (whole.width, whole.shard) == (WIDTH, slice(0, WIDTH))


def test_a_part_leaves_the_names_of_weights_alone_and_is_placed_once() -> None:
    """LoRA and the reloading of weights find them by name, and LoRA goes by the module's type as well."""
    module = nn.Linear(WIDTH, 8)
    tokens = TokenSlots(MAX_TOKENS, torch.device("cpu"))
    names, kept, z = dict(module.named_parameters()).keys(), module.state_dict().keys(), torch.randn(3, WIDTH)
    SteeredInput(tables_of().tables[1, DENSE], tokens, eager=False).place(module)
    assert type(module) is nn.Linear
    assert (dict(module.named_parameters()).keys(), module.state_dict().keys()) == (names, kept)
    tokens.write([2, 0, 1], [1, 1, 1])
    expected = nn.functional.linear(scale_tokens(z, [2, 0, 1], PROFILES, 1), module.weight, module.bias)
    assert torch.equal(module(z), expected)
    with pytest.raises(StateError, match="is steered already; start vLLM anew"):
        SteeredInput(tables_of().tables[1, DENSE], tokens, eager=False).place(module)


# In an engine -------------------------------------------------------------------------------------

PROMPTS = prompts(len(MIXED))


@pytest.fixture(scope="module")
def profiles(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the usual profiles, with other contents for `vqa` in new/."""
    folder = tmp_path_factory.mktemp("llama_profiles") / "profiles"
    written = write_profiles(AutoModelForCausalLM.from_pretrained(llama), folder)
    (folder / "new").mkdir()
    save_profile(dataclasses.replace(written["ocr"] * -1, task="vqa"), folder / "new" / "vqa.safetensors")
    return folder


@pytest.fixture(scope="module")
def reference(llama: Path, profiles: Path) -> Reference:
    """Transformers' answers; the new contents of `vqa` are the task `new`."""
    reference = Reference(AutoModelForCausalLM.from_pretrained(llama), profiles)
    reference.steering.load("new", profiles / "new" / "vqa.safetensors")
    return reference


class ByHand:
    """An engine whose steps the test makes one by one."""

    def __init__(self, llm: Any) -> None:
        self._engine = llm.llm_engine
        self.registry = llm.llm_engine.input_processor.hones_front.registry
        self.scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self.tokens: dict[str, list[int]] = {}

    def add(self, name: str, prompt: list[int], expression: str | None) -> str:
        """Queue a request; returns the id by which it can be aborted."""
        internal: str = self._engine.add_request(name, steered.request(prompt), sampling(expression))
        return internal

    def step(self) -> None:
        for output in self._engine.step():
            self.tokens[output.request_id] = list(output.outputs[0].token_ids)

    def finish(self) -> None:
        while self._engine.has_unfinished_requests():
            self.step()

    def abort(self, internal: str) -> None:
        self._engine.abort_request([internal], internal=True)

    def states(self) -> tuple[int, int]:
        """Numbers of requests that run and that wait."""
        return len(self.scheduler.running), len(self.scheduler.waiting)


@pytest.fixture(scope="class")
def llm(
    request: pytest.FixtureRequest,
    llama: Path,
    profiles: Path,
    reference: Reference,  # noqa: ARG001 -- attached before the engine starts
) -> Iterator[Any]:
    """One engine for the tests of a class, with its OPTIONS and ENV."""
    with engine(llama, profiles, request.cls.ENV, **request.cls.OPTIONS) as llm:
        yield llm


@pytest.fixture
def by_hand(llm: Any) -> Iterator[ByHand]:
    """The engine, step by step; afterwards no profile is in use, and the folder's profiles are loaded again."""
    by_hand = ByHand(llm)
    yield by_hand
    by_hand.finish()
    assert by_hand.registry.slots_used() == 0
    by_hand.registry.load("vqa", "vqa.safetensors")


class TestWithASlotForEachRequest:
    OPTIONS: ClassVar[dict[str, Any]] = {"max_num_seqs": 4}
    ENV: ClassVar[dict[str, str]] = {}

    def test_many_more_profiles_queued_than_there_are_slots(self, llm: Any, reference: Reference) -> None:
        expressions = [f"vqa@{i / 8:.3f}" for i in range(-20, 21)]
        batch = prompts(len(expressions))
        expected = reference.answers(batch, expressions)
        assert answers(llm, batch, expressions) == expected
        assert answers(llm, batch[::-1], expressions[::-1]) == expected[::-1]

    @pytest.mark.both_runners
    def test_swapped_slots_are_noticed(self, llm: Any, reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = reference.answers(PROMPTS, MIXED)
        assert answers(llm, PROMPTS, MIXED) == expected
        write = TokenSlots.write
        monkeypatch.setattr(
            TokenSlots, "write", lambda self, slots, counts: write(self, [*slots[1:], slots[0]], counts)
        )
        wrong = answers(llm, PROMPTS, MIXED)
        assert sum(a != b for a, b in zip(wrong, expected, strict=True)) >= 4

    @pytest.mark.both_runners
    def test_replaced_while_queued(self, by_hand: ByHand, reference: Reference) -> None:
        """A request that waits or runs keeps the contents it came with; one that comes afterwards has the new ones."""
        for i in range(4):
            by_hand.add(f"running {i}", PROMPTS[i], "vqa")
        by_hand.add("waiting", PROMPTS[4], "vqa")
        by_hand.step()
        assert by_hand.states() == (4, 1)
        by_hand.registry.load("vqa", "new/vqa.safetensors")
        by_hand.add("new", PROMPTS[5], "vqa")
        assert by_hand.states() == (4, 2)
        assert by_hand.registry.slots_used() == 2
        by_hand.finish()
        old = [by_hand.tokens[f"running {i}"] for i in range(4)] + [by_hand.tokens["waiting"]]
        assert old == [reference.tokens(PROMPTS[i], "vqa") for i in range(5)]
        assert by_hand.tokens["new"] == reference.tokens(PROMPTS[5], "new") != reference.tokens(PROMPTS[5], "vqa")

    def test_unloaded_while_running(self, by_hand: ByHand, reference: Reference) -> None:
        by_hand.add("running", PROMPTS[0], "vqa")
        by_hand.add("beside it", PROMPTS[1], "ocr")
        for _ in range(3):
            by_hand.step()
        by_hand.registry.unload("vqa")
        with pytest.raises(RoutingError, match="no profile for the task 'vqa'; known tasks: cap, ocr"):
            by_hand.add("late", PROMPTS[2], "vqa")
        by_hand.finish()
        assert by_hand.tokens["running"] == reference.tokens(PROMPTS[0], "vqa")
        assert by_hand.tokens["beside it"] == reference.tokens(PROMPTS[1], "ocr")

    @pytest.mark.both_runners
    def test_aborted_requests_leave_their_slots(self, by_hand: ByHand, reference: Reference) -> None:
        aborted = [by_hand.add(f"aborted {i}", PROMPTS[i], f"vqa@{i + 2}") for i in range(4)]
        waiting = by_hand.add("waiting", PROMPTS[4], "ocr")
        by_hand.add("stays", PROMPTS[5], "cap")
        by_hand.step()
        by_hand.step()
        assert by_hand.registry.slots_used() == 6
        for internal in [*aborted, waiting]:
            by_hand.abort(internal)
        assert by_hand.registry.slots_used() == 1
        by_hand.add("again", PROMPTS[0], "vqa@2")
        by_hand.finish()
        assert by_hand.tokens["stays"] == reference.tokens(PROMPTS[5], "cap")
        assert by_hand.tokens["again"] == reference.tokens(PROMPTS[0], "vqa@2")
        assert "waiting" not in by_hand.tokens

    @pytest.mark.both_runners
    def test_a_worker_forgets_what_has_finished(self, by_hand: ByHand, llm: Any) -> None:
        """The worker keeps a request's profile as long as the request, and forgets it one step later."""
        driver = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        by_hand.add("steered", PROMPTS[0], "vqa")
        by_hand.step()
        assert len(driver.hones_steering._profiles) == 1
        by_hand.finish()
        by_hand.add("unsteered", PROMPTS[0], None)
        by_hand.finish()
        assert driver.hones_steering._profiles == {}


class TestWithFewerSlotsThanRequests:
    OPTIONS: ClassVar[dict[str, Any]] = {}
    ENV: ClassVar[dict[str, str]] = {"HONES_MAX_PROFILES": "2"}

    def test_one_profile_too_many_is_refused_and_nothing_stays_behind(self, llm: Any, reference: Reference) -> None:
        registry = ByHand(llm).registry
        with pytest.raises(CapacityError, match="2 other profiles are in use"):
            answers(llm, PROMPTS[:4], ["vqa", None, "ocr", "cap"])
        assert registry.slots_used() == 0
        assert not llm.llm_engine.has_unfinished_requests()
        for pair in (["vqa", "ocr"], ["cap", "vqa"], ["ocr", "vqa@0.5+cap"]):
            assert answers(llm, PROMPTS[:2], pair) == reference.answers(PROMPTS[:2], pair)
        assert registry.slots_used() == 0

    def test_any_number_of_requests_share_the_slots(self, llm: Any, reference: Reference) -> None:
        batch = prompts(20)
        expressions = [("vqa", "ocr", None)[i % 3] for i in range(20)]
        assert answers(llm, batch, expressions) == reference.answers(batch, expressions)

    def test_a_slot_is_free_once_its_last_request_is_aborted(self, llm: Any, reference: Reference) -> None:
        by_hand = ByHand(llm)
        first, second = (by_hand.add(f"vqa {i}", PROMPTS[i], "vqa") for i in range(2))
        by_hand.add("ocr", PROMPTS[2], "ocr")
        by_hand.step()
        by_hand.abort(first)
        with pytest.raises(CapacityError):
            by_hand.add("cap", PROMPTS[3], "cap")
        by_hand.abort(second)
        by_hand.add("cap", PROMPTS[3], "cap")
        by_hand.finish()
        assert by_hand.tokens["ocr"] == reference.tokens(PROMPTS[2], "ocr")
        assert by_hand.tokens["cap"] == reference.tokens(PROMPTS[3], "cap")
        assert by_hand.registry.slots_used() == 0

    def test_refused_requests_leave_no_trace(self, llm: Any) -> None:
        """A request that vLLM itself refuses, after the front has resolved its profile, holds no slot."""
        with pytest.raises(VLLMValidationError, match="maximum context length"):
            answers(llm, [words(500)], ["vqa"])
        assert ByHand(llm).registry.slots_used() == 0
