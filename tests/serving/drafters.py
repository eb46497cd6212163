"""Tiny checkpoints that draft for the tiny targets of `checkpoints.py`: each function writes one to a folder.

Random heads would draft nothing that a target accepts. So each has one layer of random weights, small ones, behind a
projection fitted to answers: from what the head is given to the token that followed (`following`, ids), by least
squares.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from serving.checkpoints import TEXT
from tiny_models import GROUPED, _build
from tiny_models import llama as build_llama
from tiny_processors import text_tokenizer
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

AUX_LAYERS = [1, 2, 3]  # EAGLE-3 is given what enters these layers
HIDDEN = TEXT["hidden_size"]
QWEN2 = Qwen2Config(**{**GROUPED, **TEXT})


def eagle(folder: Path, target: Any, tokens: Sequence[int], following: Sequence[int]) -> Path:
    """Write an EAGLE head for a Llama `target`, which has learned the tokens that follow `tokens`."""
    projection = _fitted(_embedded(target, tokens), target, following)
    weights = {f"layers.0.{name}": weight for name, weight in _layer().items() if name != "input_layernorm.weight"}
    weights["fc.weight"] = torch.cat([projection, torch.zeros(HIDDEN, HIDDEN)], dim=1)
    return _write(folder, weights, architectures=["LlamaForCausalLM"])


def eagle3(folder: Path, target: Any, hidden: Tensor, following: Sequence[int]) -> Path:
    """Write an EAGLE-3 head for a Llama `target`.

    It has learned the tokens that come two after those with the `hidden` states `[n, 3 * hidden size]` of AUX_LAYERS.
    """
    generator = torch.Generator().manual_seed(0)
    weights = {f"midlayer.{name}": weight for name, weight in _layer().items()}
    for name in ("q_proj", "k_proj", "v_proj"):  # these are given the embeddings as well
        rows = weights[f"midlayer.self_attn.{name}.weight"].shape[0]
        weights[f"midlayer.self_attn.{name}.weight"] = torch.randn(rows, 2 * HIDDEN, generator=generator) / HIDDEN**0.5
    weights["midlayer.hidden_norm.weight"], weights["norm.weight"] = torch.ones(HIDDEN), torch.ones(HIDDEN)
    weights["fc.weight"] = _fitted(hidden, target, following)
    layers = {"eagle_aux_hidden_state_layer_ids": AUX_LAYERS}  # where both runners look for them
    return _write(folder, weights, architectures=["LlamaForCausalLMEagle3"], **layers)


def qwen2(seed: int = 0) -> Any:
    """A Qwen2 like `checkpoints.llama`'s Llama, for `mimo`."""
    return _build(Qwen2ForCausalLM, QWEN2, seed)


def mimo(folder: Path, target: Any, tokens: Sequence[int], following: Sequence[int]) -> Path:
    """Write a MiMo: a `qwen2` with one layer for multi-token prediction, which knows what follows `tokens`.

    Transformers knows no MiMo, and reads the Qwen2 in it.
    """
    target.save_pretrained(folder)
    text_tokenizer(target.config).save_pretrained(folder)
    layer = _build(Qwen2ForCausalLM, Qwen2Config(**{**GROUPED, **TEXT, "num_hidden_layers": 1}), 1).model.layers[0]
    weights = {f"model.mtp_layers.0.{name}": weight for name, weight in _quiet(layer.state_dict()).items()}
    for norm in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
        weights[f"model.mtp_layers.0.{norm}.weight"] = torch.ones(HIDDEN)
    normed = torch.nn.functional.rms_norm(_embedded(target, tokens), (HIDDEN,), eps=QWEN2.rms_norm_eps)
    projection = _fitted(normed, target, following)
    weights["model.mtp_layers.0.input_proj.weight"] = torch.cat([torch.zeros(HIDDEN, HIDDEN), projection], dim=1)
    file = folder / "model.safetensors"
    save_file({**load_file(file), **weights}, file, metadata={"format": "pt"})
    _change_config(folder, architectures=["MiMoForCausalLM"], num_nextn_predict_layers=1)
    return folder


def _embedded(target: Any, tokens: Sequence[int]) -> Tensor:
    return target.get_input_embeddings().weight.detach()[list(tokens)]


def _fitted(features: Tensor, target: Any, following: Sequence[int]) -> Tensor:
    """The projection `[hidden size, features]` from features to the rows of `target`'s head for `following`."""
    rows = target.lm_head.weight.detach()[list(following)]
    return 10 * torch.linalg.lstsq(features, rows, driver="gelsd").solution.T.contiguous()


def _layer() -> dict[str, Tensor]:
    return _quiet(build_llama(1, **{**TEXT, "num_hidden_layers": 1}).model.layers[0].state_dict())


def _quiet(layer: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a layer which adds little to what it is given."""
    quiet = ("o_proj.weight", "down_proj.weight")
    return {name: weight * 0.02 if name.endswith(quiet) else weight.clone() for name, weight in layer.items()}


def _write(folder: Path, weights: dict[str, Tensor], **config: Any) -> Path:
    build_llama(1, **{**TEXT, "num_hidden_layers": 1}).config.save_pretrained(folder)
    _change_config(folder, **config)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _change_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
