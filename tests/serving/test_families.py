"""The table of families in docs/vllm.md says yes to what tests in engine/ run, and to nothing else."""

import re
from pathlib import Path

from serving import checkpoints

PAGE = Path(__file__).parents[2] / "docs" / "vllm.md"
COLUMNS = ("eager", "compiled", "tensor parallel", "images")


def said() -> dict[str, set[str]]:
    """The columns of each family that say yes."""
    rows = re.findall(r"^\| [^|]*gated[^|]* \| (`[^|]*) \|(.*)\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {
        family: {column for column, cell in zip(COLUMNS, cells.split("|"), strict=True) if cell.strip() == "yes"}
        for families, cells in rows
        for family in re.findall(r"`(\w+)`", families)
    }


def test_every_yes_has_a_test_and_every_test_a_yes() -> None:
    text = frozenset({"eager", "compiled"})
    tested = {
        "llama": text | {"tensor parallel"},  # test_vllm_tokens
        "llava": text | {"images"},
        **dict.fromkeys(checkpoints.UNGATED, text | {"tensor parallel"}),  # test_vllm_families
        **dict.fromkeys(checkpoints.GATED, text),
        **dict.fromkeys(checkpoints.VLMS, text | {"images"}),
        **dict.fromkeys(checkpoints.MIXTURES, text | {"tensor parallel"}),  # test_vllm_experts
    }
    assert {family: columns for family, columns in said().items() if columns} == tested
