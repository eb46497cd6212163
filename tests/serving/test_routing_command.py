"""`hones route`: its output for a request, which is also the output that the docs show."""

import json
from pathlib import Path
from typing import Any

import pytest
from hones_serving.routing_command import route
from steer.profiles import make

from hones_steer import ProfileStore, RoutingError, save_profile

DOCS = Path(__file__).parents[2] / "docs" / "vllm.md"
ROUTING = """\
default: cap
rules:
  - task: none
    header: {X-Tenant: internal}
    system_regex: ^You are strict
  - task: ocr+vqa@0.5
    has_image: true
    prompt_regex: (?i)transcribe
  - task: vqa
    model: llava
canary: {task: cap, to: cap@2, percent: 50}
"""


@pytest.fixture
def routing(tmp_path: Path) -> Path:
    file = tmp_path / "routing.yaml"
    file.write_text(ROUTING)
    return file


@pytest.fixture
def profiles(tmp_path: Path) -> Path:
    folder = tmp_path / "profiles"
    folder.mkdir()
    for task in ("vqa", "ocr", "cap"):
        save_profile(make(task), folder / f"{task}.safetensors")
    return folder


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    assert route([*map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    return json.loads("\n".join(said(capsys, *arguments, "--json")))


def test_every_rule_and_the_condition_that_fails(routing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "Please transcribe", "--image", "--routing", routing, "--model", "other")
    assert lines == [
        "body      no hones_task",
        "header    no X-Hones-Task",
        "model     other",
        "rule 1    none does not match",
        "            no  header: {x-tenant: internal}  (the request has none)",
        "            no  system_regex: ^You are strict  (not in the system message)",
        "rule 2    ocr+vqa@0.5 matches",
        "            yes has_image: true",
        "            yes prompt_regex: (?i)transcribe",
        "rule 3    vqa does not match",
        "            no  model: llava  (the request has 'other')",
        "default   cap",
        lines[12],
        "",
        "ocr+vqa@0.5: rule 2 is the first that matches",
        "",
        "X-Hones-Profile: ocr+vqa@0.5",
        "X-Hones-Route: rule",
    ]
    assert lines[12].startswith("canary    of cap, 50% get cap@2; it ")


STRICT = ("--header", "X-Tenant=internal", "--system", "You are strict.")


@pytest.mark.parametrize(
    ("arguments", "task", "way", "rule"),
    [
        (["hi", "--task", "ocr", "--header", "X-Hones-Task=vqa", "--model", "llava:cap"], "ocr", "body", None),
        (["hi", "--header", "X-Hones-Task=vqa", "--model", "llava:cap"], "vqa", "header", None),
        (["hi", "--header", "X-Hones-Task=vqa", "--header", "x-hones-task= vqa"], "vqa", "header", None),
        (["hi", "--model", "llava:cap@-0.5"], "cap@-0.5", "alias", None),
        (["hi", "--model", "llava:7b", "--served-model-name", "llava:7b"], "cap", "default", None),
        (["hi", "--model", "llava:7b:ocr", "--served-model-name", "llava", "llava:7b"], "ocr", "alias", None),
        (["hi", "--model", "llava"], "vqa", "rule", 3),
        (["transcribe", "--model", "llava"], "vqa", "rule", 3),
        (["transcribe", "--model", "llava", "--image"], "ocr+vqa@0.5", "rule", 2),
        (["transcribe", "--model", "llava", "--image", *STRICT], "none", "rule", 1),
        (["transcribe", "--model", "llava", "--image", *STRICT, "--task", "ocr"], "ocr", "body", 1),
        (["transcribe", "--model", "llava", "--image", "--off"], "none", "off", 2),
    ],
)
def test_each_route(
    arguments: list[str],
    task: str,
    way: str,
    rule: int | None,
    routing: Path,
    profiles: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    key = ["--key", "user 1"]  # who is not in the canary, see below
    report = told(capsys, *arguments, *key, "--routing", routing, "--profiles", profiles)
    assert (report["task"], report["route"], report["rule"]) == (task, way, rule)
    steering = ProfileStore(profiles).resolve(task)
    assert report["digest"] == (steering.digest if steering else None)


def test_the_canary_draws_by_key(routing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports = [told(capsys, "hi", "--routing", routing, "--key", f"user {i}") for i in range(20)]
    drawn = [(report["canary"]["takes"], report["task"], report["route"]) for report in reports]
    assert set(drawn) == {(True, "cap@2", "canary"), (False, "cap", "default")}
    assert drawn[1][2] == "default"
    taken = [one[0] for one in drawn].index(True)
    lines = said(capsys, "hi", "--routing", routing, "--key", f"user {taken}")
    assert "cap@2: the canary replaces what the default gives" in lines
    assert "canary    of cap, 50% get cap@2; it takes this request's key" in lines


def test_the_digest_is_that_of_the_servers_header(profiles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blend = ProfileStore(profiles).resolve("vqa@0.5+ocr")
    assert blend is not None
    lines = said(capsys, "hi", "--task", "vqa@0.5+ocr", "--profiles", profiles)
    assert f"X-Hones-Profile: vqa@0.5+ocr ({blend.short_digest})" in lines
    assert "X-Hones-Profile: none" in said(capsys, "hi", "--task", "vqa@0", "--profiles", profiles)
    assert "X-Hones-Profile: none" in said(capsys, "hi", "--task", "vqa@0")
    assert said(capsys, "hi")[-4:] == [
        *("none: no rule matches, so the default decides", "", "X-Hones-Profile: none", "X-Hones-Route: default")
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "vqa@@2"], "vqa@@2"),
        (["--task", "wqa"], "no profile for the task 'wqa'; known tasks: cap, ocr, vqa"),
        (["--model", "llava:wqa"], "no profile for the task 'wqa'"),
        (["--routing", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
    ],
)
def test_what_a_server_would_refuse(arguments: list[str], words: str, profiles: Path) -> None:
    with pytest.raises(RoutingError, match=words):
        route(["hi", *arguments, "--profiles", str(profiles)])


def test_a_routing_file_is_checked_against_the_profiles_where_they_are_named(
    routing: Path, profiles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (profiles / "ocr.safetensors").unlink()
    with pytest.raises(RoutingError, match=r"routing.yaml:6: .*'ocr'"):
        route(["hi", "--routing", str(routing), "--profiles", str(profiles)])
    assert said(capsys, "hi", "--routing", routing)
    routing.write_text("default: vqa+\n")
    with pytest.raises(RoutingError, match=r"routing.yaml:1: "):
        route(["hi", "--routing", str(routing)])


@pytest.mark.parametrize("header", ["X-Tenant", "=acme"])
def test_a_header_without_a_name_or_value(header: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        route(["hi", "--header", header])
    assert "is not NAME=VALUE" in capsys.readouterr().err


def test_escape_codes_stay_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "routing.yaml"
    file.write_text('rules:\n  - {task: vqa, model: "\\e[31mred"}\n')
    lines = said(capsys, "hi", "--routing", file)
    assert "            no  model: \\x1b[31mred  (the request has none)" in lines


def test_the_docs_show_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = DOCS.read_text(encoding="utf-8").split("```text\n")
    shown = next(block.partition("```")[0] for block in blocks if block.startswith("$ hones route"))
    file = tmp_path / "routing.yaml"
    file.write_text(next(block.partition("```")[0] for block in blocks if block.startswith("default:")))
    assert said(capsys, "transcribe this sign", "--image", "--routing", file) == shown.splitlines()[1:]
