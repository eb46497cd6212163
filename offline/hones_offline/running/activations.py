"""Activations z of an FFN in one call: what the hooks of `readings.py` and `interventions.py` work on.

A dense FFN, or a shared expert, computes z for every token (`Activations`). Routed experts compute it for each token
and each of the experts that the router has chosen for it (`ExpertActivations`); the neurons of the other experts have
no z at that token, which counts as 0. Both have the same functions, in which N is the number of neurons: of the FFN, or
of all experts of the layer, one expert after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from hones_steer.errors import LayoutError
from hones_steer.injection import scale

Shape = tuple[int, int]
"""(rows, positions) of a decoder's forward."""


@dataclass(frozen=True, eq=False)
class Activations:
    """The z of every token, `z` [rows, T, N] or [rows·T, N], in a forward of `shape`; `name` is the layer's.

    `last` says that it is the last FFN, which may run at one position of each row only (`resumption.last_ffn_at`).
    """

    name: str
    z: Tensor
    shape: Shape
    last: bool = False

    @cached_property
    def by_row(self) -> Tensor:
        """Arrange z as [rows, T, N]; raises LayoutError, naming the layer, for any other shape."""
        return by_row(self.z, self.shape[0], self.name)

    def of(self, gradients: Tensor) -> Activations:
        """The gradients of some function by z, at the same tokens."""
        return replace(self, z=gradients)

    def scaled(self, factors: Tensor) -> Tensor:
        """Multiply z by factors [N], the same for every token."""
        return scale(self.z, factors.to(self.z.device))

    def scaled_by_row(self, factors: Tensor, columns: Tensor | None) -> Tensor:
        """Multiply z by factors [rows, N] of each row, at every position or at the row's one of `columns` [rows]."""
        z = self.by_row
        if columns is None:
            z = scale(z, factors[:, None])
        else:
            at = torch.arange(len(z)), columns
            z = z.index_put(at, scale(z[at], factors))
        return z.reshape(self.z.shape)

    def filled(self, neurons: Tensor, values: Tensor) -> Tensor:
        """Set z of `neurons` [k] to `values` [k]."""
        filled = values.to(self.z).expand(*self.z.shape[:-1], -1)
        return self.z.index_copy(-1, neurons.to(self.z.device), filled)

    def at(self, columns: Tensor, *, weighted: bool = False) -> Tensor:  # noqa: ARG002 - as of experts
        """Read z of each row at its column, [rows] -> float32 [rows, N]; see `ExpertActivations.at` on `weighted`."""
        (rows, positions), z = self.shape, self.by_row
        if z.shape[1] == positions:
            return z[torch.arange(rows), columns.cpu()].detach().float()
        if z.shape[1] == 1 and self.last:
            return z[:, 0].detach().float()
        raise _partly_run(self.name, z.shape[1], positions)

    def sums(self, real: Tensor) -> tuple[Tensor, Tensor]:
        """Σ z over the tokens that `real`, bool [rows, T], marks, and how many have a z: float64 and int64 [N]."""
        real = real.to(self.z.device)
        total = self.by_row.detach()[real].sum(0, dtype=torch.float64)
        return total, real.sum().expand(total.shape)

    def products(self, weights: Activations) -> Tensor:
        """Σ z·w over positions, for weights of `rows` rows and z of copies of these: float64 [copies, rows, N]."""
        weight = weights.by_row.float()
        copies = self.by_row.split(len(weight))
        return torch.stack([(z.float() * weight).sum(1, dtype=torch.float64) for z in copies])


class Choices(NamedTuple):
    """Which token and expert each row of what experts compute is of, and the router's weight: [choices] each.

    Tokens are counted row after row, `num_tokens` in all.
    """

    tokens: Tensor
    experts: Tensor
    weights: Tensor
    num_tokens: int


