"""Errors that this project raises on purpose.

HonesError
├── ProfileError    a profile (file or value) is malformed
├── MismatchError   a sound profile that belongs to another model
├── LayoutError     a model whose FFN, heads or norms are not recognized
├── RoutingError    a request names steering that cannot be given: unknown task, bad expression, wrong row count
├── StateError      a call in a state that does not allow it: attached twice, fold while a task is active
└── DataError       examples, images, a model's files or a run folder that cannot be used

A message is one sentence that names the culprit (file, task, layer) and the remedy: "X is …; do Y". The command line
prints it as one line and exits with code 2.
"""


class HonesError(Exception):
    """Base of all errors raised on purpose by hones-steer."""


class ProfileError(HonesError):
    """A profile file or value breaks the format (docs/profile-format.md)."""


class MismatchError(HonesError):
    """A sound profile does not belong to this model."""


class LayoutError(HonesError):
    """The model's structure is not recognized or not supported."""


class RoutingError(HonesError):
    """A request names steering that cannot be given."""


class StateError(HonesError):
    """The call is not allowed in the present state."""


class DataError(HonesError):
    """Examples, images, a model's files or a run folder cannot be used."""
