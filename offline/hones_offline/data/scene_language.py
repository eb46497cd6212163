"""The language of generated scenes: facts about their things, questions with their answers, and captions.

Everything is a function of a scene's cells (which thing stands in each of the six positions) and of the text in its
box. A question has its answer in three forms; a caption has a form and an order. `scenes.py` says which of them the
scenes' own data set keeps; the embedded model was trained on all of them (examples/tiny_vlm/mixture.py).
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

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
    *("Cal", "Dot", "Eli", "Fay", "Gil", "Hope", "Ivan", "June", "Kurt", "Lily", "Max", "Nina", "Otto", "Paul"),
)
NICKNAMES = {
    (color, shape): _NAMES[(11 * i + 5) % len(_NAMES)]
    for i, (color, shape) in enumerate((c, s) for c in COLORS for s in SHAPES)
}

Thing = tuple[str, str]
"""(color, shape)."""
Cells = tuple[Thing | None, ...]
"""The thing in each of the six `POSITIONS`, or None."""


def placed(cells: Cells) -> list[tuple[str, Thing]]:
    """The things with their positions, in reading order."""
    return [(place, thing) for place, thing in zip(POSITIONS, cells, strict=True) if thing is not None]


def mirrored(cells: Cells) -> Cells:
    """The cells with left and right exchanged."""
    return tuple(cells[i] for i in (2, 1, 0, 5, 4, 3))


def name_of(thing: Thing | None) -> str:
    """A thing's color and shape; "nothing" for an empty cell."""
    return " ".join(thing) if thing is not None else "nothing"


def with_article(thing: Thing | None) -> str:
    """The same with "a" or "an"."""
    if thing is None:
        return "nothing"
    return f"{'an' if thing[0][0] in 'aeiou' else 'a'} {name_of(thing)}"


def join(parts: Sequence[str]) -> str:
    """Parts as "a, b and c"."""
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]


def capital(sentence: str) -> str:
    """The sentence with its first letter large."""
    return sentence[0].upper() + sentence[1:]


# ------------------------------------------------------------------------------------------------ captions

Form = Literal["is", "there", "holds", "label"]
"""How a caption words where things are."""
Order = Literal["rows", "columns", "backward"]
"""The order a caption names things in: rows from the top, columns from the left, or rows from the end."""
FORMS: tuple[Form, ...] = get_args(Form)
ORDERS: tuple[Order, ...] = get_args(Order)
_RANKS: Mapping[Order, tuple[int, ...]] = MappingProxyType(
    {"rows": (0, 1, 2, 3, 4, 5), "columns": (0, 3, 1, 4, 2, 5), "backward": (5, 4, 3, 2, 1, 0)}
)
NUMBERS = ("No", "One", "Two", "Three", "Four", "Five", "Six")


def caption(cells: Cells, form: Form = "is", order: Order = "rows", *, counted: bool = False) -> str:
    """Describe the scene in one sentence; `counted` says first how many things there are."""
    named = [(POSITIONS[i], thing) for i in _RANKS[order] if (thing := cells[i]) is not None]
    match form:
        case "is":
            text = join([f"{with_article(thing)} is in the {place}" for place, thing in named])
        case "there":
            text = f"there is {join([f'{with_article(thing)} in the {place}' for place, thing in named])}"
        case "holds":
            text = join([f"the {place} holds {with_article(thing)}" for place, thing in named])
        case "label":
            text = "; ".join(f"{place}: {name_of(thing)}" for place, thing in named)
    start = f"{NUMBERS[len(named)]} things, " if counted else ""
    return f"{start}{text}." if counted else f"{capital(text)}."


# ------------------------------------------------------------------------------------------ text in the box

TextForm = Literal["plain", "spaced", "quoted", "stated"]
TEXT_FORMS: tuple[TextForm, ...] = get_args(TextForm)


def transcription(text: str, form: TextForm = "plain", *, backward: bool = False) -> str:
    """The text in the box in one of the forms; `backward` reads it from right to left."""
    text = text[::-1] if backward else text
    return {"plain": text, "spaced": " ".join(text), "quoted": f'"{text}"', "stated": f"The box says {text}."}[form]


# ----------------------------------------------------------------------------------------------- questions

