"""The facts of a request that routing looks at, read from the JSON body of each route and from the headers.

A malformed field counts as absent: the engine will refuse it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from hones_steer.errors import RoutingError

_IMAGES = ("image_url", "input_image", "image", "image_pil", "image_embeds")


@dataclass(frozen=True)
class RequestFacts:
    """The parts of a request that routing looks at.

    `headers` has lower-case names. `prompt` is the last user message's text, or all prompts of a completion; `system`
    is the text of all system and developer messages; `first` is the JSON value that opens the conversation.
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
        """The text that a canary draws by: X-Hones-Key, else `user`, else a hash of `first`. A conversation keeps it.

        Computed on each access, because an image in the first message makes it megabytes to hash.
        """
        named = self.headers.get("x-hones-key") or self.user
        if named:
            return named
        try:
            canonical = json.dumps(self.first, sort_keys=True, separators=(",", ":"))
        except RecursionError:  # nested deeper than any engine accepts: it answers with an error of its own
            canonical = ""
        return hashlib.sha256(canonical.encode()).hexdigest()


FactsOf: TypeAlias = Callable[[object, Mapping[str, str]], RequestFacts]  # from a JSON body and headers


def facts_of_chat(body: object, headers: Mapping[str, str]) -> RequestFacts:
    """The facts of a chat completion, from its JSON body and its headers.

    Raises:
        RoutingError: `hones_task` is not a string, or it or X-Hones-Task is given twice with different values.
    """
    return _facts_of_conversation(body, headers, _field(body, "messages"))


def facts_of_response(body: object, headers: Mapping[str, str]) -> RequestFacts:
    """The facts of a request to OpenAI's Responses API: `input` is the conversation, `instructions` its system text.

    What came before `previous_response_id` is not in the request, so it is not looked at.

    Raises:
        RoutingError: as `facts_of_chat`.
    """
    given = _field(body, "input")
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    return _facts_of_conversation(body, headers, messages, _field(body, "instructions"))


def facts_of_message(body: object, headers: Mapping[str, str]) -> RequestFacts:
    """The facts of a request to Anthropic's Messages API; its user is `metadata.user_id`.

    Raises:
        RoutingError: as `facts_of_chat`.
    """
    user = _field(_field(body, "metadata"), "user_id")
    return _facts_of_conversation(body, headers, _field(body, "messages"), _field(body, "system"), user)


def _facts_of_conversation(
    body: object, headers: Mapping[str, str], messages: object, system: object = None, user: object = None
) -> RequestFacts:
    known = [message for message in messages if isinstance(message, dict)] if isinstance(messages, list) else []
    # A message that only brings the results of tools asks nothing new: what was asked before it still decides.
    asking = [message for message in known if message.get("role") == "user" and not _is_tool_result(message)]
    of_system = [message for message in known if message.get("role") in ("system", "developer")]
    before = [] if system is None else [{"content": system}]
    # Most conversations with a model share its system message, so the first question tells them apart.
    opening = (asking or known)[:1]
    return _facts(
        body,
        headers,
        has_image=any(map(_has_image, known)),
        prompt=_text(asking[-1]) if asking else "",
        system="\n".join(map(_text, [*before, *of_system])),
        first=opening[0].get("content") if opening else None,
        user=user,
    )


def facts_of_completion(body: object, headers: Mapping[str, str]) -> RequestFacts:
    """The facts of a completion, from its JSON body and its headers.

    The prompt may be text, a list of texts, or token ids, which count as no text.

    Raises:
        RoutingError: `hones_task` is not a string, or it or X-Hones-Task is given twice with different values.
    """
    prompt = _field(body, "prompt")
    prompts = prompt if isinstance(prompt, list) else [prompt]
    text = "\n".join(entry for entry in prompts if isinstance(entry, str))
    return _facts(body, headers, has_image=False, prompt=text, system="", first=prompt)


def _facts(
    body: object,
    headers: Mapping[str, str],
    *,
    has_image: bool,
    prompt: str,
    system: str,
    first: object,
    user: object = None,
) -> RequestFacts:
    lowered = {name.lower(): value for name, value in headers.items()}
    model, user = _field(body, "model"), user if user is not None else _field(body, "user")
    return RequestFacts(
        body_task=_body_task(body),
        header_task=_header_task(lowered.get("x-hones-task")),
        model=model if isinstance(model, str) else None,
        has_image=has_image,
        prompt=prompt,
        system=system,
        headers=lowered,
        user=user if isinstance(user, str) else None,
        first=first,
    )


def _body_task(body: object) -> str | None:
    values = [_field(body, "hones_task"), _field(_field(body, "vllm_xargs"), "hones_task")]
    tasks = [task for task in values if task is not None]
    for task in tasks:
        if not isinstance(task, str):
            raise RoutingError(f"hones_task must be a string such as 'vqa' or 'none', not {type(task).__name__}")
    if len(set(tasks)) > 1:
        raise RoutingError(
            f"hones_task is {short(tasks[0])} and in vllm_xargs {short(tasks[1])}; give it once, or the same twice"
        )
    return tasks[0] if tasks else None


def joined(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Headers by lower-case name; different values of one are joined, so that contradictory ones are refused later."""
    by_name: dict[str, list[str]] = {}
    for name, value in headers:
        values = by_name.setdefault(name.lower(), [])
        if (value := value.strip(" \t")) not in values:
            values.append(value)
    return {name: ", ".join(values) for name, values in by_name.items()}


def _header_task(value: str | None) -> str | None:
    """The expression in X-Hones-Task, which may be a list of equal ones: proxies join a header that is sent twice."""
    if value is None:
        return None
    tasks = dict.fromkeys(task.strip(" \t") for task in value.split(","))
    if len(tasks) > 1:
        raise RoutingError(f"X-Hones-Task is {' and '.join(map(short, tasks))}; give it once, or the same twice")
    return next(iter(tasks))


def _field(value: object, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _parts(message: dict[str, Any]) -> list[object]:
    content = message.get("content")
    return content if isinstance(content, list) else [content]


def _text(message: dict[str, Any]) -> str:
    texts = (part if isinstance(part, str) else _field(part, "text") for part in _parts(message))
    return "\n".join(text for text in texts if isinstance(text, str))


def _has_image(message: dict[str, Any]) -> bool:
    """Look for an image among the parts of a message, also in what a tool gave back. True if there is one."""
    parts = [*_parts(message), *_parts({"content": message.get("output")})]
    results = (_parts(part) for part in parts if isinstance(part, dict) and part.get("type") == "tool_result")
    return any(map(_is_image, itertools.chain(parts, *results)))


def _is_tool_result(message: dict[str, Any]) -> bool:
    parts = _parts(message)
    return bool(parts) and all(_field(part, "type") == "tool_result" for part in parts)


def _is_image(part: object) -> bool:
    kind = _field(part, "type")
    # Engines accept a part without a type whose key tells what it is.
    return kind in _IMAGES if kind is not None else any(_field(part, name) is not None for name in _IMAGES)


def short(text: str) -> str:
    """A client's or operator's text in quotes, cut to 60 characters, for a message."""
    return repr(text) if len(text) <= 60 else repr(text[:57]) + "..."
