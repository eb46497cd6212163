"""The fast path (batched, images encoded once, decoder run alone) equals the method done one example at a time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import reference
import torch
from hones_offline.attribution.heads import HeadMetric, head_scores, head_statistics, top_heads
from hones_offline.attribution.measurements import AnswerLogProbability
from hones_offline.attribution.write_in import PositivePart, head_guided_importance, mean_write_in, target_directions
from hones_offline.data.examples import Example
from hones_offline.data.neurons import Bank, Importance, NeuronIndex
from hones_offline.data.tasks import JsonlTask, Task
from hones_offline.learning.factors import FitSettings, _Learner, fit_prepared, fit_run_settings, losses_of
from hones_offline.running.evaluation import intervention, position_means, score
from hones_offline.running.execution import Execution
from hones_offline.running.prompts import Prepared, prepare
from hones_offline.running.run_folder import RunFolder, read_arrays
from problems import Problem, every_architecture, problem, some_ffns, some_heads
from tokenizers import decoders

from hones_steer.errors import LayoutError

CASES = every_architecture(
    [
        ("llama", "text"),
        ("llama", "shots"),
        ("opt", "text"),  # FFN inputs [rows·T, I]
        ("gpt2", "text"),  # weights transposed, learned positions
        ("granite", "text"),  # a factor on the logits
        ("qwen3_5_text", "text"),  # layers without heads that keep a state
        ("nemotron_h", "text"),  # layers without an FFN
        ("qwen3_moe", "text"),  # routed experts, one layer dense
        ("deepseek_v3", "text"),  # and a shared one
        *(("llava", task) for task in ("vqa", "ocr", "caption", "retrieval")),
        ("qwen2_5_vl", "caption"),  # positions on three axes
        ("qwen2_5_vl", "retrieval"),
        ("qwen3_vl", "vqa"),  # features for deeper layers
        ("gemma3", "vqa"),  # an image's tokens see one another
    ]
)
CASES.append(pytest.param(("mllama", "text"), marks=pytest.mark.matrix))  # a layer that does not run
CASES.append(pytest.param(("deepseek_v32", "text"), marks=pytest.mark.matrix))  # an indexer with nothing to choose


RUN = Execution(batch_size=9)


@pytest.fixture(params=CASES, ids="-".join, scope="module")
def case(request: pytest.FixtureRequest) -> tuple[Problem, Prepared]:
    p = problem(*request.param)
    return p, prepare(p.model, p.processor, p.task, p.examples)


def test_outputs_equal_generating_one_example_at_a_time(case: tuple[Problem, Prepared]) -> None:
    p, prepared = case
    found = score(prepared, batch_size=9)
    expected = reference.outputs(p.model, p.processor, p.task, p.examples)
    assert len(set(map(str, expected))) > 1 or p.task.name == "ocr"  # examples tell batching mistakes apart
    for got, want in zip(found.outputs, expected, strict=True):
        if p.task.kind == "rank":
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
        else:
            assert got == want
    assert found.value == pytest.approx(reference.metric(p.model, p.processor, p.task, p.examples))


@pytest.mark.parametrize("head_metric", ["task", "logprob"])
def test_head_scores(case: tuple[Problem, Prepared], head_metric: HeadMetric) -> None:
    p, prepared = case
    utility = reference.metric if head_metric == "task" else reference.mean_log_probability
    base = utility(p.model, p.processor, p.task, p.examples)
    found = head_scores(prepared, head_metric, *head_statistics(prepared, head_metric, RUN))
    assert found.base == pytest.approx(base, abs=1e-5)
    layer = some_heads(prepared)[1][0]
    for head, value in enumerate(found.by_head[layer]):
        with reference.head_replaced(p.model, layer, head):
            expected = base - utility(p.model, p.processor, p.task, p.examples)
        assert value == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("head_metric", ["task", "logprob"])
def test_little_memory_and_small_batches_change_nothing(
    case: tuple[Problem, Prepared], head_metric: HeadMetric
) -> None:
    """States are kept of all layers or of one at a time, heads run together or alone, diverged rows wait or do not."""
    _, prepared = case
    expected = head_scores(prepared, head_metric, *head_statistics(prepared, head_metric, RUN)).by_head
    little = Execution(batch_size=9, memory_gb=1e-9)
    found = head_scores(prepared, head_metric, *head_statistics(prepared, head_metric, little)).by_head
    np.testing.assert_array_equal(found, expected)
    for batch_size in (1, 3, 64):
        execution = Execution(batch_size=batch_size)
        found = head_scores(prepared, head_metric, *head_statistics(prepared, head_metric, execution)).by_head
        np.testing.assert_allclose(found, expected, atol=1e-5)


class Length(Task):
    """Scores how long the first line is, so that each character more or less shows."""

    name = "length"
    max_new_tokens = 12
    first_line = True

    def score(self, example: Example, output: str) -> float:  # noqa: ARG002
        return len(output) / 100


def test_the_first_line_is_scored_in_evaluation_and_of_every_head() -> None:
    p = problem("llava", "vqa")
    written = decoders.Sequence([decoders.Replace("w", "\n'"), decoders.Replace("e", "' "), decoders.Fuse()])
    p.processor.tokenizer.backend_tokenizer.decoder = written
    prepared = prepare(p.model, p.processor, Length(), p.examples)
    found = score(prepared, batch_size=9)
    assert list(found.outputs) == reference.outputs(p.model, p.processor, Length(), p.examples)
    whole = score(replace(prepared, task=JsonlTask("whole", "anls", 12)), batch_size=9).outputs
    assert all(len(line) < len(text) for line, text in zip(found.outputs, whole, strict=True))
    assert found.value > 0
    scores = head_scores(prepared, "task", *head_statistics(prepared, "task", RUN)).by_head
    for head in range(scores.shape[1]):
        with reference.head_replaced(p.model, 1, head):
            expected = found.value - reference.metric(p.model, p.processor, Length(), p.examples)
        assert scores[1, head] == pytest.approx(expected, abs=1e-6)
    assert len(set(scores.flatten().tolist())) > 2


@pytest.mark.parametrize("cut", [("llama", "text"), ("llama", "shots"), ("qwen2_5_vl", "caption")], ids="-".join)
def test_cut_into_buckets_by_length_nothing_changes(monkeypatch: pytest.MonkeyPatch, cut: tuple[str, str]) -> None:
    """So few tokens are not worth a forward of their own; saying that one costs nothing has them cut."""
    p = problem(*cut)
    prepared = prepare(p.model, p.processor, p.task, p.examples)
    directions = target_directions(prepared)

    def everything() -> list[npt.NDArray[np.float32]]:
        metrics: tuple[HeadMetric, ...] = ("task", "logprob")
        scores = [head_scores(prepared, m, *head_statistics(prepared, m, RUN)).by_head for m in metrics]
        parts: tuple[PositivePart, ...] = ("mean", "example")
        heads = top_heads(scores[1], 4)
        return scores + [
            np.asarray(head_guided_importance(prepared, directions, heads, RUN, positive_part=part)) for part in parts
        ]

    together = everything()
    monkeypatch.setattr("hones_offline.running.length_buckets._FORWARD", 0)
    measured = AnswerLogProbability(prepared, prepared.pairs(), Execution(batch_size=9, memory_gb=4))
    assert len(measured.buckets.items) > 1
    for found, expected in zip(everything(), together, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_importance_is_the_same_within_a_ten_thousandth(case: tuple[Problem, Prepared]) -> None:
    p, prepared = case
    scores = reference.head_scores(p.model, p.processor, p.task, p.examples, reference.mean_log_probability)
    found_scores = head_scores(prepared, "logprob", *head_statistics(prepared, "logprob", RUN)).by_head
    np.testing.assert_allclose(found_scores, scores, atol=1e-5)
    expected = reference.importance(p.model, p.processor, p.task, p.examples, scores, top_heads=4).numpy()
    found = head_guided_importance(prepared, target_directions(prepared), top_heads(found_scores, 4), RUN)
    assert (expected > 0).any()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * expected.max())


def test_write_in_reads_the_last_prompt_token(case: tuple[Problem, Prepared]) -> None:
    p, prepared = case
    (mean,) = mean_write_in(prepared, target_directions(prepared), RUN)
    found = Importance(NeuronIndex.of(prepared.decoder.layout), mean)
    expected = reference.mean_write_in(p.model, p.processor, p.task, p.examples)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_masking_and_steering_equal_plain_multiplication(case: tuple[Problem, Prepared]) -> None:
    p, prepared = case
    lower, higher = some_ffns(prepared)[1:]
    bank = Bank({lower: np.arange(0, 40, 2), higher: np.arange(5, 30)})
    plain = score(prepared, batch_size=9).outputs
    with intervention(prepared, mask=bank):
        found = score(prepared, batch_size=9).outputs
    zeros = {layer: (neurons, np.zeros(len(neurons))) for layer, neurons in bank.items()}
    with reference.neurons_scaled(p.model, zeros):
        expected = reference.outputs(p.model, p.processor, p.task, p.examples)
    assert str(found) != str(plain)
    if p.task.kind == "rank":
        for got, want in zip(found, expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    else:
        assert list(found) == expected
    assert str(score(prepared, batch_size=9).outputs) == str(plain)  # nothing stays behind


def test_mean_ablation_equals_setting_neurons_to_their_means(case: tuple[Problem, Prepared]) -> None:
    p, prepared = case
    means = position_means(prepared, batch_size=3)
    expected_means = reference.position_means(p.model, p.processor, p.task, p.examples)
    found_means = Importance(NeuronIndex.of(prepared.decoder.layout), means.astype(np.float32))
    np.testing.assert_allclose(found_means, expected_means, rtol=1e-4, atol=1e-5 * float(expected_means.abs().max()))
    lower, higher = some_ffns(prepared)[1:]
    bank = Bank({lower: np.arange(0, 40, 2), higher: np.arange(5, 30)})
    with intervention(prepared, mask=bank, fill=50 * means):  # far from what the model does, so that outputs change
        found = score(prepared, batch_size=9).outputs
    index = NeuronIndex.of(prepared.decoder.layout)
    values = bank.split(50 * means[bank.numbers(index)])
    filled = {key: (neurons, values[key]) for key, neurons in bank.items()}
    with reference.neurons_set(p.model, filled):
        expected = reference.outputs(p.model, p.processor, p.task, p.examples)
    with intervention(prepared, mask=bank):
        zeros = score(prepared, batch_size=9).outputs
    assert str(found) != str(zeros)
    if p.task.kind == "rank":
        for got, want in zip(found, expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    else:
        assert list(found) == expected


def test_learning_follows_the_gradient_of_the_plain_loss(case: tuple[Problem, Prepared]) -> None:
    """One SGD-like step: the first AdamW step moves every factor against the sign of the reference's gradient."""
    p, prepared = case
    lowest, *_, highest = some_ffns(prepared)
    bank = Bank({lowest: [1, 7, 20], highest: [3, 11]})
    settings = FitSettings(epochs=1, lr=1e-2, batch_size=100, accumulation_steps=1, l2=0.0)
    profile = fit_prepared(prepared, bank, settings, Execution())
    flat = np.concatenate([scales for _, scales in profile.ffns.values()])
    assert profile.format == (2 if prepared.decoder.layout.experts else 1)

    for scale, slope in zip(flat, slopes(p, bank, settings.seed), strict=True):
        if abs(slope) > 1e-4:
            assert scale == pytest.approx(1 - 1e-2 * np.sign(slope), abs=1e-4)


