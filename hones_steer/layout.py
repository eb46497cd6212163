"""Layout of a model: where its decoder layers, FFN down-projections and attention heads are.

Steering needs one thing per decoder layer: the FFN's down-projection, whose *input* is scaled. In a mixture of experts
these are the routed experts (`experts.py`) and the down-projection of the shared one. Attribution also needs the
attention output projection, the head count and the unembedding; if one of them is not recognized, `steer` still works,
and `Layout.require_attribution()` says what is missing.

A model is recognized by its structure. To add an architecture, add its names to the tuples below (and a tiny config to
`tests/tiny_models.py`); for one that is not part of this package, call `register_layout`. Only the text decoder is ever
looked at, so a vision tower's MLPs are never touched.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hones_steer.errors import LayoutError
from hones_steer.experts import Experts, find_experts
from hones_steer.ffns import DENSE, EXPERTS, SHARED, Ffn

# Dotted names inside the decoder or inside one decoder layer, most common first.
LAYER_LISTS = ("layers", "h", "blocks", "layer", "block", "encoder.layer")
DOWN_PROJECTIONS = (
    "mlp.down_proj",  # Llama, Qwen, Mistral, Gemma, Phi-3, ...
    "mlp.c_proj",  # GPT-2, GPT-BigCode, StarCoder2, GPT-Neo
    "fc2",  # OPT, BART, XGLM
    "mlp.fc2",  # Phi
    "mlp.dense_4h_to_h",  # GPT-NeoX, BLOOM, Falcon
    "mlp.fc_out",  # GPT-J, CodeGen
    "ffn.down_proj",  # MPT
    "feed_forward.down_proj",
    "feed_forward.w2",  # LFM2, InternLM2
    "feed_forward.value",  # RWKV
    "output.dense",  # GIT, BERT
)
_SHARED_DOWN_PROJECTIONS = {path.rpartition(".")[2] for path in DOWN_PROJECTIONS} | {"output_linear"}
# Of the projections hidden -> I of a gated FFN, the one that goes through the activation; and projections hidden -> 2 I
# that hold both, the gate first.
_GATES = ("gate_proj", "w1")
_FUSED_GATES = ("gate_up_proj", "input_linear", "Wi")
_ATTENTION_OUTPUTS = (
    "self_attn.o_proj",
    "attn.c_proj",
    "self_attn.out_proj",
    "attn.out_proj",
    "attn.attention.out_proj",
    "self_attn.dense",
    "attention.dense",
    "self_attention.dense",
    "self_attn.c_proj",
    "mixer.o_proj",  # Nemotron-H
    "attn.Wo",  # ModernBERT
    "temporal_block.o_proj",  # RecurrentGemma
    "attention.output.dense",  # GIT, BERT
)
# Names in `config.layer_types` of layers that keep nothing but keys and values from one token to the next, or nothing.
_PLAIN_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention", "mlp")
_INDEXED = "indexed_attention"
FINAL_NORMS = (
    "norm",
    "ln_f",
    "final_layer_norm",
    "final_layernorm",
    "norm_f",
    "embedding_norm",  # LFM2, whose final norm it is in spite of its name
    "layer_norm",  # XGLM, BioGPT
)


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """A decoder layer of the text model, the `index`-th from 0.

    `name` is its dotted path in the model (without PEFT or `torch.compile` wrappers). `ffn_out` is the dense FFN's
    down-projection, None in a layer that has no such FFN beside others that have one, or has experts instead.
    `shared_out` is that of the shared expert beside the routed `experts`. `attn_out`, the attention's output
    projection, takes the concatenated heads, `[..., num_heads * head_dim]`, as its input; it and `num_heads` are None
    where there is no attention or it was not recognized.
    """

    index: int
    name: str
    module: nn.Module
    ffn_out: nn.Module | None
    attn_out: nn.Module | None
    num_heads: int | None
    shared_out: nn.Module | None = None
    experts: Experts | None = None

    @property
    def has_ffn(self) -> bool:
        """Whether the layer has a dense FFN."""
        return self.ffn_out is not None

    @property
    def ffn(self) -> Ffn:
        """The address of the layer's dense FFN."""
        return Ffn(self.index, DENSE)

    @property
    def width(self) -> int:
        """Number of neurons of the layer's dense FFN; 0 if it has none."""
        return _width(self.ffn_out)

    @property
    def widths(self) -> dict[str, int]:
        """The widths of all its FFNs, as fields of `ffns.FfnRun`; those that it does not have are left out."""
        widths = {DENSE: self.width, SHARED: _width(self.shared_out)}
        if self.experts is not None:
            widths |= {EXPERTS: self.experts.count, "expert_width": self.experts.width}
        return {name: width for name, width in widths.items() if width}

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The down-projections that are linear layers: of the dense FFN and the shared expert, those there are."""
        return tuple(
            Projection(Ffn(self.index, part), self.name if part == DENSE else f"{self.name}'s shared expert", module)
            for part, module in ((DENSE, self.ffn_out), (SHARED, self.shared_out))
            if module is not None
        )

    @property
    def shared_gate(self) -> tuple[str, nn.Module] | None:
        """Path and module of the projection to the number that weighs the shared expert's output, if there is one."""
        inside = (at for at in self.module.named_modules() if "shared" in at[0]) if self.shared_out else ()
        return next((at for at in inside if linear_shape(at[1]) is not None and _linear_outputs(at[1]) == 1), None)

    @property
    def down_proj(self) -> nn.Module:
        """The dense FFN's down-projection; raises LayoutError, naming the layer, if it has no such FFN."""
        if self.ffn_out is None:
            what = "no dense FFN" if self.experts is not None else "no FFN"
            raise LayoutError(f"{self.name} ({type(self.module).__name__}) has {what}; choose neurons of other layers")
        return self.ffn_out


