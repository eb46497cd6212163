"""Mixtures of experts in vLLM, each request of a mixed batch steered to the tokens of transformers.

vLLM's experts for CPUs are one kernel, which cannot be steered: those of `experts_on_cpu` run in its place.
"""

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import httpx
import numpy as np
import pytest
import torch
from hones_serving.expert_room import RoomError
from hones_serving.settings import Settings
from hones_serving.vllm import compat, experts, scaling
from hones_serving.vllm.experts import Experts, MixtureTables
from hones_serving.vllm.scaling import SteeredExperts, TokenSlots
from hypothesis import given, settings
from hypothesis import strategies as st
from serving.engines import ENVIRONMENT, V2, server
from serving.experts_on_cpu import PLUGIN, registered, write_plugin
from serving.reference_slots import scale_choices
from serving.steered import (
    MIXED,
    NEW_TOKENS,
    Case,
    Reference,
    answers,
    answers_alone,
    case_of,
    check_lora,
    engine,
    generate,
    logprobs_of,
    prompts,
    tokens_of,
)
from torch import nn
from transformers import AutoModelForCausalLM
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from hones_steer import LayoutError, MismatchError, ModelIdentity, Profile, StateError, save_profile
from hones_steer.ffns import DENSE, Ffn, FfnRun
from hones_steer.slots import SlotPool
from serving import checkpoints

# Tables and rows ----------------------------------------------------------------------------------

COUNT, WIDTH, SLOTS, TABLES, CHOICES, MAX_TOKENS = 4, 6, 3, 3, 2, 32
LAYERS = (1, 2)  # that have experts; layer 0 is dense
MODEL = ModelIdentity(
    name="",
    revision=None,
    model_type="qwen3_moe",
    num_layers=3,
    intermediate_size=None,
    hidden_size=8,
    sketch=None,
    ffns=(FfnRun(0, 1, dense=12), FfnRun(1, 3, experts=COUNT, expert_width=WIDTH)),
)
ALL = slice(0, WIDTH)


def of_experts(seed: int, *experts: tuple[int, int]) -> Profile:
    """A profile of some neurons of layer 0 and of each of these experts, (layer, number)."""
    generator = np.random.default_rng(seed)
    layers: dict[Any, Any] = {}
    for ffn, width in [((0, "dense"), 12), *((expert, WIDTH) for expert in experts)]:
        neurons = np.sort(generator.choice(width, 3, replace=False)).astype(np.int32)
        layers[ffn] = neurons, generator.uniform(-2, 3, 3).astype(np.float32)
    return Profile(task="small", layers=layers, base_model=MODEL)


# Together they list more experts than there are tables, most pairs of them do not.
PROFILES = [
    None,
    of_experts(1, (1, 0)),
    of_experts(2, (1, 0), (2, 3)),
    of_experts(3, (2, 1)),
    of_experts(4, (1, 2), (1, 3), (2, 0)),
    of_experts(5, (2, 3), (2, 1)),
]
STEPS = st.lists(
    st.lists(st.tuples(st.integers(0, len(PROFILES) - 1), st.integers(1, 4)), min_size=1, max_size=6), max_size=8
)


class TritonExperts:
    """Stands for vLLM's kernel of this name: `activation` between two products, which are not needed here."""

    moe_config = SimpleNamespace(activation=MoEActivation.SILU)
    quant_config = SimpleNamespace(use_fp8_w8a8=False)
    block_shape: list[int] | None = None

    def activation(self, _: Any, output: torch.Tensor, given: torch.Tensor) -> None:
        output.copy_(given)