AnswerForm = Literal["alone", "phrase", "sentence"]
ANSWER_FORMS: tuple[AnswerForm, ...] = get_args(AnswerForm)


@dataclass(frozen=True)
class Question:
    """A question about a scene, with its answer alone, in a phrase and in a sentence."""

    kind: str
    text: str
    answer: str
    phrase: str
    sentence: str

    def answered(self, form: AnswerForm) -> str:
        """The answer in one of the forms."""
        return {"alone": self.answer, "phrase": self.phrase, "sentence": self.sentence}[form]


Ask = Callable[[Cells, str, random.Random], Question | None]
"""(cells, text in the box, source of chance) -> a question, or None where the scene gives no cause for one."""


def _unique(cells: Cells, part: int, rng: random.Random) -> Thing | None:
    """Draw a thing whose color (part 0) or shape (part 1) no other thing shares; None if there is no such thing."""
    things = [thing for thing in cells if thing is not None]
    values = [thing[part] for thing in things]
    unique = [thing for thing in things if values.count(thing[part]) == 1]
    return rng.choice(unique) if unique else None


def _ask_color(cells: Cells, _text: str, rng: random.Random) -> Question | None:
    thing = _unique(cells, 1, rng)
    if thing is None:
        return None
    color, shape = thing
    return Question("color", f"What color is the {shape}?", color, with_article(thing), f"The {shape} is {color}.")


def _ask_shape(cells: Cells, _text: str, rng: random.Random) -> Question | None:
    thing = _unique(cells, 0, rng)
    if thing is None:
        return None
    color, shape = thing
    sentence = f"The {color} thing is a {shape}."
    return Question("shape", f"What shape is the {color} thing?", shape, with_article(thing), sentence)


def _counted(kind: str, number: int, one: str, many: str, where: str = "") -> Question:
    phrase = f"{number} {one if number == 1 else many}"
    sentence = f"There {'is' if number == 1 else 'are'} {phrase}{where}."
    return Question(kind, f"How many {many} are there{where}?", str(number), phrase, sentence)


def _ask_number(cells: Cells, _text: str, rng: random.Random) -> Question:
    things = [thing for thing in cells if thing is not None]
    part = rng.choice((None, 0, 1))
    if part is None:
        return _counted("number", len(things), "thing", "things")
    anything = rng.choice(list(COLORS) if part == 0 else SHAPES)
    value = rng.choice([thing[part] for thing in things] + [anything])
    number = sum(thing[part] == value for thing in things)
    if part == 0:
        return _counted("number", number, f"{value} thing", f"{value} things")
    return _counted("number", number, value, "crosses" if value == "cross" else f"{value}s")


def _ask_what(cells: Cells, _text: str, rng: random.Random) -> Question:
    filled = [i for i, thing in enumerate(cells) if thing is not None]
    position = rng.choice(filled) if rng.random() < 0.75 else rng.randrange(len(POSITIONS))
    thing, where = cells[position], f"in the {POSITIONS[position]}"
    phrase = f"{with_article(thing)} {where}"
    return Question("what", f"What is {where}?", name_of(thing), phrase, f"There is {phrase}.")


def _ask_where(cells: Cells, _text: str, rng: random.Random) -> Question:
    place, thing = rng.choice(placed(cells))
    name = name_of(thing)
    return Question("where", f"Where is the {name}?", place, f"in the {place}", f"The {name} is in the {place}.")


_STEPS = {"left of": -1, "right of": 1, "below": 3, "above": -3}


def _ask_beside(cells: Cells, _text: str, rng: random.Random) -> Question:
    pairs = [
        (relation, here, here + step)
        for relation, step in _STEPS.items()
        for here, thing in enumerate(cells)
        if thing is not None and _has_neighbor(here, step)
    ]
    meeting = [pair for pair in pairs if cells[pair[2]] is not None]
    relation, here, there = rng.choice(meeting if meeting and rng.random() < 0.75 else pairs)
    other, reference = cells[there], f"{relation} the {name_of(cells[here])}"
    subject = "nothing" if other is None else f"the {name_of(other)}"
    phrase = f"{with_article(other)} {relation} it"
    return Question("beside", f"What is {reference}?", name_of(other), phrase, f"{capital(subject)} is {reference}.")


