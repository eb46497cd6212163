"""The content of an answer about a generated scene, apart from its form.

A task's metric counts the data set's convention: "The circle is red." is no match for "red". These scores count the
content alone, so that what steering teaches of a form can be told from what it teaches of a picture. Each lies between
0 and 1. Retrieval's metric has no form and needs none.
"""

import re

from hones_offline.data.metrics import anls, vqa_accuracy
from hones_offline.data.scene_language import COLORS, NUMBERS, POSITIONS, SHAPES, Question
from hones_offline.data.scenes import Scene

_MENTIONED = re.compile(rf"\b({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b|\b({'|'.join(POSITIONS)})\b")
_NUMBERED = re.compile(rf"^({'|'.join(NUMBERS)}) things\b", re.IGNORECASE)
_CODE = re.compile(r"(?<![A-Za-z])[A-Z2-9](?:[ -]?[A-Z2-9])*(?![a-z])")

Fact = tuple[str, ...]


def content(task: str, output: str, scene: Scene) -> float:
    """How much of what the data set says of a scene an output to a generating task says, in whichever form."""
    if task == "vqa":
        return answer_content(output, scene.asked)
    return text_content(output, scene.transcription) if task == "ocr" else caption_content(output, scene.captions[0])


def answer_content(output: str, question: Question) -> float:
    """1 if the output is the right answer, alone, in a phrase or in a sentence; compared as VQA accuracy does."""
    return max(vqa_accuracy(output, [right]) for right in (question.answer, question.phrase, question.sentence))


def text_content(output: str, text: str) -> float:
    """ANLS of the longest run of capital letters and digits in the output, without its spaces and dashes."""
    runs = [re.sub(r"[ -]", "", run) for run in _CODE.findall(output)]
    return anls(max(runs, key=len, default=""), [text])


def caption_content(output: str, reference: str) -> float:
    """The F1 score of the facts that the output states, against those of the reference (`caption_facts`)."""
    said, right = caption_facts(output), caption_facts(reference)
    if not said and not right:
        return 1.0
    return 2 * len(said & right) / (len(said) + len(right))


def caption_facts(text: str) -> frozenset[Fact]:
    """The facts of a caption: which thing stands where, which of two is named first, and how many there are, if said.

    Things and positions are paired in the order they are mentioned in, whichever comes first.
    """
    mentions = [match.groups() for match in _MENTIONED.finditer(text.lower())]
    things = [(color, shape) for color, shape, _ in mentions if color]
    places = [place for _, _, place in mentions if place]
    facts: set[Fact] = {(*thing, place) for thing, place in zip(things, places, strict=False)}
    facts |= {(*first, *second) for i, first in enumerate(things) for second in things[i + 1 :]}
    facts |= {("number", number.lower()) for number in _NUMBERED.findall(text)}
    return frozenset(facts)