class Layer(nn.Module):
    """Stands for vLLM's RoutedExperts: hands activations to its kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.quant_method = SimpleNamespace(moe_kernel=SimpleNamespace(fused_experts=TritonExperts()))

    def forward_modular(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        output = torch.empty_like(x)
        self.quant_method.moe_kernel.fused_experts.activation(None, output, x)
        return output


def layers_of(shard: slice = ALL, local: Sequence[int] = range(COUNT)) -> dict[int, Experts]:
    return {layer: Experts(f"layer {layer}", Layer(), COUNT, WIDTH, shard, tuple(local)) for layer in LAYERS}


def tables_for(layers: dict[int, Experts], tables: int = TABLES) -> MixtureTables:
    return MixtureTables({Ffn(0, DENSE): (torch.device("cpu"), slice(0, 12))}, SLOTS + 1, layers, tables)


def place(layers: dict[int, Experts], tables: MixtureTables, *, eager: bool) -> TokenSlots:
    tokens = TokenSlots(MAX_TOKENS, torch.device("cpu"))
    for layer, of_layer in layers.items():
        SteeredExperts(of_layer, layer, tables, tokens, eager=eager).place(of_layer)
    return tokens


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 7 * WIDTH, 2**22])
@settings(deadline=None, max_examples=40)
@given(steps=STEPS)
def test_step_after_step_each_row_gets_its_tokens_slot_and_its_expert(
    eager: bool, dtype: torch.dtype, chunk: int, steps: list[list[tuple[int, int]]]
) -> None:
    """Tries profiles that come and go, over slots and tables of which there are fewer than profiles and experts."""
    layers = layers_of()
    tables = tables_for(layers)
    tokens = place(layers, tables, eager=eager)
    pool = SlotPool(tables, SLOTS)
    generator = torch.Generator().manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "_CHUNK", chunk)
        for step in steps:
            chosen, counts = [PROFILES[i] for i, _ in step], [count for _, count in step]
            wanted = {profile.digest: profile for profile in chosen if profile is not None}
            if len(wanted) > SLOTS:
                continue
            if len(tables.room.listed(wanted.values())) > TABLES:
                with pytest.raises(StateError, match=r"experts are steered at once.*--max-expert-tables"):
                    tables.require(wanted.values())
                continue
            tables.require(wanted.values())
            slots = pool.acquire(chosen)
            pool.release(chosen)
            tokens.write(slots, counts)
            each = np.repeat(slots, counts).tolist()
            of_slots = {slot: profile for slot, profile in zip(slots, chosen, strict=True) if profile is not None}
            choices = torch.randint(0, COUNT, (len(each), CHOICES), generator=generator, dtype=torch.int32)
            z = torch.randn(len(each) * CHOICES, WIDTH, generator=generator).to(dtype)
            for layer, of_layer in layers.items():
                scaled = of_layer.module.forward_modular(z, topk_weights=None, topk_ids=choices)
                assert torch.equal(scaled, scale_choices(z, choices, each, of_slots, layer))


def test_shards_of_neurons_and_of_experts() -> None:
    """Puts two tensor-parallel ranks together, then two ranks that have half of the experts each."""
    profile = PROFILES[4]
    assert profile is not None
    choices = torch.tensor([[0, 2], [3, 1], [2, 3]])
    z = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0))
    expected = scale_choices(z, choices, [1, 0, 1], {1: profile}, 1)

    def scaled(part: torch.Tensor, shard: slice, local: Sequence[int]) -> torch.Tensor:
        layers = layers_of(shard, local)
        tables = tables_for(layers)
        tokens = place(layers, tables, eager=False)
        tables.require([profile])
        tables.write(1, profile)
        tokens.write([1, 0, 1], [1, 1, 1])
        result: torch.Tensor = layers[1].module.forward_modular(part, topk_weights=None, topk_ids=choices)
        return result

    halves = slice(0, 3), slice(3, 6)
    assert torch.equal(torch.cat([scaled(z[:, of], of, range(COUNT)) for of in halves], dim=1), expected)
    low = (choices < 2).reshape(-1, 1)  # on a rank, rows of the other's experts are never read
    assert torch.equal(torch.where(low, scaled(z, ALL, [0, 1]), scaled(z, ALL, [2, 3])), expected)
    assert not torch.equal(expected, z)


def test_compiled_each_row_gets_what_is_written_later() -> None:
    """Compiles one graph, which no change of profiles makes anew."""
    layers = layers_of()
    tables = tables_for(layers)
    tokens = place(layers, tables, eager=False)
    generator = torch.Generator().manual_seed(0)
    torch.compiler.reset()
    compiled = torch.compile(layers[1].module.forward_modular, fullgraph=True, backend="eager")
    for step, (profile, slots) in enumerate(zip(PROFILES[1:], ([1, 0, 1], [0, 2, 2], [3, 1, 0]), strict=False)):
        assert profile is not None
        tables.require([profile])
        for slot in set(slots) - {0}:
            tables.write(slot, profile)
        tokens.write(slots, [1, 2, 1])
        each = np.repeat(slots, [1, 2, 1]).tolist()
        choices = torch.randint(0, COUNT, (len(each), CHOICES), generator=generator)
        z = torch.randn(len(each) * CHOICES, WIDTH, generator=generator)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            scaled = compiled(z, topk_weights=None, topk_ids=choices)
        assert torch.equal(scaled, scale_choices(z, choices, each, dict.fromkeys(set(slots) - {0}, profile), 1))
    torch.compiler.reset()


def test_padded_neurons_are_left_alone() -> None:
    layers = layers_of()
    tables = tables_for(layers)
    tokens = place(layers, tables, eager=False)
    profile = PROFILES[1]
    assert profile is not None
    tables.require([profile])
    tables.write(1, profile)
    tokens.write([1], [1])
    z = torch.randn(2, WIDTH + 2, generator=torch.Generator().manual_seed(0))
    choices = torch.tensor([[0, 1]])
    scaled = layers[1].module.forward_modular(z, topk_weights=None, topk_ids=choices)
    assert torch.equal(scaled[:, :WIDTH], scale_choices(z[:, :WIDTH], choices, [1], {1: profile}, 1))
    assert torch.equal(scaled[:, WIDTH:], z[:, WIDTH:])


def test_nothing_is_allocated_for_experts_once_the_tables_are_there() -> None:
    tables = tables_for(layers_of())
    places = tables.rows.data_ptr(), tables.numbers.data_ptr()
    for slot, profile in enumerate(filter(None, PROFILES[:4]), start=1):
        tables.require([profile])
        tables.write(slot, profile)
    assert (tables.rows.data_ptr(), tables.numbers.data_ptr()) == places
    assert tables.num_bytes == 4 * (SLOTS + 1) * (TABLES + 1) * WIDTH + 8 * len(LAYERS) * COUNT


def test_another_kernel_in_the_place_of_the_steered_one_is_noticed() -> None:
    layers = layers_of()
    tokens = place(layers, tables_for(layers), eager=True)
    tokens.write([0], [1])
    layers[1].module.quant_method.moe_kernel.fused_experts = TritonExperts()
    with pytest.raises(StateError, match="layer 1: vLLM ran its experts without the part that steers them"):
        layers[1].module.forward_modular(torch.zeros(2, WIDTH), topk_weights=None, topk_ids=torch.tensor([[0, 1]]))


def test_rows_in_another_order_are_noticed() -> None:
    layers = layers_of()
    place(layers, tables_for(layers), eager=True)
    with pytest.raises(StateError, match="layer 1: vLLM computes its experts in an order that is not known"):
        layers[1].module.forward_modular(torch.zeros(8, WIDTH), topk_weights=None, topk_ids=torch.tensor([[0, 1]]))


def test_a_layer_is_steered_once() -> None:
    layers = layers_of()
    place(layers, tables_for(layers), eager=True)
    with pytest.raises(StateError, match="is steered already; start vLLM anew"):
        place(layers, tables_for(layers), eager=True)


def test_experts_of_several_widths_are_refused() -> None:
    layers = layers_of()
    layers[2] = dataclasses.replace(layers[2], width=WIDTH + 1)
    with pytest.raises(LayoutError, match="layer 2 has 4 experts of 7 neurons and layer 1 4 of 6"):
        tables_for(layers)


# In an engine -------------------------------------------------------------------------------------

PROMPTS = prompts(len(MIXED), longest=30)
TOKENS = {"max_num_batched_tokens": 64}  # of a step
MODES: dict[str, dict[str, Any]] = {
    "chunked prefill": {"max_num_batched_tokens": 8},
    "compiled": {"enforce_eager": False},
    "tensor parallel": {"tensor_parallel_size": 2},
    "expert parallel": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    "pipeline": {"pipeline_parallel_size": 2, "max_num_batched_tokens": 8},
}


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Case of a mixture by its `model_type`, of a Qwen3-MoE if none is named."""
    model_type = getattr(request, "param", "qwen3_moe")
    folder = checkpoints.text_model(tmp_path_factory.mktemp(model_type), model_type)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return case_of(folder, model, PROMPTS)


