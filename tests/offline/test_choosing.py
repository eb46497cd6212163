"""Learning rate, epochs and strength are chosen on dev by one rule; learned sparsity keeps as many neurons as asked."""

import json
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from hones_offline.comparison.splits import Splits
from hones_offline.data.neurons import Bank, NeuronIndex
from hones_offline.learning.choosing import DevScore, FitGrid, choose, dev_log_probabilities
from hones_offline.learning.factors import FitSettings, fit_prepared, learned_by_epoch, losses_of
from hones_offline.running.execution import Execution
from hones_offline.running.prompts import Prepared, prepare
from offline.killed_run import contents
from problems import Problem, problem

from hones_steer.errors import DataError
from hones_steer.profile import Profile

BANK = Bank({0: [1, 7, 20], 2: [3, 11]})
SETTINGS = FitSettings(epochs=2, lr=0.02, batch_size=2, accumulation_steps=1)
GRID = FitGrid(lrs=(0.01, 0.1), epochs=4, patience=1, strengths=(0.5, 1.0, 2.0))


@pytest.fixture(scope="module")
def p() -> Problem:
    return problem("llama", "shots", count=12)


@pytest.fixture(scope="module")
def prepared(p: Problem) -> Prepared:
    return prepare(p.model, p.processor, p.task, p.examples)


def splits_of(prepared: Prepared, path: Path) -> Splits:
    parts = [prepared.only(numbers) for numbers in (range(6), range(6, 10), range(10, 12))]
    return Splits(*parts, path, batch_size=4)


# Log-probabilities on dev after each epoch, by learning rate; the metric is the first digit.
CURVES = {
    0.1: [(0, -3.0), (0, -2.0), (0, -2.5), (0, -1.9)],
    0.2: [(1, -9.0), (0, -1.0), (1, -8.0), (1, -8.5), (1, -8.5), (2, 0.0)],
}


def chosen_from(curves, grid: FitGrid, gain_of_strength=lambda _: 0.0):
    """`choose` among (lr, epoch, strength) on given curves, and which epochs were learned."""
    learned = []

    def learn_at(lr: float) -> Generator[tuple[int, tuple[float, int, float]]]:
        for epoch in range(1, len(curves[lr]) + 1):
            learned.append((lr, epoch))
            yield epoch, (lr, epoch, 1.0)

    def measure(candidate: tuple[float, int, float]) -> DevScore:
        lr, epoch, strength = candidate
        metric, log_probability = curves[lr][epoch - 1]
        return DevScore(metric, log_probability + gain_of_strength(strength))

    choice = choose(grid, learn_at, lambda learned, strength: (*learned[:2], strength), measure)
    return choice, learned


def test_learning_stops_when_dev_has_not_improved_for_patience_epochs() -> None:
    for patience, stops in {1: (3, 2), 2: (4, 5), 9: (4, 6)}.items():
        grid = FitGrid(lrs=(0.1, 0.2), epochs=6, patience=patience, strengths=(1.0,))
        choice, learned = chosen_from(CURVES, grid)
        assert [max(epoch for lr, epoch in learned if lr == rate) for rate in CURVES] == list(stops)
        assert len(choice.trials) == sum(stops)
        # The metric comes first, then the log-probability: not epoch 2's.
        expected = {1: (0.2, 1), 2: (0.2, 3), 9: (0.2, 6)}[patience]
        assert (choice.best.lr, choice.best.epoch) == expected == choice.chosen[:2]


def test_strengths_are_tried_at_each_rates_best_epoch_and_of_equals_the_least_is_taken() -> None:
    grid = FitGrid(lrs=(0.1, 0.2), epochs=6, patience=2, strengths=(2.0, 1.0, 0.5, 1.5))
    choice, _ = chosen_from(CURVES, grid)
    assert choice.chosen == (0.2, 3, 0.5)  # all alike
    after_stopping = [(t.lr, t.epoch, t.strength) for t in choice.trials if t.strength != 1]
    assert after_stopping == [(lr, epoch, s) for lr, epoch in ((0.1, 4), (0.2, 3)) for s in (2.0, 0.5, 1.5)]
    choice, _ = chosen_from(CURVES, grid, gain_of_strength=lambda strength: strength)
    assert choice.chosen == (0.2, 3, 2.0)
    choice, _ = chosen_from({0.1: [(0, -1.0), (0, -1.0)]}, replace(grid, lrs=(0.1,)))
    assert choice.chosen == (0.1, 1, 0.5)  # the fewest epochs too


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lrs": ()}, "lrs are empty"),
        ({"lrs": (0.1, float("nan"))}, "lrs must be positive, not nan"),
        ({"strengths": (0.0,)}, "strengths must be positive, not 0.0"),
        ({"epochs": 0}, "epochs must be at least 1, not 0"),
        ({"patience": 0}, "patience must be at least 1, not 0"),
    ],
)
def test_a_grid_out_of_range_is_refused(change, message: str) -> None:
    with pytest.raises(DataError, match=message):
        FitGrid(**change)


def test_dev_is_measured_as_one_example_at_a_time_would(p: Problem, prepared: Prepared) -> None:
    profile = fit_prepared(prepared, BANK, SETTINGS, Execution())
    with reference.neurons_scaled(p.model, profile.layers):
        expected = reference.mean_log_probability(p.model, p.processor, p.task, p.examples)
    assert dev_log_probabilities(prepared, profile, batch_size=5).mean() == pytest.approx(expected, abs=1e-5)


