"""Room for the scales of routed experts: of how many of them profiles may list neurons.

A mixture has thousands of experts, so an engine does not keep a table of scales for each of them. Its workers
make tables for some when they start; which expert has one changes with the profiles that are loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

from hones_steer.errors import StateError
from hones_steer.ffns import Ffn
from hones_steer.profile import Profile


class RoomError(StateError):
    """Profiles list neurons of more experts than a worker has tables for: HTTP 409."""


class ExpertRoom(NamedTuple):
    """One worker's room: it has `tables` of them, and runs the experts with the numbers in `experts` of `layers`."""

    tables: int
    experts: frozenset[int]
    layers: frozenset[int]

    def listed(self, profiles: Iterable[Profile]) -> set[Ffn]:
        """The experts of this worker that profiles list neurons of."""
        return {
            ffn
            for profile in profiles
            for ffn in listed_experts(profile)
            if ffn.layer in self.layers and ffn.part in self.experts
        }

    def require(self, profiles: Iterable[Profile]) -> None:
        """Check that these profiles have room together. Raises RoomError, naming the remedy, if not."""
        needed = len(self.listed(profiles))
        if needed > self.tables:
            raise RoomError(
                f"the profiles list neurons of {needed} experts together, but a worker has tables for {self.tables}; "
                f"start the server with --max-expert-tables {needed} or more"
            )


@functools.lru_cache(maxsize=256)
def listed_experts(profile: Profile) -> frozenset[Ffn]:
    """The routed experts that a profile lists neurons of."""
    return frozenset(ffn for ffn in profile.ffns if not isinstance(ffn.part, str))
