"""Where vLLM's models keep what steering needs: each decoder layer's down-projection, and who the model is.

vLLM has its own code for most architectures, which names parts as transformers does or as the first releases of a model
did, and runs the others by transformers' code with its own linear layers in it. Both are searched by the names of
`hones_steer.layout`. Only the language model is looked at: a vision tower's MLPs may look just like an FFN.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed
from torch import nn
from vllm.distributed.parallel_state import get_pp_group
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.models.utils import PPMissingLayer

from hones_serving.vllm.experts import Experts, find_experts
from hones_steer.errors import LayoutError
from hones_steer.ffns import DENSE, EXPERTS, SHARED, Ffn, runs_of
from hones_steer.layout import DOWN_PROJECTIONS, FINAL_NORMS, LAYER_LISTS, base_layer
from hones_steer.profile import ModelIdentity, sketch_of

# Modules on the way from a language model to its decoder stack, outermost first.
_WRAPPERS = ("model", "transformer", "text_model", "language_model", "decoder", "backbone", "encoder")
_NAMES = {path.rpartition(".")[2] for path in DOWN_PROJECTIONS}

Sketch = tuple[float, ...] | None  # ModelIdentity's


@dataclass(frozen=True, eq=False)
class Projection:
    """A down-projection that is a linear module: of a dense FFN or a shared expert.

    The FFN has `width` neurons in all. The activations of those in `shard` reach this worker: of all of them, or of its
    tensor-parallel rank's share.
    """

    module: nn.Module
    width: int
    shard: slice


@dataclass(frozen=True, eq=False)
class Decoder:
    """A model's text decoder: its identity, and the down-projection of each dense FFN and shared expert, by layers.

    `experts` has the routed experts of each layer that has some, by the layer's number. Layers are those of this
    worker's pipeline stage; the identity is the whole model's.
    """

    identity: ModelIdentity
    projections: Mapping[Ffn, Projection]
    experts: Mapping[int, Experts]


def find_decoder(model: nn.Module, model_config: Any) -> Decoder:
    """Find the parts of a model that vLLM has loaded; `model_config` is vLLM's ModelConfig.

    All pipeline stages must call this at once: they tell each other what they have.

    Raises:
        LayoutError: a part is not where vLLM's models keep it; the message names it.
    """
    stack, layers = _decoder_stack(model)
    hidden = model_config.hf_text_config.hidden_size
    projections: dict[Ffn, Projection] = {}
    experts: dict[int, Experts] = {}
    widths: dict[int, dict[str, int]] = {}
    for index, layer in enumerate(layers):
        if isinstance(layer, PPMissingLayer):  # another stage has it
            continue
        name = f"layer {index} of {type(stack).__name__}"
        routed = find_experts(name, layer)
        found = {part: _projection(module) for part, module in _down_projections(name, layer, hidden, routed).items()}
        projections |= {Ffn(index, part): projection for part, projection in found.items()}
        widths[index] = {part: projection.width for part, projection in found.items()}
        if routed is not None:
            experts[index] = routed
            widths[index] |= {EXPERTS: routed.count, "expert_width": routed.width}
    norm = next((norm for name in FINAL_NORMS if isinstance(norm := getattr(stack, name, None), nn.Module)), None)
    widths, sketch = _of_all_stages(widths, sketch_of(norm, hidden))
    alike = all(of == {DENSE: widths[0].get(DENSE)} for of in widths.values())
    identity = ModelIdentity(
        name="",
        revision=None,
        model_type=model_config.hf_config.model_type,
        num_layers=len(layers),
        intermediate_size=widths[0][DENSE] if alike else None,
        hidden_size=hidden,
        sketch=sketch,
        ffns=None if alike else runs_of(widths[index] for index in range(len(layers))),
    )
    return Decoder(identity, projections, experts)


def _of_all_stages(widths: dict[int, dict[str, int]], sketch: Sketch) -> tuple[dict[int, dict[str, int]], Sketch]:
    """The widths of all layers, and the sketch, which only the last pipeline stage can take: it has the final norm."""
    group = get_pp_group()
    stages: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(stages, (widths, sketch), group=group.cpu_group)
    of_layers, sketches = zip(*stages, strict=True)
    return dict(ChainMap(*of_layers)), next((taken for taken in sketches if taken is not None), None)


def _decoder_stack(model: Any) -> tuple[nn.Module, nn.ModuleList]:
    """The module that has the list of decoder layers and the final norm, and this list."""
    stack = model.get_language_model() if hasattr(model, "get_language_model") else model
    while stack is not None:
        for name in LAYER_LISTS:
            if isinstance(layers := getattr(stack, name, None), nn.ModuleList):
                return stack, layers
        stack = next((part for name in _WRAPPERS if isinstance(part := getattr(stack, name, None), nn.Module)), None)
    raise LayoutError(
        f"{type(model).__name__} keeps its decoder layers where hones-steer cannot find them in vLLM; "
        "hones-steer supports no such model in vLLM in this version"
    )


def _down_projections(name: str, layer: nn.Module, hidden: int, experts: Experts | None) -> dict[str, nn.Module]:
    """The linear modules outside attention that have a down-projection's name: "dense", and "shared" beside `experts`.

    Errors call the layer `name`.
    """
    candidates: dict[str, nn.Module] = {
        path: module
        for path, module in layer.named_modules()
        if path.rpartition(".")[2] in _NAMES
        and "attn" not in path
        and "attention" not in path
        and isinstance(linear := base_layer(module), LinearBase)
        and linear.output_size == hidden
    }
    parts = {SHARED if experts is not None and "shared" in path else DENSE: path for path in candidates}
    if len(parts) != len(candidates) or not (parts or experts):
        raise LayoutError(
            f"{name} ({type(layer).__name__}) has not one FFN with a down-projection that hones-steer recognizes "
            f"(found: {', '.join(candidates) or 'none'}); hones-steer supports no such layer in vLLM in this version"
        )
    return {part: candidates[path] for part, path in parts.items()}


def _projection(module: nn.Module) -> Projection:
    linear: Any = base_layer(module)
    width, start = linear.input_size, 0
    if getattr(linear, "input_is_parallel", False):  # row-parallel; others are given all neurons
        width = linear.input_size_per_partition
        start = linear.tp_rank * width
    return Projection(module, linear.input_size, slice(start, start + width))
