"""Steering in a vLLM worker: scale tables, each token's slot, and the product before each down-projection.

A worker keeps the profile of every request that the engine has scheduled and not finished. When a step is prepared,
the profiles of its requests are put into slots of the tables, and each token gets its request's slot. A profile needs
its slot for one step only: a step has at most `max_num_seqs` requests, so with that many slots they never run out;
with fewer, the front admits no more different profiles than there are slots.

Where a scope steers a part of a request's tokens, their positions decide, of which the step says the first. Speculative
decoding may have the engine count tokens that are rejected later, but it drafts only behind the prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.logger import init_logger

from hones_serving.contract import SCOPE
from hones_serving.expert_room import ExpertRoom
from hones_serving.settings import Settings
from hones_serving.vllm import compat
from hones_serving.vllm.experts import Experts, MixtureTables, mixture_tables
from hones_serving.vllm.front import PROFILE, PROMPT_END
from hones_serving.vllm.layout import Decoder, find_decoder
from hones_steer import __version__
from hones_steer.errors import StateError
from hones_steer.injection import scale
from hones_steer.profile import ModelIdentity, Profile, parse_profile
from hones_steer.scopes import split
from hones_steer.slots import IDENTITY, ScaleTables, SlotPool

logger = init_logger("vllm.hones_steer")  # whose messages vLLM prints

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
        """Set the slots of a step's tokens: `counts[i]` consecutive tokens have `slots[i]`."""
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


