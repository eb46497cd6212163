"""The self-test behind `Steering.verify`: does the live model do what its profiles say?"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hones_steer.errors import StateError
from hones_steer.experts import Experts
from hones_steer.ffns import EXPERTS, Ffn
from hones_steer.injection import Injection, scale
from hones_steer.layout import Layout, find_layout
from hones_steer.profile import ModelIdentity, Profile
from hones_steer.slots import scale_row

_TOKENS = 4


@dataclass(frozen=True)
class VerifiedProfile:
    """Result for one profile: how many of its neurons were seen to be scaled, and how far logits move at most."""

    name: str
    short_digest: str
    num_neurons: int
    largest_logit_change: float


@dataclass(frozen=True)
class Verification:
    """Report of a self-test that was passed.

    `widths` are the numbers of neurons that the layers' FFNs have, each once, ascending; in a mixture of experts
    `ffns` says what each layer has instead. `layers_not_run` names the layers that the test's inputs do not reach; they
    are not verified.
    """

    model_type: str
    num_layers: int
    widths: tuple[int, ...]
    layers_not_run: tuple[str, ...]
    profiles: tuple[VerifiedProfile, ...]
    layers_without_ffn: int = 0
    ffns: str = ""

    def lines(self) -> list[str]:
        """The report for a person."""
        width = self.ffns or f"{self.num_layers} layers of {' or '.join(map(str, self.widths))} neurons"
        width += f" ({self.layers_without_ffn} of them have no FFN)" if self.layers_without_ffn else ""
        hooked = "every down-projection and every expert is" if self.ffns else "every down-projection is"
        return [
            f"{self.model_type}: {width}, {hooked} hooked",
            *(
                f"{name} did not run in this test and is not verified; verify(**inputs) takes inputs that reach it"
                for name in self.layers_not_run
            ),
            "a row without a task is bit-equal to the unsteered model",
            *(
                f"{p.name} ({p.short_digest}): {p.num_neurons} neurons scaled as the profile says, "
                f"logits move by up to {p.largest_logit_change:.3g}"
                for p in self.profiles
            ),
        ]


def self_test(
    model: nn.Module,
    layout: Layout,
    injection: Injection,
    profiles: Mapping[str, Profile],
    tasks: Callable[[Sequence[str | None]], AbstractContextManager[None]],
    inputs: Mapping[str, Any],
) -> Verification:
    """Run two rows through the model, the second under each profile in turn, and compare every layer's input.

    `inputs` are two rows as the model takes them. Where there are none, the test makes plain tokens, and a blank image
    if the model does not run without one.

    Raises:
        StateError: the model does not do what its profiles say (the message names the layer or task), is in training
            mode, or needs `inputs`.
    """
    if model.training:
        raise StateError("the model is in training mode, where dropout hides differences; call model.eval() first")
    present = set(_hooked(find_layout(model)))
    for module, name in _hooked(layout).items():
        if module not in present or not injection.is_attached_to(module):
            raise StateError(f"{name} was replaced after steer(); detach() and steer again")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), _layers_run(layout) as run:
        forward = functools.partial(_logits, model, inputs) if inputs else _plain_forward(model)
        forward()
        if not run:
            raise StateError("no decoder layer was called; the model cannot be steered here")
        verified = tuple(
            _verify_profile(model, forward, _Live(layout, injection, run), name, profile, tasks)
            for name, profile in profiles.items()
        )
    return Verification(
        layout.model_type,
        len(layout.layers),
        tuple(sorted({layer.width for layer in layout.with_ffn})),
        tuple(layer.name for layer in layout.layers if layer.widths and layer.index not in run),
        verified,
        layout.num_without_ffn,
        ModelIdentity.from_model(model).describe_ffns() if layout.experts else "",
    )


def _hooked(layout: Layout) -> dict[nn.Module, str]:
    """The modules that steering has hooks on, each with its name for a person."""
    projections = {item.down_proj: f"{item.name}: its down-projection" for item in layout.projections}
    return projections | {experts.module: f"{experts.name}: its module" for experts in layout.experts.values()}


@dataclass(frozen=True, eq=False)
class _Live:
    """The steered model as the test finds it; `run` are the indices of the layers that the inputs reach."""

    layout: Layout
    injection: Injection
    run: set[int]


def _verify_profile(
    model: nn.Module,
    forward: Callable[[], Tensor],
    live: _Live,
    name: str,
    profile: Profile,
    tasks: Callable[[Sequence[str | None]], AbstractContextManager[None]],
) -> VerifiedProfile:
    layout = live.layout
    with (
        _recorded(layout, first=True) as before,
        _recorded(layout, first=False) as after,
        _watched(live.injection) as watched,
        tasks([None, name]),
    ):
        forward()
    for projection in layout.projections:
        z, scaled = before.get(projection.ffn), after.get(projection.ffn)
        if z is not None and scaled is not None:
            s = scale_row(profile, projection.ffn).to(z.device)
            z, scaled = z.view(2, -1, z.shape[-1]), scaled.view(2, -1, z.shape[-1])
            if not torch.equal(scaled[0], z[0]) or not torch.equal(scaled[1], scale(z[1], s)):
                raise _not_scaled(projection.name, "its input", name)
        elif projection.ffn.layer in live.run:
            raise StateError(
                f"{projection.name} ran, but its down-projection was not called; the model cannot be steered here"
            )
    for layer, experts in layout.experts.items():
        if layer in live.run:
            _verify_experts(experts, watched[layer], scale_row(profile, Ffn(layer, EXPERTS)), name)
    with _each_row_alone(model, layout):
        plain = forward()
        with tasks([None, name]):
            steered = forward()
    if not torch.equal(steered[0], plain[0]):
        raise StateError(f"a row without a task differs from the unsteered model beside {name!r}; detach()")
    change = (steered[1].float() - plain[1].float()).abs().max().item()
    groups = profile.ffns.groups.items()
    verified_neurons = sum(len(entries.neurons) for ffn, entries in groups if ffn.layer in live.run)
    return VerifiedProfile(name, profile.short_digest, verified_neurons, change)


def _not_scaled(part: str, what: str, name: str) -> StateError:
    return StateError(f"{part}: {what} is not scaled as {name!r} says; detach() and steer again")


def _verify_experts(experts: Experts, calls: Sequence[tuple[Tensor, ...]], scales: Tensor, name: str) -> None:
    """Check the rows of a layer's experts: half of them are the second row's, and these are scaled as `scales` say.

    Each call has the rows' places (slot · experts + expert), and their activations before and after the scaling.
    """
    if not calls:
        raise StateError(f"{experts.name} ran, but its activation was not called; the model cannot be steered here")
    places, before, after = (torch.cat(parts) for parts in zip(*calls, strict=True))
    steered = places >= experts.count
    of_experts = scales.view(experts.count, -1).to(before.device)[places % experts.count]
    expected = torch.where(steered[:, None], scale(before, of_experts), before)
    if 2 * int(steered.sum()) != len(places) or not torch.equal(after, expected):
        raise _not_scaled(experts.name, "what its experts compute", name)


@contextmanager
def _watched(injection: Injection) -> Generator[dict[int, list[tuple[Tensor, ...]]]]:
    """Keep, within the block, what each layer's experts compute, by the layer's index: `_verify_experts`' calls."""
    calls: dict[int, list[tuple[Tensor, ...]]] = {layer: [] for layer in injection.experts_hooks}

    def keep(layer: int, *tensors: Tensor) -> None:
        calls[layer].append(tuple(tensor.detach().clone() for tensor in tensors))

    try:
        for layer, hook in injection.experts_hooks.items():
            hook.watch = functools.partial(keep, layer)
        yield calls
    finally:
        for hook in injection.experts_hooks.values():
            hook.watch = None


