"""A steering profile and its file, in formats 1 and 2. This docstring is the whole specification.

A profile says, for one task, by which factor to multiply the FFN activations of a few neurons (the input of each
FFN's down projection). A file is one safetensors file, at most 64 MiB, its header at most 4 MiB:

* Format 1 is for models whose FFNs are all dense and of one width. For each steered layer l (0-based decoder layer of
  the language model, canonical decimal, l < num_layers) it has exactly two tensors of the same length k >= 1:
  ``layers.{l}.neurons`` int32[k], strictly increasing, each in [0, width), and ``layers.{l}.scales`` float32[k],
  finite, |scale| <= 100, -0 read as 0. Neurons not listed have scale 1. At least one layer.
* Format 2 is for all other models. ``layers.{l}.neurons|scales`` are those of the layer's dense FFN,
  ``layers.{l}.shared.neurons|scales`` of its shared expert, and ``layers.{l}.experts.neurons|scales|index`` of all its
  routed experts: ``index`` int32[k] is the expert of each entry; entries ascend by expert, then by neuron.
* ``__metadata__`` has the one key ``hones_steer``. Its value is JSON with sorted keys, no duplicate keys, no
  NaN or infinity, and exactly these keys::

    {"format": 1, "task": "vqa", "description": "...", "license": "...",
     "base_model": {"name": "", "revision": null, "model_type": "llava", "num_layers": 32,
                    "intermediate_size": 11008, "hidden_size": 4096, "sketch": [16 numbers] or null},
     "method": {...}, "evidence": {...}, "created_with": "hones-steer X.Y"}

  In format 2, ``base_model`` has ``ffns`` instead of ``intermediate_size``: the FFNs of each layer, by runs of layers
  that have the same. Ranges are half open, experts are [number, width of each], and an FFN that is not there has no
  key; neither has a layer without FFN a run. Runs ascend, and neighbors differ::

    "ffns": [{"layers": [0, 3], "dense": 1536}, {"layers": [3, 48], "experts": [128, 768], "shared": 768}]

  ``task`` matches ``[A-Za-z0-9][A-Za-z0-9_.-]{0,63}`` and is not ``none``. ``method`` and ``evidence`` are
  free JSON objects (nested at most 32 deep, integers within 64 bits). The sketch is the stored weight of the
  model's final norm in float32 at positions floor(i * hidden_size / 16).
  Several keys in ``__metadata__`` would be written in random order; one is not: the same profile is the same
  bytes.

The digest is the sha256 over little-endian int32(format), then per layer, ascending, and in a layer for dense, shared
and experts in this order: int32(l), in format 2 int32(code) (0 dense, 1 shared, 2 experts), int32(k), for experts
index (int32[k]), neurons (int32[k]), scales (float32[k]). Metadata does not enter, so a new description changes
neither caches nor identity.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import safetensors
import safetensors.numpy

from hones_steer._version import __version__
from hones_steer.errors import ProfileError
from hones_steer.ffn_scales import (
    MAX_SCALE,
    DenseLayers,
    Entries,
    FfnScales,
    Neurons,
    Scales,
    blended,
    checked_scales,
)
from hones_steer.files import write_atomically
from hones_steer.identity import ModelIdentity, sketch_of
from hones_steer.json_values import MAX_JSON_DEPTH, check_keys, check_text, checked_object, shown
from hones_steer.profile_file import (
    MAX_FILE_BYTES,
    MAX_HEADER_BYTES,
    METADATA_KEY,
    TENSOR_DTYPES,
    header_length,
    listed_groups,
    metadata_text,
    parse_header,
    read_bounded,
)
from hones_steer.strict_json import parse_object

__all__ = [
    "CREATED_WITH",
    "FORMATS",
    "MAX_FILE_BYTES",
    "MAX_HEADER_BYTES",
    "MAX_JSON_DEPTH",
    "MAX_SCALE",
    "METADATA_KEY",
    "ModelIdentity",
    "Profile",
    "StrPath",
    "blend",
    "file_sha256",
    "is_task_name",
    "load_profile",
    "metadata_json",
    "parse_metadata",
    "parse_profile",
    "save_profile",
    "serialize_profile",
    "sketch_of",
]

StrPath: TypeAlias = str | os.PathLike[str]

FORMATS = (1, 2)
CREATED_WITH = "hones-steer " + ".".join(__version__.split(".")[:2])

_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def is_task_name(name: str) -> bool:
    """Whether `name` can name a task: ``[A-Za-z0-9][A-Za-z0-9_.-]{0,63}`` and not ``none``."""
    return _TASK_NAME.fullmatch(name) is not None and name != "none"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Profile:
    """Steering of one task: a frozen value.

    `layers` maps a 0-based decoder layer to ``(neurons, scales)``: int32[k] and float32[k] arrays, k >= 1.
    They are copied and read-only; the mapping is immutable and in ascending order. For a model with experts, a key may
    also be a pair of the layer and "dense", "shared" or an expert's number; `ffns` has all by such pairs, and `layers`
    of a profile that lists experts cannot be read. `method` and `evidence` are JSON objects (copied; the digest ignores
    them). `created_with` names the writer and is kept when a file is read.

    ``==`` and ``hash`` compare the content and `base_model`, not task, description or other metadata.
    ``profile * x`` scales the offsets (scale - 1); ``a + b`` and ``a - b`` add and subtract them, where a neuron that
    only one profile lists has offset 0 in the other. The result keeps the left task name and every neuron, also one
    whose scale has become 1; it has no evidence, because nothing was measured for it.

    Raises:
        ProfileError: a field breaks the format (see the module's docstring), naming the culprit.
        MismatchError: ``a + b`` of profiles of different models.
    """

    task: str
    layers: Mapping[Any, tuple[Neurons, Scales]]
    base_model: ModelIdentity
    description: str = ""
    license: str = ""
    method: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    evidence: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    created_with: str = CREATED_WITH

    def __post_init__(self) -> None:
        _check_task(self.task)
        if not isinstance(self.base_model, ModelIdentity):
            raise ProfileError(f"base_model is a {type(self.base_model).__name__}; give a ModelIdentity")
        for field in ("description", "license", "created_with"):
            check_text(getattr(self, field), field)
        object.__setattr__(self, "layers", DenseLayers(checked_scales(self.layers, self.base_model)))
        for field in ("method", "evidence"):
            object.__setattr__(self, field, checked_object(getattr(self, field), field))

    @property
    def ffns(self) -> FfnScales:
        """The neurons and scales of each FFN that is listed: ``ffns[(3, "dense")]``, of expert 17 ``ffns[(3, 17)]``."""
        layers: Any = self.layers  # DenseLayers, since __post_init__
        ffns: FfnScales = layers.ffns
        return ffns

    @property
    def format(self) -> int:
        """The format of its file: 1 where the model's FFNs are all dense and of one width, else 2."""
        return self.base_model.format

    @cached_property
    def digest(self) -> str:
        """Sha256 of the content alone, 64 hex digits (see the module's docstring)."""
        state = hashlib.sha256(struct.pack("<i", self.format))
        for ffn, entries in self.ffns.groups.items():
            code = () if self.format == 1 else (ffn.code,)
            numbers = (ffn.layer, *code, len(entries.neurons))
            state.update(struct.pack(f"<{len(numbers)}i", *numbers))
            if entries.experts is not None:
                state.update(entries.experts.astype("<i4").tobytes())
            state.update(entries.neurons.astype("<i4").tobytes())
            state.update(entries.scales.astype("<f4").tobytes())
        return state.hexdigest()

    @property
    def short_digest(self) -> str:
        """The first 12 hex digits of `digest`, for people."""
        return self.digest[:12]

    @property
    def num_neurons(self) -> int:
        """Number of neurons listed, over all FFNs."""
        return self.ffns.num_neurons

    @property
    def steered_layers(self) -> tuple[int, ...]:
        """The layers that have neurons listed, ascending."""
        return self.ffns.layers

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Profile):
            return NotImplemented
        return self.digest == other.digest and self.base_model == other.base_model

    def __hash__(self) -> int:
        return hash((self.digest, self.base_model))

    def __repr__(self) -> str:
        size = f"{self.num_neurons} neurons in {len(self.steered_layers)} layers"
        return f"<Profile {self.task} {self.short_digest}: {size} of {self.base_model.model_type}>"

    def __reduce__(self) -> tuple[type[Profile], tuple[Any, ...]]:
        # A mappingproxy cannot be pickled or deep-copied by itself.
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        values[1] = dict(self.ffns)
        return Profile, tuple(values)

    def __mul__(self, strength: float) -> Profile:
        if isinstance(strength, bool) or not isinstance(strength, int | float | np.floating | np.integer):
            return NotImplemented
        if not math.isfinite(strength):
            raise ProfileError(f"a profile cannot be scaled by {strength}; give a finite number")
        return blend([(self, float(strength))], task=self.task, description=f"{self.task} * {strength}")

    __rmul__ = __mul__

    def __add__(self, other: Profile) -> Profile:
        if not isinstance(other, Profile):
            return NotImplemented
        text = f"{self.task} + {other.task}"
        return blend([(self, 1.0), (other, 1.0)], task=self.task, description=text)

    def __sub__(self, other: Profile) -> Profile:
        if not isinstance(other, Profile):
            return NotImplemented
        text = f"{self.task} - {other.task}"
        return blend([(self, 1.0), (other, -1.0)], task=self.task, description=text)


