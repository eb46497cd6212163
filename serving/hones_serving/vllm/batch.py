"""Batch files: the lines that ``vllm run-batch`` answers obey the contract of the HTTP server.

vLLM's batch runner calls the handler of chat completions without HTTP, so no middleware sees its lines. Here the
handler is wrapped: a line names its steering in its body, by ``hones_task`` or by the model's name, or the routing file
decides; its answer has the object ``hones``. There are no headers, and no changes while it runs.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Awaitable, Callable, Iterable
from typing import IO, Any

from vllm.usage.usage_lib import UsageContext

from hones_serving.bodies import RepeatedNames, parse_request
from hones_serving.contract import RefusedError, Service, admit, check_repeated, clean
from hones_serving.exchange import Exchange
from hones_serving.facts import facts_of_chat
from hones_serving.settings import Settings
from hones_serving.vllm.front import wrap
from hones_steer.errors import RoutingError

RUNNER = "vllm.entrypoints.launchers.run_batch"
_CHAT = "completions"  # its key in vLLM's registry of handlers

Build = Callable[..., Awaitable[dict[str, dict[str, Any]]]]
Handler = Callable[..., Awaitable[Any]]
Read = Callable[[str], Awaitable[str]]


def install() -> None:
    """Have the engine of vLLM's batch runner wrap the runner, whose module is complete by then, whatever its name."""
    from vllm.v1.engine.async_llm import AsyncLLM

    wrap(AsyncLLM, "__init__", _start_runner)


def _start_runner(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    settings = Settings.from_env()
    if settings is None or kwargs.get("usage_context") is not UsageContext.OPENAI_BATCH_RUNNER:
        return
    for name in ("__main__", RUNNER):
        module = sys.modules.get(name)
        if module is not None and hasattr(module, "build_endpoint_registry"):
            steer_runner(module, settings)


def steer_runner(module: Any, settings: Settings) -> None:
    """Wrap the two functions of vLLM's batch runner, given as its module, that read the file and make the handlers."""
    module.build_endpoint_registry = _steered(module.build_endpoint_registry, settings)
    if hasattr(module, "read_file"):  # until vLLM 0.32
        module.read_file = _checked(module.read_file)
    else:
        module.dispatch_batch = _dispatched(module.dispatch_batch)


def _checked(read: Read) -> Read:
    """A `read` of batch files that checks the text."""

    @functools.wraps(read)
    async def read_file(path_or_url: str) -> str:
        text = await read(path_or_url)
        check_lines(text.strip().split("\n"))
        return text

    return read_file


def _dispatched(dispatch: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """A `dispatch` that checks all lines of the open file before it has the first one answered."""

    @functools.wraps(dispatch)
    async def dispatch_batch(input_file: IO[str], *args: Any, **kwargs: Any) -> None:
        check_lines(input_file)
        input_file.seek(0)
        await dispatch(input_file, *args, **kwargs)

    return dispatch_batch


def check_lines(lines: Iterable[str]) -> None:
    """Check that no line of a batch file gives a name twice which can name steering; raises RoutingError if one does.

    vLLM's parser keeps the last only, so nothing after this sees both.
    """
    for number, line in enumerate(lines, 1):
        value = parse_request(line.encode())
        if isinstance(value, RepeatedNames) and "body" in value.names:
            raise RoutingError(f"line {number} of the batch file gives 'body' more than once; give it once")
        body = value.get("body") if isinstance(value, dict) else None
        try:
            check_repeated(body if isinstance(body, dict) else {})
        except RefusedError as refused:
            raise RoutingError(f"line {number} of the batch file: {refused}") from refused


def _steered(build: Build, settings: Settings) -> Build:
    @functools.wraps(build)
    async def build_endpoint_registry(engine_client: Any, args: Any) -> dict[str, dict[str, Any]]:
        # Not before: the module would take the place of the function `endpoint` of the package, which vLLM calls.
        from hones_serving.vllm.api_server import make_service

        registry = await build(engine_client=engine_client, args=args)
        handler = registry[_CHAT]["handler_getter"]()
        if handler is not None:
            service = await make_service(settings, engine_client, handler.__self__.models)
            registry[_CHAT]["handler_getter"] = lambda: functools.partial(answer, service, handler)
        return registry

    return build_endpoint_registry


async def answer(service: Service, handler: Handler, request: Any) -> Any:
    """Answer one line, a ChatCompletionRequest, as `handler` does, steered; returns a response or an ErrorResponse."""
    from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse

    body = request.model_dump(mode="json", exclude_unset=True)
    try:
        admitted = admit(service, facts_of_chat, body, {})
    except RefusedError as refused:
        return ErrorResponse(error=ErrorInfo(**refused.content["error"]))
    exchange = Exchange(service.count_unsteered)
    exchange.admission = admitted.admission
    try:
        clean(body, admitted.decision.model)
        with exchange.handled():
            # Always anew: what pydantic reads of a message's parts can be read once only.
            response = await handler(type(request).model_validate(body))
        if isinstance(response, ErrorResponse):
            return response
        service.metrics.requests(admitted.admission.label, admitted.decision.route)
        said = response.model_dump()
        return type(response).model_validate(said) if admitted.complete(said) else response
    finally:
        service.registry.leave(admitted.admission)
