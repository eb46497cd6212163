"""The cloze tasks of examples/smollm2: well formed, right by rule where a rule exists, disjoint; and its scripts."""

import importlib
import json
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tiny_models
from hones_offline.data.examples import Example, load_jsonl
from hones_offline.data.tasks import JsonlTask
from hones_offline.running.evaluation import score
from hones_offline.running.models import load_model
from hones_offline.running.prompts import prepare
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hones_steer import ModelIdentity, Profile
from hones_steer.scopes import SCOPES

ROOT = Path(__file__).parents[2]
DATA = ROOT / "examples" / "smollm2" / "data"
SPLITS = ("discovery", "dev", "test")
DEV_TASKS = ("antonyms", "capitals", "french", "past_tense", "sums")
FRESH_TASKS = (
    *("countries", "kinds", "languages", "nouns", "numerals", "participles", "percentages", "plurals", "professions"),
)
TASKS = (*DEV_TASKS, *FRESH_TASKS)
WORD_TASKS = ("antonyms", "capitals", "french", "nouns", "participles", "past_tense", "plurals")

DOUBLED = frozenset(
    """
    admit ban beg begin bet brag chat chop clap commit control cut dig drag drop equip fit forbid forget get grab grin
    hit hop hug jog knit let nod occur pat permit plan plug prefer put quit refer regret rob rub run scan set ship shop
    shut sit skip slip spin spit split stab step stir stop submit swap swim tap transfer trim trip win wrap zip
    """.split()  # noqa: SIM905
)
PLURALS_IN_OES = "echo hero mango mosquito potato tomato tornado torpedo veto volcano".split()  # noqa: SIM905
CHANGED_ENDINGS = {"man": "men", "sis": "ses", "xis": "xes", "us": "i", "fe": "ves", "f": "ves", "a": "ae"}
CHANGED_ENDINGS |= {"um": "a", "on": "a", "ix": "ices", "child": "children", "ouse": "ice", "oot": "eet"}
OTHER_PLURALS = {"goose": "geese", "ox": "oxen", "person": "people", "die": "dice", "quiz": "quizzes"}
OTHER_PLURALS |= {"stomach": "stomachs", "penny": "pennies", "tooth": "teeth"}
IRREGULAR_IN_ED = {"bleed": "bled", "breed": "bred", "feed": "fed", "flee": "fled", "lead": "led"}


def examples(task: str) -> list[Example]:
    return [example for split in SPLITS for example in load_jsonl(DATA / split / f"{task}.jsonl").examples]


def facts(task: str) -> list[tuple[str, list[str]]]:
    """(what is asked, right answers)."""
    return [(example.id, [target.strip() for target in example.targets]) for example in examples(task)]


def answers(task: str) -> Iterator[tuple[str, str]]:
    return ((asked, answer) for asked, right in facts(task) for answer in right)


def test_the_files_are_what_the_script_makes_of_the_lists(tmp_path: Path) -> None:
    run("examples.smollm2.make_data", "--output", tmp_path)
    made = {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.rglob("*.jsonl")}
    assert made == {file.relative_to(DATA): file.read_bytes() for file in DATA.rglob("*") if file.is_file()}
    assert {str(name) for name in made} == {f"{split}/{task}.jsonl" for split in SPLITS for task in TASKS}


@pytest.mark.parametrize("task", TASKS)
def test_each_task_has_a_few_hundred_facts_in_three_splits(task: str) -> None:
    sizes = {split: len(load_jsonl(DATA / split / f"{task}.jsonl").examples) for split in SPLITS}
    assert 200 <= sum(sizes.values()) <= (300 if task in DEV_TASKS else 600)
    assert sizes["discovery"] >= 80
    assert sizes["dev"] >= 40
    assert sizes["test"] >= 70


@pytest.mark.parametrize("task", TASKS)
def test_nothing_is_asked_twice_and_the_worked_examples_are_not_asked(task: str) -> None:
    everything = examples(task)
    asked = [example.prompt.splitlines()[-1].casefold() for example in everything]
    assert len(set(asked)) == len(asked)
    (shown,) = {tuple(example.prompt.splitlines()[:-1]) for example in everything}
    assert len(shown) == 2
    for question in asked:
        assert not any(line.casefold().startswith(f"{question.rstrip()} ") for line in shown)


@pytest.mark.parametrize("task", WORD_TASKS)
def test_no_word_occurs_twice_so_that_no_split_gives_away_another(task: str) -> None:
    """Nor is a fact asked the other way round: hot -> cold here and cold -> hot there."""
    words = [word.casefold() for asked, right in facts(task) for word in (asked, right[0])]
    assert len(set(words)) == len(words)
    shown = examples(task)[0].prompt.casefold().splitlines()[:-1]
    assert not [word for word in words if any(line.endswith(f" {word}") for line in shown)]


