"""The front of an engine: turns the steering that a request names into its profile and its cache salt.

Offline a request names its steering in `SamplingParams.extra_args`, as an expression (``hones_task``) and a scope
(``hones_scope``). In a server it is what the HTTP request that is being handled was admitted with
(`hones_serving.exchange`): vLLM's handlers, tasks and generators run in its context, so that every route, `n`, tools
and responses in the background are reached, and so are threads, which are given it. Either way `extra_args` gets the
profile's bytes: JSON cannot hold those, so no client can smuggle a profile in.

Blocks of the prefix cache are found by hashes, each of a block's tokens and all before it. The salt, in the first of
them, says what steers the prompt; where a scope ends or begins with the prompt, the first block that has a token behind
it says so (`block_keys`). So a block is shared by all who would compute the same, and by no one else: with the scope
``generated`` the prompt by those who are not steered, with ``prompt`` by those who are steered throughout; the answer
with nobody whose next prompt it is a part of.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from dataclasses import replace
from http import HTTPStatus
from typing import Any

from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.usage.usage_lib import UsageContext
from vllm.utils import length_from_prompt_token_ids_or_embeds

from hones_serving.contract import PREFIX, SCOPE, TASK
from hones_serving.exchange import current_admission, generating
from hones_serving.metrics import Metrics
from hones_serving.registry import ProfileRegistry, label_of
from hones_serving.settings import Settings
from hones_serving.vllm import compat, connectors
from hones_serving.vllm.servers import registry_of
from hones_steer.errors import RoutingError, StateError
from hones_steer.profile import Profile, serialize_profile
from hones_steer.scopes import ALL, GENERATED, check_scope, scoped_digest
from hones_steer.store import parse_expression

# The engine gets these instead, and where it is not ``all`` the scope:
PROFILE = PREFIX + "profile"  # bytes: the profile's file without its texts for people
DIGEST = PREFIX + "digest"
LABEL = PREFIX + "label"  # that metrics count the request under
PROMPT_END = PREFIX + "prompt_end"  # the number of the prompt's tokens, those of images included

_SALT = "hones:"


class RequestError(RoutingError, VLLMClientError):  # type: ignore[misc]  # mypy does not look into vLLM
    """The request names steering that it cannot have; vLLM's server answers 400."""


