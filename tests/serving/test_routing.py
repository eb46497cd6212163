"""Routing decisions, and the refusal of wrong routing files by line."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hones_serving.facts import RequestFacts, facts_of_chat, facts_of_completion, facts_of_message, facts_of_response
from hones_serving.routing import (
    MATCHED_BYTES,
    ROUTES,
    Canary,
    Decision,
    RoutingPlan,
    Rule,
    UnknownAliasError,
    compile_regex,
    decide,
    split_alias,
)
from hones_serving.routing_file import MAX_FILE_BYTES, load_plan
from hypothesis import given
from hypothesis import strategies as st

from hones_steer import RoutingError
from hones_steer.store import parse_expression

TASKS = ["cap", "ocr", "vqa"]
SERVED = ("llava", "llava:7b", "llava:7b-chat")
EXACT = (*SERVED, "llava:lora")

PIXEL = "data:image/png;base64,iVBORw0KGgo="
IMAGE = {"type": "image_url", "image_url": {"url": PIXEL}}


def chat(*messages: Any, headers: dict[str, str] | None = None, **body: Any) -> RequestFacts:
    return facts_of_chat({"model": "llava", "messages": list(messages), **body}, headers or {})


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def decided(facts: RequestFacts, plan: RoutingPlan | None = None, *, enabled: bool = True) -> Decision:
    return decide(facts, plan or RoutingPlan(), served=SERVED, exact=EXACT, enabled=enabled)


def loaded(folder: Path, text: str | bytes) -> RoutingPlan:
    path = folder / "routing.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_plan(path, TASKS)


# Precedence ---------------------------------------------------------------------------------------------------

PLAN = RoutingPlan(default="cap", rules=(Rule("ocr+vqa@0.5", has_image=True),), canary=Canary("cap", "cap@2", 100))


@pytest.mark.parametrize(
    ("body", "header", "model", "image", "asked", "route"),
    [
        ("vqa", "ocr", "llava:cap", True, "vqa", "body"),
        (None, "ocr", "llava:cap", True, "ocr", "header"),
        (None, None, "llava:cap", True, "cap", "alias"),
        (None, None, "llava", True, "ocr+vqa@0.5", "rule"),
        (None, None, "llava", False, "cap@2", "canary"),
        ("none", "ocr", "llava:cap", True, "none", "body"),
        (None, "none", "llava:cap", True, "none", "header"),
        (None, None, "llava:none", True, "none", "alias"),
        (None, None, "llava:vqa+ocr", True, "vqa+ocr", "alias"),
        ("cap", None, "llava", False, "cap", "body"),
        (None, "cap", "llava", False, "cap", "header"),
        (None, None, "llava:cap", False, "cap", "alias"),
        ("vqa@0.50", None, None, False, "vqa@0.50", "body"),
        ("unknown", None, "llava", False, "unknown", "body"),
    ],
)
def test_body_then_header_then_alias_then_rules_then_default(
    body: str | None, header: str | None, model: str | None, image: bool, asked: str, route: str
) -> None:
    facts = RequestFacts(body_task=body, header_task=header, model=model, has_image=image)
    base = None if model is None else "llava"
    assert decided(facts, PLAN) == Decision(asked, parse_expression(asked), route, base)
    assert route in ROUTES


def test_without_a_plan_nothing_is_steered() -> None:
    assert decided(chat(user("hi"))) == Decision("none", parse_expression("none"), "default", "llava")


def test_the_first_matching_rule_decides_and_can_switch_off() -> None:
    rules = (Rule("none", model="other"), Rule("none", model="llava"), Rule("vqa", model="llava"))
    decision = decided(chat(user("hi")), RoutingPlan("cap", rules))
    assert (decision.asked, decision.route) == ("none", "rule")


@pytest.mark.parametrize(
    "facts", [RequestFacts(body_task=""), RequestFacts(header_task=""), RequestFacts(model="llava:")]
)
def test_an_empty_choice_is_malformed_not_absent(facts: RequestFacts) -> None:
    with pytest.raises(RoutingError, match="is not a task name"):
        decided(facts)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize(
    "facts",
    [
        RequestFacts(body_task="vqa+"),
        RequestFacts(header_task="vqa ocr"),
        RequestFacts(model="llava:vqa@"),
        RequestFacts(model="llava:vqa@", body_task="vqa"),
    ],
)
def test_a_malformed_expression_is_an_error_also_while_switched_off(facts: RequestFacts, enabled: bool) -> None:
    with pytest.raises(RoutingError):
        decided(facts, enabled=enabled)


@pytest.mark.parametrize(
    "facts",
    [
        RequestFacts(model="llava", body_task="vqa"),
        RequestFacts(model="llava", header_task="vqa"),
        RequestFacts(model="llava:vqa"),
        RequestFacts(model="llava", has_image=True),
        RequestFacts(model="llava"),
    ],
)
def test_the_kill_switch_wins_over_everything_and_still_strips_the_alias(facts: RequestFacts) -> None:
    assert decided(facts, PLAN, enabled=False) == Decision("none", parse_expression("none"), "off", "llava")


def test_an_unknown_alias_is_a_routing_error_of_its_own() -> None:
    assert issubclass(UnknownAliasError, RoutingError)


# Aliases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "split"),
    [
        ("llava", None),
        ("llava:7b", None),
        ("llava:lora", None),
        ("other:vqa", None),
        ("llavavqa", None),
        ("", None),
        ("llava:vqa", ("llava", "vqa")),
        ("llava:none", ("llava", "none")),
        ("llava:7b:vqa", ("llava:7b", "vqa")),
        ("llava:7b-chat:vqa@0.5+ocr", ("llava:7b-chat", "vqa@0.5+ocr")),
        ("llava:13b", ("llava", "13b")),
        ("llava:lora:vqa", ("llava", "lora:vqa")),
        ("llava:", ("llava", "")),
    ],
)
def test_the_longest_served_name_counts_and_exact_names_win(model: str, split: tuple[str, str] | None) -> None:
    assert split_alias(model, SERVED, EXACT) == split


# Few letters, so that names are often prefixes of each other.
names = st.text("ab:", min_size=1, max_size=5)
tasks = st.sampled_from(["vqa", "none", "vqa+ocr", "a", "b@0.5"])


@given(st.sets(names, min_size=1, max_size=6), st.sets(names, max_size=3), tasks, st.data())
def test_an_alias_splits_back_into_what_it_was_made_of(
    served: set[str], loras: set[str], task: str, data: st.DataObject
) -> None:
    base = data.draw(st.sampled_from(sorted(served)))
    alias = f"{base}:{task}"
    split = split_alias(alias, served, served | loras)
    if alias in served | loras:
        assert split is None
    else:
        assert split is not None
        assert ":".join(split) == alias
        # A longer served name may end inside the task; then that one is the base.
        assert split == (base, task) or (split[0] in served and len(split[0]) > len(base))


@given(st.sets(names, min_size=1, max_size=6), st.text("ab:c", max_size=8))
def test_what_splits_has_the_longest_possible_base(served: set[str], model: str) -> None:
    split = split_alias(model, served, served)
    longer = [name for name in served if model.startswith(name + ":")]
    if model in served or not longer:
        assert split is None
    else:
        assert split is not None
        assert split[0] in served
        assert len(split[0]) == max(map(len, longer))


# Rules --------------------------------------------------------------------------------------------------------


def holds(folder: Path, condition: str, facts: RequestFacts) -> bool:
    rule = "\n".join(["task: vqa", condition]).replace("\n", "\n    ")
    return decided(facts, loaded(folder, f"rules:\n  - {rule}\n")).route == "rule"


@pytest.mark.parametrize(
    ("condition", "facts", "expected"),
    [
        ("has_image: true", chat(user([IMAGE])), True),
        ("has_image: true", chat(user("hi")), False),
        ("has_image: false", chat(user("hi")), True),
        ("has_image: no", chat(user([IMAGE])), False),
        ("prompt_regex: (?i)transcribe", chat(user("Please TRANSCRIBE this")), True),
        ("prompt_regex: ^transcribe", chat(user("Please transcribe")), False),
        ("prompt_regex: first", chat(user("first"), user("second")), False),
        ("prompt_regex: transcribe", chat({"role": "system", "content": "transcribe"}, user("hi")), False),
        ("prompt_regex: größe|\\d+", chat(user("Welche größe?")), True),
        ("system_regex: strict", chat({"role": "system", "content": "be strict"}, user("hi")), True),
        ("system_regex: strict", chat({"role": "developer", "content": [{"type": "text", "text": "strict"}]}), True),
        ("system_regex: strict", chat(user("strict")), False),
        ("model: llava", chat(user("hi")), True),
        ("model: llav", chat(user("hi")), False),
        ("header: {X-Tenant: acme}", chat(headers={"x-tenant": "acme"}), True),
        ("header: {X-TENANT: acme}", chat(headers={"X-Tenant": "acme"}), True),
        ("header: {X-Tenant: acme}", chat(headers={"x-tenant": "ACME"}), False),
        ("header: {X-Tenant: acme, X-Team: a}", chat(headers={"x-tenant": "acme"}), False),
        ("header: {X-Tenant: acme, X-Team: a}", chat(headers={"x-tenant": "acme", "x-team": "a"}), True),
        ("has_image: false\nprompt_regex: hi", chat(user("hi")), True),
        ("has_image: true\nprompt_regex: hi", chat(user("hi")), False),
    ],
)
def test_all_conditions_of_a_rule_must_hold(
    tmp_path: Path, condition: str, facts: RequestFacts, expected: bool
) -> None:
    assert holds(tmp_path, condition, facts) is expected


def test_a_catastrophic_regex_just_answers() -> None:
    # Backtracking would need 2^4000 steps for the first, so that it would never come back.
    rule = Rule("vqa", prompt_regex=compile_regex("(a+)+$"))
    assert not rule.matches(chat(user("a" * 4000 + "b")))
    assert rule.matches(chat(user("b" + "a" * 4000)))


def test_a_regex_sees_the_first_8_kib_in_bytes() -> None:
    rule = Rule("vqa", prompt_regex=compile_regex("end"))
    assert rule.matches(chat(user("x" * (MATCHED_BYTES - 3) + "end")))
    assert not rule.matches(chat(user("x" * (MATCHED_BYTES - 2) + "end")))
    assert not rule.matches(chat(user("é" * (MATCHED_BYTES // 2) + "end")))


def test_half_a_surrogate_pair_in_a_prompt_does_no_harm() -> None:
    rule = Rule("vqa", prompt_regex=compile_regex("end"))
    assert rule.matches(chat(user(json.loads('"\\ud800 end"'))))


# Facts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "prompt", "has_image"),
    [
        ("hi", "hi", False),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb", False),
        ([IMAGE, {"type": "text", "text": "a"}], "a", True),
        ([{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": PIXEL}], "a", True),
        ([{"type": "image", "image": PIXEL}], "", True),
        ([{"type": "image_embeds", "image_embeds": "AA=="}], "", True),
        ([{"image_url": PIXEL}, {"text": "a"}], "a", True),
        ([{"image_url": None}, "plain"], "plain", False),
        ([{"type": "text", "text": "image_url"}], "image_url", False),
        ([{"type": "text", "text": 3}, {"type": ["image"]}, None, 7, [IMAGE]], "", False),
        (None, "", False),
        ({"text": "not a part"}, "not a part", False),
        ([], "", False),
    ],
)
def test_the_text_and_images_of_a_message(content: Any, prompt: str, has_image: bool) -> None:
    facts = chat(user(content))
    assert (facts.prompt, facts.has_image) == (prompt, has_image)


def test_a_conversation() -> None:
    facts = chat(
        {"role": "system", "content": "S"},
        {"role": "developer", "content": "D"},
        user([IMAGE, {"type": "text", "text": "first"}]),
        {"role": "assistant", "content": "A"},
        user("last"),
        {"role": "assistant", "content": "prefill"},
        headers={"X-Hones-Task": "ocr"},
        hones_task="vqa",
        user="u1",
    )
    assert (facts.prompt, facts.system, facts.has_image) == ("last", "S\nD", True)
    assert (facts.body_task, facts.header_task, facts.model, facts.user) == ("vqa", "ocr", "llava", "u1")
    assert facts.headers == {"x-hones-task": "ocr"}


@pytest.mark.parametrize(
    ("prompt", "text"),
    [("hi", "hi"), (["a", "b"], "a\nb"), ([1, 2], ""), ([[1, 2], [3]], ""), (None, ""), ({"a": 1}, "")],
)
def test_the_prompt_of_a_completion(prompt: Any, text: str) -> None:
    facts = facts_of_completion({"model": "llava", "prompt": prompt, "hones_task": "vqa"}, {})
    assert (facts.prompt, facts.system, facts.has_image, facts.body_task) == (text, "", False, "vqa")


@pytest.mark.parametrize("facts_of", [facts_of_chat, facts_of_completion])
@pytest.mark.parametrize(
    ("body", "task"),
    [
        ({}, None),
        ({"hones_task": None}, None),
        ({"hones_task": None, "vllm_xargs": {"hones_task": None}}, None),
        ({"vllm_xargs": None}, None),
        ({"vllm_xargs": ["hones_task"]}, None),
        ({"hones_task": "vqa"}, "vqa"),
        ({"vllm_xargs": {"hones_task": "vqa"}}, "vqa"),
        ({"hones_task": None, "vllm_xargs": {"hones_task": "vqa"}}, "vqa"),
        ({"hones_task": "vqa", "vllm_xargs": {"hones_task": None}}, "vqa"),
        ({"hones_task": "vqa", "vllm_xargs": {"hones_task": "vqa"}}, "vqa"),
        ({"hones_task": "none"}, "none"),
    ],
)
def test_the_task_in_the_body(facts_of: Any, body: dict[str, Any], task: str | None) -> None:
    assert facts_of(body, {}).body_task == task


@pytest.mark.parametrize("facts_of", [facts_of_chat, facts_of_completion])
@pytest.mark.parametrize("value", [1, 0, True, False, 0.5, ["vqa"], [], {"task": "vqa"}, {}])
def test_a_task_that_is_no_string_is_refused(facts_of: Any, value: Any) -> None:
    for body in ({"hones_task": value}, {"vllm_xargs": {"hones_task": value}}):
        with pytest.raises(RoutingError, match=f"must be a string.* not {type(value).__name__}"):
            facts_of(body, {})


def test_two_different_tasks_in_one_body_are_refused() -> None:
    with pytest.raises(RoutingError, match="hones_task is 'vqa' and in vllm_xargs 'ocr'"):
        chat(hones_task="vqa", vllm_xargs={"hones_task": "ocr"})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["messages", "role", "content", "type", "text", "image_url", "prompt", "model", "user"]),
            inner | st.sampled_from(["user", "system", "text", "image_url"]),
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(json_values | json_values.map(lambda value: {"messages": value, "prompt": value}))
def test_malformed_bodies_never_crash(body: Any) -> None:
    for facts in (facts_of_chat(body, {"X-Hones-Task": "vqa"}), facts_of_completion(body, {"X-Hones-Task": "vqa"})):
        assert isinstance(facts.prompt + facts.system + facts.key, str)
        assert facts.header_task == "vqa"
        decided(facts)


def test_a_body_of_garbage_has_no_facts() -> None:
    for body in (None, [], "text", 3, {"messages": 3, "prompt": 3.5, "model": [], "user": {}}):
        assert facts_of_chat(body, {}) == RequestFacts()
    assert facts_of_completion(None, {}) == RequestFacts()


def test_the_facts_of_a_response() -> None:
    image = {"type": "input_image", "image_url": "data:,"}
    question = {"role": "user", "content": [{"type": "input_text", "text": "what?"}]}
    given = [
        {"role": "developer", "content": "be brief"},
        question,
        {"type": "function_call", "call_id": "1", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": [image]},
    ]
    facts = facts_of_response(
        {"model": "m", "input": given, "instructions": "see", "hones_task": "vqa", "user": "u"}, {}
    )
    assert (facts.prompt, facts.system, facts.has_image) == ("what?", "see\nbe brief", True)
    assert (facts.body_task, facts.key, facts.first) == ("vqa", "u", question["content"])
    assert not facts_of_response({"input": given[:2]}, {}).has_image
    assert facts_of_response({"input": "what?"}, {}).prompt == "what?"
    for wrong in (None, 3, [3], {"input": 3}, {"input": [{"content": {}}], "instructions": 4}):
        assert facts_of_response(wrong, {}).prompt == ""


def test_the_facts_of_a_message() -> None:
    result = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "image", "source": {}}]}
    asked = {"role": "user", "content": [{"type": "text", "text": "what?"}]}
    body: dict[str, Any] = {"system": [{"type": "text", "text": "see"}], "metadata": {"user_id": "u"}}
    body["messages"] = [asked, {"role": "assistant", "content": "look"}, {"role": "user", "content": [result]}]
    facts = facts_of_message(body, {"X-Hones-Task": "vqa"})
    assert (facts.prompt, facts.system, facts.has_image) == ("what?", "see", True)
    assert (facts.header_task, facts.key, facts.first) == ("vqa", "u", asked["content"])
    more = {"role": "user", "content": [result, {"type": "text", "text": "and now?"}]}
    assert facts_of_message({"messages": [asked, more], "system": "see"}, {}).prompt == "and now?"
    assert not facts_of_message({"messages": [asked]}, {}).has_image
    for wrong in (None, 3, {"messages": 3, "system": 3, "metadata": 3}, {"messages": [3, {"role": "user"}]}):
        assert facts_of_message(wrong, {}).prompt == ""


def test_a_message_nested_beyond_measure_still_has_a_key() -> None:
    content: list[Any] = []
    for _ in range(100_000):
        content = [content]
    assert len(chat(user(content)).key) == 64


# The canary ---------------------------------------------------------------------------------------------------


def test_the_key_is_the_header_then_the_user_then_the_first_message() -> None:
    message = user([{"type": "text", "text": "hi"}])
    assert chat(message, headers={"X-Hones-Key": "k"}, user="u").key == "k"
    assert chat(message, headers={"X-Hones-Key": ""}, user="u").key == "u"
    canonical = b'[{"text":"hi","type":"text"}]'
    assert chat(message, user="").key == hashlib.sha256(canonical).hexdigest()
    assert chat(user([{"text": "hi", "type": "text"}])).key == chat(message).key
    assert facts_of_completion({"prompt": "hi"}, {}).key == hashlib.sha256(b'"hi"').hexdigest()
    assert facts_of_completion({"prompt": "hi", "user": "u"}, {}).key == "u"


def test_a_conversation_keeps_its_key_and_the_system_message_is_not_it() -> None:
    system = {"role": "system", "content": "the same for all"}
    first, answer = user("one question"), {"role": "assistant", "content": "an answer"}
    key = chat(system, first).key
    assert chat(system, first, answer, user("and another")).key == key
    assert chat(system, user("somebody else's question")).key != key
    assert chat(system).key != chat(answer).key


@given(st.text(st.characters(), max_size=20), st.floats(0, 100), st.floats(0, 100))
def test_who_is_in_at_some_percent_is_in_at_more(key: str, percent: float, other_percent: float) -> None:
    low, high = sorted((percent, other_percent))
    assert Canary("vqa", "ocr", low).takes(key) <= Canary("vqa", "ocr", high).takes(key)
    assert not Canary("vqa", "ocr", 0).takes(key)
    assert Canary("vqa", "ocr", 100).takes(key)


@pytest.mark.parametrize("percent", [0.5, 2.5, 10, 50, 99])
def test_the_share_is_the_percent_asked_for(percent: float) -> None:
    n, share = 20_000, percent / 100
    taken = sum(Canary("vqa", "vqa@1.5", percent).takes(f"user-{i}") for i in range(n))
    assert abs(taken / n - share) < 5 * (share * (1 - share) / n) ** 0.5


def test_two_canaries_draw_independently_and_spelling_does_not_matter() -> None:
    keys = [f"user-{i}" for i in range(4000)]
    to_ocr, to_cap = Canary("vqa", "ocr", 50), Canary("vqa", "cap", 50)
    both = sum(to_ocr.takes(key) and to_cap.takes(key) for key in keys) / len(keys)
    assert abs(both - 0.25) < 0.04
    assert all(to_ocr.takes(key) == Canary("vqa@1", "ocr@1.0", 50).takes(key) for key in keys[:200])


def test_who_is_in_never_changes_between_releases() -> None:
    taken = [i for i in range(60) if Canary("vqa", "ocr", 10).takes(str(i))]
    assert taken == [3, 9, 25, 39, 47, 50, 52, 53]


def test_the_canary_takes_only_what_rules_or_the_default_steer_with_its_task() -> None:
    plan = RoutingPlan("vqa", (Rule("ocr", model="a"), Rule("vqa@1", model="b")), Canary("vqa", "cap", 100))
    assert decided(RequestFacts(), plan) == Decision("cap", parse_expression("cap"), "canary", None)
    assert decided(RequestFacts(model="a"), plan).route == "rule"
    assert decided(RequestFacts(model="b"), plan).route == "canary"
    for explicit in (RequestFacts(body_task="vqa"), RequestFacts(header_task="vqa"), RequestFacts(model="llava:vqa")):
        assert decided(explicit, plan).asked == "vqa"
    assert decided(RequestFacts(), plan, enabled=False).route == "off"


def test_a_canary_can_try_steering_on_unsteered_traffic(tmp_path: Path) -> None:
    plan = loaded(tmp_path, "canary: {task: none, to: vqa, percent: 100}")
    assert decided(RequestFacts(), plan).asked == "vqa"
    assert decided(RequestFacts(body_task="none"), plan).route == "body"


def test_the_canary_takes_its_share_by_key() -> None:
    plan = RoutingPlan("vqa", canary=Canary("vqa", "cap", 30))
    for i in range(50):
        routes = {decided(chat(user(text), headers={"X-Hones-Key": str(i)}), plan).route for text in "abc"}
        assert routes == {"canary" if Canary("vqa", "cap", 30).takes(str(i)) else "default"}


# The file -----------------------------------------------------------------------------------------------------


def test_a_whole_file(tmp_path: Path) -> None:
    plan = loaded(
        tmp_path,
        """\