def blend(
    terms: Sequence[tuple[Profile, float]], *, task: str, description: str, allow_mismatch: bool = False
) -> Profile:
    """Add weighted profiles: the scale is 1 + Σ weight · (scale − 1) at every neuron that any of the terms lists.

    The sum is rounded once (see `blended`). The license joins the terms' licenses with " AND "; the base model is the
    first's.

    Raises:
        MismatchError: the terms' models differ (see `ModelIdentity.require_same`).
        ProfileError: a resulting scale exceeds 100 in magnitude.
    """
    first = terms[0][0]
    for profile, _ in terms[1:]:
        first.base_model.require_same(profile.base_model, allow_mismatch=allow_mismatch)
    return Profile(
        task=task,
        layers=DenseLayers(blended([(profile.ffns, weight) for profile, weight in terms])),
        base_model=first.base_model,
        description=description,
        license=" AND ".join(sorted({profile.license for profile, _ in terms} - {""})),
        method={
            "name": "blend",
            "terms": [{"task": p.task, "digest": p.digest, "strength": weight} for p, weight in terms],
        },
    )


# Reading ------------------------------------------------------------------------------------------


def load_profile(path: StrPath) -> Profile:
    """Read a profile file; everything is validated before anything is returned.

    Raises:
        ProfileError: the file cannot be read or breaks the format; the message names the file and what is wrong.
    """
    try:
        return parse_profile(read_bounded(path))
    except OSError as error:
        raise ProfileError(f"{os.fspath(path)}: cannot be read: {error.strerror}") from error
    except ProfileError as error:
        raise ProfileError(f"{os.fspath(path)}: {error}") from error