class Front:
    """Steering of one engine's requests, in the process where they enter.

    `metrics` is set where the engine belongs to an HTTP server. `shows_drafts`: vLLM was asked to say in answers how
    many drafted tokens it accepted. `by_salt` names a KV connector that finds blocks by tokens and salt, not by their
    hashes.
    """

    def __init__(self, registry: ProfileRegistry, *, shows_drafts: bool = False, by_salt: str | None = None) -> None:
        self.registry = registry
        self.metrics: Metrics | None = None
        self._shows_drafts = shows_drafts
        self._by_salt = by_salt
        self._live: dict[str, tuple[str | None, str, Any]] = {}  # request id -> digest, label, vLLM's RequestState

    def steer(self, request: Any) -> None:
        """Give an EngineCoreRequest the profile of the steering that it names or was admitted with.

        The profile's digest salts the request's prefix cache.

        Raises:
            RoutingError: the request names a task that has no profile, a scope that there is not, or a reserved name
                that is not its to use.
        """
        reserved = _reserved_args(request)
        profile, label, scope = self._resolved(reserved)
        if profile is not None and request.resumable:
            raise RequestError("a session of streamed input cannot be steered; send the prompt in one request")
        if profile is not None and scope != ALL and self._by_salt is not None:
            raise RequestError(
                f"{SCOPE} is {scope!r}, but {self._by_salt} finds blocks by a salt, which does not say where a prompt "
                "ends; leave it out"
            )
        request.cache_salt = salted(None if scope == GENERATED else profile, request.cache_salt)
        params = request.sampling_params
        if reserved:
            params.extra_args = {key: value for key, value in params.extra_args.items() if key not in reserved}
        if profile is not None:
            extra = {PROFILE: packed(profile), DIGEST: profile.digest, LABEL: label}
            if scope != ALL:
                end = length_from_prompt_token_ids_or_embeds(request.prompt_token_ids, request.prompt_embeds)
                extra |= {SCOPE: scope, PROMPT_END: end}
            params.extra_args = {**(params.extra_args or {}), **extra}

    def _resolved(self, reserved: Mapping[str, Any]) -> tuple[Profile | None, str, str]:
        """The profile (None: unsteered) of a request with these reserved arguments, its label in metrics, its scope."""
        if unknown := reserved.keys() - {TASK, SCOPE}:
            raise RequestError(f"{', '.join(sorted(unknown))}: a reserved name; name steering with {TASK!r}")
        text, scope = reserved.get(TASK), reserved.get(SCOPE)
        if self.metrics is not None:  # a server, where the middleware has taken the names out where it may steer
            if text is not None or scope is not None:
                raise RequestError(f"this route cannot be steered; leave out {TASK if scope is None else SCOPE!r}")
            admission = current_admission()
            return (None, "none", ALL) if admission is None else (admission.profile, admission.label, admission.scope)
        if not isinstance(text, str | None):
            raise RequestError(f"{TASK} is {text!r}; give an expression like 'vqa@0.5+ocr'")
        scope = check_scope(ALL if scope is None else scope)
        if text is None and scope != ALL:
            raise RequestError(f"{SCOPE} is {scope!r}, but nothing steers this request; name {TASK!r}")
        expression = parse_expression("none" if text is None else text)
        return self.registry.resolve(expression), label_of(expression), scope

    def enter(self, request: Any, states: Mapping[str, Any], add: Callable[[], None]) -> None:
        """Let an EngineCoreRequest into the engine by calling `add`; its profile keeps a slot until `leave`.

        `states` maps the ids of the requests in the engine to vLLM's RequestState; `add` puts this one there.

        Raises:
            CapacityError: more different profiles would be in use than there are slots.
            RequestError: the request has not passed `steer`.
        """
        request_id, reserved = request.request_id, _reserved_args(request)
        if TASK in reserved or (SCOPE in reserved and DIGEST not in reserved):
            raise RequestError("an EngineCoreRequest made by hand cannot be steered; pass the prompt itself")
        if request_id in states:  # more input for a session that is in already
            add()
            return
        digest = reserved.get(DIGEST)
        admission = current_admission()
        if (
            admission is not None
            and admission.profile is not None
            and (admission.profile.digest, admission.scope) != (digest, reserved.get(SCOPE, ALL))
        ):
            raise RequestError("this request has lost its steering on its way; name hones_task 'none', and report this")
        if digest is not None:
            self.registry.hold(digest)
        if request.sampling_params is not None:  # pooling generates nothing
            generating()
        try:
            add()
        except BaseException:
            if digest is not None:
                self.registry.release(digest)
            raise
        self._live[request_id] = digest, reserved.get(LABEL, "none"), states[request_id]

    def count_drafts(self, output: Any) -> None:
        """Count what was drafted for a request that ends with an EngineCoreOutput, and keep it out of the answer.

        Requests that a client has left, and those that the front ends at a stop string, have no such output.
        """
        drafts = output.spec_decode_metrics
        if drafts is None:
            return
        if self.metrics is not None and output.request_id in self._live:
            accepted = sum(tokens * steps for tokens, steps in enumerate(drafts.histogram))
            self.metrics.drafts(self._live[output.request_id][1], drafts.num_draft_tokens, accepted)
        if not self._shows_drafts:
            output.spec_decode_metrics = None

    def leave(self, request_id: str) -> None:
        """Give back the slot of a request that has finished or was aborted; may be called more than once."""
        digest, label, state = self._live.pop(request_id, (None, "", None))
        if digest is not None:
            self.registry.release(digest)
        if self.metrics is not None and state is not None and state.detokenizer is not None:
            self.metrics.tokens(label, state.detokenizer.num_output_tokens())


def salted(profile: Profile | None, salt: str | None) -> str | None:
    """The salt of a request's prefix cache: two requests share blocks if profile contents and users' salts are equal.

    `profile` is what steers the prompt, `salt` the one that the user gave; both may be None.
    """
    if profile is not None:
        return _SALT + profile.digest + ("" if salt is None else ":" + salt)
    # A user's own salt must not pass for a steered request's.
    return f"{_SALT}none:{salt}" if salt is not None and salt.startswith(_SALT) else salt


