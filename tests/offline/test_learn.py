"""`hones learn`: from data to a measured profile, resumable, with a budget, and honest about what test was used for."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hones_offline import Learned, evaluate, learn
from hones_offline.data.examples import Example, check_disjoint, load_jsonl
from hones_offline.data.tasks import JsonlTask
from hones_offline.learning.choosing import FitGrid
from hones_offline.learning.factors import FitSettings
from hones_offline.running.models import load_model
from hones_offline.search import clock
from hones_offline.search.clock import Clock, duration, seconds_of
from hones_offline.search.data import SearchData
from hones_offline.search.settings import SearchSettings, Trial
from offline.killed_run import contents
from PIL import Image
from problems import Problem, problem

from hones_steer import ProfileStore, load_profile, steer
from hones_steer.cli import main
from hones_steer.errors import DataError, StateError
from hones_steer.export.merged import merge_into
from hones_steer.profile import Profile

TESTS = Path(__file__).parents[1]
WAYS = ("what is", "red", "blue", "a", "the left", "square of", "circle")
# A word that the model never says and learns to say after any prompt: with these settings it surely gains.
GAINING = ["--selections", "fisher", "--sizes", "0.5", "0.3", "--lr", "0.3", "--strengths", "1", "2", "--epochs", "6"]
GAINING += ["--beta-kl", "0", "--fit-batch-size", "8", "--accumulation-steps", "1"]
# A factor of 1 + 1e-9 is 1 in float32: the answers stay as they are, to the bit.
NOTHING = ["--selections", "fisher", "--sizes", "0.05", "--lr", "1e-9", "--strengths", "1", "--epochs", "1"]
NOTHING += ["--fit-batch-size", "8", "--accumulation-steps", "1"]


def records(words: tuple[str, str], last: str, count: int) -> list[dict[str, Any]]:
    """Prompts that differ, and the first word as the answer to all of them."""
    return [
        {"prompt": f"{WAYS[i % 7]} {words[i % 2]} {WAYS[i // 7 % 7]}{' on' * (i // 49)} {last}", "targets": [words[0]]}
        for i in range(count)
    ]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models `text` and `vlm`; data of the task pets as one file and in splits, of places, and with images."""
    root = tmp_path_factory.mktemp("learn")
    for name, p in {"text": problem("llama", "text"), "vlm": problem("llava", "vqa")}.items():
        p.model.save_pretrained(root / name)
        p.processor.save_pretrained(root / name)
    pets = records(("cat", "dog"), "pet", 90)
    for name, lines in {"all": pets, "data": pets[:40], "dev": pets[40:60], "test": pets[60:]}.items():
        write(root / f"{name}.jsonl", lines)
    write(root / "places.jsonl", records(("town", "mat"), "place", 24))
    write(root / "places-train.jsonl", records(("town", "mat"), "one", 24))
    rng = np.random.default_rng(0)
    for i in range(42):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(root / f"{i}.png")
    asked = [{"image": f"{i}.png", "prompt": f"what is {w}", "targets": ["red"]} for i in range(42) for w in ("a", "b")]
    write(root / "images.jsonl", asked)
    return root


