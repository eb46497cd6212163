"""Profiles merged into a checkpoint: a complete copy whose W_down columns carry the scales.

The files are copied as they are, and the tensors to be scaled are rewritten in the copies, one tensor in memory at a
time; everything else stays the same, byte for byte. Loading the result takes no hones-steer.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hones_steer._folding import not_finite
from hones_steer.errors import DataError
from hones_steer.export.cards import card, describe_model, evidence_table, profiles_table
from hones_steer.export.checkpoint import DTYPES, INDEX, Checkpoint, Stored, open_checkpoint, read_tensor
from hones_steer.export.sidecar import SIDECAR, module_names, sidecar_text
from hones_steer.files import new_file, new_folder
from hones_steer.injection import scale
from hones_steer.layout import DecoderLayer, is_transposed
from hones_steer.profile import ModelIdentity, Profile, StrPath
from hones_steer.slots import layer_tensors

BASE_CARD = "README.base.md"

# Other forms of the same weights are not copied, as they would be unscaled.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".safetensors", ".index.json")

Progress = Callable[[Iterable[str]], Iterable[str]]


def merge_into(
    profile: Profile,
    checkpoint: StrPath,
    folder: StrPath,
    *,
    allow_mismatch: bool = False,
    progress: Progress = iter,
) -> int:
    """Write a complete checkpoint with W_down[:, i] · s_i, rounded once; return how many columns were scaled.

    `checkpoint` is a model folder or a Hub name, in safetensors. It is read tensor by tensor, and the weights are
    what `Steering.fold` makes of them, bit for bit. The copy appears whole or not at all, its index last. `progress`
    wraps the names of the weight files, for a progress bar.

    Raises:
        DataError: no such checkpoint, a quantized one or one without safetensors, one that is merged already, weights
            that are not the configuration's or go beyond their dtype once they are scaled, or a folder that exists or
            cannot be written (nothing is left of it).
        LayoutError, MismatchError: the model's FFNs are not recognized, or the profile is another model's.
    """
    base = open_checkpoint(os.fspath(checkpoint))
    _refuse_unmergeable(base)
    profile.base_model.check(ModelIdentity.from_model(base.model), allow_mismatch=allow_mismatch)
    base.layout.require_dense(profile.ffns, "a merged checkpoint")
    names = module_names(base.model, base.layout)
    modules = {layer: name for layer, name in names.items() if layer in profile.layers}
    targets = {layer: _target(base.layout.layers[layer], f"{name}.weight", base) for layer, name in modules.items()}
    files = sorted({tensor.file.name for tensor in base.stored.values()})
    with new_folder(folder) as temporary:
        _refuse_not_finite(profile, modules, targets, _transposed(base))  # before copying what may be large files
        _copy_others(base.folder, temporary)
        (temporary / SIDECAR).write_text(sidecar_text(profile, modules), encoding="utf-8")
        (temporary / "README.md").write_text(_merged_card(profile, checkpoint), encoding="utf-8")
        scaled = 0
        for name in progress(files):
            in_file = {layer: tensor for layer, tensor in targets.items() if tensor.file.name == name}
            scaled += _write_shard(base.folder / name, temporary / name, profile, in_file, _transposed(base))
        if scaled != profile.num_neurons:
            raise DataError(f"{checkpoint}: {scaled} columns were scaled, not {profile.num_neurons}; report this bug")
        if (base.folder / INDEX).exists():
            shutil.copyfile(base.folder / INDEX, temporary / INDEX)
    return scaled


# What is refused ----------------------------------------------------------------------------------


def _refuse_unmergeable(base: Checkpoint) -> None:
    if (base.folder / SIDECAR).exists():
        raise DataError(f"{base.folder}: is merged with a profile already; merge a sum of profiles into the original")
    quantization = getattr(base.config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else type(quantization).__name__
        raise DataError(
            f"{base.folder}: is quantized ({method}), so its columns cannot be scaled without quantizing them anew; "
            "merge into the original checkpoint and quantize the result, or serve the profile beside this one"
        )


def _target(layer: DecoderLayer, parameter: str, base: Checkpoint) -> Stored:
    """The place of a down-projection's weight; raises DataError unless it is a plain matrix of the layer's shape."""
    key = base.keys.get(parameter)
    if key is None:
        raise DataError(
            f"{base.folder}: has no {parameter} of its own (missing, or stored in another form); "
            "save the model with save_pretrained"
        )
    tensor = base.stored[key]
    if tensor.dtype not in DTYPES:
        raise DataError(
            f"{tensor.file}: {key} is stored as {tensor.dtype}: a quantized checkpoint cannot be scaled "
            "without quantizing it anew; merge into the original and quantize the result"
        )
    shape = (base.layout.hidden_size, layer.width)
    if tensor.shape != (shape[::-1] if _transposed(base) else shape):
        raise DataError(
            f"{tensor.file}: {key} has shape {list(tensor.shape)}, not config.json's; the two do not belong together"
        )
    return tensor


def _refuse_not_finite(
    profile: Profile, modules: Mapping[int, str], targets: Mapping[int, Stored], transposed: bool
) -> None:
    for layer, tensor in targets.items():
        neurons, scales = layer_tensors(profile, layer)
        before = _columns(tensor.read(), transposed)[:, neurons]
        if why := not_finite(before, scale(before, scales), neurons, scales):
            raise DataError(
                f"{tensor.file}: {modules[layer]}: {why}; lower the scale, or save the checkpoint in bfloat16 or "
                "float32 and merge into that"
            )


def _transposed(base: Checkpoint) -> bool:
    return is_transposed(base.layout.with_ffn[0].down_proj)


# The copy -----------------------------------------------------------------------------------------


def _copy_others(source: Path, target: Path) -> None:
    """Copy every file except weights and hidden ones: configuration, tokenizer, processor, license."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(_OTHER_WEIGHTS):
            shutil.copyfile(file, target / (BASE_CARD if file.name == "README.md" else file.name))


