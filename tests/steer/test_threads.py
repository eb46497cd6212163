"""Tasks and threads: who gets steered, who does not, and nobody waits forever."""

import asyncio
import contextlib
import contextvars
import functools
import gc
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
    """A TextIteratorStreamer without a tokenizer: iterates over tokens while another thread generates."""

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
    """Run a function in another thread, which ends with the process; return its result or raise its error."""
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
        actual = list(pool.map(lambda task: generate_under(steering, model, task), tasks, timeout=WAIT))
    assert actual == [unsteered if task is None else alone[task] for task in tasks]


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


def test_threads_started_inside_a_block_belong_to_it(model):
    """The time when they start, and the code that starts them, make no difference."""
    steering = attach(model)
    expected = generate_under(steering, model, "a")
    with steering.task("a"):
        first = run(generate, model)
        assert generate(model) == expected
        after_the_first_forward = run(generate, model)
        grandchild = run(run, generate, model)
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(generate, model).result(timeout=WAIT)
            with steering.task("b"):
                other = pool.submit(generate, model).result(timeout=WAIT)
    assert [first, after_the_first_forward, grandchild, job] == [expected] * 4
    assert other == generate_under(steering, model, "b")


def test_a_thread_that_outlives_the_block_it_was_started_in_is_stopped(llama):
    steering = attach(llama)
    left = threading.Event()
    future = Future()

    def work():
        left.wait(WAIT)
        try:
            future.set_result(generate(llama))
        except StateError as error:
            future.set_exception(error)

    with steering.task("a"):
        generate(llama)
        threading.Thread(target=work, daemon=True).start()
    left.set()
    with pytest.raises(StateError, match=r"block of task\('a'\) was left"):
        future.result(timeout=WAIT)


def test_a_thread_that_cannot_start_inside_a_block_is_left_as_it_was(llama):
    steering = attach(llama)
    thread = threading.Thread(target=str)
    thread.start()
    thread.join()
    run_before = thread.run
    with steering.task("a"):
        generate(llama)
        with pytest.raises(RuntimeError, match="threads can only be started once"):
            thread.start()
    assert thread.run == run_before


def test_a_pool_whose_worker_started_inside_a_block_runs_the_jobs_of_others_plain(llama):
    """Only the jobs submitted inside the block belong to it; the worker does not."""
    unsteered = generate(llama)
    steering = attach(llama)
    expected = generate_under(steering, llama, "a")
    with ThreadPoolExecutor(1) as pool:
        with steering.task("a"):
            assert pool.submit(generate, llama).result(timeout=WAIT) == expected
            elsewhere = contextvars.Context().run(pool.submit, generate, llama)
            assert elsewhere.result(timeout=WAIT) == unsteered
        assert pool.submit(generate, llama).result(timeout=WAIT) == unsteered


def test_contexts_that_have_nothing_to_do_with_an_open_block_stay_plain(llama):
    unsteered = generate(llama)
    steering = attach(llama)
    clean = contextvars.copy_context()
    entered, leave = threading.Event(), threading.Event()

    def hold(stream):
        block = stream()
        next(block)
        entered.set()
        leave.wait(WAIT)
        list(block)

    def stream():
        with steering.task("a"):
            yield generate(llama)

    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(hold, stream)
        entered.wait(WAIT)
        assert generate(llama) == unsteered
        assert clean.run(generate, llama) == unsteered
        assert run(generate, llama) == unsteered
        leave.set()
        held.result(timeout=WAIT)


