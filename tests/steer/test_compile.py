"""Steering under torch.compile: nothing recompiles on a switch, nothing is stale, and the scaling is fused."""

import itertools
import re

import pytest
import tiny_models
import torch
from reference_steering import new_tokens
from tiny_models import random_profile, text_inputs
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from transformers import CompileConfig

from hones_steer.huggingface import steer

INPUTS = {
    "llama": text_inputs,
    "llava": tiny_models.llava_inputs,
    "qwen2_5_vl": tiny_models.qwen2_5_vl_inputs,
}
SWITCHES = [
    [None, None, None, None],
    ["a", "a", "a", "a"],
    ["b", "b", "b", "b"],
    ["a", None, "b", "a@0.5+b"],
    [None, "b", "a", None],
    [None, None, None, None],
]


# Raised within Inductor's own imports.
inductor = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture(params=["llama", *(pytest.param(name, marks=pytest.mark.matrix) for name in INPUTS if name != "llama")])
def model_and_ids(request):
    """A full-matrix model with token ids only: vision towers break graphs by themselves."""
    inputs = text_inputs()
    return tiny_models.FULL_MATRIX[request.param](), {"input_ids": inputs["input_ids"], "use_cache": False}


def attach(model, **options):
    return steer(model, {"a": random_profile(model, 1), "b": random_profile(model, 2)}, **options)


def call(function, inputs):
    with torch.no_grad():
        return function(**inputs).logits


def assert_switches_are_right(steering, model, compiled, inputs):
    """Assert that every kind of switch gives the eager result, and that only the first call compiles."""
    results = []
    for step, tasks in enumerate(SWITCHES):
        with steering.tasks(tasks), torch.compiler.set_stance("force_eager"):
            expected = call(model, inputs)
        with torch._dynamo.config.patch(error_on_recompile=step > 0), steering.tasks(tasks):
            actual = call(compiled, inputs)
        torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-4)
        results.append(actual)
    for one, other in itertools.pairwise(results):
        assert not torch.allclose(one, other, atol=1e-1)
    with torch._dynamo.config.patch(error_on_recompile=True), steering.task("a"):
        uniform = call(compiled, inputs)
    with steering.task("a"), torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(uniform, call(model, inputs), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_fullgraph_does_not_recompile_on_a_switch(model_and_ids, backend):
    model, inputs = model_and_ids
    steering = attach(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert_switches_are_right(steering, model, compiled, inputs)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_compiled_forward_attribute(model_and_ids):
    model, inputs = model_and_ids
    steering = attach(model)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    assert_switches_are_right(steering, model, model, inputs)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_steered_and_an_unsteered_model_of_one_class():
    """Dynamo keeps code by class: code compiled for one model must not run for the other."""
    inputs = {"input_ids": text_inputs()["input_ids"], "use_cache": False}
    for steered_first in (False, True):
        plain, model = tiny_models.llama(), tiny_models.llama()
        steering = attach(model)
        compiled = [torch.compile(each, fullgraph=True, backend="eager") for each in (plain, model)]
        for each in reversed(compiled) if steered_first else compiled:
            with steering.task("a"):
                call(model, inputs)  # a block without a forward is an error
                actual = call(each, inputs)
                expected = call(each._orig_mod, inputs)
            torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-4)
        steering.detach()


def test_a_flattening_architecture_and_a_transposed_projection():
    for make in (tiny_models.opt, tiny_models.gpt2):
        torch.compiler.reset()
        model = make()
        steering = attach(model)
        inputs = {"input_ids": text_inputs()["input_ids"], "use_cache": False}
        assert_switches_are_right(steering, model, torch.compile(model, fullgraph=True, backend="eager"), inputs)


@inductor
def test_inductor_and_identity_rows():
    model = tiny_models.llama(num_hidden_layers=2)
    inputs = {"input_ids": text_inputs()["input_ids"], "use_cache": False}
    untouched = call(torch.compile(model, fullgraph=True), inputs)
    steering = attach(model)
    compiled = torch.compile(model, fullgraph=True)
    assert_switches_are_right(steering, model, compiled, inputs)
    assert torch.equal(call(compiled, inputs), untouched)


def test_code_compiled_before_steer_and_after_detach_is_not_stale(model_and_ids):
    """Dynamo does not look at hooks again once it has compiled a module."""
    model, inputs = model_and_ids
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    untouched = call(compiled, inputs)
    steering = attach(model)
    with steering.task("a"):
        expected = call(model, inputs)
        assert torch.equal(call(compiled, inputs), expected)
    assert not torch.allclose(expected, untouched, atol=1e-2)
    steering.detach()
    assert torch.equal(call(compiled, inputs), untouched)


def test_compiled_parts_called_on_their_own_are_not_steered_by_what_came_before():
    model = tiny_models.llama()
    ids = text_inputs()["input_ids"]
    steering = attach(model)
    model.model.forward = torch.compile(model.model.forward, backend="eager")
    with torch.no_grad():
        untouched = model.model(input_ids=ids, use_cache=False)[0]
        with steering.task("a"):
            assert not torch.equal(model(input_ids=ids, use_cache=False).logits, model.lm_head(untouched))
        assert torch.equal(model.model(input_ids=ids, use_cache=False)[0], untouched)


def test_generate_with_a_static_cache_compiles_once():
    """Transformers compiles the decoding step by itself if the cache is static."""
    model = tiny_models.llama()
    inputs = text_inputs()
    steering = attach(model)
    compile_config = CompileConfig(backend="eager", mode="default", fullgraph=True, dynamic=False)
    compile_config._compile_all_devices = True
    options = {"max_new_tokens": 6, "do_sample": False}
    for step, tasks in enumerate(SWITCHES):
        with steering.tasks(tasks):
            expected = model.generate(**inputs, **options)
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                actual = model.generate(
                    **inputs, **options, cache_implementation="static", compile_config=compile_config
                )
        assert new_tokens(actual, inputs) == new_tokens(expected, inputs)
    assert counters["stats"]["unique_graphs"] >= 1


def test_compiled_training_steers_its_gradients():
    model = tiny_models.llama(num_hidden_layers=2)
    steering = attach(model)
    inputs = {"input_ids": text_inputs()["input_ids"], "use_cache": False}
    inputs["labels"] = inputs["input_ids"]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for tasks in SWITCHES:
        gradients = []
        for function in (model, compiled):
            model.zero_grad()
            with steering.tasks(tasks):
                loss = function(**inputs).loss
            loss.backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        for eager, actual in zip(*gradients, strict=True):
            torch.testing.assert_close(actual, eager, atol=1e-3, rtol=1e-3)


@inductor
def test_the_scaling_is_fused_with_the_activation():
    """Reads Inductor's code: steered and unsteered models have the same number of kernels."""

    def kernels(model):
        compiled = torch.compile(model, fullgraph=True)
        _, codes = run_and_get_code(call, compiled, {"input_ids": text_inputs()["input_ids"], "use_cache": False})
        return re.findall(r"^\s*(cpp_fused\w*)\(", "\n".join(codes), re.MULTILINE)

    model = tiny_models.llama(num_hidden_layers=2)
    plain = kernels(model)
    torch.compiler.reset()
    attach(model)
    steered = kernels(model)
    assert len(plain) >= 2
    assert len(steered) == len(plain)
    activations = [kernel for kernel in steered if "silu" in kernel]
    assert len(activations) == 2
    assert all("index_select" in kernel for kernel in activations)
    assert not any("index_select" in kernel for kernel in plain)
