"""Encode examples as prompts: chat template, processor, vision tower. Each image is encoded once for a whole run."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hones_offline.data.examples import Example
from hones_offline.data.tasks import Answers, Task
from hones_offline.running.agreement import Sample, check_agreement
from hones_offline.running.batching import Segment
from hones_offline.running.decoder import TextDecoder
from hones_offline.running.progress import with_progress
from hones_offline.running.readings import capture_call
from hones_steer.errors import DataError
from hones_steer.layout import unwrap

_CHECKED = 2  # examples on which the decoder is compared with the whole model

Pair = tuple[Segment, Tensor]
"""A prompt and the token ids [n] of its answer."""


@dataclass(frozen=True)
class Encoded:
    """One example's prompts: the tokens that all share, and the ending of each; a single prompt has no ending."""

    shared: Segment
    endings: tuple[Segment, ...]

    def prompt(self, index: int) -> Segment:
        """The whole prompt `index`."""
        return self.shared + self.endings[index] if self.endings else self.shared

    @property
    def longest(self) -> int:
        """The length of the longest prompt, in tokens."""
        return len(self.shared) + max(map(len, self.endings), default=0)


@dataclass(frozen=True)
class Prepared:
    """A task's examples, encoded for one model; `failures` maps the id of each unusable example to the reason."""

    task: Task
    decoder: TextDecoder
    tokenizer: Any
    examples: tuple[Example, ...]
    encoded: tuple[Encoded, ...]
    failures: dict[str, str]

    def __len__(self) -> int:
        return len(self.examples)

    def only(self, numbers: Iterable[int]) -> "Prepared":
        """The examples with these numbers, in this order."""
        kept = list(numbers)
        return replace(
            self, examples=tuple(self.examples[i] for i in kept), encoded=tuple(self.encoded[i] for i in kept)
        )

    def first(self, count: int | None) -> "Prepared":
        """The first `count` examples; all if `count` is None."""
        return self.only(range(len(self))[:count])

    def answer_ids(self, text: str) -> Tensor:
        """Token ids [n] of an answer as the model would write it, the end token included."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        # Chat models list several end tokens; the tokenizer's is the one that ends an answer.
        ends, end = self.decoder.end_tokens, self.tokenizer.eos_token_id
        return torch.tensor([*ids, end if end in ends else ends[0]])

    def pairs(self) -> list[Pair]:
        """The pairs of the task's `answers`, in the examples' order: what attribution measures."""
        return [pair for pairs in self.pairs_by_example() for pair in pairs]

    def pairs_by_example(self) -> list[list[Pair]]:
        """The pairs of the task's `answers`, of each example.

        Raises:
            DataError: the task gives none for an example.
        """
        answers = self._given("answers", [self.task.answers(example) for example in self.examples])
        return [self.pairs_of(i, own) for i, own in enumerate(answers)]

    def pairs_of(self, number: int, answers: Answers) -> list[Pair]:
        """The pairs of the example with this number that have the given (prompt index, answer)s."""
        return [(self.encoded[number].prompt(index), self.answer_ids(answer)) for index, answer in answers]

    def drawn_answers(self, seed: int) -> list[Answers]:
        """The task's `drawn_answers` of each example: what learning takes in an epoch with this seed.

        Raises:
            DataError: the task draws none for an example.
        """
        random = np.random.default_rng(seed)
        return self._given("drawn_answers", [self.task.drawn_answers(example, random) for example in self.examples])

    def _given(self, method: str, answers: list[Answers]) -> list[Answers]:
        """The answers that a method of the task gave for each example; raises DataError where it gave none."""
        for example, own in zip(self.examples, answers, strict=True):
            if not own:
                raise DataError(
                    f"task {self.task.name!r} has no answer for example {example.id!r}; "
                    f"let its {method} give at least one pair"
                )
        return answers


def prepare(
    model: torch.nn.Module,
    processor: Any,
    task: Task,
    examples: Iterable[Example],
    *,
    max_failures: float = 0.05,
    progress: bool = False,
) -> Prepared:
    """Encode a task's examples for a model.

    An example whose image is missing or unreadable is left out, and `failures` of the result has its id and the reason.

    Raises:
        DataError: more than the share `max_failures` of the examples failed, or no example is usable.
        LayoutError: the model's text decoder cannot be run without the rest of the model, or on so long a prompt.
    """
    examples = list(examples)
    if not examples:
        raise DataError(f"task {task.name!r} has no examples; give at least one")
    decoder = TextDecoder(model)
    usable: list[Example] = []
    encoded: list[Encoded] = []
    failures: dict[str, str] = {}
    samples: list[Sample] = []
    for example in with_progress(examples, f"{task.name}: encode", show=progress):
        try:
            image = example.image.load() if example.image else None
        except DataError as error:
            failures[example.id] = str(error)
            continue
        prompts, opening = task.prompts(example), task.opening(example)
        encoded.append(encode(decoder, processor, image, prompts, opening))
        decoder.require_length(encoded[-1].longest)
        usable.append(example)
        if len(samples) < _CHECKED:
            text = render(processor, prompts[0], has_image=image is not None) + opening
            samples.append(Sample(_model_inputs(decoder, processor, image, text), encoded[-1].prompt(0)))
            if len(samples) == _CHECKED:
                check_agreement(decoder, samples)
    if failures and (not usable or len(failures) > max_failures * len(examples)):
        name, reason = next(iter(failures.items()))
        raise DataError(
            f"task {task.name!r}: {len(failures)} of {len(examples)} examples cannot be used, more than "
            f"max_failures={max_failures:g} allows; the first is {name!r}: {reason}"
        )
    if len(samples) < _CHECKED:
        check_agreement(decoder, samples)
    return Prepared(task, decoder, tokenizer_of(processor), tuple(usable), tuple(encoded), failures)


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor, or the tokenizer itself for a text-only model."""
    return getattr(processor, "tokenizer", processor)


