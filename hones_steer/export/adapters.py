"""Adapter folders of PEFT: their files, the pattern that names a model's modules, and their model card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from hones_steer.errors import DataError, LayoutError
from hones_steer.export.cards import card, describe_model, evidence_table, profiles_table
from hones_steer.export.sidecar import SIDECAR, without_wrappers
from hones_steer.ffns import Ffn
from hones_steer.files import new_folder
from hones_steer.layout import Layout, base_layer, find_layout, is_transposed, unwrap
from hones_steer.profile import ModelIdentity, Profile, StrPath

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # every tensor's name begins with it


def checked_layout(profile: Profile, model: nn.Module, allow_mismatch: bool) -> Layout:
    """The model's layout.

    Raises LayoutError if there is none or the profile scales experts, or a layer that has no FFN, and MismatchError if
    the profile is another model's.
    """
    layout = find_layout(model)
    profile.base_model.check(ModelIdentity.from_model(unwrap(model)), allow_mismatch=allow_mismatch)
    layout.require_linear(profile.ffns)
    return layout


def module_pattern(model: nn.Module, modules: Mapping[Ffn, str]) -> str:
    """A regular expression that matches these modules only; a vision tower may have modules of the same last name.

    `modules` maps FFNs to names in the model.

    Raises LayoutError if PEFT, which matches names as here, would find other modules of the model by it, or none: it
    refuses such an adapter itself, but vLLM serves the model without it.
    """
    layers: dict[tuple[str, str], list[str]] = {}
    for ffn, name in modules.items():
        before, _, after = name.rpartition(f".{ffn.layer}.")
        layers.setdefault((before, after), []).append(str(ffn.layer))
    pattern = "|".join(
        rf"{re.escape(before)}\.({'|'.join(numbers)})\.{re.escape(after)}"
        for (before, after), numbers in layers.items()
    )
    found = [name for name in map(without_wrappers, dict(unwrap(model).named_modules())) if re.fullmatch(pattern, name)]
    if sorted(found) != sorted(modules.values()):
        raise LayoutError(
            f"an adapter for {len(modules)} modules, the first being {next(iter(modules.values()))}, would match "
            f"{len(found)} of the model's by its names; export from the model as transformers loads it"
        )
    return pattern


def is_conv1d(layout: Layout) -> bool:
    """Whether the down-projections keep their weights as `[I, hidden]`, which PEFT calls `fan_in_fan_out`."""
    return is_transposed(base_layer(layout.projections[0].down_proj))


def common_settings(profile: Profile) -> dict[str, Any]:
    """Settings that every adapter's configuration has."""
    return {"inference_mode": True, "base_model_name_or_path": profile.base_model.name or None}


def peft_package() -> Any:
    """The package `peft`; raises DataError, with the command that installs it, if it is not installed."""
    try:
        import peft
    except ModuleNotFoundError as error:
        raise DataError("peft is not installed; run: pip install 'hones-steer[peft]'") from error
    return peft


def write_adapter(folder: StrPath, config: Any, tensors: Mapping[str, Tensor], sidecar: str, text: str) -> None:
    """Write an adapter's configuration, tensors, sidecar and model card; all of them appear, or nothing does.

    Raises DataError if `folder` exists or cannot be written.
    """
    with new_folder(folder) as temporary:
        config.save_pretrained(temporary)
        (temporary / SIDECAR).write_text(sidecar, encoding="utf-8")
        (temporary / "README.md").write_text(text, encoding="utf-8")
        data = safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}, metadata={"format": "pt"})
        (temporary / WEIGHTS).write_bytes(data)


def adapter_card(profile: Profile, kind: str, notes: str) -> str:
    """The model card; `kind` is "IA3" or "LoRA", `notes` says how exact the adapter is."""
    return card(
        [profile],
        [
            f"# Steering profile `{profile.task}` as a {kind} adapter",
            f"Made by hones-steer from the profile with digest `{profile.digest}` for {describe_model(profile)}. "
            f"{notes}",
            profiles_table([profile]),
            evidence_table([profile]),
            "```python\nfrom peft import PeftModel\n\n"
            'model = PeftModel.from_pretrained(model, "this folder")  # the base model, loaded by transformers\n```',
        ],
        library_name="peft",
    )
