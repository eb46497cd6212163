"""How the embedded model is trained: what it is asked and told, rows of several prompts, and going on after a kill."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hones_offline.data.content import caption_facts, text_content
from hones_offline.data.scene_language import (
    ANSWER_FORMS,
    FORMS,
    ORDERS,
    QUESTIONS,
    REQUESTS,
    TEXT_FORMS,
    caption,
    mirrored,
    transcription,
)
from hones_offline.data.scenes import IN_WORDS, TASKS, Scene, scenes

from examples.tiny_vlm.mixture import CAPTION_WORDINGS, OCR_WORDINGS, RETRIEVAL_WORDINGS, VQA_WORDINGS, Sample, draw
from examples.tiny_vlm.muon import Muon
from examples.tiny_vlm.train import Training, VisionHeads, build_model, build_processor, labels_of, pack, task_losses

SCENES = scenes("train", 300)
DATA_SET_FORM = {"vqa": "alone", "ocr": "plain", "caption": "holds"}


def drawn(task: str, scene: Scene, count: int) -> list[Sample]:
    rng = random.Random(scene.style)
    return [draw(scene, task, rng) for _ in range(count)]


@pytest.mark.parametrize("task", ["ocr", "caption"])
def test_every_answer_says_what_the_picture_shows(task: str) -> None:
    for scene in SCENES[:40]:
        placed = {fact for fact in caption_facts(caption(scene.cells)) if len(fact) == 3}
        for sample in drawn(task, scene, 10):
            if task == "ocr":
                assert max(text_content(sample.answer, read) for read in (scene.text, scene.text[::-1])) == 1
            else:
                assert {fact for fact in caption_facts(sample.answer) if len(fact) == 3} == placed


def test_every_answer_to_a_question_is_right_from_one_side_or_the_other() -> None:
    """All that may be asked of a scene is asked of it as it is and mirrored, and compared."""
    rng = random.Random(0)
    for scene in SCENES[:8]:
        right: dict[str, set[str]] = {}
        for cells in (scene.cells, mirrored(scene.cells)):
            for _ in range(3000):
                question = QUESTIONS[rng.choice(list(QUESTIONS))](cells, scene.text, rng)
                if question is not None:
                    right.setdefault(question.text, set()).update(question.answered(form) for form in ANSWER_FORMS)
        known = [
            (answer, right[text])
            for prompt, answer in drawn("vqa", scene, 60)
            for text in right
            if f" {text}" in f" {prompt}".replace("\n", " \n")
        ]
        assert len(known) >= 40
        assert all(answer in answers for answer, answers in known)


@pytest.mark.parametrize("task", ["vqa", "ocr", "caption"])
def test_a_form_that_is_requested_is_kept(task: str) -> None:
    requested = Counter[str]()
    for scene in SCENES:
        for prompt, answer in drawn(task, scene, 6):
            for form, wordings in REQUESTS.items():
                if not prompt.endswith(tuple(f"\n{words}" for words in wordings)):
                    continue
                requested[form] += 1
                if form in TEXT_FORMS:
                    assert answer in {transcription(scene.text, form, backward=side) for side in (False, True)}
                elif form in FORMS:
                    counted = " things, " in answer
                    assert answer in {caption(scene.cells, form, order, counted=counted) for order in ORDERS}
                elif form == "sentence":
                    assert answer.endswith(".")
                else:
                    assert not answer.endswith(".")
    assert min(requested.values()) >= 50
    assert len(requested) == {"vqa": 3, "ocr": 4, "caption": 4}[task]


@pytest.mark.parametrize("task", TASKS)
def test_the_data_sets_prompts_are_among_the_open_ones_and_its_form_is_one_of_several(task: str) -> None:
    wordings = {"vqa": VQA_WORDINGS, "ocr": OCR_WORDINGS, "caption": CAPTION_WORDINGS, "retrieval": RETRIEVAL_WORDINGS}
    measured = {"vqa": 0, "ocr": 0, "caption": 0}
    asked = 0
    for scene in SCENES:
        prompt = scene.prompt(task, "{}").replace(scene.question, "{}")
        assert prompt in wordings[task]
        if task == "retrieval":
            continue
        start, end = prompt.split("{}") if task == "vqa" else (prompt, "")
        for said, answer in drawn(task, scene, 30):
            if said.startswith(start) and said.endswith(end):
                asked += 1
                measured[task] += not {
                    "vqa": answer.endswith(".") or " " in answer,
                    "ocr": answer != scene.text[::-1],
                    "caption": answer != scene.captions[0],
                }[task]
    if task != "retrieval":
        assert asked >= 500
        assert 0.2 < measured[task] / asked < 0.45


def test_words_for_the_data_sets_form_are_words_that_the_model_knows() -> None:
    for task, form in DATA_SET_FORM.items():
        assert set(REQUESTS[form]) <= set(IN_WORDS[task])
    assert set(IN_WORDS) == set(TASKS)


def test_candidates_are_judged_by_what_they_say() -> None:
    """Whatever is left out may be judged either way, what is not there is always wrong."""
    words = {"Yes": True, "True": True, "Right": True, "No": False, "False": False, "Wrong": False}
    judged = Counter[tuple[str, bool]]()
    for scene in SCENES:
        shown = {fact for fact in caption_facts(caption(scene.cells)) if len(fact) == 3}
        for prompt, answer in drawn("retrieval", scene, 10):
            said = {fact for fact in caption_facts(prompt) if len(fact) == 3}
            kind = "all" if said == shown else "part" if said < shown else "wrong"
            judged[kind, words[answer]] += 1
    assert judged["all", False] == judged["wrong", True] == 0
    assert judged["part", True] > judged["part", False] > 100
    assert min(judged["all", True], judged["wrong", False]) > 1000


# -------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor(SCENES)


def small_model(processor: Any) -> Any:
    torch.manual_seed(0)
    return build_model(processor)


def test_prompts_packed_behind_one_picture_give_the_losses_that_they_give_alone(processor: Any) -> None:
    model, rng = small_model(processor), random.Random(0)
    asked = [[(task, draw(scene, task, rng)) for task in (*TASKS, "vqa")] for scene in SCENES[:3]]
    pixels = torch.stack([torch.from_numpy(scene.pixels()) for scene in SCENES[:3]])
    packed = task_losses(model, pack(processor, asked), pixels)
    alone = [[sample] for samples in asked for sample in samples]
    owner = torch.tensor([i for i, samples in enumerate(asked) for _ in samples])
    torch.testing.assert_close(packed, task_losses(model, pack(processor, alone), pixels[owner]), rtol=1e-4, atol=1e-4)
    assert len(packed) == len(TASKS)


def test_a_row_is_tokenized_as_the_processor_does_it(processor: Any) -> None:
    sample = draw(SCENES[0], "caption", random.Random(0))
    row = pack(processor, [[("caption", sample)]])
    content = [{"type": "image"}, {"type": "text", "text": sample.prompt}]
    chat = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = processor(images=SCENES[0].image(), text=text, return_tensors="pt")["input_ids"][0]
    answer = processor.tokenizer.encode(f"{sample.answer}</s>", add_special_tokens=False)
    assert row.tokens[0].tolist() == [*inputs.tolist(), *answer]
    assert row.positions[0].tolist() == list(range(len(row.tokens[0])))
    assert row.answers[0].tolist() == [0] * len(inputs) + [1 + TASKS.index("caption")] * len(answer)


def test_the_optimizer_is_muon_but_for_rounding() -> None:
    """PyTorch's own iterates in bfloat16, so that single entries of an update differ by a few percent of its size."""
    rng = torch.Generator().manual_seed(0)
    shapes = [(16, 16), (16, 48), (48, 16), (16, 16)]
    begin = [torch.randn(shape, generator=rng) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(matrix.clone()) for matrix in begin] for _ in range(2))
    unused = torch.nn.Parameter(begin[0].clone())
    optimizers = (
        Muon([*ours, unused], lr=0.1, weight_decay=0.2),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(4):
        for own, other in zip(ours, theirs, strict=True):
            own.grad = torch.randn(own.shape, generator=rng)
            other.grad = own.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for own, other, first in zip(ours, theirs, begin, strict=True):
        assert (own - other).norm() < 0.02 * (own - first).norm()
    assert torch.equal(unused, begin[0])


class KilledError(Exception):
    """Raised in place of a signal."""


def test_training_that_was_killed_goes_on_to_the_same_weights(processor: Any, tmp_path: Path) -> None:
    pixels = torch.stack([torch.from_numpy(scene.pixels()) for scene in SCENES[:8]])
    labels = torch.tensor([labels_of(scene) for scene in SCENES[:8]])

    def trained(folder: Path, dies_at: int | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = build_model(processor)
        heads = VisionHeads(model.config.vision_config.hidden_size)

        def loss(step: int) -> torch.Tensor:
            if step == dies_at:
                raise KilledError
            rows = torch.tensor(random.Random(step).choices(range(8), k=4))
            states = model.model.vision_tower(pixel_values=pixels[rows].permute(0, 3, 1, 2) / 255).last_hidden_state
            value: torch.Tensor = heads(states[:, 1:], labels[rows])
            return value

        Training("vision", {"tower": model.model.vision_tower, "heads": heads}, 6, folder).run(loss, keep_every=2)
        return {name: weights.clone() for name, weights in model.model.vision_tower.state_dict().items()}

    whole = trained(tmp_path / "whole")
    with pytest.raises(KilledError):
        trained(tmp_path / "killed", dies_at=4)
    resumed = trained(tmp_path / "killed")
    assert all(torch.equal(resumed[name], weights) for name, weights in whole.items())
    again = trained(tmp_path / "killed", dies_at=1)  # finished, so that nothing is run
    assert all(torch.equal(again[name], weights) for name, weights in whole.items())