def _write_shard(source: Path, target: Path, profile: Profile, tensors: Mapping[int, Stored], transposed: bool) -> int:
    """Copy a weight file, scale these layers' columns in the copy, and only then give it its name.

    Returns the number of columns that were scaled.
    """
    scaled = 0
    with new_file(target) as copy:
        shutil.copyfile(source, copy)
        with copy.open("r+b") as file:
            for layer, tensor in tensors.items():
                neurons, scales = layer_tensors(profile, layer)
                weight = read_tensor(file, tensor)
                columns = _columns(weight, transposed)
                columns[:, neurons] = scale(columns[:, neurons], scales)
                file.seek(tensor.begin)
                file.write(weight.view(torch.uint8).numpy().data)
                scaled += len(neurons)
    return scaled


def _columns(weight: Tensor, transposed: bool) -> Tensor:
    return weight.t() if transposed else weight


def _merged_card(profile: Profile, checkpoint: StrPath) -> str:
    base = profile.base_model.name or Path(checkpoint).absolute().name
    paragraphs: Sequence[str] = [
        f"# {base}, steered for `{profile.task}`",
        f"A copy of {describe_model(profile)} in which the steering profile with digest `{profile.digest}` is merged "
        f"into the weights by hones-steer: {profile.num_neurons:,} columns of the language model's FFN "
        f"down-projections are multiplied by one factor each, in {len(profile.steered_layers)} layers. All else is the "
        f"base model's, the tokenizer and the license included; its own card is `{BASE_CARD}` where it has one. "
        f"`{SIDECAR}` lists the columns. The model is steered for every request; the profile itself can be chosen per "
        "request.",
        profiles_table([profile]),
        evidence_table([profile]),
    ]
    # The weights are the base model's, and so is their license, which only its own card can tell.
    return card([profile], paragraphs, library_name="transformers", license=None)