def command(root: Path, out: Path, *more: object) -> list[object]:
    """`hones learn` on pets, on all its splits."""
    splits = [part for name in ("data", "dev", "test") for part in (f"--{name}", root / f"{name}.jsonl")]
    return ["learn", root / "text", "--task", "pets", *splits, "--max-new-tokens", "1", "--out", out, *more]


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hones(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `hones ...`: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def fails(hones: Run, tmp_path: Path) -> Callable[..., str]:
    """Run a command that must fail with one line of error, which is returned, and leave nothing in `tmp_path`."""

    def run(*arguments: object) -> str:
        before = contents(tmp_path)
        code, out, error = hones(*arguments)
        assert (code, out, error.count("\n")) == (2, "", 1), error
        assert error.startswith("hones learn: error: ")
        assert contents(tmp_path) == before
        assert not (tmp_path / "run").exists()
        return error

    return run


@pytest.fixture(scope="module")
def gained(root: Path) -> tuple[Path, int, str]:
    """A search that gains: its folder, exit code and output."""
    out, printed = root / "gained", root / "printed"
    others = ["--others", f"places:anls={root / 'places.jsonl'}"]
    arguments = command(root, out, *GAINING, *others, "--description", "cats", "--license", "cc0-1.0")
    with printed.open("w") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        code = main([str(argument) for argument in arguments])
    return out, code, printed.read_text()


def profile_of(folder: Path) -> Profile:
    return load_profile(folder / "profiles" / "pets.safetensors")


# ------------------------------------------------------------------------------------------------- the way through


def test_help_teaches(hones: Run) -> None:
    code, out, _ = hones("learn", "--help")
    assert code == 0
    assert "hones learn MODEL " in out.partition("examples:")[2]
    assert "the exit code is 0" in out


def test_a_gain_is_said_with_its_interval_and_written_into_the_profile(
    root: Path, gained: tuple[Path, int, str]
) -> None:
    out, code, printed = gained
    assert code == 0
    profile = profile_of(out)
    evidence = profile.evidence
    assert (profile.task, profile.description, profile.license) == ("pets", "cats", "cc0-1.0")
    assert (evidence["split"], evidence["n"], evidence["metric"]) == ("test", 30, "exact match")
    assert evidence["gain_ci95"][0] > 0
    assert "test_used_before" not in evidence
    number, interval = r"[+−]?\d?\.\d{3}", r"\[−?\d?\.\d{3}, −?\d?\.\d{3}\]"
    said = rf"^pets: {number} {interval} on 30 test examples; others {number} {interval}$"
    assert re.search(said, printed, re.MULTILINE), printed
    assert re.search(r"^  places: ANLS \.\d+ → \.\d+, .* on 24$", printed, re.MULTILINE)
    # What is said is what is measured by hand.
    model, processor = load_model(str(root / "text"))
    for task, file, found in (
        (JsonlTask("pets", "exact_match", 1), "test", evidence),
        (JsonlTask("places", "anls", 1), "places", evidence["others"]["places"]),
    ):
        examples = load_jsonl(root / f"{file}.jsonl").examples
        for key, steering in (("base", None), ("steered", profile)):
            assert evaluate(model, processor, task, examples, steering=steering).value == pytest.approx(found[key])
    # With one other task the mean over the others is its own.
    places = evidence["others"]["places"]
    assert evidence["others_mean"]["gain"] == pytest.approx(places["steered"] - places["base"])
    assert evidence["others_mean"]["gain_ci95"] == pytest.approx(places["gain_ci95"])


def test_every_trial_is_in_the_profile_and_the_best_on_dev_is_it(gained: tuple[Path, int, str]) -> None:
    out, _, printed = gained
    method = profile_of(out).method
    search = method["search"]
    assert (search["tried"], search["planned"], search["ended_by"]) == (2, 2, "all tried")
    trials = search["trials"]
    assert [(t["selection"], t["size"], t["lr"], t["neurons"]) for t in trials.values()] == [
        ("fisher", 0.5, 0.3, 144),
        ("fisher", 0.3, 0.3, 86),
    ]
    best = max(trials.values(), key=lambda trial: (trial["metric"], trial["log_probability"]))
    assert trials[search["winner"]] == best
    assert (method["lr"], method["epoch"], method["chosen_on_dev"]["strength"]) == (
        best["lr"],
        best["epoch"],
        best["strength"],
    )
    for number, trial in enumerate(trials.values(), start=1):
        assert re.search(
            rf"^trial {number} of 2: .*on dev 0\.000 → {trial['metric']:.3f}; about .* left$", printed, re.M
        )
    assert f"{100 * best['size']:g}% of the neurons, learning rate 0.3, epoch {best['epoch']}" in printed


def test_the_last_line_serves_the_profile(root: Path, gained: tuple[Path, int, str]) -> None:
    out, _, printed = gained
    words = shlex.split(printed.splitlines()[-1])
    assert words == ["hones", "serve", str(root / "text"), "--profiles", str(out / "profiles")]
    assert list(ProfileStore(words[-1]).names()) == ["pets"]


def test_inspect_shows_the_trials_as_a_table_and_what_others_lose(hones: Run, gained: tuple[Path, int, str]) -> None:
    out, _, _ = gained
    code, printed, _ = hones("inspect", out / "profiles" / "pets.safetensors")
    assert code == 0
    assert re.search(r"^ +epoch +log_probability +lr +metric +neurons +selection +size +strength$", printed, re.M)
    assert re.search(r"^ +1 .* 144 +fisher +0\.5 ", printed, re.M)
    assert re.search(r"^ +places\n +base ", printed, re.M)


def test_again_it_gives_the_same_at_once_and_json_alone_on_standard_output(
    hones: Run, root: Path, gained: tuple[Path, int, str]
) -> None:
    out, _, printed = gained
    before = contents(out)
    arguments = command(root, out, *GAINING, "--others", f"places:anls={root / 'places.jsonl'}")
    code, text, error = hones(*arguments, "--json", "--description", "cats", "--license", "cc0-1.0")
    assert code == 0
    assert contents(out) == before
    result = json.loads(text)
    assert result == json.loads((out / "result.json").read_bytes())
    assert error.startswith("trial 1 of 2: ")
    assert (result["gained"], result["task"], result["examples"]) == (True, "pets", {"data": 40, "dev": 20, "test": 30})
    assert result["digest"] == profile_of(out).digest
    assert result["evidence"] == profile_of(out).evidence
    assert result["serve"] == printed.splitlines()[-1].strip()


def test_no_gain_is_said_and_no_profile_written_unless_it_is_to_be_kept(hones: Run, root: Path, tmp_path: Path) -> None:
    arguments = command(root, tmp_path / "run", *NOTHING)
    code, out, error = hones(*arguments)
    assert (code, error) == (1, "")
    assert "pets: no gain found: .000 [.000, .000] on 30 test examples" in out
    assert f"no profile is written (--keep would); results: {tmp_path / 'run' / 'result.json'}" in out
    assert "hones serve" not in out
    assert not (tmp_path / "run" / "profiles").exists()
    code, out, _ = hones(*arguments, "--keep")
    assert code == 1
    assert "no gain found" in out
    assert out.splitlines()[-1].startswith("  hones serve ")
    assert profile_of(tmp_path / "run").evidence["gain_ci95"] == [0, 0]
    # Without --keep again: the file stays, and is said to.
    code, out, _ = hones(*arguments, "--json")
    result = json.loads(out)
    assert (code, result["profile"], result["serve"]) == (1, None, None)
    assert result["left_from_before"] == str(tmp_path / "run" / "profiles" / "pets.safetensors")


def test_a_search_that_is_killed_goes_on_and_ends_in_the_same_bytes(
    hones: Run, root: Path, tmp_path: Path, gained: tuple[Path, int, str]
) -> None:
    folder, _, _ = gained
    killed = tmp_path / "beside" / "gained"
    more = [
        *GAINING,
        "--others",
        f"places:anls={root / 'places.jsonl'}",
        "--description",
        "cats",
        "--license",
        "cc0-1.0",
    ]
    arguments = [str(argument) for argument in command(root, killed, *more)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "RANK": "0"}
    script = [sys.executable, TESTS / "offline" / "killed_process.py", "0", "25", *arguments]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (killed / "result.json").exists()
    assert hones(*arguments)[0] == 0
    left, expected = contents(killed), contents(folder)
    for found in (left, expected):
        del found["work/clock.json"], found["result.json"]  # times, and paths
    assert left == expected


def test_python_gives_what_the_command_gives(root: Path, tmp_path: Path, gained: tuple[Path, int, str]) -> None:
    folder, _, _ = gained
    model, processor = load_model(str(root / "text"))
    pets, dev, test, places = (load_jsonl(root / f"{n}.jsonl").examples for n in ("data", "dev", "test", "places"))
    settings = SearchSettings(
        selections=("fisher",),
        sizes=(0.5, 0.3),
        grid=FitGrid(lrs=(0.3,), epochs=6, strengths=(1, 2)),
        fit=FitSettings(beta_kl=0, batch_size=8, accumulation_steps=1),
    )
    learned = learn(
        model,
        processor,
        JsonlTask("pets", "exact_match", 1),
        pets,
        run_dir=tmp_path / "run",
        dev=dev,
        test=test,
        others=[(JsonlTask("places", "anls", 1), places)],
        settings=settings,
    )
    profile = profile_of(folder)
    assert learned.gained
    assert learned.profile.digest == profile.digest
    assert learned.profile.evidence == profile.evidence
    assert learned.profile.method == profile.method
    assert learned.gain == profile.evidence["steered"] - profile.evidence["base"]


# --------------------------------------------------------------------------------------------- what is tried, and when


def test_trials_come_in_an_order_that_sees_something_of_everything_first() -> None:
    settings = SearchSettings(selections=("fisher", "dvp"), sizes=(0.01, 0.02), grid=FitGrid(lrs=(0.1, 0.2)))
    assert settings.plan == [
        Trial("fisher", 0.01, 0.1),
        Trial("fisher", 0.01, 0.2),
        Trial("fisher", 0.02, 0.1),
        Trial("dvp", 0.01, 0.1),
        Trial("fisher", 0.02, 0.2),
        Trial("dvp", 0.01, 0.2),
        Trial("dvp", 0.02, 0.1),
        Trial("dvp", 0.02, 0.2),
    ]
    first = SearchSettings().plan[0]
    assert first == Trial("fisher", 0.01, sorted(SearchSettings().grid.lrs)[1])  # the middle rate
    assert len(set(SearchSettings().plan)) == len(SearchSettings().plan) == 18
    assert replace(settings, sizes=(0.01, 0.01)).plan == replace(settings, sizes=(0.01,)).plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selections": ()}, "selections are empty"),
        ({"selections": ("fish",)}, "unknown method 'fish'"),
        ({"selections": ("ape",)}, "selection 'ape' compares all tasks of a comparison"),
        ({"selections": ("hones_logprob:damage",)}, "selection 'hones_logprob:damage' compares all tasks"),
        ({"sizes": ()}, "sizes are empty"),
        ({"sizes": (0.1, 2.0)}, r"top_fraction must lie in \(0, 1\], not 2.0"),
        ({"attribution_examples": 0}, "attribution_examples must be at least 1, not 0"),
        ({"fit": FitSettings(keep=3)}, "keep prunes a bank while it learns"),
    ],
)
def test_a_search_out_of_range_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        SearchSettings(**change)


