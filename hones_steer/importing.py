"""IA3 adapters of PEFT read as profiles: those that `export.peft` has written, and those that PEFT has trained."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
from torch import Tensor, nn

from hones_steer.errors import ProfileError
from hones_steer.export.adapters import CONFIG, PREFIX, WEIGHTS
from hones_steer.export.peft import IA3_SUFFIX
from hones_steer.export.sidecar import SIDECAR, Sidecar, module_names, parse_sidecar
from hones_steer.ffns import Ffn
from hones_steer.layout import find_layout, unwrap
from hones_steer.profile import ModelIdentity, Profile, StrPath
from hones_steer.strict_json import parse_object


def import_peft(folder: StrPath, *, model: nn.Module | None = None, task: str | None = None) -> Profile:
    """Read an IA3 adapter as a profile, with the scales of the adapter's tensors.

    An adapter with a `hones_profile.json` needs no other argument. If it was not changed, the result is the profile
    that was exported; if it was, the evidence is left out with a warning, as it was not measured for these scales.
    For an adapter trained with PEFT, pass the `model` that it was trained on and the `task`'s name; the profile lists
    every neuron with a scale other than 1.

    Raises:
        ProfileError: the folder holds no adapter, one of another type, one that scales anything but the FFNs' hidden
            neurons (the message names it), or one that needs `model` or `task`.
        MismatchError: the adapter's profile was made for another model than `model`.
    """
    try:
        return _import_peft(Path(folder), model, task)
    except ProfileError as error:
        raise ProfileError(f"{folder}: {error}") from error


def _import_peft(folder: Path, model: nn.Module | None, task: str | None) -> Profile:
    config = parse_object(_read(folder / CONFIG), CONFIG, ProfileError)
    if config.get("peft_type") != "IA3":
        raise ProfileError(
            f"is a {config.get('peft_type')} adapter; only IA3 adapters scale activations as profiles do"
        )
    sidecar = parse_sidecar(_read(folder / SIDECAR)) if (folder / SIDECAR).exists() else None
    if sidecar is None and (model is None or task is None):
        base = config.get("base_model_name_or_path") or "the model it was trained on"
        raise ProfileError(
            f"has no {SIDECAR}, so it was not exported by hones-steer; give the task's name and the model ({base})"
        )
    identity = ModelIdentity.from_model(unwrap(model)) if model is not None else None
    if sidecar is not None and identity is not None:
        sidecar.base_model.check(identity)
    base_model = sidecar.base_model if sidecar is not None else identity
    modules = module_names(model, find_layout(model)) if model is not None else sidecar.modules if sidecar else {}
    assert base_model is not None  # one of the two is there
    rows = _read_rows(folder / WEIGHTS, {name: ffn for ffn, name in modules.items()}, base_model)
    profile = _profile_of(rows, sidecar, base_model, task)
    if sidecar is not None and profile.digest != sidecar.digest and sidecar.fields["evidence"]:
        warnings.warn(
            f"{folder}: the scales were changed after the export, so the profile's evidence is left out", stacklevel=3
        )
    return profile


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise ProfileError(f"holds no {file.name}, so it is no adapter of PEFT; name the adapter's folder") from error
    except OSError as error:
        raise ProfileError(f"{file.name} cannot be read: {error}") from error


def _read_rows(file: Path, ffns: Mapping[str, Ffn], base_model: ModelIdentity) -> dict[Ffn, Tensor]:
    """The scales float32 `[I]` of each FFN; raises ProfileError if the adapter holds anything else.

    `ffns` maps the name of a down-projection to its FFN.
    """
    try:
        tensors = safetensors.torch.load_file(file)
    except FileNotFoundError as error:
        raise ProfileError(f"holds no {WEIGHTS}; save the adapter with safe serialization") from error
    except (OSError, safetensors.SafetensorError) as error:
        raise ProfileError(f"{WEIGHTS} cannot be read: {error}") from error
    rows, other_modules = {}, set()
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX).removesuffix(IA3_SUFFIX)
        if name not in ffns or not key.endswith(IA3_SUFFIX):
            other_modules.add(re.sub(r"\.\d+\.", ".*.", name))
        elif tensor.shape != (1, width := base_model.width(ffns[name])):
            raise ProfileError(
                f"{name} has factors of shape {list(tensor.shape)} where a profile scales the "
                f"{width} inputs of a down-projection; "
                "train with feedforward_modules naming the same modules as target_modules"
            )
        else:
            rows[ffns[name]] = tensor[0].float()
    if other_modules:
        raise ProfileError(
            f"also scales {', '.join(sorted(other_modules))}; a profile holds the inputs of the language model's "
            "down-projections only, so train the adapter on these alone"
        )
    return rows


def _profile_of(
    rows: Mapping[Ffn, Tensor], sidecar: Sidecar | None, base_model: ModelIdentity, task: str | None
) -> Profile:
    """The profile of rows of scales `[I]` by FFN: every neuron that the sidecar lists or whose scale is not 1."""
    members = sidecar.neurons if sidecar is not None else {}
    if missing := sorted(members.keys() - rows.keys(), key=lambda ffn: ffn.order):
        raise ProfileError(f"{WEIGHTS} lacks the factors of {missing[0]}; export the profile again")
    layers = {}
    for ffn, row in sorted(rows.items(), key=lambda item: item[0].order):
        chosen = sorted({*members.get(ffn, ()), *(row != 1).nonzero().flatten().tolist()})
        if chosen and not 0 <= chosen[0] <= chosen[-1] < len(row):
            raise ProfileError(f"{SIDECAR} lists neurons beyond {ffn}'s {len(row)}; export the profile again")
        if chosen:
            layers[ffn] = np.array(chosen, dtype=np.int32), row[chosen].numpy()
    if not layers:
        raise ProfileError("every factor is 1, so there is nothing to steer")
    if sidecar is None:
        return Profile(task=task or "", layers=layers, base_model=base_model, method={"name": "peft_ia3"})
    profile = Profile(layers=layers, **{**sidecar.fields, "task": task or sidecar.fields["task"]})
    if profile.digest == sidecar.digest:
        return profile
    method = {"name": "peft_ia3", "changed_from": sidecar.digest}
    return dataclasses.replace(profile, method=method, evidence={})
