"""Dense descriptions of generated scenes: every place, empty ones included, and every character of the box.

They are all that the tower and the projector are trained on. Each form has wordings that ask for it, so that what is
written depends on the request, and the image's tokens are left to say what is seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import NamedTuple

from hones_offline.data.scene_language import POSITIONS
from hones_offline.data.scenes import Scene


class Sample(NamedTuple):
    """A request beside the picture, and the description that it asks for."""

    prompt: str
    answer: str


def sentences(scene: Scene) -> str:
    """Say where each thing is, which places are empty, and what the box reads."""
    things = _joined([f"{_named(scene, place)} is in the {place}" for place in _filled(scene)])
    return f"{_capital(things)}. {_empty(scene)} The text in the blue box is {scene.text}."


def lines(scene: Scene) -> str:
    """List the places, a line each, then the box."""
    rows = [f"{place}: {' '.join(thing) if thing else 'nothing'}" for place, thing in _cells(scene).items()]
    return "\n".join([*rows, f"blue box: {scene.text}"])


def box_first(scene: Scene) -> str:
    """Say what the box reads, how many things there are, and which."""
    things = _joined([f"{_named(scene, place)} in the {place}" for place in _filled(scene)])
    return f"The blue box reads {scene.text}. There are {len(_filled(scene))} things: {things}. {_empty(scene)}"


def spelled(scene: Scene) -> str:
    """Say what each place holds, in its own sentence, and spell the box."""
    held = [f"The {place} holds {_named(scene, place)}." for place in POSITIONS]
    return " ".join([*held, f"The blue box is spelled {', '.join(scene.text)}."])


FORMS: Mapping[Callable[[Scene], str], tuple[str, ...]] = {
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


def draw(scene: Scene, rng: random.Random) -> Sample:
    """Draw a form, every one as likely, and one of its wordings."""
    form = rng.choice(list(FORMS))
    return Sample(rng.choice(FORMS[form]), form(scene))


def _cells(scene: Scene) -> dict[str, tuple[str, str] | None]:
    return dict(zip(POSITIONS, scene.cells, strict=True))


def _filled(scene: Scene) -> list[str]:
    return [place for place, thing in _cells(scene).items() if thing is not None]


def _empty(scene: Scene) -> str:
    empty = [place for place, thing in _cells(scene).items() if thing is None]
    return f"The {_joined(empty)} {'is' if len(empty) == 1 else 'are'} empty."


def _named(scene: Scene, place: str) -> str:
    thing = _cells(scene)[place]
    return f"{'an' if thing[0][0] in 'aeiou' else 'a'} {' '.join(thing)}" if thing else "nothing"


def _joined(parts: list[str]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
