"""Scores of model outputs, each in [0, 1], and bootstrap intervals over examples.

Every metric gives one row of *sufficient statistics* per example; the metric over a set of examples is a
function of the sum of their rows. For a mean, the row is the example's score; for BLEU it holds n-gram counts and
lengths. Intervals, partial sums and resumed runs therefore need the rows only, not the texts.

| metric       | source                                                              |
|--------------|---------------------------------------------------------------------|
| VQA accuracy | Antol et al., "VQA", 2015, and the challenge's answer normalization |
| ANLS         | Biten et al., "Scene Text Visual Question Answering", 2019, eq. 1    |
| BLEU-4       | Papineni et al., "BLEU", 2002, over a corpus                         |
| NDCG@k       | Järvelin & Kekäläinen, 2002; ties as in McSherry & Najork, 2008      |
"""

import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import Levenshtein

from hones_steer.errors import DataError

FloatArray = npt.NDArray[np.float64]
Aggregate = Callable[[FloatArray, int], float]
"""(sum of the examples' statistics [k], number of examples) -> the metric."""

_MAX_ORDER = 4


# ------------------------------------------------------------------------------------------ short answers

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER_WORDS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_LONE_PERIOD = re.compile(r"\.(?!\d)")

_CONTRACTED = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'d've": "he it she somebody someone something there they we who y'all you",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'re": "there they what why you",
    "'s": "he how somebody someone that there what when where who why",
    "": "ma'am o'clock 'ow's'at 'twas y'all",
}  # fmt: skip


def _spellings(word: str) -> Iterable[str]:
    """`word` with each of its apostrophes kept or dropped."""
    parts = word.split("'")
    for marks in product(("'", ""), repeat=len(parts) - 1):
        yield parts[0] + "".join(mark + part for mark, part in zip(marks, parts[1:], strict=True))


_CONTRACTIONS = {
    spelling: stem + suffix
    for suffix, stems in _CONTRACTED.items()
    for stem in stems.split()
    for spelling in _spellings(stem + suffix)
}


