"""A folder of profiles by task name, and the expressions that mix them: ``vqa@0.5+ocr``.

``expr = none | term ("+" term){0,7}``, ``term = name ["@" number]``; a number has at most 3 decimals, is at
most 10 in magnitude and may be negative; no white space; at most 256 characters. Repeated names add.
"""

from __future__ import annotations

import difflib
import heapq
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from hones_steer.errors import ProfileError, RoutingError
from hones_steer.profile import MAX_SCALE, Profile, StrPath, blend, is_task_name, load_profile

MAX_TERMS = 8
MAX_EXPRESSION_LENGTH = 256
MAX_STRENGTH = 10
SUFFIX = ".safetensors"

_ALL_LISTED = 8  # an error names all tasks up to so many, of more only the nearest
_NEAREST = 5
_SIMILAR = 0.6  # least ratio, by difflib, of a near name

_NUMBER = re.compile(r"(-?)(0|[1-9][0-9]?)(?:\.([0-9]{1,3}))?")


@dataclass(frozen=True)
class Expression:
    """A parsed expression in canonical form; ``str()`` gives its canonical text.

    `terms` holds ``(task, strength in thousandths)`` sorted by task, each task once, no zeros; it is empty
    for ``none`` and for what adds up to it. `names` are all tasks mentioned, also those whose strengths
    cancel out: an unknown task is an error even at strength 0.
    """

    terms: tuple[tuple[str, int], ...]
    names: tuple[str, ...] = field(compare=False)

    def __str__(self) -> str:
        parts = []
        for name, thousandths in self.terms:
            # A repeated name can add up to more than one term may carry.
            limit = MAX_STRENGTH * 1000 if thousandths > 0 else -MAX_STRENGTH * 1000
            whole, rest = divmod(thousandths, limit)
            parts += [_term(name, limit)] * whole
            parts += [_term(name, rest)] if rest else []
        return "+".join(parts) or "none"


def _term(name: str, thousandths: int) -> str:
    if thousandths == 1000:
        return name
    whole, decimals = divmod(abs(thousandths), 1000)
    number = f"{whole}.{decimals:03d}".rstrip("0").rstrip(".")
    return f"{name}@{'-' if thousandths < 0 else ''}{number}"


def parse_expression(text: str) -> Expression:
    """Parse an expression (grammar in the module's docstring). Names are not looked up.

    Raises:
        RoutingError: the text is malformed; the message names the part.
    """
    if len(text) > MAX_EXPRESSION_LENGTH:
        raise RoutingError(
            f"the steering expression has {len(text)} characters; at most {MAX_EXPRESSION_LENGTH} are allowed"
        )
    if text == "none":
        return Expression((), ())
    parts = text.split("+")
    if len(parts) > MAX_TERMS:
        raise RoutingError(f"the steering expression {text!r} has {len(parts)} terms; at most {MAX_TERMS} are allowed")
    strengths: dict[str, int] = {}
    for part in parts:
        name, thousandths = _parse_term(part, text)
        strengths[name] = strengths.get(name, 0) + thousandths
    names = tuple(sorted(strengths))
    return Expression(tuple((name, strengths[name]) for name in names if strengths[name]), names)


def _parse_term(part: str, text: str) -> tuple[str, int]:
    name, at, number = part.partition("@")
    if name == "none":
        raise RoutingError(f"'none' stands alone and cannot be part of the steering expression {text!r}")
    if not is_task_name(name):
        raise RoutingError(
            f"{name!r} in the steering expression {text!r} is not a task name; write tasks like 'vqa@0.5+ocr'"
        )
    if not at:
        return name, 1000
    match = _NUMBER.fullmatch(number)
    if match is None:
        raise RoutingError(
            f"{number!r} in the steering expression {text!r} is not a strength; "
            "write a number with at most 3 decimals, like 0.5 or -1.25"
        )
    sign, whole, decimals = match[1], match[2], match[3] or ""
    thousandths = int(whole) * 1000 + int(decimals.ljust(3, "0"))
    if thousandths > MAX_STRENGTH * 1000:
        raise RoutingError(
            f"the strength {number} in the steering expression {text!r} exceeds {MAX_STRENGTH} in magnitude"
        )
    return name, -thousandths if sign else thousandths


