"""Steering in a vLLM worker: scale tables, each token's slot, and the activation that multiplies.

A worker keeps the profile of every request that the engine has scheduled and not finished. When a step is prepared,
the profiles of its requests are put into slots of the tables, and each token gets its request's slot. A profile needs
its slot for one step only: a step has at most `max_num_seqs` requests, so with that many slots they never run out;
with fewer, the front admits no more different profiles than there are slots.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hones_serving.settings import Settings
from hones_serving.vllm import compat
from hones_serving.vllm.front import PROFILE
from hones_steer import __version__
from hones_steer.errors import LayoutError, StateError
from hones_steer.ffns import DENSE, Ffn
from hones_steer.injection import scale
from hones_steer.profile import ModelIdentity, Profile, parse_profile, sketch_of
from hones_steer.slots import IDENTITY, ScaleTables, SlotPool

_CHUNK = 2**22  # float32 scales gathered at a time in eager mode: 16 MB
# Tokens in a row with one slot (a run) are multiplied at once where that is quicker than looking each one's row up:
_FEW_RUNS = 4
_LONG_RUN = 16  # tokens, on average


class TokenSlots:
    """The slot of each token of a step, `index` int64 `[max tokens]`.

    Rows beyond the step's tokens (padding) keep the slot they had: nobody reads their activations.
    """

    def __init__(self, max_tokens: int, device: torch.device) -> None:
        self.index = torch.full((max_tokens,), IDENTITY, dtype=torch.int64, device=device)
        self.runs: list[tuple[int, int, int]] = []  # (first token, end, slot) of the steered tokens
        self.by_run = True

    def write(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        """Set the slots of a step's tokens: `counts[i]` consecutive tokens belong to the request with `slots[i]`."""
        if all(slot == IDENTITY for slot in slots):
            if self.runs:
                self.runs, self.by_run = [], True
                self.index.fill_(IDENTITY)
            return
        self.runs = _runs(slots, counts)
        steered = sum(end - start for start, end, _ in self.runs)
        self.by_run = len(self.runs) <= _FEW_RUNS or steered >= _LONG_RUN * len(self.runs)
        host = torch.from_numpy(np.repeat(np.asarray(slots, dtype=np.int64), counts))
        if self.index.device.type == "cuda":
            host = host.pin_memory()  # else the copy would wait for the GPU
        self.index[: len(host)].copy_(host, non_blocking=True)


def _runs(slots: Sequence[int], counts: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first token, end, slot) of each longest run of consecutive tokens with one slot, unsteered ones left out."""
    runs: list[tuple[int, int, int]] = []
    start = 0
    for slot, count in zip(slots, counts, strict=True):
        end = start + int(count)
        if runs and runs[-1][1:] == (start, slot):
            runs[-1] = (runs[-1][0], end, slot)
        elif slot != IDENTITY:
            runs.append((start, end, slot))
        start = end
    return runs


class SteeredActivation(nn.Module):
    """An FFN's activation whose output `[tokens, w]` is scaled: each token's row times its slot's row of the table.

    `w` is the number of neurons that this worker holds. vLLM fuses activations of types that it knows with
    quantization, which would leave nothing to scale; this type it does not know.
    """

    table: Tensor
    index: Tensor

    def __init__(self, activation: nn.Module, table: Tensor, tokens: TokenSlots, *, eager: bool) -> None:
        super().__init__()
        self.activation = activation
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("index", tokens.index, persistent=False)
        self._tokens = tokens
        self._eager = eager

    def forward(self, x: Tensor) -> Tensor:
        """Activations `[tokens, w]` of `x`, each row multiplied by its token's scales.

        Not eager, this reads tensors only, so that compiled code and captured graphs see every later change.
        """
        z: Tensor = self.activation(x)
        if self._eager:
            return self._scale_in_place(z)
        return scale(z, self.table.index_select(0, self.index[: z.shape[0]]))

    def _scale_in_place(self, z: Tensor) -> Tensor:
        runs = self._tokens.runs
        if self._tokens.by_run:
            for start, end, slot in runs:
                z[start:end].mul_(self.table[slot])
            return z
        step = max(1, _CHUNK // z.shape[1])
        for start in range(runs[0][0], runs[-1][1], step):
            end = min(start + step, runs[-1][1])
            z[start:end].mul_(self.table.index_select(0, self.index[start:end]))
        return z


class WorkerSteering:
    """Steering of one worker: follows what the engine schedules, and sets the slot of each token before a step."""

    def __init__(self, identity: ModelIdentity, tables: ScaleTables, tokens: TokenSlots, max_profiles: int) -> None:
        self.identity = identity
        self._pool = SlotPool(tables, max_profiles)
        self._tokens = tokens
        self._profiles: dict[str, Profile] = {}  # request id -> profile, for steered requests
        self._last: tuple[list[str], list[int]] | None = None  # last step's ids and counts; None: a request has come

    def begin(self, scheduler_output: Any) -> None:
        """Note the requests that have come and gone, from vLLM's SchedulerOutput of the step."""
        for request_id in scheduler_output.finished_req_ids:
            self._profiles.pop(request_id, None)
        for request in scheduler_output.scheduled_new_reqs:
            self._last = None
            extra = (request.sampling_params and request.sampling_params.extra_args) or {}
            if PROFILE in extra:
                self._profiles[request.req_id] = unpacked(extra[PROFILE])

    def fill(self, request_ids: Sequence[str], counts: Sequence[int]) -> None:
        """Set the slots of the step's tokens: `counts[i]` consecutive tokens belong to `request_ids[i]`."""
        step = list(request_ids), np.asarray(counts).tolist()
        if step == self._last:  # the same requests go on decoding, with the profiles they came with
            return
        self._last = step
        profiles = [self._profiles.get(request_id) for request_id in request_ids]
        slots = self._pool.acquire(profiles)
        # A slot is owed for this step only; what was written stays until it is taken again.
        self._pool.release(profiles)
        self._tokens.write(slots, counts)


