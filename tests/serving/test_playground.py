"""The page at /hones in a real browser, against real servers of the transformers engine."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from browser import CONTRASTS, Opened
from hones_offline.data.scenes import scenes
from PIL import Image
from serving.playground_page import answers, fill, playground, shown
from serving.steered import Reference, write_profiles
from tiny_models import random_profile
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from hones_steer import Profile, save_profile
from hones_steer.store import combine, parse_expression

KEY = "s3cret"
ATTACK = "</script><script>alert(1)</script><img/src=x/onerror=alert(2)>'\"<svg/onload=alert(3)>"
SCENE = scenes("test", 1)[0]


@dataclass(frozen=True)
class Site:
    """A server with a key, the embedded model and a routing file, and the answers that it should give."""

    url: str
    profiles: dict[str, Profile]
    reference: Reference
    processor: Any
    picture: Path

    def text(self, expression: str, image: bool = True) -> str:
        """The answer of transformers to the scene's question, steered by an expression."""
        content = [*([{"type": "image"}] if image else []), {"type": "text", "text": SCENE.prompt("vqa")}]
        messages = [{"role": "user", "content": content}]
        chat = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = (chat, Image.open(self.picture)) if image else self.processor.tokenizer(chat)["input_ids"]
        text: str = self.processor.decode(self.reference.tokens(prompt, expression), skip_special_tokens=True)
        return text


