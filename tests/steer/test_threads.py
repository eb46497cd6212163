"""Tasks and threads: who gets steered, who does not, and nobody waits for ever."""

import queue
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import tiny_models
import torch
from reference_steering import new_tokens
from tiny_models import random_profile, text_inputs
from transformers.generation.streamers import BaseStreamer

from hones_steer.errors import HonesError, RoutingError, StateError
from hones_steer.huggingface import steer

WAIT = 300  # seconds; a test that waits this long has failed, also on a busy machine


class QueueStreamer(BaseStreamer):
    """What TextIteratorStreamer does, without a tokenizer: iterate over tokens while another thread generates."""

    def __init__(self):
        self.tokens = queue.Queue()

    def put(self, value):
        self.tokens.put(value.flatten().tolist())

    def end(self):
        self.tokens.put(None)

    def __iter__(self):
        while (tokens := self.tokens.get(timeout=WAIT)) is not None:
            yield tokens


@pytest.fixture(params=tiny_models.FULL_MATRIX)
def model(request):
    return tiny_models.FULL_MATRIX[request.param]()


@pytest.fixture
def llama():
    return tiny_models.llama()


def attach(model):
    return steer(model, {"a": random_profile(model, 1), "b": random_profile(model, 2)})


def generate(model, rows=1):
    inputs = text_inputs(rows)
    return new_tokens(model.generate(**inputs, max_new_tokens=8, do_sample=False), inputs)


def generate_under(steering, model, task):
    with steering.task(task):
        return generate(model)


def run(function, *args):
    """The function's result or error in a thread of its own, which a deadlock does not keep alive."""
    future = Future()

    def work():
        try:
            future.set_result(function(*args))
        except HonesError as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future.result(timeout=WAIT)


def test_threads_with_different_tasks_do_not_mix(model):
    unsteered = generate(model)
    steering = attach(model)
    alone = {task: generate_under(steering, model, task) for task in ("a", "b", "a@0.5+b")}
    assert len({str(tokens) for tokens in (unsteered, *alone.values())}) == 4
    tasks = [*alone, None] * 4
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda task: generate_under(steering, model, task), tasks, timeout=WAIT))
    assert found == [unsteered if task is None else alone[task] for task in tasks]


def test_a_thread_without_a_task_stays_bit_equal_beside_steered_ones(model):
    inputs = text_inputs(2)
    with torch.no_grad():
        untouched = model(**inputs).logits
    steering = attach(model)
    stop = threading.Event()

    def keep_steering():
        while not stop.is_set():
            with steering.tasks(["a", "b"]), torch.no_grad():
                model(**inputs)

    with ThreadPoolExecutor(1) as pool:
        steered = pool.submit(keep_steering)
        with torch.no_grad():
            equal = [torch.equal(model(**inputs).logits, untouched) for _ in range(20)]
        stop.set()
        steered.result(timeout=WAIT)
    assert all(equal)


def test_streaming_with_wrap(model):
    steering = attach(model)
    expected = generate_under(steering, model, "a")
    streamer = QueueStreamer()
    inputs = text_inputs(1)
    with steering.task("a"):
        thread = threading.Thread(
            target=steering.wrap(model.generate),
            kwargs={**inputs, "streamer": streamer, "max_new_tokens": 8, "do_sample": False},
        )
        thread.start()
        tokens = [token for piece in streamer for token in piece]
        thread.join()
    assert [tokens[inputs["input_ids"].shape[1] :]] == expected


def test_streaming_without_wrap_raises_instead_of_running_unsteered(model):
    steering = attach(model)
    streamer = QueueStreamer()
    kwargs = {**text_inputs(1), "streamer": streamer, "max_new_tokens": 2, "do_sample": False}

    def stream():
        with steering.task("a"):
            thread = threading.Thread(target=model.generate, kwargs=kwargs)
            thread.start()
            list(streamer)
            thread.join()

    with pytest.raises(RoutingError, match=r"task\('a'\); if another thread runs it, .* steering.wrap"):
        stream()


def test_a_wrapped_function_may_run_in_several_threads_at_once(llama):
    steering = attach(llama)
    expected = generate_under(steering, llama, "b")
    with steering.task("b"), ThreadPoolExecutor(3) as pool:
        wrapped = steering.wrap(generate)
        found = [future.result(timeout=WAIT) for future in [pool.submit(wrapped, llama) for _ in range(6)]]
    assert found == [expected] * 6


def test_a_wrapped_function_that_outlives_its_block_is_stopped(llama):
    steering = attach(llama)
    with steering.task("a"):
        generate(llama)
        late = steering.wrap(generate)
    with pytest.raises(StateError, match=r"block of task\('a'\) was left"):
        run(late, llama)
    assert run(generate, llama) == generate(llama)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_forward_leaves_nothing_locked(llama, error):
    steering = attach(llama)
    unsteered = generate(llama)
    expected = generate_under(steering, llama, "a")

    def interrupt(_module, _args):
        raise error

    # Outside generate and outside a task an interrupt (not an error) is noticed by the thread's next forward only.
    calls = [generate] if error is KeyboardInterrupt else [generate, lambda model: model(**text_inputs(1))]
    for call in calls:
        handle = llama.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(error):
            call(llama)
        handle.remove()
        assert run(generate, llama) == unsteered
        handle = llama.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(error), steering.task("b"):
            call(llama)
        handle.remove()
        assert run(generate_under, steering, llama, "a") == expected
        assert run(generate, llama) == unsteered
        assert generate_under(steering, llama, "a") == expected


def test_an_interrupted_forward_does_not_stop_its_own_thread(llama):
    steering = attach(llama)
    unsteered = generate(llama)

    def interrupt(_module, _args):
        raise KeyboardInterrupt

    handle = llama.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        llama(**text_inputs(1))
    handle.remove()
    assert generate(llama) == unsteered
    assert run(generate_under, steering, llama, "a") != unsteered


def test_a_refused_forward_leaves_nothing_locked(llama):
    steering = attach(llama)
    with pytest.raises(RoutingError), steering.tasks(["a", "b", "a"]):
        generate(llama, rows=2)
    with pytest.raises(RoutingError), steering.tasks(["a", "b", "a"]):
        llama(**text_inputs(2))
    run(generate, llama)


def test_detach_is_refused_while_another_thread_is_in_a_task(llama):
    steering = attach(llama)
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with steering.task("a"):
            generate(llama)
            entered.set()
            leave.wait(WAIT)

    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(hold)
        entered.wait(WAIT)
        for call in (steering.detach, lambda: steering.fold("b"), lambda: steering.unload("a")):
            with pytest.raises(StateError, match=r"task\('a'\)"):
                call()
        leave.set()
        held.result(timeout=WAIT)
    steering.detach()
