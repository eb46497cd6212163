"""Tasks have the paper's prompts word for word, the right answers, and scores of outputs."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hones_offline import attribute
from hones_offline.data.examples import Example, MemoryImage, scene_examples
from hones_offline.data.neurons import Bank
from hones_offline.data.scenes import scenes
from hones_offline.data.tasks import TASKS, JsonlTask, Task, first_line, get_task
from hones_offline.learning.factors import FitSettings, fit_prepared, fit_run_settings
from hones_offline.running.embedded import load_tiny_vlm
from hones_offline.running.evaluation import evaluate
from hones_offline.running.execution import Execution
from hones_offline.running.prompts import prepare, render
from hones_offline.running.run_folder import run_settings
from problems import problem

from hones_steer import find_layout
from hones_steer.errors import DataError

CAPTIONS = ("A man on a bench.", "a man sits", "man with laptop")
EXAMPLES = {
    "vqa": Example("1", "Type of shoes?", ("loafer", "sneakers", "leather", "sneakers"), None),
    "ocr": Example("2", "", ("RMF",), None),
    "caption": Example("3", "", CAPTIONS, None),
    "retrieval": Example("4", "", ("Yes",), None, CAPTIONS),
}


def test_the_papers_four_tasks_are_known() -> None:
    assert list(TASKS) == ["vqa", "ocr", "caption", "retrieval"]
    assert {name: (task.metric, task.kind) for name, task in TASKS.items()} == {
        "vqa": ("VQA accuracy", "generate"),
        "ocr": ("ANLS", "generate"),
        "caption": ("BLEU-4", "generate"),
        "retrieval": ("NDCG@5", "rank"),
    }
    assert [name for name, task in TASKS.items() if task.idf_weighted] == ["caption"]
    assert get_task("ocr") is TASKS["ocr"]


def test_the_papers_protocol_is_a_task_of_its_own() -> None:
    for name, task in TASKS.items():
        released = get_task(name, protocol="paper")
        assert type(released) is type(task)
        assert (task.protocol, task.first_line, released.protocol) == ("default", False, "paper")
        assert released.prompts(EXAMPLES[name]) == task.prompts(EXAMPLES[name])
        assert released.answers(EXAMPLES[name]) == task.answers(EXAMPLES[name])
        generates = name != "retrieval"
        assert (released.first_line, released.max_new_tokens) == (generates, 24 if generates else 1)
    assert {name: task.max_new_tokens for name, task in TASKS.items()} == {
        "vqa": 16,
        "ocr": 32,
        "caption": 32,
        "retrieval": 1,
    }


def test_the_papers_protocol_draws_retrievals_negatives() -> None:
    task = get_task("retrieval", protocol="paper")
    example = Example("7", "", ("Yes",), None, tuple(f"caption {i}" for i in range(8)))
    answers = drawn(task, example, 60)
    assert answers == drawn(task, example, 60)
    assert {positive for positive, *_ in answers} == {(0, "Yes")}
    assert {len(set(negatives)) for _, *negatives in answers} == {4}
    assert len(set(answers)) > 50
    counts = Counter(negative for _, *negatives in answers for negative in negatives)
    assert set(counts) == {(i, "No") for i in range(1, 8)}
    assert min(counts.values()) > 20  # of 60·4/7 to be expected
    few = replace(example, candidates=example.candidates[:3])
    assert {tuple(sorted(pairs)) for pairs in drawn(task, few, 9)} == {((0, "Yes"), (1, "No"), (2, "No"))}


def test_an_unknown_protocol_is_an_error_that_names_the_known() -> None:
    with pytest.raises(DataError, match="Unknown protocol 'papers'; the known ones are default, paper"):
        get_task("vqa", protocol="papers")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (" cat ", "cat"),
        ("cat\nQuestion: what else?", "cat"),
        ("\n\n a cat \r\ndog", "a cat"),
        ('Answer: "a cat"', "a cat"),
        ("answer : 'cat'.", "cat'."),
        ("The answer: cat", "The answer: cat"),
        ("Answer:\ncat", ""),
        ("dogs' \n", "dogs"),
        ('"', ""),
        ("", ""),
    ],
)
def test_the_first_line_is_without_what_a_chatty_model_puts_around_it(text: str, line: str) -> None:
    assert first_line(text) == line == reference.first_line(text)


def test_the_first_line_equals_its_twin_on_any_text() -> None:
    random = np.random.default_rng(0)
    parts = np.array(["\n", " ", "'", '"', "Answer:", "answer ", ":", "cat", "\t", "\r\n", "Answers"])
    for text in ("".join(random.choice(parts, size=random.integers(9))) for _ in range(2000)):
        assert first_line(text) == reference.first_line(text)


def test_an_unknown_task_is_an_error_that_names_the_known() -> None:
    with pytest.raises(DataError, match=r"'vqa2'.*vqa, ocr, caption, retrieval"):
        get_task("vqa2")


def test_prompts_are_the_papers() -> None:
    def prompts(name: str) -> tuple[str, ...]:
        return get_task(name).prompts(EXAMPLES[name])

    assert prompts("vqa") == ("Question: Type of shoes?\nAnswer the question with a short phrase.",)
    assert prompts("ocr") == ("Transcribe the text inside the blue box.\nOutput text only.",)
    assert prompts("caption") == ("Describe the image in one sentence.",)
    assert prompts("retrieval") == tuple(
        f"Candidate: {c}\nDoes the candidate correctly describe the image?\nAnswer exactly Yes or No." for c in CAPTIONS
    )


@pytest.mark.parametrize("name", TASKS)
def test_the_embedded_model_was_trained_on_the_same_prompts(name: str) -> None:
    (scene,) = scenes("test", 1)
    (example,) = scene_examples(name, [scene], negatives=4)
    candidates = example.candidates or ("",)
    assert get_task(name).prompts(example) == tuple(scene.prompt(name, c) for c in candidates)


def test_answers_are_what_attribution_measures() -> None:
    answers = {name: get_task(name).answers(example) for name, example in EXAMPLES.items() if name != "retrieval"}
    assert answers == {
        "vqa": ((0, "sneakers"),),
        "ocr": ((0, "RMF"),),
        "caption": ((0, "A man on a bench."),),
    }


def drawn(task: Task, example: Example, seeds: int) -> list[Any]:
    return [task.drawn_answers(example, np.random.default_rng(seed)) for seed in range(seeds)]


@pytest.mark.parametrize("task", [get_task("caption"), JsonlTask("poems", "bleu4")], ids=["caption", "bleu4"])
def test_learning_draws_one_of_the_references_and_a_seed_draws_the_same(task: Task) -> None:
    example = EXAMPLES["caption"]
    answers = drawn(task, example, 60)
    assert {len(pairs) for pairs in answers} == {1}
    counts = Counter(text for ((_, text),) in answers)
    assert set(counts) == set(CAPTIONS)
    assert min(counts.values()) > 10  # of 20 to be expected
    assert answers == drawn(task, example, 60)
    assert task.answers(example) == ((0, CAPTIONS[0]),)


@pytest.mark.parametrize("task", [*map(get_task, ("vqa", "ocr")), *(JsonlTask("own", m) for m in ("vqa", "anls"))])
def test_learning_takes_the_answers_where_there_are_no_references_to_draw_from(task: Task) -> None:
    example = EXAMPLES["vqa"]
    assert set(drawn(task, example, 20)) == {task.answers(example)}


def test_retrieval_has_the_positive_and_four_of_the_negatives() -> None:
    example = scene_examples("retrieval", scenes("dev", 1), negatives=9)[0]
    answers = [get_task("retrieval").answers(replace(example, id=str(i))) for i in range(60)]
    assert {positive for positive, *_ in answers} == {(0, "Yes")}
    assert {len(set(negatives)) for _, *negatives in answers} == {4}
    counts = Counter(negative for _, *negatives in answers for negative in negatives)
    assert set(counts) == {(i, "No") for i in range(1, 10)}
    assert min(counts.values()) > 10  # of 60·4/9 to be expected


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_retrieval_with_few_negatives_has_all_there_are(count: int) -> None:
    example = Example("7", "", ("Yes",), None, tuple(f"caption {i}" for i in range(1 + count)))
    assert sorted(get_task("retrieval").answers(example)) == [(0, "Yes"), *((i, "No") for i in range(1, 1 + count))]
    assert get_task("retrieval").drawn_answers(example, np.random.default_rng(0)) == get_task("retrieval").answers(
        example
    )


def test_target_texts_are_what_write_in_aims_at() -> None:
    texts = {name: get_task(name).target_texts(example) for name, example in EXAMPLES.items()}
    assert texts == {"vqa": ("sneakers",), "ocr": ("RMF",), "caption": CAPTIONS, "retrieval": ("Yes",)}


class Sits(Task):
    """A user's task whose importance is measured towards other words than those that it learns."""

    name = "sits"

    def target_texts(self, example: Example) -> tuple[str, ...]:  # noqa: ARG002
        return ("sits on", "mat")