@dataclass(frozen=True, eq=False)
class ExpertActivations:
    """The z [choices, I] of each token and expert that was chosen for it, in a forward of `shape`.

    `name` is that of the layer's `count` experts. `last` says what it says of `Activations`.
    """

    name: str
    z: Tensor
    shape: Shape
    count: int
    choices: Choices
    last: bool = False

    @property
    def tokens(self) -> Tensor:
        """The token of each choice, row after row."""
        return self.choices.tokens

    @property
    def experts(self) -> Tensor:
        """The expert of each choice."""
        return self.choices.experts

    @cached_property
    def _rows(self) -> Tensor:
        """The row of each choice; as many positions of each have run."""
        return self.tokens // (self.choices.num_tokens // self.shape[0])

    @property
    def _columns(self) -> Tensor:
        """The position of each choice in its row; raises LayoutError, naming the experts, unless all have run."""
        rows, positions = self.shape
        if self.choices.num_tokens != rows * positions:
            raise _partly_run(self.name, self.choices.num_tokens, rows * positions)
        return self.tokens % positions

    def _choices_at(self, columns: Tensor) -> Tensor:
        """Which choices are of each row's column."""
        if self.last and self.choices.num_tokens == self.shape[0]:  # it has run there alone
            return torch.arange(len(self.tokens), device=self.tokens.device)
        return (self._columns == columns.to(self.tokens.device)[self._rows]).nonzero()[:, 0]

    @property
    def _size(self) -> int:
        """N."""
        return self.count * self.z.shape[-1]

    def of(self, gradients: Tensor) -> ExpertActivations:
        """The gradients of some function by z, at the same tokens."""
        return replace(self, z=gradients)

    def scaled(self, factors: Tensor) -> Tensor:
        """Multiply z by factors [N], the same for every token."""
        return scale(self.z, factors.to(self.z.device).view(self.count, -1).index_select(0, self.experts))

    def scaled_by_row(self, factors: Tensor, columns: Tensor | None) -> Tensor:
        """Multiply z by factors [rows, N] of each row, at every position or at the row's one of `columns` [rows]."""
        each, places = factors.view(-1, self.z.shape[-1]), self._rows * self.count + self.experts
        if columns is None:
            return scale(self.z, each.index_select(0, places))
        at = self._choices_at(columns)
        return self.z.index_copy(0, at, scale(self.z[at], each.index_select(0, places[at])))

    def filled(self, neurons: Tensor, values: Tensor) -> Tensor:
        """Set z of `neurons` [k] to `values` [k], at the tokens that their expert is chosen for."""
        neurons, width = neurons.to(self.z.device), self.z.shape[-1]
        fill = self.z.new_zeros(self._size).index_put((neurons,), values.to(self.z)).view(-1, width)
        chosen = torch.zeros(self._size, dtype=torch.bool, device=self.z.device)
        chosen = chosen.index_fill(0, neurons, True).view(-1, width)
        return torch.where(chosen.index_select(0, self.experts), fill.index_select(0, self.experts), self.z)

    def at(self, columns: Tensor, *, weighted: bool = False) -> Tensor:
        """Read z of each row at its column, [rows] -> float32 [rows, N], 0 of experts that are not chosen there.

        With `weighted` it is times the expert's router weight: what the down-projections then add up.
        """
        at = self._choices_at(columns)
        z = self.z[at].detach().float()
        if weighted:
            z = z * self.choices.weights[at].detach().float()[:, None]
        found = z.new_zeros(self.shape[0] * self.count, z.shape[-1])
        return found.index_copy(0, (self._rows * self.count + self.experts)[at], z).view(self.shape[0], -1)

    def sums(self, real: Tensor) -> tuple[Tensor, Tensor]:
        """Σ z over the tokens that `real`, bool [rows, T], marks, and how many have a z: float64 and int64 [N]."""
        kept = real.to(self.z.device)[self._rows, self._columns]
        experts, z = self.experts[kept], self.z.detach()[kept].double()
        total = z.new_zeros(self.count, z.shape[-1]).index_add(0, experts, z)
        return total.flatten(), torch.bincount(experts, minlength=self.count).repeat_interleave(z.shape[-1])

    def positive(self, real: Tensor) -> Tensor:
        """At how many of the tokens that `real`, bool [rows, T], marks z is above 0: int64 [N]."""
        kept = real.to(self.z.device)[self._rows, self._columns]
        positive = (self.z[kept] > 0).long()
        return positive.new_zeros(self.count, self.z.shape[-1]).index_add(0, self.experts[kept], positive).flatten()

    def products(self, weights: ExpertActivations) -> Tensor:
        """Σ z·w over positions, for weights of `rows` rows and z of copies of these: float64 [copies, rows, N].

        Where an expert is chosen in one of the two only, z or w is 0.
        """
        rows, tokens = weights.shape[0], weights.choices.num_tokens
        place = torch.full((tokens * self.count,), -1, device=self.z.device)
        place[weights.tokens * self.count + weights.experts] = torch.arange(len(weights.tokens), device=self.z.device)
        found = place[self.tokens % tokens * self.count + self.experts]
        at = (found >= 0).nonzero()[:, 0]
        products = (self.z[at].float() * weights.z[found[at]].float()).double()
        total = products.new_zeros(self.shape[0] * self.count, self.z.shape[-1])
        total = total.index_add(0, (self._rows * self.count + self.experts)[at], products)
        return total.view(-1, rows, self._size)


AnyActivations = Activations | ExpertActivations


def by_row(x: Tensor, rows: int, name: str) -> Tensor:
    """A module's input as [rows, T, features]; some architectures (OPT) give [rows·T, features].

    Raises LayoutError, naming the layer, for any other shape.
    """
    if x.dim() == 3 and len(x) == rows:
        return x
    if x.dim() == 2 and len(x) % rows == 0:
        return x.reshape(rows, -1, x.shape[-1])
    raise LayoutError(
        f"{name}: a module of it got an input of shape {list(x.shape)} in a forward of {rows} rows, which cannot "
        "be told apart there; steering this model may work, attributing on it does not"
    )


def _partly_run(name: str, ran: int, positions: int) -> LayoutError:
    return LayoutError(
        f"{name}: its FFN ran at {ran} of {positions} positions, so that it is not known which; attributing on this "
        "model does not work"
    )
