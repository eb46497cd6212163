"""Comparators of learned factors: adapters that PEFT trains on the same FFNs, with the same loss (docs/methods.md).

- "ia3": a factor for every FFN neuron, at the down-projections' input (IA3, arXiv 2205.05638).
- "lora": a rank-8 update of every linear of the FFNs (LoRA, arXiv 2106.09685), PEFT's other defaults kept.

The model belongs to the whole process, so an adapter is in it only inside a block of `adapted`.
"""

import hashlib
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save
from torch import nn

from hones_offline.learning.factors import FitSettings, checkpointed, cosine, losses_of, order_of
from hones_offline.learning.loss import EpochLoss, Losses
from hones_offline.running.decoder import TextDecoder
from hones_offline.running.execution import Execution
from hones_offline.running.progress import progress_bar
from hones_offline.running.prompts import Prepared
from hones_offline.running.run_folder import Arrays, run_settings
from hones_steer.errors import DataError, LayoutError
from hones_steer.export.adapters import is_conv1d, peft_package
from hones_steer.layout import DecoderLayer, Layout, base_layer, is_transposed, linear_shape, unwrap

LORA_RANK = 8

Weights = Mapping[str, npt.NDArray[np.float32]]
"""An adapter's tensors, by their parameters' names in the model."""


@dataclass(frozen=True)
class AdapterKind:
    """A kind of adapter: its title, the modules of a layer that it wraps, PEFT's configuration, and its strength."""

    title: str
    modules: Callable[[DecoderLayer], list[nn.Module]]
    config: Callable[[Any, str, bool], Any]
    """(package peft, pattern of the modules' names, whether their weights are [inputs, outputs]) -> configuration."""
    strengthened: Callable[[str, npt.NDArray[np.float32], float], npt.NDArray[np.float32]]
    """(name, tensor, strength) -> the tensor with which the adapter changes the model so many times as much."""


def _ia3_config(peft: Any, pattern: str, transposed: bool) -> Any:
    return peft.IA3Config(target_modules=pattern, feedforward_modules=pattern, fan_in_fan_out=transposed)


def _lora_config(peft: Any, pattern: str, transposed: bool) -> Any:
    return peft.LoraConfig(r=LORA_RANK, target_modules=pattern, fan_in_fan_out=transposed)


def ffn_linears(layer: DecoderLayer) -> list[nn.Module]:
    """The linears of a layer's FFN, the down-projection last: all that map hidden to I or 2·I beside it."""
    shape = linear_shape(layer.down_proj)
    assert shape is not None  # `find_layout` has checked it
    width, hidden = shape
    beside = next((list(m.children()) for m in layer.module.modules() if layer.down_proj in m.children()), [])
    up = [module for module in beside if linear_shape(module) in ((hidden, width), (hidden, 2 * width))]
    return [*(module for module in up if module is not layer.down_proj), layer.down_proj]


ADAPTERS: Mapping[str, AdapterKind] = MappingProxyType(
    {
        "ia3": AdapterKind(
            "IA3",
            lambda layer: [layer.down_proj],
            _ia3_config,
            lambda _, tensor, strength: 1 + np.float32(strength) * (tensor - 1),
        ),
        "lora": AdapterKind(
            f"LoRA {LORA_RANK}",
            ffn_linears,
            _lora_config,
            lambda name, tensor, strength: tensor * np.float32(strength) if ".lora_B." in name else tensor,
        ),
    }
)
"""Every kind, by name."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """A trained adapter: its kind, its tensors, how they came about. `adapter * 0.5` changes the model half as much."""

    kind: str
    weights: Weights
    method: Mapping[str, Any] = field(default_factory=dict)

    def __mul__(self, strength: float) -> "Adapter":
        """The adapter at a strength, 1 being as trained and 0 without effect."""
        strengthened = ADAPTERS[self.kind].strengthened
        return replace(self, weights={name: strengthened(name, w, strength) for name, w in self.weights.items()})

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(tensor.size for tensor in self.weights.values())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the tensors, in hex."""
        return hashlib.sha256(self.serialized).hexdigest()

    @property
    def serialized(self) -> bytes:
        """The tensors as a safetensors file; its length is the adapter's size in bytes."""
        return save({name: np.ascontiguousarray(tensor) for name, tensor in self.weights.items()})


