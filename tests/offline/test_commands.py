"""`hones attribute | fit | evaluate`: a user's own model and data, files to files; and everything given wrongly."""

import csv
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import mixture_models
import numpy as np
import pytest
from hones_offline.attribution.contrast import contrasted
from hones_offline.commands.result import read_bank
from hones_offline.data.examples import load_jsonl
from hones_offline.data.neurons import Importance, NeuronIndex
from hones_offline.data.scenes import scenes
from hones_offline.data.tasks import JsonlTask
from hones_offline.running.embedded import checkpoint
from hones_offline.running.evaluation import intervention, position_means, score
from hones_offline.running.models import load_model
from hones_offline.running.prompts import prepare
from PIL import Image
from problems import problem
from safetensors.numpy import load_file, save_file
from tiny_processors import text_tokenizer
from transformers import MambaConfig, MambaForCausalLM

from hones_steer.cli import main
from hones_steer.profile import load_profile

DATA = Path(__file__).parent / "data" / "coco_excerpt.json"
SMALL = ["--head-metric", "logprob", "--top-fraction", "0.05"]
QUICK = [*SMALL, "--method", "hones", "--top-heads", "4"]
FIT = ["--epochs", "1", "--lr", "0.05", "--accumulation-steps", "1"]
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
def fails(hones: Run) -> Callable[..., str]:
    """Run a command that must fail: exit code 2, no output, one line of error, which is returned."""

    def run(*arguments: object) -> str:
        code, out, error = hones(*arguments)
        assert code == 2, out + error
        assert out == ""
        lines = error.splitlines()
        assert len(lines) == 1, error
        assert lines[0].startswith(f"hones {arguments[0]}: error: ")
        return lines[0]

    return run