class SteeredInput(nn.Module):
    """Scales the input of a down-projection: each token's row times its slot's row of the table.

    It is a part of the down-projection that `place` calls before it; the table and the slots are its buffers, so that
    vLLM compiles them as it does the model's own.
    """

    table: Tensor
    index: Tensor

    def __init__(self, table: Tensor, tokens: TokenSlots, *, eager: bool) -> None:
        super().__init__()
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("index", tokens.index, persistent=False)
        self._tokens = tokens
        self._eager = eager

    def place(self, down_projection: Any) -> None:
        """Become a part of `down_projection`; raises StateError if it has one already.

        A hook leaves the module's type and its weights' names alone, which LoRA and reloading of weights go by.
        """
        if hasattr(down_projection, "hones_scaling"):
            raise StateError("the model is steered already; start vLLM anew")
        down_projection.hones_scaling = self
        down_projection.register_forward_pre_hook(_scaled)
        # Else some models' activations hand on a quantized product, which leaves nothing to scale.
        down_projection.requires_unquantized_input = True

    def forward(self, z: Tensor) -> Tensor:
        """Scale activations z, `[tokens, w]` or in transformers' code `[1, tokens, w]`; w neurons reach this worker.

        Not eager, this reads tensors only, so that compiled code and captured graphs see every later change.
        """
        if not self._eager:
            return scale(z, self.table.index_select(0, self.index[: z.shape[-2]]))
        if self._tokens.runs:
            self._scale_in_place(z if z.dim() == 2 else z[0])
        return z

    def _scale_in_place(self, z: Tensor) -> None:
        runs = self._tokens.runs
        if self._tokens.by_run:
            for start, end, slot in runs:
                z[start:end].mul_(self.table[slot])
            return
        step = max(1, _CHUNK // z.shape[1])
        for start in range(runs[0][0], runs[-1][1], step):
            end = min(start + step, runs[-1][1])
            z[start:end].mul_(self.table.index_select(0, self.index[start:end]))


def _scaled(down_projection: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a down-projection, the first one scaled by its part; calling the part would cost more."""
    return (down_projection.hones_scaling.forward(args[0]), *args[1:])


class SteeredExperts:
    """Scales what the routed experts of one layer compute between their two products: vLLM's `activation`.

    This is given no tokens and no experts, so a wrapper around the whole layer of experts notes the router's choices,
    `[tokens, choices]`. Row i of the activations is of token i // choices, and of the expert chosen there.
    """

    def __init__(self, experts: Experts, layer: int, tables: MixtureTables, tokens: TokenSlots, *, eager: bool) -> None:
        self._name = experts.name
        self._rows, self._each = tables.rows, tables.each
        self._numbers = tables.numbers_of(layer)
        self._tokens = tokens
        self._eager = eager
        self._choices: Tensor | None = None
        self._scaled = False

    def place(self, experts: Experts) -> None:
        """Wrap the methods of vLLM's objects.

        Raises:
            StateError: they are wrapped already.
            LayoutError: vLLM runs these experts in a way that cannot be steered.
        """
        module, kernel = experts.module, experts.kernel()
        if "forward_modular" in vars(module):
            raise StateError("the model is steered already; start vLLM anew")
        forward, activation = module.forward_modular, kernel.activation

        @functools.wraps(forward)
        def forward_steered(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._choices, self._scaled = topk_ids, False
            result = forward(x, topk_weights, topk_ids, *args, **kwargs)
            self._choices = None
            if not self._scaled:  # vLLM may make another kernel, when weights are loaded again
                raise StateError(f"{self._name}: vLLM ran its experts without the part that steers them; restart vLLM")
            return result

        @functools.wraps(activation)
        def activation_scaled(kind: Any, output: Tensor, *args: Any, **kwargs: Any) -> None:
            activation(kind, output, *args, **kwargs)
            self._scale(output)
            self._scaled = True

        module.forward_modular = forward_steered
        kernel.activation = activation_scaled

    def _scale(self, output: Tensor) -> None:
        choices = self._choices
        if choices is None or output.shape[0] != choices.numel():
            raise StateError(f"{self._name}: vLLM computes its experts in an order that is not known; restart vLLM")
        tokens, each = choices.shape
        z = output[:, : self._rows.shape[1]]  # some kernels pad the neurons
        start, end = 0, tokens
        if self._eager:
            if not (runs := self._tokens.runs):
                return
            start, end = runs[0][0], runs[-1][1]
        if torch.compiler.is_compiling():
            self._multiply(z, choices, start, end)
            return
        step = max(1, _CHUNK // (each * z.shape[1]))
        for first in range(start, end, step):
            self._multiply(z, choices, first, min(first + step, end))

    def _multiply(self, z: Tensor, choices: Tensor, start: int, end: int) -> None:
        """Scale the rows of the tokens from `start` to before `end`, in place."""
        each = choices.shape[1]
        numbers = self._numbers.index_select(0, choices[start:end].reshape(-1)).view(-1, each)
        rows = self._tokens.index[start:end].unsqueeze(1) * self._each + numbers
        z[start * each : end * each].mul_(self._rows.index_select(0, rows.reshape(-1)))


class WorkerSteering:
    """Steering of one worker: follows what the engine schedules, and sets the slot of each token before a step."""

    def __init__(self, identity: ModelIdentity, tables: ScaleTables, tokens: TokenSlots, max_profiles: int) -> None:
        self.identity = identity
        self._tables = tables
        self._pool = SlotPool(tables, max_profiles)
        self._tokens = tokens
        self._profiles: dict[str, Profile] = {}  # request id -> profile, for steered requests
        self._scopes: dict[str, tuple[str, int]] = {}  # request id -> scope and prompt's end, where it is not "all"
        self._starts: dict[str, int] = {}  # request id -> position of its first token in the step, of those in _scopes
        self._last: tuple[list[str], list[int], list[Any]] | None = None  # last step's `fill`; None: a request has come

    @property
    def room(self) -> ExpertRoom | None:
        """The room that this worker has for the scales of routed experts; None if the model has none."""
        return self._tables.room if isinstance(self._tables, MixtureTables) else None

    def begin(self, scheduler_output: Any) -> None:
        """Note the requests that have come and gone, from vLLM's SchedulerOutput of the step."""
        for request_id in scheduler_output.finished_req_ids:
            self._profiles.pop(request_id, None)
            if self._scopes.pop(request_id, None):
                del self._starts[request_id]
        for request in scheduler_output.scheduled_new_reqs:
            self._last = None
            extra = (request.sampling_params and request.sampling_params.extra_args) or {}
            if PROFILE in extra:
                self._profiles[request.req_id] = unpacked(extra[PROFILE])
            if PROMPT_END in extra:
                self._scopes[request.req_id] = extra[SCOPE], extra[PROMPT_END]
                self._starts[request.req_id] = request.num_computed_tokens
        if self._scopes:
            running = scheduler_output.scheduled_cached_reqs
            for request_id, start in zip(running.req_ids, running.num_computed_tokens, strict=True):
                if request_id in self._scopes:
                    self._starts[request_id] = start

    def fill(self, request_ids: Sequence[str], counts: Sequence[int]) -> None:
        """Set the slots of the step's tokens: `counts[i]` consecutive tokens belong to `request_ids[i]`."""
        ids, tokens = list(request_ids), np.asarray(counts).tolist()
        parts = [
            (i, split(*self._scopes[request_id], self._starts[request_id], tokens[i]))
            for i, request_id in enumerate(ids)
            if request_id in self._scopes
        ]
        step = ids, tokens, parts
        if step == self._last:  # the same requests go on decoding, with the profiles they came with
            return
        self._last = step
        profiles = [self._profiles.get(request_id) for request_id in request_ids]
        if isinstance(self._tables, MixtureTables):
            self._tables.require(profile for profile in profiles if profile is not None)
        slots = self._pool.acquire(profiles)
        # A slot is owed for this step only; what was written stays until it is taken again.
        self._pool.release(profiles)
        if parts:
            slots, tokens = _in_scope(slots, tokens, dict(parts))
        self._tokens.write(slots, tokens)


def _in_scope(
    slots: Sequence[int], counts: Sequence[int], parts: Mapping[int, Sequence[tuple[int, bool]]]
) -> tuple[tuple[int, ...], list[int]]:
    """Slots and counts of a step's tokens, those of request i split into its `parts`: tokens, and if they are steered.

    Requests that are not in `parts` are whole.
    """
    runs = [
        (slot if steered else IDENTITY, tokens)
        for i, (slot, count) in enumerate(zip(slots, counts, strict=True))
        for tokens, steered in parts.get(i, ((count, True),))
        if tokens
    ]
    return tuple(slot for slot, _ in runs), [tokens for _, tokens in runs]


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
        steering: WorkerSteering = self.hones_steering
        room = steering.room
        return {
            "identity": steering.identity.to_json(),
            "room": None if room is None else {"tables": room.tables, "experts": sorted(room.experts)},
        }

    worker.load_model = load_and_attach
    worker.hones_identity = hones_identity


def attach(runner: Any, config: Any, settings: Settings) -> WorkerSteering:
    """Have every FFN of a runner's loaded model scale its activations, and follow the steps that it runs.

    Raises:
        LayoutError: a layer's FFNs are not found, or its experts cannot be steered; the message names the layer.
        StateError: vLLM's configuration is not supported, or profiles list neurons of too many experts.
        ProfileError: the model has experts, and the folder of profiles cannot be read.
    """
    compat.refuse_unsupported(config, settings)
    decoder = find_decoder(runner.get_model(), config.model_config)
    max_profiles = compat.max_profiles(config, settings)
    tables = _tables(decoder, max_profiles + 1, settings)
    tokens = TokenSlots(_max_tokens(config), next(runner.get_model().parameters()).device)
    eager = _runs_eagerly(config)
    for ffn, projection in decoder.projections.items():
        SteeredInput(tables.tables[ffn], tokens, eager=eager).place(projection.module)
    num_tables = 0
    if isinstance(tables, MixtureTables) and (num_tables := tables.room.tables):
        for layer, experts in decoder.experts.items():
            SteeredExperts(experts, layer, tables, tokens, eager=eager).place(experts)
    _change_compile_cache_key(config, max_profiles, num_tables)
    steering = WorkerSteering(decoder.identity, tables, tokens, max_profiles)
    _follow(runner, steering)
    fill = _fill_v2 if config.use_v2_model_runner else _fill_v1
    fill(runner, steering)
    return steering


def _tables(decoder: Decoder, slots: int, settings: Settings) -> ScaleTables:
    places = {ffn: (next(of.module.parameters()).device, of.shard) for ffn, of in decoder.projections.items()}
    if not decoder.experts:
        return ScaleTables(places, slots)
    tables = mixture_tables(places, slots, decoder.experts, decoder.identity, settings)
    logger.info(
        "hones-steer: tables for the scales of %d experts, each in %d slots: %.1f MB",
        tables.room.tables,
        slots,
        tables.num_bytes / 1e6,
    )
    return tables


def _max_tokens(config: Any) -> int:
    """Largest number of rows that a forward can have, padding included."""
    tokens: int = config.scheduler_config.max_num_batched_tokens
    return max(tokens, config.compilation_config.max_cudagraph_capture_size or 0)


def _runs_eagerly(config: Any) -> bool:
    """Read vLLM's config; true if it neither compiles the model nor captures graphs of it."""
    from vllm.config import CompilationMode, CUDAGraphMode

    compilation = config.compilation_config
    return bool(compilation.mode == CompilationMode.NONE and compilation.cudagraph_mode == CUDAGraphMode.NONE)


def _change_compile_cache_key(config: Any, max_profiles: int, expert_tables: int) -> None:
    """Keep vLLM from using code that it compiled and stored without this plugin, or with tables of another size.

    Raises:
        StateError: the setting that changes the key is not a dict.
    """
    if not isinstance(config.additional_config, dict):
        raise StateError("hones-steer needs vLLM's additional_config to be a dict; start vLLM without yours")
    config.additional_config["hones_steer"] = {
        "version": __version__,
        "max_profiles": max_profiles,
        "expert_tables": expert_tables,
    }


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
    """Wrap the V2 runner's `prepare_inputs`: `batch_req_state` has the order of a step's tokens."""
    prepare_inputs = runner.prepare_inputs

    @functools.wraps(prepare_inputs)
    def prepare(scheduler_output: Any, batch_req_state: Any, *args: Any, **kwargs: Any) -> Any:
        steering.fill(batch_req_state.req_ids, batch_req_state.num_scheduled_tokens)
        return prepare_inputs(scheduler_output, batch_req_state, *args, **kwargs)

    runner.prepare_inputs = prepare
