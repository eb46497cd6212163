"""`hones_profile.json`, the file beside an export: a profile's metadata, its neurons and where their factors went.

The factors themselves are in the export's tensors only, so that the two cannot contradict each other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from hones_steer.errors import ProfileError
from hones_steer.ffns import Ffn
from hones_steer.layout import Layout, unwrap
from hones_steer.profile import ModelIdentity, Profile, metadata_json, parse_metadata
from hones_steer.strict_json import parse_object

SIDECAR = "hones_profile.json"


def sidecar_text(profile: Profile, modules: Mapping[Ffn, str]) -> str:
    """The file's text. `modules` maps each FFN of the profile to the module that carries its factors."""
    content = {
        "digest": profile.digest,
        "metadata": json.loads(metadata_json(profile)),
        "modules": {ffn.key: name for ffn, name in modules.items()},
        "neurons": {ffn.key: neurons.tolist() for ffn, (neurons, _) in profile.ffns.items()},
    }
    return json.dumps(content, sort_keys=True) + "\n"


@dataclass(frozen=True)
class Sidecar:
    """A validated `hones_profile.json`; `fields` are the profile's fields except `layers`."""

    digest: str
    fields: Mapping[str, Any]
    modules: Mapping[Ffn, str]
    neurons: Mapping[Ffn, set[int]]

    @property
    def base_model(self) -> ModelIdentity:
        base_model: ModelIdentity = self.fields["base_model"]
        return base_model


def parse_sidecar(text: bytes) -> Sidecar:
    """Read the file's text; raises ProfileError, naming the file, if it is damaged."""
    content = parse_object(text, SIDECAR, ProfileError)
    try:
        modules = {Ffn.parse(key): str(name) for key, name in content["modules"].items()}
        neurons = {Ffn.parse(key): {int(neuron) for neuron in listed} for key, listed in content["neurons"].items()}
        digest, metadata = str(content["digest"]), json.dumps(content["metadata"])
    except (KeyError, AttributeError, TypeError, ValueError, ProfileError) as error:
        raise ProfileError(f"{SIDECAR} is damaged ({error!r}); export the profile again") from error
    if modules.keys() != neurons.keys():
        raise ProfileError(f"{SIDECAR} names modules and neurons of different FFNs; export the profile again")
    return Sidecar(digest, parse_metadata(metadata), modules, neurons)


def module_names(model: nn.Module, layout: Layout) -> dict[Ffn, str]:
    """Dotted name of each down-projection that is a linear layer in the Hugging Face model (without wrappers)."""
    paths = {id(module): without_wrappers(name) for name, module in unwrap(model).named_modules()}
    return {projection.ffn: paths[id(projection.down_proj)] for projection in layout.projections}


def without_wrappers(name: str) -> str:
    """A module's name as it is where no part of the model is compiled by itself, in the file of a checkpoint say."""
    return name.replace("_orig_mod.", "")
