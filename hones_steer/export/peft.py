"""Profiles written as IA3 adapters of PEFT, exactly.

IA3 multiplies the input of a feed-forward module by a vector, as a profile does at W_down.
"""

from __future__ import annotations

from torch import nn

from hones_steer.export.adapters import (
    PREFIX,
    adapter_card,
    checked_layout,
    common_settings,
    is_conv1d,
    module_pattern,
    peft_package,
    write_adapter,
)
from hones_steer.export.sidecar import module_names, sidecar_text
from hones_steer.profile import Profile, StrPath
from hones_steer.slots import scale_row

IA3_SUFFIX = ".ia3_l"


def export_peft(profile: Profile, model: nn.Module, folder: StrPath, *, allow_mismatch: bool = False) -> None:
    """Write a profile as an IA3 adapter: `PeftModel.from_pretrained(model, folder)` scales as `steer` does.

    The folder also gets `hones_profile.json` (what `import_peft` needs besides the scales) and a model card.

    Raises:
        DataError: peft is not installed, or the folder exists or cannot be written.
        LayoutError, MismatchError: the model's FFNs are not recognized, the profile scales experts, which PEFT cannot,
            or it is another model's.
    """
    layout = checked_layout(profile, model, allow_mismatch)
    modules = {ffn: name for ffn, name in module_names(model, layout).items() if ffn in profile.ffns}
    tensors = {f"{PREFIX}{name}{IA3_SUFFIX}": scale_row(profile, ffn)[None] for ffn, name in modules.items()}
    pattern = module_pattern(model, modules)
    config = peft_package().IA3Config(
        target_modules=pattern,
        feedforward_modules=pattern,
        fan_in_fan_out=is_conv1d(layout),
        **common_settings(profile),
    )
    text = adapter_card(profile, "IA3", "Exact: PEFT multiplies the same activations by the same float32 factors.")
    write_adapter(folder, config, tensors, sidecar_text(profile, modules), text)