@dataclass(frozen=True, eq=False)
class Projection:
    """A down-projection that is a linear layer, of the dense FFN or the shared expert at `ffn`.

    `name` is for a person: the layer's, with what it is where that is not the dense FFN.
    """

    ffn: Ffn
    name: str
    down_proj: nn.Module

    @property
    def width(self) -> int:
        """Number of neurons of the FFN."""
        return _width(self.down_proj)


@dataclass(frozen=True, eq=False)
class Layout:
    """Parts of a model. `decoder` is the text decoder stack, which is called with `inputs_embeds`.

    `intermediate_size` is the width of all FFNs, None where their widths differ (`DecoderLayer.widths` has each) or
    there are experts.
    `final_norm` and `unembedding` are None where they were not recognized.
    """

    model_type: str
    decoder: nn.Module
    layers: tuple[DecoderLayer, ...]
    hidden_size: int
    intermediate_size: int | None
    final_norm: nn.Module | None
    unembedding: nn.Module | None

    @property
    def with_ffn(self) -> tuple[DecoderLayer, ...]:
        """The layers that have a dense FFN, in order; all of them but in some hybrids and mixtures of experts."""
        return tuple(layer for layer in self.layers if layer.has_ffn)

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The down-projections of all layers that are linear layers, those of routed experts not."""
        return tuple(projection for layer in self.layers for projection in layer.projections)

    @property
    def experts(self) -> dict[int, Experts]:
        """The routed experts of each layer that has some, by its index."""
        return {layer.index: layer.experts for layer in self.layers if layer.experts is not None}

    @property
    def num_without_ffn(self) -> int:
        """Number of layers that have no FFN of any kind."""
        return sum(not layer.widths for layer in self.layers)

    def require_ffns(self, ffns: Iterable[Ffn]) -> None:
        """Raise LayoutError, naming the first of these FFNs that the model does not have, if there is one."""
        for ffn in ffns:
            layer = self.layers[ffn.layer]
            if ffn.part == DENSE:
                _ = layer.down_proj
            elif (layer.shared_out if ffn.part == SHARED else layer.experts) is None:
                raise LayoutError(f"{ffn} is not in model type {self.model_type!r}: {layer.name} has no such FFN")

    def require_linear(self, ffns: Iterable[Ffn]) -> None:
        """Raise LayoutError if one of these FFNs is an expert, which has no linear layer to adapt, or there is none."""
        for ffn in ffns:
            if ffn.group.part == EXPERTS:
                raise LayoutError(
                    f"{ffn} of model type {self.model_type!r}: its down-projection is a part of a stacked parameter, "
                    "which no adapter scales by neuron; merge the profile into a checkpoint, or steer with it"
                )
        self.require_ffns(ffns)

    @property
    def keeps_only_keys_and_values(self) -> bool:
        """Whether layers keep nothing of earlier tokens but their keys and values, as far as the configuration says.

        Linear attention, state-space mixers and convolutions keep a state that cannot be cut at a token;
        cross-attention keeps keys and values of something else.
        """
        config = getattr(self.decoder, "config", None)
        kinds = getattr(config, "layer_types", None) or ()
        if getattr(self.decoder, "_is_stateful", False) or getattr(config, "cross_attention_layers", None):
            return False
        return all(kind in _PLAIN_ATTENTION for kind in kinds)

    @property
    def most_keys(self) -> int | None:
        """To how many tokens each layer attends at most, where an indexer chooses them one by one; else None.

        Its scores are sums over few heads of what a ReLU lets through, so many are equal, above all 0: which of these
        are chosen depends on the batch. With so many tokens or fewer there is nothing to choose.
        """
        config = getattr(self.decoder, "config", None)
        by_pools = hasattr(config, "index_kpool")
        return getattr(config, "index_topk", None) if self._chooses_keys and not by_pools else None

    @property
    def _chooses_keys(self) -> bool:
        return _INDEXED in (getattr(getattr(self.decoder, "config", None), "layer_types", None) or ())

    def require_attribution(self) -> None:
        """Raise LayoutError, naming the culprit, unless attribution can run the decoder and knows all its parts.

        A layer without attention has no heads to score; one layer with attention is needed, and the head count of each.
        What experts compute must be readable under the present experts implementation.
        """
        for experts in self.experts.values():
            experts.require_readable()
        if self._chooses_keys and self.most_keys is None:
            raise LayoutError(
                f"layers of model type {self.model_type!r} choose the keys that they attend to by an indexer, by pools "
                "of them or in another way in which no length is known at which they are all chosen; steering this "
                "model works, attributing on it does not"
            )
        if getattr(getattr(self.decoder, "config", None), "is_encoder_decoder", False):
            raise LayoutError(
                f"model type {self.model_type!r} is an encoder-decoder, whose prompts go to the encoder; attribution "
                "needs a decoder that reads prompt and answer; steering this model works, attributing on it does not"
            )
        with_attention = [layer for layer in self.layers if layer.attn_out is not None]
        modules = [item for layer in self.layers for item in layer.module.named_modules()]
        attention = any(_is_attention(path) or "Attention" in type(module).__name__ for path, module in modules)
        if not with_attention and not attention:
            raise LayoutError(
                f"no layer of model type {self.model_type!r} has attention heads, which attribution scores and guides "
                "by; steering this model works, attributing on it does not"
            )
        missing = [
            part
            for part, recognized in (
                ("attn_out", bool(with_attention)),
                ("num_heads", all(layer.num_heads is not None for layer in with_attention)),
                ("unembedding", self.unembedding is not None),
            )
            if not recognized
        ]
        if missing:
            raise LayoutError(
                f"attribution needs {', '.join(missing)}, not recognized in model type {self.model_type!r}; "
                f"name it with hones_steer.register_layout({self.model_type!r}, {missing[0]}=...)"
            )


@dataclass(frozen=True)
class _Names:
    """Dotted names of one registered model type; None means that the usual names are tried."""

    decoder: str | None = None
    layers: str | None = None
    down_proj: str | None = None
    attn_out: str | None = None
    num_heads: int | None = None
    final_norm: str | None = None
    unembedding: str | None = None


_registered: dict[str, _Names] = {}


def register_layout(
    model_type: str,
    *,
    decoder: str = "model",
    layers: str = "layers",
    down_proj: str = "mlp.down_proj",
    attn_out: str | None = None,
    num_heads: int | None = None,
    final_norm: str | None = None,
    unembedding: str | None = None,
) -> None:
    """Say where a model type (`config.model_type`) keeps its parts, for one that is not recognized.

    Dotted paths: `decoder` and `unembedding` inside the model, `layers` (a ModuleList) and `final_norm`
    inside the decoder, `down_proj` and `attn_out` inside one layer. For parts that are None the usual names are
    tried. Registering again replaces the entry.
    """
    _registered[model_type] = _Names(decoder, layers, down_proj, attn_out, num_heads, final_norm, unembedding)


def find_layout(model: nn.Module) -> Layout:
    """Find the parts of a Hugging Face model, also of one inside a PEFT or `torch.compile` wrapper.

    Raises:
        LayoutError: no layer has a recognized FFN (a state-space mixer is none), or one has experts that cannot be
            scaled, or an FFN that is sharded over devices (tensor parallelism) or is shared with another layer.
    """
    model = unwrap(model)
    config = getattr(model, "config", None)
    model_type = str(getattr(config, "model_type", "") or type(model).__name__)
    names = _registered.get(model_type, _Names())
    text_config = _text_config(config, model_type)

    decoder = _find_decoder(model, model_type, names)
    modules = _find_layer_list(decoder, model_type, names)
    paths = {id(module): name.replace("_orig_mod.", "") for name, module in model.named_modules()}
    layers = tuple(
        _describe_layer(index, paths[id(module)], module, model_type, names, text_config)
        for index, module in enumerate(modules)
    )
    if not any(layer.widths for layer in layers):
        raise _unrecognized(model_type, _no_ffn(layers[0].name, layers[0].module))
    widths, hidden_size = _common_shapes(layers, model_type)
    _refuse_shards(layers, text_config)
    return Layout(
        model_type=model_type,
        decoder=decoder,
        layers=layers,
        hidden_size=hidden_size,
        intermediate_size=widths.pop() if len(widths) == 1 and not any(layer.experts for layer in layers) else None,
        final_norm=_find_final_norm(decoder, model_type, names, hidden_size),
        unembedding=_find_unembedding(model, model_type, names, hidden_size),
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside a PEFT model or a `torch.compile`d module, or the model itself."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif hasattr(model, "peft_config") and callable(get_base_model := getattr(model, "get_base_model", None)):
            model = get_base_model()
        else:
            return model


def _linear_outputs(module: nn.Module) -> int:
    shape = linear_shape(module)
    assert shape is not None  # checked where the layer was described
    return shape[1]


def linear_shape(module: nn.Module | None) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear-like module (nn.Linear, quantized, transformers' Conv1D); None for any other."""
    for inputs, outputs in (("in_features", "out_features"), ("nx", "nf")):
        shape = getattr(module, inputs, None), getattr(module, outputs, None)
        if isinstance(shape[0], int) and isinstance(shape[1], int):
            return shape[0], shape[1]
    return None