@pytest.mark.parametrize("task", TASKS)
def test_texts_are_clean_and_one_space_stands_before_each_answer(task: str) -> None:
    for example in examples(task):
        for target in example.targets:
            text = example.prompt + target
            assert example.prompt.endswith(" ") != target.startswith(" "), text
            assert text == text.strip(), text
            assert "  " not in text, text
            assert unicodedata.is_normalized("NFC", text), text
        assert len({target.casefold() for target in example.targets}) == len(example.targets), example


def test_sums_are_right_and_differ_by_more_than_their_order() -> None:
    seen = set()
    for asked, right in facts("sums"):
        a, b = map(int, asked.split(" + "))
        assert min(a, b) >= 10
        assert max(a, b) <= 99
        assert right == [str(a + b)]
        seen.add(frozenset({a, b}))
    assert len(seen) == len(facts("sums"))


def test_a_capital_does_not_give_itself_away() -> None:
    """Luxembourg, Mexico City or Tunis could be copied from the question."""
    for country, capital in answers("capitals"):
        assert capital.casefold() not in country.casefold()
        assert country.casefold() not in capital.casefold()
        assert capital[0].isupper()


def test_past_tenses_in_ed_are_spelled_by_the_rules() -> None:
    for verb, past in answers("past_tense"):
        assert past != verb
        if past.endswith("ed"):
            assert past in (regular(verb), IRREGULAR_IN_ED.get(verb))


def regular(verb: str) -> str:
    if verb.endswith("e"):
        return f"{verb}d"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return f"{verb[:-1]}ied"
    return f"{verb}{verb[-1]}ed" if verb in DOUBLED else f"{verb}ed"


def test_antonyms_and_french_words_are_other_words_than_their_answers() -> None:
    for task in ("antonyms", "french"):
        for asked, answer in answers(task):
            assert answer.casefold() != asked.casefold()


def test_french_is_spelled_with_french_letters() -> None:
    for word, right in facts("french"):
        assert re.fullmatch(r"[a-zA-Zàâæçéèêëîïôœùûüÿ'-]+", word)
        assert "oe" not in word, "œ in cœur, œil, œuf, sœur"
        assert all(answer.isascii() for answer in right)


def test_dev_and_fresh_tasks_are_apart() -> None:
    script = importlib.import_module("examples.smollm2.make_data")
    assert set(script.DEV_TASKS) == set(DEV_TASKS)
    assert set(script.FRESH_TASKS) == set(FRESH_TASKS)
    assert list(script.TASKS) == [*script.DEV_TASKS, *script.FRESH_TASKS]


@pytest.mark.parametrize("task", FRESH_TASKS)
def test_no_fresh_answer_stands_in_its_question_but_as_a_stem(task: str) -> None:
    """Nothing can be copied: a form differs from its word, and a kind or a country is not part of a name."""
    for asked, answer in answers(task):
        assert answer.casefold() not in re.split(r"[ -]", asked.casefold()), (asked, answer)
        assert not answer.startswith("a "), "the article stands in the sentence"


def test_participles_are_spelled_by_the_rules() -> None:
    special = {"be": "being", "see": "seeing", "agree": "agreeing", "flee": "fleeing", "free": "freeing"}
    special |= {"die": "dying", "lie": "lying", "tie": "tying", "travel": "traveling"}
    for verb, right in facts("participles"):
        stem = f"{verb}{verb[-1]}" if verb in DOUBLED else verb.removesuffix("e")
        assert right[0] == special.get(verb, f"{stem}ing")
        assert len(right) == 1 or verb == "travel"


def test_plurals_are_spelled_by_the_rules() -> None:
    changed = 0
    for noun, right in facts("plurals"):
        assert noun not in right, "sheep, fish, series"
        if right[0] in irregular_plurals(noun):
            changed += 1
        elif noun.endswith("y") and noun[-2] not in "aeiou":
            assert right == [f"{noun[:-1]}ies"]
        elif noun.endswith(("s", "x", "z", "ch", "sh")) or noun in PLURALS_IN_OES:
            assert right[0] == f"{noun}es"
        else:
            assert right == [f"{noun}s"]
    assert changed > 50


def irregular_plurals(noun: str) -> list[str]:
    if noun in OTHER_PLURALS:
        return [OTHER_PLURALS[noun]]
    return [noun.removesuffix(old) + new for old, new in CHANGED_ENDINGS.items() if noun.endswith(old)]