def parse_profile(data: bytes) -> Profile:
    """Parse the bytes of a profile file.

    Raises:
        ProfileError: they break the format; the message says how, without a file name.
    """
    header = parse_header(data)
    fields = parse_metadata(metadata_text(header.pop("__metadata__", None)))
    base_model: ModelIdentity = fields["base_model"]
    groups = listed_groups(header, base_model)
    try:
        tensors = safetensors.numpy.load(data)
    except safetensors.SafetensorError as error:
        raise ProfileError(f"not a sound safetensors file: {error}") from error
    parts = {ffn: Entries(*(tensors.get(f"{ffn.prefix}.{kind}") for kind in TENSOR_DTYPES)) for ffn in groups}  # type: ignore[arg-type]
    return Profile(layers=DenseLayers(FfnScales(parts)), **fields)


def file_sha256(path: StrPath) -> str:
    """Sha256 of the file's bytes, 64 hex digits, as the Hub shows it; not the profile's digest."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_metadata(text: str) -> dict[str, Any]:
    """Parse the text that `metadata_json` writes into the fields of a `Profile`, without its layers.

    Raises:
        ProfileError: the text has another version, a key too few or too many, or a bad `base_model`.
    """
    metadata = parse_object(text, "the metadata", ProfileError)
    version = metadata.get("format")
    if type(version) is not int or version not in FORMATS:
        raise ProfileError(
            f"format is {shown(version)}, but this hones-steer reads formats 1 and 2; upgrade hones-steer"
        )
    fields = {field.name for field in dataclasses.fields(Profile)} - {"layers"}
    check_keys(metadata, fields | {"format"}, "the metadata")
    del metadata["format"]
    base_model = metadata["base_model"]
    if isinstance(base_model, dict) and ("ffns" in base_model) != (version == 2):
        raise ProfileError(
            "base_model has 'ffns', which is for format 2" if version == 1 else "base_model lacks the key 'ffns'"
        )
    return metadata | {"base_model": ModelIdentity.from_json(base_model)}


def _check_task(value: object) -> None:
    check_text(value, "task")
    if not is_task_name(str(value)):
        raise ProfileError(
            f"task {shown(value)} is not a valid name; use at most 64 letters, digits, '_', '.' and '-', "
            "starting with a letter or digit, and not 'none'"
        )


# Writing ------------------------------------------------------------------------------------------


def save_profile(profile: Profile, path: StrPath) -> None:
    """Write a profile file atomically: whatever happens, `path` holds the old file or the whole new one.

    The same profile always has the same bytes.

    Raises:
        ProfileError: the file cannot be written (disk full, no such folder); nothing is left behind.
    """
    data = serialize_profile(profile)
    if (header := header_length(data)) > MAX_HEADER_BYTES:
        raise ProfileError(
            f"{os.fspath(path)}: method, evidence and names take {header:,} bytes, more than the 4 MiB allowed"
        )
    if len(data) > MAX_FILE_BYTES:
        raise ProfileError(f"{os.fspath(path)}: the profile has {len(data):,} bytes, more than the 64 MiB allowed")
    write_atomically(path, data, parents=False, error_type=ProfileError)


def serialize_profile(profile: Profile) -> bytes:
    """Bytes of the profile's file."""
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for ffn, entries in profile.ffns.groups.items():
        for kind, array in zip(TENSOR_DTYPES, entries, strict=True):
            if array is not None:
                tensors[f"{ffn.prefix}.{kind}"] = array
    return safetensors.numpy.save(tensors, metadata={METADATA_KEY: metadata_json(profile)})


def metadata_json(profile: Profile) -> str:
    """JSON text of all a profile's fields but its layers, as it stands in the file."""
    metadata = {
        field.name: getattr(profile, field.name)
        for field in dataclasses.fields(Profile)
        if field.name not in ("layers", "base_model")
    }
    metadata |= {"format": profile.format, "base_model": profile.base_model.to_json()}
    return json.dumps(metadata, sort_keys=True, allow_nan=False, separators=(",", ":"))