SETTINGS = SearchSettings(
    selections=("fisher", "dvp"),
    sizes=(0.2, 0.1),
    grid=FitGrid(lrs=(0.3, 0.1), epochs=1, strengths=(1.0,)),
    fit=FitSettings(batch_size=8, accumulation_steps=1),
)
TASK = JsonlTask("pets", "exact_match", 1)


def examples(words: tuple[str, str] = ("cat", "dog"), last: str = "pet", count: int = 90) -> list[Example]:
    lines = records(words, last, count)
    return [Example(str(i), line["prompt"], tuple(line["targets"]), None) for i, line in enumerate(lines)]


class Forwards:
    """A clock that counts the forwards of a model's text decoder; with `interrupt_at` one of them is interrupted."""

    def __init__(self, p: Problem) -> None:
        self.count, self.interrupt_at = 0, None
        p.model.model.layers[0].register_forward_pre_hook(self)  # the decoder is also entered to see its inputs

    def __call__(self, *_: object) -> None:
        self.count += 1
        if self.count == self.interrupt_at:
            raise KeyboardInterrupt

    def now(self) -> float:
        return float(self.count)


@pytest.fixture
def p() -> Problem:
    return problem("llama", "text")


@pytest.fixture
def forwards(p: Problem, monkeypatch: pytest.MonkeyPatch) -> Forwards:
    """Time that does not depend on the machine."""
    counter = Forwards(p)
    monkeypatch.setattr(clock, "now", counter.now)
    return counter


