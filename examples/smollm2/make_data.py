"""Write the cloze tasks as JSONL, one file per split and task, from the lists in facts/ (numbers are drawn by seed).

    python -m examples.smollm2.make_data --output examples/smollm2/data

Run it from the repository root. Each line is {"id": ..., "prompt": ..., "targets": [...]}, the format that `hones
attribute` reads: two worked examples, then the question. What is asked decides its split, so adding a fact moves no
other one. Methods and their settings are chosen on `DEV_TASKS`; `FRESH_TASKS` confirm what was chosen.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

FACTS = Path(__file__).parent / "facts"
SPLITS = ("discovery", "dev", "test")
_FIFTHS = ("discovery", "discovery", "dev", "test", "test")


@dataclass(frozen=True)
class Cloze:
    """A sentence to complete and two worked examples, which are not among the facts.

    `space` stands between sentence and answer. It belongs to the answer where the tokenizer joins it to the word that
    follows (`answer_has_space`), and to the prompt before digits, which are tokens of their own.
    """

    sentence: str
    shown: tuple[tuple[str, str], tuple[str, str]]
    answer_has_space: bool = True

    def prompt(self, asked: str) -> str:
        """The worked examples and the question, a line each."""
        lines = [f"{self.sentence.format(known)} {answer}\n" for known, answer in self.shown]
        return "".join(lines) + self.sentence.format(asked) + ("" if self.answer_has_space else " ")

    def target(self, answer: str) -> str:
        """An answer as it continues the prompt."""
        return f" {answer}" if self.answer_has_space else answer


DEV_TASKS = {
    "capitals": Cloze("The capital of {} is", (("Italy", "Rome"), ("Japan", "Tokyo"))),
    "antonyms": Cloze("The opposite of {} is", (("hot", "cold"), ("up", "down"))),
    "past_tense": Cloze("The past tense of {} is", (("write", "wrote"), ("jump", "jumped"))),
    "french": Cloze("The French word {} means", (("soleil", "sun"), ("lait", "milk"))),
    "sums": Cloze("{} =", (("12 + 34", "46"), ("58 + 67", "125")), answer_has_space=False),
}
FRESH_TASKS = {
    "countries": Cloze("The country of {} is", (("Hamburg", "Germany"), ("Kyoto", "Japan"))),
    "kinds": Cloze("A kind of thing: {} is a", (("shark", "fish"), ("pear", "fruit"))),
    "languages": Cloze("The language of the word {} is", (("hermano", "Spanish"), ("Brot", "German"))),
    "nouns": Cloze("The quality of being {} is", (("ill", "illness"), ("safe", "safety"))),
    "numerals": Cloze("{} =", (("eighty-two", "82"), ("three hundred seventeen", "317")), answer_has_space=False),
    "participles": Cloze("The present participle of {} is", (("write", "writing"), ("jump", "jumping"))),
    "percentages": Cloze("{} as a percentage is", (("0.07", "7%"), ("0.354", "35.4%")), answer_has_space=False),
    "plurals": Cloze("The plural of {} is", (("man", "men"), ("cat", "cats"))),
    "professions": Cloze("The profession of {} was", (("Charles Dickens", "writer"), ("Vincent van Gogh", "painter"))),
}
TASKS = DEV_TASKS | FRESH_TASKS

_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def facts(task: str) -> list[tuple[str, list[str]]]:
    """The question, and every answer that counts as right, the usual one first."""
    if task in DRAWN:
        return list(DRAWN[task]())
    pairs = [line.split(" = ") for line in (FACTS / f"{task}.txt").read_text(encoding="utf-8").splitlines()]
    return [(asked, answers.split(" | ")) for asked, answers in pairs]


def sums(count: int = 250) -> Iterator[tuple[str, list[str]]]:
    """Sums of two two-digit numbers; 23 + 45 and 45 + 23 count as the same, so only one of them occurs."""
    draw = random.Random(0)
    known = {frozenset(map(int, asked.split(" + "))) for asked, _ in TASKS["sums"].shown}
    while count:
        a, b = draw.randint(10, 99), draw.randint(10, 99)
        if frozenset({a, b}) in known:
            continue
        known.add(frozenset({a, b}))
        count -= 1
        yield f"{a} + {b}", [str(a + b)]


def numerals(count: int = 450) -> Iterator[tuple[str, list[str]]]:
    """Numbers from 1 to 999 in words, to be written in digits."""
    known = {asked for asked, _ in TASKS["numerals"].shown}
    unseen = [n for n in range(1, 1000) if in_words(n) not in known]
    for n in random.Random(0).sample(unseen, count):
        yield in_words(n), [str(n)]


def percentages(count: int = 350) -> Iterator[tuple[str, list[str]]]:
    """Decimals below 1 of up to three places: 0.25 is 25%."""
    known = {asked for asked, _ in TASKS["percentages"].shown}
    unseen = [n for n in range(1, 1000) if f"{n / 1000:g}" not in known]
    for n in random.Random(0).sample(unseen, count):
        yield f"{n / 1000:g}", [f"{n / 10:g}%"]


def in_words(n: int) -> str:
    """Spell a number below 1,000: two hundred forty-seven."""
    if n < len(_ONES):
        return _ONES[n]
    if n < 100:
        tens, ones = divmod(n, 10)
        return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")
    hundreds, rest = divmod(n, 100)
    return f"{_ONES[hundreds]} hundred" + (f" {in_words(rest)}" if rest else "")


DRAWN: dict[str, Callable[[], Iterator[tuple[str, list[str]]]]] = {
    "sums": sums,
    "numerals": numerals,
    "percentages": percentages,
}


def split_of(task: str, asked: str) -> str:
    """The split of a fact: two in five to discovery, one to dev, two to test."""
    digest = hashlib.sha256(f"{task}: {asked}".encode()).digest()
    return _FIFTHS[int.from_bytes(digest, "big") % len(_FIFTHS)]


def lines(task: str, split: str) -> Iterator[str]:
    """The JSONL lines of a task's split."""
    cloze = TASKS[task]
    for asked, answers in facts(task):
        if split_of(task, asked) == split:
            targets = [cloze.target(answer) for answer in answers]
            yield json.dumps({"id": asked, "prompt": cloze.prompt(asked), "targets": targets}, ensure_ascii=False)


def main() -> None:
    """Write the files into --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    for split in SPLITS:
        folder = args.output / split
        folder.mkdir(parents=True, exist_ok=True)
        for task in TASKS:
            text = "".join(f"{line}\n" for line in lines(task, split))
            (folder / f"{task}.jsonl").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
