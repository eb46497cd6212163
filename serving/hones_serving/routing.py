"""Which steering a request gets: what it asks for itself, else the routing file's rules, default and canary.

Precedence: body `hones_task`, header `X-Hones-Task`, model alias ``<model>:<expression>``, rules, default. The
routing file is YAML:

    default: vqa                    # an expression; none where the key is absent
    rules:                          # the first one whose conditions all hold decides
      - task: ocr+vqa@0.5
        has_image: true
        prompt_regex: (?i)transcribe
        system_regex: ^You read documents
        model: llava
        header: {X-Tenant: acme}
    canary: {task: vqa, to: vqa@1.5, percent: 2.5}

Regexes are RE2's and see the first 8 KiB of the text. No engine and no profiles here: whether a task asked for in a
request exists is the registry's business.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import re2  # type: ignore[import-untyped]
import yaml

from hones_steer.errors import RoutingError
from hones_steer.store import Expression, parse_expression

ROUTES = ("body", "header", "alias", "rule", "default", "canary", "off")
MAX_FILE_BYTES = 1024 * 1024
MAX_DEPTH = 8  # a sound file nests four deep
MATCHED_BYTES = 8 * 1024

_IMAGES = ("image_url", "input_image", "image", "image_pil", "image_embeds")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


class UnknownAliasError(RoutingError):
    """A model alias names a task that does not exist: to the client an unknown model, HTTP 404."""


# What a request says --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RequestFacts:
    """What routing looks at in a request.

    `headers` has lower-case names; `prompt` is the last user message's text (all of a completion's prompts), `system`
    that of all system and developer messages; `first` is the JSON value that opens the conversation.
    """

    body_task: str | None = None
    header_task: str | None = None
    model: str | None = None
    has_image: bool = False
    prompt: str = ""
    system: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    first: object = None

    @property
    def key(self) -> str:
        """What a canary draws by: stays the same throughout a conversation.

        Computed when asked for: an image in the first message makes it megabytes to hash.
        """
        given = self.headers.get("x-hones-key") or self.user
        if given:
            return given
        try:
            canonical = json.dumps(self.first, sort_keys=True, separators=(",", ":"))
        except RecursionError:  # nested deeper than any engine accepts: it answers with an error of its own
            canonical = ""
        return hashlib.sha256(canonical.encode()).hexdigest()


def facts_of_chat(body: object, headers: Mapping[str, str]) -> RequestFacts:
    """The facts of a chat completion's JSON body; what is malformed counts as absent, the engine will refuse it.

    Raises:
        RoutingError: `hones_task` is not a string, or given twice with different values.
    """
    messages = _field(body, "messages")
    messages = [message for message in messages if isinstance(message, dict)] if isinstance(messages, list) else []
    asking = [message for message in messages if message.get("role") == "user"]
    system = [_text(message) for message in messages if message.get("role") in ("system", "developer")]
    # The system message is most often the same for all conversations, so the first question tells them apart.
    opening = (asking or messages)[:1]
    return _facts(
        body,
        headers,
        has_image=any(_is_image(part) for message in messages for part in _parts(message)),
        prompt=_text(asking[-1]) if asking else "",
        system="\n".join(system),
        first=opening[0].get("content") if opening else None,
    )


def facts_of_completion(body: object, headers: Mapping[str, str]) -> RequestFacts:
    """The facts of a completion's JSON body, whose prompt may be text, several texts, or token ids (no text).

    Raises:
        RoutingError: as `facts_of_chat`.
    """
    prompt = _field(body, "prompt")
    texts = prompt if isinstance(prompt, list) else [prompt]
    return _facts(body, headers, prompt="\n".join(text for text in texts if isinstance(text, str)), first=prompt)


def _facts(body: object, headers: Mapping[str, str], **found: Any) -> RequestFacts:
    lowered = {name.lower(): value for name, value in headers.items()}
    model, user = _field(body, "model"), _field(body, "user")
    return RequestFacts(
        body_task=_body_task(body),
        header_task=lowered.get("x-hones-task"),
        model=model if isinstance(model, str) else None,
        headers=lowered,
        user=user if isinstance(user, str) else None,
        **found,
    )


def _body_task(body: object) -> str | None:
    given = [_field(body, "hones_task"), _field(_field(body, "vllm_xargs"), "hones_task")]
    tasks = [task for task in given if task is not None]
    for task in tasks:
        if not isinstance(task, str):
            raise RoutingError(f"hones_task must be a string such as 'vqa' or 'none', not {type(task).__name__}")
    if len(set(tasks)) > 1:
        raise RoutingError(
            f"hones_task is {_short(tasks[0])} and in vllm_xargs {_short(tasks[1])}; give it once, or the same twice"
        )
    return tasks[0] if tasks else None


def _field(value: object, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _parts(message: dict[str, Any]) -> list[object]:
    content = message.get("content")
    return content if isinstance(content, list) else [content]


def _text(message: dict[str, Any]) -> str:
    texts = (part if isinstance(part, str) else _field(part, "text") for part in _parts(message))
    return "\n".join(text for text in texts if isinstance(text, str))


def _is_image(part: object) -> bool:
    kind = _field(part, "type")
    # Engines accept a part without a type whose key tells what it is.
    return kind in _IMAGES if kind is not None else any(_field(part, name) is not None for name in _IMAGES)


def _short(text: str) -> str:
    return repr(text) if len(text) <= 60 else repr(text[:57]) + "..."


# The plan -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """Steer with the expression `task` where every condition that is given holds; `header` has lower-case names."""

    task: str
    has_image: bool | None = None
    prompt_regex: Any = None  # compiled, see `compile_regex`
    system_regex: Any = None
    model: str | None = None
    header: Mapping[str, str] = field(default_factory=dict)

    def matches(self, facts: RequestFacts) -> bool:
        """Whether all conditions hold."""
        return (
            (self.has_image is None or self.has_image == facts.has_image)
            and (self.model is None or self.model == facts.model)
            and all(facts.headers.get(name) == value for name, value in self.header.items())
            and (self.prompt_regex is None or _found(self.prompt_regex, facts.prompt))
            and (self.system_regex is None or _found(self.system_regex, facts.system))
        )


def compile_regex(pattern: str) -> Any:
    """A pattern of RE2: time linear in the text, no look-around and no back-references.

    Raises:
        re2.error, UnicodeEncodeError: not a pattern.
    """
    options = re2.Options()
    options.log_errors = False
    options.never_capture = True
    return re2.compile(pattern, options)


def _found(regex: Any, text: str) -> bool:
    # JSON can carry half a surrogate pair, which has no UTF-8.
    return regex.search(text[:MATCHED_BYTES].encode("utf-8", "replace")[:MATCHED_BYTES]) is not None


@dataclass(frozen=True)
class Canary:
    """Of the traffic that rules or the default steer with `task`, `percent` (0-100) gets `to` instead."""

    task: str
    to: str
    percent: float

    def takes(self, key: str) -> bool:
        """Whether this key is in; who is in at some percent is in at any higher one.

        Salted with what is compared, so that two canaries do not pick the same users.
        """
        salted = f"{parse_expression(self.task)}\0{parse_expression(self.to)}\0{key}"
        digest = hashlib.sha256(salted.encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") < self.percent / 100 * 2**64


@dataclass(frozen=True)
class RoutingPlan:
    """What the server's operator wants for requests that do not ask themselves. Empty: no steering."""

    default: str | None = None
    rules: tuple[Rule, ...] = ()
    canary: Canary | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str], tasks: Collection[str]) -> RoutingPlan:
        """Read and check a routing file (format in the module's docstring); `tasks` are the known ones.

        Raises:
            RoutingError: the file cannot be read or is not sound, naming the file and the line.
        """
        return _RoutingFile(Path(path), sorted(tasks)).plan()


