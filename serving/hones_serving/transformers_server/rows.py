"""One request that is being answered: its tokens so far, how the next one is chosen, and who hears of it.

The rows of a batch have their own prompts, sampling, seeds and stop strings. So a batch's next tokens are not chosen
for all at once: each row chooses its own from its own logits, by the processors and stopping criteria that
transformers' `generate` would have for it alone, and with its own random numbers. What is drawn does not depend on the
other rows, and is what `generate` draws after `torch.manual_seed(seed)`.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Mapping
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, StopStringCriteria
from transformers.cli.serving.utils import DirectStreamer, _GenerationCancelled, _StreamError
from transformers.generation.configuration_utils import GenerationMode

from hones_serving.registry import Admission
from hones_serving.transformers_server.turns import Turn, unless_closed
from hones_steer.profile import Profile
from hones_steer.scopes import ALL

# The seed of the request that is being handled. Transformers' server seeds the whole process when a request arrives.
SEED: ContextVar[int | None] = ContextVar("hones_seed", default=None)

_ONE_AT_A_TIME = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def checked_seed(value: object) -> int:
    """Return a request's seed; raises ValueError if it is none."""
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise ValueError(f"seed is {value!r}; give an integer of 64 bits")
    return value


class Listener(Protocol):
    """Whoever waits for a row's answer; called in the generation thread."""

    def put(self, token: int) -> bool:
        """Hear of a new token. False: nobody listens any more."""

    def end(self, tokens: Tensor) -> None:
        """Hear that the answer, tokens `[n]`, is complete."""

    def fail(self, error: Exception) -> None:
        """Hear that there will be no answer, or no more of it."""


class Whole:
    """A listener that is told of the whole answer: `answer` gets the tokens or the error."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.answer: asyncio.Future[Tensor] = loop.create_future()
        self._loop = loop

    def put(self, _token: int) -> bool:
        """Hear of a new token; false if the event loop has ended."""
        return not self._loop.is_closed()

    def end(self, tokens: Tensor) -> None:
        """Hand over the answer."""
        with unless_closed(self._loop):
            self._loop.call_soon_threadsafe(self._settle, tokens, None)

    def fail(self, error: Exception) -> None:
        """Hand over the error."""
        with unless_closed(self._loop):
            self._loop.call_soon_threadsafe(self._settle, None, error)

    def _settle(self, tokens: Tensor | None, error: Exception | None) -> None:
        if self.answer.done():  # whoever waited has given up
            return
        if error is not None:
            self.answer.set_exception(error)
        else:
            assert tokens is not None
            self.answer.set_result(tokens)


class Streamed:
    """A listener that streams: transformers' streamer decodes the tokens and queues their text in the event loop."""

    def __init__(self, streamer: DirectStreamer, queue: asyncio.Queue[Any], loop: asyncio.AbstractEventLoop) -> None:
        self.streamer = streamer
        self._queue = queue
        self._loop = loop
        streamer.put(torch.empty(0))  # what comes first is taken for the prompt, and not streamed

    def put(self, token: int) -> bool:
        """Stream a token; false if the client has left."""
        with unless_closed(self._loop), suppress(_GenerationCancelled):
            self.streamer.put(torch.tensor([token]))
            return True
        return False

    def end(self, _tokens: Tensor) -> None:
        """End the stream."""
        with unless_closed(self._loop):
            self.streamer.end()

    def fail(self, error: Exception) -> None:
        """End the stream with an error."""
        with unless_closed(self._loop):
            self._loop.call_soon_threadsafe(self._queue.put_nowait, _StreamError(str(error)))


@dataclass
class Choosing:
    """How a row's tokens are chosen: what `generate` prepares for it. `limit`: the length at which it ends."""

    processors: Any
    criteria: Any
    generator: torch.Generator | None  # None: the likeliest token is chosen
    limit: int


