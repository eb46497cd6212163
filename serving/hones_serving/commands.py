"""The command ``hones serve``: makes all checks that need no model, then becomes the steered server of an engine."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hones_serving import listening
from hones_serving.settings import COUNT, MAX_BODY_MB, Settings, flag
from hones_serving.transformers_server import command as transformers_server
from hones_steer.errors import DataError, MismatchError
from hones_steer.profile import Profile
from hones_steer.store import SUFFIX, ProfileStore

PLUGIN = "hones"

_SERVERS = {
    # The module that `vllm serve` runs for a single server. (The `vllm` command itself does not run in every build.)
    "vllm": "vllm.entrypoints.launchers.api_server.entry",
    "transformers": transformers_server.__name__,
}
_SEVERAL = "hones_serving.vllm.serve"  # for several API servers
_NEEDED = {"vllm": ("vllm",), "transformers": ("transformers", "fastapi", "uvicorn", "openai", "jinja2")}
_EXTRAS = {"vllm": "vllm", "transformers": "serve"}
_PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)
# Flags that would have no effect, or another than `hones serve` promises.
_REFUSED = {
    "--model": "MODEL, the first argument, names the model",
    "--headless": "hones serve runs an API server",
    "--grpc": "steering is for the HTTP server",
}
_LAST_PORT = 65535
# A shape of a profile's base model -> its name in a language model's config.json.
_SHAPES = {
    "num_layers": "num_hidden_layers",
    "intermediate_size": "intermediate_size",
    "hidden_size": "hidden_size",
}

_DESCRIPTION = """\
Serve MODEL with the OpenAI-compatible server of vLLM, or of transformers. A request names its steering: the body's
"hones_task", else the header X-Hones-Task, else the model "MODEL:task"; a routing file decides for those that do not.
Every response says in X-Hones-Profile and X-Hones-Route what it got."""

_EPILOG = """\
Every other option goes to vLLM as it is; `vllm serve --help=all` lists them. The transformers engine needs no more
than a laptop; it takes --dtype (auto, float32, bfloat16, float16), --device (auto, cpu, cuda, ...), --max-num-seqs
(requests that generate at a time), --kv-cache-gib (what their cache takes; 0: none, they wait for each other) and, for
web pages that call it, --allowed-origins '["https://app.example"]' instead.