def check_adapters(decoder: TextDecoder, kinds: Iterable[str]) -> None:
    """Raise what training adapters of these kinds would raise, before anything is trained: see `adapted`."""
    for kind in kinds:
        with _injected(decoder, kind):
            pass


@contextmanager
def adapted(prepared: Prepared, adapter: Adapter) -> Iterator[Prepared]:
    """Within the block, the model has the adapter; yields the examples with a decoder that knows it.

    Afterwards the model is what it was, bit for bit.

    Raises:
        DataError: peft is not installed, or the model has an adapter already.
        LayoutError: PEFT cannot wrap the FFNs' linears.
    """
    with _injected(prepared.decoder, adapter.kind) as (decoder, parameters):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(torch.tensor(adapter.weights[name]))
        yield replace(prepared, decoder=decoder)


@contextmanager
def _injected(decoder: TextDecoder, kind: str) -> Iterator[tuple[TextDecoder, dict[str, nn.Parameter]]]:
    """Within the block, the model has a new adapter, whose float32 parameters alone are trainable."""
    peft, model = peft_package(), unwrap(decoder.model)
    paths = {id(module): name for name, module in model.named_modules()}
    targets = _targets(decoder.layout, kind)
    if hasattr(model, "peft_config"):
        raise DataError("the model has a PEFT adapter already; merge or unload it before others are trained beside it")
    names = [paths[id(module)] for module in targets]
    pattern = "|".join(name.replace(".", r"\.") for name in names)
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        peft.inject_adapter_in_model(ADAPTERS[kind].config(peft, pattern, is_conv1d(decoder.layout)), model)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for parameter in parameters.values():
            parameter.data = parameter.data.float()
        yield TextDecoder(model), parameters
    finally:
        for name, module in zip(names, targets, strict=True):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
        if hasattr(model, "peft_config"):
            del model.peft_config
        for parameter, required in trainable:
            parameter.requires_grad_(required)


def _targets(layout: Layout, kind: str) -> list[nn.Module]:
    """The modules that an adapter wraps; raises LayoutError, naming the layer, for one that PEFT may not know."""
    targets = []
    for experts in layout.experts.values():
        raise LayoutError(
            f"{experts.name}: PEFT wraps no experts that are stacked in parameters, so that no {ADAPTERS[kind].title} "
            "adapter is trained on them; leave this comparator out"
        )
    for layer in layout.with_ffn:
        for module in ADAPTERS[kind].modules(layer):
            if base_layer(module) is not module:
                raise DataError(f"{layer.name} has a PEFT adapter already; merge or unload it first")
            if not (isinstance(module, nn.Linear) or is_transposed(module)):
                raise LayoutError(
                    f"{layer.name}: its {type(module).__name__} is no plain linear, so that no {ADAPTERS[kind].title} "
                    "adapter is trained on it; load the model without quantization, or leave this comparator out"
                )
            targets.append(module)
    return targets


def adapter_run_settings(prepared: Prepared, kind: str, settings: FitSettings) -> dict[str, Any]:
    """Everything that decides the bytes of a trained adapter."""
    return {"stage": "adapter", **run_settings(prepared), "kind": kind, **asdict(settings)}


def trained_by_epoch(
    prepared: Prepared,
    kind: str,
    settings: FitSettings,
    execution: Execution,
    *,
    losses: Losses | None = None,
) -> Generator[tuple[int, Adapter]]:
    """Train an adapter on a task's examples, giving (number, from 1; adapter) after each epoch.

    An epoch is trained when its adapter is asked for. The loss, batches, schedule and optimizer are those of
    `factors.learned_by_epoch`, without the bound and the penalty. Each epoch's tensors, with the optimizer's moments,
    are a step of the execution's run folder. `losses` is what `factors.losses_of` gives, made once for several runs.

    Raises:
        DataError, LayoutError: as `adapted`.
    """
    trainer = _Trainer(prepared, kind, settings, losses or losses_of(prepared, settings))
    state: Arrays = execution.arrays("epoch-00", trainer.start)
    with progress_bar(f"{prepared.task.name}: {kind}", settings.epochs, show=execution.shows_progress) as bar:
        for epoch in range(settings.epochs):
            state = execution.arrays(f"epoch-{epoch + 1:02d}", partial(trainer.epoch, state, epoch))
            bar.update(1)
            weights = {name: x for name, x in state.items() if not name.startswith(_MOMENTS)}
            yield epoch + 1, Adapter(kind, weights, {"name": kind, "epoch": epoch + 1, **asdict(settings)})


