"""Gradients by neurons' factors equal their plain twins and are derivatives; what cannot run backward is refused."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hones_offline import attribute
from hones_offline.attribution.baselines import gradient_activation
from hones_offline.attribution.gradients import absolute_gradient, factor_moments, fisher, gradient, head_gradient
from hones_offline.attribution.heads import head_statistics
from hones_offline.data.examples import scene_examples
from hones_offline.data.neurons import NeuronIndex
from hones_offline.data.scenes import scenes
from hones_offline.data.tasks import TASKS
from hones_offline.running import backward
from hones_offline.running.backward import AnsweredBatch, factor_gradients, frozen, kept_bytes, rows_at_once
from hones_offline.running.embedded import load_tiny_vlm
from hones_offline.running.execution import Execution
from hones_offline.running.interventions import ffn_factors, scaled_ffn
from hones_offline.running.prompts import Prepared, prepare
from hones_offline.running.readings import ffn_inputs
from hones_offline.running.run_folder import RunFolder
from problems import Problem, every_architecture, problem, some_heads
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from hones_steer.errors import DataError, LayoutError
from hones_steer.ffns import Ffn

CASES = every_architecture(
    [
        ("llama", "text"),
        ("opt", "text"),  # no gate, FFN inputs [rows·T, I]
        ("gpt2", "text"),  # no gate, weights transposed
        ("llava", "retrieval"),  # several pairs an example
        ("qwen2_5_vl", "caption"),  # positions on three axes
        ("qwen3_moe", "text"),  # routed experts, one layer dense
        ("deepseek_v3", "text"),  # and a shared one
    ]
)
EMBEDDED = ("vqa", "retrieval")


def embedded(task: str) -> Problem:
    """Scenes for the embedded model."""
    return Problem(
        *load_tiny_vlm(), TASKS[task], scene_examples(task, scenes("discovery", 2 if task == "retrieval" else 4))
    )


@pytest.fixture(params=[*CASES, *(("embedded", task) for task in EMBEDDED)], ids="-".join, scope="module")
def case(request: pytest.FixtureRequest) -> tuple[Problem, Prepared]:
    architecture, task = request.param
    p = embedded(task) if architecture == "embedded" else problem(architecture, task)
    return p, prepare(*asked(p))


def asked(p: Problem) -> tuple[Any, ...]:
    return p.model, p.processor, p.task, p.examples


def close(found: Any, expected: Any, rtol: float = 1e-4) -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol / 10 * float(np.abs(expected).max()))


def test_all_three_equal_a_plain_backward_of_one_pair_at_a_time(case: tuple[Problem, Prepared]) -> None:
    p, prepared = case
    mean, square = reference.grad_all(*asked(p)), reference.fisher(*asked(p))
    assert len({len(prompt) + len(answer) for prompt, answer in prepared.pairs()}) > 1  # so that batches have padding
    for batch_size in (1, 4):
        close(gradient(prepared, Execution(batch_size)), mean)
        close(fisher(prepared, Execution(batch_size)), square)
        close(absolute_gradient(prepared, Execution(batch_size)), mean.abs())
    assert all(parameter.grad is None for parameter in p.model.parameters())


def test_trainable_weights_change_nothing_and_stay_so(case: tuple[Problem, Prepared]) -> None:
    p, prepared = case
    expected = [function(prepared, Execution(3)) for function in (gradient, gradient_activation)]
    before = [parameter.requires_grad for parameter in p.model.parameters()]
    p.model.requires_grad_(not any(before))
    try:
        for function, same in zip((gradient, gradient_activation), expected, strict=True):
            np.testing.assert_array_equal(function(prepared, Execution(3)), same)
        assert {parameter.requires_grad for parameter in p.model.parameters()} == {not any(before)}
    finally:
        for parameter, required in zip(p.model.parameters(), before, strict=True):
            parameter.requires_grad_(required)


def test_factors_of_one_leave_the_forward_bit_equal(case: tuple[Problem, Prepared]) -> None:
    _, prepared = case
    batch = AnsweredBatch(prepared.decoder, prepared.pairs())
    with torch.no_grad():
        expected = batch.utilities()
        for columns in (None, batch.last_prompt_columns):
            with ffn_factors(prepared.decoder.layout, columns):
                assert torch.equal(batch.utilities(), expected)


@pytest.mark.parametrize("asks", [("llama", "text"), ("opt", "text"), ("llava", "retrieval")], ids="-".join)
def test_it_is_the_derivative_of_the_utility_by_the_factor(
    asks: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One neuron scaled by 1 ± ε and 1 ± 2ε at every position: a central difference of the fourth order."""
    p = problem(*asks)
    p.model.double()
    prepared = prepare(*asked(p))
    batch, decoder = AnsweredBatch(prepared.decoder, prepared.pairs()), prepared.decoder
    monkeypatch.setattr(decoder, "logits", decoder.unembedding)  # which would round to float32
    with frozen(p.model):
        found = factor_gradients(decoder, prepared.pairs())
    step = 2.0**-9  # 1 ± it are float32 numbers
    width = decoder.layout.intermediate_size
    assert width is not None

    def utilities(ffn: Ffn, neuron: int, change: float) -> Tensor:
        scales = torch.ones(width)
        scales[neuron] += change
        with torch.no_grad(), scaled_ffn(decoder.layout, {ffn: scales}):
            return batch.utilities()

    for ffn, gradients in found.items():
        for neuron in gradients.abs().sum(0).argsort(descending=True)[[0, 1, width // 2, -1]].tolist():
            near, far = (
                utilities(ffn, neuron, change) - utilities(ffn, neuron, -change) for change in (step, 2 * step)
            )
            difference = (8 * near - far) / (12 * step)
            largest = float(gradients.abs().max())
            torch.testing.assert_close(gradients[:, neuron].double(), difference, rtol=1e-2, atol=2e-3 * largest)


def test_all_methods_share_one_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    p = problem("llama", "text")
    prepared = prepare(*asked(p))
    passes = []

    def counted(decoder: Any, pairs: Sequence[Any], **how: Any) -> dict[Ffn, Tensor]:
        passes.append(len(pairs))
        return factor_gradients(decoder, pairs, **how)

    monkeypatch.setattr("hones_offline.attribution.gradients.factor_gradients", counted)
    execution = Execution(3, folder=RunFolder(tmp_path / "run", {}))
    for method in (gradient, fisher, absolute_gradient):
        method(prepared, execution)
    assert sorted(passes) == [2, 3]  # five examples, three at a time
    assert len(list((tmp_path / "run").glob("gradients-*"))) == 2
    other = prepared.only(range(4))
    assert np.abs(factor_moments(other, execution) - factor_moments(prepared, execution)).max() > 0


def test_a_pass_is_resumed_from_the_batches_that_are_kept(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And batches beyond the number of steps share one."""
    p = problem("llama", "text")
    prepared = prepare(*asked(p))
    monkeypatch.setattr("hones_offline.attribution.gradients.STEPS", 3)
    execution = Execution(1, folder=RunFolder(tmp_path, {}))
    whole = factor_moments(prepared, execution)
    first, second, third = sorted(tmp_path.glob("gradients-*"), key=lambda file: file.stat().st_mtime_ns)
    assert [file.stem.rpartition("-")[2] for file in (first, second, third)] == ["0", "2", "4"]
    second.unlink()
    passes = []

    def counted(decoder: Any, pairs: Sequence[Any], **how: Any) -> dict[Ffn, Tensor]:
        passes.append(len(pairs))
        return factor_gradients(decoder, pairs, **how)

    monkeypatch.setattr("hones_offline.attribution.gradients.factor_gradients", counted)
    np.testing.assert_array_equal(factor_moments(prepared, execution), whole)
    assert passes == [1, 1]


def test_attribute_takes_them(tmp_path: Any) -> None:
    p = problem("llama", "text")
    plain = {"top_fraction": 0.1, "head_metric": "logprob", "batch_size": 3}
    expected = reference.fisher(*asked(p))
    for method, importance in {"fisher": expected, "grad_all": reference.grad_all(*asked(p))}.items():
        found = attribute(*asked(p), **plain, method=method, run_dir=tmp_path / method)
        close(found.importance, importance)
        assert found.heads == []
        kinds = {file.name.partition("-")[0] for file in (tmp_path / method).glob("*-*.safetensors")}
        assert kinds == {"gradients", "importance"}


def test_the_head_mediated_gradient_equals_the_plain_one(case: tuple[Problem, Prepared]) -> None:
    p, prepared = case
    expected = np.asarray(reference.head_gradient(*asked(p), some_heads(prepared)))
    lowest = min(layer for layer, _, _ in some_heads(prepared))
    # A head reaches its own layer's FFN too, but not where the two run side by side (Cohere).
    above = [layer.index for layer in prepared.decoder.layout.layers if layer.widths and layer.index > lowest]
    assert (expected[above] > 0).any(1).all()
    pairs = prepared.pairs()
    longest = max((prompt for prompt, _ in pairs), key=len), max((answer for _, answer in pairs), key=len)
    with frozen(p.model):
        least = kept_bytes(prepared.decoder, longest, ffn_inputs) / 2**30  # GiB
    for execution in (Execution(1), Execution(4), Execution(64), Execution(4, memory_gb=1.1 * least)):
        close(head_gradient(prepared, some_heads(prepared), execution), expected)


def test_head_scores_guide_it(tmp_path: Any) -> None:
    p = problem("llama", "text")
    plain = {"top_heads": 3, "top_fraction": 0.1, "head_metric": "logprob", "batch_size": 9}
    hones = attribute(*asked(p), **plain, method="hones")
    found = attribute(*asked(p), **plain, method="head_grad", run_dir=tmp_path / "run")
    assert found.heads == hones.heads
    close(found.importance, reference.head_gradient(*asked(p), hones.heads))
    ranked = attribute(*asked(p), **plain, method="head_grad", head_weights="rank")
    assert [weight for *_, weight in ranked.heads] == pytest.approx([1, 2 / 3, 1 / 3])
    with pytest.raises(DataError, match="method 'head_grad' takes no positive_part; leave it out"):
        attribute(*asked(p), **plain, method="head_grad", positive_part="example")


# ------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("leaves", [ffn_factors, ffn_inputs])
def test_what_a_backward_pass_keeps_is_counted_without_keeping_it(case: tuple[Problem, Prepared], leaves: Any) -> None:
    p, prepared = case
    pair = prepared.pairs()[-1]
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with frozen(p.model):
        with leaves(prepared.decoder.layout) as taken, saved_tensors_hooks(keep, lambda tensor: tensor):
            AnsweredBatch(prepared.decoder, [pair]).utilities()
        found = kept_bytes(prepared.decoder, pair, leaves)
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*p.model.parameters(), *p.model.buffers())}
    kept += taken.values()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    graph = sum(size for pointer, size in storages.items() if pointer not in weights)
    assert found == graph + sum(leaf.nbytes for leaf in taken.values())
    assert graph > 0


def test_rows_are_as_many_as_memory_allows(case: tuple[Problem, Prepared]) -> None:
    p, prepared = case
    pairs = prepared.pairs()
    longest = max((prompt for prompt, _ in pairs), key=len), max((answer for _, answer in pairs), key=len)
    with frozen(p.model):
        gib = kept_bytes(prepared.decoder, longest) / 2**30
    for memory, rows in ((2.5 * gib, 2), (1.5 * gib, 1), (100 * gib, 4)):
        assert rows_at_once(prepared, Execution(4, memory_gb=memory)) == rows
    close(fisher(prepared, Execution(4, memory_gb=1.5 * gib)), fisher(prepared, Execution(4)))


@pytest.mark.parametrize("method", [gradient, fisher, gradient_activation])
def test_too_little_memory_is_refused_before_the_work(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem("llama", "text")
    prepared = prepare(*asked(p))
    monkeypatch.setattr(backward, "require_backward", lambda *_: None)
    monkeypatch.setattr("torch.autograd.grad", None)
    message = (
        r"task 'text': the backward pass of one example, of up to 8 \+ 4 tokens, keeps more than "
        r"memory_gb=1e-06; --memory-gb 0\.01 is enough"
    )
    with pytest.raises(DataError, match=message):
        method(prepared, Execution(memory_gb=1e-6))
    monkeypatch.undo()
    method(prepared, Execution(memory_gb=0.01))


# ----------------------------------------------------------------------------------------------- quantized


def quantized(modules: set[Any] | set[str]) -> Problem:
    """A Llama whose linears, all of the decoder or those of some names, torch has packed; they have no derivative."""
    p = problem("llama", "text")
    with warnings.catch_warnings(action="ignore"):
        p.model.model = torch.ao.quantization.quantize_dynamic(p.model.model, modules, dtype=torch.float16)
    return p


@pytest.mark.parametrize(
    ("modules", "named"),
    [
        ({torch.nn.Linear}, r"model\.layers\.0\.mlp\.down_proj"),
        ({"layers.2.self_attn.v_proj"}, r"model\.layers\.2\.self_attn\.v_proj"),
    ],
)
@pytest.mark.parametrize("method", ["grad_all", "grad_act", "head_grad"])
def test_a_quantized_model_is_refused(modules: Any, named: str, method: str, tmp_path: Any) -> None:
    """Also one whose residual stream carries a gradient past the quantized layer, as if it were whole."""
    p = quantized(modules)
    message = (
        rf"model type 'llama' cannot be run backward: its {named} \(Linear\) passes no gradient on; use a checkpoint "
        "that is not quantized, or a method without a backward pass: hones \\(with heads exact or race\\), dvp, ma, ap"
    )
    with pytest.raises(LayoutError, match=message):
        attribute(*asked(p), method=method, head_metric="logprob", run_dir=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    assert not any(module._forward_hooks for module in p.model.modules())


def test_a_method_without_a_backward_pass_takes_a_quantized_model() -> None:
    p = quantized({torch.nn.Linear})
    assert attribute(*asked(p), method="ma", head_metric="logprob").bank.size > 0
    head_statistics(prepare(*asked(p)), "logprob", Execution(9))


class NoDerivative(torch.autograd.Function):
    """Doubles its input, and raises in the backward pass."""

    @staticmethod
    def forward(_context: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(_context: Any, *_gradients: Any) -> Any:
        raise NotImplementedError("derivative for doubled is not implemented\nand more")


def test_an_operation_without_a_derivative_is_named() -> None:
    p = problem("llama", "text")
    prepared = prepare(*asked(p))
    p.model.model.layers[1].mlp.act_fn.forward = NoDerivative.apply
    with pytest.raises(LayoutError, match="cannot be run backward: derivative for doubled is not implemented; use a"):
        gradient(prepared, Execution())


def test_the_index_has_every_neuron() -> None:
    p = problem("llama", "text")
    prepared = prepare(*asked(p))
    assert factor_moments(prepared, Execution()).shape == (2, NeuronIndex.of(prepared.decoder.layout).size)
