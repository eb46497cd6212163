"""The vLLM plugin: entry points that vLLM calls in each of its processes.

compat.py    what of vLLM this relies on, checked at start, and what is refused
front.py     before the engine: an expression or an HTTP admission becomes the request's profile and cache salt
worker.py    in the engine: scale tables, each token's slot, the scaled activation
endpoint.py  the HTTP side of the API server

A profile's contents travel inside the request, so workers need no registry of their own. A worker writes them into
a slot of its tables when a step schedules a request whose profile has none.

vLLM logs and skips a plugin whose *import* fails: here only the standard library is imported, the rest inside the
functions, whose errors stop the server.
"""

from typing import Any

_registered = False


def register() -> None:
    """Entry point of `vllm.general_plugins`, called in every process, perhaps more than once.

    Does nothing unless HONES_PROFILES is set.

    Raises:
        StateError: this vLLM version is not supported.
        DataError: a HONES_* variable has a bad value.
    """
    global _registered
    from hones_serving.settings import Settings

    settings = Settings.from_env()
    if settings is None or _registered:
        return
    from hones_serving.vllm import compat, front, worker

    compat.check_version()
    front.install()
    worker.install()
    _registered = True


def endpoint() -> Any:
    """Entry point of `vllm.endpoint_plugins`: the plugin object of the API server."""
    from hones_serving.vllm.endpoint import Endpoint

    return Endpoint()
