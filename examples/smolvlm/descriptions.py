"""Dense descriptions of generated scenes: every place, empty ones included, and every character of the box.

They are all that the tower and the projector are trained on. Each form has wordings that ask for it, so that what is
written depends on the request, and the image's tokens are left to say what is seen. Places come in reading order, or
in any: the first is soon learned, but then a place can only be read after those before it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from hones_offline.data.scene_language import POSITIONS, Thing, capital, join, name_of, placed, with_article
from hones_offline.data.scenes import Scene


class Sample(NamedTuple):
    """A request beside the picture, and the description that it asks for."""

    prompt: str
    answer: str


BOX = "blue box"
PLACES = (*POSITIONS, BOX)


def sentences(scene: Scene, order: Sequence[str] = PLACES) -> str:
    """Say where each thing is, which places are empty, and what the box reads."""
    things = [f"{with_article(thing)} is in the {place}" for place, thing in _held(scene, order) if thing]
    return f"{capital(join(things))}. {_empty(scene)} The text in the {BOX} is {scene.text}."


def lines(scene: Scene, order: Sequence[str]) -> str:
    """List the places and the box, a line each."""
    held = {place: name_of(thing) for place, thing in _held(scene, order)} | {BOX: scene.text}
    return "\n".join(f"{place}: {held[place]}" for place in order)


def box_first(scene: Scene, order: Sequence[str]) -> str:  # noqa: ARG001 - captions are in reading order
    """Say what the box reads, how many things there are, and which."""
    return f"The {BOX} reads {scene.text}. There are {counted(scene)} {_empty(scene)}"


def counted(scene: Scene) -> str:
    """Count the things, then name each and its place."""
    things = [f"{with_article(thing)} in the {place}" for place, thing in placed(scene.cells)]
    return f"{len(things)} things: {join(things)}."


def spelled(scene: Scene, order: Sequence[str]) -> str:
    """Say what each place holds, in its own sentence, and spell the box."""
    held = {place: f"holds {with_article(thing)}" for place, thing in _held(scene, order)}
    held[BOX] = f"is spelled {', '.join(scene.text)}"
    return " ".join(f"The {place} {held[place]}." for place in order)


FORMS: Mapping[Callable[[Scene, Sequence[str]], str], tuple[str, ...]] = {
    sentences: (
        "Describe the image in detail.",
        "Where is everything, and what does the box say?",
        "Write a full description of this picture in sentences.",
    ),
    lines: (
        "List what is in each place, one line per place.",
        "Make a list of the places and what is in them.",
        "What is where? Answer as a list.",
    ),
    box_first: (
        "Describe the image in detail, starting with the text in the blue box.",
        "Read the blue box, then count and describe the things.",
        "First read the text, then tell what else is in the picture.",
    ),
    spelled: (
        "Go through the picture place by place, then spell the text.",
        "What does each place hold? Spell the text in the box, too.",
        "Describe each place in a sentence of its own and spell what is written.",
    ),
}


def draw(scene: Scene, rng: random.Random, any_order: float) -> Sample:
    """Draw a form, every one as likely, one of its wordings, and for a share of the samples any order of the places."""
    form = rng.choice(list(FORMS))
    wording = rng.choice(FORMS[form])
    order = rng.sample(PLACES, len(PLACES)) if any_order and rng.random() < any_order else PLACES
    return Sample(wording, form(scene, order))


def _held(scene: Scene, order: Sequence[str]) -> list[tuple[str, Thing | None]]:
    held = dict(zip(POSITIONS, scene.cells, strict=True))
    return [(place, held[place]) for place in order if place != BOX]


def _empty(scene: Scene) -> str:
    empty = [place for place, thing in _held(scene, POSITIONS) if thing is None]
    return f"The {join(empty)} {'is' if len(empty) == 1 else 'are'} empty."
