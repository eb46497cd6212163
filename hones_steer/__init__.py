"""hones-steer: per-request scaling of a vision-language model's FFN neurons.

Importing this package loads neither torch nor transformers: a name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from hones_steer._version import __version__

if TYPE_CHECKING:
    from hones_steer.errors import (
        DataError,
        HonesError,
        LayoutError,
        MismatchError,
        ProfileError,
        RoutingError,
        StateError,
    )
    from hones_steer.export.lora import export_lora
    from hones_steer.export.merged import merge_into
    from hones_steer.export.peft import export_peft
    from hones_steer.hub import pull_profile, push_profile
    from hones_steer.huggingface import Steering, steer
    from hones_steer.importing import import_peft
    from hones_steer.layout import find_layout, register_layout
    from hones_steer.profile import ModelIdentity, Profile, load_profile, save_profile
    from hones_steer.store import ProfileStore

__all__ = [
    "DataError",
    "HonesError",
    "LayoutError",
    "MismatchError",
    "ModelIdentity",
    "Profile",
    "ProfileError",
    "ProfileStore",
    "RoutingError",
    "StateError",
    "Steering",
    "__version__",
    "export_lora",
    "export_peft",
    "find_layout",
    "import_peft",
    "load_profile",
    "merge_into",
    "pull_profile",
    "push_profile",
    "register_layout",
    "save_profile",
    "steer",
]

_MODULES = {
    "errors": (
        "DataError",
        "HonesError",
        "LayoutError",
        "MismatchError",
        "ProfileError",
        "RoutingError",
        "StateError",
    ),
    "export.lora": ("export_lora",),
    "export.merged": ("merge_into",),
    "export.peft": ("export_peft",),
    "hub": ("pull_profile", "push_profile"),
    "huggingface": ("Steering", "steer"),
    "importing": ("import_peft",),
    "layout": ("find_layout", "register_layout"),
    "profile": ("ModelIdentity", "Profile", "load_profile", "save_profile"),
    "store": ("ProfileStore",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'hones_steer' has no attribute {name!r}")
    try:
        module = importlib.import_module(f"hones_steer.{_HOME[name]}")
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers", "huggingface_hub"):
            raise
        raise ModuleNotFoundError(
            f"hones_steer.{name} needs {error.name}: pip install 'hones-steer[hf]'", name=error.name
        ) from error
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
