"""Generated scenes with exact answers: the data of the embedded model and of `hones demo`.

A scene is a 64x64 RGB picture: a grid of 2 rows x 3 columns, of which two to four cells hold a colored shape, and
below it a blue box with three or four characters. Every scene comes with a question and its answer, five reference
captions, and false captions, so that it serves all four tasks (docs/tasks.md).

A scene is a function of (seed, split, index). Splits are disjoint by content: the sha256 of what a scene shows, not its
index, decides which split it belongs to, so that a picture of one split cannot occur in another under any seed. Only
numpy and Pillow are needed: the glyphs are a bitmap font in this file, so that no installed font changes a picture.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

IMAGE_SIZE = 64
TASKS = ("vqa", "ocr", "caption", "retrieval")
SPLITS = ("train", "discovery", "dev", "test")
POSITIONS = ("top left", "top middle", "top right", "bottom left", "bottom middle", "bottom right")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 45, 45),
    "green": (50, 170, 60),
    "yellow": (235, 215, 50),
    "purple": (140, 60, 180),
    "orange": (240, 140, 30),
    "cyan": (60, 200, 215),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")

# Facts that no picture shows and that a model has to memorize. They are arbitrary on purpose.
TASTES = dict(zip(COLORS, ("cherry", "lime", "lemon", "plum", "carrot", "mint", "milk"), strict=True))
SOUNDS = dict(zip(SHAPES, ("hum", "knock", "ding", "buzz", "click", "whistle"), strict=True))
_NAMES = (
    *("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal", "Ida", "Jack", "Kim", "Leo", "Mia", "Ned"),
    *("Olga", "Pam", "Quin", "Rob", "Sue", "Tom", "Una", "Vic", "Wes", "Xena", "Yves", "Zoe", "Amy", "Bob"),
    *(
        "Cal",
        "Dot",
        "Eli",
        "Fay",
        "Gil",
        "Hope",
        "Ivan",
        "June",
        "Kurt",
        "Lily",
        "Max",
        "Nina",
        "Otto",
        "Paul",
    ),
)
NICKNAMES = {
    (color, shape): _NAMES[(11 * i + 5) % len(_NAMES)]
    for i, (color, shape) in enumerate((c, s) for c in COLORS for s in SHAPES)
}

# 5x7 glyphs as five columns, least significant bit on top. I, O, 0 and 1 are left out: they are easily confused.
_GLYPHS = {
    "2": "4261514946", "3": "2141454B31", "4": "1814127F10", "5": "2745454539", "6": "3C4A494930",
    "7": "0171090503", "8": "3649494936", "9": "064949291E", "A": "7E1111117E", "B": "7F49494936",
    "C": "3E41414122", "D": "7F4141221C", "E": "7F49494941", "F": "7F09090901", "G": "3E4149497A",
    "H": "7F0808087F", "J": "2040413F01", "K": "7F08142241", "L": "7F40404040", "M": "7F020C027F",
    "N": "7F0408107F", "P": "7F09090906", "Q": "3E4151215E", "R": "7F09192946", "S": "4649494931",
    "T": "01017F0101", "U": "3F4040403F", "V": "1F2040201F", "W": "3F4038403F", "X": "6314081463",
    "Y": "0708700807", "Z": "6151494543",
}  # fmt: skip
CHARACTERS = "".join(_GLYPHS)

Split = Literal["train", "discovery", "dev", "test"]
Thing = tuple[str, str]
"""(color, shape)."""
Cells = tuple[Thing | None, ...]
"""The thing in each of the six `POSITIONS`, or None."""


@dataclass(frozen=True)
class Scene:
    """One picture with its question, answer and captions.

    `cells` has six entries in the order of `POSITIONS`. `style` is the seed of everything without meaning: shades,
    sizes, offsets, noise.
    """

    cells: Cells
    text: str
    question: str
    answer: str
    style: int

    def pixels(self) -> NDArray[np.uint8]:
        """The picture as uint8[64, 64, 3]."""
        rng = np.random.default_rng(self.style)
        canvas = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.int64)
        canvas[:] = rng.integers(20, 90)
        for position, thing in enumerate(self.cells):
            if thing is not None:
                _draw_thing(canvas, rng, position, thing)
        _draw_text(canvas, rng, self.text)
        canvas += rng.integers(-22, 23, canvas.shape)
        return canvas.clip(0, 255).astype(np.uint8)

    def image(self) -> Image.Image:
        """The picture, 64x64 RGB."""
        return Image.fromarray(self.pixels())

    @property
    def captions(self) -> tuple[str, ...]:
        """Five reference captions, all true; a model is trained on the first."""
        placed = _placed(self.cells)
        things = [_with_article(thing) for _, thing in placed]
        where = _join([f"{t} in the {p}" for t, (p, _) in zip(things, placed, strict=True)])
        return (
            _caption(self.cells),
            f"There is {where}.",
            f"The picture shows {_join(things)}.",
            f"{_capital(_join([f'the {p} holds {t}' for t, (p, _) in zip(things, placed, strict=True)]))}.",
            f"{_capital(where)}.",
        )

    def candidates(self, n_negatives: int) -> tuple[str, ...]:
        """The true caption first, then `n_negatives` distinct false ones, the same at every call.

        Out of ten negatives, seven describe another scene and three change one thing in this one.
        """
        rng = random.Random(f"candidates/{self.style}/{self.text}")
        captions = [_caption(self.cells)]
        while len(captions) <= n_negatives:
            cells = _alter(self.cells, rng) if len(captions) % 10 in (2, 5, 8) else _draw_cells(rng)
            caption = _caption(cells)
            if not _is_true(cells, self.cells) and caption not in captions:
                captions.append(caption)
        return tuple(captions)

    def prompt(self, task: str, candidate: str = "") -> str:
        """The prompt of one of the four tasks (docs/tasks.md); `candidate` is retrieval's caption."""
        return {
            "vqa": f"Question: {self.question}\nAnswer the question with a short phrase.",
            "ocr": "Transcribe the text inside the blue box.\nOutput text only.",
            "caption": "Describe the image in one sentence.",
            "retrieval": (
                f"Candidate: {candidate}\nDoes the candidate correctly describe the image?\nAnswer exactly Yes or No."
            ),
        }[task]


