"""Steering in a vLLM worker: which profiles a step's requests have, and the slot of each of its tokens.

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
from vllm.logger import init_logger

from hones_serving.contract import SCOPE
from hones_serving.expert_room import ExpertRoom
from hones_serving.settings import Settings
from hones_serving.vllm import compat
from hones_serving.vllm.experts import MixtureTables, mixture_tables
from hones_serving.vllm.front import PROFILE, PROMPT_END
from hones_serving.vllm.layout import Decoder, find_decoder
from hones_serving.vllm.scaling import SteeredExperts, SteeredInput, TokenSlots
from hones_steer import __version__
from hones_steer.errors import StateError
from hones_steer.profile import ModelIdentity, Profile, parse_profile
from hones_steer.scopes import split
from hones_steer.slots import IDENTITY, ScaleTables, SlotPool

logger = init_logger("vllm.hones_steer")  # whose messages vLLM prints


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
            "room": room and {"tables": room.tables, "experts": sorted(room.experts), "layers": sorted(room.layers)},
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
