"""A steering profile and its file format 1. This module is the whole specification.

A profile says, for one task, by which factor to multiply the FFN activations of a few neurons (the input of
each decoder layer's down projection). A file is one safetensors file, at most 64 MiB:

* For each steered layer l (0-based decoder layer of the language model, canonical decimal, l < num_layers)
  exactly two tensors of the same length k >= 1: ``layers.{l}.neurons`` int32[k], strictly increasing, each
  in [0, intermediate_size), and ``layers.{l}.scales`` float32[k], finite, |scale| <= 100, -0 read as 0.
  Neurons not listed have scale 1. At least one layer.
* ``__metadata__`` has the one key ``hones_steer``. Its value is JSON with sorted keys, no duplicate keys, no
  NaN or infinity, and exactly these keys::

    {"format": 1, "task": "vqa", "description": "...", "license": "...",
     "base_model": {"name": "", "revision": null, "model_type": "llava", "num_layers": 32,
                    "intermediate_size": 11008, "hidden_size": 4096, "sketch": [16 numbers] or null},
     "method": {...}, "evidence": {...}, "created_with": "hones-steer X.Y"}

  ``task`` matches ``[A-Za-z0-9][A-Za-z0-9_.-]{0,63}`` and is not ``none``. ``method`` and ``evidence`` are
  free JSON objects (nested at most 32 deep, integers within 64 bits). The sketch is the stored weight of the
  model's final norm in float32 at positions floor(i * hidden_size / 16).
  Several keys in ``__metadata__`` would be written in random order; one is not: the same profile is the same
  bytes.

The digest is the sha256 over little-endian int32(format), then per layer, ascending: int32(l), int32(k),
neurons (int32[k]), scales (float32[k]). Metadata does not enter, so a new description changes neither caches
nor identity.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import operator
import os
import re
import reprlib
import stat
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import safetensors
import safetensors.numpy

from hones_steer._version import __version__
from hones_steer.errors import MismatchError, ProfileError
from hones_steer.files import write_atomically
from hones_steer.strict_json import parse_object

if TYPE_CHECKING:
    from torch import nn

Neurons: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int32]]
Scales: TypeAlias = np.ndarray[tuple[int], np.dtype[np.float32]]
Layers: TypeAlias = Mapping[int, tuple[Neurons, Scales]]
StrPath: TypeAlias = str | os.PathLike[str]

FORMAT = 1
MAX_FILE_BYTES = 64 * 2**20
MAX_SCALE = 100.0
MAX_JSON_DEPTH = 32
SKETCH_LENGTH = 16
SKETCH_TOLERANCE = 0.01
METADATA_KEY = "hones_steer"
CREATED_WITH = "hones-steer " + ".".join(__version__.split(".")[:2])

_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)?")
_TENSOR_NAME = re.compile(r"layers\.(0|[1-9][0-9]{0,8})\.(neurons|scales)")
_TENSOR_DTYPES = {"neurons": "I32", "scales": "F32"}
_MAX_INT32 = 2**31 - 1


def is_task_name(name: str) -> bool:
    """Whether `name` can name a task: ``[A-Za-z0-9][A-Za-z0-9_.-]{0,63}`` and not ``none``."""
    return _TASK_NAME.fullmatch(name) is not None and name != "none"


@dataclasses.dataclass(frozen=True)
class ModelIdentity:
    """Identity of the model that a profile was made for.

    `name` and `revision` tell a person where the model came from; `check` does not compare them.
    `sketch` is 16 numbers of the final norm's weight: it survives a change of dtype, quantization and tensor
    parallelism, tells another base model from this one, and does not tell a light fine-tune.

    Raises:
        ProfileError: a field has the wrong type or range.
    """

    name: str
    revision: str | None
    model_type: str
    num_layers: int
    intermediate_size: int
    hidden_size: int
    sketch: tuple[float, ...] | None

    def __post_init__(self) -> None:
        _check_text(self.name, "base_model.name")
        if self.revision is not None:
            _check_text(self.revision, "base_model.revision")
        _check_text(self.model_type, "base_model.model_type")
        for field in ("num_layers", "intermediate_size", "hidden_size"):
            _check_size(getattr(self, field), f"base_model.{field}")
        if self.sketch is not None:
            object.__setattr__(self, "sketch", _checked_sketch(self.sketch))

    @classmethod
    def from_model(cls, model: nn.Module) -> ModelIdentity:
        """The identity of a loaded transformers model.

        A model loaded from a local folder has the empty name, as a path means nothing on another machine. Without its
        final norm in memory (meta tensors) it has no sketch.

        Raises:
            LayoutError: the model's structure is not recognized.
        """
        from hones_steer.layout import find_layout

        layout = find_layout(model)
        config: Any = getattr(model, "config", None)
        return cls(
            name=_hub_name(getattr(config, "_name_or_path", None)),
            revision=getattr(config, "_commit_hash", None),
            model_type=layout.model_type,
            num_layers=len(layout.layers),
            intermediate_size=layout.intermediate_size,
            hidden_size=layout.hidden_size,
            sketch=sketch_of(layout.final_norm, layout.hidden_size),
        )

    def check(self, expected_from_model: ModelIdentity, *, allow_mismatch: bool = False) -> None:
        """Check that a profile with this identity belongs to the model identified by `expected_from_model`.

        `allow_mismatch` waives the model type and the sketch, never the shapes: scales for other shapes have
        no meaning. If either side has no sketch, a UserWarning says that only the shapes were compared.

        Raises:
            MismatchError: it belongs to another model; the message names both values and the way out.
        """
        owner = "the model it was made for" + (f" ({self.name})" if self.name else "")
        if difference := self._shape_difference(expected_from_model, "the model"):
            raise MismatchError(f"the profile belongs to another model: {difference}; load {owner}")
        if allow_mismatch:
            return
        if difference := self._weight_difference(expected_from_model, "the model"):
            raise MismatchError(
                f"the profile belongs to another model: {difference}; load {owner} or pass allow_mismatch=True"
            )
        if self.sketch is None or expected_from_model.sketch is None:
            side = "profile" if self.sketch is None else "model"
            warnings.warn(
                f"the {side} has no sketch of the final norm, so only the shapes were compared; "
                "make sure that the profile was made for this model",
                stacklevel=2,
            )

    def require_same(self, other: ModelIdentity, *, allow_mismatch: bool = False) -> None:
        """Check that profiles with these two identities may be added; names and revisions are not compared.

        Raises:
            MismatchError: the shapes differ, or (unless `allow_mismatch`) the model types or sketches.
        """
        difference = self._shape_difference(other, "the other")
        if difference is None and not allow_mismatch:
            difference = self._weight_difference(other, "the other")
        if difference is not None:
            raise MismatchError(
                f"profiles of different models cannot be combined: {difference}; use profiles of one model"
            )

    def _shape_difference(self, other: ModelIdentity, owner: str) -> str | None:
        for field in ("num_layers", "intermediate_size", "hidden_size"):
            size, other_size = getattr(self, field), getattr(other, field)
            if size != other_size:
                return f"{field} is {size} in the profile and {other_size} in {owner}"
        return None

    def _weight_difference(self, other: ModelIdentity, owner: str) -> str | None:
        if self.model_type != other.model_type:
            return f"model_type is {self.model_type!r} in the profile and {other.model_type!r} in {owner}"
        for i, (a, b) in enumerate(zip(self.sketch or (), other.sketch or (), strict=False)):
            if abs(a - b) > SKETCH_TOLERANCE * max(abs(a), abs(b)):
                where = f"the final norm's weight at position {i * self.hidden_size // SKETCH_LENGTH}"
                return f"{where} is {a:.6g} in the profile and {b:.6g} in {owner}"
        return None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Profile:
    """Steering of one task: a frozen value.

    `layers` maps a 0-based decoder layer to ``(neurons, scales)``: int32[k] and float32[k] arrays, k >= 1.
    They are copied and read-only; the mapping is immutable and in ascending order. `method` and `evidence`
    are JSON objects (copied; the digest ignores them). `created_with` names the writer and is kept when a
    file is read.

    ``==`` and ``hash`` compare the content and `base_model`, not task, description or other metadata.
    ``profile * x`` scales the offsets (scale - 1); ``a + b`` and ``a - b`` add and subtract them, where a neuron that
    only one profile lists has offset 0 in the other. The result keeps the left task name and every neuron, also one
    whose scale has become 1; it has no evidence, because nothing was measured for it.

    Raises:
        ProfileError: a field breaks format 1 (see the module's docstring), naming the culprit.
        MismatchError: ``a + b`` of profiles of different models.
    """

    task: str
    layers: Layers
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
            _check_text(getattr(self, field), field)
        object.__setattr__(self, "layers", _checked_layers(self.layers, self.base_model))
        for field in ("method", "evidence"):
            object.__setattr__(self, field, _checked_object(getattr(self, field), field))

    @cached_property
    def digest(self) -> str:
        """Sha256 of the content alone, 64 hex digits (see the module's docstring)."""
        state = hashlib.sha256(struct.pack("<i", FORMAT))
        for layer, (neurons, scales) in self.layers.items():
            state.update(struct.pack("<ii", layer, len(neurons)))
            state.update(neurons.astype("<i4").tobytes())
            state.update(scales.astype("<f4").tobytes())
        return state.hexdigest()

    @property
    def short_digest(self) -> str:
        """The first 12 hex digits of `digest`, for people."""
        return self.digest[:12]

    @property
    def num_neurons(self) -> int:
        """Number of neurons listed, over all layers."""
        return sum(len(neurons) for neurons, _ in self.layers.values())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Profile):
            return NotImplemented
        return self.digest == other.digest and self.base_model == other.base_model

    def __hash__(self) -> int:
        return hash((self.digest, self.base_model))

    def __repr__(self) -> str:
        size = f"{self.num_neurons} neurons in {len(self.layers)} layers"
        return f"<Profile {self.task} {self.short_digest}: {size} of {self.base_model.model_type}>"

    def __reduce__(self) -> tuple[type[Profile], tuple[Any, ...]]:
        # A mappingproxy cannot be pickled or deep-copied by itself.
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        values[1] = dict(self.layers)
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

    Computed in float64 as Σ weight · scale + (1 − Σ weight), which keeps weight 1 and weight 0 exact, then
    rounded to float32. The license joins the terms' licenses with " AND "; the base model is the first's.

    Raises:
        MismatchError: the terms' models differ (see `ModelIdentity.require_same`).
        ProfileError: a resulting scale exceeds 100 in magnitude.
    """
    first = terms[0][0]
    for profile, _ in terms[1:]:
        first.base_model.require_same(profile.base_model, allow_mismatch=allow_mismatch)
    steered = sorted({layer for profile, _ in terms for layer in profile.layers})
    return Profile(
        task=task,
        layers={layer: _blend_layer(terms, layer) for layer in steered},
        base_model=first.base_model,
        description=description,
        license=" AND ".join(sorted({profile.license for profile, _ in terms} - {""})),
        method={
            "name": "blend",
            "terms": [{"task": p.task, "digest": p.digest, "strength": weight} for p, weight in terms],
        },
    )


def _blend_layer(terms: Sequence[tuple[Profile, float]], layer: int) -> tuple[Neurons, Scales]:
    parts = [(*profile.layers[layer], weight) for profile, weight in terms if layer in profile.layers]
    union = np.unique(np.concatenate([neurons for neurons, _, _ in parts]))
    total, rest = np.zeros(len(union)), np.ones(len(union))
    with np.errstate(over="ignore", invalid="ignore"):  # the result is inf or NaN, which Profile refuses
        for neurons, scales, weight in parts:
            positions = np.searchsorted(union, neurons)
            total[positions] += weight * scales.astype(np.float64)
            rest[positions] -= weight
        return union, (total + rest).astype(np.float32)


# Reading ------------------------------------------------------------------------------------------


def load_profile(path: StrPath) -> Profile:
    """Read a profile file; everything is validated before anything is returned.

    Raises:
        ProfileError: the file cannot be read or breaks format 1; the message names the file and what is wrong.
    """
    try:
        return parse_profile(_read(path))
    except OSError as error:
        raise ProfileError(f"{os.fspath(path)}: cannot be read: {error.strerror}") from error
    except ProfileError as error:
        raise ProfileError(f"{os.fspath(path)}: {error}") from error


def parse_profile(data: bytes) -> Profile:
    """Parse the bytes of a profile file.

    Raises:
        ProfileError: they break format 1; the message says how, without a file name.
    """
    header = _parse_header(data)
    fields = parse_metadata(_metadata_text(header.pop("__metadata__", None)))
    layers = _check_tensor_names(header, fields["base_model"].num_layers)
    try:
        tensors = safetensors.numpy.load(data)
    except safetensors.SafetensorError as error:
        raise ProfileError(f"not a sound safetensors file: {error}") from error
    return Profile(
        layers={i: (tensors[f"layers.{i}.neurons"], tensors[f"layers.{i}.scales"]) for i in layers}, **fields
    )


def file_sha256(path: StrPath) -> str:
    """Sha256 of the file's bytes, 64 hex digits, as the Hub shows it; not the profile's digest."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: StrPath) -> bytes:
    # Non-blocking, or opening a FIFO would wait for a writer forever.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ProfileError("is not a regular file; give the path of a profile (.safetensors)")
        data = b"" if status.st_size > MAX_FILE_BYTES else file.read(MAX_FILE_BYTES + 1)
    if status.st_size > MAX_FILE_BYTES or len(data) > MAX_FILE_BYTES:
        raise ProfileError(f"is larger than 64 MiB ({status.st_size:,} bytes); a profile has a few kilobytes")
    return data


def _parse_header(data: bytes) -> dict[str, Any]:
    if len(data) < 8:
        raise ProfileError(f"not a safetensors file: {len(data)} bytes are too few for a header")
    (length,) = struct.unpack("<Q", data[:8])
    if length > len(data) - 8:
        raise ProfileError(
            f"not a safetensors file, or a truncated one: the header claims {length} bytes of {len(data) - 8}"
        )
    return parse_object(data[8 : 8 + length], "the safetensors header", ProfileError)


def _metadata_text(entry: object) -> str:
    if not isinstance(entry, dict) or METADATA_KEY not in entry:
        raise ProfileError(f"not a steering profile: __metadata__ has no key {METADATA_KEY!r}")
    if len(entry) > 1:
        extra = next(key for key in entry if key != METADATA_KEY)
        raise ProfileError(f"__metadata__ has the key {_shown(extra)} beside {METADATA_KEY!r}, the only one allowed")
    text = entry[METADATA_KEY]
    if not isinstance(text, str):
        raise ProfileError(f"__metadata__.{METADATA_KEY} is not a string")
    return text


def parse_metadata(text: str) -> dict[str, Any]:
    """Parse the text that `metadata_json` writes into the fields of a `Profile`, without its layers.

    Raises:
        ProfileError: the text has another version, a key too few or too many, or a bad `base_model`.
    """
    metadata = parse_object(text, "the metadata", ProfileError)
    version = metadata.get("format")
    if type(version) is not int or version != FORMAT:
        raise ProfileError(
            f"format is {_shown(version)}, but this hones-steer reads format {FORMAT}; upgrade hones-steer"
        )
    fields = {field.name for field in dataclasses.fields(Profile)} - {"layers"}
    _check_keys(metadata, fields | {"format"}, "the metadata")
    del metadata["format"]
    return metadata | {"base_model": _parse_base_model(metadata["base_model"])}


def _parse_base_model(value: object) -> ModelIdentity:
    if not isinstance(value, dict):
        raise ProfileError(f"base_model is {_shown(value)}, not an object")
    _check_keys(value, {field.name for field in dataclasses.fields(ModelIdentity)}, "base_model")
    return ModelIdentity(**value)


def _check_tensor_names(header: Mapping[str, Any], num_layers: int) -> list[int]:
    layers: dict[int, set[str]] = {}
    for name, entry in header.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None:
            raise ProfileError(
                f"unexpected tensor {_shown(name)}; only layers.<l>.neurons and layers.<l>.scales belong here"
            )
        layer, kind = int(match[1]), match[2]
        _check_layer_number(layer, num_layers)
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        if dtype != _TENSOR_DTYPES[kind]:
            raise ProfileError(f"tensor {name} has dtype {_shown(dtype)}, expected {_TENSOR_DTYPES[kind]}")
        layers.setdefault(layer, set()).add(kind)
    for layer, kinds in layers.items():
        for kind in sorted(_TENSOR_DTYPES.keys() - kinds):
            raise ProfileError(f"tensor layers.{layer}.{kind} is missing")
    return sorted(layers)


# Checks of values, the same for a file and for a profile built in code ----------------------------


def _shown(value: object) -> str:
    """The repr of a value from an untrusted file, cut to 80 characters for an error message."""
    text = reprlib.repr(value)  # plain repr fails on deep nesting
    return text if len(text) <= 80 else text[:77] + "..."


def _check_keys(value: Mapping[str, object], expected: Iterable[str], what: str) -> None:
    for key in sorted(set(expected) - value.keys()):
        raise ProfileError(f"{what} lacks the key {key!r}")
    for key in sorted(value.keys() - set(expected)):
        raise ProfileError(f"{what} has the unknown key {_shown(key)}")


def _check_text(value: object, where: str) -> None:
    if not isinstance(value, str):
        raise ProfileError(f"{where} is {_shown(value)}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ProfileError(f"{where} contains a lone surrogate, which is not text") from error


def _check_task(value: object) -> None:
    _check_text(value, "task")
    if not is_task_name(str(value)):
        raise ProfileError(
            f"task {_shown(value)} is not a valid name; use at most 64 letters, digits, '_', '.' and '-', "
            "starting with a letter or digit, and not 'none'"
        )


def _check_size(value: object, where: str) -> None:
    if type(value) is not int or not 1 <= value <= _MAX_INT32:
        raise ProfileError(f"{where} is {_shown(value)}, not a positive integer")


def _checked_sketch(value: object) -> tuple[float, ...]:
    if not isinstance(value, list | tuple) or len(value) != SKETCH_LENGTH:
        raise ProfileError(f"base_model.sketch is {_shown(value)}, not {SKETCH_LENGTH} numbers")
    for number in value:
        if isinstance(number, bool) or not isinstance(number, int | float) or not _is_finite(number):
            raise ProfileError(f"base_model.sketch contains {_shown(number)}, not a finite number")
    return tuple(float(number) for number in value)


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer too large for a float
        return False


def _checked_object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ProfileError(f"{where} is {_shown(value)}, not a JSON object")
    return dict(_json_items(value, where, 1))


def _checked_json(value: object, where: str, depth: int) -> object:
    """A deep copy of `value` as JSON would give it back (tuples become lists)."""
    if depth > MAX_JSON_DEPTH:
        raise ProfileError(f"{where[:80]}... is nested deeper than {MAX_JSON_DEPTH}")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        _check_text(value, where)
        return str(value)
    if type(value) is int:
        if not -(2**63) <= value < 2**63:
            raise ProfileError(f"{where} is an integer beyond 64 bits")
        return value
    if type(value) is float:
        if not math.isfinite(value):
            raise ProfileError(f"{where} is {value}, not a finite number")
        return value
    if isinstance(value, list | tuple):
        return [_checked_json(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return dict(_json_items(value, where, depth))
    raise ProfileError(
        f"{where} is a {type(value).__name__}; give plain JSON values (str, int, float, bool, list, dict)"
    )


def _json_items(value: Mapping[Any, object], where: str, depth: int) -> Iterator[tuple[str, object]]:
    for key, item in value.items():
        _check_text(key, f"a key of {where}")
        yield key, _checked_json(item, f"{where}.{key}", depth + 1)


def _checked_layers(layers: object, base_model: ModelIdentity) -> Layers:
    if not isinstance(layers, Mapping):
        raise ProfileError(f"layers is a {type(layers).__name__}; give a mapping from layer to (neurons, scales)")
    if not layers:
        raise ProfileError("there are no layers, so nothing to steer; list at least one neuron")
    checked = {}
    for key, pair in layers.items():
        layer = _layer_number(key)
        _check_layer_number(layer, base_model.num_layers)
        checked[layer] = _checked_layer(layer, pair, base_model.intermediate_size)
    return MappingProxyType(dict(sorted(checked.items())))


def _layer_number(key: object) -> int:
    if isinstance(key, bool) or not isinstance(key, int | np.integer):
        raise ProfileError(f"layer {_shown(key)} is not an integer")
    return operator.index(key)


def _check_layer_number(layer: int, num_layers: int) -> None:
    if not 0 <= layer < num_layers:
        raise ProfileError(f"layer {layer} does not exist: the model has layers 0 to {num_layers - 1}")


def _checked_layer(layer: int, pair: object, width: int) -> tuple[Neurons, Scales]:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ProfileError(f"layer {layer}: give a pair (neurons, scales)")
    neurons = _frozen_array(pair[0], np.dtype(np.int32), f"layers.{layer}.neurons")
    scales = _frozen_array(pair[1], np.dtype(np.float32), f"layers.{layer}.scales")
    if len(neurons) != len(scales):
        raise ProfileError(f"layer {layer} has {len(neurons)} neurons and {len(scales)} scales; give one scale each")
    if len(neurons) == 0:
        raise ProfileError(f"layer {layer} lists no neurons; leave the layer out")
    _check_neurons(layer, neurons, width)
    _check_scales(layer, neurons, scales)
    return neurons, scales


def _frozen_array(value: object, dtype: np.dtype[Any], where: str) -> Any:
    if not isinstance(value, np.ndarray):
        raise ProfileError(f"{where} is a {type(value).__name__}; give a numpy array of dtype {dtype}")
    if value.dtype != dtype:
        raise ProfileError(f"{where} has dtype {value.dtype}, expected {dtype}; convert it with .astype")
    if value.ndim != 1:
        raise ProfileError(f"{where} has shape {value.shape}, expected one dimension")
    # Adding 0 turns -0 into 0, so that equal scales have equal bytes.
    # Backed by bytes: unlike a copy with writeable=False, it cannot be made writable again.
    return np.frombuffer((value + dtype.type(0)).tobytes(), dtype=dtype)


def _check_neurons(layer: int, neurons: Neurons, width: int) -> None:
    descents = np.flatnonzero(neurons[1:] <= neurons[:-1])
    if len(descents):
        a, b = neurons[descents[0]], neurons[descents[0] + 1]
        how = "is listed twice" if a == b else f"follows {a}"
        raise ProfileError(f"layers.{layer}.neurons is not strictly increasing: neuron {b} {how}")
    for neuron in (neurons[0], neurons[-1]):
        if not 0 <= neuron < width:
            raise ProfileError(f"layers.{layer}.neurons contains {neuron}, outside 0 to {width - 1}")


def _check_scales(layer: int, neurons: Neurons, scales: Scales) -> None:
    bad = np.flatnonzero(~(np.abs(scales) <= MAX_SCALE))  # also true for NaN
    if len(bad):
        neuron, scale = neurons[bad[0]], scales[bad[0]]
        allowed = f"at most {MAX_SCALE:g} in magnitude" if np.isfinite(scale) else "finite"
        raise ProfileError(f"layers.{layer}.scales is {scale} at neuron {neuron}; scales must be {allowed}")


# Writing ------------------------------------------------------------------------------------------


def save_profile(profile: Profile, path: StrPath) -> None:
    """Write a profile file atomically: whatever happens, `path` holds the old file or the whole new one.

    The same profile always has the same bytes.

    Raises:
        ProfileError: the file cannot be written (disk full, no such folder); nothing is left behind.
    """
    data = serialize_profile(profile)
    if len(data) > MAX_FILE_BYTES:
        raise ProfileError(f"{os.fspath(path)}: the profile has {len(data):,} bytes, more than the 64 MiB allowed")
    write_atomically(path, data, parents=False, error_type=ProfileError)


def serialize_profile(profile: Profile) -> bytes:
    """Bytes of the profile's file."""
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for layer, (neurons, scales) in profile.layers.items():
        tensors[f"layers.{layer}.neurons"] = neurons
        tensors[f"layers.{layer}.scales"] = scales
    return safetensors.numpy.save(tensors, metadata={METADATA_KEY: metadata_json(profile)})


def metadata_json(profile: Profile) -> str:
    """JSON text of all a profile's fields but its layers, as it stands in the file."""
    metadata = {
        field.name: getattr(profile, field.name)
        for field in dataclasses.fields(Profile)
        if field.name not in ("layers", "base_model")
    }
    metadata |= {"format": FORMAT, "base_model": dataclasses.asdict(profile.base_model)}
    return json.dumps(metadata, sort_keys=True, allow_nan=False, separators=(",", ":"))


# The identity of a model --------------------------------------------------------------------------


def _hub_name(name: object) -> str:
    if not isinstance(name, str) or _HUB_NAME.fullmatch(name) is None or Path(name).is_dir():
        return ""
    return name


def sketch_of(final_norm: nn.Module | None, hidden_size: int) -> tuple[float, ...] | None:
    """The sketch: 16 numbers of the final norm's stored weight `[hidden]`, or None if it is not in memory."""
    weight: Any = getattr(final_norm, "weight", None)
    if weight is None or weight.is_meta:
        return None
    positions = [i * hidden_size // SKETCH_LENGTH for i in range(SKETCH_LENGTH)]
    return tuple(weight.detach()[positions].float().tolist())
