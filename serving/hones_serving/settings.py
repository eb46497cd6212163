"""A server's settings of steering, in environment variables: they reach every process that vLLM starts.

================================  ====================================================================
``HONES_PROFILES``                folder of profiles, ``<task>.safetensors``; unset: nothing is steered
``HONES_MAX_PROFILES``            number of different profiles that can be in use at once
``HONES_MAX_EXPERT_TABLES``       number of experts of which profiles can list neurons, in a vLLM worker
``HONES_ROUTING``                 routing file (YAML)
``HONES_ALLOW_PROFILE_UPDATES``   1: profiles can be replaced, and steering switched off, over HTTP
``HONES_MAX_BODY_MB``             largest body of a request, in MiB, also once decompressed; unset: 64
``HONES_PLAYGROUND``              1: a page at /hones on which people try profiles by hand
``HONES_ALLOW_UNTESTED``          1: run also with settings of vLLM's that no test runs
``HONES_STATE_DIR``               folder of what several API servers agree on; the process that starts them sets it
================================  ====================================================================

An empty value counts as unset.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hones_steer.errors import DataError

STATE_DIR = "HONES_STATE_DIR"
MAX_BODY_MB = 64
COUNT = re.compile(r"[1-9][0-9]{0,5}")  # a whole number from 1 to 999999


@dataclass(frozen=True)
class Settings:
    """Settings of one server; each field is a variable of the module's table.

    `max_profiles` None leaves the number to the engine, `routing` None means no routing. `max_expert_tables` None makes
    room for as many experts as the profiles list neurons of that are in the folder when the server starts.
    """

    profiles: Path
    max_profiles: int | None = None
    routing: Path | None = None
    allow_updates: bool = False
    allow_untested: bool = False
    playground: bool = False
    max_body_mb: int = MAX_BODY_MB
    max_expert_tables: int | None = None
    state: Path | None = None

    @property
    def max_body(self) -> int:
        """The largest body of a request, in bytes."""
        return self.max_body_mb * 2**20

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Settings | None:
        """The settings in the environment, or None where ``HONES_PROFILES`` names no folder.

        Raises:
            DataError: a variable has a value that means nothing.
        """
        folder = environ.get("HONES_PROFILES")
        if not folder:
            return None
        routing, state = environ.get("HONES_ROUTING"), environ.get(STATE_DIR)
        return cls(
            profiles=Path(folder),
            max_profiles=_count(environ, "HONES_MAX_PROFILES"),
            routing=Path(routing) if routing else None,
            allow_updates=flag(environ, "HONES_ALLOW_PROFILE_UPDATES"),
            allow_untested=flag(environ, "HONES_ALLOW_UNTESTED"),
            playground=flag(environ, "HONES_PLAYGROUND"),
            max_body_mb=_count(environ, "HONES_MAX_BODY_MB") or MAX_BODY_MB,
            max_expert_tables=_count(environ, "HONES_MAX_EXPERT_TABLES"),
            state=Path(state) if state else None,
        )

    def to_env(self) -> dict[str, str]:
        """All nine variables; those at their default are empty, so that they replace a value set before."""
        return {
            "HONES_PROFILES": str(self.profiles),
            "HONES_MAX_PROFILES": "" if self.max_profiles is None else str(self.max_profiles),
            "HONES_MAX_EXPERT_TABLES": "" if self.max_expert_tables is None else str(self.max_expert_tables),
            "HONES_ROUTING": "" if self.routing is None else str(self.routing),
            "HONES_ALLOW_PROFILE_UPDATES": "1" if self.allow_updates else "",
            "HONES_ALLOW_UNTESTED": "1" if self.allow_untested else "",
            "HONES_PLAYGROUND": "1" if self.playground else "",
            "HONES_MAX_BODY_MB": "" if self.max_body_mb == MAX_BODY_MB else str(self.max_body_mb),
            STATE_DIR: "" if self.state is None else str(self.state),
        }


def flag(environ: Mapping[str, str], name: str) -> bool:
    """Read a variable that switches something on; true if it is 1. Raises DataError unless it is 0, 1 or unset."""
    value = environ.get(name, "")
    if value not in ("", "0", "1"):
        raise DataError(f"{name} is {value!r}; set it to 1, or to 0 or nothing")
    return value == "1"


def _count(environ: Mapping[str, str], name: str) -> int | None:
    value = environ.get(name)
    if not value:
        return None
    if not COUNT.fullmatch(value):
        raise DataError(f"{name} is {value!r}; set it to a whole number from 1 to 999999")
    return int(value)
