"""Checkpoints in safetensors: where each tensor is on the disk, and the model's structure, without its weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hones_steer.errors import DataError
from hones_steer.layout import Layout, find_layout
from hones_steer.loading import empty_model, find_checkpoint, load_config, loading
from hones_steer.strict_json import parse_object

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Stored:
    """Place of a tensor's bytes: `[begin, end)` of a file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def read(self) -> Tensor:
        """Read the tensor into memory."""
        with self.file.open("rb") as file:
            return read_tensor(file, self)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint and its model, whose weights are meta tensors except the final norm's, which `ModelIdentity` needs.

    `keys` maps a parameter's name to its key on the disk, `stacks` a parameter of experts that are kept in another way
    there to the keys of what it is made of, in the order of experts, and `stored` maps a key to its place.
    """

    folder: Path
    config: Any
    model: nn.Module
    layout: Layout
    keys: Mapping[str, str]
    stacks: Mapping[str, Sequence[str]]
    stored: Mapping[str, Stored]


def open_checkpoint(name: str) -> Checkpoint:
    """Read the headers of a model folder, or of a Hub name, build the model's structure, and load its final norm only.

    Raises:
        DataError: no such checkpoint, one without safetensors, or a damaged one.
        LayoutError: the model's FFNs are not recognized.
    """
    folder = find_checkpoint(name)
    config = load_config(str(folder))
    stored = _stored_tensors(folder)
    model = empty_model(config)
    layout, (keys, stacks) = find_layout(model), _disk_keys(model, stored)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    norm: Any = layout.final_norm
    key = keys.get(names.get(id(norm.weight), "")) if norm is not None else None
    if key is not None and stored[key].dtype in DTYPES:  # otherwise `ModelIdentity.check` warns
        norm.weight = nn.Parameter(stored[key].read(), requires_grad=False)
    return Checkpoint(folder, config, model, layout, keys, stacks, stored)


def _stored_tensors(source: Path) -> dict[str, Stored]:
    """The place of each tensor of the checkpoint, by its key on the disk; only headers are read."""
    if (source / INDEX).is_file():
        with loading(f"{source / INDEX}"):
            index = json.loads((source / INDEX).read_bytes())  # as transformers reads it
            if not isinstance(index, dict):
                raise DataError(f"{source / INDEX}: is not a JSON object; get the whole checkpoint")
            weight_map = index["weight_map"]
            names = sorted(set(weight_map.values()))
        if missing := [name for name in names if Path(name).name != name or not (source / name).is_file()]:
            raise DataError(f"{source}: {missing[0]!r}, which {INDEX} names, is not there; get the whole checkpoint")
    elif (source / SINGLE).is_file():
        names = [SINGLE]
    else:
        raise DataError(
            f"{source}: has no {SINGLE} and no {INDEX}; get the whole checkpoint, or save the model as safetensors "
            "(save_pretrained)"
        )
    stored: dict[str, Stored] = {}
    for name in names:
        stored.update(_read_header(source / name))
    return stored


def _read_header(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="pt"):
            pass  # safetensors checks that the file is whole and its offsets are sound
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file}: cannot be read: {error}; get the whole checkpoint") from error
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = parse_object(stream.read(length), f"the header of {file}", DataError)
    header.pop("__metadata__", None)
    start = 8 + length
    return {
        key: Stored(file, entry["dtype"], tuple(entry["shape"]), *(start + at for at in entry["data_offsets"]))
        for key, entry in header.items()
    }


def _disk_keys(model: nn.Module, stored: Iterable[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Key on the disk of each parameter, by transformers' own renaming (LLaVA's names differ, for example).

    Beside them the keys of the tensors, in order, that transformers stacks, or of the one that it transposes, to make a
    parameter; parameters that are made in other ways are left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix, parameters = str(getattr(model, "base_model_prefix", "")), model.state_dict()
    simple = {
        source
        for entry in converters
        if [type(operation).__name__ for operation in entry.operations] in (["MergeModulelist"], ["Transpose"])
        for source in entry.source_patterns
    }
    keys: dict[str, str] = {}
    stacks: dict[str, list[str]] = {}
    for key in sorted(stored, key=dot_natural_key):
        name, converter = rename_source_key(key, renamings, converters, prefix, parameters)
        if name not in parameters:  # as transformers does: only the prefix may be missing
            name, converter = rename_source_key(key, [], [], prefix, parameters)
        if converter is None:
            keys[name] = key
        elif converter in simple:
            stacks.setdefault(name, []).append(key)
    return keys, stacks


def read_tensor(file: BufferedReader | BufferedRandom, tensor: Stored) -> Tensor:
    """Read a tensor from its file, which is open."""
    file.seek(tensor.begin)
    data = bytearray(tensor.end - tensor.begin)
    file.readinto(data)
    return torch.frombuffer(data, dtype=DTYPES[tensor.dtype]).view(tensor.shape)
