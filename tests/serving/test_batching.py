"""Requests that the transformers engine answers together are answered as each alone.

Alone is: transformers' `generate` on a model without any of our code, its projections scaled as
`reference_steering.scaled` spells it out. Rows are put to the engine directly, so that who is in a batch with whom,
and what happens at which token, is not a matter of time.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from hones_offline.data.scenes import scenes
from hones_serving.metrics import Metrics
from hones_serving.registry import Admission, ProfileRegistry, label_of
from hones_serving.transformers_server.batching import generate_together
from hones_serving.transformers_server.continuous import PAGE, Pages, cache_tokens, has_pages
from hones_serving.transformers_server.exactness import exact_pages, is_exact
from hones_serving.transformers_server.generation import Batches, Waiting
from hones_serving.transformers_server.rows import SEED, Row
from hones_serving.transformers_server.turns import Turn, Turns
from prometheus_client import CollectorRegistry
from reference_steering import generated_in_scope, scaled
from serving.steered import prompts, words, write_profiles
from tiny_models import random_profile
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from hones_steer import MismatchError, Profile, StateError, steer
from hones_steer.profile import ModelIdentity
from hones_steer.store import combine, parse_expression

pytestmark = pytest.mark.anyio

NEW = 12
EXPRESSIONS = ("vqa", "ocr@1.5", "none", "vqa@0.5+ocr", "cap")
SETTINGS: Sequence[dict[str, Any]] = (
    {},
    {"do_sample": True, "temperature": 0.8, "seed": 1},
    {"max_new_tokens": 3},
    {"no_repeat_ngram_size": 2, "min_new_tokens": 8},
    {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "seed": 2},
    {"repetition_penalty": 1.3, "max_new_tokens": 20},
    {"do_sample": True, "top_k": 5, "repetition_penalty": 1.2, "seed": 1},
    {"sequence_bias": {(17,): 5.0}},
)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


class Heard:
    """A listener that notes what it hears, and calls `then[n]` at the nth token; it may leave after some."""

    def __init__(self, then: dict[int, Callable[[], object]] | None = None, leaves_after: int = -1) -> None:
        self.tokens: list[int] = []
        self.answer: list[int] | None = None
        self.error: Exception | None = None
        self._then = then or {}
        self._leaves_after = leaves_after

    def put(self, token: int) -> bool:
        self.tokens.append(token)
        self._then.get(len(self.tokens), int)()
        return len(self.tokens) != self._leaves_after

    def end(self, tokens: torch.Tensor) -> None:
        self.answer = tokens.tolist()

    def fail(self, error: Exception) -> None:
        self.error = error


@dataclass
class Engine:
    """Batches to answer rows with, the same model without it, and the (rows, tokens) of each forward."""

    model: Any
    plain: Any
    processor: Any
    batches: Batches
    profiles: dict[str, Profile]
    collector: CollectorRegistry
    pages: Pages | None
    waiting: Waiting = field(default_factory=Waiting)
    forwards: list[tuple[int, int]] = field(default_factory=list)

    def ask(
        self, inputs: Any, expression: str = "none", heard: Heard | None = None, **settings: Any
    ) -> tuple[Row, Heard]:
        """Let a request wait; `inputs` are a prompt's tokens, or a processor's inputs; `settings` may have a scope."""
        heard = heard or Heard()
        SEED.set(settings.pop("seed", None))
        scope = settings.pop("scope", "all")
        turn = Turn(Turns())
        turn.ask()
        admission = Admission(self.profile(expression), label_of(parse_expression(expression)), scope)
        row = Row(_inputs(inputs), self.config(settings), self.processor, admission, turn, heard)
        self.waiting.add(row)
        return row, heard

    def work(self) -> None:
        """Answer all that wait, and all that come meanwhile."""
        while self.waiting._rows:
            self.batches.answer(self.waiting.first(), self.waiting)

    def alone(self, inputs: Any, expression: str = "none", processor: Any = None, **settings: Any) -> list[int]:
        """The answer of plain `generate`."""
        seed = settings.pop("seed", None)
        if seed is not None:
            torch.manual_seed(seed)
        inputs = _inputs(inputs)
        with scaled(self.plain, self.profile(expression)):
            ids = self.plain.generate(**inputs, generation_config=self.config(settings), tokenizer=processor)
        return ids[0, inputs["input_ids"].shape[1] :].tolist()

    def alone_in_scope(self, inputs: Any, expression: str, scope: str, count: int = NEW) -> list[int]:
        """The answer of greedy decoding, each token from the whole sequence computed anew."""
        (tokens,) = generated_in_scope(self.plain, _inputs(inputs), [self.profile(expression)], [scope], count)
        return tokens

    def profile(self, expression: str) -> Profile | None:
        return combine(parse_expression(expression), self.profiles.__getitem__)

    def config(self, settings: dict[str, Any]) -> Any:
        config = copy.deepcopy(self.plain.generation_config)
        config.update(**{"max_new_tokens": NEW, **settings})
        return config

    def counted(self, label: str) -> float:
        return self.collector.get_sample_value("hones_tokens_total", {"profile": label}) or 0


def _inputs(inputs: Any) -> dict[str, torch.Tensor]:
    if isinstance(inputs, list):
        ids = torch.tensor([inputs])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return dict(inputs)


def engine(
    kind: Any, checkpoint: Path, processor: Any, here: Path, most: int = 16, size: int | None = None, **options: Any
) -> Engine:
    """An engine of a checkpoint, with pages unless `size` is 0."""
    model, plain = (kind.from_pretrained(checkpoint, dtype=torch.float32).eval() for _ in range(2))
    profiles = write_profiles(plain, here / "profiles", **options)
    steering = steer(model, {}, max_profiles=most, allow_mismatch=True)
    identity = ModelIdentity.from_model(plain)
    registry = ProfileRegistry(here / "profiles", identity, max_profiles=1, always_enough=True)
    collector = CollectorRegistry()
    padded = is_exact(model, processor, lambda rows: generate_together(model, rows), "padding")
    assert padded
    pages = None
    if size != 0:
        assert has_pages(model)
        pages = exact_pages(model, processor, most, size or cache_tokens(model, most, 0.01))
        assert pages is not None
    batches = Batches(model, steering, Metrics(registry, collector), most=most, padded=padded, pages=pages)
    made = Engine(model, plain, processor, batches, profiles, collector, pages)

    def note(_module: object, _args: object, kwargs: dict[str, Any]) -> None:
        made.forwards.append(tuple(kwargs["input_ids"].shape))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return made


@pytest.fixture(scope="module", params=["pages", "generate"])
def text(request: pytest.FixtureRequest, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A Llama's engine, with continuous batching and without."""
    here = tmp_path_factory.mktemp("text")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    return engine(AutoModelForCausalLM, llama, tokenizer, here, size=0 if request.param == "generate" else None)