class Row:
    """A request to be answered, and its answer so far; made in the event loop, used by the generation thread.

    `inputs` are the processor's, for one prompt. `ids` int64 `[1, tokens]` are the prompt and what was generated;
    `over` says that nothing will be added.
    """

    def __init__(
        self,
        inputs: Mapping[str, Any],
        config: GenerationConfig,
        processor: Any,
        admission: Admission | None,
        turn: Turn,
        listener: Listener,
    ) -> None:
        self.inputs = dict(inputs)
        self.config = config
        self.processor = processor
        self.profile: Profile | None = admission.profile if admission else None
        self.label = admission.label if admission else "none"
        self.scope = admission.scope if admission else ALL
        self.turn = turn
        self.listener = listener
        self.seed = SEED.get()
        self.ids: Tensor = inputs["input_ids"]
        self.prompt_length = self.ids.shape[1]
        self.prepared = False
        self.error: Exception | None = None  # why it cannot be answered
        self.choosing: Choosing | None = None  # None: only a `generate` of its own can answer this request
        self.over = False

    @property
    def tokens(self) -> Tensor:
        """The tokens `[n]` generated so far."""
        return self.ids[0, self.prompt_length :]

    def choose(self, logits: Tensor) -> int:
        """Choose the next token from the model's logits `[vocabulary]`, add it, and return it."""
        assert self.choosing is not None
        scores = self.choosing.processors(self.ids, logits[None].to(torch.float32, copy=True))
        if self.choosing.generator is None:
            token = int(scores.argmax(dim=-1))
        else:
            probabilities = torch.nn.functional.softmax(scores, dim=-1)
            token = int(torch.multinomial(probabilities, 1, generator=self.choosing.generator))
        self.add(token)
        if not self.over:
            self.over = bool(self.choosing.criteria(self.ids, None))
        return token

    def add(self, token: int) -> None:
        """Add a token to the answer; if nobody listens any more, the answer is over."""
        self.ids = torch.cat([self.ids, self.ids.new_tensor([[token]])], dim=1)
        if not self.listener.put(token):
            self.over = True

    def leave_if_abandoned(self) -> None:
        """Be over if nobody waits for the answer any more."""
        if self.turn.abandoned.is_set():
            self.over = True


def prepare(model: Any, row: Row) -> None:
    """Set how `row` chooses its tokens: have `generate` prepare that for it alone, without running the model.

    `row.choosing` stays None where tokens are not chosen one at a time from the logits of one forward each (beams,
    assisted decoding, guidance, ...), or the model's kind of cache is not the usual one.

    Raises:
        TypeError, ValueError: a setting of the request means nothing to `generate`.
    """
    row.prepared = True
    if model.config.is_encoder_decoder or hasattr(model, "has_talker") or model.generation_config.stop_strings:
        return
    if row.config.cache_implementation or model.generation_config.cache_implementation:
        return
    config = copy.deepcopy(row.config)
    stop, config.stop_strings = config.stop_strings, None
    prepared: list[Choosing] = []

    def keep(
        _model: Any,
        ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **_: Any,
    ) -> Tensor:
        if _is_plain(generation_config):
            if stop:  # transformers loses the tokenizer on the way to a decoding loop of one's own
                tokenizer = getattr(row.processor, "tokenizer", row.processor)
                stopping_criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=stop))
            generator = _generator(row.seed, ids.device) if generation_config.do_sample else None
            limit = generation_config.max_length
            prepared.append(Choosing(logits_processor, stopping_criteria, generator, limit))
        return ids

    model.generate(
        input_ids=row.ids,
        attention_mask=torch.ones_like(row.ids),
        generation_config=config,
        custom_generate=keep,
    )
    row.choosing = prepared[0] if prepared else None


def _is_plain(config: GenerationConfig) -> bool:
    """Whether tokens are chosen one at a time, each from the logits of one forward."""
    return (
        config.get_generation_mode() in _ONE_AT_A_TIME
        and config.num_return_sequences in (None, 1)
        and config.guidance_scale in (None, 1)
        and config.use_cache is not False
        and not (config.token_healing or config.return_dict_in_generate or config.prefill_chunk_size)
    )


def _generator(seed: int | None, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