def _width(down_proj: nn.Module | None) -> int:
    """Number of neurons that a down-projection takes; 0 if there is none."""
    shape = linear_shape(down_proj)
    return 0 if shape is None else shape[0]


def down_weight(layer: DecoderLayer | Projection) -> Tensor:
    """W_down as a view `[hidden, I]`, however the module stores it, without a PEFT adapter's delta.

    Raises LayoutError if the weight is not a plain floating-point matrix (quantized or otherwise packed).
    """
    module = base_layer(layer.down_proj)
    shape, weight = linear_shape(module), getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point() and shape is not None:
        matrix = weight.t() if is_transposed(module) and weight.dim() == 2 else weight
        if matrix.shape == (shape[1], shape[0]):
            return matrix
    raise LayoutError(
        f"{layer.name}: its down-projection ({type(module).__name__}) keeps no plain floating-point weight; "
        "load the model without quantization"
    )


def ffn_gate(layer: DecoderLayer, down_proj: nn.Module | None = None) -> nn.Module | None:
    """The projection of a gated FFN, act(gate(x))·up(x), whose first I outputs are gate(x); None for an ungated one.

    The FFN is the layer's dense one, or that of another `down_proj`. A neuron is active, act(gate(x)) > 0, where its
    output is above 0: the activation keeps the sign.

    Raises LayoutError, naming the layer, where the gate cannot be told or its activation does not keep the sign.
    """
    down_proj = layer.down_proj if down_proj is None else down_proj
    shape = linear_shape(down_proj)
    assert shape is not None  # checked where the layer was described
    width, hidden = shape
    projections: dict[str, nn.Module] = {}
    for path, module in layer.module.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in projections)  # what a PEFT layer wraps
        if linear_shape(module) in ((hidden, width), (hidden, 2 * width)) and not _is_attention(path) and not inside:
            projections[path] = module
    projections = {path: module for path, module in projections.items() if not _holds(down_proj, module)}
    [down] = (path for path, module in layer.module.named_modules() if module is down_proj)
    beside = [path for path in projections if path.startswith(down.rpartition(".")[0])]  # not a convolution's
    projections = {path: projections[path] for path in beside or projections}
    fused = [path for path, module in projections.items() if linear_shape(module) == (hidden, 2 * width)]
    if len(projections) == 1 and not fused:
        return None
    names = _FUSED_GATES if fused else _GATES
    gates = [path for path in projections if path.rpartition(".")[2] in names]
    if len(gates) != 1 or len(projections) != (1 if fused else 2):
        raise LayoutError(
            f"{layer.name}: the gate of its FFN is not recognized among its projections {', '.join(projections)}, so "
            "that active neurons cannot be counted; use a method other than ap and ape"
        )
    parent = layer.module.get_submodule(gates[0].rpartition(".")[0])
    signs = torch.tensor([-8.0, -1.0, -0.1, 0.1, 1.0, 8.0])
    for child in parent.children():
        is_activation = type(child).__module__.startswith(("torch.nn.modules.activation", "transformers.activations"))
        if is_activation and not any(child.parameters()) and not torch.equal(child(signs) > 0, signs > 0):
            raise LayoutError(
                f"{layer.name}: the activation of its FFN ({type(child).__name__}) does not keep the sign, so that "
                "active neurons cannot be counted at its gate; use a method other than ap and ape"
            )
    return projections[gates[0]]