def save(folder: Path, model: object, processor: object) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, records: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models `vlm` and `text`; data `cats.jsonl`, `dev.jsonl` (with images) and `text.jsonl`, `text-dev.jsonl`."""
    root = tmp_path_factory.mktemp("commands")
    vlm, text = problem("llava", "vqa"), problem("llama", "text")
    save(root / "vlm", vlm.model, vlm.processor)
    save(root / "text", text.model, text.processor)
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    for name, count in {"cats": 6, "dev": 4}.items():
        records = []
        for i in range(count):
            image = f"images/{name}-{i}.png"
            Image.fromarray(rng.integers(0, 255, (20 + i, 24, 3), dtype=np.uint8)).save(root / image)
            records.append(
                {"image": image, "prompt": f"what is the {['cat', 'dog'][i % 2]}", "targets": ["red", "a cat"]}
            )
        write_jsonl(root / f"{name}.jsonl", records)
    for name, count in {"text": 6, "text-dev": 4}.items():
        words = ["red", "blue", "green", "cat", "dog", "town"]
        records = [{"prompt": f"{name} is {words[i]}", "targets": [words[-i], "one"]} for i in range(count)]
        write_jsonl(root / f"{name}.jsonl", records)
    return root


@pytest.fixture(scope="module")
def found(root: Path) -> Path:
    """The run folder of `hones attribute` on the VLM and its own task `cats`."""
    folder = root / "runs" / "cats"
    command = ["attribute", root / "vlm", "--task", "cats", "--data", root / "cats.jsonl", "--out", folder, *QUICK]
    assert main([str(argument) for argument in command]) == 0
    return folder


@pytest.fixture(scope="module")
def profile(root: Path, found: Path) -> Path:
    """The profile of `hones fit` for it, with evidence."""
    path = root / "cats.safetensors"
    command = ["fit", root / "vlm", "--task", "cats", "--data", root / "cats.jsonl", "--bank", found]
    command += ["--dev", root / "dev.jsonl", "--out", path, *FIT]
    assert main([str(argument) for argument in command]) == 0
    return path


def listing(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


# ------------------------------------------------------------------------------------------- the way through


@pytest.mark.parametrize("command", ["attribute", "fit", "evaluate"])
def test_help_shows_an_example(hones: Run, command: str) -> None:
    code, out, _ = hones(command, "--help")
    assert "%%" not in out, "argparse takes a description as it is where it names no %(prog)s"
    assert code == 0
    assert f"hones {command} " in out.partition("example")[2]


def test_attribute_writes_its_bank_and_says_what_it_found(hones: Run, root: Path, tmp_path: Path) -> None:
    command = ["attribute", root / "vlm", "--task", "cats", "--data", root / "cats.jsonl", "--out", tmp_path, *QUICK]
    code, out, error = hones(*command)
    assert (code, error) == (0, "")
    result = json.loads((tmp_path / "result.json").read_bytes())
    size = sum(map(len, result["bank"].values()))
    assert size == round(0.05 * 3 * 96)
    assert 1 <= len(result["heads"]) <= 4
    assert result["n"] == 6
    assert f"cats: {size} neurons in {len(result['bank'])} layers, from 6 examples" in out
    assert f"results: {tmp_path}" in out

    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    code, out, error = hones(*command, "--json")
    assert (code, error) == (0, "")
    assert json.loads(out) == result
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_papers_protocol_goes_from_the_command_line_into_every_run(hones: Run, root: Path, tmp_path: Path) -> None:
    common = [root / "vlm", "--task", "vqa", "--data", root / "cats.jsonl", "--limit", "3"]
    command = ["attribute", *common, "--out", tmp_path / "run", *QUICK]
    assert hones(*command, "--protocol", "paper")[0] == 0
    run = json.loads((tmp_path / "run" / "run.json").read_bytes())
    assert (run["protocol"], run["first_line"], run["max_new_tokens"]) == ("paper", True, 24)
    assert json.loads((tmp_path / "run" / "result.json").read_bytes())["protocol"] == "paper"
    code, _, error = hones(*command)
    assert code == 2
    assert "protocol was 'paper' and now is 'default'" in error

    command = ["fit", *common, "--bank", tmp_path / "run", "--out", tmp_path / "vqa.safetensors", *FIT]
    for protocol in ("paper", "default"):
        state = tmp_path / protocol
        more = ["--test", root / "dev.jsonl", "--protocol", protocol, "--state", state]
        assert hones(*command, *more)[0] == 0
        assert json.loads((state / "run.json").read_bytes())["protocol"] == protocol
        evidence = load_profile(tmp_path / "vqa.safetensors").evidence
        assert evidence.get("protocol", "default") == protocol

    for protocol in ("paper", "default"):
        code, out, _ = hones("evaluate", *common, "--protocol", protocol, "--json")
        assert code == 0
        assert json.loads(out)["protocol"] == protocol


def test_the_first_line_of_a_task_of_ones_own(hones: Run, root: Path, tmp_path: Path) -> None:
    command = ["attribute", root / "text", "--task", "words", "--data", root / "text.jsonl", *QUICK]
    for name, more in {"lines": ["--first-line"], "texts": []}.items():
        assert hones(*command, "--out", tmp_path / name, *more)[0] == 0
        run = json.loads((tmp_path / name / "run.json").read_bytes())
        assert (run["first_line"], run["protocol"], run["max_new_tokens"]) == (name == "lines", "default", 32)


def test_attribute_by_another_method_says_which(hones: Run, root: Path, tmp_path: Path) -> None:
    command = ["attribute", root / "text", "--task", "words", "--data", root / "text.jsonl", *SMALL]
    assert hones(*command, "--out", tmp_path / "default")[0] == 0
    result = json.loads((tmp_path / "default" / "result.json").read_bytes())
    assert (result["method"], result["options"], result["heads"]) == ("fisher", {}, [])
    code, out, _ = hones(*command, "--out", tmp_path / "dvp", "--method", "dvp", "--target", "centred")
    assert code == 0
    assert "strongest heads" not in out
    result = json.loads((tmp_path / "dvp" / "result.json").read_bytes())
    assert (result["method"], result["options"], result["heads"]) == ("dvp", {"target": "centred"}, [])
    options = ["--target", "centred", "--positive-part", "example", "--head-weights", "rank"]
    assert hones(*command, "--out", tmp_path / "hones", "--method", "hones", "--top-heads", "4", *options)[0] == 0
    varied = json.loads((tmp_path / "hones" / "result.json").read_bytes())
    assert varied["heads"][0][2] == 1
    assert varied["bank"] != result["bank"]
    code, _, error = hones(*command, "--out", tmp_path / "ap", "--method", "ap", "--target", "centred")
    assert (code, error.count("\n")) == (2, 1)
    assert "method 'ap' takes no target; leave it out" in error


@pytest.fixture(scope="module")
def dogs(root: Path) -> Path:
    """The run folder of `hones attribute` on the VLM and another task, other questions about the same images."""
    lines = [json.loads(line) for line in (root / "cats.jsonl").read_text().splitlines()]
    records = [{**line, "prompt": f"{line['prompt']} like", "targets": ["a dog"]} for line in lines]
    data, folder = write_jsonl(root / "dogs.jsonl", records), root / "runs" / "dogs"
    command = ["attribute", root / "vlm", "--task", "dogs", "--data", data, "--out", folder, *QUICK]
    assert main([str(argument) for argument in command]) == 0
    return folder


@pytest.fixture
def vqa(root: Path, tmp_path: Path) -> list[object]:
    """`hones attribute` on a third task of the VLM."""
    records = [{"image": f"images/dev-{i}.png", "prompt": "what is it", "targets": ["red"]} for i in range(4)]
    data = write_jsonl(root / "vqa.jsonl", records)
    return ["attribute", root / "vlm", "--task", "vqa", "--data", data, "--out", tmp_path / "vqa", *QUICK]


def steps(folder: Path) -> dict[str, int]:
    """Files of what a run has computed, with the time of each."""
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    for name in ("result.json", "importance.safetensors"):
        del times[name]
    assert any(name.startswith("importance-") for name in times)  # or the test says nothing
    return times


def test_attribute_against_other_tasks(hones: Run, found: Path, dogs: Path, vqa: list[object], tmp_path: Path) -> None:
    assert hones(*vqa)[0] == 0
    result = json.loads((tmp_path / "vqa" / "result.json").read_bytes())
    assert (result["against"], result["contrast"], len(result["examples"])) == ({}, None, 4)
    paths = [tmp_path / "vqa", found, dogs]
    index = NeuronIndex.dense((96,) * 3)
    own, *others = (Importance(index, load_file(path / "importance.safetensors")["importance"]) for path in paths)
    assert own.bank(0.05).to_json() == result["bank"]
    before = steps(tmp_path / "vqa")
    digests = [own.bank(0.05).digest]
    for contrast, options in {
        "ratio": ["--against", found, dogs],
        "max": ["--against", found, "--against", dogs, "--contrast", "max"],
    }.items():
        code, out, error = hones(*vqa, *options)
        assert (code, error) == (0, "")
        assert f"contrast: {contrast} to cats, dogs" in out
        result = json.loads((tmp_path / "vqa" / "result.json").read_bytes())
        expected = contrasted(own, others, contrast, 0.05).bank(0.05)
        assert result["bank"] == expected.to_json()
        assert (result["against"], result["contrast"]) == ({"cats": str(found), "dogs": str(dogs)}, contrast)
        digests.append(expected.digest)
    assert len(set(digests)) == 3
    # Nothing was computed again, and what the run is contrasted by itself is as it was.
    assert steps(tmp_path / "vqa") == before
    np.testing.assert_array_equal(load_file(tmp_path / "vqa" / "importance.safetensors")["importance"], own.values)
    code, out, error = hones(*vqa, "--against", found, "--top-fraction", "0.1", "--json")
    assert (code, error) == (0, "")
    assert json.loads(out)["bank"] == contrasted(own, others[:1], "ratio", 0.1).bank(0.1).to_json()


def test_attribute_against_a_run_that_cannot_be_compared(
    fails: Callable[..., str], hones: Run, root: Path, found: Path, dogs: Path, vqa: list[object], tmp_path: Path
) -> None:
    def copy(name: str, **changes: object) -> Path:
        folder = shutil.copytree(found, tmp_path / name)
        result = json.loads((folder / "result.json").read_bytes())
        (folder / "result.json").write_text(json.dumps(result | changes))
        return folder

    def refused(*options: object) -> str:
        message = fails(*vqa, *options)
        assert not (tmp_path / "vqa").exists()  # before any work
        return message

    other = copy("other")
    same_task = "are runs of the same task, 'cats'; name one of them in --against"
    assert f"{found} and {other} {same_task}" in refused("--against", found, dogs, other)
    assert f"{found} and {found} {same_task}" in refused("--against", found, "--against", found)
    own = tmp_path / "vqa" / ".." / "vqa"
    message = refused("--against", found, own)
    assert f"--against names {own}, the folder of this run (--out); name runs of other tasks" in message
    assert "result.json is missing; the run that should have written it is not finished" in refused(
        "--against", tmp_path
    )
    assert "is a run of the same task, 'vqa'; name runs of other tasks in --against" in refused(
        "--against", copy("same", task="vqa")
    )
    assert "--contrast says how to compare with other runs; name them with --against" in refused("--contrast", "max")
    assert "was found with method 'hones' and this run has 'dvp'; importances of different methods" in refused(
        "--against", found, "--method", "dvp", "--top-heads", "30"
    )
    for option, value, message in (
        ("--head-metric", "task", "was found with head_metric 'logprob' and this run has 'task'; importances of diff"),
        ("--target", "centred", "was found with target 'paper' and this run has 'centred'; importances of different"),
        ("--top-heads", "5", "was found with top_heads 4 and this run has 5; importances of different options cannot"),
    ):
        assert message in refused("--against", found, option, value)
    assert "method 'random' draws its importances" in refused(
        "--against", found, "--method", "random", "--top-heads", "30"
    )
    lines = [*(root / "vqa.jsonl").read_text().splitlines(), (root / "cats.jsonl").read_text().splitlines()[1]]
    (root / "mixed.jsonl").write_text("\n".join(lines))
    assert (
        f"1 of the 5 examples in --data are those of {found} as well (the first has the id '5': same image, prompt and "
        "targets); give each task examples of its own"
    ) in refused("--against", dogs, found, "--data", root / "mixed.jsonl")
    for content in ("[]", '{"task": "cats", "bank": {}, "options": 3, "examples": []}'):
        (other / "result.json").write_text(content)
        assert "result.json is no result of `hones attribute`; run it again" in refused("--against", other)
    damaged = copy("damaged")
    for array in (np.zeros(287, np.float32), np.zeros(288), np.full(288, np.nan, np.float32)):
        save_file({"importance": array}, damaged / "importance.safetensors")
        assert "importance.safetensors is damaged (it holds no importance, float32 [288])" in refused(
            "--against", damaged
        )
    (damaged / "importance.safetensors").unlink()
    assert "importance.safetensors is missing" in refused("--against", damaged)
    text = ["--task", "words", "--data", root / "text.jsonl", "--out", tmp_path / "words", *QUICK]
    assert hones("attribute", root / "text", *text)[0] == 0
    assert f"{tmp_path / 'words'} holds the importance of another model; run" in refused(
        "--against", tmp_path / "words"
    )


def test_attribute_against_an_old_result_which_the_same_command_completes(
    fails: Callable[..., str], hones: Run, root: Path, vqa: list[object], tmp_path: Path
) -> None:
    old = tmp_path / "old"
    command = ["attribute", root / "vlm", "--task", "cats", "--data", root / "cats.jsonl", "--out", old, *QUICK]
    assert hones(*command)[0] == 0
    complete = {path.name: path.read_bytes() for path in old.iterdir()}
    result = json.loads(complete["result.json"])
    (old / "result.json").write_text(json.dumps({k: v for k, v in result.items() if k not in ("options", "examples")}))
    computed = steps(old)
    (old / "importance.safetensors").unlink()
    message = fails(*vqa, "--against", old)
    assert f"{old} holds the result of an older version, without its importance; run its `hones attribute`" in message
    assert hones(*command)[0] == 0
    assert {path.name: path.read_bytes() for path in old.iterdir()} == complete
    assert steps(old) == computed
    assert hones(*vqa, "--against", old)[0] == 0


@pytest.mark.parametrize("method", ["hones", "hones_no_kl", "random_neurons", "sparse", "fixed_amp", "grid_search"])
def test_fit_writes_a_profile_with_its_evidence(
    hones: Run, root: Path, found: Path, tmp_path: Path, method: str
) -> None:
    path = tmp_path / "cats.safetensors"
    command = ["fit", root / "vlm", "--task", "cats", "--data", root / "cats.jsonl", "--bank", found, "--out", path]
    command += ["--dev", root / "dev.jsonl", "--method", method, "--state", tmp_path / "state"]
    command += [] if method in ("fixed_amp", "grid_search") else FIT
    code, out, error = hones(*command, "--description", "cats, red", "--license", "cc0-1.0", "--json")
    assert (code, error) == (0, "")
    result, fitted = json.loads(out), load_profile(path)
    bank = json.loads((found / "result.json").read_bytes())["bank"]
    assert result["digest"] == fitted.digest
    assert fitted.method["name"] == method
    assert (fitted.task, fitted.description, fitted.license) == ("cats", "cats, red", "cc0-1.0")
    assert fitted.evidence["n"] == 4
    assert fitted.evidence["split"] == "dev"
    sizes = {str(layer): len(neurons) for layer, (neurons, _) in fitted.layers.items()}
    assert fitted.num_neurons == sum(map(len, bank.values()))
    assert sizes == {layer: len(neurons) for layer, neurons in bank.items()} or method == "sparse"
    assert (result["warning"] is None) == (method == "fixed_amp")
    same = all(neurons.tolist() == bank[str(layer)] for layer, (neurons, _) in fitted.layers.items())
    assert same == (method not in ("random_neurons", "sparse"))
    scales = np.concatenate([scales for _, scales in fitted.layers.values()])
    if method in ("fixed_amp", "grid_search"):
        assert len(set(scales.tolist())) == 1
        assert (scales == fitted.method["factor"]).all()
    else:
        assert (scales != 1).all()
    assert fitted.method.get("beta_kl", 0) == (0.05 if method in ("hones", "random_neurons", "sparse") else 0)

    code, out, error = hones("inspect", path)
    assert (code, error) == (0, "")
    for text in ("cats, red", method, "exact match", "gain_ci95"):
        assert text in out


def test_fit_again_gives_the_same_bytes_at_once(hones: Run, root: Path, found: Path, profile: Path) -> None:
    before = profile.read_bytes()
    command = ["fit", root / "vlm", "--task", "cats", "--data", root / "cats.jsonl", "--bank", found]
    code, out, _ = hones(*command, "--dev", root / "dev.jsonl", "--out", profile, *FIT)
    assert code == 0
    assert "on 4 dev examples" in out
    assert profile.read_bytes() == before


def test_fit_chooses_on_dev_and_has_its_evidence_from_test(hones: Run, root: Path, tmp_path: Path) -> None:
    path, state = tmp_path / "p.safetensors", tmp_path / "state"
    data = [root / "text", "--task", "words", "--data", root / "text.jsonl"]
    assert hones("attribute", *data, "--out", tmp_path / "run", *QUICK)[0] == 0
    test = write_jsonl(tmp_path / "test.jsonl", [{"prompt": "big is", "targets": ["blue"]}] * 3)
    command = ["fit", *data, "--bank", tmp_path / "run", "--out", path, "--state", state]
    command += ["--dev", root / "text-dev.jsonl", "--test", test]
    command += ["--lr", "0.01", "0.1", "--epochs", "3", "--patience", "1", "--strengths", "1", "2"]
    code, out, error = hones(*command, "--json")
    assert (code, error) == (0, "")
    result = json.loads(out)
    trials = json.loads((state / "trials.json").read_bytes())
    assert result["trials"] == trials
    assert {trial["lr"] for trial in trials} == {0.01, 0.1}
    assert {trial["strength"] for trial in trials} == {1, 2}
    best = max(trials, key=lambda trial: (trial["metric"], trial["log_probability"]))
    method = load_profile(path).method
    assert (method["lr"], method["epoch"], method["chosen_on_dev"]["strength"]) == (
        best["lr"],
        best["epoch"],
        best["strength"],
    )
    assert load_profile(path).evidence == result["evidence"]
    assert (result["evidence"]["split"], result["evidence"]["n"], result["warning"]) == ("test", 3, None)
    before, written = path.read_bytes(), listing(state)
    code, out, _ = hones(*command)
    assert (path.read_bytes(), listing(state)) == (before, written)
    assert f"chosen on dev in {len(trials)} trials: learning rate {best['lr']:g}, epoch {best['epoch']}, " in out
    assert "on 3 test examples" in out
    assert "note:" not in out
    # Without test data dev's own number is shown, with a warning.
    code, out, _ = hones(*(part for part in command if part not in ("--test", test)))
    assert code == 0
    assert "on 4 dev examples" in out
    assert "note: dev chose this profile, so its gain there is optimistic" in out


def test_test_examples_that_cannot_be_used_are_named(hones: Run, root: Path, found: Path, tmp_path: Path) -> None:
    shutil.copy(root / "images" / "dev-0.png", tmp_path / "new.png")
    records = [{"image": name, "prompt": "what", "targets": ["red"]} for name in ("new.png", "missing.png")]
    command = ["fit", root / "vlm", "--task", "cats", "--data", root / "cats.jsonl", "--bank", found]
    command += ["--test", write_jsonl(tmp_path / "test.jsonl", records), "--out", tmp_path / "p.safetensors", *FIT]
    code, out, _ = hones(*command, "--state", tmp_path / "state", "--max-failures", "0.5", "--json")
    assert code == 0
    result = json.loads(out)
    assert result["evidence"]["n"] == 1
    [(name, reason)] = result["failures"].items()
    assert name == "test 2"
    assert "missing.png" in reason


def test_a_strength_is_given_without_dev(hones: Run, root: Path, found: Path, tmp_path: Path) -> None:
    path = tmp_path / "cats.safetensors"
    command = ["fit", root / "vlm", "--task", "cats", "--data", root / "cats.jsonl", "--bank", found, "--out", path]
    command += [*FIT, "--state", tmp_path / "state"]
    assert hones(*command)[0] == 0
    once = load_profile(path)
    assert hones(*command, "--strengths", "2")[0] == 0
    assert load_profile(path).digest == (once * 2).digest


def test_evaluate_measures_steering_and_masking(hones: Run, root: Path, found: Path, profile: Path) -> None:
    command = ["evaluate", root / "vlm", "--task", "cats", "--data", root / "dev.jsonl", "--metric", "bleu4"]
    code, out, error = hones(*command, "--profile", profile, "--mask", found, "--random-banks", "2", "--json")
    assert (code, error) == (0, "")
    result = json.loads(out)
    masks = [f"{found} masked", *(f"{found} random bank {i} masked" for i in range(2))]
    assert set(result["rows"]) == {"base", str(profile), *masks}
    assert result["rows"]["base"]["difference_ci95"] == [0, 0]
    assert len({result["rows"][name]["neurons"] for name in masks}) == 1
    assert result["n"] == 4
    code, out, _ = hones(*command, "--profile", profile)
    assert code == 0
    assert "cats: BLEU-4 on 4 examples" in out
    assert f"  {profile}  " in out


def test_evaluate_sets_masked_neurons_to_their_means(hones: Run, root: Path, found: Path) -> None:
    command = ["evaluate", root / "vlm", "--task", "cats", "--data", root / "dev.jsonl", "--metric", "anls"]
    command += ["--mask", found, "--random-banks", "1", "--json"]
    rows = {}
    for ablation in ("zero", "mean"):
        code, out, error = hones(*command, "--ablation", ablation)
        assert (code, error) == (0, "")
        rows[ablation] = json.loads(out)["rows"]
        assert {row.get("ablation") for row in rows[ablation].values()} == {None, ablation}
    model, processor = load_model(str(root / "vlm"))
    examples = load_jsonl(root / "dev.jsonl").examples
    prepared = prepare(model, processor, JsonlTask("cats", "anls", 32), examples)
    bank = read_bank(found).for_model(model)
    for ablation, fill in (("zero", None), ("mean", position_means(prepared, batch_size=2))):
        with intervention(prepared, mask=bank, fill=fill):
            expected = score(prepared, batch_size=4).value
        assert rows[ablation][f"{found} masked"]["value"] == pytest.approx(expected)
    assert rows["zero"] != rows["mean"]


def test_a_text_only_model_with_a_task_of_its_own(hones: Run, root: Path, tmp_path: Path) -> None:
    common = [root / "text", "--task", "words", "--data"]
    assert hones("attribute", *common, root / "text.jsonl", "--out", tmp_path / "run", *QUICK)[0] == 0
    path = tmp_path / "words.safetensors"
    code, out, _ = hones("fit", *common, root / "text.jsonl", "--bank", tmp_path / "run", "--out", path, *FIT)
    assert code == 0
    assert load_profile(path).evidence == {}
    assert f"digest {load_profile(path).short_digest}" in out
    code, out, _ = hones("evaluate", *common, root / "text-dev.jsonl", "--profile", path, "--json")
    assert code == 0
    assert set(json.loads(out)["rows"]) == {"base", str(path)}


def test_the_papers_coco_file(hones: Run, root: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    records = json.loads(DATA.read_bytes())["data"]
    for info in (record["image_info"] for record in records):
        pixels = rng.integers(0, 255, (info["height"] // 8, info["width"] // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / info["file_name"])
    command = ["attribute", root / "vlm", "--task", "retrieval", "--data", DATA, "--images", tmp_path]
    command += ["--negatives", "3", "--limit", "6", "--method", "hones", "--top-heads", "3"]
    command += ["--out", tmp_path / "run", "--json"]
    code, out, error = hones(*command)
    assert (code, error) == (0, "")
    result = json.loads(out)
    assert (result["metric"], result["n"], result["failures"]) == ("NDCG@5", 6, {})

    (tmp_path / records[2]["image_info"]["file_name"]).unlink()
    command = ["evaluate", root / "vlm", "--task", "vqa", "--data", DATA, "--images", tmp_path, "--max-failures", "0.2"]
    code, out, error = hones(*command)
    assert (code, error) == (0, "")
    assert "vqa: VQA accuracy on 9 examples" in out
    assert "1 examples could not be used" in out
    assert (
        f"  {records[2]['image_id']}: Image '{tmp_path / records[2]['image_info']['file_name']}' cannot be read" in out
    )


def gqa_file(root: Path, folder: Path, name: str, images: Sequence[str]) -> Path:
    """GQA's questions about images `cats-0`, `dev-0` ... that lie in `root`/images, where GQA's would be .jpg."""
    (folder / "gqa").mkdir(exist_ok=True)
    for image in images:
        Image.open(root / "images" / f"{image}.png").save(folder / "gqa" / f"{image}.jpg")
    question = {"question": "what is the cat", "answer": "red", "isBalanced": True}
    path = folder / f"{name}_balanced_questions.json"
    path.write_text(json.dumps({f"0{i}": {**question, "imageId": image} for i, image in enumerate(images)}))
    return path


def test_a_published_dataset_from_attribution_to_measurement(hones: Run, root: Path, tmp_path: Path) -> None:
    train = gqa_file(root, tmp_path, "train", [f"cats-{i}" for i in range(6)])
    dev = gqa_file(root, tmp_path, "val", ["dev-0", "dev-1"])
    test = gqa_file(root, tmp_path, "testdev", ["dev-2", "dev-3"])
    common = [root / "vlm", "--task", "vqa", "--images", tmp_path / "gqa", "--data"]
    run, out = tmp_path / "run", tmp_path / "p.safetensors"
    assert hones("attribute", *common, train, "--out", run, *QUICK)[0] == 0
    assert hones("fit", *common, train, "--dev", dev, "--bank", run, "--out", out, *FIT)[0] == 0
    assert load_profile(out).evidence["n"] == 2
    apart = ["--apart-from", train, "--apart-from", dev]
    code, text, error = hones("evaluate", *common, test, "--profile", out, *apart)
    assert (code, error) == (0, "")
    assert "vqa: VQA accuracy on 2 examples" in text


def test_a_split_of_flickr30k(hones: Run, root: Path, tmp_path: Path) -> None:
    data = tmp_path / "flickr_annotations_30k.csv"
    with data.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["raw", "sentids", "split", "filename", "img_id"])
        for i in range(6):
            captions, split = json.dumps([f"a cat {i}", f"the dog {i}"]), ["train", "test"][i % 2]
            rows.writerow([captions, f"[{2 * i}, {2 * i + 1}]", split, f"cats-{i}.png", i])
    command = ["evaluate", root / "vlm", "--task", "retrieval", "--negatives", "2", "--images", root / "images"]
    code, out, error = hones(*command, "--data", f"{data}:test", "--apart-from", f"{data}:train")
    assert (code, error) == (0, "")
    assert "retrieval: NDCG@5 on 3 examples" in out


def test_a_trained_model_with_the_papers_head_scores(hones: Run, tmp_path: Path) -> None:
    """The embedded model, loaded from its folder as any other, transcribing the text in its generated scenes."""
    for split, count in {"discovery": 8, "dev": 12}.items():
        records = []
        for i, scene in enumerate(scenes(split, count)):
            scene.image().save(tmp_path / f"{split}-{i}.png")
            records.append({"image": f"{split}-{i}.png", "prompt": "Transcribe", "targets": [scene.text]})
        write_jsonl(tmp_path / f"{split}.jsonl", records)
    run, path = tmp_path / "run", tmp_path / "ocr.safetensors"
    common = [checkpoint(), "--task", "ocr", "--data"]
    data = [*common, tmp_path / "discovery.jsonl"]
    assert hones("attribute", *data, "--out", run, "--top-fraction", "0.1")[0] == 0
    assert hones("fit", *data, "--bank", run, "--out", path, *FIT)[0] == 0
    code, out, error = hones("evaluate", *common, tmp_path / "dev.jsonl", "--profile", path, "--mask", run, "--json")
    assert (code, error) == (0, "")
    rows = json.loads(out)["rows"]
    assert rows["base"]["value"] > 0.1  # it reads; how it writes what it read is another thing
    assert set(rows) == {"base", str(path), f"{run} masked"}
    assert hones("verify", path, checkpoint())[0] == 0


# ------------------------------------------------------------------------------------------- data given wrongly


def test_some_unusable_images_are_counted_and_named(hones: Run, root: Path, tmp_path: Path) -> None:
    data = broken_images(root, tmp_path)
    command = ["evaluate", root / "vlm", "--task", "cats", "--data", data, "--max-failures", "0.5"]
    code, out, error = hones(*command)
    assert (code, error) == (0, "")
    assert "on 4 examples" in out
    assert "2 examples could not be used:" in out
    code, out, _ = hones(*command, "--json")
    failures = json.loads(out)["failures"]
    assert set(failures) == {"2", "5"}
    assert "missing.png" in failures["2"]
    assert "broken.png" in failures["5"]


def test_too_many_unusable_images_are_an_error(fails: Callable[..., str], root: Path, tmp_path: Path) -> None:
    data = broken_images(root, tmp_path)
    before = listing(tmp_path)
    command = ["attribute", root / "vlm", "--task", "cats", "--data", data, "--out", tmp_path / "run", *QUICK]
    error = fails(*command)
    assert "2 of 6 examples cannot be used, more than max_failures=0.05 allows; the first is " in error
    assert "missing.png" in error or "broken.png" in error
    assert listing(tmp_path) == before


def test_no_usable_example_is_an_error_whatever_is_allowed(
    fails: Callable[..., str], root: Path, tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [{"image": "no.png", "prompt": "x", "targets": ["y"]}] * 2)
    command = ["evaluate", root / "vlm", "--task", "cats", "--data", data, "--max-failures", "1"]
    assert "2 of 2 examples cannot be used" in fails(*command)


def broken_images(root: Path, folder: Path) -> Path:
    shutil.copytree(root / "images", folder / "images")
    (folder / "images" / "broken.png").write_bytes(b"\x89PNG nothing")
    records = [json.loads(line) for line in (root / "cats.jsonl").read_text().splitlines()]
    records[1]["image"], records[4]["image"] = "images/missing.png", "images/broken.png"
    return write_jsonl(folder / "data.jsonl", records)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no usable example: 0 skipped; first reason: it is empty"),
        ("\n \n", "has no usable example"),
        ('{"prompt": "x", "targets": ["y"]}\n{"prompt": "x", \n', "line 2: is not valid JSON"),
        ('{"prompt": "x", "targets": ["y"]}\n[1]\n', "line 2: not a JSON object"),
        ('{"prompt": "x", "targets": []}\n', 'line 1: "targets" must be a list of at least one non-blank text'),
        ('{"prompt": "x", "targets": [" "]}\n', 'line 1: "targets" must be'),
        ('{"prompt": "x"}\n', 'line 1: "targets" must be'),
        ('{"targets": ["y"]}\n', 'line 1: "prompt" must be'),
        ('{"prompt": "x", "targets": ["y"], "image": 3}\n', 'line 1: "image" must be a file name'),
    ],
)
def test_a_bad_data_file(fails: Callable[..., str], root: Path, tmp_path: Path, content: str, message: str) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(content)
    error = fails("attribute", root / "text", "--task", "words", "--data", data, "--out", tmp_path / "run")
    assert message in error
    assert str(data) in error
    assert list(tmp_path.iterdir()) == [data]


def test_a_missing_data_file(fails: Callable[..., str], root: Path, tmp_path: Path) -> None:
    for name in ("no.jsonl", "no.json"):
        command = ["evaluate", root / "text", "--task", "vqa", "--data", tmp_path / name, "--images", tmp_path]
        assert f"Data file '{tmp_path / name}' cannot be read: No such file or directory" in fails(*command)


def test_a_coco_file_without_images_or_with_a_task_it_lacks(fails: Callable[..., str], root: Path) -> None:
    command = ["evaluate", root / "vlm", "--data", DATA, "--task"]
    assert "name its image folder with --images" in fails(*command, "vqa")
    assert "has no task 'color'; choose one of vqa, ocr, caption, retrieval" in fails(
        *command, "color", "--images", "."
    )


def test_retrieval_needs_candidates(fails: Callable[..., str], root: Path) -> None:
    command = ["evaluate", root / "vlm", "--task", "retrieval", "--data", root / "cats.jsonl"]
    assert "Example '1' has no candidates to rank" in fails(*command)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "0"], "--limit must be at least 1, not 0"),
        (["--limit", "-3"], "--limit must be at least 1, not -3"),
        (["--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        (["--max-failures", "-0.1"], "--max-failures is a share from 0 to 1, not -0.1"),
        (["--max-failures", "nan"], "--max-failures is a share from 0 to 1, not nan"),
        (["--max-new-tokens", "0"], "can't answer in 0 tokens"),
        (["--top-heads", "0"], "top_heads must be at least 1, not 0"),
        (["--top-fraction", "0"], "top_fraction must lie in (0, 1], not 0.0"),
        (["--top-fraction", "-1"], "top_fraction must lie in (0, 1], not -1.0"),
        (["--seed", "-1"], "seed must lie in [0, 2**32), not -1"),
        (["--task", "none"], "'none' can't name a task"),
        (
            ["--protocol", "paper"],
            "--protocol paper is for vqa, ocr, caption, retrieval; for task 'words' give --first",
        ),
        (["--task", "vqa", "--first-line"], "--first-line is for tasks of your own; for task 'vqa' give --protocol"),
        (["--device", "abacus"], "there is no device 'abacus' here"),
    ],
)
def test_a_number_or_name_out_of_range(
    fails: Callable[..., str], root: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    command = ["attribute", root / "text", "--task", "words", "--data", root / "text.jsonl", "--out", tmp_path / "run"]
    assert message in fails(*command, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_options_of_attribution_are_checked_before_data_and_model(fails: Callable[..., str], tmp_path: Path) -> None:
    nothing = [
        "attribute",
        tmp_path / "model",
        "--task",
        "words",
        "--data",
        tmp_path / "no.jsonl",
        "--out",
        tmp_path / "r",
    ]
    assert "method 'ap' takes no target" in fails(*nothing, "--method", "ap", "--target", "centred")
    assert "top_heads must be at least 1, not 0" in fails(*nothing, "--top-heads", "0")
    assert "method 'fisher' scores no heads; leave top_heads=8 out, or choose 'hones'" in fails(
        *nothing, "--top-heads", "8"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "epochs must be positive, not 0"),
        (["--lr", "-1"], "lr must be positive, not -1.0"),
        (["--beta-kl", "nan"], "beta_kl must be zero or positive, not nan"),
        (["--fit-batch-size", "0"], "batch_size must be positive, not 0"),
        (["--accumulation-steps", "-2"], "accumulation_steps must be positive, not -2"),
        (["--seed", "-1"], "seed must lie in"),
        (["--method", "random_neurons", "--seed", "-1"], "seed must lie in"),
    ],
)
def test_fit_settings_out_of_range(
    fails: Callable[..., str], root: Path, found: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    before = listing(found)
    command = ["fit", root / "vlm", "--task", "cats", "--data", root / "cats.jsonl", "--bank", found]
    assert message in fails(*command, "--out", tmp_path / "p.safetensors", *arguments)
    assert list(tmp_path.iterdir()) == []
    assert listing(found) == before


def test_usage_errors_name_what_is_missing(hones: Run, root: Path, found: Path, tmp_path: Path) -> None:
    common = [root / "vlm", "--task", "cats", "--data", root / "cats.jsonl"]
    code, _, error = hones("fit", *common, "--bank", found, "--out", tmp_path / "p", "--method", "grid_search")
    assert code == 2
    assert error.endswith("hones fit: error: grid_search chooses its factor on --dev data\n")
    fit = ["fit", *common, "--bank", found, "--out", tmp_path / "p"]
    for option, message in (
        (["--lr", "0.1", "0.2"], "--lr has several values to choose from on --dev data; give that, or one value"),
        (["--strengths", "1", "2"], "--strengths has several values to choose from on --dev data; give that, or one"),
        (["--patience", "3"], "--patience counts epochs on --dev data; give that, or leave it out"),
        (["--method", "fixed_amp", "--lr", "0.1"], "fixed_amp learns nothing, so that --lr has no effect; leave it"),
        (["--method", "grid_search", "--epochs", "3"], "grid_search learns nothing, so that --epochs has no effect"),
    ):
        code, _, error = hones(*fit, *option)
        assert code == 2
        assert f"hones fit: error: {message}" in error
    code, _, error = hones("evaluate", *common, "--random-banks", "3")
    assert code == 2
    assert error.endswith("hones evaluate: error: --random-banks stand beside the bank of a --mask\n")
    code, _, error = hones("evaluate", *common, "--ablation", "mean")
    assert code == 2
    assert error.endswith("hones evaluate: error: --ablation is of the banks of a --mask\n")
    code, _, error = hones("evaluate", *common, "--metric", "beauty")
    assert code == 2
    assert "invalid choice: 'beauty'" in error


def test_dev_data_that_shares_an_image_with_the_data_is_refused(
    fails: Callable[..., str], root: Path, found: Path, tmp_path: Path
) -> None:
    command = ["fit", root / "vlm", "--task", "cats", "--data", root / "cats.jsonl", "--bank", found]
    error = fails(*command, "--dev", root / "cats.jsonl", "--out", tmp_path / "p.safetensors")
    assert "Splits 'data' and 'dev' share image" in error
    error = fails(
        *command, "--dev", root / "dev.jsonl", "--test", root / "dev.jsonl", "--out", tmp_path / "p.safetensors"
    )
    assert "Splits 'dev' and 'test' share image" in error


def test_test_data_that_shares_an_image_with_other_data_is_refused(
    fails: Callable[..., str], root: Path, tmp_path: Path
) -> None:
    own = ["evaluate", root / "vlm", "--task", "cats", "--data", root / "dev.jsonl", "--limit", "1", "--apart-from"]
    record = {"image": str(root / "images" / "dev-0.png"), "prompt": "what", "targets": ["red"]}
    other = write_jsonl(tmp_path / "discovery.jsonl", [{**record, "image": str(root / "images" / "dev-1.png")}, record])
    error = fails(*own, root / "cats.jsonl", "--apart-from", other)
    assert f"Splits '--data' and '--apart-from {other}' share image '{root / 'images' / 'dev-0.png'}'" in error
    files = [gqa_file(root, tmp_path, "train", ["cats-0", "dev-1"]), gqa_file(root, tmp_path, "val", ["dev-1"])]
    gqa = ["--task", "vqa", "--images", tmp_path / "gqa", "--data", files[0], "--apart-from", files[1]]
    assert f"share image '{tmp_path / 'gqa' / 'dev-1.jpg'}'" in fails("evaluate", root / "vlm", *gqa)
    fit = ["fit", root / "vlm", *gqa[:-2], "--dev", files[1], "--bank", tmp_path, "--out", tmp_path / "p.safetensors"]
    assert f"Splits 'data' and 'dev' share image '{tmp_path / 'gqa' / 'dev-1.jpg'}'" in fails(*fit)


def test_an_image_folder_that_is_not_there(fails: Callable[..., str], root: Path, tmp_path: Path) -> None:
    command = ["evaluate", root / "vlm", "--task", "vqa", "--data", DATA, "--images", tmp_path / "no"]
    assert f"--images {tmp_path / 'no'} is no folder" in fails(*command)


# ------------------------------------------------------------------------------------------- models given wrongly


def damaged(source: Path, target: Path, change: Callable[[Path], object]) -> Path:
    shutil.copytree(source, target)
    change(target)
    return target


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        ("text", lambda f: (f / "config.json").unlink(), "there is no {}/config.json; name a model folder"),
        ("text", lambda f: (f / "config.json").write_text("{"), "is not a valid JSON file"),
        ("text", lambda f: edit_config(f, model_type="future"), "model type `future`"),
        ("text", lambda f: edit_config(f, model_type="t5"), "Unrecognized configuration class"),
        (
            "text",
            lambda f: edit_config(f, intermediate_size=64),
            "has shape [32, 96], where config.json asks for [32, 64]",
        ),
        (
            "text",
            lambda f: edit_config(f, num_hidden_layers=4),
            "lacks 9 of its weights, the first being 'model.layers.3.",
        ),
        ("text", lambda f: (f / "model.safetensors").unlink(), "cannot load the weights of '{}': "),
        ("text", lambda f: os.truncate(f / "model.safetensors", 5000), "cannot load the weights of '{}': "),
        ("text", lambda f: (f / "tokenizer.json").unlink(), "cannot load the tokenizer of '{}': "),
        ("vlm", lambda f: (f / "processor_config.json").unlink(), "cannot load the processor of '{}': "),
    ],
)
def test_a_damaged_model_folder(
    fails: Callable[..., str],
    root: Path,
    tmp_path: Path,
    source: str,
    change: Callable[[Path], object],
    message: str,
) -> None:
    model = damaged(root / source, tmp_path / "model", change)
    command = ["attribute", model, "--task", "words", "--data", root / "text.jsonl", "--out", tmp_path / "run"]
    assert message.format(model) in fails(*command)
    assert list(tmp_path.iterdir()) == [model]


def test_a_model_that_does_not_exist(fails: Callable[..., str], root: Path, tmp_path: Path) -> None:
    for name in (tmp_path / "nothing", "./nothing", "nobody/nothing"):
        command = ["evaluate", name, "--task", "words", "--data", root / "text.jsonl"]
        assert f"cannot load the model '{name}': " in fails(*command)


def test_a_model_that_attribution_does_not_count_the_neurons_of(
    fails: Callable[..., str], root: Path, tmp_path: Path
) -> None:
    gpt_oss = mixture_models.gpt_oss()
    gpt_oss.generation_config.eos_token_id = 2
    mamba = MambaForCausalLM(MambaConfig(vocab_size=160, hidden_size=32, num_hidden_layers=2, eos_token_id=2))
    for model, method, message in ((gpt_oss, "ap", "has a gating of its own"), (mamba, "fisher", "mamba")):
        folder = save(tmp_path / model.config.model_type, model, text_tokenizer(model.config))
        command = ["attribute", folder, "--task", "words", "--data", root / "text.jsonl", "--out", tmp_path / "run"]
        assert message in fails(*command, "--method", method)
        assert not (tmp_path / "run").exists()


def test_a_mixture_of_experts_from_attribution_to_evaluation(hones: Run, root: Path, tmp_path: Path) -> None:
    p = problem("deepseek_v3", "text")
    model, run, profile = (
        save(tmp_path / "model", p.model, p.processor),
        tmp_path / "run",
        tmp_path / "words.safetensors",
    )
    data = ["--task", "words", "--data", root / "text.jsonl"]
    assert hones("attribute", model, *data, "--out", run, *SMALL, "--top-fraction", "0.3")[0] == 0
    keys = json.loads((run / "result.json").read_text())["bank"].keys()
    assert keys >= {"0", "1.0", "1.shared", "2.3"}
    bank = read_bank(run).bank
    assert bank.size == sum(map(len, bank.values())) == round(0.3 * (96 + 2 * (4 * 48 + 96)))
    assert hones("fit", model, *data, "--bank", run, "--out", profile, *FIT)[0] == 0
    learned = load_profile(profile)
    assert learned.format == 2
    assert {ffn.key: neurons.tolist() for ffn, (neurons, _) in learned.ffns.items()} == bank.to_json()
    code, out, error = hones(
        "evaluate", model, *data, "--profile", profile, "--mask", run, "--ablation", "mean", "--random-banks", "1"
    )
    assert code == 0, out + error


def test_an_image_task_on_a_text_only_model(fails: Callable[..., str], root: Path, tmp_path: Path) -> None:
    command = ["attribute", root / "text", "--task", "cats", "--data", root / "cats.jsonl", "--out", tmp_path / "run"]
    assert "the examples have images, but " in (error := fails(*command))
    assert "takes none; use a vision-language model" in error
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- files that do not belong


def test_a_profile_of_another_model(fails: Callable[..., str], root: Path, profile: Path) -> None:
    command = ["evaluate", root / "text", "--task", "words", "--data", root / "text.jsonl", "--profile", profile]
    error = fails(*command)
    assert "the profile belongs to another model" in error


def test_a_file_that_is_no_profile(fails: Callable[..., str], root: Path, tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"x" * 100)
    command = ["evaluate", root / "text", "--task", "words", "--data", root / "text.jsonl", "--profile"]
    assert str(tmp_path / "p") in fails(*command, tmp_path / "p")
    assert str(tmp_path / "none") in fails(*command, tmp_path / "none")


def test_the_bank_of_another_task_model_or_folder(
    fails: Callable[..., str], root: Path, found: Path, tmp_path: Path
) -> None:
    out = ["--out", tmp_path / "p.safetensors"]
    command = ["fit", root / "vlm", "--task", "dogs", "--data", root / "cats.jsonl", *out, "--bank"]
    assert f"{found} holds the bank of task 'cats', not 'dogs'" in fails(*command, found)
    assert "result.json is missing; the run that should have written it is not finished" in fails(*command, tmp_path)
    other = ["fit", root / "text", "--task", "cats", "--data", root / "text.jsonl", *out, "--bank", found]
    assert f"{found} holds the bank of another model; run `hones attribute` on the one given" in fails(*other)
    mask = ["evaluate", root / "text", "--task", "words", "--data", root / "text.jsonl", "--mask", found]
    assert f"{found} holds the bank of another model" in fails(*mask)
    for content in ("[]", "{}", '{"task": "dogs", "bank": {"x": [1]}, "model": {}}'):
        (tmp_path / "result.json").write_text(content)
        assert "result.json is no result of `hones attribute`" in fails(*command, tmp_path)


def test_a_run_with_other_settings(
    fails: Callable[..., str], hones: Run, root: Path, found: Path, tmp_path: Path
) -> None:
    common = [root / "vlm", "--task", "cats", "--data", root / "cats.jsonl"]
    error = fails("attribute", *common, "--out", found, *QUICK, "--seed", "5")
    assert f"{found} holds a run with other settings: " in error
    assert "seed was 3407 and now is 5; use the same settings to resume it, or another folder" in error
    error = fails("attribute", *common, "--out", found, *QUICK, "--limit", "5")
    assert "examples was" in error
    fit = ["fit", *common, "--bank", found, *FIT, "--limit", "3", "--method", "hones_no_kl", "--out"]
    assert hones(*fit, tmp_path / "first.safetensors")[0] == 0
    before = listing(found)
    error = fails(*fit, tmp_path / "second.safetensors", "--lr", "0.1")
    assert "fit-hones_no_kl holds a run with other settings: lr was 0.05 and now is 0.1" in error
    assert listing(found) == before
    assert list(tmp_path.iterdir()) == [tmp_path / "first.safetensors"]


def test_a_place_that_cannot_be_written(fails: Callable[..., str], root: Path, found: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    common = [root / "vlm", "--task", "cats", "--data", root / "cats.jsonl"]
    error = fails("attribute", *common, "--out", file / "run", *QUICK)
    assert f"{file / 'run' / 'run.json'}: cannot be written: Not a directory" in error
    before = listing(found)
    for out in (file / "p.safetensors", tmp_path / "no" / "p.safetensors", tmp_path):
        error = fails("fit", *common, "--bank", found, "--out", out, *FIT)
        assert f"--out {out} cannot be written; name a file in an existing folder" in error
    assert listing(found) == before
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == "mine"


def test_a_folder_with_other_things_in_it(fails: Callable[..., str], root: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    command = ["attribute", root / "vlm", "--task", "cats", "--data", root / "cats.jsonl", "--out", tmp_path, *QUICK]
    assert f"{tmp_path} is not empty and holds no run; choose another folder" in fails(*command)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