@contextmanager
def mixture(
    case: Case, folder: Path, profiles: Path | None, env: dict[str, str] | None = None, **options: Any
) -> Iterator[Any]:
    """An engine whose experts are those of `experts_on_cpu`, for which `folder` is needed; the rest is `engine`'s."""
    env = {**(env or {}), "VLLM_PLUGINS": f"hones,{PLUGIN}" if profiles else PLUGIN}
    with registered(folder), engine(case.folder, profiles, env, **{**TOKENS, **options}) as llm:
        yield llm


@pytest.mark.parametrize("case", checkpoints.MIXTURES, indirect=True, scope="module")
def test_each_request_of_a_mixed_batch_is_right(case: Case, tmp_path: Path) -> None:
    unsteered = [None] * len(MIXED)
    with mixture(case, tmp_path / "without", None) as llm:
        without = generate(llm, PROMPTS, unsteered, logprobs=5)
    with mixture(case, tmp_path / "with", case.profiles) as llm:
        idle = generate(llm, PROMPTS, unsteered, logprobs=5)
        mixed = generate(llm, PROMPTS, MIXED, logprobs=5)
        alone = answers_alone(llm, PROMPTS, MIXED)
    assert tokens_of(mixed) == alone == case.expected
    assert logprobs_of(idle) == logprobs_of(without)
    for row, expression in enumerate(MIXED):
        same = logprobs_of(mixed)[row] == logprobs_of(without)[row]
        assert same == (expression in (None, "none")), expression


