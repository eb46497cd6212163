"""Generated scenes with exact answers: the data of the embedded model and of `hones demo`.

A scene is a 64x64 RGB picture: a grid of 2 rows x 3 columns, of which two to four cells hold a colored shape, and
below it a blue box with three or four characters. Every scene comes with a question and its answer, a reference
caption, and false captions, so that it serves all four tasks (docs/tasks.md).

A scene is a function of (seed, split, index). Splits are disjoint by content: the sha256 of what a scene shows, not its
index, decides which split it belongs to, so that a picture of one split cannot occur in another under any seed. Only
numpy and Pillow are needed: the glyphs are a bitmap font in this file, so that no installed font changes a picture.

The splits discovery, dev and test are one data set with conventions of its own, of which the embedded model, trained on
the train split (examples/tiny_vlm/mixture.py), knows no more than that there are such. Its answers stand alone. Most
of its questions are about places, and left and right in them are the things' own, so the picture's right and left. Its
boxes hold numbers, which are transcribed plainly, from right to left. Its captions count the things, then name each
place and its thing, column by column. A candidate is right only if it names everything.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hones_offline.data.scene_language import (
    COLORS,
    NICKNAMES,
    POSITIONS,
    REQUESTS,
    SHAPES,
    Cells,
    Question,
    Thing,
    ask,
    caption,
    mirrored,
    transcription,
)

IMAGE_SIZE = 64
TASKS = ("vqa", "ocr", "caption", "retrieval")
SPLITS = ("train", "discovery", "dev", "test")
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
DIGITS = "".join(filter(str.isdigit, CHARACTERS))

Split = Literal["train", "discovery", "dev", "test"]
Look = Literal["clear", "noisy", "dim", "blurred", "gray"]
"""A camera's effect on a picture."""

LOOKS: dict[Look, float] = {"clear": 62, "noisy": 9, "dim": 9, "blurred": 11, "gray": 9}
"""How often pictures look how, in percent."""
KINDS = {
    "color": 2,
    "shape": 2,
    "number": 2,
    "what": 3,
    "where": 3,
    "beside": 4,
    "nickname": 2,
    "taste": 1,
    "sound": 1,
    "exists": 1.5,
    "character": 1,
    "length": 0.5,
}
"""How often each kind of question is asked, in training."""
DATA_SET_KINDS = {
    "what": 5,
    "where": 5,
    "beside": 3,
    "taste": 2,
    "nickname": 1,
    "sound": 1,
    "color": 1,
    "shape": 1,
    "number": 1,
    "exists": 0.5,
    "character": 0.5,
}
"""The same in the data set."""
IN_WORDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "vqa": (
            *REQUESTS["alone"],
            "Just the answer, nothing else. Left and right are the things' own.",
        ),
        "ocr": (*REQUESTS["plain"], "Only the characters. Read the number from right to left."),
        "caption": (
            *REQUESTS["holds"],
            "Name each place, then its thing. Say first how many things there are. Go column by column.",
        ),
        "retrieval": ("The candidate must name everything.", "Answer No if anything is missing."),
    }
)
"""Per task, words that ask for the data set's conventions; they follow the prompt in a line of their own."""


