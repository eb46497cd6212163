"""The rows of IA3 and LoRA beside the demo's: a committed table, because training adapters needs PEFT.

`examples/tiny_vlm/compare.py --adapters` makes the table again, with the demo's own scenes, settings and measuring. The
table says what it was made of, so that its rows are shown only beside others made of the same.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hones_offline.comparison.splits import Splits
from hones_offline.demo.measured import Row
from hones_offline.demo.settings import BATCH, COMPARED, COMPARED_ON
from hones_offline.running.embedded import checkpoint
from hones_offline.running.run_folder import examples_digest, json_bytes, read_json
from hones_steer.errors import DataError
from hones_steer.files import write_atomically

TABLE = Path(__file__).with_name("adapters.json")
REMEDY = "in a clone, `python -m examples.tiny_vlm.compare --adapters --out runs/adapters` makes it again"


def made_of(splits: Mapping[str, Splits]) -> dict[str, Any]:
    """Everything that decides the rows, as JSON: weights, scenes and settings."""
    weights = hashlib.sha256((checkpoint() / "model.safetensors").read_bytes()).hexdigest()
    scenes = {
        name: {split: [len(part), examples_digest(part.examples)] for split, part in of_task.parts.items()}
        for name, of_task in splits.items()
    }
    learning = {"fit": asdict(COMPARED.fit), "grid": asdict(COMPARED.grid), "lora_lrs": COMPARED.lora_lrs}
    settings = {**learning, "batch_size": BATCH, "compared_on": COMPARED_ON}
    made: dict[str, Any] = json.loads(json.dumps({"model": weights, "scenes": scenes, "settings": settings}))
    return made


def adapter_rows(splits: Mapping[str, Splits], file: Path = TABLE) -> tuple[list[Row], str]:
    """The table's rows, and a sentence for a reader on why there are none, or "".

    Raises:
        DataError: the table is damaged.
    """
    if not file.exists():
        return [], f"IA3 and LoRA are not shown: their table is missing; {REMEDY}."
    table, wanted = read_json(file), made_of(splits)
    if not isinstance(table, dict) or not table.keys() >= {"made_of", "rows"}:
        raise DataError(f"{file} is damaged (no table); restore it, or delete it: {REMEDY}")
    if other := [part for part in wanted if table["made_of"].get(part) != wanted[part]]:
        return [], f"IA3 and LoRA are not shown: their table was made with other {' and '.join(other)}; {REMEDY}."
    return list(table["rows"]), ""


def write_table(splits: Mapping[str, Splits], rows: Sequence[Row], file: Path = TABLE) -> None:
    """Write the table that `adapter_rows` reads."""
    write_atomically(file, json_bytes({"made_of": made_of(splits), "rows": rows}))
