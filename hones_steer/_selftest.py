"""The self-test behind `Steering.verify`: does the live model do what its profiles say?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hones_steer.errors import StateError
from hones_steer.injection import Injection, scale
from hones_steer.layout import Layout, find_layout
from hones_steer.profile import Profile
from hones_steer.slots import scale_row

_TOKENS = 4


@dataclass(frozen=True)
class VerifiedProfile:
    """One profile's result: how far it moves the logits of the test tokens at most."""

    name: str
    short_digest: str
    num_neurons: int
    largest_logit_change: float


@dataclass(frozen=True)
class Verification:
    """What `Steering.verify` has found to be right."""

    model_type: str
    num_layers: int
    intermediate_size: int
    profiles: tuple[VerifiedProfile, ...]

    def lines(self) -> list[str]:
        """The report for a person."""
        width = f"{self.num_layers} layers of {self.intermediate_size} neurons"
        return [
            f"{self.model_type}: {width}, every down-projection is hooked",
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
) -> Verification:
    """Run test tokens through the model, each profile beside an unsteered row, and compare every layer's input."""
    if model.training:
        raise StateError("the model is in training mode, where dropout hides differences; call model.eval() first")
    present = {layer.down_proj for layer in find_layout(model).layers}
    for layer in layout.layers:
        if layer.down_proj not in present or not injection.is_attached_to(layer.down_proj):
            raise StateError(f"{layer.name}: its down-projection was replaced after steer(); detach() and steer again")
    return Verification(
        layout.model_type,
        len(layout.layers),
        layout.intermediate_size,
        tuple(_verify_profile(model, layout, name, profile, tasks) for name, profile in profiles.items()),
    )


def _verify_profile(
    model: nn.Module,
    layout: Layout,
    name: str,
    profile: Profile,
    tasks: Callable[[Sequence[str | None]], AbstractContextManager[None]],
) -> VerifiedProfile:
    rows = [None, name]
    ids = _test_tokens(model).repeat(len(rows), 1)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        plain = _logits(model, ids)
        with _recorded(layout, first=True) as before, _recorded(layout, first=False) as after, tasks(rows):
            steered = _logits(model, ids)
    for layer in layout.layers:
        z, scaled = before.get(layer.index), after.get(layer.index)
        if z is None or scaled is None:
            raise StateError(f"{layer.name}: its down-projection was not called; the model cannot be steered here")
        s = scale_row(profile, layer.index, layout.intermediate_size).to(z.device)
        z, scaled = z.view(len(rows), -1, z.shape[-1]), scaled.view(len(rows), -1, z.shape[-1])
        if not torch.equal(scaled[0], z[0]) or not torch.equal(scaled[1], scale(z[1], s)):
            raise StateError(f"{layer.name}: its input is not scaled as {name!r} says; detach() and steer again")
    if not torch.equal(steered[0], plain[0]):
        raise StateError(f"a row without a task differs from the unsteered model beside {name!r}; detach()")
    change = (steered[1].float() - plain[1].float()).abs().max().item()
    return VerifiedProfile(name, profile.short_digest, profile.num_neurons, change)


@contextmanager
def _recorded(layout: Layout, *, first: bool) -> Generator[dict[int, Tensor]]:
    """Within the block, keeps each down-projection's input by layer: before all other hooks, or after them."""
    inputs: dict[int, Tensor] = {}

    def keep(index: int, _module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs[index] = args[0].detach().clone()

    with ExitStack() as stack:
        for layer in layout.layers:
            hook = functools.partial(keep, layer.index)
            stack.callback(layer.down_proj.register_forward_pre_hook(hook, prepend=first).remove)
        yield inputs


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _test_tokens(model: nn.Module) -> Tensor:
    """A few plain token ids `[1, tokens]`: none that stands for an image, or for anything else special."""
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    special = {value for part in (config, text) for value in vars(part).values() if isinstance(value, int)}
    plain = [token for token in range(text.vocab_size) if token not in special][:_TOKENS]
    device: Any = model.device
    return torch.tensor([plain], device=device)