@pytest.fixture
def together(text: Engine) -> Iterator[Engine]:
    text.forwards.clear()
    yield text
    assert not text.batches._uses  # no profile is left behind
    assert text.batches._steering.names == ()


async def test_16_mixed_requests_are_answered_as_each_alone(together: Engine) -> None:
    asked = [
        (prompt, EXPRESSIONS[i % len(EXPRESSIONS)], SETTINGS[i % len(SETTINGS)])
        for i, prompt in enumerate(prompts(16, longest=40))
    ]
    answers = [together.ask(prompt, expression, **settings)[1] for prompt, expression, settings in asked]
    together.work()
    expected = [together.alone(prompt, expression, **settings) for prompt, expression, settings in asked]
    assert [heard.answer for heard in answers] == expected
    assert [heard.tokens for heard in answers] == expected  # as streamed
    plain = [together.alone(prompt, **settings) for prompt, _, settings in asked]
    assert sum(a != b for a, b in zip(expected, plain, strict=True)) >= 10
    assert len({len(tokens) for tokens in expected}) >= 3  # some end before others
    steps = max(map(len, expected))
    assert len(together.forwards) <= steps + 2  # one batch, not sixteen


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes, which transformers can look for stop strings in, unlike the one of words."""
    names = sorted(pre_tokenizers.ByteLevel.alphabet()) + [f"<{i}>" for i in range(256, 300)]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


async def test_each_request_stops_at_its_own_strings(together: Engine) -> None:
    tokenizer = bytes_tokenizer()
    asked, expected = [], []
    for i in range(4):
        prompt, expression = words(6 + 3 * i, seed=i), EXPRESSIONS[i]
        unstopped = together.alone(prompt, expression, max_new_tokens=30)
        stop = next(text for text in map(tokenizer.decode, unstopped[2 + i :]) if text.isascii())
        asked.append((prompt, expression, {"stop_strings": [stop], "max_new_tokens": 30}))
        expected.append(together.alone(*asked[-1][:2], processor=tokenizer, **asked[-1][2]))
    answers = [together.ask(prompt, expression, **settings) for prompt, expression, settings in asked]
    for row, _ in answers:
        row.processor = tokenizer
    together.work()
    assert [heard.answer for _, heard in answers] == expected
    assert max(map(len, expected)) < 30
    assert len(set(map(len, expected))) > 1


async def test_an_unsteered_request_beside_steered_ones_gets_its_bits(llama: Path, tmp_path: Path) -> None:
    """Compares logits with those of the same batch, in which nobody is steered."""
    here = engine(AutoModelForCausalLM, llama, AutoTokenizer.from_pretrained(llama), tmp_path)
    logits: list[torch.Tensor] = []

    class Keeping(Row):
        def choose(self, values: torch.Tensor) -> int:
            if self.profile is None:
                logits.append(values.clone())
            return super().choose(values)

    for others in ("none", "vqa", "ocr"):
        rows = [here.ask(words(9, seed=i), others if i % 2 else "none", max_new_tokens=1)[0] for i in range(6)]
        for row in rows:
            row.__class__ = Keeping
        if others == "none":
            for row in rows[1::2]:
                row.__class__ = Row
        here.work()
    found = torch.stack(logits).view(3, 3, -1)
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])


async def test_who_comes_later_joins_or_waits_its_turn(together: Engine) -> None:
    order: list[str] = []

    def late() -> None:
        together.ask(words(5, seed=8), "ocr", Heard({3: lambda: order.append("late")}), max_new_tokens=3)

    _, first = together.ask(words(7), "vqa", Heard({5: late, 30: lambda: order.append("first")}), max_new_tokens=30)
    together.work()
    assert first.answer == together.alone(words(7), "vqa", max_new_tokens=30)
    assert order == (["late", "first"] if together.pages else ["first", "late"])


async def test_one_that_only_generate_can_answer_waits_for_its_turn_and_those_behind_it_too(together: Engine) -> None:
    order: list[int] = []
    asked: list[tuple[Any, str, dict[str, Any]]] = [
        (words(5), "vqa", {"max_new_tokens": 9}),
        (words(6), "ocr", {"num_beams": 3, "max_new_tokens": 5}),
        (words(7), "cap", {"max_new_tokens": 2}),
    ]
    answers = []
    for i, (prompt, expression, settings) in enumerate(asked):
        last = settings["max_new_tokens"]
        heard = Heard({last: lambda i=i: order.append(i)})  # type: ignore[misc]
        answers.append(together.ask(prompt, expression, heard, **settings)[1])
    together.work()
    assert [heard.answer for heard in answers] == [together.alone(prompt, task, **more) for prompt, task, more in asked]
    assert order == (
        [0, 2] if together.pages else [2, 0]
    )  # without pages, the third joins the first; beams do not stream


async def test_who_leaves_costs_nobody_else_anything(together: Engine) -> None:
    before = together.counted("ocr")
    gone, unheard = together.ask(words(12), "vqa")  # has left before its turn
    gone.turn.leave()
    _, one = together.ask(words(4), "ocr", Heard(leaves_after=4), max_new_tokens=20)
    two, other = together.ask(words(5), "ocr", max_new_tokens=20)
    _, stays = together.ask(words(6), "cap", Heard({7: two.turn.leave}), max_new_tokens=20)
    together.work()
    assert stays.answer == together.alone(words(6), "cap", max_new_tokens=20)
    assert one.tokens == together.alone(words(4), "ocr", max_new_tokens=20)[:4]
    assert 6 <= len(other.tokens) <= 8
    assert other.tokens == together.alone(words(5), "ocr", max_new_tokens=20)[: len(other.tokens)]
    assert together.counted("ocr") == before + 4 + len(other.tokens)
    assert unheard.tokens == []
    assert isinstance(unheard.error, StateError)


async def test_a_request_that_means_nothing_fails_alone(together: Engine) -> None:
    asked = [
        together.ask(words(5 + i), "vqa", **({"temperature": -1.0, "do_sample": True} if i == 1 else {}))
        for i in range(4)
    ]
    together.work()
    for i, (_, heard) in enumerate(asked):
        if i == 1:
            assert isinstance(heard.error, ValueError)
            assert "temperature" in str(heard.error)
        else:
            assert heard.answer == together.alone(words(5 + i), "vqa")


async def test_a_request_whose_profile_cannot_be_loaded_fails_alone(
    together: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registry checks profiles, so that this is for what nobody has thought of: the server stays alive."""
    monkeypatch.setitem(together.profiles, "foreign", random_profile(tiny_models.llama(num_hidden_layers=4), 0))
    asked = [("vqa", words(5)), ("foreign", words(6)), ("ocr", words(7))]
    vqa, foreign, ocr = (together.ask(prompt, expression)[1] for expression, prompt in asked)
    together.work()
    assert isinstance(foreign.error, MismatchError)
    assert vqa.answer == together.alone(words(5), "vqa")
    assert ocr.answer == together.alone(words(7), "ocr")