def normalize_answer(text: str) -> str:
    """Normalize a short answer as the VQA challenge does.

    The result is in lower case, without articles, with number words as digits and with contractions spelled with their
    apostrophes ("dont" -> "don't"). Punctuation beside a space, or in a text with a number such as "1,000", is removed;
    elsewhere it becomes a space. A period stays only before a digit.
    """
    stripped = " ".join(text.split())
    drops_all = _DIGIT_COMMA.search(stripped) is not None
    result = stripped
    for mark in _PUNCTUATION:
        beside_space = mark + " " in stripped or " " + mark in stripped
        result = result.replace(mark, "" if drops_all or beside_space else " ")
    words = _LONE_PERIOD.sub("", result).lower().split()
    numbered = (_NUMBER_WORDS.get(word, word) for word in words)
    return " ".join(_CONTRACTIONS.get(word, word) for word in numbered if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy of one answer: the mean over leave-one-out subsets of min(1, matches / 3).

    `normalize_answer` is applied to both sides. With a single answer the result is whether it matches. With two or
    three answers, of which fewer than three remain after leaving one out, it is enough to match all that remain, so
    that agreement with everybody is always 1.

    Raises:
        DataError: there are no answers.
    """
    _require_targets(answers)
    predicted = normalize_answer(prediction)
    matches = [normalize_answer(answer) == predicted for answer in answers]
    if len(matches) == 1:
        return float(matches[0])
    enough = min(3, len(matches) - 1)
    total = sum(matches)
    return sum(min(1.0, (total - match) / enough) for match in matches) / len(matches)


def exact_match(prediction: str, targets: Sequence[str]) -> float:
    """1 if the prediction equals a target, ignoring case and white space, else 0; raises DataError without targets."""
    _require_targets(targets)
    return float(any(_folded(prediction) == _folded(target) for target in targets))


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """ANLS of one transcription: the best over `answers` of 1 - NL, or 0 where NL >= `threshold`.

    NL is the Levenshtein distance divided by the longer text's length, ignoring case and white space.

    Raises:
        DataError: there are no answers.
    """
    _require_targets(answers)
    distances = (Levenshtein.normalized_distance(_folded(prediction), _folded(a)) for a in answers)
    nearest = min(distances)
    return 1.0 - nearest if nearest < threshold else 0.0


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def _require_targets(targets: Sequence[str]) -> None:
    if isinstance(targets, str):
        raise TypeError("targets must be a sequence of strings, not one string")
    if not targets:
        raise DataError("An example has no targets to be scored against; give at least one.")


# --------------------------------------------------------------------------------------------------- BLEU

_WORD = re.compile(r"(?<=\w)'\w+|\w+(?:-\w+)*")


def caption_tokens(text: str) -> list[str]:
    """Split a caption into words, nearly as COCO does: lower case, no punctuation, "man's" as "man" and "'s"."""
    return _WORD.findall(text.lower().replace("’", "'"))


def bleu4_statistics(prediction: str, references: Sequence[str]) -> FloatArray:
    """Sufficient statistics of one example for BLEU-4, float64 [10].

    [0:4] are the clipped matches and [4:8] the totals of the prediction's 1- to 4-grams, [8] is the prediction's length
    and [9] the length of the closest reference (of the shorter one on a tie).

    Raises:
        DataError: there are no references.
    """
    _require_targets(references)
    predicted = caption_tokens(prediction)
    referenced = [caption_tokens(reference) for reference in references]
    statistics = np.zeros(2 * _MAX_ORDER + 2)
    for n in range(1, _MAX_ORDER + 1):
        grams = _ngrams(predicted, n)
        limit: Counter[tuple[str, ...]] = Counter()
        for tokens in referenced:
            limit |= _ngrams(tokens, n)
        statistics[n - 1] = (grams & limit).total()
        statistics[_MAX_ORDER + n - 1] = grams.total()
    lengths = (len(tokens) for tokens in referenced)
    statistics[-2] = len(predicted)
    statistics[-1] = min(lengths, key=lambda length: (abs(length - len(predicted)), length))
    return statistics


def bleu4_from_statistics(total: FloatArray) -> float:
    """Corpus BLEU-4 from summed statistics [10]; it is not smoothed, so that it is 0 without a matching 4-gram."""
    matches, totals = total[:_MAX_ORDER], total[_MAX_ORDER:-2]
    if not matches.all():
        return 0.0
    length, reference_length = total[-2], total[-1]
    precision = np.exp(np.mean(np.log(matches / totals)))
    brevity = np.exp(min(0.0, 1.0 - reference_length / length))
    return float(precision * brevity)


def bleu4(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 of predictions; raises DataError if there are none, or another number of lists of references."""
    if len(predictions) != len(references) or not predictions:
        raise DataError(f"BLEU needs as many references ({len(references)}) as predictions ({len(predictions)}).")
    rows = [bleu4_statistics(p, r) for p, r in zip(predictions, references, strict=True)]
    return bleu4_from_statistics(np.sum(rows, axis=0))


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


# ------------------------------------------------------------------------------------------------ ranking


def ndcg_at_k(scores: npt.ArrayLike, relevant: int | Iterable[int], k: int = 5) -> float:
    """NDCG@k of one ranking by descending score, with binary relevance.

    `scores` is [n]; `relevant` is the index, or the indices, of the relevant candidates. Ties count as the mean over
    all their orders: candidates with equal scores share the mean discount of the ranks that they occupy, so that
    listing the positive first gains nothing.

    Raises:
        DataError: a score is NaN, `scores` has another number of dimensions, k is below 1, or `relevant` is empty or
            out of range.
    """
    values = np.asarray(scores, dtype=np.float64)
    positives = {int(relevant)} if isinstance(relevant, int | np.integer) else set(relevant)
    if values.ndim != 1 or np.isnan(values).any():
        raise DataError(f"NDCG needs a one-dimensional list of scores without NaN; got shape {values.shape}.")
    if not positives or min(positives) < 0 or max(positives) >= len(values) or k < 1:
        raise DataError(f"NDCG@{k} of {len(values)} candidates can't have relevant ones {sorted(positives)}.")
    ranks = np.arange(len(values))
    discounts = np.where(ranks < k, 1.0 / np.log2(ranks + 2.0), 0.0)
    _, group, sizes = np.unique(-values, return_inverse=True, return_counts=True)
    ends = np.cumsum(sizes)
    shared = np.array([discounts[end - size : end].mean() for end, size in zip(ends, sizes, strict=True)])
    gained = shared[group[sorted(positives)]].sum()
    return float(min(1.0, gained / discounts[: len(positives)].sum()))


# ------------------------------------------------------------------------------------- metrics by name


@dataclass(frozen=True)
class Metric:
    """A metric of generated text.

    `statistics(prediction, targets)` gives one example's row [k]; `aggregate(sum of rows, n)` gives the metric over n
    examples.
    """

    title: str
    statistics: Callable[[str, Sequence[str]], FloatArray]
    aggregate: Aggregate


def mean_of_rows(total: FloatArray, n: int) -> float:
    """Aggregate for every metric that is a mean over examples, whose statistics are [1]."""
    return float(total[0]) / n


def _mean_metric(title: str, score: Callable[[str, Sequence[str]], float]) -> Metric:
    return Metric(title, lambda prediction, targets: np.array([score(prediction, targets)]), mean_of_rows)


def _bleu4_aggregate(total: FloatArray, _n: int) -> float:
    return bleu4_from_statistics(total)


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "vqa": _mean_metric("VQA accuracy", vqa_accuracy),
        "anls": _mean_metric("ANLS", anls),
        "bleu4": Metric("BLEU-4", bleu4_statistics, _bleu4_aggregate),
        "exact_match": _mean_metric("exact match", exact_match),
    }
)
"""Metrics of generated text by name. To add one: write its function above and list it here."""