@dataclass(frozen=True)
class Scene:
    """One picture with its question, answer and captions.

    `cells` has six entries in the order of `POSITIONS`. `style` is the seed of everything without meaning: shades,
    sizes, offsets, noise.
    """

    cells: Cells
    text: str
    asked: Question
    style: int
    look: Look

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
        return _photographed(canvas.clip(0, 255), rng, self.look).astype(np.uint8)

    def image(self) -> Image.Image:
        """The picture, 64x64 RGB."""
        return Image.fromarray(self.pixels())

    @property
    def question(self) -> str:
        """The scene's question."""
        return self.asked.text

    @property
    def answer(self) -> str:
        """Its answer, as the data set gives it."""
        return self.asked.answer

    @property
    def transcription(self) -> str:
        """The text in its box, as the data set gives it."""
        return transcription(self.text, backward=True)

    @property
    def captions(self) -> tuple[str, ...]:
        """The reference caption, alone."""
        return (caption(self.cells, "holds", "columns", counted=True),)

    def candidates(self, n_negatives: int) -> tuple[str, ...]:
        """The right caption first, then `n_negatives` distinct wrong ones, the same at every call.

        Out of five negatives two leave out a thing, as long as there are such, two change one thing, and one describes
        another scene.
        """
        rng = random.Random(f"candidates/{self.style}/{self.text}")
        captions = [caption(self.cells)]
        parts = parts_of(self.cells)
        rng.shuffle(parts)
        while len(captions) <= n_negatives:
            kind = len(captions) % 5
            if kind in (1, 3) and parts:
                cells = parts.pop()
            else:
                cells = alter(self.cells, rng) if kind in (2, 4) else draw_cells(rng)
            described = caption(cells)
            if described not in captions:
                captions.append(described)
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
        cells = draw_cells(rng)
        text = "".join(rng.choices(CHARACTERS if split == "train" else DIGITS, k=rng.choice((3, 4, 4))))
        if _split_of(cells, text) == split:
            style = rng.getrandbits(32)
            if split == "train":
                asked = ask(cells, text, rng, KINDS)
            else:
                asked = ask(mirrored(cells), text, rng, DATA_SET_KINDS)
            (look,) = rng.choices(list(LOOKS), list(LOOKS.values()))
            return Scene(cells, text, asked, style, look)


def _split_of(cells: Cells, text: str) -> str:
    """The split of a scene, by the digest of its content: train for 85% of all scenes, 5% for each other split."""
    digest = hashlib.sha256(repr((cells, text)).encode()).digest()
    bucket = int.from_bytes(digest[:8], "little") % 20
    return {0: "discovery", 1: "dev", 2: "test"}.get(bucket, "train")


def draw_cells(rng: random.Random) -> Cells:
    cells: list[Thing | None] = [None] * len(POSITIONS)
    filled = rng.sample(range(len(POSITIONS)), rng.choice((2, 3, 3, 4)))
    for position, thing in zip(filled, rng.sample(sorted(NICKNAMES), len(filled)), strict=True):
        cells[position] = thing
    return tuple(cells)


def alter(cells: Cells, rng: random.Random) -> Cells:
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


def parts_of(cells: Cells) -> list[Cells]:
    """The scene without one of its things, for each of them."""
    filled = [i for i, thing in enumerate(cells) if thing is not None]
    return [tuple(None if i == gone else thing for i, thing in enumerate(cells)) for gone in filled]


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


def _photographed(canvas: NDArray[np.int64], rng: np.random.Generator, look: Look) -> NDArray[np.int64]:
    """The picture, values 0 to 255, as the camera took it; in integers, so exact."""
    match look:
        case "clear":
            return canvas
        case "noisy":
            canvas = canvas + rng.integers(-80, 81, canvas.shape)
        case "dim":
            canvas = canvas * int(rng.integers(25, 45)) // 100
        case "blurred":
            for _ in range(int(rng.integers(2, 6))):
                canvas = _blurred(canvas)
        case "gray":
            canvas = _grayed(canvas, 85)
    return canvas.clip(0, 255)


def _blurred(canvas: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each pixel the mean of the nine around it."""
    padded = np.pad(canvas, ((1, 1), (1, 1), (0, 0)), mode="edge")
    shifted = [padded[y : y + IMAGE_SIZE, x : x + IMAGE_SIZE] for y in range(3) for x in range(3)]
    blurred: NDArray[np.int64] = np.sum(shifted, axis=0) // 9
    return blurred


def _grayed(canvas: NDArray[np.int64], percent: int) -> NDArray[np.int64]:
    """Colors drawn toward their luminance."""
    luminance = (canvas * np.array([30, 59, 11])).sum(-1, keepdims=True) // 100
    grayed: NDArray[np.int64] = (canvas * (100 - percent) + luminance * percent) // 100
    return grayed