def search(p: Problem, folder: Path, **more: Any) -> Learned:
    return learn(p.model, p.processor, TASK, examples(), run_dir=folder, **{"settings": SETTINGS, **more})


def test_a_budget_decides_how_many_trials_are_begun_and_nothing_else(
    p: Problem, forwards: Forwards, tmp_path: Path
) -> None:
    said: list[str] = []
    whole = search(p, tmp_path / "elsewhere" / "whole", say=said.append)
    assert (len(whole.search.rows), whole.search.to_json()["ended_by"]) == (8, "all tried")
    assert said[0].startswith("trial 1 of 8: fisher, 20% of the neurons, learning rate 0.3: ")
    taken = forwards.count

    folder = tmp_path / "run"
    part = search(p, folder, budget=0.6 * taken)
    assert 1 < len(part.search.rows) < 8
    assert part.search.to_json()["ended_by"] == "budget"
    assert part.search.rows == whole.search.rows[: len(part.search.rows)]
    assert forwards.count - taken < 0.6 * taken + 5  # no trial began that would have exceeded it
    before, counted = contents(folder), forwards.count
    # The same budget again: the same, at once.
    again = search(p, folder, budget=0.6 * taken)
    assert again.profile.evidence == part.profile.evidence
    assert again.profile.method == part.profile.method
    assert contents(folder) == before
    assert forwards.count - counted < 0.3 * taken  # to encode and to check the decoder
    # A larger one goes on with the next trials, and ends where a search without a budget does.
    said.clear()
    rest = search(p, folder, budget=9 * taken, say=said.append)
    assert rest.search.rows == whole.search.rows
    assert rest.profile.digest == whole.profile.digest
    assert rest.profile.method == whole.profile.method
    assert said[0].startswith("trial 1 of at most 8: ")
    # If another profile won, test had been seen by then.
    used = [part.profile.short_digest] if rest.profile.digest != part.profile.digest else []
    assert rest.profile.evidence.get("test_used_before", []) == used