# Deciding -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """The steering of one request: `asked` is the expression as written, `model` the name without an alias."""

    asked: str
    expression: Expression
    route: str  # one of ROUTES
    model: str | None


def split_alias(model: str, served: Collection[str], exact: Collection[str]) -> tuple[str, str] | None:
    """``<served name>:<expression>`` as (served name, expression), or None where `model` is no alias.

    The longest served name counts. `exact` are names that win over a reading as alias (served and LoRA names).
    """
    if model in exact or model in served:
        return None
    bases = [name for name in served if model.startswith(name + ":")]
    if not bases:
        return None
    base = max(bases, key=len)
    return base, model[len(base) + 1 :]


def decide(
    facts: RequestFacts, plan: RoutingPlan, *, served: Collection[str], exact: Collection[str], enabled: bool
) -> Decision:
    """The steering that `facts` get under `plan`. Not `enabled` (the kill switch): none, by the route "off".

    Raises:
        RoutingError: the expression asked for, or the alias's, is malformed; also while not enabled.
    """
    alias = split_alias(facts.model, served, exact) if facts.model is not None else None
    model, alias_task = alias or (facts.model, None)
    if alias_task is not None:
        parse_expression(alias_task)  # part of the model's name: malformed is an error whoever decides
    asked, route = _asked(facts, alias_task) or _planned(facts, plan)
    expression = parse_expression(asked)
    if not enabled:
        return Decision("none", Expression((), ()), "off", model)
    canary = plan.canary
    if canary is not None and route in ("rule", "default") and _same(asked, canary.task) and canary.takes(facts.key):
        return Decision(canary.to, parse_expression(canary.to), "canary", model)
    return Decision(asked, expression, route, model)


