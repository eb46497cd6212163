"""Metrics: known values, published examples, and what must hold for any input."""

from itertools import pairwise, permutations

import numpy as np
import pytest
from hones_offline.data.metrics import (
    METRICS,
    anls,
    bleu4,
    bleu4_from_statistics,
    bleu4_statistics,
    bootstrap_interval,
    exact_match,
    mean_of_rows,
    ndcg_at_k,
    normalize_answer,
    paired_bootstrap_interval,
    vqa_accuracy,
)
from hypothesis import given
from hypothesis import strategies as st

from hones_steer.errors import DataError

texts = st.text(max_size=20)
sentences = st.lists(st.sampled_from(["a", "man", "red", "dog", "on"]), min_size=0, max_size=9).map(" ".join)
targets = st.lists(texts, min_size=1, max_size=10)


# ---------------------------------------------------------------------------------------------------- VQA


@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_is_the_official_ten_answer_formula(agreeing: int, expected: float) -> None:
    answers = ["yes"] * agreeing + ["no"] * (10 - agreeing)
    assert vqa_accuracy("yes", answers) == pytest.approx(expected)


def test_vqa_accuracy_with_one_answer_is_the_normalized_match() -> None:
    assert vqa_accuracy("The Dog.", ["dog"]) == 1.0
    assert vqa_accuracy("dogs", ["dog"]) == 0.0


def test_vqa_accuracy_with_two_answers_can_reach_one() -> None:
    assert vqa_accuracy("dog", ["dog", "dog"]) == 1.0
    assert vqa_accuracy("dog", ["dog", "cat"]) == 0.5
    assert vqa_accuracy("dog", ["cat", "cow"]) == 0.0


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("The  Cat", "cat"),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("dont know", "don't know"),
        ("Don't know", "don't know"),
        ("couldn'tve", "couldn't've"),
        ("twas", "'twas"),
        ("were", "were"),
        ("its", "its"),
        ("black-and-white", "black and white"),
        ("black - white", "black white"),
        ("red, white, blue", "red white blue"),
        ("red,white", "red white"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("Mr. X.", "mr x"),
        ("yes!\n", "yes"),
        ("", ""),
    ],
)
def test_answers_are_normalized_as_in_the_challenge(raw: str, normal: str) -> None:
    assert normalize_answer(raw) == normal


# --------------------------------------------------------------------------------------------------- ANLS


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("STOP", ["stop"], 1.0),
        (" coca  cola", ["Coca Cola"], 1.0),
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("kitten", ["sitting", "kittens"], 1 - 1 / 7),
        ("ab", ["ax"], 0.0),  # NL is exactly the threshold
        ("cat", ["dog"], 0.0),
        ("", ["dog"], 0.0),
    ],
)
def test_anls_known_values(prediction: str, answers: list[str], expected: float) -> None:
    assert anls(prediction, answers) == pytest.approx(expected)


def test_anls_threshold_is_a_limit_on_the_distance() -> None:
    assert anls("ab", ["ax"], threshold=0.6) == 0.5


# --------------------------------------------------------------------------------------------------- BLEU


def test_bleu_counts_are_clipped_as_in_the_paper() -> None:
    """Papineni et al., example 2: 2/7 unigrams, and the closer reference's length."""
    statistics = bleu4_statistics(
        "the the the the the the the", ["The cat is on the mat.", "There is a cat on the mat."]
    )
    assert statistics[0] == 2
    assert statistics[4] == 7
    assert statistics[8:].tolist() == [7, 7]


def test_bleu_bigrams_as_in_the_paper() -> None:
    """Papineni et al., example 1, candidate 1: 17 of 18 unigrams and 10 of 17 bigrams."""
    candidate = "It is a guide to action which ensures that the military always obeys the commands of the party."
    references = [
        "It is a guide to action that ensures that the military will forever heed Party commands.",
        "It is the guiding principle which guarantees the military forces always being under the command of the Party.",
        "It is the practical guide for the army always to heed the directions of the party.",
    ]
    statistics = bleu4_statistics(candidate, references)
    assert statistics[[0, 1, 4, 5]].tolist() == [17, 10, 18, 17]
    assert statistics[8:].tolist() == [18, 18]