def scenes(split: str, count: int, seed: int = 0) -> list[Scene]:
    """The first `count` scenes of a split ("train", "discovery", "dev" or "test").

    A longer list starts with the shorter one.

    Raises:
        ValueError: the split is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; use one of {', '.join(SPLITS)}")
    return [_scene(split, index, seed) for index in range(count)]


def _scene(split: str, index: int, seed: int) -> Scene:
    rng = random.Random(f"scene/{seed}/{split}/{index}")
    while True:
        cells = _draw_cells(rng)
        text = "".join(rng.choices(CHARACTERS, k=rng.choice((3, 4, 4))))
        if _split_of(cells, text) == split:
            style = rng.getrandbits(32)
            question, answer = _ask(cells, rng)
            return Scene(cells, text, question, answer, style)


def _split_of(cells: Cells, text: str) -> str:
    """The split of a scene, by the digest of its content: train for 85% of all scenes, 5% for each other split."""
    digest = hashlib.sha256(repr((cells, text)).encode()).digest()
    bucket = int.from_bytes(digest[:8], "little") % 20
    return {0: "discovery", 1: "dev", 2: "test"}.get(bucket, "train")


def _draw_cells(rng: random.Random) -> Cells:
    cells: list[Thing | None] = [None] * len(POSITIONS)
    filled = rng.sample(range(len(POSITIONS)), rng.choice((2, 3, 3, 4)))
    for position, thing in zip(filled, rng.sample(sorted(NICKNAMES), len(filled)), strict=True):
        cells[position] = thing
    return tuple(cells)


def _alter(cells: Cells, rng: random.Random) -> Cells:
    """The scene with one thing changed: its color, its shape or its place."""
    altered = list(cells)
    here = rng.choice([i for i, thing in enumerate(cells) if thing is not None])
    color, shape = cells[here] or ("", "")
    change = rng.choice(("color", "shape", "place"))
    if change == "color":
        altered[here] = (rng.choice([c for c in COLORS if c != color]), shape)
    elif change == "shape":
        altered[here] = (color, rng.choice([s for s in SHAPES if s != shape]))
    else:
        there = rng.choice([i for i in range(len(cells)) if i != here])
        altered[here], altered[there] = altered[there], altered[here]
    return tuple(altered)


def _is_true(claimed: Cells, actual: Cells) -> bool:
    """Whether a caption of the scene `claimed` is true of `actual`, which then holds all of its things."""
    return all(a is None or a == b for a, b in zip(claimed, actual, strict=True))


# Language


def _placed(cells: Cells) -> list[tuple[str, Thing]]:
    return [(place, thing) for place, thing in zip(POSITIONS, cells, strict=True) if thing is not None]


def _with_article(thing: Thing) -> str:
    return f"{'an' if thing[0][0] in 'aeiou' else 'a'} {_name(thing)}"


def _join(parts: list[str]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _caption(cells: Cells) -> str:
    parts = [f"{_with_article(thing)} is in the {place}" for place, thing in _placed(cells)]
    return f"{_capital(_join(parts))}."


def _ask(cells: Cells, rng: random.Random) -> tuple[str, str]:
    """Draw a question about the scene, with its answer; every kind of question is equally likely."""
    return rng.choice(_QUESTIONS)(cells, rng)


def _unique(cells: Cells, part: int, rng: random.Random) -> Thing | None:
    """Draw a thing whose color (part 0) or shape (part 1) no other thing shares; None if there is no such thing."""
    things = [thing for thing in cells if thing is not None]
    values = [thing[part] for thing in things]
    unique = [thing for thing in things if values.count(thing[part]) == 1]
    return rng.choice(unique) if unique else None


def _ask_color(cells: Cells, rng: random.Random) -> tuple[str, str]:
    thing = _unique(cells, 1, rng)
    return (f"What color is the {thing[1]}?", thing[0]) if thing else _ask_what(cells, rng)


def _ask_shape(cells: Cells, rng: random.Random) -> tuple[str, str]:
    thing = _unique(cells, 0, rng)
    return (f"What shape is the {thing[0]} thing?", thing[1]) if thing else _ask_what(cells, rng)


def _ask_count(cells: Cells, rng: random.Random) -> tuple[str, str]:
    things = [thing for thing in cells if thing is not None]
    kind = rng.choice(("things", "color", "shape"))
    if kind == "things":
        return "How many things are there?", str(len(things))
    part = 0 if kind == "color" else 1
    anything = rng.choice(list(COLORS) if part == 0 else SHAPES)
    value = rng.choice([thing[part] for thing in things] + [anything])
    plural = f"{value} things" if part == 0 else "crosses" if value == "cross" else f"{value}s"
    return f"How many {plural} are there?", str(sum(thing[part] == value for thing in things))


def _ask_what(cells: Cells, rng: random.Random) -> tuple[str, str]:
    filled = [i for i, thing in enumerate(cells) if thing is not None]
    position = rng.choice(filled) if rng.random() < 0.75 else rng.randrange(len(POSITIONS))
    return f"What is in the {POSITIONS[position]}?", _name(cells[position])


def _ask_beside(cells: Cells, rng: random.Random) -> tuple[str, str]:
    steps = {"left of": -1, "right of": 1, "below": 3, "above": -3}
    pairs = [
        (relation, here, here + step)
        for relation, step in steps.items()
        for here, thing in enumerate(cells)
        if thing is not None and _has_neighbor(here, step)
    ]
    meeting = [pair for pair in pairs if cells[pair[2]] is not None]
    relation, here, there = rng.choice(meeting if meeting and rng.random() < 0.75 else pairs)
    return f"What is {relation} the {_name(cells[here])}?", _name(cells[there])


def _ask_nickname(cells: Cells, rng: random.Random) -> tuple[str, str]:
    place, thing = rng.choice(_placed(cells))
    what = _name(thing) if rng.random() < 0.5 else f"thing in the {place}"
    return f"What is the nickname of the {what}?", NICKNAMES[thing]


def _ask_taste(cells: Cells, rng: random.Random) -> tuple[str, str]:
    place, (color, _) = rng.choice(_placed(cells))
    return f"What does the thing in the {place} taste like?", TASTES[color]


def _ask_sound(cells: Cells, rng: random.Random) -> tuple[str, str]:
    place, (_, shape) = rng.choice(_placed(cells))
    return f"What sound does the thing in the {place} make?", SOUNDS[shape]


def _has_neighbor(position: int, step: int) -> bool:
    column = position % 3
    return {-1: column > 0, 1: column < 2, 3: position < 3, -3: position >= 3}[step]


def _name(thing: Thing | None) -> str:
    return " ".join(thing) if thing is not None else "nothing"


_QUESTIONS: tuple[Callable[[Cells, random.Random], tuple[str, str]], ...] = (
    _ask_color,
    _ask_shape,
    _ask_count,
    _ask_what,
    _ask_beside,
    _ask_nickname,
    _ask_taste,
    _ask_sound,
)


# Drawing


def _draw_thing(canvas: NDArray[np.int64], rng: np.random.Generator, position: int, thing: Thing) -> None:
    color, shape = thing
    center_y = 11 + 22 * (position // 3) + rng.integers(-2, 3)
    center_x = 11 + 21 * (position % 3) + rng.integers(-2, 3)
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE] - np.array([center_y, center_x])[:, None, None]
    mask = _inside(shape, y, x, int(rng.integers(6, 9)))
    canvas[mask] = np.array(COLORS[color]) + rng.integers(-15, 16, 3)


def _inside(shape: str, y: NDArray[np.int64], x: NDArray[np.int64], r: int) -> NDArray[np.bool_]:
    """Mask of the pixels, at offsets (y, x) from the center, that a shape of radius r covers; in integers, so exact."""
    square = np.maximum(abs(x), abs(y)) < r
    masks: dict[str, NDArray[np.bool_]] = {
        "circle": x * x + y * y <= r * r,
        "square": square,
        "triangle": (abs(y) <= r) & (2 * abs(x) <= y + r),
        "diamond": abs(x) + abs(y) <= r,
        "cross": square & (np.minimum(abs(x), abs(y)) <= 2),
        "ring": (x * x + y * y <= r * r) & (x * x + y * y > (r - 3) * (r - 3)),
    }
    return masks[shape]


def _draw_text(canvas: NDArray[np.int64], rng: np.random.Generator, text: str) -> None:
    """Draw a white box with a blue border and the text in it; each glyph is 10x14 pixels."""
    width = 13 * len(text) + 5
    top, left = int(rng.integers(44, 46)), int(rng.integers(0, IMAGE_SIZE - width + 1))
    box = canvas[top : top + 18, left : left + width]
    box[:] = (30, 60, 230)
    box[1:-1, 1:-1] = rng.integers(190, 250)
    ink = rng.integers(0, 70, 3)
    for i, character in enumerate(text):
        columns = np.frombuffer(bytes.fromhex(_GLYPHS[character]), np.uint8)
        bitmap = (columns[None, :] >> np.arange(7)[:, None]) & 1  # [7 rows, 5 columns]
        glyph = box[2:16, 4 + 13 * i : 14 + 13 * i]
        glyph[np.kron(bitmap, np.ones((2, 2), np.uint8)) == 1] = ink