@pytest.mark.parametrize(("kind", "words"), [("retrieval", ["Yes"]), ("caption", ["sits", "on", "mat"])])
def test_attribution_measures_towards_the_target_texts_at_the_first_prompt(kind: str, words: list[str]) -> None:
    """Retrieval is measured towards "Yes" after the right caption, though it also learns "No" after a wrong one."""
    p = problem("llava", kind, count=3)
    task = p.task if kind == "retrieval" else Sits()
    ids = [p.processor.tokenizer.convert_tokens_to_ids(word) for word in words]
    towards = torch.nn.functional.normalize(p.model.lm_head.weight.detach()[ids].sum(0), dim=0)
    layers, expected = find_layout(p.model).layers, 0
    for example in p.examples:
        with torch.no_grad(), reference.ffn_inputs_recorded(p.model) as z:
            p.model(**reference.prompt_inputs(p.processor, example, task.prompts(example)[0]))
        expected += (
            torch.stack([z[part.index, "dense"][-1] * (towards @ part.down_proj.weight.detach()) for part in layers])
            / 3
        )
    found = attribute(p.model, p.processor, task, p.examples, method="dvp", head_metric="logprob", top_fraction=0.1)
    np.testing.assert_allclose(found.importance, expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", TASKS)
def test_answers_point_at_prompts(name: str) -> None:
    task, example = get_task(name), EXAMPLES[name]
    assert {index for index, _ in task.answers(example)} <= set(range(len(task.prompts(example))))


@pytest.mark.parametrize(
    ("name", "output", "expected"),
    [
        ("vqa", "Sneakers.", 0.5),  # two of four: leaving one out, 2/3 or 1/3 of enough
        ("vqa", "boots", 0.0),
        ("ocr", "rmf", 1.0),
        ("ocr", "RMS", 2 / 3),
        ("caption", "a man on a bench", 1.0),
        ("caption", "a dog", 0.0),
        ("retrieval", np.array([2.0, 1.0, -1.0]), 1.0),
        ("retrieval", np.array([0.0, 1.0, -1.0]), 1 / np.log2(3)),
    ],
)
def test_outputs_are_scored_by_the_tasks_metric(name: str, output: Any, expected: float) -> None:
    task = get_task(name)
    assert task.aggregate(task.statistics(EXAMPLES[name], output), 1) == pytest.approx(expected)


def test_means_are_over_examples_and_bleu_is_over_the_corpus() -> None:
    ocr, caption = get_task("ocr"), get_task("caption")
    rows = [ocr.statistics(EXAMPLES["ocr"], text) for text in ("RMF", "xxx")]
    assert ocr.aggregate(np.sum(rows, axis=0), 2) == 0.5
    rows = [caption.statistics(EXAMPLES["caption"], text) for text in ("a man on a bench", "a man on a bench")]
    assert caption.aggregate(np.sum(rows, axis=0), 2) == pytest.approx(1.0)
    assert {row.shape for row in rows} == {(10,)}


def test_an_output_of_the_wrong_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="text"):
        get_task("vqa").statistics(EXAMPLES["vqa"], np.zeros(3))
    with pytest.raises(TypeError, match="3 margins"):
        get_task("retrieval").statistics(EXAMPLES["retrieval"], np.zeros(2))
    with pytest.raises(TypeError, match="3 margins"):
        get_task("retrieval").statistics(EXAMPLES["retrieval"], "Yes")