def _holds(module: nn.Module, part: nn.Module) -> bool:
    return any(part is inner for inner in module.modules())


def base_layer(module: nn.Module) -> nn.Module:
    """The module inside a PEFT layer (which keeps the wrapped one as `base_layer`), or the module itself."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def is_transposed(module: nn.Module) -> bool:
    """Whether the module keeps its weight as [inputs, outputs], as transformers' Conv1D does."""
    return hasattr(module, "nx") and hasattr(module, "nf")


def _text_config(config: Any, model_type: str) -> Any:
    """The text decoder's part of a transformers configuration; None for any other object."""
    get_text_config = getattr(config, "get_text_config", None)
    if get_text_config is None:
        return None
    try:
        return get_text_config(decoder=True)
    except ValueError as error:  # it has several
        raise LayoutError(
            f"the configuration of model type {model_type!r} names no single text decoder: {error}"
        ) from error


def _layer_config(text_config: Any, index: int) -> Any:
    """The text configuration of one layer; from transformers 5.24 on, values may differ between layers."""
    if getattr(text_config, "is_heterogeneous", False):
        return text_config.per_layer_config[index]
    return text_config


def _find_decoder(model: nn.Module, model_type: str, names: _Names) -> nn.Module:
    if names.decoder is not None:
        return _required(model, names.decoder, model_type)
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    if linear_shape(decoder) is not None:  # ModernBERT calls its unembedding the decoder
        decoder = _inner_decoder(model)
    if isinstance(decoder, nn.Module):
        # Some wrappers return a language model that still has its head, or an encoder, around the stack.
        while _first(decoder, LAYER_LISTS) is None and (inner := _inner_decoder(decoder)) is not None:
            decoder = inner
        return decoder
    raise _unrecognized(model_type, "no text decoder was found")


