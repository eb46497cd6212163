"""Content of answers: a right answer counts in every form, a wrong one in none."""

import random

import pytest
from hones_offline.data.content import answer_content, caption_content, caption_facts, text_content
from hones_offline.data.scene_language import FORMS, ORDERS, QUESTIONS, caption
from hones_offline.data.scenes import scenes


@pytest.mark.parametrize("kind", QUESTIONS)
def test_an_answer_is_right_in_all_its_forms_and_wrong_where_the_picture_is_another(kind: str) -> None:
    rng, asked = random.Random(0), []
    for scene in scenes("dev", 60):
        if (question := QUESTIONS[kind](scene.cells, scene.text, rng)) is not None:
            asked.append(question)
    assert len(asked) >= 20
    for question in asked:
        assert all(
            answer_content(said, question) == 1 for said in (question.answer, question.phrase, question.sentence)
        )
        assert answer_content("", question) == 0
        assert answer_content(f"{question.answer} or so", question) == 0
        for other in asked:
            if other.text == question.text and other.answer != question.answer:
                assert answer_content(other.sentence, question) == 0


@pytest.mark.parametrize("said", ["AB34", "A B 3 4", "A-B-3-4", '"AB34"', "The box says AB34.", "Text: AB34"])
def test_a_transcription_counts_without_what_is_around_its_characters(said: str) -> None:
    assert text_content(said, "AB34") == 1
    assert text_content(said, "AB3X") == 0.75
    assert text_content(said, "43BA") == 0


def test_no_transcription_at_all_counts_as_nothing() -> None:
    assert text_content("", "AB34") == text_content("The box says nothing.", "AB34") == 0


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("counted", [False, True])
def test_a_caption_states_the_same_facts_in_every_form(order: str, counted: bool) -> None:
    for scene in scenes("dev", 30):
        facts = {caption_facts(caption(scene.cells, form, order, counted=counted)) for form in FORMS}
        things = sum(thing is not None for thing in scene.cells)
        (only,) = facts
        assert len(only) == things + things * (things - 1) // 2 + counted


def test_a_caption_loses_for_what_is_missing_wrong_or_in_another_order() -> None:
    reference = "The top left holds a red circle and the bottom right holds a cyan ring."  # two things, one order
    assert caption_content(reference, reference) == 1
    assert caption_content("Bottom right: cyan ring; top left: red circle.", reference) == pytest.approx(2 / 3)
    assert caption_content("There is a red circle in the top left.", reference) == pytest.approx(2 * 1 / (1 + 3))
    swapped = "A cyan ring is in the top left and a red circle is in the bottom right."
    assert caption_content(swapped, reference) == 0
    assert caption_content("Two things, " + reference, reference) == pytest.approx(2 * 3 / (4 + 3))
    assert caption_content("", reference) == 0