async def test_a_batch_that_fails_is_answered_singly_from_where_it_was(together: Engine) -> None:
    """Fails once, as for lack of memory, when some tokens are out."""

    def fail(*_: object) -> None:
        if len(together.forwards) == 5:
            raise MemoryError("no room for so many")

    asked = [(words(5 + 3 * i), EXPRESSIONS[i], SETTINGS[i]) for i in range(5)]
    answers = [together.ask(prompt, expression, **settings)[1] for prompt, expression, settings in asked]
    handle = together.model.register_forward_pre_hook(fail)
    try:
        together.work()
    finally:
        handle.remove()
    expected = [together.alone(prompt, expression, **settings) for prompt, expression, settings in asked]
    assert [heard.answer for heard in answers] == expected
    assert [heard.tokens for heard in answers] == expected


async def test_only_the_request_fails_that_makes_its_batch_fail(together: Engine) -> None:
    asked = [([7, 10**6] if i == 2 else words(5 + i), EXPRESSIONS[i]) for i in range(4)]
    answers = [together.ask(prompt, expression)[1] for prompt, expression in asked]
    together.work()
    assert isinstance(answers[2].error, IndexError)
    for i in (0, 1, 3):
        assert answers[i].answer == together.alone(*asked[i])
    _, after = together.ask(words(9), "vqa")
    together.work()
    assert after.answer == together.alone(words(9), "vqa")


