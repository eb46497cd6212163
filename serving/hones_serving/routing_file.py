"""The routing file: a server's steering for requests that do not name any, in YAML.

    default: vqa                    # an expression; none where the key is absent
    rules:                          # the first one whose conditions all hold decides
      - task: ocr+vqa@0.5
        has_image: true
        prompt_regex: (?i)transcribe
        system_regex: ^You read documents
        model: llava
        header: {X-Tenant: acme}
    canary: {task: vqa, to: vqa@1.5, percent: 2.5}

Regexes are RE2's and see the first 8 KiB of the text. Every mistake is refused, naming the file and the line.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import re2  # type: ignore[import-untyped]
import yaml

from hones_serving.facts import short
from hones_serving.routing import Canary, RoutingPlan, Rule, compile_regex, steer_alike
from hones_steer.errors import RoutingError
from hones_steer.store import known_tasks, parse_expression

MAX_FILE_BYTES = 1024 * 1024
MAX_DEPTH = 8  # a valid file nests four deep

_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


def load_plan(path: str | os.PathLike[str], tasks: Collection[str] | None) -> RoutingPlan:
    """Read and check a routing file (format in the module's docstring); `tasks` are those with a profile, None: any.

    Raises:
        RoutingError: the file cannot be read or is wrong; the message names the file and the line.
    """
    return _RoutingFile(Path(path), None if tasks is None else sorted(tasks)).plan()


class _RoutingFile:
    """Reader of one routing file: of YAML nodes rather than values, because nodes know their line.

    A method called like a type (`_rule`, `_string`, ...) reads one node; its `what` names the node in errors.
    """

    def __init__(self, path: Path, tasks: list[str] | None) -> None:
        self.path = path
        self.tasks = tasks

    def plan(self) -> RoutingPlan:
        root = self._root()
        keys = {"default": self._expression, "rules": self._rules, "canary": self._canary}
        plan = RoutingPlan(**self._mapping(root, "the file", keys))
        planned = [plan.default or "none", *(rule.task for rule in plan.rules)]
        if plan.canary and not any(steer_alike(plan.canary.task, task) for task in planned):
            node = next(value for key, value in root.value if key.value == "canary")
            message = f"the canary never acts: neither a rule nor the default gives {plan.canary.task!r}"
            self._fail(node, f"{message}; change its task, or take it out")
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
        fields = self._mapping(node, "a rule", keys, required=["task"])
        if len(fields) == 1:
            self._fail(node, f"the rule has no condition; give it one of {', '.join(list(keys)[1:])}, or use default")
        return Rule(**fields)

    def _canary(self, node: yaml.Node, what: str) -> Canary:
        keys = {"task": self._expression, "to": self._expression, "percent": self._percent}
        canary = Canary(**self._mapping(node, what, keys, required=keys))
        if steer_alike(canary.task, canary.to):
            self._fail(node, f"the canary replaces {canary.task!r} by itself; change its to, or take it out")
        return canary

    def _headers(self, node: yaml.Node, what: str) -> Mapping[str, str]:
        headers: dict[str, str] = {}
        for key, value in self._entries(node, what):
            name = key.value.lower()
            if not _HEADER_NAME.fullmatch(name):
                self._fail(key, f"{short(key.value)} is not the name of a header; name one, such as X-Tenant")
            if name in headers:
                self._fail(key, f"{what} names {short(key.value)} twice (case does not matter); keep one")
            headers[name] = self._string(value, f"the header {short(key.value)}")
        return headers

    def _mapping(
        self, node: yaml.Node, what: str, keys: Mapping[str, Callable[..., Any]], required: Iterable[str] = ()
    ) -> dict[str, Any]:
        """A mapping's values by key, each read by the function that `keys` has for its key."""
        values: dict[str, Any] = {}
        for key, value in self._entries(node, what):
            name = key.value
            if name not in keys:
                near = difflib.get_close_matches(name, keys, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(keys)}"
                self._fail(key, f"{what} has the unknown key {short(name)}; {hint}")
            if name in values:
                self._fail(key, f"{what} has the key {name!r} twice; keep one")
            values[name] = keys[name](value, name)
        for name in required:
            if name not in values:
                self._fail(node, f"{what} has no {name!r}; give it one")
        return values

    def _entries(self, node: yaml.Node, what: str) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
        if not _is(node, "map") or not node.value:
            self._fail(node, f"{what} must be a mapping with at least one key")
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._fail(key, f"{what} has a key that is no name; write each as name: value")
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
            if self.tasks is not None and name not in self.tasks:
                known = known_tasks(name, self.tasks, "the folder of profiles")
                self._fail(node, f"{what}: there is no profile for the task {name!r}; {known}")
        return text

    def _regex(self, node: yaml.Node, what: str) -> Any:
        text = self._string(node, what)
        try:
            return compile_regex(text)
        except (re2.error, UnicodeEncodeError) as error:
            reason = error.args[0].decode("utf-8", "replace") if isinstance(error, re2.error) else str(error)
            self._fail(node, f"{what} {short(text)} is not a regular expression of RE2: {reason}")

    def _root(self) -> yaml.Node:
        text = self._text()
        try:
            root = self._compose(text)
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            self._fail(line, f"the character #x{error.character:04x} is not allowed; take it out")
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
            raise RoutingError(f"{self.path}: cannot be read: {error.strerror}; name a routing file") from error
        if len(data) > MAX_FILE_BYTES:
            raise RoutingError(f"{self.path}: larger than 1 MiB; name a routing file, which needs less")
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            self._fail(data.count(b"\n", 0, error.start) + 1, "not UTF-8 text; save the file as UTF-8")

    def _fail(self, where: yaml.Node | int, message: str) -> NoReturn:
        line = where if isinstance(where, int) else where.start_mark.line + 1
        raise RoutingError(f"{self.path}:{line}: {message}")


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses, before it builds them, nodes that could cost far more time or memory than the file."""

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
            raise yaml.MarkedYAMLError(
                problem=f"nested too deeply; write at most {MAX_DEPTH} levels", problem_mark=event.start_mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _is(node: yaml.Node, kind: str) -> bool:
    """Test a node's YAML type ("map", "seq", "str", ...), and its form as well: tags can be written by hand."""
    form = {"map": yaml.MappingNode, "seq": yaml.SequenceNode}.get(kind, yaml.ScalarNode)
    return isinstance(node, form) and node.tag == f"tag:yaml.org,2002:{kind}"


def _shown(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        return "a list or mapping"
    return short(node.value) if node.value else "empty"
