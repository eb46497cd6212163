"""One style of progress bars: on a terminal, for what takes more than two seconds, gone when it is done."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Never, TypeVar

T = TypeVar("T")

if TYPE_CHECKING:
    from tqdm import tqdm

_DELAY = 2  # seconds


def progress_bar(description: str, total: int, *, show: bool) -> "tqdm[Never]":
    """A bar over `total` units, a context manager with `update(units)`; invisible unless `show` and on a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, desc=description, delay=_DELAY, leave=False, disable=None if show else True)


def with_progress(items: Iterable[T], description: str, *, show: bool) -> Iterable[T]:
    """The items, with a bar that counts them as they are taken."""
    from tqdm import tqdm

    return tqdm(items, description, delay=_DELAY, leave=False, disable=None if show else True)
