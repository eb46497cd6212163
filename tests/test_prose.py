"""Prose that a newcomer understands: how docstrings begin, one spelling, no reference to what is not here."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PRODUCT = ("hones_steer", "offline", "serving", "benchmarks", "examples")
CODE = [path for folder in (*PRODUCT, "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
PAGES += (ROOT / "benchmarks").rglob("*.md")

BRITISH = re.compile(
    r"\b(?<!--)(?!licensed)("  # --colour is a variable of the report's style sheet
    r"\w*(?:colour|behaviour|neighbour|favour|labour|honour|licenc)\w*"
    r"|(?:normal|general|initial|optim|quant|serial|summar|organ|real|recogn|tokeni|minim|maxim|penal|vectori|material)is(?:e|es|ed|ing|ation)"
    r"|(?:centre|metre|fibre)s?|analys(?:e|ed|ing)|grey|catalogue|labell(?:ed|ing)|modell(?:ed|ing)|travell(?:ed|ing)"
    r")\b",
    re.IGNORECASE,
)


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Each string that stands alone as a statement, with its line: docstrings, and those of attributes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def test_a_docstring_begins_with_a_verb_or_a_noun() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path in CODE
        for line, text in docstrings(path)
        if re.match(r"(Of|That|What|They|It)\b", text)
    ]
    assert wrong == []


def test_nothing_refers_to_a_document_that_is_not_here() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {reference[0]}"
        for path in (*CODE, *PAGES)
        if (reference := re.search(r"\bdesign (?:section )?\d|\bdesign\.md", path.read_text(encoding="utf-8")))
        and path != Path(__file__)
    ]
    assert wrong == []


def test_the_spelling_is_american() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {word[0]}"
        for path in (*CODE, *PAGES)
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for word in BRITISH.finditer(line)
    ]
    assert wrong == []