class TestGeneratorsThatGoOnInAnotherContext:
    """Generators like those of a StreamingResponse: every step runs in a fresh copy of the server's context."""

    def steps(self, generator, threads=None):
        for _ in range(20):
            step = functools.partial(contextvars.copy_context().run, next, generator, None)
            chunk = threads.submit(step).result(timeout=WAIT) if threads else step()
            if chunk is None:
                return
            yield chunk

    @pytest.fixture
    def steering(self, llama):
        return attach(llama)

    @pytest.mark.parametrize("in_threads", [False, True])
    def test_every_step_is_steered_and_the_block_is_left_in_order(self, llama, steering, in_threads):
        expected = generate_under(steering, llama, "a")
        unsteered = generate(llama)

        def stream():
            with steering.task("a"):
                for _ in range(3):
                    yield generate(llama)
            yield generate(llama)

        with ThreadPoolExecutor(2) as pool:
            actual = list(self.steps(stream(), pool if in_threads else None))
        assert actual == [expected, expected, expected, unsteered]
        assert generate(llama) == unsteered
        steering.fold("a")
        steering.unfold()
        steering.unload("a")
        steering.detach()

    def test_a_starlette_response_streams_steered(self, llama, steering):
        from starlette.applications import Starlette
        from starlette.responses import StreamingResponse
        from starlette.routing import Route
        from starlette.testclient import TestClient

        def stream():
            with steering.task("a"):
                for _ in range(3):
                    yield f"{generate(llama)}\n"

        expected = generate_under(steering, llama, "a")
        app = Starlette(routes=[Route("/", lambda _request: StreamingResponse(stream()))])
        with TestClient(app) as client:
            assert client.get("/").text == f"{expected}\n" * 3
        steering.detach()

    @pytest.mark.parametrize("wrapped", [True, False])
    def test_the_documented_streaming_pattern_inside_it(self, llama, steering, wrapped):
        expected = generate_under(steering, llama, "a")
        inputs = text_inputs(1)

        def stream():
            streamer = QueueStreamer()
            with steering.task("a"):
                yield generate(llama)
                thread = threading.Thread(
                    target=steering.wrap(llama.generate) if wrapped else llama.generate,
                    kwargs={**inputs, "streamer": streamer, "max_new_tokens": 8, "do_sample": False},
                )
                thread.start()
                yield from streamer
                thread.join()

        first, prompt, *tokens = self.steps(stream())
        assert first == expected
        assert [[token for piece in tokens for token in piece]] == expected
        assert prompt == inputs["input_ids"].flatten().tolist()
        steering.detach()

    def test_blocks_in_helpers_and_nested_ones(self, llama, steering):
        expected = {task: generate_under(steering, llama, task) for task in ("a", "b", "none")}

        @contextlib.contextmanager
        def helper(task):
            with contextlib.ExitStack() as stack:
                stack.enter_context(steering.task(task))
                yield

        def inner():
            with steering.task("none"):
                return generate(llama)

        def stream():
            with helper("a"):
                yield generate(llama)
                yield generate(llama)
                with helper("b"):
                    yield generate(llama)
                    yield generate(llama)
                yield inner()
                yield generate(llama)

        actual = list(self.steps(stream()))
        assert actual == [expected[task] for task in ("a", "a", "b", "b", "none", "a")]

    def test_two_that_take_turns_in_one_context_do_not_mix(self, llama, steering):
        expected = {task: generate_under(steering, llama, task) for task in ("a", "b")}

        def stream(task, steps):
            with steering.task(task):
                for _ in range(steps):
                    yield generate(llama)

        one, other = stream("a", 2), stream("b", 3)
        actual = [next(generator) for generator in (one, other, one, other)]
        assert actual == [expected[task] for task in ("a", "b", "a", "b")]
        assert list(one) == []
        assert list(other) == [expected["b"]]
        unsteered = generate(llama)
        steering.detach()
        assert generate(llama) == unsteered

    def test_one_that_is_dropped_leaves_its_block(self, llama, steering):
        def stream():
            with steering.task("a"):
                yield generate(llama)
                yield generate(llama)

        def collected_inside_a_forward(_module, _args):
            if streams:
                streams.clear()
                gc.collect()

        expected = generate_under(steering, llama, "b")
        streams = [stream()]
        contextvars.copy_context().run(next, streams[0])
        handle = llama.model.layers[1].register_forward_pre_hook(collected_inside_a_forward)
        with steering.task("b"):
            assert generate(llama) == expected
        handle.remove()
        assert not streams
        steering.detach()

    def test_what_wrap_carries_goes_before_the_generator_that_calls_it(self, llama, steering):
        expected = {task: generate_under(steering, llama, task) for task in ("a", "b")}
        with steering.task("b"):
            wrapped = steering.wrap(generate)

            def stream():
                with steering.task("a"):
                    yield wrapped(llama)
                    yield generate(llama)

            actual = list(self.steps(stream()))
        assert actual == [expected["b"], expected["a"]]


def test_asyncio_tasks_started_inside_a_block_belong_to_it(llama):
    steering = attach(llama)
    expected = generate_under(steering, llama, "a")
    unsteered = run(generate, llama)

    async def asyncronous(start):
        await start.wait()
        return generate(llama)

    async def serve():
        start = asyncio.Event()
        before = asyncio.create_task(asyncronous(start))
        with steering.task("a"):
            inside = asyncio.create_task(asyncronous(start))
            start.set()
            loop = asyncio.get_running_loop()
            actual = [
                await before,
                await inside,
                await asyncio.to_thread(generate, llama),
                await loop.run_in_executor(None, generate, llama),
            ]
        return [*actual, await loop.run_in_executor(None, generate, llama)]

    assert asyncio.run(serve()) == [unsteered, expected, expected, expected, unsteered]


def test_an_async_generator_closed_from_another_context_leaves_its_block(llama):
    steering = attach(llama)

    async def stream():
        with steering.task("a"):
            yield generate(llama)
            yield generate(llama)

    async def serve():
        chunks = stream()
        actual = [await asyncio.create_task(anext(chunks)), await asyncio.create_task(anext(chunks))]
        await asyncio.create_task(chunks.aclose())
        return actual

    expected = generate_under(steering, llama, "a")
    assert asyncio.run(serve()) == [expected, expected]
    steering.detach()


def test_functions_that_go_on_after_their_call_cannot_be_wrapped(llama):
    steering = attach(llama)

    def generator():
        yield generate(llama)

    async def coroutine():
        return generate(llama)

    for function in (generator, coroutine):
        with pytest.raises(RoutingError, match=rf"{function.__name__} goes on after its call"):
            steering.wrap(function)


def test_a_wrapped_function_may_run_in_several_threads_at_once(llama):
    steering = attach(llama)
    expected = generate_under(steering, llama, "b")
    with steering.task("b"), ThreadPoolExecutor(3) as pool:
        wrapped = steering.wrap(generate)
        actual = [future.result(timeout=WAIT) for future in [pool.submit(wrapped, llama) for _ in range(6)]]
    assert actual == [expected] * 6


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
