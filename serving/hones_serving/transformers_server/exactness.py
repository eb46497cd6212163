"""Whether a model answers prompts together as it answers each alone: tried on the loaded model, not taken from a list.

Some models do not mask padding, or attend across rows that are packed into one. What they would answer in a batch
depends on who else is in it; they are not given such batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from hones_serving.transformers_server.batching import generate_together
from hones_serving.transformers_server.continuous import Pages
from hones_serving.transformers_server.rows import Choosing, Row
from hones_serving.transformers_server.turns import LOGGER
from hones_steer.errors import StateError

_TEXT = "The quick brown fox jumps over the lazy dog and runs away from it."
_STEPS = 3

# What models, and transformers' caches, raise at what they do not take: other lengths, a mask, a size, a kind of layer.
_NOT_TAKEN = (AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


class Trial(Row):
    """A row of given tokens, which keeps the logits that it was to choose them from."""

    def __init__(self, ids: Sequence[int], device: torch.device) -> None:
        self.ids = torch.tensor([ids], device=device)
        self.inputs = {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids)}
        self.prompt_length = len(ids)
        self.profile = None
        self.choosing = Choosing(None, None, None, limit=len(ids) + _STEPS)
        self.over = False
        self.logits: list[Tensor] = []

    def choose(self, logits: Tensor) -> int:
        """Keep the logits, and take the prompt's next token once more."""
        self.logits.append(logits.float().cpu())
        token = int(self.ids[0, len(self.logits) - 1])
        self.ids = torch.cat([self.ids, self.ids.new_tensor([[token]])], dim=1)
        self.over = len(self.logits) == _STEPS
        return token

    def leave_if_abandoned(self) -> None:
        """Do nothing: nobody waits."""


def is_exact(model: Any, processor: Any, together: Callable[[Sequence[Row]], None], what: str) -> bool:
    """Whether `together` gives prompts of different lengths the logits that each gets alone, within rounding.

    If it does not, or fails, the log says so; `what` is what it calls it.
    """
    tokens = getattr(processor, "tokenizer", processor)(_TEXT, add_special_tokens=False)["input_ids"]
    prompts = [tokens, tokens[: max(1, len(tokens) // 3)], tokens[: len(tokens) // 2 + 1]]

    def trials() -> list[Trial]:
        return [Trial(prompt, model.device) for prompt in prompts]

    alone, batch = trials(), trials()
    try:
        for trial in alone:
            generate_together(model, [trial])
        together(batch)
    except _NOT_TAKEN as error:
        LOGGER.warning("This model is not run with %s, which it does not take: %s", what, error)
        return False
    tolerance = torch.finfo(model.dtype).eps ** 0.5
    for one, row in zip(alone, batch, strict=True):
        expected, found = torch.stack(one.logits), torch.stack(row.logits)
        if not (found - expected).norm() <= tolerance * expected.norm():  # nor NaN
            LOGGER.info("This model is not run with %s, which changes what it says", what)
            return False
    return True


def exact_pages(model: Any, processor: Any, most: int, size: int) -> Pages | None:
    """A paged cache of `size` tokens for at most `most` rows; None, which the log explains, if it is not exact."""
    try:
        pages = Pages(model, most, size)
    except (*_NOT_TAKEN, StateError) as error:  # or has changed since it was tested
        LOGGER.warning("This model is not run with continuous batching: %s", error)
        return None

    def together(rows: Sequence[Row]) -> None:
        waiting = iter(rows)
        for first in waiting:
            pages.answer(first, lambda: next(waiting, None), lambda *_: nullcontext(), lambda _row: None)

    return pages if is_exact(model, processor, together, "continuous batching") else None
