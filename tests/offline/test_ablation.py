"""Forwards with a head replaced start at the head's layer, and give the same as the whole forward."""

import gc
from dataclasses import replace
from itertools import combinations, pairwise

import mixture_models
import numpy as np
import pytest
import reference
import tiny_models
import torch
from hones_offline.attribution.ablation import HeadAblation, Resumption
from hones_offline.attribution.heads import head_scores, head_statistics
from hones_offline.attribution.measurements import AnswerLogProbability
from hones_offline.running.batching import Batch, PrefixBatch, Run, Segment
from hones_offline.running.decoder import TextDecoder
from hones_offline.running.evaluation import score
from hones_offline.running.execution import Execution
from hones_offline.running.interventions import replaced_heads
from hones_offline.running.length_buckets import LengthBuckets, cut_buckets
from hones_offline.running.prompts import prepare
from hones_offline.running.resumption import LayerInput, recorded_states
from problems import problem

TEXT_MODELS = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3", "gpt2", "opt")


def decoder_and_batch(architecture: str) -> tuple[TextDecoder, Batch]:
    """Four rows of different length, padded on the left."""
    model = getattr(tiny_models if hasattr(tiny_models, architecture) else mixture_models, architecture)()
    model.generation_config.eos_token_id = 2
    decoder = TextDecoder(model)
    ids = tiny_models.text_inputs()["input_ids"]
    rows = [row[: len(row) - i] for i, row in enumerate(ids)]
    with torch.no_grad():
        return decoder, decoder.collate([Segment(decoder.embed(row), torch.arange(len(row))[None]) for row in rows])


@torch.no_grad()
@pytest.mark.parametrize("architecture", TEXT_MODELS)
def test_resuming_equals_the_whole_forward(architecture: str) -> None:
    decoder, batch = decoder_and_batch(architecture)
    layers = decoder.layout.layers
    with recorded_states(decoder.layout, range(len(layers))) as states:
        plain, _ = decoder.run(batch)
    real = batch.mask.bool()
    for layer in layers:
        heads = [(layer.index, 1), (layer.index, 3)]
        resumed, _ = decoder.resume(batch, states[layer.index][0], heads)
        for head, hidden in zip(heads, resumed.chunk(2), strict=True):
            with replaced_heads(decoder.layout, [head] * len(batch.mask)):
                expected, _ = decoder.run(batch)
            assert not torch.allclose(expected[real], plain[real], atol=1e-3)
            torch.testing.assert_close(hidden[real], expected[real], rtol=1e-4, atol=1e-4)
    assert torch.equal(decoder.run(batch)[0], plain)  # nothing stays behind


@torch.no_grad()
def test_layers_below_the_head_do_not_run_nor_does_the_attention_of_its_own() -> None:
    decoder, batch = decoder_and_batch("llama")
    with recorded_states(decoder.layout, [1]) as states:
        decoder.run(batch)
    calls: list[str] = []
    for layer in decoder.layout.layers:
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp"):
            part = layer.module.get_submodule(name)
            part.register_forward_hook(lambda *_, call=f"{layer.index} {name}": calls.append(call))
    decoder.resume(batch, states[1][0], [(1, 0)])
    assert calls == ["1 self_attn.o_proj", "1 mlp", "2 self_attn.q_proj", "2 self_attn.o_proj", "2 mlp"]


