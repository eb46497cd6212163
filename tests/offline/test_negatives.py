"""Hard negatives: other images' captions, the most similar first, none that fits the image itself."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hones_offline.data.datasets import load_coco
from hones_offline.data.examples import Example, Loaded, MemoryImage
from hones_offline.data.metrics import caption_tokens
from hones_offline.data.negatives import with_hard_negatives
from PIL import Image

from hones_steer.errors import DataError

EXCERPT = Path(__file__).parent / "data" / "coco_excerpt.json"
RECORDS: list[dict[str, Any]] = json.loads(EXCERPT.read_text())["data"]


def load(task: str, root: Path, seed: int = 0, negatives: int = 5) -> Loaded:
    return load_coco(EXCERPT, task, root, seed=seed, negatives=negatives)


def test_retrieval_has_one_positive_and_negatives_of_other_images(tmp_path: Path) -> None:
    examples, _ = load("retrieval", tmp_path, negatives=9)
    owner = {c["caption"]: r["image_id"] for r in RECORDS for c in r["retrieval"]}
    for example in examples:
        owners = [owner[candidate] for candidate in example.candidates]
        assert str(owners[0]) == example.id
        assert len(set(owners)) == 10  # the positive's image, and every other one once
        assert example.targets == ("Yes",)


def test_the_hardest_negatives_come_first(tmp_path: Path) -> None:
    """The twin computes TF-IDF the long way: each image's best caption, the best image first."""
    owner = {c["caption"]: str(r["image_id"]) for r in RECORDS for c in r["retrieval"]}
    words = {caption: Counter(caption_tokens(caption)) for caption in owner}
    documents = Counter(word for count in words.values() for word in count)
    vocabulary = sorted(documents)
    idf = np.log((len(words) + 1) / (np.array([documents[w] for w in vocabulary]) + 1)) + 1
    vectors = {c: np.array([count[w] for w in vocabulary]) * idf for c, count in words.items()}
    units = {caption: vector / np.linalg.norm(vector) for caption, vector in vectors.items()}
    for example in load("retrieval", tmp_path, negatives=4).examples:
        cosines = {caption: float(unit @ units[example.candidates[0]]) for caption, unit in units.items()}
        best: dict[str, float] = {}
        for caption, cosine in cosines.items():
            best[owner[caption]] = max(cosine, best.get(owner[caption], 0.0))
        del best[example.id]
        chosen = [cosines[candidate] for candidate in example.candidates[1:]]
        assert chosen == pytest.approx(sorted(best.values(), reverse=True)[:4])


def test_a_stop_sign_is_hardest_to_tell_from_another_stop_sign(tmp_path: Path) -> None:
    by_id = {e.id: e for e in load("retrieval", tmp_path).examples}
    owner = {c["caption"]: str(r["image_id"]) for r in RECORDS for c in r["retrieval"]}
    assert owner[by_id["364374"].candidates[1]] == "215215"
    assert owner[by_id["215215"].candidates[1]] == "364374"


def test_negatives_are_deterministic_for_the_seed(tmp_path: Path) -> None:
    first = load("retrieval", tmp_path, seed=1)
    assert first == load("retrieval", tmp_path, seed=1)
    assert first != load("retrieval", tmp_path, seed=2)


def retrieval_example(name: str, *captions: str, key: str | None = None) -> Example:
    image = MemoryImage(Image.new("RGB", (1, 1)), key or name)
    return Example(name, "", ("Yes",), image, captions)


def test_a_caption_that_fits_the_image_is_no_negative() -> None:
    examples = [
        retrieval_example("a", "A red bus."),
        retrieval_example("b", "a red  bus", "a blue car"),  # worded like a's own
        retrieval_example("c", "a red bus on a road", key="a"),  # another record of a's image
        retrieval_example("d", "a big red bus"),
    ]
    for seed in range(5):
        of_a = with_hard_negatives(examples, 2, seed)[0]
        assert of_a.candidates == ("A red bus.", "a big red bus", "a blue car")


def test_no_two_negatives_are_worded_alike() -> None:
    examples = [retrieval_example(n, f"a {n} bus") for n in "abcd"] + [retrieval_example("e", "A C bus!")]
    candidates = with_hard_negatives(examples, 3, seed=0)[0].candidates
    assert len({tuple(caption_tokens(c)) for c in candidates}) == 4


def test_too_few_images_for_the_negatives_is_an_error_with_the_number(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="9 hard negatives among 10 images, 49 were asked for"):
        load("retrieval", tmp_path, negatives=49)
    with pytest.raises(DataError, match="at least 1"):
        load("retrieval", tmp_path, negatives=0)