def block_keys(request: Any, end: int) -> tuple[tuple[str, str], ...]:
    """Keys that the hash of a block of a vLLM Request must have beside its tokens; it ends before position `end`.

    From the end of a request's prompt on, its scope makes another cache of the same tokens: one that depends on where
    that is.
    """
    extra = (request.sampling_params is not None and request.sampling_params.extra_args) or {}
    if PROMPT_END not in extra or end <= extra[PROMPT_END]:
        return ()
    return ((SCOPE, f"{scoped_digest(extra[DIGEST], extra[SCOPE])}:{extra[PROMPT_END]}"),)


@functools.lru_cache(maxsize=256)
def packed(profile: Profile) -> bytes:
    """The bytes of a profile's file, without the texts that only people read; `worker.unpacked` reads them."""
    return serialize_profile(replace(profile, description="", license="", method={}, evidence={}))


def _reserved_args(request: Any) -> dict[str, Any]:
    """The `extra_args` of a request whose names begin with ``hones_``."""
    params = request.sampling_params
    extra = (params.extra_args if params is not None else None) or {}
    return {key: value for key, value in extra.items() if key.startswith(PREFIX)}


# In vLLM's classes --------------------------------------------------------------------------------


def attach(engine: Any, answers: Sequence[Mapping[str, Any]], settings: Settings, listing: str) -> Front:
    """Give an LLMEngine or AsyncLLM its front; `answers` holds each worker's answer to `hones_identity`.

    `listing` is ProfileRegistry's.

    Raises:
        ProfileError, MismatchError, DataError: a profile of the folder cannot be used with this model.
        StateError: the workers run different models, the profiles list neurons of too many experts, or several API
            servers cannot agree.
    """
    identities = [answer["identity"] for answer in answers]
    if any(identity != identities[0] for identity in identities):
        raise StateError(f"the workers disagree about their model: {identities}; restart the server")
    registry = registry_of(engine.vllm_config, answers, settings, listing)
    shown = engine.vllm_config.observability_config.per_request_spec_decode_metrics
    by_salt = connectors.by_salt(engine.vllm_config.kv_transfer_config)
    front = Front(registry, shows_drafts=shown != "none", by_salt=by_salt)
    engine.input_processor.hones_front = engine.output_processor.hones_front = front
    return front


def install() -> None:
    """Wrap the methods of vLLM through which every request and every engine passes."""
    from vllm import plugins
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.engine.output_processor import OutputProcessor

    wrap(InputProcessor, "__init__", _check_config)
    wrap(InputProcessor, "process_inputs", _process_inputs)
    wrap(OutputProcessor, "add_request", _add_request)
    wrap(OutputProcessor, "process_outputs", _process_outputs)
    wrap(OutputProcessor, "_finish_request", _finish_request)
    wrap(OutputProcessor, "abort_requests", _abort_requests)
    wrap(LLMEngine, "__init__", _start_offline)
    wrap(AsyncLLM, "__init__", _start_server)
    wrap(plugins, "load_endpoint_plugins", _load_endpoint_plugins)
    wrap(Scheduler, "__init__", _follow_drafts)
    wrap(kv_cache_utils, "generate_block_hash_extra_keys", _block_hash_extra_keys)
    block_pool.generate_block_hash_extra_keys = kv_cache_utils.generate_block_hash_extra_keys  # for events


def wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a method of a class, or a module's function: calls go to `wrapper(original, *arguments)`."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    setattr(owner, name, method)


