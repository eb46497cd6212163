"""Hooks know the rows and positions of all they read or change, or name the layer where they cannot."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hones_offline import attribute, evaluate, fit
from hones_offline.attribution.baselines import activation_probability, gradient_activation, mean_activation
from hones_offline.attribution.heads import head_scores, head_statistics, top_heads
from hones_offline.attribution.write_in import head_guided_importance, target_directions
from hones_offline.running.execution import Execution
from hones_offline.running.prompts import Prepared, prepare
from problems import Problem, problem
from torch import Tensor, nn

from hones_steer import layout, register_layout
from hones_steer.errors import LayoutError


def asked(p: Problem) -> tuple[Any, ...]:
    return p.model, p.processor, p.task, p.examples


class Inside(nn.Module):
    """Calls a module with a rearranged input, and rearranges its result back."""

    def __init__(self, inner: nn.Module, there: Callable[[Tensor], Tensor], back: Callable[..., Tensor]) -> None:
        super().__init__()
        self.inner, self.there, self.back = inner, there, back

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.inner(self.there(x)), x)


def flattened(inner: nn.Module) -> Inside:
    """Wrap a module so that it is called with [rows·T, features]."""
    return Inside(inner, lambda x: x.flatten(0, -2), lambda y, x: y.view(*x.shape[:-1], -1))


def time_first(inner: nn.Module) -> Inside:
    """Wrap a module so that it is called with [T, rows, features]."""
    return Inside(inner, lambda x: x.transpose(0, 1), lambda y, _: y.transpose(0, 1))


@pytest.fixture
def wrapped() -> Iterator[Problem]:
    """A Llama; FFNs and output projections may be put `Inside` something and are then called as `inner`."""
    p = problem("llama", "text")
    yield p
    layout._registered.pop("llama", None)


def everything(prepared: Prepared) -> list[Any]:
    """Head scores by both metrics, importance, and baselines."""
    execution, small = Execution(batch_size=9), Execution(batch_size=3)
    scores = [head_scores(prepared, m, *head_statistics(prepared, m, execution)).by_head for m in ("task", "logprob")]
    units, heads = target_directions(prepared), top_heads(scores[1], 4)
    importances = [
        np.asarray(head_guided_importance(prepared, units, heads, execution, positive_part=part))
        for part in ("mean", "example")
    ]
    baselines = (activation_probability, mean_activation, gradient_activation)
    return scores + importances + [np.asarray(baseline(prepared, small)) for baseline in baselines]


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("down_proj", {"down_proj": "mlp.down_proj.inner"}),
        ("mlp", {"down_proj": "mlp.inner.down_proj"}),  # the last one runs at some positions only
        ("o_proj", {"attn_out": "self_attn.o_proj.inner"}),
    ],
)
def test_flattened_inputs_change_nothing(wrapped: Problem, part: str, names: dict[str, str]) -> None:
    expected = everything(prepare(*asked(wrapped)))
    for layer in wrapped.model.model.layers:
        parent = {"down_proj": layer.mlp, "mlp": layer, "o_proj": layer.self_attn}[part]
        setattr(parent, part, flattened(getattr(parent, part)))
    register_layout("llama", **names)
    for found, same in zip(everything(prepare(*asked(wrapped))), expected, strict=True):
        np.testing.assert_allclose(found, same, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("part", "names"),
    [("down_proj", {"down_proj": "mlp.down_proj.inner"}), ("o_proj", {"attn_out": "self_attn.o_proj.inner"})],
)
def test_an_input_whose_rows_cannot_be_told_is_refused(wrapped: Problem, part: str, names: dict[str, str]) -> None:
    layer = wrapped.model.model.layers[1]
    parent = layer.mlp if part == "down_proj" else layer.self_attn
    setattr(parent, part, time_first(getattr(parent, part)))
    for other in (wrapped.model.model.layers[0], wrapped.model.model.layers[2]):
        parent = other.mlp if part == "down_proj" else other.self_attn
        setattr(parent, part, flattened(getattr(parent, part)))
    register_layout("llama", **names)
    prepared = prepare(*asked(wrapped))
    runs: dict[str, list[Callable[[], object]]] = {
        "down_proj": [
            partial(baseline, prepared, Execution(batch_size=3)) for baseline in (mean_activation, gradient_activation)
        ],
        "o_proj": [lambda: head_statistics(prepared, "logprob", Execution(batch_size=9))],
    }
    for run in runs[part]:
        with pytest.raises(LayoutError, match=r"model\.layers\.1: a module of it got an input of shape \[\d+, \d, "):
            run()


def test_a_part_that_is_replaced_after_the_examples_were_encoded_is_named() -> None:
    p = problem("llama", "text")
    prepared = prepare(*asked(p))
    attention = p.model.model.layers[1].self_attn
    attention.o_proj = nn.Linear(32, 32)
    with pytest.raises(LayoutError, match=r"model\.layers\.1: its Linear was taken out of the model after"):
        head_statistics(prepared, "logprob", Execution(batch_size=9))


class Fused(nn.Module):
    """An FFN that reads its down-projection's weight without calling it, as fused kernels do."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)


def test_a_down_projection_that_is_passed_by_is_refused() -> None:
    """Attribution, masking and learning would have no effect there."""
    p = problem("llama", "text")
    layer = p.model.model.layers[1]
    layer.mlp = Fused(layer.mlp)
    bank = {0: np.array([1], dtype=np.int32), 1: np.array([2], dtype=np.int32)}
    runs: list[Callable[[], object]] = [
        *(lambda method=method: attribute(*asked(p), method=method, head_metric="logprob") for method in ("ma", "dvp")),
        lambda: attribute(*asked(p), method="grad_act", head_metric="logprob"),
        lambda: attribute(*asked(p), method="hones", head_metric="logprob"),
        lambda: evaluate(*asked(p), mask=bank),
        lambda: fit(*asked(p), bank),
    ]
    for run in runs:
        with pytest.raises(LayoutError, match=r"model\.layers\.1: its Linear was not called in a forward"):
            run()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in p.model.modules())
    evaluate(*asked(p), mask={0: bank[0]})
    with torch.no_grad():
        assert torch.isfinite(p.model(torch.tensor([[1, 20]])).logits).all()


def test_an_output_projection_that_is_passed_by_is_refused() -> None:
    p = problem("llama", "text")
    prepared = prepare(*asked(p))
    attention = p.model.model.layers[1].self_attn
    attention.__dict__["o_proj"] = partial(F.linear, weight=attention.o_proj.weight)  # what the attention calls
    with pytest.raises(LayoutError, match=r"model\.layers\.1: its Linear was not called in a forward"):
        head_statistics(prepared, "logprob", Execution(batch_size=9))