def render(processor: Any, prompt: str, *, has_image: bool) -> str:
    """Render a user's turn with the chat template and its generation prompt; without a template, the bare prompt."""
    if getattr(processor, "chat_template", None) is None:
        return f"{processor.image_token}\n{prompt}" if has_image else prompt
    content: Any = [{"type": "image"}, {"type": "text", "text": prompt}] if has_image else prompt
    text: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return text


def _special_tokens(tokenizer: Any, text: str) -> dict[str, bool]:
    """Arguments that keep the tokenizer from adding a second start token to one in the text (as `ProcessorMixin`)."""
    start = tokenizer.bos_token
    return {"add_special_tokens": False} if start is not None and text.startswith(start) else {}


def encode(
    decoder: TextDecoder, processor: Any, image: Image.Image | None, prompts: Sequence[str], opening: str = ""
) -> Encoded:
    """Encode an example's prompts, each with the answer's `opening`; its image goes through the vision tower once.

    The prompts are split at the end of their longest common prefix of which no token sees one after it, so that the
    prefix's keys and values can be shared; it may be empty.

    Raises:
        DataError: there is an image and the processor takes none, the processor does not fit the model, or the prompts
            differ before the image.
        LayoutError: the decoder gets arguments that attribution does not carry.
    """
    if image is not None and getattr(processor, "image_processor", None) is None:
        raise DataError(
            f"the examples have images, but {type(processor).__name__} takes none; "
            "use a vision-language model with its processor, or leave the images out"
        )
    texts = [render(processor, prompt, has_image=image is not None) + opening for prompt in prompts]
    tokenizer = tokenizer_of(processor)
    ids = [tokenizer(text, **_special_tokens(tokenizer, text))["input_ids"] for text in texts]
    for row in ids:
        _check_ids(decoder, tokenizer, row)
    if image is None:
        segments = [_text_segment(decoder, row) for row in ids]
    else:
        segments, ids = _image_segments(decoder, processor, image, texts, ids)
    if len(segments) == 1:
        return Encoded(segments[0], ())
    common = min(segment.closed(_common_prefix(ids)) for segment in segments)
    shared = segments[0].split(common)[0]
    return Encoded(shared, tuple(segment.split(common)[1] for segment in segments))