# ---------------------------------------------------------------------------------------------- intervals


def bootstrap_interval(
    statistics: FloatArray, aggregate: Aggregate, seed: int, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) over examples of `aggregate` on `statistics` [n, k]."""
    values = [aggregate(total, len(statistics)) for (total,) in _resampled([statistics], seed, resamples)]
    return _percentiles(values, level)


def paired_bootstrap_interval(
    a: FloatArray,
    b: FloatArray,
    aggregate: Aggregate,
    seed: int,
    resamples: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of `aggregate(a) - aggregate(b)`, both [n, k] on the same n examples.

    Each resample draws the same examples from both, so that what makes an example hard for both cancels out.
    """
    draws = _resampled([a, b], seed, resamples)
    return _percentiles([aggregate(x, len(a)) - aggregate(y, len(b)) for x, y in draws], level)


def _resampled(tables: Sequence[FloatArray], seed: int, resamples: int) -> Iterable[tuple[FloatArray, ...]]:
    """Yield, per resample, each table's sum [k] of rows drawn with replacement, the same rows from every table."""
    n = len(tables[0])
    if n == 0 or any(table.ndim != 2 or len(table) != n for table in tables):
        raise DataError(f"A bootstrap needs equal, non-zero numbers of examples; got {[len(t) for t in tables]}.")
    random = np.random.default_rng(seed)
    for _ in range(resamples):
        counts = np.bincount(random.integers(n, size=n), minlength=n).astype(np.float64)
        yield tuple(counts @ table for table in tables)


def _percentiles(values: Sequence[float], level: float) -> tuple[float, float]:
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(np.asarray(values), [tail, 1.0 - tail])
    return float(low), float(high)


_SEEDS, _TASKS = 0, 2**32 + 1  # streams of draws; between them is one for each task's examples


class CrossedBootstrap:
    """95% intervals over test examples, over seeds of the data and, for means over tasks, over tasks at the same time.

    Each of R resamples draws seeds with replacement and, independently, each task's test examples with replacement.
    The same examples are drawn for every measurement on a task (every seed, every method, the untouched model), so that
    what makes an example hard cancels out of differences. With one seed the interval is over examples alone. For means
    over tasks each resample also draws tasks with replacement (`tasks`), the same ones for every method.

    A quantity is float64 [1 + R]: the measured value, then its resamples. Quantities can be added and subtracted.
    """

    def __init__(self, resamples: int = 1000) -> None:
        self._resamples = resamples
        self._draws = cache(self._drawn)

    def _drawn(self, n: int, stream: int) -> FloatArray:
        """How often each of n items is drawn, [1 + R, n]; row 0 has each once. Each `stream` has draws of its own."""
        rng = np.random.default_rng([n, stream])
        return np.concatenate([np.ones((1, n)), rng.multinomial(n, np.full(n, 1 / n), size=self._resamples)])

    def values(self, task: str, statistics: FloatArray, aggregate: Aggregate) -> FloatArray:
        """The quantity [1 + R] of a metric, from the statistics [n, k] of the task's examples."""
        n = len(statistics)
        draws = self._draws(n, _SEEDS + 1 + zlib.crc32(task.encode()))
        return np.array([aggregate(total, n) for total in draws @ statistics])

    def over_seeds(self, per_seed: Sequence[FloatArray]) -> FloatArray:
        """The mean over seeds as a quantity [1 + R], from one quantity per seed in the seeds' order."""
        mean: FloatArray = (self._draws(len(per_seed), _SEEDS) * np.stack(per_seed, axis=1)).mean(1)
        return mean

    def tasks(self, related: npt.NDArray[np.bool_]) -> FloatArray:
        """How often each of T tasks is drawn, [1 + R, T]; row 0 has each once.

        `related` [T, T] says which tasks (columns) are averaged for each task (row). A resample that draws no two
        related tasks, so that there is nothing to average, is drawn again.

        Raises:
            DataError: no task is related to another.
        """
        if not (related & ~np.eye(len(related), dtype=bool)).any():
            raise DataError("no task is related to another, so that nothing can be averaged; give more tasks")
        n, rng = len(related), np.random.default_rng([len(related), _TASKS])
        draws = np.ones((1 + self._resamples, n))
        wanting = np.arange(1, 1 + self._resamples)
        while len(wanting):
            draws[wanting] = rng.multinomial(n, np.full(n, 1 / n), size=len(wanting))
            drawn = draws[wanting] > 0
            pairs = np.einsum("rt,tu,ru->r", drawn.astype(float), related.astype(float), drawn.astype(float))
            wanting = wanting[pairs == 0]
        return draws


def interval_of(quantity: FloatArray) -> list[float]:
    """The 95% interval [low, high] of a quantity of `CrossedBootstrap`."""
    return list(_percentiles(quantity[1:].tolist(), 0.95))
