"""The profiles that a server knows by name, and the requests that use them; only so many can be in use at once."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from hones_serving.expert_room import ExpertRoom
from hones_steer.errors import MismatchError, ProfileError, RoutingError, StateError
from hones_steer.profile import ModelIdentity, Profile, StrPath, is_task_name, load_profile
from hones_steer.scopes import ALL
from hones_steer.store import SUFFIX, Expression, ProfileStore, combine, known_tasks

LISTING = "GET /v1/hones/profiles"  # the call that lists all profiles of a server

_CACHED_BLENDS = 128


class CapacityError(RoutingError):
    """More different profiles would be in use at once than the server has room for: HTTP 429."""


@dataclass(frozen=True, eq=False)
class Admission:
    """Permission of one request to be steered by `profile` (None: unsteered), whatever is loaded or switched off later.

    `scope` says which of its tokens are steered. Metrics count it under `label`.
    """

    profile: Profile | None
    label: str
    scope: str = ALL


class Entry(NamedTuple):
    """A loaded profile, and the file that it was read from, relative to the folder."""

    profile: Profile
    file: str


Contents = tuple[dict[str, Entry], bool]  # what a registry holds: entries by name, and whether steering is enabled


def label_of(expression: Expression) -> str:
    """The label of an expression in metrics: its task, ``blend`` for several, ``none`` where nothing steers."""
    if len(expression.terms) > 1:
        return "blend"
    return expression.terms[0][0] if expression.terms else "none"


class ProfileRegistry:
    """The profiles of one folder, for one model. Safe to use from several threads.

    Files are read when the server starts and by `load`, never because they have changed. `enabled` is the kill
    switch, which the caller of `admit` looks at. `follow` and `about` are for a server of several processes
    (`shared_registry`); here they do nothing.

    Args:
        folder: holds ``<task>.safetensors`` files; every one is loaded and checked.
        identity: identity of the model to be steered.
        max_profiles: number of different profiles that can be in use at once.
        always_enough: the engine never needs more than `max_profiles`, so no request is ever turned away.
        listing: the place where a client finds the names of all profiles, for errors that name the nearest ones only.
        rooms: the room that each worker has for the scales of routed experts, for a model that has some.

    Raises:
        ProfileError: the folder does not exist; a file is broken, leaves the folder, or has a name that no task has.
        MismatchError: a profile was made for another model.
        RoomError: the profiles list neurons of more experts than there is room for.
    """

    def __init__(
        self,
        folder: StrPath,
        identity: ModelIdentity,
        *,
        max_profiles: int,
        always_enough: bool,
        listing: str = LISTING,
        rooms: Sequence[ExpertRoom] = (),
    ) -> None:
        self.enabled = True
        self._folder = Path(folder)
        self._identity = identity
        self._max_profiles = max_profiles
        self._always_enough = always_enough
        self._listing = listing
        self._rooms = rooms
        self._lock = Lock()
        self._entries = self._read_folder()
        self._admissions: set[Admission] = set()
        self._require_room(self._entries.values(), ())
        self._uses: Counter[str] = Counter()  # digest -> admissions and holds
        self._admitted: dict[str, Profile] = {}  # digest -> profile, of those in use and some before; only with rooms
        self._blend = functools.lru_cache(maxsize=_CACHED_BLENDS)(_blend)
        self._changed: Callable[[], None] = lambda: None

    def _read_folder(self) -> dict[str, Entry]:
        return {name: self._checked(profile, name + SUFFIX) for name, profile in read_folder(self._folder).items()}

    # Several processes

    def follow(self) -> None:
        """Take over what other processes of the server have changed; before each request and each call of a client.

        Raises:
            SharedStateError: what they have agreed on cannot be read.
        """

    def about(self) -> dict[str, Any]:
        """Facts about this process of the server that clients are told, in JSON."""
        return {}

    # Reading

    def tasks(self) -> list[str]:
        """The names of tasks that expressions can use, sorted."""
        return sorted(self._entries)

    def num_profiles(self) -> int:
        """Number of names that expressions can use."""
        return len(self._entries)

    def profiles(self) -> list[dict[str, Any]]:
        """A JSON object for each profile, sorted by name: what a client is told about it."""
        return [_described(name, entry) for name, entry in sorted(self._entries.items())]

    def require_known(self, expression: Expression) -> None:
        """Check that all tasks of an expression have profiles. Raises RoutingError, naming the nearest ones, if not."""
        self._lookup(self._entries, expression)

    def resolve(self, expression: Expression) -> Profile | None:
        """Blend the profile that an expression describes now; None if it changes nothing.

        Raises:
            RoutingError: a task has no profile, or the blend has a scale beyond 100 in magnitude.
        """
        return self._blend(expression, self._lookup(self._entries, expression))

    def _lookup(self, entries: dict[str, Entry], expression: Expression) -> tuple[tuple[str, Profile], ...]:
        for name in expression.names:
            if name not in entries:
                known = known_tasks(name, sorted(entries), self._listing)
                raise RoutingError(f"there is no profile for the task {name!r}; {known}")
        return tuple((name, entries[name].profile) for name in expression.names)

    # Changing

    def load(self, name: str, path: str) -> dict[str, Any]:
        """Add a profile, or replace the one of this name; returns its entry in `profiles`.

        `path` is relative to the folder, or absolute and inside it. Requests admitted before keep their profile.

        Raises:
            ProfileError: `name` cannot name a task, or the file is broken or outside the folder.
            MismatchError: the profile was made for another model.
            RoomError: together with the others it lists neurons of more experts than there is room for.
        """
        if not is_task_name(name):
            raise ProfileError(f"{name!r} cannot name a task; use letters, digits, '_', '.' and '-' (not 'none')")
        root = os.path.realpath(self._folder)
        try:
            real = os.path.realpath(Path(root) / path)
        except ValueError as error:  # a NUL character, or half a surrogate pair
            raise ProfileError(f"{path!r} is not a path; name a file inside the folder of profiles") from error
        if os.path.commonpath([root, real]) != root:
            raise ProfileError(f"{path!r} leaves the folder of profiles; put the file itself into the folder")
        entry = self._checked(load_profile(real), os.path.relpath(real, root))

        def added(entries: dict[str, Entry], enabled: bool) -> Contents:
            entries = {**entries, name: entry}
            self._forget_unused()
            self._require_room(entries.values(), self._admitted.values())
            return entries, enabled

        self._change(added)
        return _described(name, entry)

    def unload(self, name: str) -> None:
        """Forget a profile; its file stays. Requests admitted before keep their profile.

        Raises:
            RoutingError: no profile has this name.
        """

        def without(entries: dict[str, Entry], enabled: bool) -> Contents:
            if name not in entries:
                known = known_tasks(name, sorted(entries), self._listing)
                raise RoutingError(f"there is no profile {name!r} to unload; {known}")
            return {key: entry for key, entry in entries.items() if key != name}, enabled

        self._change(without)

    def switch(self, enabled: bool) -> None:
        """Throw the kill switch: whether requests that are admitted from now on are steered."""
        self._change(lambda entries, _: (entries, enabled))

    def _change(self, change: Callable[[dict[str, Entry], bool], Contents]) -> None:
        """Replace what the registry holds by what `change` makes of it; if that raises, nothing has changed."""
        with self._lock:
            self._set(*change(self._entries, self.enabled))

    def _set(self, entries: dict[str, Entry], enabled: bool) -> None:
        self._entries, self.enabled = entries, enabled
        self._changed()

    def _forget_unused(self) -> None:
        # Not at once: the engine may be about to hold a profile whose client has left.
        self._admitted = {digest: profile for digest, profile in self._admitted.items() if digest in self._uses}

    def _require_room(self, entries: Iterable[Entry], admitted: Iterable[Profile]) -> None:
        """Check that what is loaded has room, beside what requests were admitted with. Raises RoomError if not."""
        profiles = [*(entry.profile for entry in entries), *admitted]
        for room in self._rooms:
            room.require(profiles)

    def _checked(self, profile: Profile, file: str) -> Entry:
        try:
            profile.base_model.check(self._identity)
        except MismatchError as error:
            # The argument that the message ends with is Python's; a server has none.
            reason = str(error).removesuffix(" or pass allow_mismatch=True")
            raise MismatchError(f"{self._folder / file}: {reason}") from error
        return Entry(profile, file)

    # Using

    def admit(self, profile: Profile | None, label: str, scope: str = ALL) -> Admission:
        """Admit a request: its profile has room until `leave`.

        Raises:
            CapacityError: `max_profiles` other profiles are in use.
        """
        admission = Admission(profile, label, scope)
        with self._lock:
            if profile is not None:
                self._hold(profile.digest)
                if self._rooms:
                    self._admitted[profile.digest] = profile
                    if len(self._admitted) > _CACHED_BLENDS:
                        self._forget_unused()
            self._admissions.add(admission)
            self._changed()
        return admission

    def leave(self, admission: Admission) -> None:
        """Give the room of an admission back; calling it again changes nothing."""
        with self._lock:
            if admission not in self._admissions:
                return
            self._admissions.remove(admission)
            if admission.profile is not None:
                self._release(admission.profile.digest)
            self._changed()

    def hold(self, digest: str) -> None:
        """Count a request inside the engine as a user of the profile with this digest, until `release`.

        Raises:
            CapacityError: `max_profiles` other profiles are in use.
        """
        with self._lock:
            self._hold(digest)
            self._changed()

    def release(self, digest: str) -> None:
        """Undo one `hold`. Raises StateError if nothing holds this profile."""
        with self._lock:
            self._release(digest)
            self._changed()

    def slots_used(self) -> int:
        """Number of different profiles in use."""
        return len(self._uses)

    def in_flight(self) -> int:
        """Number of requests that are admitted and have not left."""
        return len(self._admissions)

    def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` now, and whenever `num_profiles`, `slots_used` or `in_flight` have changed.

        Calls come one at a time; `changed` may read the registry, but not change it. It replaces the one before.
        """
        with self._lock:
            self._changed = changed
            changed()

    def _hold(self, digest: str) -> None:
        if digest not in self._uses and len(self._uses) >= self._max_profiles and not self._always_enough:
            raise CapacityError(
                f"{self._max_profiles} other profiles are in use, as many as this server holds at once; "
                "try again soon, or start it with a larger --max-profiles"
            )
        self._uses[digest] += 1

    def _release(self, digest: str) -> None:
        if digest not in self._uses:
            raise StateError(f"nothing holds the profile {digest[:12]}; release it once per hold")
        self._uses[digest] -= 1
        if not self._uses[digest]:
            del self._uses[digest]


def _blend(expression: Expression, profiles: tuple[tuple[str, Profile], ...]) -> Profile | None:
    # Each profile's sketch was checked against the model's; the sketches of two may differ by twice the tolerance.
    return combine(expression, dict(profiles).__getitem__, allow_mismatch=True)


def read_folder(folder: StrPath) -> dict[str, Profile]:
    """Read every profile of a folder, by task name.

    Raises:
        ProfileError: the folder does not exist; a file is broken, leaves the folder, or has a name that no task has.
    """
    store = ProfileStore(folder)
    names = store.names()
    for file in sorted(store.folder.glob("*" + SUFFIX)):
        if file.name.removesuffix(SUFFIX) not in names:
            raise ProfileError(f"{file}: no task can have this name; rename the file to <its task>{SUFFIX}")
    return {name: store.get(name) for name in names}


def _described(name: str, entry: Entry) -> dict[str, Any]:
    profile = entry.profile
    return {
        "name": name,
        "digest": profile.digest,
        "neurons": profile.num_neurons,
        "layers": len(profile.steered_layers),
        "description": profile.description,
        "file": entry.file,
    }
