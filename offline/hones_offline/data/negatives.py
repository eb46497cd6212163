"""Hard negatives for retrieval: captions of other images that are most similar to an image's own caption."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from hones_offline.data.examples import Example
from hones_offline.data.metrics import caption_tokens
from hones_steer.errors import DataError

Words = tuple[str, ...]
"""A caption's words (`caption_tokens`); captions with equal words count as the same."""


def with_hard_negatives(
    examples: Sequence[Example], negatives: int, seed: int, *, limit: int | None = None
) -> list[Example]:
    """Replace each example's `candidates`, all captions of its image, by one of them and the hard negatives.

    The positive, drawn by `seed` from the image's captions, comes first. Then come `negatives` captions of as many
    other images, the hardest first: those with the highest TF-IDF cosine to the positive, at most one per image, and
    none with the words of one of the image's own captions. `seed` breaks ties. With `limit` only the first so many
    examples are returned; their negatives come from all examples.

    Raises:
        DataError: `negatives` is below 1, or there are not enough other images.
    """
    if negatives < 1:
        raise DataError(f"Retrieval can't rank {negatives} hard negatives; ask for at least 1.")
    random = np.random.default_rng(seed)
    keys = [example.id if example.image is None else example.image.key for example in examples]
    images = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    owners = np.repeat([images[key] for key in keys], [len(example.candidates) for example in examples])
    pool = [caption for example in examples for caption in example.candidates]
    words = [tuple(caption_tokens(caption)) for caption in pool]
    similar = _TfidfIndex(words)
    tiebreak = random.permutation(len(pool))
    result = []
    start = 0
    for example in examples[:limit]:
        positive = start + int(random.integers(len(example.candidates)))
        start += len(example.candidates)
        order = np.lexsort((tiebreak, -similar.cosines(positive)))
        chosen = _first_per_image(order, owners, words, int(owners[positive]), negatives)
        if len(chosen) < negatives:
            raise DataError(
                f"Example '{example.id}' has {len(chosen)} hard negatives among {len(images)} images, "
                f"{negatives} were asked for; ask for fewer negatives or give more images."
            )
        result.append(replace(example, candidates=(pool[positive], *(pool[i] for i in chosen))))
    return result


def _first_per_image(
    order: npt.NDArray[np.intp], owners: npt.NDArray[np.intp], words: Sequence[Words], image: int, count: int
) -> list[int]:
    """The first `count` captions in `order`: at most one per image, none of `image`, no wording twice."""
    used_images = {image}
    used_words = {words[i] for i in np.flatnonzero(owners == image).tolist()}
    chosen: list[int] = []
    for index in map(int, order):
        if len(chosen) == count:
            break
        if owners[index] not in used_images and words[index] not in used_words:
            used_images.add(int(owners[index]))
            used_words.add(words[index])
            chosen.append(index)
    return chosen


class _TfidfIndex:
    """Texts as TF-IDF vectors in an inverted index, for the cosine similarity of one to all."""

    def __init__(self, texts: Sequence[Words]) -> None:
        counts = [Counter(text) for text in texts]
        frequency = Counter(word for count in counts for word in count)
        self._vectors = [_unit_tfidf(count, frequency, len(texts)) for count in counts]
        postings: dict[str, list[tuple[int, float]]] = {}
        for number, vector in enumerate(self._vectors):
            for word, weight in vector.items():
                postings.setdefault(word, []).append((number, weight))
        self._postings = {
            word: (np.array([n for n, _ in entries]), np.array([w for _, w in entries]))
            for word, entries in postings.items()
        }

    def cosines(self, number: int) -> npt.NDArray[np.float64]:
        """Cosine similarity of text `number` to every text, [num_texts]."""
        result = np.zeros(len(self._vectors))
        for word, weight in sorted(self._vectors[number].items()):
            numbers, weights = self._postings[word]
            result[numbers] += weight * weights
        return result


def _unit_tfidf(count: Counter[str], frequency: Counter[str], num_texts: int) -> dict[str, float]:
    vector = {w: n * (math.log((num_texts + 1) / (frequency[w] + 1)) + 1) for w, n in sorted(count.items())}
    norm = math.sqrt(sum(value * value for value in vector.values()))
    return {word: value / norm for word, value in vector.items()}