@contextmanager
def _each_row_alone(model: Any, layout: Layout) -> Generator[None]:
    """Within the block, experts multiply each token by itself.

    Where they multiply all tokens of an expert at once, the last bits of a row depend on how many others have chosen
    the same expert, and steered rows may choose others.
    """
    if not any(experts.by_interface for experts in layout.experts.values()):
        yield
        return
    present = model.get_experts_implementation()
    model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_experts_implementation(present)


@contextmanager
def _layers_run(layout: Layout) -> Generator[set[int]]:
    """Collect, within the block, the indices of the layers that are called or whose down-projection is."""
    run: set[int] = set()
    with ExitStack() as stack:
        for layer in layout.layers:
            modules = (
                [layer.module, *(projection.down_proj for projection in layer.projections)] if layer.widths else []
            )
            for module in modules:
                handle = module.register_forward_pre_hook(lambda *_, index=layer.index: run.add(index))
                stack.callback(handle.remove)
        yield run


@contextmanager
def _recorded(layout: Layout, *, first: bool) -> Generator[dict[Ffn, Tensor]]:
    """Keep, within the block, the latest input of each down-projection, by its FFN.

    With `first`, the input is taken before all other hooks, else after them.
    """
    inputs: dict[Ffn, Tensor] = {}

    def keep(ffn: Ffn, _module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs[ffn] = args[0].detach().clone()

    with ExitStack() as stack:
        for projection in layout.projections:
            hook = functools.partial(keep, projection.ffn)
            stack.callback(projection.down_proj.register_forward_pre_hook(hook, prepend=first).remove)
        yield inputs


def _plain_forward(model: nn.Module) -> Callable[[], Tensor]:
    """A function that runs the model on a few plain tokens, or if it refuses these alone, on tokens and a blank image.

    Raises StateError if it runs on neither.
    """
    text = _test_text(model)
    try:
        _logits(model, text)
    except (TypeError, ValueError) as error:  # raised by models that need more
        refusal = error
    else:
        return functools.partial(_logits, model, text)
    for image in _blank_images(model):
        try:
            _logits(model, text | image)
        except (TypeError, ValueError, AttributeError, RuntimeError):  # the next one may have the right shape
            continue
        return functools.partial(_logits, model, text | image)
    raise StateError(
        f"{type(model).__name__} does not run on a few plain tokens ({refusal}); give verify() two rows of its usual "
        "inputs: verify(**inputs)"
    ) from refusal


def _test_text(model: nn.Module) -> dict[str, Tensor]:
    """Two rows of test tokens, under every name for token ids that the model must be given."""
    ids = _test_tokens(model).repeat(2, 1)
    required = [
        name
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is inspect.Parameter.empty and name.endswith("input_ids")
    ]
    if getattr(model.config, "is_encoder_decoder", False):
        required.append("decoder_input_ids")
    return dict.fromkeys(["input_ids", *required], ids)


def _blank_images(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yields an image for each of two rows, in the shapes in which models take them."""
    vision_config: Any = getattr(model.config, "vision_config", None)
    size = getattr(vision_config, "image_size", None)
    if isinstance(size, int):
        device: Any = model.device
        dtype: Any = model.dtype
        image = torch.zeros(2, 3, size, size, device=device, dtype=dtype)
        yield {"pixel_values": image}
        image_lists = {"pixel_values": image[:, None]}  # one image in a list for each row
        if "image_attention_mask" in inspect.signature(model.forward).parameters:  # Idefics: seen by every token
            image_lists["image_attention_mask"] = torch.ones(2, _TOKENS, 1, device=device, dtype=torch.long)
        yield image_lists


def _logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


def _test_tokens(model: nn.Module) -> Tensor:
    """Up to four plain token ids `[1, tokens]`: none that stands for an image, or for anything else special."""
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    special = {value for part in (config, text) for value in vars(part).values() if isinstance(value, int)}
    plain = [token for token in range(text.vocab_size) if token not in special][:_TOKENS]
    device: Any = model.device
    return torch.tensor([plain], device=device)