@pytest.fixture(scope="module")
def site(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    here = tmp_path_factory.mktemp("site")
    model = AutoModelForImageTextToText.from_pretrained(embedded, dtype=torch.float32)
    end = model.generation_config.eos_token_id
    profiles = write_profiles(model, here / "profiles", fraction=0.9)
    processor = AutoProcessor.from_pretrained(embedded)
    reference = Reference(model, here / "profiles", processor)
    model.generation_config.eos_token_id = end  # the server stops there
    SCENE.image().save(here / "scene.png")
    (here / "routing.yaml").write_text("rules:\n  - {task: cap, has_image: true}\n")
    options = ["--api-key", KEY, "--served-model-name", "tiny", "--dtype", "float32"]
    options += ["--routing", str(here / "routing.yaml")]
    with playground(embedded, here / "profiles", here, *options) as running:
        yield Site(running.url, profiles, reference, processor, here / "scene.png")


@pytest.fixture(scope="module")
def hostile(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server without a key whose model generates only markup; its name and its profile's description are markup."""
    here = tmp_path_factory.mktemp("hostile")
    shutil.copytree(llama, here / "model")
    file = here / "model" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"] = {
        f"{ATTACK}{word}" if word[1:].isdigit() else word: i for word, i in tokenizer["model"]["vocab"].items()
    }
    file.write_text(json.dumps(tokenizer))
    (here / "profiles").mkdir()
    profile = random_profile(AutoModelForCausalLM.from_pretrained(llama), 0, "vqa")
    described = Profile(
        task=profile.task, layers=profile.layers, base_model=profile.base_model, description=f"A description {ATTACK}"
    )
    save_profile(described, here / "profiles" / "vqa.safetensors")
    with playground(here / "model", here / "profiles", here, "--served-model-name", ATTACK) as running:
        yield running.url


def opened(browser: Any, url: str, key: str | None = None, width: int = 1280, scheme: str = "light") -> Opened:
    """Open the page, and wait for its list of profiles where that needs no key or the key is given."""
    page = Opened(browser, f"{url}/hones", width, scheme)
    if key is not None:
        page.tab.get_by_label("API key").fill(key)
        page.tab.get_by_label("API key").press("Tab")
        page.complaints.clear()  # the browser's own, of the first try without the key
    return page


def until_listed(page: Opened) -> list[str]:
    """The rows of the table of profiles, as soon as it has any."""
    page.tab.locator("#profiles tr").first.wait_for()
    rows: list[str] = page.tab.locator("#profiles tr").all_inner_texts()
    return rows


# Use ----------------------------------------------------------------------------------------------


def test_base_against_steered(site: Site, browser: Any) -> None:
    page = opened(browser, site.url, KEY)
    assert [row.split("\t") for row in until_listed(page)] == [
        [name, str(profile.num_neurons), str(len(profile.layers)), profile.short_digest, ""]
        for name, profile in site.profiles.items()
    ]
    fill(page.tab, SCENE.prompt("vqa"), "none", "vqa@0.5+ocr", site.picture)
    blend = combine(parse_expression("vqa@0.5+ocr"), site.profiles.__getitem__)
    assert blend is not None
    left, right = answers(page.tab)
    assert left == {"answer": site.text("none"), "applied": "Profile: none · route: body", "wrong": ""}
    applied = f"Profile: vqa@0.5+ocr ({blend.short_digest}) · route: body"
    assert right == {"answer": site.text("vqa@0.5+ocr"), "applied": applied, "wrong": ""}
    assert left["answer"] != right["answer"]
    assert page.tab.get_by_role("status").inner_text() == "The answers differ."
    assert page.complaints == []
    assert {request.partition("/hones")[0] for request in page.requests if not request.startswith("data:")} <= {
        *(site.url, f"{site.url}/v1", f"{site.url}/v1/models", f"{site.url}/v1/chat/completions")
    }


def test_without_a_choice_the_server_routes(site: Site, browser: Any) -> None:
    page = opened(browser, site.url, KEY)
    until_listed(page)
    fill(page.tab, SCENE.prompt("vqa"), "", "cap", site.picture)
    left, right = answers(page.tab)
    cap = site.profiles["cap"].short_digest
    assert (left["applied"], right["applied"]) == (
        f"Profile: cap ({cap}) · route: rule",
        f"Profile: cap ({cap}) · route: body",
    )
    assert left["answer"] == right["answer"] == site.text("cap")
    assert page.tab.get_by_role("status").inner_text() == "Both answers are the same."
    page.tab.get_by_role("button", name="Remove").click()
    assert [one["applied"] for one in answers(page.tab)] == [
        "Profile: none · route: default",
        f"Profile: cap ({cap}) · route: body",
    ]
    assert shown(page.tab)[0]["answer"] == site.text("none", image=False)


def test_the_fields_begin_with_base_against_the_first_profile(site: Site, browser: Any) -> None:
    page = opened(browser, site.url, KEY)
    until_listed(page)
    assert [page.tab.locator(".expression").nth(at).input_value() for at in (0, 1)] == ["none", "cap"]
    assert page.tab.locator("#tasks option").evaluate_all("all => all.map(one => one.value)") == [
        *("none", "cap", "ocr", "vqa")
    ]
    assert page.tab.locator("#model option").all_inner_texts() == ["tiny"]


# Errors -------------------------------------------------------------------------------------------


def test_the_page_is_public_but_its_calls_are_not(site: Site, browser: Any) -> None:
    assert httpx.get(f"{site.url}/hones").status_code == httpx.head(f"{site.url}/hones").status_code == 200
    page = opened(browser, site.url)
    page.tab.get_by_text("This server wants an API key.").wait_for()
    assert page.tab.locator("#profiles").inner_text() == ""
    fill(page.tab, "hi", "none", "vqa")
    for side in answers(page.tab):
        assert side == {"answer": "", "applied": "", "wrong": "401: the API key is missing or wrong"}
    page.tab.get_by_label("API key").fill("wrong")
    page.tab.get_by_label("API key").press("Tab")
    page.tab.get_by_role("alert").filter(has_text="401: the API key is missing or wrong").first.wait_for()
    page.tab.get_by_label("API key").fill(KEY)
    page.tab.get_by_label("API key").press("Tab")
    assert len(until_listed(page)) == 3
    assert page.tab.locator("#problem").is_hidden()


def test_errors_are_shown_where_they_belong(site: Site, browser: Any, tmp_path: Path) -> None:
    page = opened(browser, site.url, KEY)
    until_listed(page)
    fill(page.tab, SCENE.prompt("vqa"), ATTACK[:60], "wqa", site.picture)
    left, right = answers(page.tab)
    assert left["wrong"].startswith(f"400: {ATTACK[:60]!r} in the steering expression")
    assert left["answer"] == right["answer"] == ""
    assert right["wrong"] == "400: there is no profile for the task 'wqa'; known tasks: cap, ocr, vqa"
    assert right["applied"] == "Profile: none · route: body"
    (tmp_path / "broken.png").write_bytes(b"no image")
    fill(page.tab, SCENE.prompt("vqa"), "none", "vqa", tmp_path / "broken.png")
    page.tab.wait_for_selector("#preview")
    left, right = answers(page.tab)
    assert left["wrong"].startswith("400: this request cannot be answered")
    fill(page.tab, SCENE.prompt("vqa"), "none", "vqa", site.picture)
    left, right = answers(page.tab)
    assert (left["wrong"], right["wrong"], right["answer"]) == ("", "", site.text("vqa"))


def test_a_server_that_is_gone(site: Site, browser: Any) -> None:
    page = opened(browser, site.url, KEY)
    until_listed(page)
    page.tab.context.set_offline(True)
    fill(page.tab, "hi", "none", "vqa")
    assert [one["wrong"] for one in answers(page.tab)] == ["Failed to fetch", "Failed to fetch"]


def test_a_run_can_be_stopped(site: Site, browser: Any) -> None:
    page, gate = opened(browser, site.url, KEY), site.picture.with_name("gate")
    until_listed(page)
    fill(page.tab, SCENE.prompt("vqa"), "none", "vqa", site.picture)
    gate.touch()
    try:
        page.tab.get_by_role("button", name="Run").click()
        page.tab.get_by_role("button", name="Stop").click()
        page.tab.get_by_role("button", name="Run").wait_for()
    finally:
        gate.unlink()
    assert [one["wrong"] for one in shown(page.tab)] == ["stopped", "stopped"]
    assert [one["answer"] for one in answers(page.tab)] == [site.text("none"), site.text("vqa")]


def test_what_a_server_says_stays_text(hostile: str, browser: Any) -> None:
    page = opened(browser, hostile, width=390)
    (row,) = until_listed(page)
    assert row.endswith(f"A description {ATTACK}")
    elements = "() => document.querySelectorAll('script, img, svg, [onload], [onerror]').length"
    before = page.ask(elements)
    fill(page.tab, "w17 w42", "none", "vqa")
    left, right = answers(page.tab)
    assert left["answer"].count(ATTACK) > 4
    assert right["answer"].count(ATTACK) > 4
    assert page.tab.locator("#model option").all_inner_texts() == [ATTACK]
    assert page.ask(elements) == before
    assert page.complaints == []
    assert page.ask("() => document.documentElement.scrollWidth") == 390


def test_only_its_own_script_runs(site: Site) -> None:
    headers = httpx.get(f"{site.url}/hones").headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for kind in ("script-src", "style-src"):
        assert policy[kind].startswith("'sha256-")
        assert " " not in policy[kind]
    assert headers["x-content-type-options"] == "nosniff"
    assert httpx.post(f"{site.url}/hones", headers={"Authorization": f"Bearer {KEY}"}).status_code == 404


# Looks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_and_can_be_read(site: Site, browser: Any, width: int, scheme: str) -> None:
    page = opened(browser, site.url, KEY, width, scheme)
    until_listed(page)
    fill(page.tab, SCENE.prompt("vqa"), "vqa@@", "vqa", site.picture, tokens=4)
    answers(page.tab)
    assert page.ask("() => document.documentElement.scrollWidth") == width
    worst = page.ask(CONTRASTS)
    assert {"H1.", "DIV.answer", "P.wrong", "P.applied soft", "BUTTON.", "BUTTON.plain"} <= worst.keys()
    assert {kind: ratio for kind, ratio in worst.items() if ratio < 4.5} == {}


def test_light_and_dark_differ(site: Site, browser: Any) -> None:
    colors = "() => ['background-color', 'color'].map(name => getComputedStyle(document.body)[name])"
    light, dark = (opened(browser, site.url, scheme=scheme).ask(colors) for scheme in ("light", "dark"))
    assert light[0] != dark[0]
    assert light[1] != dark[1]