@torch.no_grad()
def test_an_attention_that_changes_what_its_output_projection_gives_runs_again() -> None:
    decoder, batch = decoder_and_batch("llama")
    for layer in decoder.layout.layers:
        layer.module.self_attn.register_forward_hook(lambda _module, _args, out: (2 * out[0], out[1]))
    with recorded_states(decoder.layout, [1]) as states:
        decoder.run(batch)
    resumed, _ = decoder.resume(batch, states[1][0], [(1, 2)])
    with replaced_heads(decoder.layout, [(1, 2)] * len(batch.mask)):
        expected, _ = decoder.run(batch)
    real = batch.mask.bool()
    torch.testing.assert_close(resumed[real], expected[real], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("architecture", [*TEXT_MODELS, "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4", "qwen3_5_moe"])
def test_the_wanted_hidden_states_are_valid(architecture: str) -> None:
    """Elsewhere the last FFN was skipped, but for OPT, whose FFN is no module of its own."""
    decoder, batch = decoder_and_batch(architecture)
    columns = torch.tensor([[-1, -3]]) % batch.mask.shape[1] + torch.zeros(len(batch.mask), 1, dtype=torch.long)
    whole, _ = decoder.run(batch)
    hidden, _ = decoder.run(replace(batch, wanted=columns))
    rows = torch.arange(len(columns))[:, None]
    torch.testing.assert_close(hidden[rows, columns], whole[rows, columns], rtol=1e-4, atol=1e-5)
    assert torch.allclose(hidden[:, -2], whole[:, -2], atol=1e-3) == (architecture == "opt")


@torch.no_grad()
def test_every_row_has_its_own_head() -> None:
    decoder, batch = decoder_and_batch("llama")
    heads = [(0, 1), (2, 3), (0, 2), (1, 0)]
    with replaced_heads(decoder.layout, heads):
        mixed, _ = decoder.run(batch)
    for row, head in enumerate(heads):
        with replaced_heads(decoder.layout, [head] * len(heads)):
            alone, _ = decoder.run(batch)
        real = batch.mask[row].bool()
        torch.testing.assert_close(mixed[row][real], alone[row][real], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_forward_that_was_set_on_a_layer_is_there_again_also_after_an_error() -> None:
    """Accelerate's hooks (device_map) are such forwards."""
    decoder, batch = decoder_and_batch("llama")
    first, second, third = (layer.module for layer in decoder.layout.layers)
    own = first.forward
    first.forward = lambda *args, **kwargs: own(*args, **kwargs)
    placed = first.forward
    third.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        decoder.resume(batch, LayerInput(2, batch.embeds), [(2, 0)])
    assert first.forward is placed
    assert "forward" not in vars(second)


class HiddenStates:
    """Measures a batch's hidden states; its states are too large for those of a second layer to be kept."""

    copies, token_count = 2, 2**50

    def __init__(self, batch: Batch) -> None:
        self.batch, self.kept = batch, list[int]()

    def undisturbed(self, run: Run) -> torch.Tensor:
        self.kept.append(layer_inputs())
        return run(self.batch, None)[0]

    def ablated(self, resumption: Resumption, _base: torch.Tensor) -> list[torch.Tensor]:
        return list(resumption.run(self.batch, None)[0].chunk(len(resumption.heads)))


def layer_inputs() -> int:
    return sum(type(value) is LayerInput for value in gc.get_objects())


def test_states_are_recorded_again_where_memory_is_short_and_never_twice_at_a_time() -> None:
    decoder, batch = decoder_and_batch("llama")
    measurement, before = HiddenStates(batch), layer_inputs()
    ablation = HeadAblation(decoder, measurement, Execution())
    plain = ablation.undisturbed()
    heads = [(2, 1), (0, 3), (1, 0), (1, 1), (1, 2), (0, 0)]
    real = batch.mask.bool()
    for head, hidden in zip(heads, ablation.ablated(heads), strict=True):
        with torch.no_grad(), replaced_heads(decoder.layout, [head] * len(batch.mask)):
            expected, _ = decoder.run(batch)
        torch.testing.assert_close(hidden[real], expected[real], rtol=1e-4, atol=1e-4)
    assert measurement.kept == [before] * 3  # one undisturbed forward for each layer
    assert torch.equal(plain, ablation.undisturbed())


@torch.no_grad()
def test_a_prefix_that_prompts_share_runs_once() -> None:
    p = problem("llama", "shots")
    prepared = prepare(p.model, p.processor, p.task, p.examples)
    prompts = [encoded.prompt(0) for encoded in prepared.encoded]
    batch = PrefixBatch(prompts, [1] * len(prompts), prepared.decoder.device)
    assert batch.shared >= 20
    assert batch.token_count < sum(map(len, prompts)) / 2
    hidden, cache = batch.run(prepared.decoder.run, keep=True)
    assert cache is not None
    whole, _ = prepared.decoder.run(prepared.decoder.collate(prompts))
    torch.testing.assert_close(hidden[range(len(batch)), batch.ends - 1], whole[:, -1], rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() == max(map(len, prompts))
    all_wanted = PrefixBatch(prompts, [len(prompt) for prompt in prompts], prepared.decoder.device)
    assert all_wanted.shared == 0


@torch.no_grad()
def test_copies_are_limited_by_the_tokens_of_a_batch_and_by_memory() -> None:
    p = problem("llama", "shots")
    prepared = prepare(p.model, p.processor, p.task, p.examples)
    prompts = [encoded.prompt(0) for encoded in prepared.encoded]
    batch = PrefixBatch(prompts, [1] * len(prompts), prepared.decoder.device)
    copies = batch.copies_at_once(batch_size=32, cache_tokens=10**9)
    assert 32 // len(batch) < copies <= 32 * batch.length / batch.token_count < copies + 1
    assert batch.copies_at_once(batch_size=32, cache_tokens=int(2.5 * len(batch) * batch.length)) == 2
    assert batch.copies_at_once(batch_size=1, cache_tokens=0) == 1
    copy_gb = len(batch) * batch.length * prepared.decoder.cache_token_bytes(prompts[0]) / 2**30
    for memory_gb, expected in ((1, copies), (2.5 * copy_gb, 2), (1e-9, 1)):
        execution = Execution(batch_size=32, memory_gb=memory_gb)
        assert LengthBuckets(prepared.decoder, prompts, [1] * len(prompts), execution).copies == expected


def fail(*_: object) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_answers_that_end_and_diverge_at_different_places(batch_size: int) -> None:
    """End tokens are some that the model writes: rows end early, agree to the end, or end where they diverge."""
    p = problem("llama", "text")
    free = prepare(p.model, p.processor, p.task, p.examples)
    written = free.decoder.greedy([e.prompt(0) for e in free.encoded], p.task.max_new_tokens)
    ends = sorted({row[1 + i] for i, row in enumerate(written[:3])})
    p.model.generation_config.eos_token_id = ends
    p.processor.add_special_tokens({"additional_special_tokens": p.processor.convert_ids_to_tokens(ends)})
    prepared = prepare(p.model, p.processor, p.task, p.examples)
    lengths = {len(row) for row in prepared.decoder.greedy([e.prompt(0) for e in prepared.encoded], 6)}
    assert len(lengths) > 1
    assert list(score(prepared, batch_size=batch_size).outputs) == reference.outputs(
        p.model, p.processor, p.task, p.examples
    )
    expected = reference.head_scores(p.model, p.processor, p.task, p.examples, reference.metric)
    found = head_scores(prepared, "task", *head_statistics(prepared, "task", Execution(batch_size=batch_size))).by_head
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_last_token_of_an_answer_is_not_run() -> None:
    """No prediction after it is read."""
    p = problem("llama", "text")
    prepared = prepare(p.model, p.processor, p.task, p.examples)
    pairs = prepared.pairs()
    measured = AnswerLogProbability(prepared, pairs, Execution(batch_size=len(pairs), memory_gb=1))
    tokens = sum(int(batch.shared + end) for batch in measured.buckets.batches for end in batch.ends)
    assert tokens == sum(len(prompt) + len(answer) - 1 for prompt, answer in pairs)


def test_buckets_of_similar_length_cost_least() -> None:
    """Compared with every way to cut them; a forward costs as much as 100 tokens more."""
    lengths = [9, 3, 4, 30, 4, 5, 9, 3]

    def cost(buckets: list[list[int]]) -> int:
        return sum(100 + 6 * len(bucket) * max(lengths[i] for i in bucket) for bucket in buckets)

    order = sorted(range(8), key=lambda i: lengths[i])
    ways = [
        [order[start:end] for start, end in pairwise((0, *cuts, 8))]
        for count in range(8)
        for cuts in combinations(range(1, 8), count)
    ]
    for most in (2, 3, 8):
        buckets = cut_buckets(lengths, 6, most)
        assert sorted(i for bucket in buckets for i in bucket) == list(range(8))
        allowed = [way for way in ways if max(map(len, way)) <= most]
        assert cost(buckets) == min(map(cost, allowed))
    assert len(cut_buckets(lengths, 6, 8)) > 1