examples:
  hones serve llava-hf/llava-1.5-7b-hf --profiles profiles
  hones serve ./model --profiles hub:my-org/my-profiles@3f1c0de
  hones serve ./model --profiles profiles --routing routing.yaml --port 8080 --max-model-len 4096
  hones serve ./model --profiles profiles --engine transformers --device cpu
  HONES_KEY=... ; hones serve ./model --profiles profiles --api-key "$HONES_KEY" --allow-profile-updates

  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -H 'X-Hones-Task: vqa@0.5+ocr' \\
    -d '{"model": "./model", "messages": [{"role": "user", "content": "What is this?"}]}'
  curl localhost:8000/v1/hones/profiles"""


def serve(argv: Sequence[str]) -> int:
    """Run ``hones serve MODEL --profiles DIR ...``: become a server whose requests are steered.

    Never returns. Raises HonesError if something would stop the server, see `launch` and `check_address`.
    """
    arguments, environment = launch(argv, os.environ, installed_plugins())
    check_address(argv)
    sys.stdout.flush()
    os.execve(arguments[0], arguments, environment)


def launch(
    argv: Sequence[str], environ: Mapping[str, str], plugins: Collection[str]
) -> tuple[list[str], dict[str, str]]:
    """Check everything and return the arguments and the environment variables of the process that serves.

    `argv` are the arguments of `hones serve`. `plugins` are the vLLM plugins that an unset VLLM_PLUGINS would load:
    naming ours must not turn them off.

    Raises:
        DataError: a package that the engine needs is not installed.
        HonesError: as `check`.
    """
    options, rest = _parse(argv)
    settings = Settings(
        profiles=_profiles_folder(options.profiles),
        max_profiles=options.max_profiles,
        routing=options.routing,
        allow_updates=options.allow_profile_updates,
        allow_untested=flag(environ, "HONES_ALLOW_UNTESTED"),
        playground=options.playground,
        max_body_mb=options.max_body_mb,
        max_expert_tables=options.max_expert_tables,
    )
    _check_installed(options.engine)
    check(options.model, settings)
    arguments = [*_arguments(options), *rest]
    if options.engine == "transformers":
        key = {transformers_server.KEY: options.api_key} if options.api_key else {}
        return arguments, {**environ, **settings.to_env(), **key}
    return arguments, {**environ, **_vllm_variables(options, settings, environ, plugins)}


def _check_installed(engine: str) -> None:
    for name in _NEEDED[engine]:
        if find_spec(name) is None:
            raise DataError(f"{name} is not installed; run: pip install 'hones-steer[{_EXTRAS[engine]}]'")


# Options ------------------------------------------------------------------------------------------


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse into the options of `hones serve` and the arguments left for the engine, in their order."""
    parser = _parser()
    # Later, a MODEL could not be told from the value of an option that only vLLM knows.
    if argv and argv[0].startswith("-") and not {"-h", "--help"} & set(argv):
        parser.error(f"MODEL comes before all options, but the first argument is {argv[0]}")
    options, rest = parser.parse_known_args(argv)
    for argument in rest:
        name = argument.partition("=")[0].replace("_", "-")
        if name in _REFUSED:
            parser.error(f"{name} cannot be given: {_REFUSED[name]}")
    if options.engine == "transformers":
        if options.max_expert_tables is not None:
            parser.error("--max-expert-tables is for vLLM: with transformers all experts have tables")
        if options.api_server_count is not None:
            parser.error("--api-server-count is for vLLM: with transformers there is one server")
        transformers_server.parse(["--model", options.model, *rest])
    return options, rest


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hones serve",
        usage="hones serve MODEL --profiles DIR [--engine ENGINE] [options] [options of the engine]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # or it would take --max-p... and the like from vLLM
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a model folder or a Hub name")
    add("--engine", choices=("vllm", "transformers"), default="vllm", help="what runs the model (default: vllm)")
    add(
        "--profiles",
        metavar="DIR",
        required=True,
        help="folder of profiles, <task>.safetensors, or hub:ORG/NAME@REVISION for those of a Hub repository",
    )
    add("--routing", metavar="FILE", type=Path, help="YAML: default, rules and canary for requests that do not ask")
    add(
        "--max-profiles",
        metavar="N",
        type=_count,
        help="how many different profiles can be in use at once; requests beyond get 429 (default: as many as vLLM's "
        "--max-num-seqs, at most 64; no limit with transformers)",
    )
    add(
        "--max-expert-tables",
        metavar="N",
        type=_count,
        help="of how many experts the loaded profiles of a mixture of experts can list neurons, in each of vLLM's "
        "workers; more profiles are refused (default: as many as those in DIR at the start)",
    )
    add(
        "--allow-profile-updates",
        action="store_true",
        help="let clients replace profiles and switch steering off over HTTP; use it with --api-key",
    )
    add(
        "--max-body-mb",
        metavar="N",
        type=_count,
        default=MAX_BODY_MB,
        help=f"largest body of a request in MiB, also once decompressed; larger ones get 413 (default: {MAX_BODY_MB})",
    )
    add(
        *("--api-server-count", "--api_server_count", "-asc"),
        metavar="N",
        type=_count,
        help="so many of vLLM's API servers, which agree on profiles and the kill switch (default: 1)",
    )
    add("--playground", action="store_true", help="a page at /hones on which to try profiles by hand")
    add("--host", help="address to listen on (default: all)")
    add("--port", type=_port, help=f"port to listen on, 1 to {_LAST_PORT} (default: {listening.PORT})")
    add(
        "--shutdown-timeout",
        "--shutdown_timeout",
        metavar="SECONDS",
        type=_seconds,
        help="how long answers that run may still take after SIGTERM or Ctrl-C before they are cut off (default: "
        f"{transformers_server.SHUTDOWN_SECONDS}; with vLLM, as vllm serve: 0, at once)",
    )
    # With underscores too, as vLLM reads them: a key must not slip through to its command line.
    names = ("--served-model-name", "--served_model_name")
    add(*names, metavar="NAME", nargs="+", help="what requests call the model (default: MODEL)")
    add("--api-key", "--api_key", metavar="KEY", type=_key, help="what clients must send as a bearer token")
    return parser


def _count(text: str) -> int:
    if not COUNT.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 999999")
    return int(text)


def _port(text: str) -> int:
    if not (COUNT.fullmatch(text) and int(text) <= _LAST_PORT):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, a whole number from 1 to {_LAST_PORT}")
    return int(text)


def _seconds(text: str) -> int:
    if text != "0" and not COUNT.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of seconds from 0 to 999999")
    return int(text)


