"""Profiles merged into a checkpoint: a complete copy whose W_down columns carry the scales.

The files are copied as they are and the touched tensors rewritten in the copies, one tensor in memory at a time;
everything else stays the same, byte for byte. The result needs nothing of ours to be loaded.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hones_steer._cards import card, describe_model, evidence_table, profiles_table
from hones_steer._folders import new_folder, sync
from hones_steer.convert import SIDECAR, module_names, sidecar
from hones_steer.errors import DataError
from hones_steer.injection import scale
from hones_steer.layout import Layout, find_layout, is_transposed
from hones_steer.loading import empty_model, find_checkpoint, load_config, loading
from hones_steer.profile import ModelIdentity, Profile, StrPath, parse_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
BASE_CARD = "README.base.md"

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Other forms of the same weights: unscaled, they must not come along.
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
        DataError: no such checkpoint, a quantised one or one without safetensors, one that is merged already, weights
            that are not the configuration's, or a folder that exists or cannot be written (nothing is left of it).
        LayoutError, MismatchError: the model's FFNs are not recognised, or the profile is another model's.
    """
    source = find_checkpoint(os.fspath(checkpoint))
    config = load_config(str(source))
    _refuse_unmergeable(source, config)
    stored = _stored_tensors(source)
    model = empty_model(config)
    layout = find_layout(model)
    keys = _disk_keys(model, stored)
    _check_identity(profile, model, layout, keys, stored, allow_mismatch)
    modules = {layer: name for layer, name in module_names(model, layout).items() if layer in profile.layers}
    targets = {layer: _target(f"{name}.weight", keys, stored, layout) for layer, name in modules.items()}
    files = sorted({tensor.file.name for tensor in stored.values()})
    with new_folder(folder) as temporary:
        _copy_others(source, temporary)
        (temporary / SIDECAR).write_text(sidecar(profile, modules), encoding="utf-8")
        (temporary / "README.md").write_text(_merged_card(profile, checkpoint), encoding="utf-8")
        scaled = 0
        for name in progress(files):
            mine = {layer: tensor for layer, tensor in targets.items() if tensor.file.name == name}
            scaled += _write_shard(source / name, temporary / name, profile, mine, layout)
        if scaled != profile.num_neurons:
            raise DataError(f"{source}: {scaled} columns were scaled instead of {profile.num_neurons}; report this bug")
        if (source / INDEX).exists():
            shutil.copyfile(source / INDEX, temporary / INDEX)
    return scaled


# The checkpoint to be read ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stored:
    """Where a tensor's bytes are: `[begin, end)` of a file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def read(self) -> Tensor:
        with self.file.open("rb") as file:
            return _read_tensor(file, self)


def _refuse_unmergeable(source: Path, config: Any) -> None:
    if (source / SIDECAR).exists():
        raise DataError(f"{source}: has a profile merged into it already; merge a sum of profiles into the original")
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else type(quantisation).__name__
        raise DataError(
            f"{source}: is quantised ({method}), so its columns cannot be scaled without quantising them anew; merge "
            "into the original checkpoint and quantise the result, or serve the profile beside this one"
        )


def _stored_tensors(source: Path) -> dict[str, _Stored]:
    """Every tensor of the checkpoint by its key on the disk. Headers only; nothing is loaded."""
    if (source / INDEX).is_file():
        with loading(f"{source / INDEX}"):
            weight_map = json.loads((source / INDEX).read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        if wrong := [name for name in names if Path(name).name != name or not (source / name).is_file()]:
            raise DataError(f"{source}: {wrong[0]!r}, which {INDEX} names, is not there; get the whole checkpoint")
    elif (source / SINGLE).is_file():
        names = [SINGLE]
    else:
        raise DataError(f"{source}: has no {SINGLE} and no {INDEX}; save the model as safetensors (save_pretrained)")
    stored: dict[str, _Stored] = {}
    for name in names:
        stored.update(_read_header(source / name))
    return stored


def _read_header(file: Path) -> dict[str, _Stored]:
    try:
        with safe_open(file, framework="pt"):
            pass  # it is whole, and its offsets are sound
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = parse_json(stream.read(length).decode("utf-8"), f"the header of {file}")
    header.pop("__metadata__", None)
    start = 8 + length
    return {
        key: _Stored(file, entry["dtype"], tuple(entry["shape"]), *(start + at for at in entry["data_offsets"]))
        for key, entry in header.items()
    }


def _disk_keys(model: nn.Module, stored: Iterable[str]) -> dict[str, str]:
    """Parameter name -> key on the disk, by transformers' own renaming (LLaVA's differ, for one)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix, parameters = str(getattr(model, "base_model_prefix", "")), model.state_dict()
    keys: dict[str, str] = {}
    for key in stored:
        name, converter = rename_source_key(key, renamings, converters, prefix, parameters)
        if name not in parameters:  # as transformers does: it may lack the prefix only
            name, converter = rename_source_key(key, [], [], prefix, parameters)
        if converter is None:
            keys[name] = key
    return keys


