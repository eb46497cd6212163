"""Check that a model's text decoder gives the model's own logits when it is run as attribution and learning run it.

Attribution, learning and evaluation run the text decoder without the rest of the model: on prompts with their answers,
padded to one length, and in two parts, the second of which continues from a KV cache. This is correct if tokens attend
to earlier tokens only and never to padding. As a check, the whole model writes a few tokens after each of two prompts,
one prompt at a time; then the decoder runs in each of these ways and must give the same logits wherever they are read.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hones_offline.running.batching import Segment
from hones_offline.running.decoder import TextDecoder, configured_factors
from hones_steer.errors import DataError, LayoutError
from hones_steer.layout import unwrap

_TOKENS = 3  # length of the answers; longer ones cost more forwards and show nothing more


@dataclass(frozen=True)
class Sample:
    """One prompt twice: as inputs of the whole model, a batch of one, and as a segment for its text decoder."""

    inputs: Mapping[str, Tensor]
    prompt: Segment


@torch.no_grad()
def check_agreement(decoder: TextDecoder, samples: Sequence[Sample]) -> None:
    """Check that the decoder gives the model's own logits after each prompt, however it is run.

    Raises:
        LayoutError: it gives other logits in one of the ways; the message names the way.
        DataError: the whole model does not run on a prompt.
    """
    written = [_written(decoder, sample.inputs) for sample in samples]
    prompts = [sample.prompt for sample in samples]
    _find_factor(decoder, prompts[0], written[0][1][:1])
    for prompt, (answer, reference) in zip(prompts, written, strict=True):
        hidden, _ = decoder.run(decoder.collate([prompt]))
        _compare(decoder, "run alone", decoder.logits(hidden[:, -1]), reference[:1])
        logits, _ = decoder.answer_logits([prompt], [answer])
        _compare(decoder, "run on a prompt with its answer", logits[0], reference)
    prompts, answers, expected = _rows_of_different_lengths(prompts, written)
    logits, real = decoder.answer_logits(prompts, answers)
    _compare(decoder, "run on rows padded on the left", logits[real], torch.cat(expected))
    segments = [decoder.answered(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    batch = decoder.prefix_batch(segments, [len(answer) for answer in answers])
    hidden, _ = batch.run(decoder.run)
    read = [hidden[i, end - len(answers[i]) : end] for i, end in enumerate(batch.ends.tolist())]
    _compare(decoder, "run on rows padded on the right", decoder.logits(torch.cat(read)), torch.cat(expected))
    middles = [segment.closed(len(segment) // 2) or segment.closed(len(segment) - 1) for segment in segments]
    if middles[0] == middles[1]:  # or neither part would be padded
        middles[1] = segments[1].closed(middles[1] - 1) or middles[1]
    if all(middles):
        halves = [segment.split(middle) for segment, middle in zip(segments, middles, strict=True)]
        final = decoder.candidate_logits([first for first, _ in halves], [[second] for _, second in halves], rows=2)
        _compare(decoder, "run in two parts", torch.cat(final), torch.stack([logits[-1] for logits in expected]))


def _find_factor(decoder: TextDecoder, prompt: Segment, reference: Tensor) -> None:
    """Have the decoder multiply its logits by the configured factor that brings them nearest to the model's own."""
    hidden, _ = decoder.run(decoder.collate([prompt]))

    def difference(factor: float) -> float:
        decoder.logit_factor = factor
        return float((decoder.logits(hidden[:, -1]) - reference.to(hidden.device)).abs().max())

    decoder.logit_factor = min(configured_factors(decoder.model), key=difference)


def _written(decoder: TextDecoder, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Ids of the `_TOKENS` tokens that the whole model writes after a prompt, and their logits [tokens, vocabulary]."""
    taken = inspect.signature(unwrap(decoder.model).forward).parameters  # a tokenizer may return more
    plain: dict[str, Any] = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "use_cache": True}
    plain |= dict.fromkeys(("temperature", "top_p", "top_k"))  # transformers warns of any beside do_sample=False
    try:
        out = decoder.model.generate(
            **{name: value for name, value in inputs.items() if name in taken},
            **plain,
            min_new_tokens=_TOKENS,
            max_new_tokens=_TOKENS,
            pad_token_id=decoder.end_tokens[0],
            disable_compile=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, IndexError, RuntimeError) as error:  # what a model says of inputs it does not take
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        raise DataError(
            f"{type(unwrap(decoder.model)).__name__} writes nothing after a prompt of these examples ({shapes}): "
            f"{error}; give each example what it needs, as an image"
        ) from error
    return out.sequences[0, -_TOKENS:].cpu(), torch.cat(out.logits).float()


def _rows_of_different_lengths(
    prompts: Sequence[Segment], written: Sequence[tuple[Tensor, Tensor]]
) -> tuple[list[Segment], list[Tensor], list[Tensor]]:
    """Two prompts, answers and expected logits whose rows differ in length, so that one of them is padded.

    They are the first prompt with its whole answer, and the last prompt (the same one if there is one only) with its
    answer cut short by one token or two.
    """
    first, (first_answer, first_logits) = prompts[0], written[0]
    last, (last_answer, last_logits) = prompts[-1], written[-1]
    kept = next(n for n in (_TOKENS - 1, _TOKENS - 2) if len(first) + _TOKENS != len(last) + n)
    return [first, last], [first_answer, last_answer[:kept]], [first_logits, last_logits[:kept]]


def _compare(decoder: TextDecoder, how: str, logits: Tensor, expected: Tensor) -> None:
    """Raise LayoutError if logits differ by more than rounding, which is coarser in half precision."""
    of_positions = (logits - expected.to(logits.device)).abs().amax(-1)
    difference, at = float(of_positions.max()), int(of_positions.argmax()) + 1
    tolerance = 1e-3 if next(decoder.embedding.parameters()).dtype == torch.float32 else 5e-2
    if not difference <= tolerance * float(expected.abs().max()):
        raise LayoutError(
            f"{decoder.layout.model_type}: its text decoder {how} gives other logits than the whole model that writes "
            f"token by token (by {difference:.3g} at position {at} of {len(logits)} that are read), as where tokens "
            "attend to later ones (a bidirectional prefix) or to padding, or where positions count padding; steering "
            "this model works, attributing, learning and evaluating on it do not"
        )
