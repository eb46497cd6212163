"""Continuous batching: rows join and leave a batch between two steps, and share a paged cache.

Transformers' continuous batching does the scheduling, the cache and the attention; its own manager is not used, because
it samples all requests alike, from one stream of random numbers. Here the generation thread runs the steps, and each
row chooses its own token (`Row.choose`). A step's forward has one row, with some tokens of each request that it has
scheduled, and each of them is steered as its request.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
)
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.continuous_batching.scheduler import Scheduler

from hones_serving import signatures
from hones_serving.transformers_server.rows import Row

TESTED = "5.19"
PAGE = 32  # tokens
_STEP = 256  # tokens of a step, at most: of a longer prompt, some in each of several steps
_MOST_TOKENS = 2**16  # in the cache, so that the mask of a step is small

# Steers, within the block, `counts[i]` tokens of a packed row as row i, whose tokens from `starts[i]` on they are.
Steer = Callable[[Sequence[Row], Sequence[int], Sequence[int]], AbstractContextManager[None]]


class Pages:
    """A paged cache for at most `most` rows of a model, and the steps that answer them."""

    def __init__(self, model: Any, most: int, size: int) -> None:
        """Allocate a cache of `size` tokens (see `cache_tokens`).

        Raises:
            ValueError, MemoryError: transformers cannot have a paged cache for this model, or not of this size.
            StateError: this transformers version is not supported.
        """
        signatures.check(_used(), f"transformers {transformers.__version__}", TESTED)
        manager = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE,
                num_blocks=max(1, size // PAGE),
                max_batch_tokens=max(_STEP, most),
                max_requests_per_batch=most,
                allow_block_sharing=False,  # what one profile has computed is wrong for another
                use_async_batching=False,
                use_cuda_graph=False,  # which would not be steered
                auto_switch_to_flash=False,
            ),
        )
        self._model = model
        self._most = most
        self._manager = manager
        self._processor = manager._create_batch_processor()
        self._processor.model_runner._sample = self._choose
        self._names = map(str, itertools.count())
        self._rows: dict[str, Row] = {}  # by the name of their request

    def can_hold(self, row: Row) -> bool:
        """Whether a prepared row can be answered from this cache: text whose tokens all fit."""
        pages = self._processor.cache.num_blocks - 1
        text = row.inputs.keys() <= {"input_ids", "attention_mask"}
        return row.choosing is not None and text and row.prompt_length > 0 and row.choosing.limit <= pages * PAGE

    def answer(self, first: Row, more: Callable[[], Row | None], steer: Steer, ended: Callable[[Row], None]) -> None:
        """Answer `first`, and the rows that `more` gives before each step, until none is left.

        `ended` is called with each row that is over. If a step fails, the rows that are not over are left as they are.
        """
        self._add(first)
        try:
            while self._rows:
                while len(self._rows) < self._most and (row := more()) is not None:
                    self._add(row)
                self._step(steer)
                for name, row in list(self._rows.items()):
                    row.leave_if_abandoned()
                    if row.over:
                        self._remove(name)
                        ended(row)
        finally:
            for name in list(self._rows):
                self._remove(name)

    def _add(self, row: Row) -> None:
        name = next(self._names)
        self._rows[name] = row
        # Neither length nor end tokens end it here: the row says when it is over.
        state = RequestState(name, row.ids[0].tolist(), max_new_tokens=None, eos_token_id=None)
        self._processor.scheduler.add_waiting_request(state)

    def _remove(self, name: str) -> None:
        del self._rows[name]
        scheduler = self._processor.scheduler
        scheduler.set_request_cancellation(name)
        scheduler.clear_cancelled_requests()
        scheduler.block_new_requests = False  # as when a request has finished: there is room for one that was put back

    def _step(self, steer: Steer) -> None:
        processor = self._processor
        if not processor.prepare_next_batch():
            raise RuntimeError("transformers' scheduler has stopped at requests that are not over")
        batch = processor.inputs_and_outputs.requests_in_batch
        rows = [self._rows[request.state.request_id] for request in batch]
        counts = [request.query_length for request in batch]
        starts = [request.state.position_offset - count for request, count in zip(batch, counts, strict=True)]
        with steer(rows, starts, counts):
            processor._generation_step(self._model)
        processor.update_batch()

    def _choose(self, logits: Tensor, output: Tensor) -> None:
        """Have each row choose its token, in the place of `ModelRunner._sample`.

        `logits` `[1, requests, vocabulary]` are first those of the requests that get a token in this step; into
        `output` int32 `[1, tokens]` go their tokens.
        """
        batch = self._processor.inputs_and_outputs.requests_in_batch
        rows = [self._rows[request.state.request_id] for request in batch if request.has_new_token]
        tokens = [row.choose(logits[0, i]) for i, row in enumerate(rows)]
        output[0, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)


def cache_tokens(model: Any, most: int, gib: float) -> int:
    """The number of tokens whose keys and values take `gib` GiB, or fewer if `most` rows cannot have so many."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    longest = getattr(config, "max_position_embeddings", None) or _MOST_TOKENS
    return min(int(gib * 2**30 / size), most * (longest + PAGE), _MOST_TOKENS)


def has_pages(model: Any) -> bool:
    """Whether transformers' continuous batching takes this model as it is, with the attention that it has."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) if not kinds else None
    attention = config._attn_implementation
    return (
        hasattr(model, "init_continuous_batching")
        and not model.config.is_encoder_decoder
        and window is None
        and kinds <= {"full_attention"}
        and attention == "sdpa"
    )


def _used() -> Iterator[tuple[Callable[..., Any], tuple[str, ...]]]:
    """Yield (function of transformers' continuous batching that is called or replaced, names of its parameters)."""
    yield ContinuousBatchingManager._create_batch_processor, ("self",)
    yield ContinuousBatchProcessor.prepare_next_batch, ("self",)
    yield ContinuousBatchProcessor._generation_step, ("self", "model")
    yield ContinuousBatchProcessor.update_batch, ("self",)
    yield ModelRunner._sample, ("self", "scores", "output_ids")
    yield Scheduler.add_waiting_request, ("self", "state")
    yield Scheduler.set_request_cancellation, ("self", "request_id")
    yield Scheduler.clear_cancelled_requests, ("self",)