def test_bleu_known_values() -> None:
    reference = ["The cat sat on the mat."]
    assert bleu4(["the cat sat on the mat today"], [reference]) == pytest.approx((3 / 7) ** 0.25)
    assert bleu4(["the cat sat on"], [reference]) == pytest.approx(np.exp(1 - 6 / 4))
    assert bleu4(["the cat sat"], [reference]) == 0.0
    assert bleu4([""], [reference]) == 0.0


def test_bleu_takes_the_shorter_of_two_equally_close_references() -> None:
    assert bleu4_statistics("a b c d e", ["a b c d e f", "a b c d"])[-1] == 4


def test_bleu_is_of_the_corpus_not_a_mean_over_sentences() -> None:
    predictions = ["a red dog on a mat", "a man"]
    references = [["a red dog on a mat"], ["a man on a horse"]]
    # 8/8 unigrams, 6/6 bigrams, 4/4 trigrams, 3/3 4-grams; 8 words against 6 + 5.
    assert bleu4(predictions, references) == pytest.approx(np.exp(1 - 11 / 8))


def test_bleu_ignores_case_and_punctuation_and_splits_the_possessive() -> None:
    assert bleu4(["The man’s dog, on a bed!"], [["the MAN'S dog -- on a bed."]]) == 1.0
    assert bleu4_statistics("the man's", ["x"])[8] == 3


def test_bleu_refuses_lists_of_different_length() -> None:
    with pytest.raises(DataError, match="references"):
        bleu4(["a"], [["a"], ["b"]])


# --------------------------------------------------------------------------------------------------- NDCG


@pytest.mark.parametrize(("rank", "expected"), [(1, 1.0), (2, 1 / np.log2(3)), (3, 0.5), (5, 1 / np.log2(6)), (6, 0.0)])
def test_ndcg_of_one_positive_is_its_discount(rank: int, expected: float) -> None:
    scores = -np.arange(10.0)
    assert ndcg_at_k(scores, relevant=rank - 1) == pytest.approx(expected)


def test_ndcg_of_several_positives() -> None:
    gained, best = 1 + 1 / np.log2(4), 1 + 1 / np.log2(3)
    assert ndcg_at_k([5.0, 4.0, 3.0], relevant={0, 2}) == pytest.approx(gained / best)


def test_ndcg_gives_nothing_for_listing_the_positive_first() -> None:
    chance = sum(1 / np.log2(rank + 1) for rank in range(1, 6)) / 50
    assert ndcg_at_k(np.zeros(50), relevant=0) == pytest.approx(chance)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.data())
def test_ndcg_of_ties_is_the_mean_over_their_orders(scores: list[int], data: st.DataObject) -> None:
    relevant = data.draw(st.sets(st.integers(0, len(scores) - 1), min_size=1))
    k = data.draw(st.integers(1, 7))
    orders = [o for o in permutations(range(len(scores))) if all(scores[a] >= scores[b] for a, b in pairwise(o))]
    ideal = sum(1 / np.log2(rank + 2) for rank in range(min(k, len(relevant))))
    gains = [sum(1 / np.log2(r + 2) for r, i in enumerate(o[:k]) if i in relevant) for o in orders]
    assert ndcg_at_k(scores, relevant, k) == pytest.approx(np.mean(gains) / ideal)


@pytest.mark.parametrize(
    ("scores", "relevant", "k"),
    [
        ([1.0, float("nan")], 0, 5),
        ([1.0], 1, 5),
        ([1.0], -1, 5),
        ([1.0], set(), 5),
        ([], 0, 5),
        ([1.0], 0, 0),
    ],
)
def test_ndcg_refuses_what_has_no_ranking(scores: list[float], relevant: int | set[int], k: int) -> None:
    with pytest.raises(DataError, match="NDCG"):
        ndcg_at_k(scores, relevant, k)


# ------------------------------------------------------------------------------------------ all metrics


@pytest.mark.parametrize("name", METRICS)
@given(prediction=texts | sentences, references=targets | st.lists(sentences, min_size=1, max_size=5))
def test_metrics_lie_in_range_and_ignore_the_order_of_targets(
    name: str, prediction: str, references: list[str]
) -> None:
    metric = METRICS[name]
    row = metric.statistics(prediction, references)
    assert 0.0 <= metric.aggregate(row, 1) <= 1.0
    assert np.allclose(row, metric.statistics(prediction, references[::-1]))