def test_the_gradient_of_the_loss_and_its_penalty() -> None:
    """A step from a state that is not 0: AdamW's first moment is then a tenth of the gradient."""
    p = problem("llama", "shots")
    prepared = prepare(p.model, p.processor, p.task, p.examples)
    bank, start = Bank({0: [1, 7, 20], 2: [3, 11]}), np.array([0.3, -0.2, 0.1, 0.4, -0.4], dtype=np.float32)
    settings = FitSettings(epochs=1, batch_size=3, accumulation_steps=9, l2=30.0, beta_kl=0.5, max_grad_norm=1e9)
    learner = _Learner(prepared, bank, settings, losses_of(prepared, settings))
    found = learner.advance({**learner.start(), "offsets": start}, range(1))["exp_avg"] / 0.1

    def loss(offsets: np.ndarray) -> float:
        parts = bank.split(1 + offsets)
        layers = {layer: (neurons, parts[layer]) for layer, neurons in bank.items()}
        with torch.no_grad():
            of_epoch = reference.epoch_loss(p.model, p.processor, p.task, p.examples, layers, 0.5, settings.seed)
            return float(of_epoch + reference.fit_penalty(p.model, layers, 30.0))

    steps = 0.02 * np.eye(5)
    expected = [(loss(start + step) - loss(start - step)) / 0.04 for step in steps]
    penalty = 2 * 30.0 * start / NeuronIndex.of(prepared.decoder.layout).size
    assert np.abs(found - penalty).max() > 1e-3
    assert np.abs(penalty).max() > 1e-2
    np.testing.assert_allclose(found, expected, atol=1e-4)