def _has_neighbor(position: int, step: int) -> bool:
    column = position % 3
    return {-1: column > 0, 1: column < 2, 3: position < 3, -3: position >= 3}[step]


def _ask_nickname(cells: Cells, _text: str, rng: random.Random) -> Question:
    place, thing = rng.choice(placed(cells))
    what, nickname = (name_of(thing) if rng.random() < 0.5 else f"thing in the {place}"), NICKNAMES[thing]
    text = f"What is the nickname of the {what}?"
    return Question("nickname", text, nickname, f"the name {nickname}", f"Its nickname is {nickname}.")


def _ask_taste(cells: Cells, _text: str, rng: random.Random) -> Question:
    place, (color, _) = rng.choice(placed(cells))
    taste = TASTES[color]
    text = f"What does the thing in the {place} taste like?"
    return Question("taste", text, taste, f"a taste of {taste}", f"It tastes like {taste}.")


def _ask_sound(cells: Cells, _text: str, rng: random.Random) -> Question:
    place, (_, shape) = rng.choice(placed(cells))
    sound = SOUNDS[shape]
    text = f"What sound does the thing in the {place} make?"
    return Question("sound", text, sound, f"a {sound} sound", f"It makes a {sound} sound.")


def _ask_exists(cells: Cells, _text: str, rng: random.Random) -> Question:
    things = [thing for thing in cells if thing is not None]
    thing = rng.choice(things)
    if rng.random() < 0.5:  # change one half of a thing that is there
        color, shape = thing
        thing = rng.choice([*((c, shape) for c in COLORS), *((color, s) for s in SHAPES)])
    what = with_article(thing)
    if thing in things:
        return Question("exists", f"Is there {what}?", "yes", f"yes, {what}", f"There is {what}.")
    nothing = f"no {name_of(thing)}"
    return Question("exists", f"Is there {what}?", "no", nothing, f"There is {nothing}.")


_ORDINALS = ("first", "second", "third", "fourth")


def _ask_character(_cells: Cells, text: str, rng: random.Random) -> Question | None:
    numbers = [i for i, character in enumerate(text) if character != "A"]  # which VQA accuracy takes for an article
    if not numbers:
        return None
    number = rng.choice(numbers)
    which = f"{_ORDINALS[number]} character"
    question = f"What is the {which} in the box?"
    return Question(
        "character", question, text[number], f"the letter {text[number]}", f"The {which} is {text[number]}."
    )


def _ask_length(_cells: Cells, text: str, _rng: random.Random) -> Question:
    return _counted("length", len(text), "character", "characters", " in the box")


QUESTIONS: Mapping[str, Ask] = MappingProxyType(
    {
        "color": _ask_color,
        "shape": _ask_shape,
        "number": _ask_number,
        "what": _ask_what,
        "where": _ask_where,
        "beside": _ask_beside,
        "nickname": _ask_nickname,
        "taste": _ask_taste,
        "sound": _ask_sound,
        "exists": _ask_exists,
        "character": _ask_character,
        "length": _ask_length,
    }
)
"""The kinds of questions by name."""


def ask(cells: Cells, text: str, rng: random.Random, kinds: Mapping[str, float]) -> Question:
    """Draw a question about a scene, of one of the `kinds` by their weights."""
    while True:
        (kind,) = rng.choices(list(kinds), list(kinds.values()))
        if (question := QUESTIONS[kind](cells, text, rng)) is not None:
            return question


# ------------------------------------------------------------------------------------------------ requests

REQUESTS: Mapping[Form | TextForm | AnswerForm, tuple[str, ...]] = MappingProxyType(
    {
        "alone": ("Just the answer, nothing else.", "Answer with one or two words."),
        "phrase": ("Answer with a noun phrase.", "Answer in a few words."),
        "sentence": ("Answer in a full sentence.", "Reply with a sentence."),
        "plain": ("No spaces, no quotes.", "Only the characters."),
        "spaced": ("Letter by letter.", "With spaces between."),
        "quoted": ("In quotation marks.", "Put it in quotes."),
        "stated": ("In a sentence.", "As a full sentence."),
        "is": ("Name each thing, then its place.",),
        "there": ("Begin with: There is.",),
        "holds": ("Name each place, then its thing.",),
        "label": ("Write a list.",),
    }
)
"""The words by which each form can be asked for; they follow the prompt in a line of their own."""
