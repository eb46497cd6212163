"""Profiles merged into a checkpoint: a complete copy whose W_down columns carry the scales.

The files are copied as they are, and the tensors to be scaled are rewritten in the copies, one tensor in memory at a
time; everything else stays the same, byte for byte. Loading the result takes no hones-steer.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hones_steer._folding import Columns, not_finite
from hones_steer.errors import DataError
from hones_steer.export.cards import card, describe_model, evidence_table, profiles_table
from hones_steer.export.checkpoint import DTYPES, INDEX, Checkpoint, Stored, open_checkpoint, read_tensor
from hones_steer.export.sidecar import SIDECAR, module_names, sidecar_text, without_wrappers
from hones_steer.ffn_scales import Entries
from hones_steer.ffns import EXPERTS, Ffn
from hones_steer.files import new_file, new_folder
from hones_steer.injection import scale
from hones_steer.layout import is_transposed
from hones_steer.profile import ModelIdentity, Profile, StrPath

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
    base.layout.require_ffns(profile.ffns)
    names = module_names(base.model, base.layout)
    names |= {Ffn(layer, EXPERTS): without_wrappers(experts.name) for layer, experts in base.layout.experts.items()}
    targets = [
        target
        for ffn, entries in profile.ffns.groups.items()
        for target in (_of_experts if ffn.part == EXPERTS else _of_projection)(base, ffn, names[ffn], entries)
    ]
    files = sorted({tensor.file.name for tensor in base.stored.values()})
    with new_folder(folder) as temporary:
        _refuse_not_finite(targets)  # before copying what may be large files
        _copy_others(base.folder, temporary)
        modules = {ffn: names[ffn.group] for ffn in profile.ffns}
        (temporary / SIDECAR).write_text(sidecar_text(profile, modules), encoding="utf-8")
        (temporary / "README.md").write_text(_merged_card(profile, checkpoint), encoding="utf-8")
        scaled = 0
        for name in progress(files):
            in_file = [target for target in targets if target.tensor.file.name == name]
            scaled += _write_shard(base.folder / name, temporary / name, in_file)
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


# The tensors --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Target:
    """The columns of a tensor on the disk that are scaled by `scales` `[k]`: those of `neurons` `[k]`.

    The tensor is W_down `[hidden, I]`, or that of all experts `[experts, hidden, I]`, whose columns are then of
    `experts` `[k]`; with `transposed` its last two dimensions are `[I, hidden]`. `name` is the module's.
    """

    name: str
    tensor: Stored
    transposed: bool
    neurons: Tensor
    scales: Tensor
    experts: Tensor | None = None

    def columns_of(self, weight: Tensor) -> Columns:
        """The columns, in a tensor that was read."""
        matrix = weight.transpose(-1, -2) if self.transposed else weight
        return Columns(self.name, lambda: matrix, self.neurons, self.experts)


def _of_projection(base: Checkpoint, ffn: Ffn, name: str, entries: Entries) -> Iterator[_Target]:
    """The columns of a down-projection that is a linear layer."""
    [projection] = (projection for projection in base.layout.projections if projection.ffn == ffn)
    shape, transposed = (base.layout.hidden_size, projection.width), is_transposed(projection.down_proj)
    tensor = _stored(base, _key_of(base, f"{name}.weight"), shape[::-1] if transposed else shape)
    yield _Target(name, tensor, transposed, *_tensors(entries))


def _of_experts(base: Checkpoint, ffn: Ffn, name: str, entries: Entries) -> Iterator[_Target]:
    """The columns of a layer's routed experts, which the disk keeps in one tensor, either way round, or one by one."""
    experts, parameter = base.layout.experts[ffn.layer], f"{name}.down_proj"
    neurons, scales = _tensors(entries)
    numbers = torch.tensor(entries.experts, dtype=torch.int64)
    as_loaded = tuple(experts.module.get_parameter("down_proj").shape)
    each = base.stacks.get(parameter, ())
    if len(each) == experts.count and len(base.stored[each[0]].shape) == 2:
        for expert in numbers.unique().tolist():
            tensor, own = _stored(base, each[expert], as_loaded[1:]), numbers == expert
            yield _Target(f"{name}.{expert}", tensor, experts.transposed, neurons[own], scales[own])
        return
    key = each[0] if len(each) == 1 else _key_of(base, parameter)
    turned = base.stored[key].shape != as_loaded  # as transformers decides whether it transposes the tensor
    tensor = _stored(base, key, (as_loaded[0], *as_loaded[:0:-1]) if turned and len(each) == 1 else as_loaded)
    yield _Target(name, tensor, experts.transposed != turned, neurons, scales, numbers)


def _tensors(entries: Entries) -> tuple[Tensor, Tensor]:
    return torch.tensor(entries.neurons, dtype=torch.int64), torch.tensor(entries.scales)


def _key_of(base: Checkpoint, parameter: str) -> str:
    """Key on the disk of a parameter; raises DataError if it has none of its own."""
    if parameter not in base.keys:
        raise DataError(
            f"{base.folder}: has no {parameter} of its own (missing, or stored in another form); "
            "save the model with save_pretrained"
        )
    return base.keys[parameter]


def _stored(base: Checkpoint, key: str, shape: tuple[int, ...]) -> Stored:
    """The place of a weight; raises DataError unless it is plain numbers in this shape."""
    tensor = base.stored[key]
    if tensor.dtype not in DTYPES:
        raise DataError(
            f"{tensor.file}: {key} is stored as {tensor.dtype}: a quantized checkpoint cannot be scaled "
            "without quantizing it anew; merge into the original and quantize the result"
        )
    if tensor.shape != shape:
        raise DataError(
            f"{tensor.file}: {key} has shape {list(tensor.shape)}, not config.json's; the two do not belong together"
        )
    return tensor


def _refuse_not_finite(targets: Iterable[_Target]) -> None:
    for target in targets:
        before = target.columns_of(target.tensor.read()).read()
        if why := not_finite(before, scale(before, target.scales), target.neurons, target.scales, target.experts):
            raise DataError(
                f"{target.tensor.file}: {target.name}: {why}; lower the scale, or save the checkpoint in bfloat16 or "
                "float32 and merge into that"
            )


# The copy -----------------------------------------------------------------------------------------


def _copy_others(source: Path, target: Path) -> None:
    """Copy every file except weights and hidden ones: configuration, tokenizer, processor, license."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(_OTHER_WEIGHTS):
            shutil.copyfile(file, target / (BASE_CARD if file.name == "README.md" else file.name))


def _write_shard(source: Path, copy_of_it: Path, targets: Iterable[_Target]) -> int:
    """Copy a weight file, scale these columns in the copy, and only then give it its name; return how many."""
    scaled = 0
    with new_file(copy_of_it) as copy:
        shutil.copyfile(source, copy)
        with copy.open("r+b") as file:
            for target in targets:
                weight = read_tensor(file, target.tensor)
                columns = target.columns_of(weight)
                columns.write(scale(columns.read(), target.scales))
                file.seek(target.tensor.begin)
                file.write(weight.view(torch.uint8).numpy().data)
                scaled += len(target.neurons)
    return scaled


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