def slopes(p: Problem, bank: Bank, seed: int) -> npt.NDArray[np.float64]:
    """The slopes of the reference's loss over an epoch by the factor of each neuron of the bank, at 1."""

    def loss(factors: npt.NDArray[np.float64]) -> float:
        parts = np.split(factors, np.cumsum([len(neurons) for neurons in bank.values()])[:-1])
        layers = {layer: (bank[layer], part) for layer, part in zip(bank, parts, strict=True)}
        with torch.no_grad():
            return float(reference.epoch_loss(p.model, p.processor, p.task, p.examples, layers, 0.05, seed))

    steps = 0.05 * np.eye(bank.size)
    return np.array([(loss(1 + step) - loss(1 - step)) / 0.1 for step in steps])


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("task", ["caption", "retrieval"])
def test_an_epochs_gradient_is_of_the_drawn_pairs_averaged_over_each_example(
    tmp_path: Path, task: str, batch_size: int
) -> None:
    """Examples of retrieval have three pairs or four here, and count alike; a caption has one reference of two."""
    p = problem("llava", task)
    prepared = prepare(p.model, p.processor, p.task, p.examples)
    bank = Bank({0: [1, 7, 20], 2: [3, 11]})
    settings = FitSettings(epochs=1, batch_size=batch_size, accumulation_steps=5, l2=0, max_grad_norm=1e6, seed=3)
    fit_prepared(
        prepared, bank, settings, Execution(folder=RunFolder(tmp_path, fit_run_settings(prepared, bank, settings)))
    )
    (state,) = (read_arrays(file) for file in tmp_path.glob("hones-*.safetensors"))
    expected = slopes(p, bank, settings.seed)
    gradient = state["exp_avg"] / (1 - 0.9)  # Adam's first moment after one step
    np.testing.assert_allclose(gradient, expected, rtol=0.02, atol=0.01 * np.abs(expected).max())


