"""Arguments of a text decoder besides embeddings and positions, carried from the whole model's own call.

Some vision-language models hand their text decoder more than embeddings: features for its lower layers, a second
embedding of each token for every layer, masks by which an image's tokens see one another. The whole model's call is
captured for each prompt (`prompts.py`), and each argument is told by its shape:

- [1, tokens, ...] belongs to the tokens;
- [n, ...], where an argument marks n tokens, belongs to these tokens;
- an attention mask [1, 1, tokens, tokens] says how far ahead each token sees, beyond what the decoder lets it see;
- whatever has the same value for two rows as for one belongs to none of them, and is handed through.

A call of the same prompt in two rows checks that. What belongs to tokens is cut, repeated and padded with their
embeddings; all else is refused by name.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask, create_masks_for_generate

from hones_offline.running.batching import AHEAD, Batch
from hones_offline.running.cache import KVCache
from hones_steer._transformers import CACHE_NAMES
from hones_steer.errors import LayoutError

# Arguments that are handled by themselves, or are no part of the prompt.
_IGNORED = {
    *("input_ids", "inputs_embeds", "position_ids", "attention_mask", "use_cache", "cache_position", "return_dict"),
    *("output_attentions", "output_hidden_states", "labels", "logits_to_keep", *CACHE_NAMES),
}
_MASK = "attention_mask"

Call = Mapping[str, Any]
"""Keyword arguments of a call of the decoder."""


class DecoderInputs:
    """How one model's text decoder takes what belongs to tokens; learned from the calls that it is shown.

    Names are those of arguments; a part of a list or dictionary has its index or key after a slash.
    """

    def __init__(self, model_type: str, config: Any) -> None:
        """Begin with nothing that the decoder takes besides embeddings; `config` is its own configuration."""
        self._model_type, self._config = model_type, config
        self._marked_by: dict[str, str] = {}  # what belongs to some tokens only: the name of what marks these tokens
        self._containers: dict[str, type] = {}  # arguments that are lists, tuples or dictionaries
        self._handed_through: dict[str, Any] = {}
        self._checked: set[frozenset[str]] = set()

    def of_tokens(self, call: Call, in_two_rows: Callable[[], Call]) -> dict[str, Tensor]:
        """Find what belongs to the tokens of a call with one row, [tokens, ...] by name.

        `in_two_rows` gives the call for two rows of the same prompt; it is used once for each set of names.

        Raises:
            LayoutError: an argument has neither a value for each token nor the same one for all rows, or a token sees
                others in a way that cannot be carried.
        """
        length = call["inputs_embeds"].shape[1]
        parts = dict(self._parts(call))
        found = {name: part[0].cpu() for name, part in parts.items() if part.shape[:2] == (1, length)}
        rest = {name: part for name, part in parts.items() if name not in found}
        for name, part in rest.items():
            marks = [key for key, x in found.items() if x.dtype == torch.bool and x.sum() == len(part)]
            if marks and part.dim() > 1:
                self._marked_by[name] = marks[0]
                whole = part.new_zeros(length, *part.shape[1:], device="cpu")
                whole[found[marks[0]].reshape(length)] = part.cpu()
                found[name] = whole
        if parts and (names := frozenset(parts)) not in self._checked:
            self._check(parts, found, dict(self._parts(in_two_rows())))
            self._checked.add(names)
        return found | self._looks_ahead(call)

    def require_none(self, call: Call) -> None:
        """Raise LayoutError, naming it, if a call with token ids has more tensors, which the decoder embeds itself."""
        for name, _ in self._parts(call):
            raise self._refused(name)

    def _parts(self, call: Call) -> Iterator[tuple[str, Tensor]]:
        """Tensors among the arguments, by name; other values are noted as handed through."""
        for name, value in call.items():
            if name in _IGNORED or value is None:
                continue
            if isinstance(value, list | tuple | dict):
                self._containers[name] = type(value)
                items = value.items() if isinstance(value, dict) else enumerate(value)
                inner = {f"{name}/{key}": part for key, part in items}
            else:
                inner = {name: value}
            tensors = {key: part for key, part in inner.items() if isinstance(part, Tensor)}
            if tensors and len(tensors) < len(inner):
                raise self._refused(name)
            if inner and not tensors:
                if not isinstance(value, bool | int | float | str):
                    raise self._refused(name)
                self._handed_through[name] = value
            yield from tensors.items()

    def _check(self, parts: Mapping[str, Tensor], found: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> None:
        """Check against a call with two equal rows what belongs to tokens, and note what is handed through."""
        for name, part in parts.items():
            if name not in two:
                raise self._refused(name)
            if name in found:
                expected = torch.cat([part, part])
                alike = two[name].shape == expected.shape and torch.allclose(
                    two[name].float(), expected.float(), rtol=1e-2, atol=1e-2 * float(expected.float().abs().max())
                )
            else:
                alike = torch.equal(two[name], part) and "/" not in name
                self._handed_through[name] = part
            if not alike:
                raise self._refused(name)

    def _refused(self, name: str) -> LayoutError:
        return LayoutError(
            f"{self._model_type}: its text decoder also takes {name.partition('/')[0]}, which has neither a value for "
            "each token nor the same one for all rows, so that attribution cannot carry it; steering this model works, "
            "attributing on it does not"
        )

    def _looks_ahead(self, call: Call) -> dict[str, Tensor]:
        """How far ahead each token sees under the attention masks of a call with one row, [tokens] by name.

        The name is `AHEAD` with the argument's, for a dictionary of masks with the key after a slash. Masks that let no
        token see a later one are left out: the decoder makes them by itself.
        """
        given = call.get(_MASK)
        masks = {f"{_MASK}/{key}": mask for key, mask in given.items()} if isinstance(given, dict) else {_MASK: given}
        masks = {name: mask for name, mask in masks.items() if mask is not None}
        if any(not isinstance(mask, Tensor) for mask in masks.values()):
            raise LayoutError(
                f"{self._model_type}: its text decoder gets an attention mask that is no tensor, which attribution "
                'cannot carry; load the model with attn_implementation="sdpa"'
            )
        seen = {name: _visible(mask) for name, mask in masks.items() if mask.dim() == 4}
        if not seen:
            return {}
        embeds = call["inputs_embeds"]
        columns = torch.arange(embeds.shape[1], device=embeds.device)
        ahead = {AHEAD + name: (x * columns).amax(-1) - columns for name, x in seen.items()}
        ahead = {name: values.clamp(min=0) for name, values in ahead.items()}
        mask = torch.ones_like(columns)[None]
        batch = Batch(embeds, mask, columns[None, None], more={name: x[None] for name, x in ahead.items()})
        causal = torch.ones_like(columns[:, None] * columns, dtype=torch.bool).tril()
        for name, rebuilt in self._masks(batch, mask, None).items():
            if name in seen and not torch.equal(causal if rebuilt is None else _visible(rebuilt), seen[name]):
                raise LayoutError(
                    f"{self._model_type}: its text decoder gets an attention mask of its own, by which tokens see "
                    "others than those before them and those of one block around them, which attribution cannot carry; "
                    "steering this model works, attributing on it does not"
                )
        return {name: values.cpu() for name, values in ahead.items() if values.any()}

    def arguments(self, batch: Batch, mask: Tensor, cache: KVCache | None) -> dict[str, Any]:
        """Arguments of a call of the decoder for a batch, but for embeddings, positions and the cache.

        `mask` [rows, cached + T] has 1 for tokens.
        """
        given: dict[str, Any] = dict(self._handed_through)
        for name, values in batch.more.items():
            if name.startswith(AHEAD):
                continue
            if mark := self._marked_by.get(name):
                values = values[batch.more[mark].reshape(batch.mask.shape[0], -1).bool()]
            argument, slash, key = name.partition("/")
            if slash:
                given.setdefault(argument, {})[key] = values
            else:
                given[argument] = values
        for argument, kind in self._containers.items():
            if argument in given and isinstance(given[argument], dict):
                items = given[argument]
                given[argument] = (
                    {int(key) if key.isdigit() else key: x for key, x in items.items()}
                    if kind is dict
                    else kind(items[str(i)] for i in range(len(items)))
                )
        if any(bool(x.any()) for name, x in batch.more.items() if name.startswith(AHEAD)):
            masks = self._masks(batch, mask, cache)
            given[_MASK] = masks.get(_MASK, {name.partition("/")[2]: value for name, value in masks.items()})
        else:
            given[_MASK] = mask
        return given

    def _masks(self, batch: Batch, mask: Tensor, cache: KVCache | None) -> dict[str, Any]:
        """The decoder's own attention masks, with what tokens see ahead added, by name as in `_looks_ahead`."""
        settings = {
            "config": self._config,
            "inputs_embeds": batch.embeds,
            "attention_mask": mask,
            "past_key_values": cache,
            "position_ids": None,
        }
        ahead = {name.removeprefix(AHEAD): x for name, x in batch.more.items() if name.startswith(AHEAD)}
        if _MASK in ahead:
            return {_MASK: create_causal_mask(**settings, or_mask_function=_block(ahead[_MASK], mask))}
        own = create_masks_for_generate(**settings)
        if not isinstance(own, dict):
            return {_MASK: own}
        masks = {f"{_MASK}/{kind}": value for kind, value in own.items()}
        for name, values in ahead.items():
            if name not in masks:
                continue  # no layer uses it
            of_kinds = create_masks_for_generate(**settings, or_mask_function=_block(values, mask))
            masks[name] = of_kinds[name.partition("/")[2]]
        return masks


def _block(ahead: Tensor, mask: Tensor) -> Callable[..., Tensor]:
    """Mask function of transformers that lets tokens see those ahead, for `ahead` [rows, T] of the last T columns.

    Tokens of a block see up to its last one; no token sees part of another block that comes later.
    """
    rows, length = mask.shape
    own = torch.arange(length - ahead.shape[1], length, device=mask.device)
    last = torch.cat([torch.full((rows, length - len(own)), -1, device=mask.device), own + ahead], dim=1)
    return lambda row, _head, query, key: (key > query) & (last[row, query] == last[row, key])


def _visible(mask: Tensor) -> Tensor:
    """Which tokens see which, bool [T, T], under the mask of one row, [1, heads, T, T]."""
    of_row = mask[0, 0]
    return of_row if of_row.dtype == torch.bool else of_row == 0
