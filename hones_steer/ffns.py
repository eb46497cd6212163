"""The FFNs of a model: their addresses, and which ones each layer has, how wide.

A neuron is (layer, FFN, index). A dense model has one FFN in each layer; a mixture of experts has routed experts, by
number, and often a shared one that every token goes through, instead of the dense FFN or beside it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from hones_steer.errors import ProfileError
from hones_steer.json_values import MAX_INT32, check_keys, check_size, shown

DENSE, SHARED, EXPERTS = "dense", "shared", "experts"
_CODES = {DENSE: 0, SHARED: 1, EXPERTS: 2}


class Ffn(NamedTuple):
    """Address of an FFN: a decoder layer, counted from 0, and "dense", "shared" or the number of a routed expert.

    As `part`, "experts" stands for all routed experts of the layer, which models and files keep in one tensor. Equal
    to the plain tuple, so that ``profile.ffns[(3, 17)]`` finds expert 17 of layer 3.
    """

    layer: int
    part: str | int

    @classmethod
    def of(cls, key: object) -> Ffn:
        """The FFN of a layer's number (its dense one) or of a pair; raises ProfileError for anything else."""
        pair: Any = key if isinstance(key, tuple) and len(key) == 2 else (key, DENSE)
        layer, part = pair
        if not _is_integer(layer):
            raise ProfileError(f"layer {shown(layer)} is not an integer")
        if isinstance(part, str) and part in (DENSE, SHARED):
            return cls(operator.index(layer), part)
        if not _is_integer(part) or part < 0:
            raise ProfileError(
                f"layer {layer} has no FFN {shown(part)}; give 'dense', 'shared' or the number of an expert"
            )
        return cls(operator.index(layer), operator.index(part))

    @classmethod
    def parse(cls, text: str) -> Ffn:
        """The FFN of a `key`; raises ProfileError or ValueError if it is none."""
        layer, dot, part = text.partition(".")
        return cls.of((int(layer), (part if part == SHARED else int(part)) if dot else DENSE))

    @property
    def key(self) -> str:
        """The FFN in JSON: "3" is layer 3's dense one, "3.shared" its shared expert, "3.17" its expert 17."""
        return str(self.layer) if self.part == DENSE else f"{self.layer}.{self.part}"

    @property
    def group(self) -> Ffn:
        """The FFN itself, or for an expert all experts of its layer."""
        return self if isinstance(self.part, str) else Ffn(self.layer, EXPERTS)

    @property
    def code(self) -> int:
        """The number that stands for the group in a digest: 0 dense, 1 shared, 2 experts."""
        return _CODES[str(self.group.part)]

    @property
    def order(self) -> tuple[int, int, int]:
        """The key that sorts FFNs: layer, then dense, shared and experts, these by their numbers."""
        return self.layer, self.code, 0 if isinstance(self.part, str) else self.part

    @property
    def prefix(self) -> str:
        """The beginning of the names of the group's tensors in a file, such as ``layers.3.experts``."""
        part = self.group.part
        return f"layers.{self.layer}" if part == DENSE else f"layers.{self.layer}.{part}"

    def __str__(self) -> str:
        """The FFN for a person, such as "layer 3's expert 17"; of a dense one only the layer."""
        if self.part == DENSE:
            return f"layer {self.layer}"
        names = {SHARED: "shared expert", EXPERTS: "experts"}
        return f"layer {self.layer}'s {names.get(str(self.part), f'expert {self.part}')}"


def _is_integer(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


@dataclass(frozen=True)
class FfnRun:
    """FFNs of each of the layers `first` … `stop` − 1: their widths, in neurons, 0 where there is no such FFN.

    `experts` routed experts have `expert_width` neurons each. Several shared experts count as one with the sum of
    their neurons, as models keep them.
    """

    first: int
    stop: int
    dense: int = 0
    shared: int = 0
    experts: int = 0
    expert_width: int = 0

    def width(self, part: str | int) -> int:
        """Number of neurons of a part of these layers; of "experts", those of all experts."""
        if isinstance(part, str):
            return {DENSE: self.dense, SHARED: self.shared, EXPERTS: self.experts * self.expert_width}[part]
        return self.expert_width if 0 <= part < self.experts else 0

    @property
    def num_neurons(self) -> int:
        """Number of FFN neurons of all its layers."""
        return (self.stop - self.first) * sum(map(self.width, _CODES))

    @property
    def is_dense(self) -> bool:
        """Whether there are no experts."""
        return not self.experts

    def has_the_ffns_of(self, other: FfnRun) -> bool:
        """Whether the layers of both have the same FFNs."""
        return replace(self, first=other.first, stop=other.stop) == other

    def __str__(self) -> str:
        """Describe what each of the layers has, such as "128 experts of 768 neurons and a shared one of 1,536"."""
        parts = [f"a dense FFN of {self.dense:,} neurons"] if self.dense else []
        if self.experts:
            parts.append(f"{self.experts:,} experts of {self.expert_width:,} neurons")
        if self.shared:
            parts.append(f"a shared one of {self.shared:,}")
        return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0] if parts else "no FFN"

    def to_json(self) -> dict[str, Any]:
        """The run as an element of ``base_model.ffns``."""
        experts = [self.experts, self.expert_width] if self.experts else 0
        widths = {DENSE: self.dense, EXPERTS: experts, SHARED: self.shared}
        return {"layers": [self.first, self.stop], **{part: width for part, width in widths.items() if width}}