only_v2 = pytest.mark.skipif(not V2, reason="with the V1 runner more is tested; with V2 that would take too long")


@pytest.mark.both_runners
@only_v2
@pytest.mark.parametrize("case", checkpoints.MIXTURES, indirect=True, scope="module")
def test_the_first_tokens_of_a_mixed_batch(case: Case, tmp_path: Path) -> None:
    """Runs vLLM's TritonExperts by the V2 runner, all interpreted."""
    with mixture(case, tmp_path, case.profiles) as llm:
        kernels = llm.apply_model(kernels_of)
        assert answers(llm, PROMPTS, MIXED, max_tokens=3) == [tokens[:3] for tokens in case.expected]
    layers = {ffn.layer for ffn in case.of["vqa"].ffns if not isinstance(ffn.part, str)}
    assert kernels == [["TritonExperts"] * len(layers)]


# vLLM's client leaves its ZeroMQ context to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.both_runners
@only_v2
@pytest.mark.parametrize("mode", ["tensor parallel", "expert parallel"])
@pytest.mark.parametrize("case", checkpoints.MIXTURES, indirect=True, scope="module")
def test_the_first_tokens_by_two_workers(case: Case, mode: str, tmp_path: Path) -> None:
    """Runs them in two processes, which have half of each expert, or half of the experts."""
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with mixture(case, tmp_path, case.profiles, env, **MODES[mode]) as llm:
        assert answers(llm, PROMPTS, MIXED, max_tokens=3) == [tokens[:3] for tokens in case.expected]


def kernels_of(model: nn.Module) -> list[str]:
    """Names of the classes by which vLLM runs experts, of each layer that has some."""
    return [
        type(module.quant_method.moe_kernel.fused_experts).__name__
        for module in model.modules()
        if isinstance(module, RoutedExperts)
    ]


# vLLM's client leaves its ZeroMQ context to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.matrix
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", checkpoints.MIXTURES, indirect=True, scope="module")
def test_in_other_modes(case: Case, mode: str, tmp_path: Path) -> None:
    with mixture(case, tmp_path, case.profiles, **MODES[mode]) as llm:
        assert answers(llm, PROMPTS, MIXED) == case.expected


@pytest.mark.matrix
@pytest.mark.parametrize("case", checkpoints.MIXTURES, indirect=True, scope="module")
def test_lora_beside_it(case: Case, tmp_path: Path) -> None:
    """Adapts attention alone: vLLM has nothing for CPUs that computes adapters of experts."""
    options = {**TOKENS, "lora_target_modules": ["q_proj"]}
    with registered(tmp_path / "plugin"):
        env = {"VLLM_PLUGINS": f"hones,{PLUGIN}"}
        check_lora(case.folder, case.profiles, tmp_path / "lora", env, **options)


# Room ---------------------------------------------------------------------------------------------


def write(folder: Path, **profiles: Profile) -> Path:
    folder.mkdir(exist_ok=True)
    for name, profile in profiles.items():
        save_profile(profile, folder / f"{name}.safetensors")
    return folder


def restricted(profile: Profile, *ffns: tuple[int, str | int]) -> Profile:
    """The profile with these of its FFNs only."""
    return dataclasses.replace(profile, layers={Ffn(*ffn): profile.ffns[ffn] for ffn in ffns})


