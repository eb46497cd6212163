"""The registry of one API server of several: all of them hold what a `SharedState` says."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hones_serving.registry import Contents, Entry, ProfileRegistry
from hones_serving.shared_state import SharedState, SharedStateError, State, Stored, write_state
from hones_steer.errors import MismatchError, ProfileError
from hones_steer.profile import ModelIdentity, Profile, StrPath, parse_profile, serialize_profile
from hones_steer.store import SUFFIX

_LOOK_SECONDS = 0.1  # how often a server that gets no requests looks for a new state

logger = logging.getLogger(__name__)


def write_first_state(folder: Path, profiles: Mapping[str, Profile]) -> None:
    """Write the state that API servers begin with: profiles by name, each of its own file, and steering enabled.

    Raises:
        SharedStateError: the profiles are too large together, or the state cannot be written.
    """
    write_state(folder, _state(1, {name: Entry(profile, name + SUFFIX) for name, profile in profiles.items()}, True))


class SharedRegistry(ProfileRegistry):
    """The profiles and the kill switch that all API servers of a server agree on; who is admitted, each knows alone.

    What is in use is counted in each server, so `max_profiles` is this one's share. There is no room for routed
    experts: what others have admitted, this one would have to know.

    Raises:
        SharedStateError: the state cannot be read, or a profile of it was made for another model.
    """

    def __init__(
        self,
        shared: SharedState,
        folder: StrPath,
        identity: ModelIdentity,
        *,
        max_profiles: int,
        always_enough: bool,
        listing: str,
    ) -> None:
        self._shared = shared
        self._following = threading.Lock()
        self._version = 0
        self._parsed: dict[bytes, Profile] = {}  # of this version's profiles
        self._problem: str | None = None  # why the state cannot be read
        self._confirmed: tuple[int, str | None] | None = None  # version and problem, as the other servers know them
        self._logged: tuple[int, str | None] | None = None  # likewise, as the log has them
        super().__init__(folder, identity, max_profiles=max_profiles, always_enough=always_enough, listing=listing)
        self.follow()

    def _read_folder(self) -> dict[str, Entry]:
        return {}  # the state has what the server's first process has read

    def keep_up(self) -> None:
        """Look for a new state again and again, in a thread, and confirm it; also while no request comes."""

        def look() -> None:
            while True:
                self._look()
                time.sleep(_LOOK_SECONDS)

        threading.Thread(target=look, name="hones-state", daemon=True).start()

    def _look(self) -> None:
        with suppress(SharedStateError):  # `follow` has noted it
            self.follow()
        with self._following:
            now = self._version, self._problem
        if now == self._confirmed:
            return
        logged, self._logged = now == self._logged, now
        if now[1] is not None and not logged:
            logger.error("API server %d answers steered requests with 503: %s", self._shared.index, now[1])
        try:
            self._shared.confirm(*now)
            self._confirmed = now
        except SharedStateError as error:
            if not logged:
                logger.error("API server %d cannot tell the others what it has: %s", self._shared.index, error)

    def follow(self) -> None:
        """Take over the state, if it is another than was read last.

        Raises:
            SharedStateError: it cannot be read, or does not fit this model.
        """
        with self._following:
            try:
                state = self._shared.read()
                if state is not None:
                    self._take(state)
            except SharedStateError as error:
                self._shared.forget()
                self._problem = str(error)
                raise
            self._problem = None

    def about(self) -> dict[str, Any]:
        """Which API server this is, and the version of the state that it has."""
        return {"api_server": self._shared.index, "version": self._version}

    def _take(self, state: State) -> None:
        parsed: dict[bytes, Profile] = {}
        entries: dict[str, Entry] = {}
        for name, (file, data) in state.profiles.items():
            try:
                parsed[data] = profile = self._parsed.get(data) or parse_profile(data)
                entries[name] = self._checked(profile, file)
            except (ProfileError, MismatchError) as error:
                raise SharedStateError(f"the shared profile {name!r} cannot be used: {error}") from error
        self._parsed, self._version = parsed, state.version
        with self._lock:
            self._set(entries, state.enabled)

    def _change(self, change: Callable[[dict[str, Entry], bool], Contents]) -> None:
        """Replace the state by what `change` makes of it, and wait until all servers have confirmed that.

        Raises:
            SharedStateError: the state cannot be read or written; nothing has changed.
            UnconfirmedError: it is changed, and a server has not confirmed it; the message names it.
        """
        with self._shared.changing():
            self.follow()
            with self._lock:
                entries, enabled = change(self._entries, self.enabled)
            version = self._version + 1
            self._shared.write(_state(version, entries, enabled))
            self.follow()
        self._shared.wait(version)


def _state(version: int, entries: Mapping[str, Entry], enabled: bool) -> State:
    stored = {name: Stored(entry.file, serialize_profile(entry.profile)) for name, entry in entries.items()}
    return State(version, enabled, stored)
