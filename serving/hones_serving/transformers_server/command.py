"""The process that ``hones serve --engine transformers`` becomes; settings and key come as environment variables."""

from __future__ import annotations

import argparse
import json
import logging.config
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import NoReturn

from hones_serving import listening
from hones_serving.settings import Settings
from hones_steer.errors import DataError, HonesError

KEY = "HONES_API_KEY"
MAX_NUM_SEQS = 16  # requests that generate at a time
KV_CACHE_GIB = 1.0  # of a paged cache
OPTIONS = ("--dtype", "--device", "--allowed-origins", "--max-num-seqs", "--kv-cache-gib")
SHUTDOWN_SECONDS = 20  # Kubernetes kills after 30


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the options of `hones serve` that this engine gets. An unknown one ends the process with 2, naming it."""
    parser = argparse.ArgumentParser(
        prog="hones serve",
        usage="hones serve MODEL --engine transformers --profiles DIR [options] [--dtype TYPE] [--device DEVICE]",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--host", default=listening.HOST)
    parser.add_argument("--port", type=int, default=listening.PORT)
    parser.add_argument("--shutdown-timeout", type=int, default=SHUTDOWN_SECONDS)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--allowed-origins", metavar="JSON", type=_origins, default=[])
    parser.add_argument("--max-num-seqs", metavar="N", type=_positive, default=MAX_NUM_SEQS)
    parser.add_argument("--kv-cache-gib", metavar="GIB", type=_size, default=KV_CACHE_GIB)
    options, unknown = parser.parse_known_args(argv)
    for argument in unknown:
        name = argument.partition("=")[0].replace("_", "-")
        if name == "--continuous-batching" or name.startswith("--cb-"):
            parser.error(f"{name} cannot be given: batching is on, and has --max-num-seqs and --kv-cache-gib")
        parser.error(f"the transformers engine knows no {name}; it has {', '.join(OPTIONS)}")
    return options


def _origins(text: str) -> list[str]:
    try:
        origins = json.loads(text)
    except ValueError:
        origins = None
    if not (isinstance(origins, list) and all(isinstance(origin, str) for origin in origins)):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON list of origins such as '[\"https://app.example\"]'")
    return origins


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _size(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = -1
    if not 0 <= size < 2**20:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of GiB, such as 2 or 0.5")
    return size


def main(argv: Sequence[str], environ: Mapping[str, str]) -> NoReturn:
    """Load the model, then serve it until SIGTERM or SIGINT, which end the process with 0.

    While the model loads, these signals end the process at once, with 128 + the signal's number.

    Raises:
        HonesError: an option, the model, a profile or the routing file is wrong; nothing listens by then.
    """
    for number in (signal.SIGTERM, signal.SIGINT):  # the first process of a container is not ended by them by default
        signal.signal(number, _stop_loading)
    options = parse(argv)
    settings = Settings.from_env(environ)
    if settings is None:
        raise DataError("HONES_PROFILES names no folder of profiles; start this server with `hones serve`")
    sockets = listening.bind(options.host, options.port)
    import uvicorn.config

    from hones_serving.transformers_server import stopping
    from hones_serving.transformers_server.app import build_app, pinned

    logging.config.dictConfig(uvicorn.config.LOGGING_CONFIG)  # which uvicorn does later, but what is built logs, too
    manager = pinned(options.model, dtype=options.dtype, device=options.device)
    served = options.served_model_name or [options.model]
    app = build_app(
        settings,
        manager,
        served,
        environ.get(KEY),
        options.allowed_origins,
        most=options.max_num_seqs,
        cache_gib=options.kv_cache_gib,
    )
    stopping.serve(app, sockets, options.shutdown_timeout)


def _stop_loading(number: int, _frame: FrameType | None) -> None:
    print(f"hones serve: stopped by {signal.Signals(number).name} before the model was loaded", file=sys.stderr)
    os._exit(128 + number)  # threads that load or download would hold up an exit that waits for them


if __name__ == "__main__":
    try:
        main(sys.argv[1:], os.environ)
    except HonesError as error:
        print(f"hones serve: error: {error}", file=sys.stderr)
        sys.exit(2)