@functools.lru_cache(maxsize=256)
def unpacked(data: bytes) -> Profile:
    """The profile that the front has packed into a request."""
    return parse_profile(data)


# In vLLM's worker ---------------------------------------------------------------------------------


def install() -> None:
    """Wrap `Worker.load_model`: steer a model once it is loaded, before vLLM measures its memory and compiles it."""
    from vllm.v1.worker import gpu_worker

    worker: Any = gpu_worker.Worker
    load_model = worker.load_model

    @functools.wraps(load_model)
    def load_and_attach(self: Any, *args: Any, **kwargs: Any) -> None:
        load_model(self, *args, **kwargs)
        if settings := Settings.from_env():
            self.hones_steering = attach(self.model_runner, self.vllm_config, settings)

    def hones_identity(self: Any) -> dict[str, Any]:
        identity: ModelIdentity = self.hones_steering.identity
        return identity.to_json()

    worker.load_model = load_and_attach
    worker.hones_identity = hones_identity


def attach(runner: Any, config: Any, settings: Settings) -> WorkerSteering:
    """Put tables and scaled activations into a runner's loaded model, and follow the steps that it runs.

    Raises:
        LayoutError: the model's FFNs are not supported; the message names them.
        StateError: vLLM's configuration is not supported.
    """
    compat.refuse_unsupported(config, settings)
    stack = _decoder_stack(runner.get_model())
    ffns = [_ffn(f"layer {i} of {type(stack).__name__}", layer) for i, layer in enumerate(stack.layers)]
    identity = _identity(config.model_config, stack, len(ffns))
    max_profiles = compat.max_profiles(config, settings)
    shard = _shard(ffns, config.model_config.hf_text_config.intermediate_size)
    places = {Ffn(i, DENSE): (next(ffn.parameters()).device, shard) for i, ffn in enumerate(ffns)}
    tables = ScaleTables(places, max_profiles + 1)
    tokens = TokenSlots(_max_tokens(config), places[Ffn(0, DENSE)][0])
    eager = _runs_eagerly(config)
    for ffn, table in zip(ffns, tables.tables.values(), strict=True):
        ffn.act_fn = SteeredActivation(ffn.act_fn, table, tokens, eager=eager)
    _change_compile_cache_key(config, max_profiles)
    steering = WorkerSteering(identity, tables, tokens, max_profiles)
    _follow(runner, steering)
    fill = _fill_v2 if config.use_v2_model_runner else _fill_v1
    fill(runner, steering)
    return steering


def _decoder_stack(model: Any) -> Any:
    """The text decoder: the module that has `layers` and the final `norm`. Vision towers are never looked at.

    Raises:
        LayoutError: the model has none where vLLM's models keep it.
    """
    language_model = model.get_language_model() if hasattr(model, "get_language_model") else model
    stack = getattr(language_model, "model", language_model)
    if not isinstance(getattr(stack, "layers", None), nn.ModuleList):
        raise LayoutError(
            f"{type(model).__name__} keeps its decoder layers where hones-steer cannot find them in vLLM; "
            "hones-steer supports no such model in vLLM in this version"
        )
    return stack


