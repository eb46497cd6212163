"""The generation thread, which answers requests together, each steered as it was admitted.

Requests are answered in the order in which they came, but for those that join a batch. That thread does not have the
context of the request that submits to it, so each row is given its request's admission and keeps it.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from transformers.cli.serving.utils import BaseGenerateManager, DirectStreamer, GenerationState, _StreamError

from hones_serving.exchange import current_admission, generating
from hones_serving.metrics import Metrics
from hones_serving.transformers_server.batching import can_join, generate_alone, generate_together
from hones_serving.transformers_server.continuous import Pages
from hones_serving.transformers_server.rows import Listener, Row, Streamed, Whole, prepare
from hones_serving.transformers_server.turns import LOGGER, TURN, StoppingError
from hones_steer.errors import StateError
from hones_steer.huggingface import Steering
from hones_steer.profile import Profile
from hones_steer.scopes import split


class OneGeneration(GenerationState):
    """Transformers' table of generation threads, with the one thread there is, whatever the model is called."""

    def __init__(self, manager: SteeredGeneration) -> None:
        super().__init__()
        self._manager = manager

    def get_manager(self, model_id: str, use_cb: bool = False) -> BaseGenerateManager:  # noqa: ARG002
        """The one generation thread."""
        return self._manager


class SteeredGeneration(BaseGenerateManager):
    """Transformers' interface to the generation thread; a request runs as its context says that it was admitted."""

    def __init__(self, batches: Batches, steering: Steering) -> None:
        self._batches = batches
        self._steering = steering
        self._waiting = Waiting()
        self._thread = threading.Thread(target=self._run, name="hones-generation", daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # an interpreter that winds up while a thread is in a forward pass may crash

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,  # noqa: ARG002 - transformers passes it
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], DirectStreamer]:
        """Queue a request whose answer is streamed; returns the queue of its text, and what counts its tokens.

        The stream ends with an error if the server stops before it is complete.

        Raises:
            StateError: `model` is not the one that is steered.
            StoppingError: the server is stopping.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Any] = asyncio.Queue()
        tokenizer = getattr(processor, "tokenizer", processor)._tokenizer
        streamer = DirectStreamer(tokenizer, loop, queue, response_parser=response_parser)

        def cut(error: StoppingError) -> None:
            queue.put_nowait(_StreamError(str(error)))

        row = self._submit(model, processor, inputs, gen_config, Streamed(streamer, queue, loop))
        row.turn.when_refused(cut)
        return queue, streamer

    async def generate_non_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,  # noqa: ARG002 - transformers passes it
    ) -> tuple[str, int, list[int]]:
        """Queue a request; returns the answer's text, the prompt's length and the answer's tokens.

        If this is cancelled, generation goes on until the turn is given up.

        Raises:
            StateError: `model` is not the one that is steered.
            StoppingError: the server stops before the answer is complete.
        """
        whole = Whole(asyncio.get_running_loop())
        row = self._submit(model, processor, inputs, gen_config, whole)
        tokens = (await row.turn.or_refused(whole.answer)).tolist()
        return processor.decode(tokens, skip_special_tokens=True), row.prompt_length, tokens

    def stop(self) -> None:
        """End the thread, once it has answered whatever it is answering; rows that wait are not answered."""
        self._waiting.close()
        self._thread.join()

    def _submit(self, model: Any, processor: Any, inputs: Any, config: Any, listener: Listener) -> Row:
        if not self._steering.is_attached_to(model):
            raise StateError("the model was loaded anew, without its steering; restart the server")
        generating()
        turn = TURN.get()
        turn.ask()
        row = Row(inputs, config, processor, current_admission(), turn, listener)
        self._waiting.add(row)
        return row

    def _run(self) -> None:
        while (row := self._waiting.first()) is not None:
            self._batches.answer(row, self._waiting)


class Waiting:
    """The rows that wait, in the order in which they came; any thread may add, the generation thread takes."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._closed = False
        self._changed = threading.Condition()

    def add(self, row: Row) -> None:
        """Let a row wait."""
        with self._changed:
            self._rows.append(row)
            self._changed.notify()

    def close(self) -> None:
        """Have `first` wait for rows no more."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def first(self) -> Row | None:
        """Wait until there is a row, and take the first; None once it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._rows or self._closed)
            return None if self._closed else self._rows.pop(0)

    def take_first(self, accepts: Callable[[Row], bool]) -> Row | None:
        """Take the first row if there is one and `accepts` accepts it."""
        with self._changed:
            row = self._rows[0] if self._rows else None
        if row is None or not accepts(row):
            return None
        return self.first()

    def take(self, accepts: Callable[[Row], bool]) -> Iterator[Row]:
        """Take, one after the other and in order, the rows that `accepts` accepts when it is asked."""
        with self._changed:
            rows = list(self._rows)
        for row in rows:
            if accepts(row):
                with self._changed:
                    self._rows.remove(row)
                yield row


