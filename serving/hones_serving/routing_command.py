"""The command ``hones route``: explains what a server's routing decides about a request, without a server."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hones_serving.contract import profile_header
from hones_serving.facts import RequestFacts, facts_of_chat, joined
from hones_serving.routing import Decision, RoutingPlan, decide
from hones_serving.routing_file import load_plan
from hones_steer.cli.output import command_parser, print_json, printable
from hones_steer.store import ProfileStore

_DESCRIPTION = """\
Show which steering a chat request would get and why: what it asks for itself, every rule of the routing file with the
condition that fails, the default and the canary. The decision is the servers' own code; nothing is loaded or sent."""

_EXAMPLE = """\
hones route "transcribe this sign" --image --routing routing.yaml
  hones route "What is this?" --routing routing.yaml --header X-Tenant=acme --key user-17
  hones route "What is this?" --model llava:vqa@0.5+ocr --profiles profiles --json | jq .digest"""

_ROUTES = {
    "body": "the body's hones_task decides",
    "header": "the header X-Hones-Task decides",
    "alias": "the model's name decides",
    "default": "no rule matches, so the default decides",
    "off": "steering is switched off",
}


def route(argv: Sequence[str]) -> int:
    """Run ``hones route PROMPT``: explain a server's decision to a person, or to a script with ``--json``.

    Returns 0. Raises RoutingError or ProfileError if the request, the routing file or a profile is wrong.
    """
    options = _parser().parse_args(argv)
    store = ProfileStore(options.profiles) if options.profiles is not None else None
    plan = load_plan(options.routing, store.names() if store else None) if options.routing else RoutingPlan()
    facts = facts_of_chat(_body(options), _headers(options))
    served = options.served_model_name or ([options.model.partition(":")[0]] if options.model else [])
    decision = decide(facts, plan, served=served, exact=served, enabled=not options.off)
    profile = store.resolve(decision.asked) if store else None
    explained = _explained(facts, plan, decision)
    if options.json:
        print_json({**explained, "digest": profile.digest if profile else None})
        return 0
    applied = profile_header(decision, profile) if store or not decision.expression.terms else decision.asked
    lines = [*_lines(explained), "", f"X-Hones-Profile: {applied}", f"X-Hones-Route: {decision.route}"]
    print("\n".join(map(printable, lines)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("route", _DESCRIPTION, _EXAMPLE)
    add = parser.add_argument
    add("prompt", metavar="PROMPT", help="the last user message's text")
    add("--image", action="store_true", help="the request has an image")
    add("--system", metavar="TEXT", help="the system message")
    add("--model", metavar="NAME", help='what the request calls the model, perhaps "MODEL:EXPRESSION"')
    add("--task", metavar="EXPRESSION", help="the body's hones_task")
    add("--header", metavar="NAME=VALUE", type=_header, action="append", default=[], help="any number of them")
    add("--key", metavar="KEY", help="X-Hones-Key, which the canary draws by (default: a hash of the first message)")
    add("--routing", metavar="FILE", type=Path, help="the server's routing file")
    add(
        "--profiles",
        metavar="DIR",
        type=Path,
        help="the server's profiles: unknown tasks are errors, digests are shown",
    )
    names = "the server's names of its model (default: the request's, up to the first colon)"
    add("--served-model-name", metavar="NAME", nargs="+", help=names)
    add("--off", action="store_true", help="as while steering is switched off (the kill switch)")
    add("--json", action="store_true", help="print JSON instead of text")
    return parser


def _header(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, such as X-Tenant=acme")
    return name, value


# The request as the options say -------------------------------------------------------------------


def _body(options: argparse.Namespace) -> dict[str, Any]:
    text: dict[str, Any] = {"type": "text", "text": options.prompt}
    image: dict[str, Any] = {"type": "image_url", "image_url": {"url": "data:,"}}
    messages = [{"role": "user", "content": [image, text] if options.image else [text]}]
    if options.system is not None:
        messages.insert(0, {"role": "system", "content": options.system})
    return {"model": options.model, "hones_task": options.task, "messages": messages}


def _headers(options: argparse.Namespace) -> dict[str, str]:
    return joined([*options.header, *([] if options.key is None else [("X-Hones-Key", options.key)])])


# The decision -------------------------------------------------------------------------------------


def _explained(facts: RequestFacts, plan: RoutingPlan, decision: Decision) -> dict[str, Any]:
    """The JSON object that `--json` prints, without the digest; `rule` is the number of the first match, from 1."""
    rules = [
        {
            "task": rule.task,
            "matches": rule.matches(facts),
            "conditions": [{"condition": text, "fails": reason} for text, reason in rule.conditions(facts)],
        }
        for rule in plan.rules
    ]
    canary = plan.canary
    return {
        "task": decision.asked,
        "expression": str(decision.expression),
        "route": decision.route,
        "model": decision.model,
        "asked": {"body": facts.body_task, "header": facts.header_task, "model": facts.model},
        "rules": rules,
        "rule": next((number for number, rule in enumerate(rules, 1) if rule["matches"]), None),
        "default": plan.default or "none",
        "canary": {**dataclasses.asdict(canary), "takes": canary.takes(facts.key)} if canary else None,
    }


def _lines(explained: Mapping[str, Any]) -> Iterator[str]:
    asked = explained["asked"]
    yield f"body      {asked['body'] or 'no hones_task'}"
    yield f"header    {asked['header'] or 'no X-Hones-Task'}"
    yield f"model     {asked['model'] or 'not named'}"
    for number, rule in enumerate(explained["rules"], 1):
        yield f"{f'rule {number}':<9} {rule['task']} {'matches' if rule['matches'] else 'does not match'}"
        for condition in rule["conditions"]:
            text, reason = condition["condition"], condition["fails"]
            yield " " * 12 + (f"yes {text}" if reason is None else f"no  {text}  ({reason})")
    yield f"default   {explained['default']}"
    if canary := explained["canary"]:
        taken = "takes" if canary["takes"] else "does not take"
        yield f"canary    of {canary['task']}, {canary['percent']:g}% get {canary['to']}; it {taken} this request's key"
    yield ""
    yield f"{explained['task']}: {_why(explained)}"


def _why(explained: Mapping[str, Any]) -> str:
    number = explained["rule"]
    if explained["route"] == "rule":
        return f"rule {number} is the first that matches"
    if explained["route"] == "canary":
        return f"the canary replaces what {f'rule {number}' if number else 'the default'} gives"
    return _ROUTES[explained["route"]]
