"""Adapters that PEFT trains beside learned factors: what they compute, that they leave no trace, that they resume."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hones_offline.data.neurons import Bank, NeuronIndex
from hones_offline.learning.adapters import (
    ADAPTERS,
    Adapter,
    adapted,
    adapter_run_settings,
    ffn_linears,
    trained_by_epoch,
)
from hones_offline.learning.factors import FitSettings, fit_prepared
from hones_offline.running.evaluation import score
from hones_offline.running.execution import Execution
from hones_offline.running.prompts import Prepared, prepare
from hones_offline.running.run_folder import RunFolder
from problems import Problem, problem

from hones_steer.errors import DataError, LayoutError
from hones_steer.layout import down_weight, linear_shape

SETTINGS = FitSettings(epochs=2, lr=0.05, batch_size=2, accumulation_steps=2)
KINDS = tuple(ADAPTERS)


def prepared_of(p: Problem) -> Prepared:
    return prepare(p.model, p.processor, p.task, p.examples)


def trained(prepared: Prepared, kind: str, execution: Execution | None = None) -> Iterator[Adapter]:
    """The adapter after each epoch."""
    return (adapter for _, adapter in trained_by_epoch(prepared, kind, SETTINGS, execution or Execution()))


def logits_of(prepared: Prepared) -> torch.Tensor:
    prompts, answers = zip(*prepared.pairs(), strict=True)
    with torch.no_grad():
        return prepared.decoder.answer_logits(prompts, answers)[0]


def traces(model: Any) -> dict[str, Any]:
    """Everything of a model that an adapter could leave changed."""
    return {
        "modules": {name: (id(module), module.training) for name, module in model.named_modules()},
        "parameters": {name: (id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters()},
        "bytes": {name: x.clone().view(torch.uint8).numpy().tobytes() for name, x in model.state_dict().items()},
        "attributes": sorted(vars(model)),
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
    }


@pytest.fixture(scope="module")
def llama() -> Prepared:
    return prepared_of(problem("llama", "text"))


# GPT-2 keeps weights as [inputs, outputs], OPT has its FFN's linears in the layer itself, Phi-3 two of them in one.
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "phi3"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_changes_the_answers_and_leaves_no_trace(architecture: str, kind: str) -> None:
    prepared = prepared_of(problem(architecture, "text", count=3))
    model, before, untouched = prepared.decoder.model, traces(prepared.decoder.model), logits_of(prepared)
    last = list(trained(prepared, kind))[-1]
    assert traces(model) == before
    with adapted(prepared, last) as inside:
        changed = logits_of(inside)
    with adapted(prepared, last * 0) as inside:
        torch.testing.assert_close(logits_of(inside), untouched)
    assert traces(model) == before
    assert (changed - untouched).abs().max() > 0.01
    assert torch.equal(logits_of(prepared), untouched)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_inside_leaves_no_trace(llama: Prepared, kind: str) -> None:
    before = traces(llama.decoder.model)
    adapter = next(trained(llama, kind))
    with pytest.raises(RuntimeError, match="inside"), adapted(llama, adapter):
        raise RuntimeError("inside")
    assert traces(llama.decoder.model) == before


def test_ia3_is_factors_learned_for_all_neurons(llama: Prepared) -> None:
    """The slow twin: the same loss, batches, schedule and optimizer, on a bank of every neuron."""
    index = NeuronIndex.of(llama.decoder.layout)
    every = Bank({layer: np.arange(width) for layer, width in enumerate(index.widths)})
    unbounded = FitSettings(**{**vars(SETTINGS), "l2": 0.0, "clamp": 1e6})
    profile = fit_prepared(llama, every, unbounded, Execution())
    adapter = list(trained(llama, "ia3"))[-1]
    factors = [scales for _, scales in profile.layers.values()]
    assert [name.split(".")[2] for name in adapter.weights] == [str(layer) for layer in profile.layers]
    np.testing.assert_allclose([w[0] for w in adapter.weights.values()], factors, atol=2e-4)
    assert np.abs(np.stack(factors) - 1).max() > 0.05
    assert adapter.parameters == sum(index.widths)


@contextmanager
def updated(prepared: Prepared, adapter: Adapter, strength: float) -> Iterator[None]:
    """The twin of LoRA: W + strength · B·A in the weights themselves (PEFT's alpha is 8, as the rank)."""
    modules = dict(prepared.decoder.model.named_modules())
    kept = {}
    for name, a in adapter.weights.items():
        if ".lora_A." in name:
            module = modules[name.split(".lora_A.")[0]]
            kept[module] = module.weight.detach().clone()
            delta = torch.tensor(adapter.weights[name.replace("lora_A", "lora_B")]) @ torch.tensor(a)
            module.weight.data += strength * delta
    yield
    for module, weight in kept.items():
        module.weight.data = weight


@pytest.mark.parametrize("strength", [1.0, 0.5, 2.0])
def test_lora_is_its_update_in_the_weights(llama: Prepared, strength: float) -> None:
    adapter = list(trained(llama, "lora"))[-1]
    with adapted(llama, adapter * strength) as inside:
        found = logits_of(inside)
    with updated(llama, adapter, strength):
        expected = logits_of(llama)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    linears = [linear_shape(m) for layer in llama.decoder.layout.layers for m in ffn_linears(layer)]
    assert len(linears) == 3 * len(llama.decoder.layout.layers)
    assert adapter.parameters == sum(8 * (inputs + outputs) for inputs, outputs in linears)


def test_an_ia3_strength_multiplies_the_offsets(llama: Prepared) -> None:
    adapter = next(trained(llama, "ia3"))
    for name, factors in (adapter * 1.5).weights.items():
        np.testing.assert_allclose(factors - 1, 1.5 * (adapter.weights[name] - 1), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_are_kept_and_a_killed_run_goes_on(llama: Prepared, kind: str, tmp_path: Path) -> None:
    def folder(name: str) -> Execution:
        return Execution(folder=RunFolder(tmp_path / name, adapter_run_settings(llama, kind, SETTINGS)))

    whole = list(trained(llama, kind, folder("whole")))
    next(trained(llama, kind, folder("killed")))  # one epoch, then nobody asks for more
    assert not (tmp_path / "killed" / "epoch-02.safetensors").exists()
    again = list(trained(llama, kind, folder("killed")))
    assert [adapter.digest for adapter in again] == [adapter.digest for adapter in whole]
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "killed" / file.name).read_bytes() == file.read_bytes()
    assert len({adapter.digest for adapter in whole}) == 2


def test_an_adapter_in_half_precision_is_trained_in_float32() -> None:
    p = problem("llama", "text", count=3)
    p.model.to(torch.bfloat16)
    prepared = prepared_of(p)
    for kind in KINDS:
        last = list(trained(prepared, kind))[-1]
        assert {x.dtype for x in last.weights.values()} == {np.dtype(np.float32)}
        with adapted(prepared, last) as inside:
            assert logits_of(inside).isfinite().all()
    assert {x.dtype for x in p.model.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_layers_and_originals_that_are_not_kept_change_nothing(
    llama: Prepared, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    [plain, *_] = trained(llama, kind)
    before = traces(llama.decoder.model)
    monkeypatch.setattr("hones_offline.learning.loss.ORIGINAL_BYTES", 0)
    checkpointed = FitSettings(**{**vars(SETTINGS), "gradient_checkpointing": True})
    _, found = next(trained_by_epoch(llama, kind, checkpointed, Execution()))
    for name, tensor in plain.weights.items():
        np.testing.assert_allclose(found.weights[name], tensor, atol=2e-4)
    after = traces(llama.decoder.model)
    before["attributes"] = after["attributes"]  # transformers leaves an empty list of hooks
    assert after == before


def test_an_adapted_vision_language_model_generates_and_ranks() -> None:
    for name in ("vqa", "retrieval"):
        prepared = prepared_of(problem("llava", name, count=3))
        adapter = list(trained(prepared, "lora"))[-1]
        assert all("language_model" in tensor for tensor in adapter.weights)
        with adapted(prepared, adapter) as inside:
            assert score(inside, batch_size=4).n == 3


def test_what_cannot_be_adapted_is_refused(llama: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = next(trained(llama, "ia3"))
    with (
        adapted(llama, adapter) as inside,
        pytest.raises(DataError, match="has a PEFT adapter already; merge or unload it"),
        adapted(inside, adapter),
    ):
        pass
    module = llama.decoder.layout.layers[0].down_proj

    class Packed(torch.nn.Module):
        in_features, out_features = linear_shape(module) or (0, 0)
        weight = down_weight(llama.decoder.layout.layers[0])

    p = problem("llama", "text", count=2)
    prepared = prepared_of(p)
    p.model.model.layers[0].mlp.down_proj = Packed()
    packed = Prepared(**{**vars(prepared), "decoder": type(prepared.decoder)(p.model)})
    with pytest.raises(LayoutError, match=r"layers\.0: its Packed is no plain linear, so that no IA3 adapter"):
        next(trained(packed, "ia3"))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DataError, match=r"peft is not installed; run: pip install 'hones-steer\[peft\]'"):
        next(trained(llama, "ia3"))
