"""A run that was killed goes on where it stopped, ends in the same bytes, and never mixes two settings."""

import inspect
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hones_offline import attribute, fit
from hones_offline.data.tasks import JsonlTask, get_task
from hones_offline.learning.factors import FitSettings
from hones_offline.running.prompts import prepare
from offline.killed_run import contents
from problems import Problem, problem
from tiny_models import llava

from hones_steer.errors import DataError
from hones_steer.profile import save_profile

TESTS = Path(__file__).parents[1]
BANK = {0: np.array([1, 7, 20], dtype=np.int32), 2: np.array([3, 11], dtype=np.int32)}


def test_twenty_kills_at_random_points_and_the_same_bytes(tmp_path):
    result = subprocess.run(
        [sys.executable, "-W", "error", TESTS / "offline" / "killed_run.py", tmp_path, "20", "3407"],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["killed"] == 20
    assert found["differing"] == []
    # The kills struck at different points: with nothing done, with some steps done.
    assert len(set(found["states"])) > 1
    assert found["files"] > 10


@pytest.fixture
def p() -> Problem:
    return problem("llava", "vqa", count=4)


def attribution(p: Problem, folder: Path, **changes):
    settings = {"method": "hones", "top_heads": 4, "top_fraction": 0.05, "head_metric": "logprob", "batch_size": 4}
    settings |= changes
    return attribute(p.model, p.processor, p.task, p.examples, run_dir=folder, **settings)


def learning(p: Problem, folder: Path | None, bank=BANK, **changes):
    settings = {"epochs": 3, "lr": 1e-2, "batch_size": 1, "accumulation_steps": 1, **changes}
    return fit(p.model, p.processor, p.task, p.examples, bank, run_dir=folder, **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 3407 and now is 1"),
        ({"top_heads": 5}, "top_heads was 4 and now is 5"),
        ({"batch_size": 3}, "batch_size was 4 and now is 3"),
        ({"head_metric": "task"}, "head_metric was 'logprob' and now is 'task'"),
    ],
)
def test_attribution_with_another_setting_is_refused(p, tmp_path, change, message):
    attribution(p, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(DataError, match=f"other settings: .*{message}"):
        attribution(p, tmp_path, **change)
    assert contents(tmp_path) == before


def test_attribution_with_other_data_task_or_model_is_refused(p, tmp_path):
    attribution(p, tmp_path)
    before = contents(tmp_path)
    changed = [
        (replace(p, examples=p.examples[:-1]), "examples was"),
        (replace(p, examples=[replace(p.examples[0], targets=("x",)), *p.examples[1:]]), "examples was"),
        (replace(p, task=JsonlTask("vqa", "anls")), "metric was 'VQA accuracy' and now is 'ANLS'"),
        (replace(p, task=JsonlTask("vqa", "vqa", 9)), "max_new_tokens was 16 and now is 9"),
        (replace(p, task=JsonlTask("vqa", "vqa", 16, first_line=True)), "first_line was False and now is True"),
        (replace(p, task=get_task("vqa", protocol="paper")), "protocol was 'default' and now is 'paper'"),
        (replace(p, model=with_end(llava(seed=1))), "model was"),
    ]
    for other, message in changed:
        with pytest.raises(DataError, match=message):
            attribution(other, tmp_path)
    with pytest.raises(DataError, match="stage was 'attribute' and now is 'fit'"):
        learning(p, tmp_path)
    assert contents(tmp_path) == before


def with_end(model):
    model.generation_config.eos_token_id = 2
    return model


def test_a_run_folder_names_what_decides_an_attribution_and_nothing_else(p, tmp_path):
    """One name more, and runs begun before are refused."""
    attribution(p, tmp_path)
    names = {"stage", "write_in", "task", "metric", "max_new_tokens", "prompts", "examples", "model", "dtype", "device"}
    names |= {"top_heads", "head_metric", "seed", "batch_size", "memory_gb", "method", "target", "positive_part"}
    names |= {"first_line", "protocol", "head_weights"}
    assert set(json.loads((tmp_path / "run.json").read_text())) == names


def test_a_run_that_measured_another_write_in_is_not_gone_on_with(p, tmp_path):
    attribution(p, tmp_path)
    settings = json.loads((tmp_path / "run.json").read_text())
    del settings["write_in"]  # as before it was always of the first prompt
    (tmp_path / "run.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match="write_in was None and now is 'of the first prompt towards target_texts'"):
        attribution(p, tmp_path)


def test_the_banks_size_may_change_without_computing_anything_again(p, tmp_path):
    small = attribution(p, tmp_path)
    before = contents(tmp_path)
    calls = []
    p.model.model.language_model.register_forward_hook(lambda *_: calls.append(1))
    prepare(p.model, p.processor, p.task, p.examples)  # compares the decoder with the whole model
    checking = len(calls)
    large = attribution(p, tmp_path, top_fraction=0.1)
    assert len(calls) == 2 * checking
    assert sum(map(len, large.bank.values())) > sum(map(len, small.bank.values()))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 3407 and now is 1"),
        ({"lr": 0.1}, "lr was 0.01 and now is 0.1"),
        ({"epochs": 4}, "epochs was 3 and now is 4"),
        ({"beta_kl": 0.0}, "beta_kl was 0.05 and now is 0.0"),
        ({"bank": {0: BANK[0]}}, "bank was"),
    ],
)
def test_learning_with_another_setting_is_refused(p, tmp_path, change, message):
    learning(p, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(DataError, match=f"other settings: .*{message}"):
        learning(p, tmp_path, **change)
    assert contents(tmp_path) == before


class Interruption:
    """Ctrl-C at the n-th forward of the text decoder; counts forwards."""

    def __init__(self, p: Problem, at: int | None = None) -> None:
        self.calls, self.at = 0, at
        p.model.model.language_model.register_forward_hook(self)

    def __call__(self, *_: object) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt


def test_learning_goes_on_in_the_middle(p, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["hones_offline.learning.factors"], "CHUNK", 3)
    whole = Interruption(p)
    expected = learning(p, tmp_path / "whole")
    assert len(list((tmp_path / "whole").glob("hones-*.safetensors"))) == 6  # 3 epochs of 4 steps, 3 and 1 to a state

    alone = whole.calls
    interruption = Interruption(p, at=alone - 5)  # in the second of three epochs
    with pytest.raises(KeyboardInterrupt):
        learning(p, tmp_path / "again")
    assert 0 < len(list((tmp_path / "again").glob("hones-*.safetensors"))) < 6
    assert not any(parameter.grad is not None for parameter in p.model.parameters())

    interruption.at, interruption.calls = None, 0
    assert learning(p, tmp_path / "again").digest == expected.digest
    assert interruption.calls == alone - 4  # but the first epoch's steps
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


def test_learning_on_other_draws_is_refused(tmp_path):
    """The paper's protocol draws other negatives of retrieval, and another task of one's own other answers."""
    r = problem("llava", "retrieval", count=3)
    learning(r, tmp_path / "retrieval", epochs=1)
    with pytest.raises(DataError, match="protocol was 'default' and now is 'paper'"):
        learning(replace(r, task=get_task("retrieval", protocol="paper")), tmp_path / "retrieval", epochs=1)

    class Drawn(type(r.task)):
        def drawn_answers(self, example, random):
            return self.answers(example)[: 1 + random.integers(2)]

    with pytest.raises(DataError, match="prompts was"):
        learning(replace(r, task=Drawn()), tmp_path / "retrieval", epochs=1)


@pytest.mark.parametrize("keep", [None, 2])
def test_states_on_disk_do_not_change_what_is_learned(p, tmp_path, monkeypatch, keep):
    """Adam's moments, step count and pruned neurons survive the way through a file: chunks do not show."""
    profiles = []
    for name, chunk in {"one": 1, "five": 5, "all": 64}.items():
        monkeypatch.setattr(sys.modules["hones_offline.learning.factors"], "CHUNK", chunk)
        profiles.append(learning(p, tmp_path / name, keep=keep))
        save_profile(profiles[-1], tmp_path / f"{name}.safetensors")
    profiles.append(learning(p, None, keep=keep))
    assert profiles[0].num_neurons == (keep or 5)
    assert len({profile.digest for profile in profiles}) == 1
    assert len({(tmp_path / f"{name}.safetensors").read_bytes() for name in ("one", "five", "all")}) == 1


def test_an_interrupted_attribution_goes_on_and_ends_in_the_same_bytes(p, tmp_path):
    whole = Interruption(p)
    expected = attribution(p, tmp_path / "whole")
    interruption = Interruption(p, at=whole.calls // 2)
    with pytest.raises(KeyboardInterrupt):
        attribution(p, tmp_path / "again")
    interruption.at, interruption.calls = None, 0
    found = attribution(p, tmp_path / "again")
    assert interruption.calls < whole.calls * 3 // 4
    np.testing.assert_array_equal(found.importance, expected.importance)
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_heads": 0}, "top_heads must be at least 1, not 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"top_fraction": 0}, "top_fraction must lie in"),
        ({"head_metric": "loss"}, "head_metric must be 'task' or 'logprob', not 'loss'"),
        ({"memory_gb": 0}, "memory_gb must be positive, not 0"),
        ({"seed": -1}, "seed must lie in"),
    ],
)
def test_a_setting_out_of_range_is_refused_before_anything_is_done(p, tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        attribution(p, tmp_path / "run", **change)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be positive, not 0"),
        ({"lr": float("nan")}, "lr must be positive, not nan"),
        ({"beta_kl": -1}, "beta_kl must be zero or positive, not -1"),
        ({"seed": -1}, "seed must lie in"),
        ({"keep": 0}, "keep must be at least 1, not 0"),
        ({"keep": 6}, "keep is 6, but the bank has 5 neurons"),
        ({"bank": {}}, "the bank is empty"),
        ({"bank": {5: BANK[0]}}, "names layer 5, but the model has 3"),
    ],
)
def test_learning_out_of_range_is_refused_before_anything_is_done(p, tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        learning(p, tmp_path / "run", **change)
    assert list(tmp_path.iterdir()) == []


def test_the_defaults_of_fit_are_those_of_its_settings():
    parameters = inspect.signature(fit).parameters
    assert {name: parameters[name].default for name in asdict(FitSettings())} == asdict(FitSettings())