# Scopes -------------------------------------------------------------------------------------------

IN_SCOPE = [(("vqa", "ocr@1.5", "none")[i // 3], ("all", "prompt", "generated")[i % 3]) for i in range(9)]


async def test_each_request_of_a_batch_has_its_scope(together: Engine) -> None:
    asked = [(prompt, *named) for prompt, named in zip(prompts(9, longest=40), IN_SCOPE, strict=True)]
    answers = [together.ask(prompt, expression, scope=scope)[1] for prompt, expression, scope in asked]
    beams = [together.ask(words(6), "vqa", scope=scope, num_beams=2)[1] for scope in ("all", "generated")]
    together.work()
    expected = [together.alone_in_scope(prompt, expression, scope) for prompt, expression, scope in asked]
    assert [heard.answer for heard in answers] == expected
    for prompt, steered in zip((asked[1], asked[2], asked[4], asked[5]), (1, 2, 4, 5), strict=True):
        others = [together.alone_in_scope(prompt[0], task, "all") for task in (prompt[1], "none")]
        assert expected[steered] not in others
    assert beams[0].answer == together.alone(words(6), "vqa", num_beams=2)
    assert beams[1].answer not in (beams[0].answer, together.alone(words(6), num_beams=2))


async def test_what_was_generated_before_a_batch_failed_stays_generated(together: Engine) -> None:
    """Fails when some tokens are out, which are computed again together with the prompt."""

    def fail(*_: object) -> None:
        if len(together.forwards) == 5:
            raise MemoryError("no room for so many")

    asked = [(words(5 + 3 * i), *named) for i, named in enumerate(IN_SCOPE[:6])]
    answers = [together.ask(prompt, expression, scope=scope)[1] for prompt, expression, scope in asked]
    handle = together.model.register_forward_pre_hook(fail)
    try:
        together.work()
    finally:
        handle.remove()
    assert [heard.answer for heard in answers] == [together.alone_in_scope(*one) for one in asked]


async def test_what_was_generated_before_a_request_was_put_back_stays_generated(llama: Path, tmp_path: Path) -> None:
    here = engine(AutoModelForCausalLM, llama, AutoTokenizer.from_pretrained(llama), tmp_path, most=6, size=6 * PAGE)
    assert here.pages is not None
    manager = here.pages._processor.offloading_manager
    offload, put_back = manager.offload_requests, []
    manager.offload_requests = lambda: put_back.append(offload()) or put_back[-1]
    asked = [(words(20 + i, seed=i), *IN_SCOPE[i % 6]) for i in range(8)]
    answers = [here.ask(*one[:2], scope=one[2], max_new_tokens=50)[1] for one in asked]
    here.work()
    assert [heard.answer for heard in answers] == [here.alone_in_scope(*one, count=50) for one in asked]
    assert any(put_back)


# Pages --------------------------------------------------------------------------------------------


async def test_more_than_the_pages_hold_is_put_back_and_goes_on(llama: Path, tmp_path: Path) -> None:
    here = engine(AutoModelForCausalLM, llama, AutoTokenizer.from_pretrained(llama), tmp_path, most=6, size=6 * PAGE)
    assert here.pages is not None
    manager = here.pages._processor.offloading_manager
    offload, put_back = manager.offload_requests, []
    manager.offload_requests = lambda: put_back.append(offload()) or put_back[-1]
    asked = [(words(20 + i, seed=i), EXPRESSIONS[i % 5], {**SETTINGS[i % 2], "max_new_tokens": 50}) for i in range(10)]
    answers = [here.ask(prompt, expression, **settings)[1] for prompt, expression, settings in asked]
    here.work()
    expected = [here.alone(prompt, expression, **settings) for prompt, expression, settings in asked]
    assert [heard.answer for heard in answers] == expected
    assert any(put_back)


async def test_what_is_longer_than_the_pages_is_answered_by_generate(llama: Path, tmp_path: Path) -> None:
    here = engine(AutoModelForCausalLM, llama, AutoTokenizer.from_pretrained(llama), tmp_path, most=2, size=4 * PAGE)
    assert here.pages is not None
    asked = [(words(100), "vqa", {"max_new_tokens": 40}), (words(8), "ocr", {})]
    answers = [here.ask(prompt, expression, **settings) for prompt, expression, settings in asked]
    here.work()
    for (prompt, expression, settings), (row, heard) in zip(asked, answers, strict=True):
        assert heard.answer == here.alone(prompt, expression, **settings)
        assert here.pages.can_hold(row) == (expression == "ocr")


async def test_a_long_prompt_holds_up_nobody(llama: Path, tmp_path: Path) -> None:
    """Its steps take part of it only, and the others' next tokens."""
    here = engine(AutoModelForCausalLM, llama, AutoTokenizer.from_pretrained(llama), tmp_path)
    order: list[str] = []

    def long() -> None:
        here.ask(words(700), "ocr", Heard({1: lambda: order.append("long")}), max_new_tokens=2)

    for i in range(3):
        here.ask(words(5 + i), "vqa", Heard({2: long} if i == 0 else {5: lambda: order.append("short")}))
    here.work()
    assert order == ["short", "short", "long"]
    assert max(tokens for _, tokens in here.forwards) <= 256


# Images, and models that cannot be batched --------------------------------------------------------


async def test_images_of_several_requests_share_a_generate(embedded: Path, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(embedded)
    here = engine(AutoModelForImageTextToText, embedded, processor, tmp_path, size=0, fraction=0.9)
    asked: list[tuple[Any, str]] = []
    for i, scene in enumerate(scenes("test", 6)):
        content = [{"type": "image"}, {"type": "text", "text": " ".join([scene.prompt("caption")] * (1 + i % 3))}]
        chat = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=scene.image(), text=chat, return_tensors="pt")
        asked.append((inputs, EXPRESSIONS[i % 5]))
        asked.append((processor.tokenizer(scene.captions[0], return_tensors="pt"), EXPRESSIONS[i % 5]))
    answers = [here.ask(inputs, expression)[1] for inputs, expression in asked]
    here.work()
    assert [heard.answer for heard in answers] == [here.alone(inputs, expression) for inputs, expression in asked]
    assert {rows for rows, _ in here.forwards} == {6}  # two batches, of images and of text


async def test_prompts_of_one_length_only_where_padding_changes_answers(llama: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    here = engine(AutoModelForCausalLM, llama, tokenizer, tmp_path, size=0)

    def unmasked(_module: object, args: object, kwargs: dict[str, Any]) -> tuple[object, dict[str, Any]]:
        return args, {**kwargs, "attention_mask": None}

    model = here.model
    handle = model.register_forward_pre_hook(unmasked, with_kwargs=True)
    try:
        assert not is_exact(model, tokenizer, lambda rows: generate_together(model, rows), "padding")
        assert exact_pages(model, tokenizer, 4, 4096) is None
    finally:
        handle.remove()
    here.batches._padded = False
    here.forwards.clear()
    lengths = [5, 7, 5, 7, 5]
    answers = [here.ask(words(n, seed=i), EXPRESSIONS[i])[1] for i, n in enumerate(lengths)]
    here.work()
    assert [heard.answer for heard in answers] == [
        here.alone(words(n, seed=i), EXPRESSIONS[i]) for i, n in enumerate(lengths)
    ]
    assert {rows for rows, _ in here.forwards} == {3, 2}