@pytest.mark.parametrize("name", METRICS)
@given(target=st.text("abc xyz", min_size=1).filter(str.strip), count=st.integers(1, 10))
def test_agreeing_with_every_target_is_perfect(name: str, target: str, count: int) -> None:
    long_enough = f"{target} in the dark"  # BLEU-4 needs four words
    row = METRICS[name].statistics(long_enough, [long_enough] * count)
    assert METRICS[name].aggregate(row, 1) == pytest.approx(1.0)


@pytest.mark.parametrize("name", METRICS)
def test_metrics_refuse_missing_targets(name: str) -> None:
    with pytest.raises(DataError, match="no targets"):
        METRICS[name].statistics("x", [])
    with pytest.raises(TypeError, match="not one string"):
        METRICS[name].statistics("x", "one string")


@given(st.lists(st.tuples(sentences, st.lists(sentences, min_size=1, max_size=3)), min_size=1, max_size=5))
def test_bleu_of_a_corpus_is_that_of_its_summed_statistics(corpus: list[tuple[str, list[str]]]) -> None:
    predictions, references = zip(*corpus, strict=True)
    total = sum((bleu4_statistics(p, r) for p, r in corpus), np.zeros(10))
    assert bleu4_from_statistics(total) == bleu4(predictions, references)
    assert bleu4(predictions[::-1], references[::-1]) == pytest.approx(bleu4(predictions, references))


def test_exact_match_ignores_case_and_white_space_only() -> None:
    assert exact_match(" New\nYork", ["Boston", "new  york"]) == 1.0
    assert exact_match("New York.", ["new york"]) == 0.0


# ---------------------------------------------------------------------------------------------- intervals


def test_bootstrap_of_a_mean_is_as_wide_as_theory_says() -> None:
    rows = np.repeat([0.0, 1.0], 200)[:, None]
    low, high = bootstrap_interval(rows, mean_of_rows, seed=0, resamples=4000)
    half = 1.96 * 0.5 / np.sqrt(400)
    assert low == pytest.approx(0.5 - half, abs=0.006)
    assert high == pytest.approx(0.5 + half, abs=0.006)


def test_bootstrap_is_deterministic_for_its_seed() -> None:
    rows = np.random.default_rng(1).random((50, 1))
    first = bootstrap_interval(rows, mean_of_rows, seed=7)
    assert first == bootstrap_interval(rows, mean_of_rows, seed=7)
    assert first != bootstrap_interval(rows, mean_of_rows, seed=8)


def test_bootstrap_level_widens_the_interval() -> None:
    rows = np.random.default_rng(1).random((50, 1))
    low, high = bootstrap_interval(rows, mean_of_rows, seed=7, level=0.5)
    wide_low, wide_high = bootstrap_interval(rows, mean_of_rows, seed=7, level=0.99)
    assert wide_low < low < high < wide_high


def test_bootstrap_of_bleu_brackets_its_value() -> None:
    words = ["a red dog on a mat", "a man with a big hat", "two cats in the dark"]
    rows = np.array([bleu4_statistics(words[i % 3], [words[i % 2]]) for i in range(30)])
    metric = METRICS["bleu4"]
    low, high = bootstrap_interval(rows, metric.aggregate, seed=0)
    assert 0.0 < low < metric.aggregate(rows.sum(axis=0), 30) < high < 1.0


def test_paired_bootstrap_sees_through_what_both_share() -> None:
    random = np.random.default_rng(0)
    hardness = random.random((200, 1))
    a, b = hardness + 0.01, hardness
    low, high = paired_bootstrap_interval(a, b, mean_of_rows, seed=0)
    assert low == pytest.approx(0.01)
    assert high == pytest.approx(0.01)
    shuffled = random.permutation(b)
    low, high = paired_bootstrap_interval(a, shuffled, mean_of_rows, seed=0)
    assert low < 0 < high


def test_bootstrap_refuses_no_examples_and_unequal_pairs() -> None:
    with pytest.raises(DataError, match="bootstrap"):
        bootstrap_interval(np.zeros((0, 1)), mean_of_rows, seed=0)
    with pytest.raises(DataError, match="bootstrap"):
        paired_bootstrap_interval(np.zeros((3, 1)), np.zeros((2, 1)), mean_of_rows, seed=0)
