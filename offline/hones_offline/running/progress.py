"""One style of progress bars: on a terminal, for what takes more than two seconds, gone when it is done."""

from collections.abc import Iterable
from typing import Any, TypeVar

T = TypeVar("T")

_STYLE = {"delay": 2, "leave": False}


def progress_bar(description: str, total: int, *, show: bool) -> Any:
    """A bar over `total` units, a context manager with `update(units)`; invisible unless `show` and on a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, desc=description, disable=None if show else True, **_STYLE)


def with_progress(items: Iterable[T], description: str, *, show: bool) -> Iterable[T]:
    """The items, with a bar that counts them as they are taken."""
    from tqdm import tqdm

    return tqdm(items, description, disable=None if show else True, **_STYLE)
