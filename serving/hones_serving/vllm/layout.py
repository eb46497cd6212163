"""Where vLLM's models keep what steering needs: each decoder layer's down-projection, and who the model is.

vLLM has its own code for most architectures, which names parts as transformers does or as the first releases of a model
did, and runs the others by transformers' code with its own linear layers in it. Both are searched by the names of
`hones_steer.layout`. Only the language model is looked at: a vision tower's MLPs may look just like an FFN.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.models.utils import PPMissingLayer

from hones_steer.errors import LayoutError
from hones_steer.layout import DOWN_PROJECTIONS, FINAL_NORMS, LAYER_LISTS, base_layer
from hones_steer.profile import ModelIdentity, sketch_of

# Modules on the way from a language model to its decoder stack, outermost first.
_WRAPPERS = ("model", "transformer", "text_model", "language_model", "decoder", "backbone", "encoder")
_NAMES = {path.rpartition(".")[2] for path in DOWN_PROJECTIONS}


@dataclass(frozen=True, eq=False)
class Decoder:
    """A model's text decoder: its identity, and the down-projection of each layer of this worker, in order.

    A worker has all layers, or those of its pipeline stage; only the last stage has the final norm, and with it the
    identity's sketch. `shard` is the range of neurons that this worker holds: all of them, or its tensor-parallel
    rank's share.
    """

    identity: ModelIdentity
    down_projections: Mapping[int, nn.Module]
    shard: slice


def find_decoder(model: nn.Module, model_config: Any) -> Decoder:
    """Find the parts of a model that vLLM has loaded; `model_config` is vLLM's ModelConfig.

    Raises:
        LayoutError: a part is not where vLLM's models keep it, or layers differ; the message names it.
    """
    stack, layers = _decoder_stack(model)
    hidden = model_config.hf_text_config.hidden_size
    down_projections = {
        index: _down_projection(f"layer {index} of {type(stack).__name__}", layer, hidden)
        for index, layer in enumerate(layers)
        if not isinstance(layer, PPMissingLayer)  # it is in another pipeline stage
    }
    if not down_projections:
        raise LayoutError(
            f"this pipeline stage has none of the {len(layers)} layers of {type(stack).__name__}; "
            "start vLLM with fewer stages (--pipeline-parallel-size)"
        )
    width, shard = _shard(down_projections.values())
    norm = next((norm for name in FINAL_NORMS if isinstance(norm := getattr(stack, name, None), nn.Module)), None)
    identity = ModelIdentity(
        name="",
        revision=None,
        model_type=model_config.hf_config.model_type,
        num_layers=len(layers),
        intermediate_size=width,
        hidden_size=hidden,
        sketch=sketch_of(norm, hidden),
    )
    return Decoder(identity, down_projections, shard)


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


def _down_projection(name: str, layer: nn.Module, hidden: int) -> nn.Module:
    """The one linear module outside attention that has a down-projection's name; errors call the layer `name`."""
    candidates: dict[str, nn.Module] = {
        path: module
        for path, module in layer.named_modules()
        if path.rpartition(".")[2] in _NAMES
        and "attn" not in path
        and "attention" not in path
        and isinstance(linear := base_layer(module), LinearBase)
        and linear.output_size == hidden
    }
    if len(candidates) != 1:
        raise LayoutError(
            f"{name} ({type(layer).__name__}) has not one FFN with a down-projection that hones-steer recognizes "
            f"(found: {', '.join(candidates) or 'none'}); hones-steer supports no such layer in vLLM in this version"
        )
    return next(iter(candidates.values()))


def _shard(down_projections: Collection[nn.Module]) -> tuple[int, slice]:
    """(neurons of an FFN in all, range of those whose activations reach this worker's down-projections)."""
    shards = set()
    for module in down_projections:
        linear: Any = base_layer(module)
        width, start = linear.input_size, 0
        if getattr(linear, "input_is_parallel", False):  # row-parallel; others are given all neurons
            width = linear.input_size_per_partition
            start = linear.tp_rank * width
        shards.add((linear.input_size, start, width))
    if len(shards) != 1:
        raise LayoutError(
            f"the FFNs' widths (neurons in all, first one here, neurons here) differ between layers: {sorted(shards)}; "
            "hones-steer supports only models whose layers are alike"
        )
    total, start, width = shards.pop()
    return total, slice(start, start + width)