def combine(
    expression: Expression, lookup: Callable[[str], Profile], *, allow_mismatch: bool = False
) -> Profile | None:
    """The profile that `expression` describes, or None where nothing is left to steer (``none``, all zero).

    One task at strength 1 is that profile itself. Otherwise offsets are summed in float64 and rounded once
    to float32, in sorted order, so that ``a+b`` and ``b+a`` have the same digest; the result's task is the
    one task named, or ``blend``, and its description is the expression. `lookup` returns the profile of a name
    or raises RoutingError. `allow_mismatch` combines profiles whose model types or sketches differ.

    Raises:
        RoutingError: a task is unknown, or a scale goes beyond 100 in magnitude.
        MismatchError: the profiles belong to different models.
    """
    profiles = {name: lookup(name) for name in expression.names}
    if not expression.terms:
        return None
    name, thousandths = expression.terms[0]
    if len(expression.terms) == 1 and thousandths == 1000:
        return profiles[name]
    terms = [(profiles[name], thousandths / 1000) for name, thousandths in expression.terms]
    task = name if len(terms) == 1 else "blend"
    try:
        return blend(terms, task=task, description=str(expression), allow_mismatch=allow_mismatch)
    except ProfileError as error:
        raise RoutingError(
            f"the steering expression '{expression}' gives scales beyond {MAX_SCALE:g}; lower its strengths"
        ) from error


def known_tasks(name: str, tasks: Collection[str], listing: str) -> str:
    """The end of an error about the unknown task `name`: all tasks if they are few, else those with the nearest names.

    `listing` says where all of them are listed, such as "GET /v1/hones/profiles".
    """
    if len(tasks) <= _ALL_LISTED:
        return f"known tasks: {', '.join(tasks) or 'none yet'}"
    nearest = _nearest(name, tasks)
    if not nearest:
        return f"none of the {len(tasks):,} known tasks has a similar name; for all see {listing}"
    return f"nearest of the {len(tasks):,} known tasks: {', '.join(nearest)}; for all see {listing}"


def _nearest(name: str, tasks: Collection[str]) -> list[str]:
    matcher = difflib.SequenceMatcher(b=name.lower())

    def bound(task: str) -> float:
        matcher.set_seq1(task.lower())
        return matcher.quick_ratio()

    def similarity(task: str) -> float:
        matcher.set_seq1(task.lower())
        return matcher.ratio()

    # Similarities of 2,000 long names take a third of a second, during which a server would answer nobody.
    candidates = heapq.nlargest(32, tasks, key=bound)
    return [task for task in heapq.nlargest(_NEAREST, candidates, key=similarity) if similarity(task) >= _SIMILAR]


class ProfileStore:
    """A folder with one file per task, ``<task>.safetensors``; the task inside must be the file's name.

    Files are read when asked for and kept until they change. Nothing outside the folder is ever read: names
    cannot contain a path, and a symlink that leaves the folder is refused.

    Raises:
        ProfileError: the folder does not exist.
    """

    def __init__(self, folder: StrPath) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ProfileError(f"{self.folder}: no such folder; give the folder that holds <task>.safetensors files")
        self._cache: dict[str, tuple[tuple[int, int, int], Profile]] = {}

    def names(self) -> list[str]:
        """The tasks that have a file, sorted. Broken files are listed too; `get` says what is wrong with them."""
        files = self.folder.glob("*" + SUFFIX)
        return sorted(name for name in (file.name.removesuffix(SUFFIX) for file in files) if is_task_name(name))

    def path(self, name: str) -> Path:
        """The real path of a task's file, which may not exist yet.

        Raises:
            RoutingError: `name` is not a task name.
            ProfileError: the file is a symlink that leaves the store.
        """
        if not is_task_name(name):
            raise RoutingError(f"{name!r} is not a task name; {self._known(name)}")
        root = os.path.realpath(self.folder)
        file = self.folder / (name + SUFFIX)
        path = os.path.realpath(file)
        if os.path.commonpath([root, path]) != root:
            raise ProfileError(f"{file}: leaves the store; put the file itself into the folder")
        return Path(path)

    def get(self, name: str) -> Profile:
        """The profile of a task, read anew when its file has changed.

        Raises:
            RoutingError: there is no such task; the message names the known ones, or the nearest of many.
            ProfileError: its file is broken, leaves the store, or holds another task.
        """
        path = self.path(name)
        try:
            status = path.stat()
        except FileNotFoundError as error:
            raise RoutingError(f"there is no profile for the task {name!r}; {self._known(name)}") from error
        except OSError as error:
            raise ProfileError(f"{path}: cannot be read: {error.strerror}") from error
        key = (status.st_mtime_ns, status.st_size, status.st_ino)
        cached = self._cache.get(name)
        if cached is not None and cached[0] == key:
            return cached[1]
        profile = load_profile(path)
        if profile.task != name:
            raise ProfileError(f"{path}: holds the task {profile.task!r}; rename it to {profile.task}{SUFFIX}")
        self._cache[name] = (key, profile)
        return profile

    def resolve(self, expression: str) -> Profile | None:
        """The profile that an expression describes, or None for no steering.

        Raises:
            RoutingError, ProfileError, MismatchError: see `parse_expression`, `get` and `combine`.
        """
        return combine(parse_expression(expression), self.get)

    def _known(self, name: str) -> str:
        return known_tasks(name, self.names(), f"the folder {self.folder}")