def _check_config(original: Callable[..., None], self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    if settings := Settings.from_env():
        compat.refuse_unsupported(vllm_config, settings)
    original(self, vllm_config, *args, **kwargs)

    def process_inputs_async(*args: Any, **kwargs: Any) -> Any:
        # vLLM's own thread has no context, so it would not know whose request this is.
        call = functools.partial(copy_context().run, self.process_inputs, *args, **kwargs)
        return asyncio.get_running_loop().run_in_executor(self.renderer._executor, call)

    self.process_inputs_async = process_inputs_async


def _start_offline(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    if settings := Settings.from_env():
        try:
            identities = self.collective_rpc("hones_identity")
            attach(self, identities, settings, f"the folder {settings.profiles}")
        except BaseException:
            self.engine_core.shutdown()
            raise


def _start_server(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    over_http = kwargs.get("usage_context") is not UsageContext.OPENAI_BATCH_RUNNER
    if Settings.from_env() and over_http and "hones" not in os.environ.get("VLLM_PLUGINS", "").split(","):
        raise StateError(
            "HONES_PROFILES is set, but vLLM only loads the HTTP side of hones-steer if VLLM_PLUGINS names it; "
            "set VLLM_PLUGINS=hones, or use `hones serve`"
        )
    original(self, *args, **kwargs)
    self.input_processor.hones_needs_front = Settings.from_env() is not None


def _load_endpoint_plugins(original: Callable[..., list[Any]], supported_tasks: Any) -> list[Any]:
    """In vLLM's API server, its plugins with an HTTP side; where making ours failed, vLLM only logs that."""
    loaded = original(supported_tasks)
    if Settings.from_env() and not any(plugin.name == "hones" for plugin in loaded):
        raise StateError(
            "HONES_PROFILES is set, but vLLM could not make the HTTP side of hones-steer, as the log says just before "
            "this; install what is missing: pip install 'hones-steer[vllm]'"
        )
    return loaded


def _process_inputs(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    request = original(self, *args, **kwargs)
    front: Front | None = getattr(self, "hones_front", None)
    if front is not None:
        front.steer(request)
    elif getattr(self, "hones_needs_front", False) and request.sampling_params is not None:  # pooling is never steered
        raise GracefulHTTPError(  # else vLLM would take the engine for broken, and drop the sentence
            "HONES_PROFILES is set, but the HTTP side of hones-steer has not started in front of this engine, so "
            "nothing is generated rather than everything unsteered; use `hones serve` or `vllm serve`",
            HTTPStatus.SERVICE_UNAVAILABLE,
        )
    elif Settings.from_env() and (reserved := _reserved_args(request)):
        raise RequestError(
            f"{', '.join(sorted(reserved))}: this engine cannot steer; use LLM(...), `hones serve` or `vllm serve`"
        )
    return request


def _add_request(original: Callable[..., None], self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    add = functools.partial(original, self, request, *args, **kwargs)
    front: Front | None = getattr(self, "hones_front", None)
    if front is None:
        add()
    else:
        front.enter(request, self.request_states, add)


def _process_outputs(original: Callable[..., Any], self: Any, outputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
    if (front := getattr(self, "hones_front", None)) is not None:
        for output in outputs:
            front.count_drafts(output)
    return original(self, outputs, *args, **kwargs)


def _finish_request(original: Callable[..., None], self: Any, req_state: Any) -> None:
    original(self, req_state)
    if (front := getattr(self, "hones_front", None)) is not None:
        front.leave(req_state.request_id)


def _abort_requests(original: Callable[..., list[str]], self: Any, *args: Any, **kwargs: Any) -> list[str]:
    aborted = original(self, *args, **kwargs)
    if (front := getattr(self, "hones_front", None)) is not None:
        for request_id in aborted:
            front.leave(request_id)
    return aborted


def _follow_drafts(original: Callable[..., None], self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    """In the engine core, have the scheduler add up what is drafted for each request; the front counts it."""
    original(self, vllm_config, *args, **kwargs)
    if Settings.from_env() and vllm_config.speculative_config is not None and self.spec_decode_metrics_level == "none":
        self.spec_decode_metrics_level = "summary"


def _block_hash_extra_keys(
    original: Callable[..., Any], request: Any, start_token_idx: int, end_token_idx: int, *args: Any, **kwargs: Any
) -> Any:
    """In the engine core, what the hash of one block has beside its tokens, and vLLM's index of the next image."""
    keys, index = original(request, start_token_idx, end_token_idx, *args, **kwargs)
    further = block_keys(request, end_token_idx)
    return (*(keys or ()), *further) or None, index