def test_profiles_change_while_the_engine_runs(case: Case, tmp_path: Path) -> None:
    """Has room for five experts: those of the first profiles, then others, one of which gets another's table."""
    vqa, ocr, cap = (case.of[task] for task in ("vqa", "ocr", "cap"))
    first = {"vqa": restricted(vqa, (0, 1), (0, 2), (1, "dense")), "ocr": restricted(ocr, (0, 1), (2, 7))}
    second = {"vqa": restricted(cap, *((2, expert) for expert in (0, 3, 4))), "ocr": first["ocr"]}
    expressions = ["vqa", None, "ocr", "vqa@0.5+ocr", "ocr@-1"]
    asked = PROMPTS[: len(expressions)]
    expected = []
    for at, profiles in enumerate((first, second)):
        reference = Reference(case.model, write(tmp_path / f"reference{at}", **profiles))
        expected.append(reference.answers(asked, expressions))
        reference.steering.detach()
    assert expected[0] != expected[1]
    served = write(tmp_path / "served", **first)
    with mixture(case, tmp_path / "plugin", served, {"HONES_MAX_EXPERT_TABLES": "5"}) as llm:
        registry = llm.llm_engine.input_processor.hones_front.registry
        assert answers(llm, asked, expressions) == expected[0]
        write(served, wide=cap, vqa=second["vqa"])
        with pytest.raises(RoomError, match=r"start the server with --max-expert-tables 16"):
            registry.load("wide", "wide.safetensors")
        registry.load("vqa", "vqa.safetensors")
        assert answers(llm, asked, expressions) == expected[1]
        write(served, vqa=first["vqa"])
        registry.load("vqa", "vqa.safetensors")
        assert answers(llm, asked, expressions) == expected[0]


def test_too_little_room_for_the_profiles_is_said_at_the_start(case: Case, tmp_path: Path) -> None:
    with (
        pytest.raises(RoomError, match=r"of 16 experts together, .* tables for 3; .*--max-expert-tables 16 or more"),
        mixture(case, tmp_path, case.profiles, {"HONES_MAX_EXPERT_TABLES": "3"}),
    ):
        pass


@pytest.mark.matrix
def test_a_server_takes_profiles_as_far_as_there_is_room(case: Case, tmp_path: Path) -> None:
    """Runs `hones serve` for the mixture, and loads profiles into it over HTTP."""
    vqa, ocr = case.of["vqa"], case.of["ocr"]
    asked = PROMPTS[-1]
    first, second = restricted(vqa, (0, 1), (1, "dense")), restricted(ocr, (2, 5), (1, "dense"))
    served = write(tmp_path / "served", vqa=first)
    write(tmp_path / "reference", first=first, second=second)
    reference = Reference(case.model, tmp_path / "reference")
    expected = [reference.tokens(asked, task) for task in (None, "first", "second")]
    reference.steering.detach()
    assert expected[0] != expected[1] != expected[2]

    command = [sys.executable, "-m", "hones_steer", "serve", str(case.folder), "--engine", "vllm"]
    command += ["--profiles", str(served), "--allow-profile-updates", "--served-model-name", "tiny"]
    command += ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8", "--enforce-eager"]
    path = [str(tmp_path / "plugin"), str(Path(__file__).parents[2]), ENVIRONMENT["PYTHONPATH"]]
    env = {"PYTHONPATH": os.pathsep.join(path), "VLLM_PLUGINS": PLUGIN}
    write_plugin(tmp_path / "plugin")
    with server(command, tmp_path / "log", env) as running, httpx.Client(base_url=running.url, timeout=300) as client:

        def tokens(task: str | None) -> list[int]:
            body = {"model": "tiny", "prompt": asked, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
            body |= {"return_token_ids": True, "hones_task": task or "none"}
            answer = client.post("/v1/completions", json=body).raise_for_status()
            found: list[int] = answer.json()["choices"][0]["token_ids"]
            return found

        def load(**profile: Profile) -> httpx.Response:
            write(served, **profile)
            (name,) = profile
            return client.post("/v1/hones/profiles", json={"name": name, "path": f"{name}.safetensors"})

        assert [tokens(None), tokens("vqa")] == expected[:2]
        refused = load(wide=case.of["cap"])
        assert refused.status_code == 409
        assert "start the server with --max-expert-tables 16 or more" in refused.json()["error"]["message"]
        assert [tokens(None), tokens("vqa")] == expected[:2]
        load(vqa=second).raise_for_status()
        assert [tokens(None), tokens("vqa")] == [expected[0], expected[2]]


# Refusals -----------------------------------------------------------------------------------------


def test_experts_in_one_kernel_are_refused_by_name(case: Case) -> None:
    """Runs vLLM's own experts for CPUs."""
    message = r"layer 0 of Qwen3MoeModel: vLLM runs its experts by CPUUnquantizedExperts, .*so use a GPU, or leave out"
    with pytest.raises(LayoutError, match=message), engine(case.folder, case.profiles, **TOKENS):
        pass


def test_the_refusal_names_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "current_platform", SimpleNamespace(is_cpu=lambda: False))

    class FlashInferExperts(TritonExperts):
        """Stands for one of vLLM's kernels that can not be steered."""

    class Fp8(TritonExperts):
        quant_config = SimpleNamespace(use_fp8_w8a8=True)
        block_shape: ClassVar[list[int]] = [128, 128]

    Fp8.__name__ = "TritonExperts"
    kernels: list[Any] = [FlashInferExperts(), Fp8(), None]
    for kernel, message in zip(
        kernels,
        [
            "layer 1: vLLM runs its experts by FlashInferExperts, .* --moe-backend triton, or leave out profiles",
            "layer 1: vLLM runs its experts by TritonExperts, .* --moe-backend marlin, or",
            "layer 1: vLLM runs its experts by SimpleNamespace, .* --moe-backend triton, or",
        ],
        strict=True,
    ):
        layer = layers_of()[1]
        layer.module.quant_method.moe_kernel = kernel and SimpleNamespace(fused_experts=kernel)
        with pytest.raises(LayoutError, match=message):
            layer.kernel()