def _target(parameter: str, keys: Mapping[str, str], stored: Mapping[str, _Stored], layout: Layout) -> _Stored:
    """A down-projection's weight, which must be a plain matrix of the right shape."""
    if parameter not in keys:
        raise DataError(f"the checkpoint has no {parameter} of its own (missing, or stored in another form)")
    tensor = stored[keys[parameter]]
    if tensor.dtype not in _DTYPES:
        raise DataError(
            f"{tensor.file}: {keys[parameter]} is stored as {tensor.dtype}: a quantised checkpoint cannot be scaled "
            "without quantising it anew; merge into the original and quantise the result"
        )
    shape = (layout.hidden_size, layout.intermediate_size)
    if tensor.shape != (shape[::-1] if _transposed(layout) else shape):
        raise DataError(f"{tensor.file}: {keys[parameter]} has shape {list(tensor.shape)}, not config.json's")
    return tensor


def _transposed(layout: Layout) -> bool:
    return is_transposed(layout.layers[0].down_proj)


def _check_identity(
    profile: Profile,
    model: nn.Module,
    layout: Layout,
    keys: Mapping[str, str],
    stored: Mapping[str, _Stored],
    allow_mismatch: bool,
) -> None:
    """As `steer` does, with the final norm read from the disk."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    norm: Any = layout.final_norm
    key = keys.get(names.get(id(norm.weight), "")) if norm is not None else None
    if key is not None and stored[key].dtype in _DTYPES:
        norm.weight = nn.Parameter(stored[key].read(), requires_grad=False)
    profile.base_model.check(ModelIdentity.from_model(model), allow_mismatch=allow_mismatch)


# The copy -----------------------------------------------------------------------------------------


def _copy_others(source: Path, target: Path) -> None:
    """Configuration, tokenizer, processor, licence: every file but weights, and none that is hidden."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(_OTHER_WEIGHTS):
            shutil.copyfile(file, target / (BASE_CARD if file.name == "README.md" else file.name))


def _write_shard(source: Path, target: Path, profile: Profile, tensors: Mapping[int, _Stored], layout: Layout) -> int:
    """Copy a weight file, scale these layers' columns in the copy, and only then give it its name."""
    part = target.with_name(target.name + ".part")
    shutil.copyfile(source, part)
    scaled = 0
    with part.open("r+b") as file:
        for layer, tensor in tensors.items():
            neurons, scales = (torch.from_numpy(array.copy()) for array in profile.layers[layer])
            weight = _read_tensor(file, tensor)
            columns = weight.t() if _transposed(layout) else weight
            columns[:, neurons.long()] = scale(columns[:, neurons.long()], scales)
            file.seek(tensor.begin)
            file.write(weight.view(torch.uint8).numpy().data)
            scaled += len(neurons)
    sync(part)
    part.rename(target)
    return scaled


def _read_tensor(file: BufferedReader | BufferedRandom, tensor: _Stored) -> Tensor:
    file.seek(tensor.begin)
    data = bytearray(tensor.end - tensor.begin)
    file.readinto(data)
    return torch.frombuffer(data, dtype=_DTYPES[tensor.dtype]).view(tensor.shape)


def _merged_card(profile: Profile, checkpoint: StrPath) -> str:
    base = profile.base_model.name or Path(checkpoint).absolute().name
    paragraphs: Sequence[str] = [
        f"# {base}, steered for `{profile.task}`",
        f"A copy of {describe_model(profile)} in which the steering profile with digest `{profile.digest}` is merged "
        f"into the weights by hones-steer: {profile.num_neurons:,} columns of the language model's FFN "
        f"down-projections are multiplied by one factor each, in {len(profile.layers)} layers. All else is the base "
        f"model's, the tokenizer and the license included; its own card is `{BASE_CARD}` where it has one. `{SIDECAR}` "
        "lists the columns. The model is steered for every request; the profile itself can be chosen per request.",
        profiles_table([profile]),
        evidence_table([profile]),
    ]
    return card([profile], paragraphs, library_name="transformers")