class Batches:
    """Answers rows in batches of at most `most`, each steered by its own profile; the generation thread does only this.

    Rows that `pages` can hold (None: there is no such cache) join and leave the batch that runs. Others share a
    `generate` with those that wait when it begins; `padded`: also with rows of other lengths.
    """

    def __init__(
        self, model: Any, steering: Steering, metrics: Metrics, *, most: int, padded: bool, pages: Pages | None
    ) -> None:
        self._model = model
        self._steering = steering
        self._metrics = metrics
        self._most = most
        self._padded = padded
        self._pages = pages
        self._uses: Counter[str] = Counter()  # digest of a profile -> rows that have begun

    def answer(self, first: Row, waiting: Waiting) -> None:
        """Answer a row, together with those that wait and can join it."""
        if not self._begun(first):
            return
        if self._pages is not None and self._pages.can_hold(first):
            self._answer_from_pages(self._pages, first, waiting)
            return
        rows = [first]
        others = waiting.take(lambda row: self._prepared(row) and can_join(row, rows, padded=self._padded))
        while len(rows) < self._most and (row := next(others, None)) is not None:
            if self._begun(row):
                rows.append(row)
        self._answer_together(rows)

    def _prepared(self, row: Row) -> bool:
        """Prepare a row, unless that was done; false if it cannot be answered."""
        if not row.prepared:
            row.error = _error_of(lambda: prepare(self._model, row))
        return row.error is None

    def _begun(self, row: Row) -> bool:
        """Begin a row's turn; false if nobody waits for it, or it cannot be answered, which whoever waits is told."""
        if not row.turn.begin():
            row.listener.fail(StateError("nobody waits for this answer any more; send the request again"))
            return False
        if self._prepared(row):
            row.error = _error_of(lambda: self._use(row.profile))
        if row.error is not None:
            row.listener.fail(row.error)
            row.turn.end()
            return False
        return True

    def _use(self, profile: Profile | None) -> None:
        """Count a row that begins with a profile, which is loaded if no other row has it."""
        if profile is not None:
            if profile.digest not in self._uses:
                self._steering.load(profile.digest, profile)  # which the registry has checked
            self._uses[profile.digest] += 1

    def _answer_from_pages(self, pages: Pages, first: Row, waiting: Waiting) -> None:
        """Answer a row and those that join it, in order: nobody joins once the first that waits cannot."""
        running = [first]

        def at_once(row: Row) -> bool:
            return row.turn.abandoned.is_set() or not self._prepared(row) or pages.can_hold(row)

        def more() -> Row | None:
            while (row := waiting.take_first(at_once)) is not None:
                if self._begun(row):
                    running.append(row)
                    return row
            return None

        def ended(row: Row) -> None:
            running.remove(row)
            self._end(row, None)

        if (error := _error_of(lambda: pages.answer(first, more, self._packed, ended))) is not None:
            said = "A step of continuous batching failed; its %d requests are answered singly"
            LOGGER.error(said, len(running), exc_info=error)
            for row in running:  # those that are not to blame are answered
                self._answer_together([row])

    def _answer_together(self, rows: Sequence[Row]) -> None:
        """Answer rows that have begun; if that fails, each by itself, so that only those fail that are to blame."""

        def generate() -> None:
            with self._steered(rows):
                if rows[0].choosing is not None:
                    generate_together(self._model, rows)
                else:
                    generate_alone(self._model, rows[0])

        error = _error_of(generate)
        for row in rows:
            if error is None or row.over:
                self._end(row, None)
            elif len(rows) == 1:
                self._end(row, error)
            else:
                self._answer_together([row])

    def _end(self, row: Row, error: Exception | None) -> None:
        self._metrics.tokens(row.label, row.ids.shape[1] - row.prompt_length)
        if row.profile is not None:
            self._uses[row.profile.digest] -= 1
            if not self._uses[row.profile.digest]:
                del self._uses[row.profile.digest]
                self._steering.unload(row.profile.digest)
        if error is None:
            row.listener.end(row.tokens)
        else:
            row.listener.fail(error)
        row.turn.end()

    # A profile's name is its digest here: the task's name may have other contents by now.

    def _steered(self, rows: Sequence[Row]) -> AbstractContextManager[None]:
        if all(row.profile is None for row in rows):
            return nullcontext()
        # Prompts are padded on the left to the longest row; one that has generated already has that behind its prompt.
        width = max(row.ids.shape[1] for row in rows)
        ends = [width - (row.ids.shape[1] - row.prompt_length) for row in rows]
        return self._steering.tasks(_digests(rows), scope=[row.scope for row in rows], prompt_end=ends)

    def _packed(
        self, rows: Sequence[Row], starts: Sequence[int], counts: Sequence[int]
    ) -> AbstractContextManager[None]:
        pieces = [
            (digest if steered else None, tokens)
            for row, digest, start, count in zip(rows, _digests(rows), starts, counts, strict=True)
            for tokens, steered in split(row.scope, row.prompt_length, start, count)
            if tokens
        ]
        names = [name for name, _ in pieces]
        return self._steering.packed(names, [tokens for _, tokens in pieces]) if any(names) else nullcontext()


def _error_of(action: Callable[[], None]) -> Exception | None:
    """The error of an action of the generation thread, None if there is none; `Row.listener` hands it on.

    Which errors a model, a processor or a setting of `generate` has for a request is not known, and any that is not
    caught here would end the thread, and leave all who wait without an answer.
    """
    try:
        action()
    except Exception as error:  # noqa: BLE001 - see above
        return error
    return None


def _digests(rows: Sequence[Row]) -> list[str | None]:
    return [row.profile.digest if row.profile else None for row in rows]