_MOMENTS = ("exp_avg:", "exp_avg_sq:")


class _Trainer:
    """The training as a function from an epoch's state to the next: {name: tensor} with the moments of each."""

    def __init__(self, prepared: Prepared, kind: str, settings: FitSettings, losses: Losses) -> None:
        self.prepared, self.kind, self.settings, self.losses = prepared, kind, settings, losses
        self.size = settings.batch_size * settings.accumulation_steps
        self.steps = math.ceil(len(prepared) / self.size)  # per epoch

    def start(self) -> Arrays:
        """PEFT's initial tensors, drawn by the seed."""
        with torch.random.fork_rng():
            torch.manual_seed(self.settings.seed)
            with _injected(self.prepared.decoder, self.kind) as (_, parameters):
                tensors = {name: parameter.detach().cpu().numpy().copy() for name, parameter in parameters.items()}
        zeros = {f"{moment}{name}": np.zeros_like(x) for moment in _MOMENTS for name, x in tensors.items()}
        return {**tensors, **zeros}

    def epoch(self, state: Arrays, epoch: int) -> Arrays:
        """The state after an epoch; the same state and epoch give the same bytes."""
        seed = self.settings.seed + epoch
        loss = self.losses.of_epoch(seed)
        if loss.keeps_original:
            loss.original([0])  # those of all examples are computed now, while the model has no adapter
        with (
            # In this order: PEFT leaves hooks in a model that checkpoints already.
            _injected(self.prepared.decoder, self.kind) as (decoder, parameters),
            checkpointed(decoder, self.settings.gradient_checkpointing),
        ):
            inside = losses_of(replace(self.prepared, decoder=decoder), self.settings).of_epoch(seed)
            optimizer = torch.optim.AdamW(parameters.values(), lr=self.settings.lr, weight_decay=0.0)
            for name, parameter in parameters.items():
                parameter.data.copy_(torch.tensor(state[name]))
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(epoch * self.steps)),
                    **{
                        moment.rstrip(":"): torch.tensor(state[f"{moment}{name}"]).to(parameter.device)
                        for moment in _MOMENTS
                    },
                }
            order = order_of(len(self.prepared), seed)
            for step in range(self.steps):
                optimizer.param_groups[0]["lr"] = self.settings.lr * cosine(
                    (epoch * self.steps + step) / (self.settings.epochs * self.steps)
                )
                chosen = order[step * self.size : (step + 1) * self.size]
                for start in range(0, len(chosen), self.settings.batch_size):
                    batch = chosen[start : start + self.settings.batch_size]
                    self._accumulate(loss, inside, batch, share=len(batch) / len(chosen))
                torch.nn.utils.clip_grad_norm_(parameters.values(), self.settings.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            result = {name: parameter.detach().cpu().numpy().copy() for name, parameter in parameters.items()}
            for name, parameter in parameters.items():
                for moment in _MOMENTS:
                    result[f"{moment}{name}"] = optimizer.state[parameter][moment.rstrip(":")].cpu().numpy()
        return result

    def _accumulate(self, loss: EpochLoss, inside: EpochLoss, batch: Sequence[int], share: float) -> None:
        """Add share · the gradient of the loss of these examples; `inside` runs the model with its adapter."""
        if loss.keeps_original:
            original = loss.original(batch)
        else:
            with _switched_off(inside.prepared.decoder):
                original = inside.original(batch)
        with torch.enable_grad():
            (inside(batch, original) * share).backward()


@contextmanager
def _switched_off(decoder: TextDecoder) -> Iterator[None]:
    """Within the block, the model runs as if it had no adapter."""
    layers = [m for m in decoder.model.modules() if base_layer(m) is not m]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
