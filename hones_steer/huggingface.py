"""Steering of a Hugging Face model: one task per call or per batch row, or folded into the weights.

steering = steer(model, {"vqa": "vqa.safetensors", "ocr": "ocr.safetensors"})
with steering.task("vqa"):
    model.generate(...)
with steering.tasks(["vqa", "ocr@0.5", None]):  # one per row of the batch
    model.generate(...)
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from torch import nn

from hones_steer._blocks import Routing, block_of, carry, innermost
from hones_steer._calls import Generation, cached_tokens, num_prompts, prompt_width
from hones_steer._folding import Folded
from hones_steer._packing import steered_generate_batch, steered_init
from hones_steer._selftest import Verification, self_test
from hones_steer.errors import ProfileError, RoutingError, StateError
from hones_steer.injection import Injection, InstanceMethods, is_injected
from hones_steer.layout import Layout, find_layout, unwrap
from hones_steer.profile import ModelIdentity, Profile, StrPath, is_task_name, load_profile
from hones_steer.scopes import ALL, check_end, check_scope, of_each
from hones_steer.slots import SlotPool
from hones_steer.store import ProfileStore, combine, known_tasks, parse_expression

P = ParamSpec("P")
R = TypeVar("R")


def steer(
    model: nn.Module,
    profiles: Mapping[str, Profile | StrPath] | StrPath | ProfileStore,
    *,
    max_profiles: int = 16,
    allow_mismatch: bool = False,
) -> Steering:
    """Attach profiles to a model, which stays unsteered until a task is chosen.

    `profiles` maps task names to profiles or their files, or is a folder of them. At most `max_profiles` different
    expressions can be in use at once (each takes 4 bytes per FFN neuron of the model); any number can be loaded.
    This call and `detach` drop the code of torch.compile'd models (`torch.compiler.reset`), which would otherwise run
    on without the steering.

    Raises:
        LayoutError: the model's FFNs are not recognized or not supported.
        ProfileError: a profile cannot be read.
        MismatchError: a profile was made for another model (see `ModelIdentity.check` on `allow_mismatch`).
        StateError: the model is steered already.
    """
    return Steering(model, profiles, max_profiles=max_profiles, allow_mismatch=allow_mismatch)


def is_steered(model: nn.Module) -> bool:
    """Whether a `Steering` is attached to the model, in a block or not; raises LayoutError as `steer` does."""
    return is_injected(unwrap(model), find_layout(model))


class Steering:
    """A model's steering, made by `steer`. As a context manager it detaches when the block is left.

    The model is called as usual, by its own forward or `generate`, compiled or not, from any thread; forwards are
    serialized. While it is steered it cannot be copied or pickled; `save_pretrained` and `state_dict` work as before.
    """

    def __init__(
        self,
        model: nn.Module,
        profiles: Mapping[str, Profile | StrPath] | StrPath | ProfileStore,
        *,
        max_profiles: int,
        allow_mismatch: bool,
    ) -> None:
        if max_profiles < 1:
            raise RoutingError(f"max_profiles is {max_profiles}; it must be at least 1")
        inner = unwrap(model)
        layout = find_layout(model)
        self._identity = ModelIdentity.from_model(inner)
        self._allow_mismatch = allow_mismatch
        self._profiles = {name: self._checked(name, source, layout) for name, source in _sources(profiles).items()}
        self._key = object()  # identifies this steering's blocks, without keeping it in memory
        self._generation: ContextVar[Generation | None] = ContextVar("hones_steer_generation", default=None)
        self._open: list[Routing] = []
        self._folded: Folded | None = None
        injection = Injection(inner, layout, max_profiles + 1, self._routing, self._generation.get)
        pool = SlotPool(injection.tables, max_profiles)
        methods = InstanceMethods(inner)
        methods.wrap("generate", lambda generate: self._generate(generate, injection))
        methods.wrap("generate_batch", lambda generate_batch: steered_generate_batch(generate_batch, self._routing))
        methods.wrap("init_continuous_batching", lambda begin: steered_init(begin, self._routing))
        self._attached: _Attached | None = _Attached(inner, layout, injection, pool, methods)

    @property
    def names(self) -> tuple[str, ...]:
        """The loaded tasks."""
        return tuple(self._profiles)

    def task(
        self, expression: str | None, *, scope: str = ALL, prompt_end: int | None = None
    ) -> AbstractContextManager[None]:
        """Steer every row of every forward, within the block, by an expression such as "vqa@0.5+ocr".

        "none" and None switch steering off; of nested blocks the innermost counts. The task belongs to the calling
        context and to whatever is started inside the block: threads, jobs of a ThreadPoolExecutor, asyncio's tasks. A
        generator may continue its block in another context. With gradient checkpointing, call backward() inside the
        block.

        `scope` "prompt" steers only tokens before the prompt's end, "generated" only those from there on. `generate`
        and `generate_batch` know where that is. For calls of the model itself `prompt_end` says it: the number of a
        row's tokens, padding and cached ones counted, that are the prompt's. Tokens that a given cache holds already
        are as they were computed.

        Raises:
            RoutingError: an unknown task or scope, a malformed expression, more different profiles at once than
                `max_profiles`, or no forward ran inside the block; or, from a forward inside it, it is not known where
                the prompt ends.
            StateError: the steering is detached, or a profile is folded; or, from a forward inside the block, a layer
                ran without its down-projection being called, or a part of the model was replaced after `steer`.
        """
        return self._routed([expression], per_row=False, scopes=scope, ends=prompt_end)

    def tasks(
        self,
        expressions: Sequence[str | None],
        *,
        scope: str | Sequence[str] = ALL,
        prompt_end: int | Sequence[int] | None = None,
    ) -> AbstractContextManager[None]:
        """Steer each batch row, within the block, by its own expression; in `generate`, each prompt.

        Beams and `num_return_sequences` follow their prompt. `scope` and `prompt_end` are for all rows, or one for
        each. All else is as in `task`.

        Raises:
            RoutingError, StateError: as `task` does; also if the model is called with another number of rows.
        """
        if isinstance(expressions, str) or not expressions:
            raise RoutingError(f"tasks() got {expressions!r}; give a list with one expression per row")
        return self._routed(list(expressions), per_row=True, scopes=scope, ends=prompt_end)

    def packed(self, expressions: Sequence[str | None], counts: Sequence[int]) -> AbstractContextManager[None]:
        """Steer each token of a packed row, within the block: `counts[i]` tokens by `expressions[i]`, in that order.

        A packed row holds the tokens of several sequences one after the other, as paged attention takes them; within
        the block the model is called with such a row only, uncompiled and without gradients. A sequence of which a part
        is steered is two here: the tokens that are, and those that are not (None). All else is as in `task`.

        Raises:
            RoutingError, StateError: as `task` does; also if the model is called with other tokens than one row of
                `sum(counts)`, with gradients, or compiled.
        """
        if isinstance(expressions, str) or len(expressions) != len(counts) or not expressions or min(counts) < 1:
            raise RoutingError(f"packed() got {expressions!r} and {counts!r}; give each sequence's number of tokens")
        return self._routed(list(expressions), per_row=False, counts=tuple(counts))

    def wrap(self, function: Callable[P, R]) -> Callable[P, R]:
        """Wrap a function so that it runs inside the present block wherever it is called, as in a running thread.

        ```python
        with steering.task("vqa"):
            jobs.put(steering.wrap(model.generate))  # a queue, whose worker calls it before the block is left
            ...
        ```

        Raises:
            RoutingError: it is a generator function or coroutine function, which runs after its call has returned.
        """
        kinds = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
        if any(is_kind(function) for is_kind in kinds):
            raise RoutingError(
                f"wrap() carries the task through one call, and {function.__name__} goes on after its call has "
                "returned (a generator or coroutine); write `with steering.task(...)` inside it"
            )
        return carry(function, innermost())

    def load(self, name: str, profile: Profile | StrPath) -> None:
        """Add a profile, or replace the one of this name; open blocks keep the profiles that they began with.

        Raises:
            ProfileError: the profile cannot be read, or `name` cannot name a task.
            MismatchError: the profile was made for another model.
            StateError: the steering is detached.
        """
        layout = self._require_attached().layout
        self._profiles = {**self._profiles, name: self._checked(name, profile, layout)}

    def unload(self, name: str) -> None:
        """Forget a profile.

        Raises:
            RoutingError: there is no such profile.
            StateError: a block that names it is open, or the steering is detached.
        """
        with self._require_attached().injection.lock:
            self._lookup(name)
            for routing in self._open:
                if any(name in parse_expression(expression).names for expression in routing.expressions):
                    raise StateError(f"{name!r} is in use by {routing}; leave that block before unload({name!r})")
            self._profiles = {key: profile for key, profile in self._profiles.items() if key != name}

    def fold(self, expression: str) -> None:
        """Multiply an expression's scales into the weights: the whole model is steered, at no cost per token.

        Raises:
            RoutingError: an unknown task or a malformed expression.
            StateError: a task is active, a profile is folded already, a weight cannot be changed in place
                (quantized, offloaded, sharded, shared, or under a PEFT adapter), or would be beyond its dtype.
        """
        attached = self._require_attached()
        with attached.injection.lock:
            profile = self._resolve(expression)
            self._require_idle("fold()")
            if self._folded is not None:
                raise StateError("a profile is folded already; unfold() it first")
            if profile is None:
                raise RoutingError(f"{expression!r} steers nothing; there is nothing to fold")
            self._folded = Folded(attached.model, attached.layout, profile)

    def unfold(self) -> None:
        """Restore the weights, bit for bit; raises StateError if nothing is folded."""
        with self._require_attached().injection.lock:
            if self._folded is None:
                raise StateError("nothing is folded; unfold() undoes a fold()")
            self._folded.unfold()
            self._folded = None

    def verify(self, **inputs: Any) -> Verification:
        """Test on the live model that every profile scales exactly its neurons, in its own row only.

        The test runs a few tokens through the model, or the given `inputs` of exactly two rows (a processor's, for a
        model that does not run on text alone). The report's `lines()` are for people; they name the layers that these
        inputs do not reach, which are not verified.

        Raises:
            StateError: a profile does not scale its neurons (the message names the layer or task), or a profile is
                folded, the model is in training mode, or it needs `inputs`.
        """
        attached = self._require_attached()
        self._require_unfolded("verify()")
        return self_test(attached.model, attached.layout, attached.injection, self._profiles, self.tasks, inputs)

    def is_attached_to(self, model: nn.Module) -> bool:
        """Whether this steers `model` itself.

        It does not steer another load of the same weights, a model from which it was detached, or one in which an FFN,
        or a module around it, was replaced after `steer`.
        """
        attached = self._attached
        return attached is not None and unwrap(model) is attached.model and attached.injection.is_attached()

    def detach(self) -> None:
        """Leave the model as it was before `steer`: no hooks, original weights.

        Raises:
            StateError: a task is active, or the steering is detached already.
        """
        attached = self._require_attached()
        with attached.injection.lock:
            self._require_idle("detach()")
            if self._folded is not None:
                self.unfold()
            attached.injection.detach()
            attached.methods.remove()
            self._attached = None

    def __enter__(self) -> Steering:
        self._require_attached()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._attached is not None:
            self.detach()

    @contextmanager
    def _routed(
        self,
        expressions: list[str | None],
        *,
        per_row: bool,
        counts: tuple[int, ...] | None = None,
        scopes: str | Sequence[str] = ALL,
        ends: int | Sequence[int] | None = None,
    ) -> Generator[None]:
        attached = self._require_attached()
        injection = attached.injection
        texts = tuple("none" if expression is None else expression for expression in expressions)
        checked_scopes = tuple(check_scope(scope) for scope in of_each(scopes, len(texts), "scope"))
        checked_ends = None if ends is None else tuple(map(check_end, of_each(ends, len(texts), "prompt_end")))
        with injection.lock:
            self._require_unfolded("task()")
            profiles = [self._resolve(text) for text in texts]
            slots = attached.pool.acquire(profiles)
            routing = Routing(self._key, texts, slots, per_row, counts, checked_scopes, checked_ends)
            self._open.append(routing)
        outer = self._routing()
        routing.open()
        try:
            yield
            if routing.steers and not routing.forwards:
                raise RoutingError(
                    f"no forward of the model ran inside {routing}; if a thread that was there before runs it, give it "
                    "steering.wrap(function), and wait for it inside the block"
                )
        finally:
            routing.close()
            injection.release_block(routing)
            with injection.lock:
                self._open.remove(routing)
                attached.pool.release(profiles)
                injection.rest()
            if outer is not None:
                outer.forwards += routing.forwards

    def _routing(self) -> Routing | None:
        """The innermost block of this steering that the calling code is inside, or None."""
        return block_of(self._key)

    def _resolve(self, text: str) -> Profile | None:
        return combine(parse_expression(text), self._lookup, allow_mismatch=self._allow_mismatch)

    def _lookup(self, name: str) -> Profile:
        if name not in self._profiles:
            hint = known_tasks(name, self._profiles, "Steering.names")
            raise RoutingError(f"there is no profile for the task {name!r}; {hint}")
        return self._profiles[name]

    def _checked(self, name: str, source: Profile | StrPath, layout: Layout) -> Profile:
        if not is_task_name(name):
            raise ProfileError(f"{name!r} cannot name a task; use letters, digits, '_', '.' and '-' (not 'none')")
        profile = source if isinstance(source, Profile) else load_profile(source)
        profile.base_model.check(self._identity, allow_mismatch=self._allow_mismatch)
        layout.require_ffns(profile.ffns)
        return profile

    def _generate(self, generate: Callable[P, R], injection: Injection) -> Callable[P, R]:
        """Wrap `generate`, to compare its prompts with the tasks before beams make their number ambiguous."""

        @functools.wraps(generate)
        def steered_generate(*args: P.args, **kwargs: P.kwargs) -> R:
            routing = self._routing()
            if routing is not None and routing.per_row:
                routing.require_prompts(num_prompts(args, kwargs))
            generation = Generation(None)
            if routing is not None and routing.is_scoped:
                if self._generation.get() is not None:
                    raise RoutingError(f"{routing} cannot tell the prompts of a generate() inside generate() apart")
                generation = Generation(prompt_width(args, kwargs), cached_tokens((), kwargs) or 0)
            token = self._generation.set(generation)
            try:
                return generate(*args, **kwargs)
            except BaseException:
                injection.release()  # an interrupted forward would keep other threads waiting
                raise
            finally:
                self._generation.reset(token)

        return steered_generate

    def _require_attached(self) -> _Attached:
        if self._attached is None:
            raise StateError("this Steering is detached; attach a new one with steer()")
        return self._attached

    def _require_unfolded(self, call: str) -> None:
        if self._folded is not None:
            raise StateError(f"a profile is folded into the weights; unfold() it before {call}")

    def _require_idle(self, call: str) -> None:
        if self._open:
            raise StateError(f"{self._open[-1]} is active; leave its block before {call}")


@dataclass(eq=False)
class _Attached:
    """Objects that a Steering holds while it is attached."""

    model: nn.Module
    layout: Layout
    injection: Injection
    pool: SlotPool
    methods: InstanceMethods


def _sources(profiles: Mapping[str, Profile | StrPath] | StrPath | ProfileStore) -> dict[str, Profile | StrPath]:
    if isinstance(profiles, Mapping):
        return dict(profiles)
    store = ProfileStore(profiles) if isinstance(profiles, str | os.PathLike) else profiles
    return {name: store.get(name) for name in store.names()}