def test_what_is_chosen_is_the_best_on_dev(prepared: Prepared, tmp_path: Path) -> None:
    splits = splits_of(prepared, tmp_path)
    chosen = splits.learned_on_dev("hones", BANK, SETTINGS, GRID)
    [file] = splits.path.glob("trials-hones-*.json")
    trials = json.loads(file.read_text())
    best = max(trials, key=lambda trial: (trial["metric"], trial["log_probability"]))
    method = chosen.method
    assert method["chosen_on_dev"] == {
        "strength": best["strength"],
        "trials": len(trials),
        "metric": best["metric"],
        "log_probability": best["log_probability"],
    }
    assert (method["name"], method["lr"], method["epoch"], method["epochs"]) == ("hones", best["lr"], best["epoch"], 4)
    # The profile is that state times the strength, however it comes about.
    settings = replace(SETTINGS, lr=best["lr"], epochs=4)
    state = dict(learned_by_epoch(splits.discovery, BANK, settings, Execution()))[best["epoch"]]
    assert chosen.digest == (state * best["strength"]).digest
    assert dev_log_probabilities(splits.dev, chosen, 4).mean() == pytest.approx(best["log_probability"], abs=1e-5)


def test_a_choice_goes_on_where_it_stopped(prepared: Prepared, tmp_path: Path) -> None:
    """Epochs that were learned and measured are not again, and the files are those of a choice that was left alone."""
    calls, at = 0, -1

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt

    def choice(folder: str) -> Profile:
        return splits_of(prepared, tmp_path / folder).learned_on_dev("hones", BANK, SETTINGS, GRID)

    hook = prepared.decoder.layout.decoder.register_forward_pre_hook(count)
    try:
        expected = choice("alone")
        whole, calls, at = calls, 0, calls * 2 // 3
        with pytest.raises(KeyboardInterrupt):
            choice("again")
        calls, at = 0, -1
        assert choice("again").digest == expected.digest
        assert 0 < calls < whole // 2
        calls = 0
        assert choice("again").digest == expected.digest
        assert calls == 0
    finally:
        hook.remove()
    assert contents(tmp_path / "again") == contents(tmp_path / "alone")


# ------------------------------------------------------------------------------------------------- the fast loss


@pytest.mark.parametrize("kept", [True, False])
def test_the_loss_is_the_plain_one(p: Problem, prepared: Prepared, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that begin alike, whose beginning runs once; the original's log-probabilities kept or not."""
    monkeypatch.setattr("hones_offline.learning.loss.ORIGINAL_BYTES", 2**30 if kept else 0)
    layers = {layer: (neurons, np.linspace(0.2, 2, len(neurons))) for layer, neurons in BANK.items()}
    for whole in (False, True):
        losses = losses_of(prepared, replace(SETTINGS, beta_kl=0.5, gradient_checkpointing=whole))
        for seed, chosen in enumerate(([4, 0, 9], [3], range(len(p.examples)))):
            loss = losses.of_epoch(seed)
            original = loss.original(chosen)
            with torch.no_grad(), reference.neurons_scaled(p.model, layers):
                found = float(loss(chosen, original))
            drawn = prepared.drawn_answers(seed)
            plain = [
                reference.fit_loss(p.model, p.processor, p.task, p.examples[i], *pair, layers, 0.5)
                for i in chosen
                for pair in drawn[i]
            ]
            assert found == pytest.approx(float(torch.stack(plain).detach().mean()), abs=1e-5)


def test_a_shared_beginning_runs_once(prepared: Prepared) -> None:
    shapes = []

    def note(_module: object, _args: object, kwargs: dict[str, torch.Tensor]) -> None:
        shapes.append(kwargs["inputs_embeds"].shape[:2])

    hook = prepared.decoder.layout.decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        fit_prepared(prepared, BANK, replace(SETTINGS, epochs=1, batch_size=12), Execution())
    finally:
        hook.remove()
    # Twice a prefix of one row and the rest of twelve: the original, and one optimizer step.
    assert [rows for rows, _ in shapes] == [1, 12, 1, 12]
    assert shapes[0][1] > 2 * shapes[1][1]


# ------------------------------------------------------------------------------------------------ learned sparsity


def every_neuron(prepared: Prepared) -> Bank:
    index = NeuronIndex.of(prepared.decoder.layout)
    return index.bank(np.arange(index.size))


def mean_loss(prepared: Prepared, profile: Profile | None) -> float:
    return -float(dev_log_probabilities(prepared, profile, 8).mean())


def test_pruning_ends_at_exactly_as_many_neurons_as_asked(prepared: Prepared) -> None:
    bank = every_neuron(prepared)
    settings = replace(SETTINGS, epochs=6, keep=10)
    epochs = dict(learned_by_epoch(prepared, bank, settings, Execution()))
    assert list(epochs) == [3, 4, 5, 6]  # of 6 epochs the first half prunes
    assert {profile.num_neurons for profile in epochs.values()} == {10}
    last = epochs[6]
    assert {layer: neurons.tolist() for layer, (neurons, _) in last.layers.items()} == {
        layer: neurons.tolist() for layer, (neurons, _) in epochs[3].layers.items()
    }
    assert all((scales != 1).all() for _, scales in last.layers.values())
    assert mean_loss(prepared, last) < mean_loss(prepared, epochs[3]) < mean_loss(prepared, None)
    assert fit_prepared(prepared, bank, settings, Execution()).digest == last.digest
