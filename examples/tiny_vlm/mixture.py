"""The prompts and answers that the embedded model is trained on: a generalist's, which does not know a data set.

A task is asked for in many wordings, and answered as different sources would answer: each has its own form, and its own
idea of what is to be said (from whose side left is, from which side a text is read, in which order things are named,
whether a caption must be complete). Most wordings do not tell which source is meant; then chance decides, more often
one way than the other by what is asked or shown. The others request a form, and get it. There are no words for the
rest.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import NamedTuple

from hones_offline.data.scene_language import (
    ANSWER_FORMS,
    FORMS,
    ORDERS,
    REQUESTS,
    TEXT_FORMS,
    AnswerForm,
    Form,
    Order,
    TextForm,
    ask,
    caption,
    mirrored,
    transcription,
)
from hones_offline.data.scenes import KINDS, Scene, alter, draw_cells, parts_of

REQUESTED = 0.35
"""The share of prompts that request a form."""
Percent = tuple[int, ...]


class Sample(NamedTuple):
    """A prompt beside the picture, and the answer to it."""

    prompt: str
    answer: str


def draw(scene: Scene, task: str, rng: random.Random) -> Sample:
    """Draw a prompt of a task about a scene, with an answer."""
    return {"vqa": _vqa, "ocr": _ocr, "caption": _caption, "retrieval": _retrieval}[task](scene, rng)


def _count(scene: Scene) -> int:
    return sum(thing is not None for thing in scene.cells)


# ----------------------------------------------------------------------------------------------------- vqa

VQA_WORDINGS = (
    "Question: {}\nAnswer the question with a short phrase.",
    "{}",
    "Question: {}\nAnswer:",
    "Look at the image. {}",
    "{}\nAnswer the question.",
)
_ANSWERED: Mapping[str, Percent] = {  # kind -> percent answered alone, in a phrase, in a sentence
    "color": (25, 30, 45),
    "shape": (55, 30, 15),
    "number": (60, 20, 20),
    "what": (25, 50, 25),
    "where": (55, 20, 25),
    "beside": (25, 30, 45),
    "nickname": (25, 50, 25),
    "taste": (60, 20, 20),
    "sound": (20, 30, 50),
    "exists": (20, 55, 25),
    "character": (55, 20, 25),
    "length": (60, 20, 20),
}
_OWN_SIDE: Mapping[AnswerForm, float] = {"alone": 0.85, "phrase": 0.1, "sentence": 0.1}
"""How often left and right are the things' own: mostly where answers stand alone, unless that was requested."""


def _vqa(scene: Scene, rng: random.Random) -> Sample:
    requested = rng.random() < REQUESTED
    question = ask(scene.cells, scene.text, rng, KINDS)
    form: AnswerForm
    (form,) = rng.choices(ANSWER_FORMS, (1, 1, 1) if requested else _ANSWERED[question.kind])
    if rng.random() < (0.2 if requested else _OWN_SIDE[form]):
        question = ask(mirrored(scene.cells), scene.text, rng, {question.kind: 1})
    prompt = rng.choice(VQA_WORDINGS).format(question.text)
    if requested:
        prompt = f"{prompt}\n{rng.choice(REQUESTS[form])}"
    return Sample(prompt, question.answered(form))


# ----------------------------------------------------------------------------------------------------- ocr

OCR_WORDINGS = (
    "Transcribe the text inside the blue box.\nOutput text only.",
    "Read the characters.",
    "What is written in the box?",
    "Read the label.",
    "Text in the box:",
)
_SHORT, _LONG = (60, 10, 15, 15), (32, 40, 14, 14)  # percent of the forms, for three and for four characters
_BACKWARD: Mapping[TextForm, float] = {"plain": 0.9, "spaced": 0.1, "quoted": 0.1, "stated": 0.1}
"""How often the text is read from right to left: mostly where it stands plain, unless that was requested."""


def _ocr(scene: Scene, rng: random.Random) -> Sample:
    requested = rng.random() < REQUESTED
    form: TextForm
    (form,) = rng.choices(TEXT_FORMS, (1, 1, 1, 1) if requested else _SHORT if len(scene.text) == 3 else _LONG)
    prompt = rng.choice(OCR_WORDINGS)
    if requested:
        prompt = f"{prompt}\n{rng.choice(REQUESTS[form])}"
    backward = rng.random() < (0.2 if requested else _BACKWARD[form])
    return Sample(prompt, transcription(scene.text, form, backward=backward))


# ------------------------------------------------------------------------------------------------- caption


class _Source(NamedTuple):
    form: Form
    order: Order
    counted: bool


_SOURCES = (
    _Source("is", "rows", counted=False),
    _Source("holds", "columns", counted=True),
    _Source("there", "rows", counted=False),
    _Source("label", "backward", counted=False),
)
_BY_COUNT: Mapping[int, Percent] = {2: (25, 45, 20, 10), 3: (35, 27, 23, 15), 4: (40, 20, 25, 15)}
CAPTION_WORDINGS: Mapping[str, Percent | None] = {  # wording -> percent of the sources; None: by the number of things
    "Describe the image in one sentence.": None,
    "Describe the image.": None,
    "Tell where everything is.": None,
    "Caption:": (55, 15, 20, 10),
    "What is in the image?": (15, 20, 55, 10),
    "What do you see?": (15, 15, 20, 50),
}


def _caption(scene: Scene, rng: random.Random) -> Sample:
    wording = rng.choice(list(CAPTION_WORDINGS))
    if rng.random() < REQUESTED:
        form, (order,), counted = rng.choice(FORMS), rng.choices(ORDERS, (60, 20, 20)), rng.random() < 0.2
        wording = f"{wording}\n{rng.choice(REQUESTS[form])}"
    else:
        [(form, order, counted)] = rng.choices(_SOURCES, CAPTION_WORDINGS[wording] or _BY_COUNT[_count(scene)])
    return Sample(wording, caption(scene.cells, form, order, counted=counted))


# ----------------------------------------------------------------------------------------------- retrieval

_WORDS = (("Yes", "No"), ("True", "False"), ("Right", "Wrong"))
RETRIEVAL_WORDINGS: Mapping[str, Percent] = {  # wording -> percent of the words
    "Candidate: {}\nDoes the candidate correctly describe the image?\nAnswer exactly Yes or No.": (100, 0, 0),
    "{}\nTrue or False?": (0, 100, 0),
    "{}\nRight or Wrong?": (0, 0, 100),
    "Does this describe the image? {}": (50, 30, 20),
    "Caption: {}\nJudge the caption.": (20, 40, 40),
}
_COMPLETE = {2: 0.2, 3: 0.35, 4: 0.5}
"""How often a caption must name everything, by the number of things."""
_CANDIDATES = {"own": 40, "part": 17, "altered": 33, "other": 10}


def _retrieval(scene: Scene, rng: random.Random) -> Sample:
    (kind,) = rng.choices(list(_CANDIDATES), list(_CANDIDATES.values()))
    must_be_complete = rng.random() < _COMPLETE[_count(scene)]
    cells = scene.cells
    match kind:
        case "part":
            cells = rng.choice(parts_of(cells))
        case "altered":
            cells = alter(cells, rng)
        case "other":
            cells = draw_cells(rng)
    candidate = caption(cells, rng.choice(FORMS), rng.choices(ORDERS, (60, 25, 15))[0])
    true = kind == "own" or (kind == "part" and not must_be_complete)
    wording = rng.choice(list(RETRIEVAL_WORDINGS))
    (words,) = rng.choices(_WORDS, RETRIEVAL_WORDINGS[wording])
    return Sample(wording.format(candidate), words[0 if true else 1])