def parse_runs(value: object) -> tuple[FfnRun, ...]:
    """Parse ``base_model.ffns``; raises ProfileError, naming the element, for one that is none. See `check_runs`."""
    if not isinstance(value, list):
        raise ProfileError(f"base_model.ffns is {shown(value)}, not a list")
    return tuple(_parse_run(element, f"base_model.ffns[{i}]") for i, element in enumerate(value))


def _parse_run(value: object, where: str) -> FfnRun:
    if not isinstance(value, dict):
        raise ProfileError(f"{where} is {shown(value)}, not an object")
    check_keys(value, {"layers"} | value.keys() & _CODES, where)
    first, stop = _pair(value["layers"], f"{where}.layers")
    for part in value.keys() & {DENSE, SHARED}:
        check_size(value[part], f"{where}.{part}")
    experts, width = _pair(value[EXPERTS], f"{where}.experts") if EXPERTS in value else (0, 0)
    if EXPERTS in value:
        check_size(experts, f"{where}.experts[0]")
        check_size(width, f"{where}.experts[1]")
    return FfnRun(first, stop, value.get(DENSE, 0), value.get(SHARED, 0), experts, width)


def _pair(value: object, where: str) -> tuple[int, int]:
    if not isinstance(value, list) or [type(item) for item in value] != [int, int]:
        raise ProfileError(f"{where} is {shown(value)}, not two integers")
    return value[0], value[1]


def check_runs(runs: Sequence[FfnRun], num_layers: int) -> None:
    """Check that runs describe the FFNs of so many layers in the one way in which format 2 does.

    Layers ascend and those without an FFN are left out; neighbors with the same FFNs are one run. FFNs that are all
    dense and of one width are format 1's.

    Raises:
        ProfileError: they do not; the message names the run.
    """
    end = 0
    for i, run in enumerate(runs):
        where = f"base_model.ffns[{i}]"
        if not end <= run.first < run.stop <= num_layers:
            raise ProfileError(
                f"{where}.layers is [{run.first}, {run.stop}], not a range of layers from {end} to {num_layers}"
            )
        if i and run.first == end and run.has_the_ffns_of(runs[i - 1]):
            raise ProfileError(f"{where} has the FFNs of the layers before it; join the two")
        _check_widths(run, where)
        end = run.stop
    if not runs or {(run.is_dense, run.dense) for run in runs} == {(True, runs[0].dense)}:
        raise ProfileError(
            f"base_model.ffns has {'no' if not runs else 'only dense'} FFNs{' of one width' if runs else ''}; "
            "format 2 is for experts and for several widths, format 1 for one width"
        )


def _check_widths(run: FfnRun, where: str) -> None:
    if not (run.dense or run.experts):
        raise ProfileError(f"{where} has neither a dense FFN nor experts; leave layers without an FFN out")
    if min(run.dense, run.shared, run.experts, run.expert_width) < 0 or bool(run.experts) != bool(run.expert_width):
        raise ProfileError(f"{where} has impossible widths; give a positive number of neurons, and of experts")
    if max(map(run.width, _CODES)) > MAX_INT32:
        raise ProfileError(f"{where} has more than {MAX_INT32} neurons in one layer")
    if run.shared and not run.experts:
        raise ProfileError(f"{where} has a shared expert and no experts; an FFN that stands alone is dense")


def first_difference(ours: Iterable[FfnRun], theirs: Iterable[FfnRun]) -> tuple[int, FfnRun, FfnRun] | None:
    """The first layer whose FFNs differ, and its FFNs in each of two models; None if all are the same."""
    edges = sorted({edge for runs in (ours, theirs) for run in runs for edge in (run.first, run.stop)})
    for layer in edges:
        one, other = run_of(ours, layer), run_of(theirs, layer)
        if not one.has_the_ffns_of(other):
            return layer, one, other
    return None


def run_of(runs: Iterable[FfnRun], layer: int) -> FfnRun:
    """The run that a layer is in; one without FFNs if it is in none."""
    return next((run for run in runs if run.first <= layer < run.stop), FfnRun(layer, layer + 1))


def runs_of(layers: Iterable[Mapping[str, int]]) -> tuple[FfnRun, ...]:
    """The runs of a model's layers, each given by its widths (`FfnRun`'s fields), nothing where it has none."""
    runs: list[FfnRun] = []
    for layer, widths in enumerate(layers):
        run = FfnRun(layer, layer + 1, **widths)
        if runs and runs[-1].stop == layer and runs[-1].has_the_ffns_of(run):
            runs[-1] = replace(runs[-1], stop=layer + 1)
        elif widths:
            runs.append(run)
    return tuple(runs)
