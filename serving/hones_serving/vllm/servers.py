"""Several API servers before one engine, which agree on the profiles and the kill switch.

The process of `vllm serve` starts the engine and, as processes of their own, the API servers. Before these, it makes
the folder of what they agree on (`hones_serving.shared_state`), with the profiles and the routing file as they are.
"""

from __future__ import annotations

import fcntl
import functools
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hones_serving.expert_room import ExpertRoom
from hones_serving.registry import ProfileRegistry, read_folder
from hones_serving.routing_file import load_plan
from hones_serving.settings import STATE_DIR, Settings
from hones_serving.shared_registry import SharedRegistry, write_first_state
from hones_serving.shared_state import ROUTING, SharedState
from hones_serving.vllm import compat
from hones_steer.errors import StateError
from hones_steer.profile import ModelIdentity


class StateFolder:
    """A new folder that holds what API servers agree on at their start; it goes when the process ends that made it.

    `path` is where it is.

    Raises:
        ProfileError: a profile is broken, or its file has a name that no task can have.
        RoutingError: the routing file is wrong.
        SharedStateError: the profiles are too large together, or the folder cannot be written.
    """

    def __init__(self, settings: Settings) -> None:
        profiles = read_folder(settings.profiles)
        self._folder = tempfile.TemporaryDirectory(prefix="hones-")  # which only this user can enter
        self.path = Path(self._folder.name)
        # What cleans temporary folders up by their age (systemd-tmpfiles) leaves a locked one alone.
        self._lock = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        write_first_state(self.path, profiles)
        if settings.routing is not None:
            load_plan(settings.routing, profiles)
            (self.path / ROUTING).write_bytes(settings.routing.read_bytes())


def install() -> None:
    """Wrap vLLM's start of API servers: they get a folder to agree in, and find it in HONES_STATE_DIR."""
    from vllm.v1.utils import APIServerProcessManager

    manager: Any = APIServerProcessManager
    start = manager.__init__

    @functools.wraps(start)
    def share_and_start(self: Any, *args: Any, **kwargs: Any) -> None:
        if settings := Settings.from_env():
            self.hones_state = StateFolder(settings)
            os.environ[STATE_DIR] = str(self.hones_state.path)
        start(self, *args, **kwargs)

    manager.__init__ = share_and_start


def registry_of(config: Any, answers: Sequence[Mapping[str, Any]], settings: Settings, listing: str) -> ProfileRegistry:
    """The registry of an engine's front: the only one, or that of one API server of several, which hold the same.

    Raises:
        ProfileError, MismatchError, DataError: a profile of the folder cannot be used with this model.
        StateError: the profiles list neurons of too many experts, or several API servers cannot agree.
    """
    identity = ModelIdentity.from_json(dict(answers[0]["identity"]))
    index, servers = config.parallel_config._api_process_rank, config.parallel_config._api_process_count
    limited = compat.max_admitted(config, settings)
    most = limited or compat.max_profiles(config, settings)
    if servers == 1:
        tables = [answer["room"] for answer in answers if answer["room"]]
        rooms = [ExpertRoom(each["tables"], frozenset(each["experts"]), frozenset(each["layers"])) for each in tables]
        return ProfileRegistry(
            settings.profiles,
            identity,
            max_profiles=most,
            always_enough=limited is None,
            listing=listing,
            rooms=rooms,
        )
    if settings.state is None:
        raise StateError(
            "there are several API servers, but HONES_STATE_DIR names no folder in which they can agree; start them "
            "with `hones serve` or `vllm serve`, or give --api-server-count 1"
        )
    registry = SharedRegistry(
        SharedState(settings.state, index, servers),
        settings.profiles,
        identity,
        max_profiles=most,
        always_enough=limited is None,
        listing=listing,
    )
    registry.keep_up()
    return registry
