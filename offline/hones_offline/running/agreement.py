"""Whether a model's text decoder, run as attribution, learning and evaluation run it, computes what the model does.

They run it on its own, on prompts with their answers, padded to one length, and in parts that go on from a KV cache.
That is right for a decoder whose tokens attend to earlier tokens alone and to no padding. Here the model itself writes
a few tokens after a prompt, one prompt at a time; and the decoder, in each of these ways, must give the same logits
wherever some would be read.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hones_offline.running.batching import PrefixBatch, Segment
from hones_offline.running.decoder import TextDecoder
from hones_steer.errors import LayoutError
from hones_steer.layout import unwrap

_TOKENS = 3  # of an answer; a longer one costs forwards and tells no more


@dataclass(frozen=True)
class Sample:
    """A prompt as the whole model takes it, a batch of one, and as its text decoder does."""

    inputs: Mapping[str, Tensor]
    prompt: Segment


@torch.no_grad()
def check_agreement(decoder: TextDecoder, samples: Sequence[Sample]) -> None:
    """Raise LayoutError unless the decoder, however it is run, gives the model's own logits after each prompt."""
    written = [_written(decoder, sample.inputs) for sample in samples]
    prompts = [sample.prompt for sample in samples]
    for prompt, (answer, own) in zip(prompts, written, strict=True):
        hidden, _ = decoder.run(decoder.collate([prompt]))
        _compare(decoder, "run alone", decoder.logits(hidden[:, -1]), own[:1])
        logits, _ = decoder.answer_logits([prompt], [answer])
        _compare(decoder, "run on a prompt with its answer", logits[0], own)
    prompts, answers, expected = _rows_of_different_lengths(prompts, written)
    logits, real = decoder.answer_logits(prompts, answers)
    _compare(decoder, "run on rows padded on the left", logits[real], torch.cat(expected))
    segments = [decoder.answered(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    batch = PrefixBatch(segments, [len(answer) for answer in answers], decoder.device)
    hidden, _ = batch.run(decoder.run)
    read = [hidden[i, end - len(answers[i]) : end] for i, end in enumerate(batch.ends.tolist())]
    _compare(decoder, "run on rows padded on the right", decoder.logits(torch.cat(read)), torch.cat(expected))
    if all(len(segment) > 1 for segment in segments):
        halves = [segment.split(len(segment) // 2) for segment in segments]
        found = decoder.candidate_logits([first for first, _ in halves], [[second] for _, second in halves], rows=2)
        _compare(decoder, "run in two parts", torch.cat(found), torch.stack([own[-1] for own in expected]))


def _written(decoder: TextDecoder, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The tokens that the model itself writes after a prompt, `_TOKENS` ids, and their logits [tokens, vocabulary]."""
    taken = inspect.signature(unwrap(decoder.model).forward).parameters  # a tokenizer may give more
    plain: dict[str, Any] = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "use_cache": True}
    plain |= dict.fromkeys(("temperature", "top_p", "top_k"))  # transformers warns of any beside do_sample=False
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
    return out.sequences[0, -_TOKENS:].cpu(), torch.cat(out.logits).float()


def _rows_of_different_lengths(
    prompts: Sequence[Segment], written: Sequence[tuple[Tensor, Tensor]]
) -> tuple[list[Segment], list[Tensor], list[Tensor]]:
    """The first prompt with its whole answer beside the last (or itself) with as much of its own as leaves padding."""
    (first, (answer, own)), (last, (other, others)) = (prompts[0], written[0]), (prompts[-1], written[-1])
    kept = next(n for n in (_TOKENS - 1, _TOKENS - 2) if len(first) + _TOKENS != len(last) + n)
    return [first, last], [answer, other[:kept]], [own, others[:kept]]


def _compare(decoder: TextDecoder, how: str, found: Tensor, expected: Tensor) -> None:
    difference = float((found - expected.to(found.device)).abs().max())
    tolerance = 1e-3 if next(decoder.embedding.parameters()).dtype == torch.float32 else 5e-2
    if not difference <= tolerance * float(expected.abs().max()):
        raise LayoutError(
            f"{decoder.layout.model_type}: its text decoder {how} gives other logits than the whole model that writes "
            f"token by token (by {difference:.3g}), as where tokens attend to later ones (a bidirectional prefix) or "
            "to padding; steering this model works, attributing, learning and evaluating on it do not"
        )