def _ffn(name: str, layer: nn.Module) -> Any:
    """A decoder layer's gated FFN: the one module with an `act_fn` and a `down_proj`. Errors call the layer `name`.

    Raises:
        LayoutError: the layer has no such module, or several.
        StateError: the FFN is steered already.
    """
    candidates = [
        module
        for module in layer.modules()
        if isinstance(getattr(module, "act_fn", None), nn.Module) and hasattr(module, "down_proj")
    ]
    if len(candidates) != 1:
        kinds = ", ".join(type(module).__name__ for module in candidates) or "none"
        raise LayoutError(
            f"{name} ({type(layer).__name__}) has not one gated FFN with act_fn and down_proj (found: {kinds}); "
            "hones-steer supports no other FFN in vLLM in this version"
        )
    if isinstance(candidates[0].act_fn, SteeredActivation):
        raise StateError(f"{name} is steered already; start vLLM anew")
    return candidates[0]


def _shard(ffns: Sequence[Any], intermediate_size: int) -> slice:
    """The neurons that this worker holds: all of them, or its tensor-parallel rank's share.

    Raises:
        LayoutError: the layers' shares differ, or do not add up to `intermediate_size`.
    """
    shards = set()
    for ffn in ffns:
        linear = getattr(ffn.down_proj, "base_layer", ffn.down_proj)  # `base_layer`: of a layer wrapped for LoRA
        width = linear.input_size_per_partition
        shards.add((linear.tp_rank * width, width, width * linear.tp_size))
    if len(shards) != 1 or next(iter(shards))[2] != intermediate_size:
        raise LayoutError(
            f"the FFNs' shards (first neuron, width, neurons in all) are {sorted(shards)}, "
            f"which do not make up {intermediate_size} neurons in every layer; "
            "hones-steer supports no other sharding in this version"
        )
    start, width, _ = shards.pop()
    return slice(start, start + width)


def _identity(model_config: Any, stack: Any, num_layers: int) -> ModelIdentity:
    text_config = model_config.hf_text_config
    return ModelIdentity(
        name="",
        revision=None,
        model_type=model_config.hf_config.model_type,
        num_layers=num_layers,
        intermediate_size=text_config.intermediate_size,
        hidden_size=text_config.hidden_size,
        sketch=sketch_of(getattr(stack, "norm", None), text_config.hidden_size),
    )


def _max_tokens(config: Any) -> int:
    """Largest number of rows that a forward can have, padding included."""
    tokens: int = config.scheduler_config.max_num_batched_tokens
    return max(tokens, config.compilation_config.max_cudagraph_capture_size or 0)


def _runs_eagerly(config: Any) -> bool:
    """Read vLLM's config; true if it neither compiles the model nor captures graphs of it."""
    from vllm.config import CompilationMode, CUDAGraphMode

    compilation = config.compilation_config
    return bool(compilation.mode == CompilationMode.NONE and compilation.cudagraph_mode == CUDAGraphMode.NONE)


def _change_compile_cache_key(config: Any, max_profiles: int) -> None:
    """Keep vLLM from using code that it compiled and stored without this plugin, or with tables of another size.

    Raises:
        StateError: the setting that changes the key is not a dict.
    """
    if not isinstance(config.additional_config, dict):
        raise StateError("hones-steer needs vLLM's additional_config to be a dict; start vLLM without yours")
    config.additional_config["hones_steer"] = {"version": __version__, "max_profiles": max_profiles}


def _follow(runner: Any, steering: WorkerSteering) -> None:
    """Wrap the runner's `execute_model`: the steering sees what a step schedules before the runner does."""
    execute_model = runner.execute_model

    @functools.wraps(execute_model)
    def execute(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        steering.begin(scheduler_output)
        return execute_model(scheduler_output, *args, **kwargs)

    runner.execute_model = execute


def _fill_v1(runner: Any, steering: WorkerSteering) -> None:
    """Wrap the V1 runner's `_prepare_inputs`: by then `input_batch.req_ids` has the final order of a step's tokens."""
    prepare_inputs = runner._prepare_inputs

    @functools.wraps(prepare_inputs)
    def prepare(scheduler_output: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> Any:
        steering.fill(runner.input_batch.req_ids, num_scheduled_tokens)
        return prepare_inputs(scheduler_output, num_scheduled_tokens, *args, **kwargs)

    runner._prepare_inputs = prepare


def _fill_v2(runner: Any, steering: WorkerSteering) -> None:
    """Wrap the V2 runner's `prepare_inputs`: `batch_req_state` has the order of a step's tokens. Never run in tests."""
    prepare_inputs = runner.prepare_inputs

    @functools.wraps(prepare_inputs)
    def prepare(scheduler_output: Any, batch_req_state: Any, *args: Any, **kwargs: Any) -> Any:
        steering.fill(batch_req_state.req_ids, batch_req_state.num_scheduled_tokens)
        return prepare_inputs(scheduler_output, batch_req_state, *args, **kwargs)

    runner.prepare_inputs = prepare