def _same(one: str, other: str) -> bool:
    return parse_expression(one) == parse_expression(other)


def _asked(facts: RequestFacts, alias_task: str | None) -> tuple[str, str] | None:
    asked = ((facts.body_task, "body"), (facts.header_task, "header"), (alias_task, "alias"))
    return next(((task, route) for task, route in asked if task is not None), None)


def _planned(facts: RequestFacts, plan: RoutingPlan) -> tuple[str, str]:
    for rule in plan.rules:
        if rule.matches(facts):
            return rule.task, "rule"
    return plan.default or "none", "default"


# The file -------------------------------------------------------------------------------------------------


class _RoutingFile:
    """One routing file being read: from YAML nodes rather than values, because nodes know their line."""

    def __init__(self, path: Path, tasks: list[str]) -> None:
        self.path = path
        self.tasks = tasks

    def plan(self) -> RoutingPlan:
        root = self._root()
        keys = {"default": self._expression, "rules": self._rules, "canary": self._canary}
        plan = RoutingPlan(**self._mapping(root, "the file", keys))
        given = [plan.default or "none", *(rule.task for rule in plan.rules)]
        if plan.canary and not any(_same(plan.canary.task, task) for task in given):
            node = next(value for key, value in root.value if key.value == "canary")
            self._fail(node, f"the canary never acts: neither a rule nor the default gives {plan.canary.task!r}")
        return plan

    def _rules(self, node: yaml.Node, what: str) -> tuple[Rule, ...]:
        if not _is(node, "seq"):
            self._fail(node, f"{what} must be a list")
        return tuple(self._rule(entry) for entry in node.value)

    def _rule(self, node: yaml.Node) -> Rule:
        keys = {
            "task": self._expression,
            "has_image": self._boolean,
            "prompt_regex": self._regex,
            "system_regex": self._regex,
            "model": self._string,
            "header": self._headers,
        }
        found = self._mapping(node, "a rule", keys, required=["task"])
        if len(found) == 1:
            self._fail(node, f"the rule has no condition; give it one of {', '.join(list(keys)[1:])}, or use default")
        return Rule(**found)

    def _canary(self, node: yaml.Node, what: str) -> Canary:
        keys = {"task": self._expression, "to": self._expression, "percent": self._percent}
        canary = Canary(**self._mapping(node, what, keys, required=keys))
        if _same(canary.task, canary.to):
            self._fail(node, f"the canary replaces {canary.task!r} by itself")
        return canary

    def _headers(self, node: yaml.Node, what: str) -> Mapping[str, str]:
        headers: dict[str, str] = {}
        for key, value in self._entries(node, what):
            name = key.value.lower()
            if not _HEADER_NAME.fullmatch(name):
                self._fail(key, f"{_short(key.value)} is not the name of a header")
            if name in headers:
                self._fail(key, f"{what} names {_short(key.value)} twice (case does not matter)")
            headers[name] = self._string(value, f"the header {_short(key.value)}")
        return headers

    def _mapping(
        self, node: yaml.Node, what: str, keys: Mapping[str, Callable[..., Any]], required: Iterable[str] = ()
    ) -> dict[str, Any]:
        """A mapping's values by key, each read by the function that `keys` has for it."""
        found: dict[str, Any] = {}
        for key, value in self._entries(node, what):
            name = key.value
            if name not in keys:
                near = difflib.get_close_matches(name, keys, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(keys)}"
                self._fail(key, f"{what} has the unknown key {_short(name)}; {hint}")
            if name in found:
                self._fail(key, f"{what} has the key {name!r} twice")
            found[name] = keys[name](value, name)
        for name in required:
            if name not in found:
                self._fail(node, f"{what} has no {name!r}")
        return found

    def _entries(self, node: yaml.Node, what: str) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
        if not _is(node, "map") or not node.value:
            self._fail(node, f"{what} must be a mapping with at least one key")
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._fail(key, f"{what} has a key that is no name")
            yield key, value

    def _string(self, node: yaml.Node, what: str) -> str:
        if not _is(node, "str"):
            self._fail(node, f"{what} must be a string, not {_shown(node)}; put it in quotes if it is one")
        return str(node.value)

    def _boolean(self, node: yaml.Node, what: str) -> bool:
        value = yaml.SafeLoader.bool_values.get(node.value.lower()) if _is(node, "bool") else None
        if value is None:
            self._fail(node, f"{what} must be true or false, not {_shown(node)}")
        return value

    def _percent(self, node: yaml.Node, what: str) -> float:
        try:
            percent = float(node.value) if _is(node, "int") or _is(node, "float") else -1.0
        except ValueError:  # .nan, 0x10, 1:30
            percent = -1.0
        if not 0 <= percent <= 100:
            self._fail(node, f"{what} must be a number from 0 to 100, not {_shown(node)}")
        return percent

    def _expression(self, node: yaml.Node, what: str) -> str:
        text = self._string(node, what)
        try:
            names = parse_expression(text).names
        except RoutingError as error:
            self._fail(node, f"{what}: {error}")
        for name in names:
            if name not in self.tasks:
                known = ", ".join(self.tasks) or "none yet"
                self._fail(node, f"{what}: there is no profile for the task {name!r}; known tasks: {known}")
        return text

    def _regex(self, node: yaml.Node, what: str) -> Any:
        text = self._string(node, what)
        try:
            return compile_regex(text)
        except (re2.error, UnicodeEncodeError) as error:
            reason = error.args[0].decode("utf-8", "replace") if isinstance(error, re2.error) else str(error)
            self._fail(node, f"{what} {_short(text)} is not a regular expression of RE2: {reason}")

    def _root(self) -> yaml.Node:
        text = self._text()
        try:
            root = self._compose(text)
        except yaml.reader.ReaderError as error:
            self._fail(text.count("\n", 0, error.position) + 1, f"the character #x{error.character:04x} is not allowed")
        except yaml.MarkedYAMLError as error:
            self._fail(error.problem_mark.line + 1 if error.problem_mark else 1, f"not sound YAML: {error.problem}")
        if root is None:
            self._fail(1, "the file is empty; give it default, rules or canary")
        return root

    def _compose(self, text: str) -> yaml.Node | None:
        loader = _Loader(text)
        try:
            return loader.get_single_node()
        except (ValueError, OverflowError) as error:  # what PyYAML raises on "\UFFFFFFFF", without a mark
            self._fail(loader.line + 1, f"not sound YAML: {error}")

    def _text(self) -> str:
        try:
            with self.path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise RoutingError(f"{self.path}: cannot be read: {error.strerror}") from error
        if len(data) > MAX_FILE_BYTES:
            raise RoutingError(f"{self.path}: larger than 1 MiB, which no routing file needs")
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            self._fail(data.count(b"\n", 0, error.start) + 1, "not UTF-8 text")

    def _fail(self, where: yaml.Node | int, message: str) -> NoReturn:
        line = where if isinstance(where, int) else where.start_mark.line + 1
        raise RoutingError(f"{self.path}:{line}: {message}")


class _Loader(yaml.SafeLoader):
    """Refuses while it composes what could cost time or memory out of proportion to the file."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if event.anchor is not None:
            raise yaml.MarkedYAMLError(
                problem="anchors (&) and aliases (*) are not allowed here; write the value out, or put it in quotes",
                problem_mark=event.start_mark,
            )
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _is(node: yaml.Node, kind: str) -> bool:
    """Whether a node is of a YAML type ("map", "seq", "str", ...) in form, too: tags can be written by hand."""
    form = {"map": yaml.MappingNode, "seq": yaml.SequenceNode}.get(kind, yaml.ScalarNode)
    return isinstance(node, form) and node.tag == f"tag:yaml.org,2002:{kind}"


def _shown(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        return "a list or mapping"
    return _short(node.value) if node.value else "empty"