@pytest.mark.usefixtures("forwards")
def test_a_budget_too_small_for_one_trial_is_refused_before_anything_is_written(p: Problem, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a budget of 20 s is too small for one trial, which takes about \d+ s here"):
        search(p, tmp_path / "run", budget=20)
    assert list(tmp_path.iterdir()) == []


def test_other_trials_than_before_are_refused_too_if_the_budget_is_over(
    p: Problem, forwards: Forwards, tmp_path: Path
) -> None:
    search(p, tmp_path, settings=replace(SETTINGS, selections=("fisher",), sizes=(0.2,)))
    with pytest.raises(DataError, match="is too small for one trial"):
        search(p, tmp_path, settings=replace(SETTINGS, selections=("dvp",)), budget=forwards.count)


def test_an_interrupted_search_counts_the_time_it_took(p: Problem, forwards: Forwards, tmp_path: Path) -> None:
    expected = search(p, tmp_path / "1" / "whole")
    taken, forwards.interrupt_at = forwards.count, 2 * forwards.count - 40
    with pytest.raises(KeyboardInterrupt):
        search(p, tmp_path / "2" / "run")
    state = json.loads((tmp_path / "2" / "run" / "work" / "clock.json").read_bytes())
    assert taken - 60 < state["seconds"] <= taken - 40
    assert 0 < state["trials"] < 8
    found = search(p, tmp_path / "2" / "run")
    assert found.profile.method == expected.profile.method
    assert found.profile.evidence == expected.profile.evidence


def test_the_clock_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time = 0.0
    monkeypatch.setattr(clock, "now", lambda: time)
    (tmp_path / "work").mkdir()
    first = Clock(tmp_path, 100)
    first.expect(30, 10)
    assert (first.per_trial, first.left(2)) == (30, 70)
    assert first.left(9) == 100  # the budget's, which ends before the trials do
    for _ in range(2):
        with first.trial():
            time += 20
    assert (first.spent, first.per_trial, first.allows_another()) == (40, 20, True)
    time = 1000.0
    second = Clock(tmp_path, 69)
    assert (second.trials, second.spent, second.per_trial) == (2, 40, 20)
    assert not second.allows_another()  # 40 + 20 + 10 is more
    assert Clock(tmp_path, 70).allows_another()
    assert Clock(tmp_path, None).allows_another()
    for text in ("[]", '{"seconds": "many"}'):
        (tmp_path / "work" / "clock.json").write_text(text)
        with pytest.raises(DataError, match=r"clock\.json is damaged .*; delete it and run again"):
            Clock(tmp_path, None)


def test_durations() -> None:
    assert [seconds_of(text) for text in ("90s", "20m", "1.5h", "1h30m")] == [90, 1200, 5400, 5400]
    assert [duration(seconds) for seconds in (0.2, 89, 90, 3600, 5400)] == ["1 s", "89 s", "2 min", "60 min", "1.5 h"]


# ------------------------------------------------------------------------------------------- test examples used before


def test_a_second_run_on_the_same_test_examples_says_so(hones: Run, root: Path, tmp_path: Path) -> None:
    runs = {name: tmp_path / name for name in ("first", "second", "third")}
    seeds = {"first": "1", "second": "2", "third": "3"}
    digests = {}
    for name, folder in runs.items():
        more = ["--dev", root / "places.jsonl"] if name == "third" else []
        code, out, _ = hones(*command(root, folder, *NOTHING, *more, "--seed", seeds[name], "--keep"))
        assert code == 1
        profile = profile_of(folder)
        digests[name] = profile.short_digest
        before = [digest for other, digest in digests.items() if other != name]
        assert sorted(profile.evidence.get("test_used_before", [])) == sorted(set(before))
        assert ("were scored before, with " in out) == bool(before)
    # Again it says what it said: its own first look was the first.
    code, out, _ = hones(*command(root, runs["first"], *NOTHING, "--seed", "1", "--json"))
    assert "test_used_before" not in json.loads(out)["evidence"]
    # In the same folder another search is another look.
    code, out, _ = hones(*command(root, runs["first"], *NOTHING, "--sizes", "0.1", "--json"))
    assert set(json.loads(out)["evidence"]["test_used_before"]) == set(digests.values())


def test_other_test_examples_other_models_and_other_places_are_no_second_run(p: Problem, tmp_path: Path) -> None:
    quick = replace(SETTINGS, selections=("fisher",), sizes=(0.1,), grid=replace(SETTINGS.grid, lrs=(0.1,)))
    pets, places = examples(), examples(("town", "mat"), "place")
    splits = {"dev": pets[40:60], "test": pets[60:]}

    def used(folder: Path, model: Any = p.model, **changes: Any) -> bool:
        more = {"settings": quick, **splits, **changes}
        learned = learn(model, p.processor, TASK, pets[:40], run_dir=folder, **more)
        return "test_used_before" in learned.profile.evidence

    assert not used(tmp_path / "beside" / "a")
    assert used(tmp_path / "beside" / "b")
    assert not used(tmp_path / "elsewhere" / "a")  # nobody could know
    assert not used(tmp_path / "beside" / "c", test=places[:30])
    assert used(tmp_path / "beside" / "d", test=[*places[30:60], pets[70]])  # one is enough
    other = problem("llama", "text").model
    other.model.norm.weight.data *= 2
    assert not used(tmp_path / "beside" / "e", model=other)
    note = tmp_path / "beside" / "f" / "work" / "tested-1.json"
    note.parent.mkdir(parents=True)
    note.write_text("{}")
    with pytest.raises(DataError, match=r"tested-1\.json is damaged"):
        used(tmp_path / "beside" / "g")


# ------------------------------------------------------------------------------------------------------ other tasks


def test_others_are_measured_and_their_data_contrasted_with(hones: Run, root: Path, tmp_path: Path) -> None:
    more = ["--others", f"places={root / 'places.jsonl'}", "--against", f"places={root / 'places-train.jsonl'}"]
    tried = [part for part in NOTHING if part not in ("--selections", "fisher")]
    code, out, _ = hones(*command(root, tmp_path / "run", *tried, *more, "--json"))
    assert code == 1
    result = json.loads(out)
    trials = result["method"]["search"]["trials"].values()
    assert [trial["selection"] for trial in trials] == ["fisher", "fisher:ratio", "dvp"]
    assert result["evidence"]["others"]["places"]["n"] == 24
    assert result["evidence"]["others_mean"] == {"gain": 0, "gain_ci95": [0, 0]}
    code, out, _ = hones(*command(root, tmp_path / "max", *NOTHING, *more[2:], "--selections", "fisher:max", "--json"))
    assert [t["selection"] for t in json.loads(out)["method"]["search"]["trials"].values()] == ["fisher:max"]


def test_what_is_measured_shares_no_image_with_what_is_found_on() -> None:
    pets, places = examples(), examples(("town", "mat"), "place")
    task, other = TASK, JsonlTask("places")
    parts = {"data": pets[:40], "dev": pets[40:60], "test": pets[60:]}
    SearchData(task, **parts, others=[(other, pets[60:])], against=[(other, places)])  # another question about the same
    for more, message in (
        ({"others": [(other, pets[39:41])]}, "Splits 'data' and 'others places' share example '39'"),
        ({"others": [(other, pets[50:70])]}, "Splits 'dev' and 'others places' share example '50'"),
        ({"against": [(other, [*places, pets[70]])]}, "Splits 'against places' and 'test' share example '70'"),
        ({"against": [(other, places)], "others": [(JsonlTask("x"), places)]}, "'against places' and 'others x' share"),
        ({"against": [(other, pets[30:40])]}, "10 examples of 'places' to contrast with are the task's own, the first"),
        ({"others": [(other, places), (other, places)]}, "others names task 'places' twice, or the task itself"),
        ({"against": [(task, places)]}, "against names task 'pets' twice, or the task itself"),
        ({"dev": pets[39:60]}, "Splits 'data' and 'dev' share example '39'"),
        ({"test": pets[59:]}, "Splits 'dev' and 'test' share example '59'"),
    ):
        with pytest.raises(DataError, match=re.escape(message)):
            SearchData(task, **{**parts, **more})


# --------------------------------------------------------------------------------------------------- one file of data


def divided(data: list[Example], dev: Any = None, test: Any = None, seed: int = 1) -> SearchData:
    return SearchData.divided(TASK, data, dev, test, seed=seed)


def test_one_file_is_divided_by_image(root: Path) -> None:
    data = load_jsonl(root / "images.jsonl").examples
    given = divided(data)
    check_disjoint(data=given.data, dev=given.dev, test=given.test)
    assert [len(part) for part in (given.data, given.dev, given.test)] == [40, 22, 22]  # whole images of two questions
    assert divided(data) == given
    assert divided(data, seed=2).dev != given.dev
    # What is given is taken, and only the rest drawn.
    own = examples(count=25)
    half = divided(data, test=own)
    assert (len(half.data), len(half.dev), half.test) == (62, 22, own)
    assert (len(divided(data, dev=own, test=own[:0] or examples(("a", "b"), "c", 20)).data)) == len(data)
    with pytest.raises(DataError, match="60 examples give 15 for dev, and 20 are needed; give at least 80, or dev"):
        divided(examples(count=60))


def test_one_file_is_enough_for_images_and_for_text(hones: Run, root: Path, tmp_path: Path) -> None:
    for model, data, counts in (("vlm", "images", [40, 22, 22]), ("text", "all", [46, 22, 22])):
        task = ["learn", root / model, "--task", "pets", "--data", root / f"{data}.jsonl", "--max-new-tokens", "1"]
        code, out, error = hones(*task, "--out", tmp_path / model, *NOTHING, "--json")
        assert code == 1, error
        assert list(json.loads(out)["examples"].values()) == counts


# ------------------------------------------------------------------------------------------------------- bad input


def test_splits_that_share_an_example_or_are_too_small(fails: Callable[..., str], root: Path, tmp_path: Path) -> None:
    run = command(root, tmp_path / "run", *NOTHING)
    assert "Splits 'data' and 'dev' share example '1'" in fails(*run, "--dev", root / "data.jsonl")
    assert "Splits 'dev' and 'test' share example '1'" in fails(*run, "--test", root / "dev.jsonl")
    assert "Splits 'data' and 'others x' share example" in fails(*run, "--others", f"x={root / 'data.jsonl'}")
    few = write(root / "few.jsonl", records(("cat", "dog"), "few", 19))
    assert "there are 19 usable dev examples, and at least 20 are needed to choose on; give more" in fails(
        *run, "--dev", few
    )
    assert "there are 19 usable test examples, and at least 20 are needed to measure a gain on" in fails(
        *run, "--test", few
    )


def test_dev_examples_that_cannot_be_used_do_not_count(fails: Callable[..., str], root: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (root / "images.jsonl").read_text().splitlines()]
    dev = write(root / "dev-images.jsonl", [*lines[:19], {**lines[19], "image": "missing.png"}])
    run = ["learn", root / "vlm", "--task", "pets", "--data", write(root / "rest-images.jsonl", lines[20:50]), *NOTHING]
    run += ["--dev", dev, "--test", write(root / "test-images.jsonl", lines[50:]), "--max-new-tokens", "1"]
    assert "there are 19 usable dev examples" in fails(*run, "--out", tmp_path / "run", "--max-failures", "0.2")


def test_a_budget_that_is_none_or_too_small(fails: Callable[..., str], root: Path, tmp_path: Path) -> None:
    run = command(root, tmp_path / "run", *NOTHING)
    for text in ("20", "soon", "-3m", "20 m", ""):
        assert f"the budget {text!r} is no duration; write a number and a unit" in fails(*run, f"--budget={text}")
    assert "the budget must be positive, not 0 seconds" in fails(*run, "--budget", "0m")
    assert "a budget of 1 s is too small for one trial" in fails(*run, "--budget", "0.001s")


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (["a cat sits"], ["--metric", "bleu4"], "'1': its target 'a cat sits' scores 0 itself, and an empty answer 0;"),
        (["a"], ["--metric", "vqa"], "'1': its target 'a' scores 1 itself, and an empty answer 1;"),
        (["the cat sits on"], [], "its target 'the cat sits on' is longer than the 1 tokens that the model may write"),
        (["katze"], [], "'1': the model's tokenizer cannot write its target 'katze'; correct them, or choose another"),
    ],
)
def test_targets_that_the_metric_cannot_score(
    fails: Callable[..., str], root: Path, tmp_path: Path, targets: list[str], options: list[str], message: str
) -> None:
    lines = [{**line, "targets": targets} for line in records(("cat", "dog"), "other", 20)]
    tokens = [] if "longer" in message else ["--max-new-tokens", "8"]
    run = command(root, tmp_path / "run", *NOTHING, *options, *tokens)
    error = fails(*run, "--dev", write(root / "unscorable.jsonl", lines))
    assert "cannot score 20 of the 20 dev examples, the first being " in error
    assert message in error