def _key(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the key is empty, so anybody could call the server; is its variable set?")
    return text


def _profiles_folder(where: str) -> Path:
    """The folder that `where` names, or the local copy of the Hub repository if it is "hub:org/name@revision"."""
    if not where.startswith("hub:"):
        return Path(where)
    from hones_steer.hub import local_folder

    return local_folder(where)


# Checks before the long start ---------------------------------------------------------------------


def check(model: str, settings: Settings) -> None:
    """Refuse, before the model is loaded, whatever would stop the server or leave it with nothing to steer.

    Raises:
        DataError: the model's folder has no config.json, or there are no profiles and none can be added later.
        ProfileError: the folder of profiles does not exist, or a profile is broken.
        MismatchError: a profile is for a model of other shapes than those in the model folder's config.json.
        RoutingError: a profile's file has a name that no task can have, or the routing file is wrong.
    """
    config = read_config(model)
    store = ProfileStore(settings.profiles)
    names = (file.name.removesuffix(SUFFIX) for file in sorted(store.folder.glob("*" + SUFFIX)))
    profiles = {name: store.get(name) for name in names}
    if not profiles and not settings.allow_updates:
        raise DataError(f"{store.folder}: holds no profiles; put <task>{SUFFIX} files there, or name another folder")
    for name, profile in profiles.items():
        _check_shapes(profile, store.path(name), config)
    if settings.routing is not None:
        from hones_serving.routing_file import load_plan

        load_plan(settings.routing, profiles)


def check_address(argv: Sequence[str]) -> None:
    """Check that the server could listen where the arguments of `hones serve` say. Raises DataError if not."""
    options, rest = _parse(argv)
    if not any(argument.partition("=")[0] == "--uds" for argument in rest):  # vLLM: a file instead of a port
        listening.close(listening.bind(options.host or listening.HOST, options.port or listening.PORT))


def read_config(model: str) -> dict[str, Any]:
    """Read the config.json of a model folder; empty if `model` is no folder but a name, which the engine may download.

    Raises:
        DataError: `model` is a path where nothing is, or its config.json is missing or no JSON object.
    """
    folder = Path(model)
    if not folder.exists() and model.startswith((".", "/", "~")):
        raise DataError(f"{model}: there is no such model folder; name one that exists, or a Hub name")
    if not folder.is_dir():
        return {}
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))  # not strictly: transformers takes Infinity, too
    except FileNotFoundError as error:
        raise DataError(f"{file}: does not exist, so {model} is no model folder") from error
    except ValueError as error:
        raise DataError(f"{file}: is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise DataError(f"{file}: is not a JSON object")
    return config


def _check_shapes(profile: Profile, path: Path, config: Mapping[str, Any]) -> None:
    """Compare a profile with the shapes that config.json states; later the server compares all, with the weights.

    Raises:
        MismatchError: a shape differs; the message names the profile's file.
    """
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    shapes = {field: text[key] for field, key in _SHAPES.items() if isinstance(text.get(key), int)}
    try:
        profile.base_model.check_sizes(shapes)
    except MismatchError as error:
        raise MismatchError(f"{path}: {error}") from error


# The process that serves --------------------------------------------------------------------------


def installed_plugins() -> set[str]:
    """The names of the vLLM plugins that load where VLLM_PLUGINS is unset."""
    return {point.name for group in _PLUGIN_GROUPS for point in entry_points(group=group)}


def _arguments(options: argparse.Namespace) -> list[str]:
    # -P: as with vLLM's own command, Python does not look for modules in the current folder.
    servers = options.api_server_count or 1
    module = _SERVERS[options.engine] if servers == 1 else _SEVERAL
    arguments = [sys.executable, "-P", "-m", module, "--model", options.model]
    if servers > 1:
        arguments += ["--api-server-count", str(servers)]
    for name in ("host", "port", "shutdown_timeout"):
        if getattr(options, name) is not None:
            arguments += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    if options.served_model_name:
        arguments += ["--served-model-name", *options.served_model_name]
    return arguments


def _vllm_variables(
    options: argparse.Namespace, settings: Settings, environ: Mapping[str, str], plugins: Collection[str]
) -> dict[str, str]:
    """The environment variables to set for vLLM's process, in place of those in `environ`."""
    plugin_names = environ["VLLM_PLUGINS"].split(",") if "VLLM_PLUGINS" in environ else sorted(plugins)
    variables = {
        **settings.to_env(),
        "VLLM_PLUGINS": ",".join(dict.fromkeys([*filter(None, plugin_names), PLUGIN])),
    }
    if options.api_key:
        variables["VLLM_API_KEY"] = options.api_key  # every user of the machine can read a command line
    return variables
