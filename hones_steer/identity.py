"""The identity of the model that a profile is made for."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hones_steer.errors import MismatchError, ProfileError
from hones_steer.ffns import Ffn, FfnRun, check_runs, first_difference, parse_runs, run_of, runs_of
from hones_steer.json_values import check_keys, check_size, check_text, checked_numbers, shown

if TYPE_CHECKING:
    from torch import nn

SKETCH_LENGTH = 16
SKETCH_TOLERANCE = 0.01

_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)?")


@dataclasses.dataclass(frozen=True)
class ModelIdentity:
    """Identity of the model that a profile was made for.

    `name` and `revision` tell a person where the model came from; `check` does not compare them.
    Where all FFNs are dense and of one width, `intermediate_size` is that width and `ffns` is None; otherwise `ffns`
    has each layer's FFNs and `intermediate_size` is None.
    `sketch` is 16 numbers of the final norm's weight: it survives a change of dtype, quantization and tensor
    parallelism, tells another base model from this one, and does not tell a light fine-tune.

    Raises:
        ProfileError: a field has the wrong type or range.
    """

    name: str
    revision: str | None
    model_type: str
    num_layers: int
    intermediate_size: int | None
    hidden_size: int
    sketch: tuple[float, ...] | None
    ffns: tuple[FfnRun, ...] | None = None

    def __post_init__(self) -> None:
        check_text(self.name, "base_model.name")
        if self.revision is not None:
            check_text(self.revision, "base_model.revision")
        check_text(self.model_type, "base_model.model_type")
        check_size(self.num_layers, "base_model.num_layers")
        if self.ffns is None:
            check_size(self.intermediate_size, "base_model.intermediate_size")
        elif self.intermediate_size is not None:
            raise ProfileError("base_model has both intermediate_size and ffns; give one of them")
        else:
            check_runs(self.ffns, self.num_layers)
        check_size(self.hidden_size, "base_model.hidden_size")
        if self.sketch is not None:
            object.__setattr__(self, "sketch", checked_numbers(self.sketch, SKETCH_LENGTH, "base_model.sketch"))

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
        width = layout.intermediate_size
        return cls(
            name=_hub_name(getattr(config, "_name_or_path", None)),
            revision=getattr(config, "_commit_hash", None),
            model_type=layout.model_type,
            num_layers=len(layout.layers),
            intermediate_size=width,
            hidden_size=layout.hidden_size,
            sketch=sketch_of(layout.final_norm, layout.hidden_size),
            ffns=runs_of([layer.widths for layer in layout.layers]) if width is None else None,
        )

    @classmethod
    def from_json(cls, value: object) -> ModelIdentity:
        """The identity that `to_json` gave, as read from JSON.

        Raises:
            ProfileError: the value is no object, or has a key too few or too many, or a bad value.
        """
        if not isinstance(value, dict):
            raise ProfileError(f"base_model is {shown(value)}, not an object")
        absent = "intermediate_size" if "ffns" in value else "ffns"
        check_keys(value, {field.name for field in dataclasses.fields(cls)} - {absent}, "base_model")
        fields = {**value, "ffns": parse_runs(value["ffns"])} if "ffns" in value else value
        return cls(**{absent: None, **fields})

    def to_json(self) -> dict[str, Any]:
        """The identity as a JSON object, with either `intermediate_size` or `ffns`."""
        value: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        value["sketch"] = None if self.sketch is None else list(self.sketch)
        if self.ffns is None:
            del value["ffns"]
        else:
            del value["intermediate_size"]
            value["ffns"] = [run.to_json() for run in self.ffns]
        return value

    @property
    def format(self) -> int:
        """The format of profiles for this model: 1 where all FFNs are dense and of one width, else 2."""
        return 1 if self.ffns is None else 2

    @property
    def runs(self) -> tuple[FfnRun, ...]:
        """The FFNs of each layer, also where `ffns` is None."""
        if self.ffns is not None:
            return self.ffns
        return (FfnRun(0, self.num_layers, dense=self.intermediate_size or 0),)

    def width(self, ffn: Ffn) -> int:
        """Number of neurons of an FFN, or of all routed experts of a layer; 0 if the model has no such FFN."""
        return run_of(self.runs, ffn.layer).width(ffn.part)

    @property
    def num_neurons(self) -> int:
        """Number of FFN neurons of the model (format 1 counts a layer without an FFN like the others)."""
        return sum(run.num_neurons for run in self.runs)

    def describe_ffns(self, times: str = "x") -> str:
        """Describe layers and FFNs for a person: "32 layers x 11,008 FFN neurons"."""
        if self.ffns is None:
            return f"{self.num_layers} layers {times} {self.intermediate_size:,} FFN neurons"
        parts = (f"{run.first} to {run.stop - 1}: {run}" for run in self.ffns)
        return f"{self.num_layers} layers ({'; '.join(parts)})"

    def check(self, expected_from_model: ModelIdentity, *, allow_mismatch: bool = False) -> None:
        """Check that a profile with this identity belongs to the model identified by `expected_from_model`.

        `allow_mismatch` waives the model type and the sketch, never the shapes: scales for other shapes have
        no meaning. If either side has no sketch, a UserWarning says that only the shapes were compared.

        Raises:
            MismatchError: it belongs to another model; the message names both values and the way out.
        """
        if difference := self._shape_difference(expected_from_model, "the model"):
            raise self._mismatch(difference)
        if allow_mismatch:
            return
        if difference := self._weight_difference(expected_from_model, "the model"):
            raise self._mismatch(difference, " or pass allow_mismatch=True")
        if self.sketch is None or expected_from_model.sketch is None:
            side = "profile" if self.sketch is None else "model"
            warnings.warn(
                f"the {side} has no sketch of the final norm, so only the shapes were compared; "
                "make sure that the profile was made for this model",
                stacklevel=2,
            )

    def check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Check what is known of a model before it is loaded: `sizes` by name, such as {"num_layers": 32}.

        An `intermediate_size` is compared only where the profile's model has one.

        Raises:
            MismatchError: a size differs; the message is that of `check`.
        """
        for name, size in sizes.items():
            ours = getattr(self, name)
            if ours not in (size, None):
                raise self._mismatch(f"{name} is {ours} in the profile and {size} in the model")

    def _mismatch(self, difference: str, way_out: str = "") -> MismatchError:
        owner = "the model it was made for" + (f" ({self.name})" if self.name else "")
        return MismatchError(f"the profile belongs to another model: {difference}; load {owner}{way_out}")

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
        one_width = self.ffns is None and other.ffns is None
        for field in ("num_layers", *(("intermediate_size",) if one_width else ()), "hidden_size"):
            size, other_size = getattr(self, field), getattr(other, field)
            if size != other_size:
                return f"{field} is {size} in the profile and {other_size} in {owner}"
        if (difference := first_difference(self.runs, other.runs)) is not None:
            layer, ours, theirs = difference
            return f"layer {layer} has {ours} in the profile and {theirs} in {owner}"
        return None

    def _weight_difference(self, other: ModelIdentity, owner: str) -> str | None:
        if self.model_type != other.model_type:
            return f"model_type is {self.model_type!r} in the profile and {other.model_type!r} in {owner}"
        for i, (a, b) in enumerate(zip(self.sketch or (), other.sketch or (), strict=False)):
            if abs(a - b) > SKETCH_TOLERANCE * max(abs(a), abs(b)):
                where = f"the final norm's weight at position {i * self.hidden_size // SKETCH_LENGTH}"
                return f"{where} is {a:.6g} in the profile and {b:.6g} in {owner}"
        return None


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