def _inner_decoder(model: nn.Module) -> nn.Module | None:
    """The part that holds a language model's stack: `model`, `decoder`, or its base model by transformers' name."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    return _first(model, ("model", "decoder", *([prefix] if prefix else [])))


def _find_layer_list(decoder: nn.Module, model_type: str, names: _Names) -> nn.ModuleList:
    layers = _required(decoder, names.layers, model_type) if names.layers else _first(decoder, LAYER_LISTS)
    if isinstance(layers, nn.ModuleList) and len(layers) > 0:
        return layers
    raise _unrecognized(model_type, f"{type(decoder).__name__} has no list of decoder layers")


def _describe_layer(
    index: int, name: str, module: nn.Module, model_type: str, names: _Names, text_config: Any
) -> DecoderLayer:
    experts, shared = None, None
    if names.down_proj is not None:
        down_proj: nn.Module | None = _required(module, names.down_proj, model_type)
    else:
        experts = find_experts(module, name, model_type)
        down_proj = _first(module, DOWN_PROJECTIONS)
        if experts is not None:
            shared = _shared_projection(name, module, model_type)
            _refuse_others(name, module, model_type, (down_proj, shared))
        elif down_proj is None:
            down_proj = _down_projection_by_shape(name, module, model_type)
    if down_proj is not None and linear_shape(down_proj) is None:
        raise _unrecognized(
            model_type, f"the down-projection of {name} is a {type(down_proj).__name__}, not a linear layer"
        )

    attn_out = _required(module, names.attn_out, model_type) if names.attn_out else _first(module, _ATTENTION_OUTPUTS)
    num_heads = names.num_heads or getattr(_layer_config(text_config, index), "num_attention_heads", None)
    shape = linear_shape(attn_out) if attn_out is not None else None
    if shape is None or not isinstance(num_heads, int) or shape[0] % num_heads:
        attn_out, num_heads = (None if shape is None else attn_out), None
    return DecoderLayer(index, name, module, down_proj, attn_out, num_heads, shared, experts)


def _shared_projection(name: str, layer: nn.Module, model_type: str) -> nn.Module | None:
    """The down-projection of the shared expert beside routed ones; None if there is none.

    Several shared experts are one of their summed width, as models keep them; LayoutError is raised for others.
    """
    inside = {path: module for path, module in layer.named_modules() if "shared" in path and linear_shape(module)}
    # What a PEFT layer wraps is inside another linear. A gate of the whole shared expert has one output.
    linears = {
        path: module for path, module in inside.items() if not any(path.startswith(f"{outer}.") for outer in inside)
    }
    down = [module for path, module in linears.items() if path.rpartition(".")[2] in _SHARED_DOWN_PROJECTIONS]
    if len(down) > 1 or (not down and any(_linear_outputs(module) > 1 for module in linears.values())):
        raise LayoutError(
            f"{name} of model type {model_type!r}: its shared expert is not recognized among {', '.join(linears)}; "
            "one is needed that keeps all shared experts in one down-projection"
        )
    return down[0] if down else None


def _refuse_others(name: str, layer: nn.Module, model_type: str, known: tuple[nn.Module | None, ...]) -> None:
    """Raise LayoutError if a layer with experts has an FFN besides these, which would stay unsteered."""
    for block, down, alone in _wide_blocks(layer):
        if alone and not any(down is module for module in known):
            raise _unrecognized(model_type, f"{name} has an FFN beside its experts, {block}, of an unknown kind")


def _down_projection_by_shape(name: str, layer: nn.Module, model_type: str) -> nn.Module | None:
    """The layer's only linear I → hidden that is beside one or two linears hidden → I, or one hidden → 2 I.

    Attention does not count. If I < hidden, the projections up and down of a plain FFN could be confused, so only wide
    FFNs (I > hidden) count. None if there is none; raises LayoutError if there are several.
    """
    candidates = [down for _, down, alone in _wide_blocks(layer) if alone]
    if len(candidates) > 1:
        raise _unrecognized(model_type, f"{name} ({type(layer).__name__}) has {len(candidates)} modules like an FFN")
    return candidates[0] if candidates else None


def _wide_blocks(layer: nn.Module) -> list[tuple[str, nn.Module, bool]]:
    """Modules with linears hidden → I → hidden (I > hidden): what they are, the second linear, and if that is all."""
    blocks = []
    for path, parent in layer.named_modules():
        linears = {
            child: shape
            for child_name, child in parent.named_children()
            if (shape := linear_shape(child)) is not None and not _is_attention(f"{path}.{child_name}")
        }
        for down, (width, hidden) in linears.items():
            up = [shape for shape in linears.values() if shape in ((hidden, width), (hidden, 2 * width))]
            if width > hidden and up:
                alone = len(linears) == 1 + len(up) and len(up) <= 2 and not _has_other_weights(parent, parent is layer)
                blocks.append((f"{path} ({type(parent).__name__})".lstrip(), down, alone))
    return blocks


def _no_ffn(name: str, layer: nn.Module) -> str:
    """Say that a layer has no FFN, and what in it is none."""
    what = f"{name} ({type(layer).__name__}) has no recognized FFN"
    if mixers := [block for block, _, alone in _wide_blocks(layer) if not alone]:
        what += f", and its {mixers[0]} is none: it holds more weights than an FFN's (as state-space mixers do)"
    return what


def _is_attention(path: str) -> bool:
    return "attn" in path or "attention" in path


def _has_other_weights(parent: nn.Module, is_layer: bool) -> bool:
    """Whether a module has weights outside its linears and norms, which an FFN does not have.

    In a decoder layer (`is_layer`) only the children's own weights count: attention and norms are parts of it.
    """
    if next(parent.parameters(recurse=False), None) is not None:
        return True
    children = [child for child in parent.children() if linear_shape(child) is None]
    return any(weight.dim() > 1 for child in children for weight in child.parameters(recurse=not is_layer))


def _common_shapes(layers: Iterable[DecoderLayer], model_type: str) -> tuple[set[int], int]:
    """The layers' widths and their hidden size; raises LayoutError if that differs, or if two layers share one FFN.

    The widths are those of dense FFNs.
    """
    shapes: dict[int, str] = {}
    widths = set()
    owners: dict[int, str] = {}
    for layer in layers:
        experts = [layer.experts] if layer.experts is not None else []
        for module in (*(item.down_proj for item in layer.projections), *(item.module for item in experts)):
            if (owner := owners.setdefault(id(module), layer.name)) != layer.name:
                raise LayoutError(
                    f"{layer.name} and {owner} of model type {model_type!r} share one FFN, which cannot be "
                    "steered per layer; use a model whose layers have their own"
                )
        if layer.has_ffn:
            widths.add(layer.width)
        for hidden in (
            *(_linear_outputs(item.down_proj) for item in layer.projections),
            *(e.hidden_size for e in experts),
        ):
            shapes[hidden] = layer.name
    if len(shapes) != 1:
        sizes = ", ".join(f"{name} has {hidden}" for hidden, name in shapes.items())
        raise LayoutError(
            f"hidden sizes of model type {model_type!r} differ between the layers' FFNs ({sizes}), "
            "but a profile has one; use a model whose layers are alike"
        )
    return widths, next(iter(shapes))


def _refuse_shards(layers: Iterable[DecoderLayer], text_config: Any) -> None:
    """Raise LayoutError if a module holds only some of its FFN's neurons: a profile numbers those of the whole FFN."""
    for layer in layers:
        if layer.shared_out is not None:
            _refuse_shard(f"{layer.name}'s shared expert", *_stored_width(base_layer(layer.shared_out)))
        if layer.ffn_out is None:
            continue
        module = base_layer(layer.ffn_out)
        width, full = _stored_width(module)
        ffn = next((part for part in layer.module.modules() if layer.down_proj in part.children()), None)
        # RecurrentGemma's FFN has half of the configured width, and says so itself.
        layer_config = _layer_config(text_config, layer.index)
        configured = getattr(ffn, "intermediate_size", getattr(layer_config, "intermediate_size", None))
        if isinstance(configured, int) and configured % width == 0:
            # A module that was sharded by hand knows its own part only. (The width of a model that derives it from the
            # configured one, as LFM2 does, does not divide that.)
            full = max(full, configured)
        _refuse_shard(layer.name, width, full)


