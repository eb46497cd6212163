"""The state table in the docstring of `Injection`, event by event, on a live model."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_models
import torch
from tiny_models import random_profile, text_inputs

from hones_steer._transformers import enable_checkpointing
from hones_steer.errors import RoutingError
from hones_steer.huggingface import steer
from hones_steer.slots import IDENTITY

NOTHING = ((IDENTITY,), 1)
WAIT = 300  # seconds; a test that waits this long has failed, also on a busy machine


@pytest.fixture
def model():
    return tiny_models.llama()


@pytest.fixture
def steering(model):
    return steer(model, {"a": random_profile(model, 1, "a"), "b": random_profile(model, 2, "b")})


@pytest.fixture
def injection(steering):
    return steering._attached.injection


def forward(model):
    with torch.no_grad():
        model(**text_inputs(2))


def observed(model, look):
    """Call `look` in the middle of a forward; return its result."""
    results = []
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: results.append(look()))
    forward(model)
    handle.remove()
    return results[0]


def in_another_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(timeout=WAIT)


def test_a_forward_runs_in_its_thread_and_its_rows_stay_written_until_the_block_ends(model, steering, injection):
    assert not injection.is_running_here()
    assert injection._written == NOTHING
    with steering.tasks(["a", None]):
        running, owner = observed(model, lambda: (injection.is_running_here(), injection._owner))
        assert running
        assert owner == threading.get_ident()
        assert not injection.is_running_here()
        assert injection._written == ((1, IDENTITY), 2)
    assert injection._written == NOTHING


def test_a_refused_forward_ends_idle(model, steering, injection):
    with pytest.raises(RoutingError), steering.tasks(["a", "b", "a"]):
        forward(model)
    assert not injection.is_running_here()
    in_another_thread(lambda: forward(model))  # the lock is free


def test_entering_again_releases_the_forward_before(model, injection):
    for _ in range(3):
        injection.enter((), text_inputs(2))  # as a forward that an interrupt left without an end
    injection.release()
    assert not injection.is_running_here()
    in_another_thread(lambda: forward(model))


def test_release_does_nothing_without_a_forward_of_this_thread(model, injection):
    injection.release()

    def release_elsewhere():
        in_another_thread(injection.release)
        return injection.is_running_here()

    assert observed(model, release_elsewhere)


def test_another_threads_forward_waits(model, injection):
    def running_beside():
        beside = threading.Thread(target=forward, args=(model,))
        beside.start()
        free = in_another_thread(lambda: injection.lock.acquire(blocking=False))
        return beside, free

    beside, free = observed(model, running_beside)
    assert not free
    beside.join(WAIT)
    assert not beside.is_alive()


def test_rest_leaves_a_forward_in_progress_alone(model, steering, injection):
    def rest():
        injection.rest()
        return injection._written

    with steering.task("a"):
        assert observed(model, rest) == ((1,), 2)


def test_rest_keeps_the_rows_of_the_latest_forward_with_gradients(model, steering, injection):
    with steering.task("a"):
        model(**text_inputs(2))
    assert injection._written == ((1,), 2)
    with steering.task("b"):
        forward(model)
    assert injection._written == NOTHING


def test_an_eager_layer_outside_all_forwards_is_refused_in_a_block_and_unscaled_outside(model, steering):
    z = torch.ones(1, 1, model.config.intermediate_size)
    down_proj = model.model.layers[0].mlp.down_proj
    assert down_proj(z).equal(torch.nn.functional.linear(z, down_proj.weight))
    with pytest.raises(RoutingError, match="called past the model"), steering.task("a"):
        down_proj(z)


def test_a_recomputed_layer_has_the_scales_of_its_own_forward(model, steering):
    """Backward runs while another task's rows are written, and recomputes the layers as they were."""

    def gradients(*, recompute):
        model.zero_grad()
        model.train(recompute)
        with steering.task("a"):
            loss = model(**text_inputs(2)).logits.square().sum()
            with steering.task("b"):
                forward(model)
            loss.backward()
        return model.model.layers[0].mlp.down_proj.weight.grad

    expected = gradients(recompute=False)
    enable_checkpointing(model)
    torch.testing.assert_close(gradients(recompute=True), expected)