def test_numerals_count_what_is_spelled_out() -> None:
    values = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    small = {word: n for n, word in enumerate((values + " seventeen eighteen nineteen").split(), 1)}
    tens = "twenty thirty forty fifty sixty seventy eighty ninety".split()  # noqa: SIM905
    small |= {word: 10 * n for n, word in enumerate(tens, 2)}
    for asked, right in facts("numerals"):
        before, hundred, after = asked.rpartition("hundred")
        total = 100 * small[before.strip()] if hundred else 0
        total += sum(small[word] for word in re.split(r"[ -]", after.strip()) if word)
        assert right == [str(total)]
        assert 1 <= total <= 999


def test_percentages_are_a_hundred_times_the_number() -> None:
    for asked, (percentage,) in facts("percentages"):
        assert re.fullmatch(r"0\.\d{0,2}[1-9]", asked)
        assert re.fullmatch(r"[1-9]?\d(\.[1-9])?%", percentage)
        assert Decimal(percentage.removesuffix("%")) == 100 * Decimal(asked)


def test_no_city_of_countries_is_among_the_capitals() -> None:
    capitals = {answer for _, answer in answers("capitals")}
    named = capitals | {asked for asked, _ in facts("capitals")}
    for city, right in facts("countries"):
        assert city not in named
        assert all(country[0].isupper() or country.startswith("the ") for country in right)


@pytest.mark.parametrize("task", ["countries", "kinds", "professions"])
def test_no_answer_to_many_questions_is_the_answer_to_most(task: str) -> None:
    """Writing the most frequent answer always would not do well."""
    every = [right[0] for _, right in facts(task)]
    assert max(map(every.count, every)) <= 0.15 * len(every)
    assert len(set(every)) >= 15


# ---------------------------------------------------------------------------------------------- the run script