# what our tenants get
default: vqa
rules:
  - task: ocr+vqa@0.5
    has_image: yes
    prompt_regex: (?i)transcribe
    system_regex: ^You
    model: llava
    header: {X-Tenant: "42"}
  - task: "none"
    model: 'llava'
canary:
  task: vqa
  to: vqa@1.5
  percent: 2.5
""",
    )
    regexes = {"prompt_regex": compile_regex("(?i)transcribe"), "system_regex": compile_regex("^You")}
    first = Rule("ocr+vqa@0.5", has_image=True, model="llava", header={"x-tenant": "42"}, **regexes)
    assert plan == RoutingPlan("vqa", (first, Rule("none", model="llava")), Canary("vqa", "vqa@1.5", 2.5))


@pytest.mark.parametrize(
    "text", ["default: none", "rules: []", "\ufeffdefault: none\r\n", "%YAML 1.2\n---\ndefault: none\n..."]
)
def test_small_files(tmp_path: Path, text: str) -> None:
    assert decided(RequestFacts(), loaded(tmp_path, text)).asked == "none"


RULE = "rules:\n  - task: vqa\n"
CANARY = "default: vqa\ncanary:\n  task: vqa\n  to: ocr\n"

BROKEN: list[tuple[str | bytes, int, str]] = [
    # the file
    ("", 1, "the file is empty"),
    ("# nothing\n\n", 1, "the file is empty"),
    ("---\n", 2, "the file must be a mapping with at least one key"),
    ("{}", 1, "the file must be a mapping"),
    ("- default: vqa", 1, "the file must be a mapping"),
    ("\n\nvqa", 3, "the file must be a mapping"),
    (b"default: vqa\n# \xff\n", 2, "not UTF-8 text"),
    ("default: vqa\n\x07", 2, "the character #x0007 is not allowed"),
    ("default: vqa\n# a\n\tb: c", 3, "not sound YAML: found character '\\t'"),
    ("default: vqa\nrules: [\n", 3, "not sound YAML"),
    ("default: vqa\n---\ndefault: ocr\n", 2, "not sound YAML: but found another document"),
    ('default: vqa\nrules:\n  - task: "\\UFFFFFFFF"', 3, "not sound YAML"),
    ("default: vqa\nrules:\n- " + "[" * 100_000, 3, "nested too deeply"),
    ("default: vqa\nrules:\n- " + "{a: " * 100_000, 3, "nested too deeply"),
    ("default: &a vqa\n", 1, "anchors (&) and aliases (*) are not allowed here"),
    ("default: vqa\nrules: &a\n  - task: vqa\n", 2, "anchors"),
    ("default: vqa\ncanary: *a\n", 2, "anchors"),
    ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", 1, "anchors"),
    ("default: vqa\n<<: {default: ocr}\n", 2, "the unknown key '<<'"),
    # keys
    ("default: vqa\nrule:\n  - task: vqa\n", 2, "the file has the unknown key 'rule'; did you mean 'rules'?"),
    ("default: vqa\n\nxyz: 1\n", 3, "the file has the unknown key 'xyz'; known: default, rules, canary"),
    ("default: vqa\ndefault: vqa\n", 2, "the file has the key 'default' twice"),
    ("? [a]\n: b\n", 1, "the file has a key that is no name"),
    (f"default: vqa\n? {'k' * 2000}\n: 1", 2, "the unknown key 'kkk"),
    # expressions
    ("default: 7", 1, "default must be a string, not '7'; put it in quotes if it is one"),
    ("default: no", 1, "default must be a string, not 'no'"),
    ("rules: []\ndefault:\n", 2, "default must be a string, not empty"),
    ("rules: []\ndefault: null\n", 2, "default must be a string, not 'null'"),
    ("rules: []\ndefault:\n  [vqa]\n", 3, "default must be a string, not a list or mapping"),
    ("rules: []\ndefault: !!str [vqa]\n", 2, "default must be a string"),
    ("rules: []\ndefault: vqa+\n", 2, "default: '' in the steering expression 'vqa+' is not a task name"),
    ("rules: []\ndefault: vqa @ 2\n", 2, "default: 'vqa ' in the steering expression"),
    ("rules: []\ndefault: vqa@11\n", 2, "exceeds 10 in magnitude"),
    ("rules: []\ndefault: vga\n", 2, "there is no profile for the task 'vga'; known tasks: cap, ocr, vqa"),
    ("rules: []\ndefault: vqa+dog@0\n", 2, "there is no profile for the task 'dog'"),
    # rules
    ("default: vqa\nrules:\n", 2, "rules must be a list"),
    ("default: vqa\nrules:\n  task: vqa\n", 3, "rules must be a list"),
    ("rules:\n  - vqa\n", 2, "a rule must be a mapping"),
    ("rules:\n  - task: vqa\n    model: a\n  - {}\n", 4, "a rule must be a mapping with at least one key"),
    ("rules:\n  - model: a\n    has_image: true\n", 2, "a rule has no 'task'"),
    (RULE, 2, "the rule has no condition; give it one of has_image, prompt_regex, system_regex, model, header"),
    (RULE + "    prompt_regexp: a\n", 3, "unknown key 'prompt_regexp'; did you mean 'prompt_regex'?"),
    (RULE + "    model: a\n    task: ocr\n", 4, "a rule has the key 'task' twice"),
    ("rules:\n  - model: a\n    task: dog\n", 3, "task: there is no profile for the task 'dog'"),
    (RULE + "    has_image: 1\n", 3, "has_image must be true or false, not '1'"),
    (RULE + "    has_image: 'true'\n", 3, "has_image must be true or false, not 'true'"),
    (RULE + "    has_image: !!bool maybe\n", 3, "has_image must be true or false, not 'maybe'"),
    (RULE + "    has_image:\n", 3, "has_image must be true or false, not empty"),
    (RULE + "    model: 7\n", 3, "model must be a string, not '7'"),
    (RULE + "    prompt_regex: 7\n", 3, "prompt_regex must be a string, not '7'"),
    (RULE + "    prompt_regex: (\n", 3, "prompt_regex '(' is not a regular expression of RE2: missing )"),
    (RULE + "    system_regex: (?=a)\n", 3, "system_regex '(?=a)' is not a regular expression of RE2: invalid perl"),
    (RULE + "    system_regex: (a)\\1\n", 3, "is not a regular expression of RE2: invalid escape sequence: \\1"),
    (RULE + '    system_regex: "\\uD800"\n', 3, "is not a regular expression of RE2"),
    (RULE + "    header: acme\n", 3, "header must be a mapping with at least one key"),
    (RULE + "    header: {}\n", 3, "header must be a mapping with at least one key"),
    (RULE + "    header:\n      X-A: a\n      X-B: 42\n", 5, "the header 'X-B' must be a string, not '42'; put it in"),
    (RULE + "    header:\n      X-A: a\n      x-a: b\n", 5, "header names 'x-a' twice (case does not matter)"),
    (RULE + "    header:\n      X A: a\n", 4, "'X A' is not the name of a header"),
    # the canary
    ("default: vqa\ncanary: 5\n", 2, "canary must be a mapping"),
    (CANARY, 3, "canary has no 'percent'"),
    (CANARY + "  per_cent: 5\n", 5, "canary has the unknown key 'per_cent'; did you mean 'percent'?"),
    (CANARY + "  percent: ten\n", 5, "percent must be a number from 0 to 100, not 'ten'"),
    (CANARY + "  percent: '10'\n", 5, "percent must be a number from 0 to 100, not '10'"),
    (CANARY + "  percent: true\n", 5, "percent must be a number"),
    (CANARY + "  percent: -0.1\n", 5, "percent must be a number from 0 to 100, not '-0.1'"),
    (CANARY + "  percent: 100.5\n", 5, "percent must be a number"),
    (CANARY + "  percent: .nan\n", 5, "percent must be a number"),
    (CANARY + "  percent: .inf\n", 5, "percent must be a number"),
    (CANARY + f"  percent: {'9' * 5000}\n", 5, "percent must be a number"),
    (CANARY + "  percent: 5%\n", 5, "percent must be a number from 0 to 100, not '5%'"),
    (CANARY + "  percent: [5]\n", 5, "percent must be a number from 0 to 100, not a list or mapping"),
    ("canary: {task: vqa, to: ocr, percent: 5}\n", 1, "never acts: neither a rule nor the default gives 'vqa'"),
    ("default: vqa\ncanary:\n  task: vqa@2\n  to: ocr\n  percent: 5\n", 3, "never acts: neither a rule nor"),
    ("canary: {task: vqa, to: vqa@1.0, percent: 5}\n", 1, "the canary replaces 'vqa' by itself"),
    ("default: vqa\ncanary:\n  task: vqa\n  to: dog\n", 4, "to: there is no profile for the task 'dog'"),
]


@pytest.mark.parametrize(("text", "line", "message"), BROKEN, ids=[message[:60] for _, _, message in BROKEN])
def test_a_broken_file_is_refused_with_its_line(tmp_path: Path, text: str | bytes, line: int, message: str) -> None:
    with pytest.raises(RoutingError) as caught:
        loaded(tmp_path, text)
    path = tmp_path / "routing.yaml"
    said = str(caught.value)
    assert said.startswith(f"{path}:{line}: ")
    assert message in said
    assert said.isprintable()
    assert len(said) < len(str(path)) + 300


def test_no_tasks_at_all(tmp_path: Path) -> None:
    path = tmp_path / "routing.yaml"
    path.write_text("default: vqa")
    with pytest.raises(RoutingError, match="known tasks: none yet"):
        load_plan(path, [])


def test_a_file_beyond_1_mib_is_not_parsed(tmp_path: Path) -> None:
    assert MAX_FILE_BYTES == 2**20
    comment = b"default: vqa\n#"
    assert loaded(tmp_path, comment.ljust(MAX_FILE_BYTES, b"x")).default == "vqa"
    with pytest.raises(RoutingError, match="larger than 1 MiB"):
        loaded(tmp_path, comment.ljust(MAX_FILE_BYTES + 1, b"x"))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "missing.yaml", "No such file")):
        with pytest.raises(RoutingError, match=f"^{path}: cannot be read: {reason}"):
            load_plan(path, TASKS)


@given(st.binary(max_size=60) | st.text("\n -:{}[]&*'\"|>?!%#abc\tdefaultrulstk", max_size=60))
def test_no_file_crashes_the_reader(tmp_path_factory: pytest.TempPathFactory, text: str | bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "routing.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with contextlib.suppress(RoutingError):
        load_plan(path, TASKS)