def test_retrieval_without_candidates_is_an_error_that_names_the_example() -> None:
    with pytest.raises(DataError, match="'9'"):
        get_task("retrieval").prompts(Example("9", "", ("Yes",), None))


# ---------------------------------------------------------------------------------------- a user's own


@pytest.mark.parametrize(
    ("metric", "title", "answer", "texts", "score"),
    [
        ("exact_match", "exact match", "cow", ("cow",), 1.0),
        ("vqa", "VQA accuracy", "cat", ("cat",), 0.8),
        ("anls", "ANLS", "cow", ("cow",), 1.0),
        ("bleu4", "BLEU-4", "cow", ("cow", "cat", "cat", "Cat", "dog"), 0.0),
    ],
)
def test_a_task_from_jsonl_takes_its_prompt_as_it_is(
    metric: str, title: str, answer: str, texts: tuple[str, ...], score: float
) -> None:
    task = JsonlTask("animals", metric, max_new_tokens=5)
    example = Example("1", "Which animal?", ("cow", "cat", "cat", "Cat", "dog"), None)
    assert (task.name, task.metric, task.kind, task.max_new_tokens) == ("animals", title, "generate", 5)
    assert task.prompts(example) == ("Which animal?",)
    assert task.answers(example) == ((0, answer),)
    assert task.target_texts(example) == texts
    assert task.idf_weighted == (metric == "bleu4")
    assert task.aggregate(task.statistics(example, "cat"), 1) == pytest.approx(score)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"name": "a", "metric": "rouge"}, "'rouge'; choose one of vqa, anls, bleu4, exact_match"),
        ({"name": "a b"}, "'a b'"),
        ({"name": "none"}, "'none'"),
        ({"name": "a", "max_new_tokens": 0}, "0 tokens"),
    ],
)
def test_a_task_from_jsonl_refuses_bad_settings(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        JsonlTask(**arguments)


class Begun(Task):
    """Begins its answers with words of the example's."""

    name = "begun"
    max_new_tokens = 4

    def opening(self, example: Example) -> str:
        return f"{example.prompt} has"


def test_an_opening_is_what_the_model_goes_on_from() -> None:
    """Against transformers' `generate` on the whole text; another opening is another run."""
    model, processor = load_tiny_vlm()
    picture = scenes("dev", 1)[0].image()
    image = MemoryImage(picture, "picture")
    examples = [Example(str(i), f"The {word} one", ("nothing",), image) for i, word in enumerate(("first", "second"))]
    outputs, scored = [], evaluate(model, processor, Begun(), examples).outputs
    for example in examples:
        text = f"{render(processor, example.prompt, has_image=True)}{example.prompt} has"
        inputs = processor(images=picture, text=text, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        outputs.append(processor.decode(ids, skip_special_tokens=True).strip())
    assert list(scored) == outputs
    plain = Begun()
    plain.opening = Task().opening  # type: ignore[method-assign]
    one, other = (run_settings(prepare(model, processor, task, examples)) for task in (Begun(), plain))
    assert {name for name in one if one[name] != other[name]} == {"prompts"}


class Color(Task):
    """Name the color of a thing; each example's prompt is the thing's name."""

    name = "color"
    metric = "accuracy"
    max_new_tokens = 4

    def prompt(self, example: Example) -> str:
        return f"What color is the {example.prompt}? Answer with one word."

    def score(self, example: Example, output: str) -> float:
        return float(output.strip().lower().startswith(example.targets[0]))


def test_a_task_of_ones_own_is_one_small_class() -> None:
    task, example = Color(), Example("1", "sky", ("blue",), None)
    assert task.prompts(example) == ("What color is the sky? Answer with one word.",)
    assert task.answers(example) == ((0, "blue"),)
    assert task.target_texts(example) == ("blue",)
    rows = [task.statistics(example, text) for text in (" Blue, I think", "gray")]
    assert task.aggregate(np.sum(rows, axis=0), len(rows)) == 0.5


class Both(Task):
    """A user's task with an answer of its own, or pairs of its own, that learning is to take."""

    name = "both"

    def answer(self, example: Example) -> str:
        return example.targets[-1]


class Pairs(Both):
    def prompts(self, example: Example) -> tuple[str, ...]:
        return (example.prompt, example.prompt + " Say more.")

    def answers(self, example: Example) -> tuple[tuple[int, str], ...]:
        return ((1, example.targets[0]), (0, self.answer(example)))


def test_answers_of_ones_own_are_learned_as_they_are() -> None:
    example = Example("1", "Sky?", ("blue", "azure"), None)
    assert set(drawn(Both(), example, 5)) == {((0, "azure"),)}
    assert set(drawn(Pairs(), example, 5)) == {((1, "blue"), (0, "azure"))}


class Nothing(Both):
    def answers(self, example: Example) -> tuple[tuple[int, str], ...]:
        return super().answers(example) if example.id == "0" else ()


@pytest.mark.parametrize("method", ["answers", "drawn_answers"])
def test_a_task_that_has_no_answer_for_an_example_is_an_error_that_names_both(method: str) -> None:
    p = problem("llava", "vqa")
    prepared = prepare(p.model, p.processor, Nothing(), p.examples)
    take = prepared.pairs if method == "answers" else lambda: prepared.drawn_answers(seed=0)
    with pytest.raises(DataError, match=rf"task 'both' has no answer for example '1'; let its {method} give at least"):
        take()


class Draws(Pairs):
    def drawn_answers(self, example: Example, random: np.random.Generator) -> tuple[tuple[int, str], ...]:
        return ((random.integers(2), example.targets[0]),)  # a NumPy integer


def test_a_prompt_can_be_drawn_as_numpy_draws_it() -> None:
    p = problem("llava", "vqa")
    prepared = prepare(p.model, p.processor, Draws(), p.examples)
    settings = FitSettings(epochs=1, batch_size=2)
    assert fit_run_settings(prepared, Bank({0: [1]}), settings) == fit_run_settings(prepared, Bank({0: [1]}), settings)
    assert fit_prepared(prepared, Bank({0: [1]}), settings, Execution()).num_neurons == 1


def test_a_task_of_ones_own_is_scored_by_exact_match_unless_it_says_otherwise() -> None:
    class Plain(Task):
        name = "plain"

    example = Example("1", "Sky?", ("blue", "azure"), None)
    assert Plain().metric == "exact match"
    assert Plain().prompts(example) == ("Sky?",)
    assert Plain().statistics(example, "Azure ").tolist() == [1.0]
    assert Plain().statistics(example, "azure sky").tolist() == [0.0]