def _text_segment(decoder: TextDecoder, ids: Sequence[int]) -> Segment:
    return _captured(decoder, {"input_ids": torch.tensor([ids], device=decoder.device)}, None)


def _image_segments(
    decoder: TextDecoder,
    processor: Any,
    image: Image.Image,
    texts: Sequence[str],
    ids: Sequence[list[int]],
) -> tuple[list[Segment], list[list[int]]]:
    """Segments and token ids of prompts about one image.

    Each of `ids` has one image placeholder, which the processor widens to the image's tokens. The widened tokens of the
    first prompt are reused for the others. If the placeholder cannot be located in the widened ids, or the text after
    the image is more to the decoder than text, every prompt goes through the processor and the vision tower.
    """
    first, first_ids = _processed(decoder, processor, image, texts[0])
    span = _image_span(processor, ids[0], first_ids)
    if span is None or len(texts) == 1 or not _continues_as_text(decoder, first, first_ids, span[1]):
        rest = [_processed(decoder, processor, image, text) for text in texts[1:]]
        return [first, *(segment for segment, _ in rest)], [first_ids, *(row for _, row in rest)]
    start, stop = span
    upto_image = first.split(stop)[0]
    segments, widened = [first], [first_ids]
    for row in ids[1:]:
        if row[: start + 1] != ids[0][: start + 1]:
            raise DataError("the prompts of one example differ before its image; put the image first")
        ending = torch.tensor(row[start + 1 :])
        following = decoder.continuation(upto_image, ending)
        # Text continues where the image's positions end; only the captured positions tell where that is.
        offset = first.positions[:, stop : stop + 1] - following.positions[:, :1]
        segments.append(upto_image + Segment(following.embeds, following.positions + offset))
        widened.append(first_ids[:stop] + row[start + 1 :])
    return segments, widened


def _continues_as_text(decoder: TextDecoder, segment: Segment, ids: Sequence[int], at: int) -> bool:
    """Whether a segment's tokens from `at` on are what the decoder is given of text, and none before sees them."""
    following = decoder.continuation(segment.split(at)[0], torch.tensor(ids[at:]))
    own, as_text = segment.split(at)[1], segment.split(at)[0] + following
    pairs = [(own.embeds, following.embeds)]
    pairs += [(x[at:], as_text.more[name][at:]) for name, x in segment.more.items()]
    return segment.closed(at) == at and all(torch.equal(*pair) for pair in pairs)


def _processed(decoder: TextDecoder, processor: Any, image: Image.Image, text: str) -> tuple[Segment, list[int]]:
    """Run one prompt with its image up to the decoder: processor, vision tower, projector. Its segment and ids."""
    inputs = _model_inputs(decoder, processor, image, text)
    _check_taken(decoder, processor, inputs)
    return _captured(decoder, inputs, type(processor).__name__), inputs["input_ids"][0].tolist()


