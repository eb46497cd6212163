"""Arguments of a decoder besides embeddings: told by its shape, carried with the tokens, or refused by name."""

from typing import Any

import pytest
import tiny_models
import torch
from hones_offline.running.batching import AHEAD, Batch, Segment, collate
from hones_offline.running.inputs import DecoderInputs
from hones_offline.running.prompts import prepare
from problems import problem
from torch import Tensor

from hones_steer.errors import LayoutError

TOKENS = 5
EMBEDS = torch.randn(1, TOKENS, 32, generator=torch.Generator().manual_seed(0))


def inputs() -> DecoderInputs:
    return DecoderInputs("llama", tiny_models.llama().model.config)


def taken(decoder_inputs: DecoderInputs, **arguments: Any) -> dict[str, Tensor]:
    """Find what belongs to the tokens of a call whose two-row twin has everything twice."""

    def twice(value: Any) -> Any:
        if isinstance(value, list):
            return [twice(part) for part in value]
        return torch.cat([value, value]) if isinstance(value, Tensor) and value.dim() > 1 else value

    call = {"inputs_embeds": EMBEDS, **arguments}
    return decoder_inputs.of_tokens(call, lambda: {name: twice(value) for name, value in call.items()})


def batch_of(*segments: Segment) -> Batch:
    return collate(segments, torch.device("cpu"), "right")


def segment(more: dict[str, Tensor]) -> Segment:
    return Segment(EMBEDS[0], torch.arange(TOKENS)[None], more)


def test_features_of_marked_tokens_are_padded_and_packed_again() -> None:
    decoder_inputs = inputs()
    marks = torch.tensor([[False, True, True, False, False]])
    features = [torch.randn(2, 32), torch.randn(2, 32)]
    more = taken(decoder_inputs, marks=marks, features=features)
    assert {name: x.shape[0] for name, x in more.items()} == {"marks": 5, "features/0": 5, "features/1": 5}
    text = Segment(torch.zeros(7, 32), torch.arange(7)[None])
    batch = batch_of(segment(more), text, segment(more) + text)
    given = decoder_inputs.arguments(batch, batch.mask, None)
    assert given["marks"].shape == (3, 12)
    assert given["marks"].nonzero().tolist() == [[0, 1], [0, 2], [2, 1], [2, 2]]
    for found, expected in zip(given["features"], features, strict=True):
        torch.testing.assert_close(found, torch.cat([expected, expected]))


def test_what_is_the_same_for_two_rows_is_handed_through() -> None:
    decoder_inputs, scale = inputs(), torch.tensor([1.0, 2.0, 3.0])
    assert taken(decoder_inputs, scale=scale, flag=True) == {}
    batch = batch_of(segment({}))
    given = decoder_inputs.arguments(batch, batch.mask, None)
    assert given["scale"] is scale
    assert given["flag"] is True


def blocks(row: list[list[int]]) -> Tensor:
    """A mask [1, 1, T, T] by which tokens see those before them, and each of these token lists sees itself."""
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    for block in row:
        for token in block:
            mask[token, block] = True
    return mask[None, None]


@pytest.mark.parametrize("additive", [False, True], ids=["bool", "float"])
def test_a_block_of_tokens_that_see_one_another(additive: bool) -> None:
    decoder_inputs, mask = inputs(), blocks([[1, 2, 3]])
    given_mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min) if additive else mask
    more = taken(decoder_inputs, attention_mask=given_mask)
    assert more[f"{AHEAD}attention_mask"].tolist() == [0, 2, 1, 0, 0]
    own = segment(more)
    assert [own.closed(at) for at in range(6)] == [0, 1, 1, 1, 4, 5]
    text = Segment(torch.zeros(2, 32), torch.arange(2)[None])
    batch = batch_of(own, text + own)
    found = decoder_inputs.arguments(batch, batch.mask, None)["attention_mask"]
    assert found.shape == (2, 1, 7, 7)
    torch.testing.assert_close(found[0, 0, :5, :5], mask[0, 0])
    torch.testing.assert_close(found[1, 0, 2:, 2:], mask[0, 0])
    assert not found[0, :, :5, 5:].any()  # padding


HOLE = blocks([])
HOLE[0, 0, 3, 1] = False
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"states": torch.randn(1, 3, 32)}, "also takes states, which has neither a value for each token nor the same one"),
    ({"cache_of_its_own": object()}, "also takes cache_of_its_own"),
    ({"attention_mask": HOLE}, "gets an attention mask of its own, by which tokens see others"),
    ({"attention_mask": object()}, "an attention mask that is no tensor"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_cannot_be_carried_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=f"llama: its text decoder .*{message}"):
        taken(inputs(), **arguments)


def test_a_decoder_that_embeds_images_itself_is_refused() -> None:
    with pytest.raises(LayoutError, match="llama: its text decoder also takes pixel_values"):
        inputs().require_none({"input_ids": torch.ones(1, 3), "pixel_values": torch.zeros(1, 3, 8, 8)})


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's processor, of its own
def test_prompts_that_see_themselves_whole_share_nothing_and_are_never_cut() -> None:
    p = problem("paligemma", "retrieval", count=2)
    prepared = prepare(p.model, p.processor, p.task, p.examples)
    for encoded in prepared.encoded:
        assert len(encoded.shared) == 0
        assert all(ending.closed(len(ending) - 1) == 0 for ending in encoded.endings)


def test_an_image_that_sees_itself_is_shared_whole() -> None:
    p = problem("gemma3", "retrieval", count=2)
    prepared = prepare(p.model, p.processor, p.task, p.examples)
    for encoded in prepared.encoded:
        (ahead,) = (x for name, x in encoded.shared.more.items() if name.endswith("sliding_attention"))
        assert int((ahead > 0).sum()) == 3  # four tokens, of which the last one sees none ahead
        assert encoded.shared.closed(len(encoded.shared)) == len(encoded.shared)