def test_a_seed_draws_the_same_answers_and_another_one_other_references(case: tuple[Problem, Prepared]) -> None:
    _, prepared = case
    epochs = [prepared.drawn_answers(seed) for seed in range(8)]
    assert epochs == [prepared.drawn_answers(seed) for seed in range(8)]
    assert any(epoch != epochs[0] for epoch in epochs) == (prepared.task.metric == "BLEU-4")


def test_gradient_checkpointing_learns_the_same() -> None:
    p = problem("llava", "vqa")
    prepared = prepare(p.model, p.processor, p.task, p.examples)
    bank = Bank({0: [1, 7], 2: [3]})
    plain, checkpointed = (
        fit_prepared(prepared, bank, FitSettings(lr=1e-2, gradient_checkpointing=flag), Execution())
        for flag in (False, True)
    )
    for layer in bank:
        np.testing.assert_allclose(plain.layers[layer][1], checkpointed.layers[layer][1], atol=1e-5)
    assert not any(module.training for module in p.model.modules())
    assert all(parameter.requires_grad for parameter in p.model.parameters())


def test_an_image_is_encoded_once_for_all_its_candidates() -> None:
    p = problem("llava", "retrieval", count=3)
    calls = []
    p.model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    prepared = prepare(p.model, p.processor, p.task, p.examples)
    score(prepared, batch_size=9)
    assert len(calls) == 3 + 2  # two more compare the decoder path with the whole model


def test_more_candidates_than_a_batch_holds_are_ranked_the_same() -> None:
    p = problem("llava", "retrieval")
    prepared = prepare(p.model, p.processor, p.task, p.examples)
    expected = reference.outputs(p.model, p.processor, p.task, p.examples)
    for rows in (1, 3):  # four candidates share a prefix
        for got, want in zip(score(prepared, batch_size=rows).outputs, expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_model_that_changes_its_logits_after_the_head_is_refused() -> None:
    p = problem("llava", "vqa")

    def halve(_module: object, _args: object, out: Any) -> Any:
        out.logits = out.logits / 2
        return out

    p.model.register_forward_hook(halve)
    with pytest.raises(LayoutError, match="gives other logits than the whole model"):
        prepare(p.model, p.processor, p.task, p.examples)