def test_known_facts_are_those_that_the_model_answers_right(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = importlib.import_module("examples.smollm2.run")
    loaded, tokenizer = load_model(str(model))
    prompts = ["one", "two", "three", "four", "five", "six"]
    written = score(
        prepare(
            loaded,
            tokenizer,
            JsonlTask("sums", "exact_match", script.MAX_NEW_TOKENS),
            [Example(prompt, prompt, ("?",), None) for prompt in prompts],
        ),
        batch_size=2,
    ).outputs
    for split in SPLITS:
        (tmp_path / split).mkdir()
        rows = [
            {"id": prompt, "prompt": prompt, "targets": [str(text) if prompt in ("two", "five", "six") else "?"]}
            for prompt, text in zip(prompts, written, strict=True)
        ]
        (tmp_path / split / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(script, "DATA", tmp_path)
    splits = script.encode(loaded, tokenizer, "sums", 2, known=True, work=tmp_path / "work")
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*.safetensors")}
    assert len(kept) == 3
    again = script.encode(loaded, tokenizer, "sums", 2, known=True, work=tmp_path / "work")
    assert [part.examples for part in again.values()] == [part.examples for part in splits.values()]
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert {example.id for example in splits["discovery"].examples} == {"two", "five", "six"}
    assert len(splits["dev"]) == len(splits["test"]) == 2
    assert score(splits["test"], batch_size=2).value == 1
    assert len(script.encode(loaded, tokenizer, "sums", None, known=False)["test"]) == 6


@pytest.fixture
def few_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts read only the first facts of each file."""
    for split in SPLITS:
        (tmp_path / "data" / split).mkdir(parents=True)
        for task in ("capitals", "sums"):
            lines = (DATA / split / f"{task}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            (tmp_path / "data" / split / f"{task}.jsonl").write_text("".join(lines[:8]), encoding="utf-8")
    for script in ("run", "scopes"):
        monkeypatch.setattr(importlib.import_module(f"examples.smollm2.{script}"), "DATA", tmp_path / "data")


@pytest.mark.usefixtures("few_facts")
def test_a_model_that_knows_nothing_has_no_known_facts(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--model", model, "--out", tmp_path / "run", "--known"]
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, command)])
    with pytest.raises(SystemExit, match="the model answers none of the discovery facts of capitals right; leave --kn"):
        importlib.import_module("examples.smollm2.run").main()


def run(module: str, *arguments: object) -> str:
    command = [sys.executable, "-W", "error::UserWarning", "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights that reads bytes."""
    folder = tmp_path_factory.mktemp("model")
    alphabet = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    llama = tiny_models.llama(vocab_size=len(alphabet))
    llama.generation_config.eos_token_id = [2]
    llama.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("few_facts")
def test_the_run_script_goes_from_base_to_selections_and_repeats_itself(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only that it runs and what it writes: a random model knows nothing."""
    script = importlib.import_module("examples.smollm2.run")
    command = ["--model", model, "--out", tmp_path / "run", "--tasks", "capitals", "sums"]
    command += ["--seeds", 2, "--attribution-examples", 2, "--top-heads", 2, "--limit", 3]
    command += ["--methods", "random", "dvp", "hones_logprob", "--fractions", 0.05, 0.1, "--fraction", 0.05]
    stages = [stage for stage in script.STAGES if stage != "steer_groups"]  # which learns for every group
    command += ["--learned-seeds", 1, "--stages", *stages, "--contrast-tasks"]  # with no task
    command += ["--ablations", "zero", "mean", "--reference", "dvp", "--levels", 0.5]
    command += ["--selections", "dvp", "--comparators", "grid_search", "ia3", "--epochs", 1]
    command += ["--lrs", 0.02, "--lora-lrs", 0.001]
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, command)])
    script.main()
    out = capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_bytes())
    assert {task: row["n"]["test"] for task, row in summary["tasks"].items()} == {"capitals": 3, "sums": 3}
    assert [(row["task"], row["method"], row["fraction"]) for row in summary["masking"]] == [
        (task, method, fraction)
        for task in ("capitals", "sums")
        for method in ("random", "dvp", "hones_logprob")
        for fraction in (0.05, 0.1)
    ]
    assert {row["seeds"] for row in summary["masking"]} == {2}
    assert {row["seeds"] for row in (*summary["steering"], *summary["selections"]["rows"])} == {1}
    assert summary["finding"]["bystanders"] == {"capitals": ["sums"], "sums": ["capitals"]}
    assert out.count("| dvp | mean | 10.00% | 0.00 [0.00, 0.00] | 0.00 [0.00, 0.00] |") == 1
    assert "| random | zero | 0.5 | – | – | 0% |" in out
    assert {row["strength"] for row in summary["strength"]} == {-1, 0.5, 1, 1.5, 2}
    assert out.count("| ia3 | 288 | +0.000 [0.00, 0.00] | – | +0.000 [0.00, 0.00] |") == 1
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "work").rglob("*") if file.is_file()}
    script.main()
    assert capsys.readouterr().out == out
    again = json.loads((tmp_path / "run" / "summary.json").read_bytes())
    assert {**again, "created": "", "seconds": {}} == {**summary, "created": "", "seconds": {}}
    assert {file: file.stat().st_mtime_ns for file in before} == before


# ------------------------------------------------------------------------------------------------------ scopes


def test_the_scopes_steer_what_they_say(model: Path) -> None:
    """The model's own answers count as right, so a steered answer counts as wrong."""
    script = importlib.import_module("examples.smollm2.scopes")
    loaded, tokenizer = load_model(str(model))
    neurons = np.arange(loaded.config.intermediate_size, dtype=np.int32)
    scales = np.full(len(neurons), -2, dtype=np.float32)
    profile = Profile("sums", {0: (neurons, scales)}, ModelIdentity.from_model(loaded))
    short, long = (JsonlTask("sums", "exact_match", tokens) for tokens in (1, 6))
    prompts = ["one", "twenty", "three = ", "4"]

    def right(task: JsonlTask, scope: str | None) -> npt.NDArray[np.float64]:
        asked = [Example(prompt, prompt, ("?",), None) for prompt in prompts]
        own = score(prepare(loaded, tokenizer, task, asked), batch_size=2).outputs
        examples = [Example(e.id, e.prompt, (str(text),), None) for e, text in zip(asked, own, strict=True)]
        answered: npt.NDArray[np.float64] = script.answers(loaded, tokenizer, task, examples, profile, scope)
        return answered

    assert right(long, None).all()
    for scope in SCOPES:
        assert not right(long, scope).all()
    assert right(short, "generated").all()  # the prompt's last token chooses the first one
    assert not right(short, "prompt").all()


@pytest.mark.usefixtures("few_facts")
def test_the_table_of_scopes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--model", model, "--out", tmp_path / "run", "--tasks", "capitals", "sums", "--limit", 3, "--epochs", 1]
    monkeypatch.setattr(sys, "argv", ["scopes.py", *map(str, command)])
    script = importlib.import_module("examples.smollm2.scopes")
    script.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| task | n | untouched | all | prompt | generated |"
    assert [line.split("|")[1:4] for line in lines[2:]] == [
        [" capitals ", " 3 ", " 0.00 "],
        [" sums ", " 3 ", " 0.00 "],
        [" mean ", " 6 ", " "],
    ]
    assert script.cells([np.array([[1.0, 0.0, 1.0, 0.0]]), np.array([[0.0, 0.0]])]).startswith("+0.25 [0.00, ")