def test_a_few_targets_that_cannot_be_scored_are_counted(hones: Run, root: Path, tmp_path: Path) -> None:
    lines = records(("cat", "dog"), "few", 20)
    lines[3]["targets"] = ["the cat sits"]
    run = command(root, tmp_path / "run", *NOTHING, "--test", write(root / "some.jsonl", lines))
    code, out, _ = hones(*run)
    assert code == 1
    assert (
        "note: 1 examples score 0 whatever the model writes, the first being test 4: its target 'the cat sits'" in out
    )


def test_a_model_that_is_steered_already(
    fails: Callable[..., str], root: Path, tmp_path: Path, gained: tuple[Path, int, str]
) -> None:
    profile = profile_of(gained[0])
    merge_into(profile, root / "text", root / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (root / "merged" / name).exists()
    run = command(root, tmp_path / "run", *NOTHING)
    run[1] = root / "merged"
    assert f"the model '{root / 'merged'}' is steered already: a profile is merged into it; learn on the orig" in fails(
        *run
    )
    model, processor = load_model(str(root / "text"))
    with steer(model, {"pets": profile}) as steering:
        for folded in (False, True):
            if folded:
                steering.fold("pets")
            with pytest.raises(StateError, match=r"the model is steered already; detach\(\) its Steering before"):
                learn(model, processor, TASK, examples(), run_dir=tmp_path / "run")
    merged, _ = load_model(str(root / "merged"))
    with pytest.raises(DataError, match="is steered already: a profile is merged into it"):
        learn(merged, processor, TASK, examples(), run_dir=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_tasks_and_files_given_wrongly(fails: Callable[..., str], root: Path, tmp_path: Path) -> None:
    run = command(root, tmp_path / "run", *NOTHING)
    places = f"places={root / 'places.jsonl'}"
    for text in ("places.jsonl", "=places.jsonl", "places="):
        assert f"--others {text!r} names no task with its file; write NAME=FILE" in fails(*run, "--others", text)
    assert "task 'ocr' has a metric of its own; write ocr=x.jsonl" in fails(*run, "--others", "ocr:anls=x.jsonl")
    assert "Unknown metric 'beauty'" in fails(*run, "--others", "x:beauty=x.jsonl")
    assert "others names task 'places' twice" in fails(*run, "--others", places, places)
    assert "others names task 'pets' twice, or the task itself" in fails(
        *run, "--others", f"pets={root / 'places.jsonl'}"
    )
    assert "no selection compares tasks, so that `against` has no effect" in fails(*run, "--against", places)
    assert "selection 'fisher:ratio' compares tasks; give another task's examples (against)" in fails(
        *run, "--selections", "fisher:ratio"
    )
    assert "unknown method 'fish'" in fails(*run, "--selections", "fish")
    assert "lrs must be positive, not -1.0" in fails(*run, "--lr", "-1")
    assert "top_fraction must lie in (0, 1], not 0.0" in fails(*run, "--sizes", "0")
    assert "no.jsonl" in fails(*run, "--others", "x=no.jsonl")


def test_a_folder_with_other_things_or_another_search_in_it(hones: Run, root: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    code, _, error = hones(*command(root, tmp_path, *NOTHING))
    assert code == 2
    assert f"{tmp_path} is not empty and holds no search; choose another folder" in error
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "thesis.tex").unlink()
    assert hones(*command(root, tmp_path, *NOTHING))[0] == 1
    before = contents(tmp_path)
    code, _, error = hones(*command(root, tmp_path, *NOTHING, "--limit", "30"))
    assert code == 2
    assert "work holds a run with other settings: " in error
    assert contents(tmp_path) == before


def test_a_method_that_the_model_cannot_be_run_with_is_refused_before_the_work(
    hones: Run, root: Path, tmp_path: Path
) -> None:
    run = command(root, tmp_path / "run", *NOTHING, "--memory-gb", "1e-9", "--selections", "fisher")
    code, _, error = hones(*run)
    assert code == 2
    assert "selection 'fisher': " in error
    assert not (tmp_path / "run").exists()