@torch.no_grad()
def _captured(decoder: TextDecoder, inputs: dict[str, Tensor], processor: str | None) -> Segment:
    """Make a segment of what the whole model's forward on one prompt calls its text decoder with.

    `processor` is the class that made the inputs of an image and a prompt, None where there is a prompt only.
    """

    def call(inputs: dict[str, Tensor]) -> dict[str, Any]:
        return capture_call(decoder.layout.decoder, lambda: decoder.model(**inputs))

    try:
        given = call(inputs)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, IndexError, RuntimeError) as error:  # what a model says of inputs it does not take
        of = f"what {processor} makes of an image and its prompt" if processor else "a prompt alone"
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        remedy = (
            "use the processor that was saved with the model"
            if processor
            else "give each example what it needs, as an image"
        )
        raise DataError(
            f"{type(unwrap(decoder.model)).__name__} does not run on {of} ({shapes}): {error}; {remedy}"
        ) from error
    if given.get("inputs_embeds") is None:  # a text model, which hands on the ids
        decoder.inputs.require_none(given)
        return decoder.text(inputs["input_ids"][0])
    more = decoder.inputs.of_tokens(given, lambda: call({name: torch.cat([x, x]) for name, x in inputs.items()}))
    embeds = given["inputs_embeds"][0].cpu()
    positions = given.get("position_ids")
    positions = torch.arange(len(embeds))[None] if positions is None else positions.cpu()
    return Segment(embeds, positions.reshape(-1, len(embeds)), more)


def _check_ids(decoder: TextDecoder, tokenizer: Any, ids: Sequence[int]) -> None:
    """Raise DataError, naming the first, if there are token ids that the model has no embedding for."""
    known = getattr(decoder.embedding, "num_embeddings", None)
    config = decoder.model.config
    images = {getattr(config, name, None) for name in ("image_token_id", "image_token_index")}  # replaced, not embedded
    if not isinstance(known, int) or hasattr(decoder.embedding, "num_additional_embeddings"):
        return
    for position, token in enumerate(ids, 1):
        if token >= known and token not in images:
            raise DataError(
                f"token {position} of a prompt is {token} ({tokenizer.convert_ids_to_tokens(token)!r}), but "
                f"{type(unwrap(decoder.model)).__name__} knows the ids 0 to {known - 1}; use the tokenizer that was "
                "saved with the model"
            )


def _check_taken(decoder: TextDecoder, processor: Any, inputs: Mapping[str, Tensor]) -> None:
    """Raise DataError, naming it, if the model takes no such argument as the processor makes of an image.

    Many models pass on arguments that they do not know, and would read the prompt without its image.
    """
    parameters = inspect.signature(unwrap(decoder.model).forward).parameters
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    makes, model = f"{type(processor).__name__} makes", type(unwrap(decoder.model)).__name__
    for name, value in inputs.items():
        if name not in parameters and (value.is_floating_point() or not passes_on):
            raise DataError(
                f"{makes} {name} {list(value.shape)} of an image and its prompt, which {model} does not take; use a "
                "vision-language model with the processor that was saved with it, or leave the images out"
            )
    if not any(value.is_floating_point() for value in inputs.values()):
        raise DataError(
            f"{makes} only {', '.join(inputs)} of an image and its prompt, so that {model} would not see the image; "
            "use the processor that was saved with the model"
        )


def _model_inputs(decoder: TextDecoder, processor: Any, image: Image.Image | None, text: str) -> dict[str, Tensor]:
    special = _special_tokens(tokenizer_of(processor), text)
    if image is None:
        inputs = tokenizer_of(processor)([text], return_tensors="pt", **special)
    else:
        inputs = processor(images=[image], text=[text], return_tensors="pt", **special)
    dtype = next(decoder.model.parameters()).dtype
    return {
        name: value.to(decoder.device, dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }


def _image_span(processor: Any, ids: list[int], widened: list[int]) -> tuple[int, int] | None:
    """The range [start, stop) of `widened` in place of the placeholder of `ids`; None if the rest differs."""
    placeholder = getattr(processor, "image_token_id", None)
    if placeholder is None or ids.count(placeholder) != 1:
        return None
    start = ids.index(placeholder)
    after = len(ids) - start - 1
    stop = len(widened) - after
    same = widened[:start] == ids[:start] and widened[stop:] == ids[start + 1 :]
    return (start, stop) if same and after > 0 else None


def _common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Length of the longest common prefix that leaves at least one token of every row."""
    common = 0
    for column in zip(*(row[:-1] for row in rows), strict=False):
        if len(set(column)) > 1:
            break
        common += 1
    return common