def test_profiles_of_dense_ffns_alone_need_no_kernel_that_can_be_steered(case: Case, tmp_path: Path) -> None:
    """Runs vLLM's own experts for CPUs, unsteered, beside a dense FFN that is steered."""
    dense = {task: restricted(profile, (1, "dense")) for task, profile in case.of.items()}
    folder = write(tmp_path / "dense", **dense)
    reference = Reference(case.model, folder)
    expected = reference.answers(PROMPTS, MIXED)
    reference.steering.detach()
    with engine(case.folder, folder, **TOKENS) as llm:
        assert answers(llm, PROMPTS, MIXED) == expected
        write(folder, more=case.of["vqa"])
        with pytest.raises(RoomError, match="--max-expert-tables 16"):
            llm.llm_engine.input_processor.hones_front.registry.load("more", "more.safetensors")


def test_profiles_of_dense_models_and_of_mixtures_are_not_mixed_up(
    case: Case, llama: Path, profiles: Path, tmp_path: Path
) -> None:
    vqa = case.of["vqa"]
    layers = {ffn: entries for ffn, entries in vqa.ffns.items() if ffn.part == DENSE}
    runs = (FfnRun(0, 1, experts=8, expert_width=32), *(vqa.base_model.ffns or ())[1:])
    narrow = Profile("vqa", layers, dataclasses.replace(vqa.base_model, ffns=runs))
    for model, folder, message in (
        (case.folder, profiles, "num_layers is 4 in the profile and 3 in the model"),
        (llama, case.profiles, "num_layers is 3 in the profile and 4 in the model"),
        (
            case.folder,
            write(tmp_path / "narrow", vqa=narrow),
            "layer 0 has 8 experts of 32 neurons in the profile and 8 experts of 64 neurons in the model",
        ),
    ):
        with pytest.raises(MismatchError, match=message), engine(model, folder, **TOKENS):
            pass


def test_settings_that_a_mixture_cannot_have(case: Case) -> None:
    from vllm.engine.arg_utils import EngineArgs

    arguments = {"model": str(case.folder), "dtype": "float32", "max_model_len": 256}
    replicas = EngineArgs(**arguments, data_parallel_size=2).create_engine_config()
    balanced = EngineArgs(**arguments).create_engine_config()
    balanced.parallel_config.enable_eplb = True  # vLLM itself allows it on GPUs only
    servers = EngineArgs(**arguments, _api_process_count=2).create_engine_config()
    for config, name in (
        (replicas, "data parallelism of a mixture of experts"),
        (balanced, "expert load balancing"),
        (servers, "several API servers before a mixture of experts"),
    ):
        with pytest.raises(StateError, match=f"does not support {name}"):
            compat.refuse_unsupported(config, Settings(case.profiles, allow_untested=True))
