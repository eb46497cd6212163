"""One `generate` for several rows: prompts padded to one length, images one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from hones_serving.transformers_server.rows import Row, Streamed

# Inputs with one value per token of the prompt, beside `input_ids`; where a row is padded stands 0.
_PER_TOKEN = {"attention_mask", "token_type_ids", "mm_token_type_ids"}
# Inputs of which a processor puts those of several prompts one after the other.
_CONCATENATED = {"pixel_values", "image_grid_thw", "image_sizes"}


def can_join(row: Row, others: Sequence[Row], *, padded: bool) -> bool:
    """Whether one `generate` can answer `row` with `others`; `padded`: prompts may differ in length.

    A row that needs `generate` for itself joins none, and none joins it.
    """
    first = others[0]
    if row.choosing is None or first.choosing is None or row.inputs.keys() != first.inputs.keys():
        return False
    if 0 in (row.prompt_length, first.prompt_length):  # whatever `generate` does then
        return False
    if row.ids.shape != first.ids.shape and not (padded and "attention_mask" in row.inputs):
        return False
    further = row.inputs.keys() - _PER_TOKEN - {"input_ids"}
    return further <= _CONCATENATED and all(_alike(row.inputs[name], first.inputs[name]) for name in further)


def _alike(a: Any, b: Any) -> bool:
    both = isinstance(a, Tensor) and isinstance(b, Tensor)
    return both and a.dtype == b.dtype and a.shape[1:] == b.shape[1:]


def generate_together(model: Any, rows: Sequence[Row]) -> None:
    """Answer rows that can join each other with one `generate`, from where they are to where each is over.

    Call it inside the block that steers them. It returns early, with some rows not over, only by an exception.
    """
    padding = _padding(model)

    def choose(_ids: Tensor, logits: Tensor) -> Tensor:
        tokens = [padding if row.over else row.choose(logits[i]) for i, row in enumerate(rows)]
        chosen = torch.full_like(logits, -torch.inf)
        chosen[torch.arange(len(rows)), torch.tensor(tokens)] = 0
        return chosen

    def are_over(ids: Tensor, _scores: object, **_: Any) -> Tensor:
        for row in rows:
            row.leave_if_abandoned()
        return torch.tensor([row.over for row in rows], device=ids.device)

    def decode(_model: Any, ids: Tensor, generation_config: GenerationConfig, **options: Any) -> Tensor:
        options["logits_processor"] = LogitsProcessorList([choose])  # instead of those of `generate`, which are for all
        options["stopping_criteria"] = StoppingCriteriaList([are_over])
        generation_config.do_sample = False  # of what `choose` returns, the likeliest is the row's choice
        sequences: Tensor = type(model)._sample(model, ids, generation_config=generation_config, **options)
        return sequences

    limit = max(row.choosing.limit - row.ids.shape[1] for row in rows if row.choosing)
    config = GenerationConfig(max_new_tokens=max(1, limit), pad_token_id=padding)
    model.generate(**joined(rows, padding), generation_config=config, custom_generate=decode)


def generate_alone(model: Any, row: Row) -> None:
    """Answer a row with a `generate` of its own, which does all that its settings ask for."""

    class Adding:
        """A streamer that adds to the row what `generate` puts, but for the prompt, which comes first."""

        def __init__(self) -> None:
            self._prompt_has_come = False

        def put(self, tokens: Tensor) -> None:
            if self._prompt_has_come:
                for token in tokens.tolist():
                    row.add(token)
            self._prompt_has_come = True

        def end(self) -> None:
            row.over = True

    def is_over(ids: Tensor, _scores: object, **_: Any) -> Tensor:
        row.leave_if_abandoned()
        return torch.full(ids.shape[:1], row.over, device=ids.device)

    if row.seed is not None:
        torch.manual_seed(row.seed)
    sequences: Tensor = model.generate(
        **row.inputs,
        generation_config=row.config,
        tokenizer=row.processor,
        streamer=Adding() if isinstance(row.listener, Streamed) else None,
        stopping_criteria=StoppingCriteriaList([is_over]),
        **({"generation_mode": "text"} if hasattr(model, "has_talker") else {}),
    )
    if not isinstance(row.listener, Streamed):
        row.ids, row.over = sequences[:1], True


def joined(rows: Sequence[Row], padding: int) -> dict[str, Any]:
    """Inputs of one `generate` for rows that can join each other: shorter ones padded on the left with `padding`."""
    length = max(row.ids.shape[1] for row in rows)
    inputs = {"input_ids": torch.cat([_padded(row.ids, length, padding) for row in rows])}
    for name, value in rows[0].inputs.items():
        if name in _PER_TOKEN:
            inputs[name] = torch.cat([_padded(_per_token(row, name), length, 0) for row in rows])
        elif name != "input_ids":
            inputs[name] = value if len(rows) == 1 else torch.cat([row.inputs[name] for row in rows])
    return inputs


def _per_token(row: Row, name: str) -> Tensor:
    """An input with one value per token, for the tokens so far: one that was generated counts, and is text."""
    values: Tensor = row.inputs[name]
    return torch.nn.functional.pad(values, (0, row.ids.shape[1] - values.shape[1]), value=name == "attention_mask")


def _padded(values: Tensor, length: int, padding: int) -> Tensor:
    return torch.nn.functional.pad(values, (length - values.shape[1], 0), value=padding)


def _padding(model: Any) -> int:
    """The token that pads: any will do, as it is masked."""
    config = model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return next((token for token in (config.pad_token_id, *ends) if token is not None), 0)