def _refuse_shard(name: str, width: int, full: int) -> None:
    if width != full:
        raise LayoutError(
            f"{name}: its down-projection holds {width} of {full} FFN neurons; a sharded FFN "
            "(tp_plan) cannot be steered here: load the model without tensor parallelism"
        )


def _stored_width(module: nn.Module) -> tuple[int, int]:
    """Inputs of the weight on this device, and inputs of the whole weight."""
    shape, weight = linear_shape(module), getattr(module, "weight", None)
    assert shape is not None  # checked where the layer was described
    to_local = getattr(weight, "to_local", None)  # a DTensor's
    if to_local is None:
        return shape[0], shape[0]
    return int(to_local().shape[0 if is_transposed(module) else -1]), shape[0]


def _find_final_norm(decoder: nn.Module, model_type: str, names: _Names, hidden_size: int) -> nn.Module | None:
    norm = _required(decoder, names.final_norm, model_type) if names.final_norm else _first(decoder, FINAL_NORMS)
    weight = getattr(norm, "weight", None)
    return norm if isinstance(weight, Tensor) and weight.shape == (hidden_size,) else None


def _find_unembedding(model: nn.Module, model_type: str, names: _Names, hidden_size: int) -> nn.Module | None:
    if names.unembedding is not None:
        unembedding: Any = _required(model, names.unembedding, model_type)
    else:
        get_output_embeddings = getattr(model, "get_output_embeddings", None)
        unembedding = get_output_embeddings() if callable(get_output_embeddings) else None
    shape = linear_shape(unembedding) if isinstance(unembedding, nn.Module) else None
    return unembedding if shape is not None and shape[0] == hidden_size else None


def _resolve(root: nn.Module, path: str) -> nn.Module | None:
    module: Any = root
    for name in path.split("."):
        module = getattr(module, name, None)
    return module if isinstance(module, nn.Module) else None


def _first(root: nn.Module, paths: Iterable[str]) -> nn.Module | None:
    return next((module for path in paths if (module := _resolve(root, path)) is not None), None)


def _required(root: nn.Module, path: str, model_type: str) -> nn.Module:
    module = _resolve(root, path)
    if module is None:
        raise LayoutError(
            f"the layout registered for model type {model_type!r} names {path!r}, "
            f"which {type(root).__name__} does not have; correct it with hones_steer.register_layout"
        )
    return module


def _unrecognized(model_type: str, what: str) -> LayoutError:
    return LayoutError(
        f"model type {model_type!r} is not recognized: {what}; say where its parts are with "
        f"hones_steer.register_layout({model_type!r}, decoder=..., layers=..., down_proj=...)"
    )
