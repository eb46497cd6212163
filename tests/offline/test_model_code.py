"""Models whose code is not part of the installed transformers call things as older or newer versions do."""

from typing import Any

import pytest
import tiny_models
import torch
from hones_offline.running.batching import Segment
from hones_offline.running.decoder import TextDecoder

from hones_steer._transformers import CACHE_NAMES, cache_name


@torch.no_grad()
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_the_key_value_cache_has_either_name(name: str) -> None:
    model = tiny_models.llama()
    model.generation_config.eos_token_id = 2
    ids = tiny_models.text_inputs()["input_ids"][0]
    prompt = Segment(model.get_input_embeddings()(ids), torch.arange(len(ids))[None])
    expected = TextDecoder(model).greedy([prompt], 5)
    decoder: Any = type(model.model)

    def run(self: Any, cache: Any, others: dict[str, Any]) -> Any:
        return decoder.forward(self, **{cache_name(decoder.forward): cache}, **others)

    forwards: dict[str, Any] = {
        "cache": lambda self, cache, **others: run(self, cache, others),
        "past_key_values": lambda self, past_key_values, **others: run(self, past_key_values, others),
    }
    model.model.__class__ = type("Decoder", (decoder,), {"forward": forwards[name]})
    assert TextDecoder(model).greedy([prompt], 5) == expected
