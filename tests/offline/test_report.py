"""`hones report`: what stands on the page and in the JSON, what a browser makes of it, and which input is refused."""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CONTRASTS, Opened
from hones_offline.attribution.methods import AttributionOptions
from hones_offline.report.figures import selection_bars, steering_bars
from hones_offline.report.page import report
from hones_offline.report.sections import build_sections
from hones_offline.report.summary import EACH, read_summary
from hones_offline.report.titles import is_ours
from summaries import FRACTIONS, TASKS, full_summary, minimal_summary

from hones_steer.errors import DataError

ATTACK = (
    "</script></style></title><script>alert(1)</script><img src=x onerror=alert(2)>'\"><svg onload=alert(3)> {{ 7*7 }}"
)


OPTIONAL_PARTS = ["heads", "neurons", "overlap", "masking", "budgets", "finding", "cross", "groups"]
OPTIONAL_PARTS += ["steering", "selections", "strength", "stability", "failures"]  # in the page's order


def write(folder: Path, summary: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def reported(folder: Path, summary: Any) -> tuple[Path, Any]:
    """The page's path, and the JSON beside it."""
    assert report([str(write(folder, summary))]) == 0
    return folder / "report.html", json.loads((folder / "report.json").read_bytes())


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    return reported(tmp_path_factory.mktemp("full"), full_summary())


def tables_of(data: Any) -> Iterator[tuple[str, Any]]:
    for section in data["sections"]:
        for table in section.get("tables", ()):
            yield section["name"], table


def numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(item)
    elif isinstance(value, int | float):
        yield value


# --------------------------------------------------------------------------------------------- numbers


def test_every_part_is_there_and_says_on_how_much_it_rests(full: tuple[Path, Any]) -> None:
    _, data = full
    assert [section["name"] for section in data["sections"]] == ["tasks", *OPTIONAL_PARTS[:-1], "settings", "failures"]
    for section in data["sections"]:
        assert "not_run" not in section
        assert len(section["what"]) > 40
        if section["name"] not in ("settings", "failures"):
            assert set(section["n"]["examples"]) == set(TASKS)
    assert {section["name"] for section in data["sections"] if section.get("seeds")} == (
        {"heads", "neurons", "overlap", "masking", "budgets", "finding", "steering", "selections", "stability"}
    )


def test_the_tables_hold_what_was_measured(full: tuple[Path, Any]) -> None:
    """Each number of the summary is in the JSON, the model's and the settings' too."""
    summary, (_, data) = full_summary(), full
    shown = set(numbers_in(data))
    assert set(numbers_in(summary)) <= shown
    tables = {(name, table["caption"]): table for name, table in tables_of(data)}
    masking = tables["masking", "Masking, bank by bank"]
    row = next(r for r in summary["masking"] if (r["task"], r["method"], r["fraction"]) == ("sums", "dvp", 0.01))
    assert [
        "sums",
        "DVP",
        0.01,
        row["neurons"],
        {"value": row["own_drop"], "ci95": row["own_drop_ci95"]},
        row["relative_drop"],
        {"value": row["selectivity"], "ci95": row["selectivity_ci95"]},
        90,
        5,
    ] in masking["rows"]
    assert len(masking["rows"]) == len(summary["masking"]) / len(FRACTIONS)
    assert len(tables["budgets", "Masking at every size"]["rows"]) == len(summary["masking"])
    finding = summary["finding"]
    assert len(tables["finding", "Means over tasks"]["rows"]) == len(finding["means"])
    assert len(tables["finding", "Each task's banks"]["rows"]) == len(finding["rows"])
    mean = next(r for r in finding["means"] if (r["method"], r["fraction"], r["ablation"]) == ("dvp", 0.01, "mean"))
    drops = [
        {"value": mean[name], "ci95": mean[f"{name}_ci95"]} for name in ("own_drop", "bystander_drop", "selectivity")
    ]
    shown_row = ["DVP", "the mean", 0.01, mean["neurons"], mean["relative_drop"], *drops]
    assert shown_row in tables["finding", "Means over tasks"]["rows"]
    matched = tables["finding", "Harm to bystanders at equal own drop"]
    assert matched["columns"][-1] == "difference to DVP"
    assert [row[3] for row in matched["rows"] if row[2] == 0.9] == [None] * 4  # reached by no method
    cross = tables["cross", "Drop when masking banks of HONES, 1% of neurons"]
    assert cross["columns"] == ["bank of", *TASKS]
    measured = summary["cross"]["drops"]["capitals"]["sums"]
    assert cross["rows"][1][5] == {"value": measured["drop"], "ci95": measured["ci95"]}


def test_steering_shows_what_was_measured_beside_the_metric(full: tuple[Path, Any]) -> None:
    tables = {table["caption"]: table for name, table in tables_of(full[1]) if name == "steering"}
    assert {"content", "gain of content", "learned numbers", "bytes"} <= set(
        tables["Steering and its baselines"]["columns"]
    )
    assert [row[1] for row in tables["Steering and its baselines"]["rows"][:2]] == ["base", "asked in words"]
    words = tables["Words that asked for the conventions, best on dev"]["rows"]
    assert words == [[task, "Just the answer.", "In a few words."] for task in TASKS]
    assert tables["Gained more than with others"]["columns"] == ["task", "method", "random neurons", "grid search"]


def test_what_the_package_takes_by_default_stands_out() -> None:
    default = AttributionOptions().method
    assert all(map(is_ours, (default, f"{default}:ratio")))
    assert not any(map(is_ours, ("hones_task", "random")))
    row = {"task": "vqa", "gain": 0.1, "gain_ci95": [0.0, 0.2]}
    (figure,) = steering_bars({"steering": [{**row, "method": method} for method in ("hones_logprob", default)]})
    assert figure.svg.count('class="ours"') == 1
    assert "Fisher" in figure.svg.partition('class="ours"')[2]


def test_selections_are_drawn_on_average_and_task_by_task() -> None:
    summary = full_summary()
    mean, *of_tasks = selection_bars(summary)
    assert [figure.caption for figure in of_tasks] == list(
        dict.fromkeys(r["task"] for r in summary["selections"]["rows"])
    )
    assert mean.svg.count('class="bar"') == 2 * len(summary["selections"]["means"])
    assert mean.svg.count('class="ci"') == 2 * len(summary["selections"]["means"])
    assert {"gain over base", "on other tasks"} <= set(re.findall(r'class="head"[^>]*>([^<]*)', mean.svg))


def test_every_number_of_the_tables_is_on_the_page(full: tuple[Path, Any], browser: Any) -> None:
    page, data = full
    opened = Opened(browser, page)
    written = opened.ask(
        "() => Object.fromEntries([...document.querySelectorAll('section')].map(part => "
        "[part.id, [...part.querySelectorAll('data')].map(one => [one.value, one.textContent])]))"
    )
    for name, table in tables_of(data):
        there = {float(value) for value, _ in written[name]}
        assert set(numbers_in(table["rows"])) <= there, table["caption"]
    for value, text in (pair for part in written.values() for pair in part):
        percent = text.endswith("%")
        read = float(text.replace("−", "-").replace(",", "").rstrip("%")) / (100 if percent else 1)
        assert read == pytest.approx(float(value), rel=0.005, abs=0.0005)


def test_charts_name_their_marks_and_have_a_text_for_readers(full: tuple[Path, Any], browser: Any) -> None:
    summary, opened = full_summary(), Opened(browser, full[0])
    text_of = "() => [...document.querySelectorAll('{}')].map(title => title.textContent)"
    titles = opened.ask(text_of.format("#heads svg rect > title"))
    scores = [score for heads in summary["heads"].values() for row in heads["scores"] for score in row]
    assert len(titles) == len(scores)
    assert [float(re.findall(r"[+−]?[\d.]+", title)[2].replace("−", "-")) for title in titles] == pytest.approx(
        scores, abs=5e-5
    )
    assert sum(title.endswith("chosen") for title in titles) == 25 * len(TASKS)
    bars = opened.ask(text_of.format("#masking svg g > title"))
    row = next(r for r in summary["masking"] if (r["task"], r["method"], r["fraction"]) == ("antonyms", "dvp", 0.01))
    low, high = row["selectivity_ci95"]
    said = f"DVP, selectivity: {row['selectivity']:+.4f} [{low:+.4f}, {high:+.4f}]".replace("-", "−")
    assert said in bars
    alternatives = opened.ask("() => [...document.querySelectorAll('svg')].map(svg => svg.ariaLabel)")
    assert len(alternatives) == len(TASKS) * 8 + 1
    assert all(len(text) > 30 for text in alternatives)


def test_bars_are_as_long_as_what_they_show(full: tuple[Path, Any], browser: Any) -> None:
    bars = Opened(browser, full[0]).ask(
        "() => [...document.querySelectorAll('#masking svg g')].filter(g => g.querySelector('.bar')).map(g => "
        "[g.querySelector('title').textContent, +g.querySelector('.bar').getAttribute('width')])"
    )
    own_drops = [(text, width) for text, width in bars if "own drop" in text and width > 5]
    assert len(own_drops) > 30
    values = [float(re.findall(r": \+([\d.]+)", text)[0]) for text, _ in own_drops]
    scales = [width / value for value, (_, width) in zip(values, own_drops, strict=True)]
    assert max(scales) == pytest.approx(min(scales), rel=0.01)


# ----------------------------------------------------------------------------------------- in a browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_is_quiet_and_fits(full: tuple[Path, Any], browser: Any, width: int, scheme: str) -> None:
    opened = Opened(browser, full[0], width, scheme)
    opened.ask("() => document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert opened.complaints == []
    assert opened.asked_for_nothing
    assert opened.ask("() => document.documentElement.scrollWidth") == width
    beyond = "() => [...document.querySelectorAll('h1, h2, p, li, figure, svg, summary')].filter(e => " + (
        "e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"
    )
    assert opened.ask(beyond) == []


def test_light_and_dark_differ(full: tuple[Path, Any], browser: Any) -> None:
    colors = "() => ['background-color', 'color'].map(name => getComputedStyle(document.body)[name])"
    light, dark = (Opened(browser, full[0], scheme=scheme).ask(colors) for scheme in ("light", "dark"))
    assert light[0] != dark[0]
    assert light[1] != dark[1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(full: tuple[Path, Any], browser: Any, scheme: str) -> None:
    """WCAG's 4.5:1, of every text against what is behind it, numbers in colored cells included."""
    worst = Opened(browser, full[0], scheme=scheme).ask(CONTRASTS)
    assert {"h1.", "text.end", "DATA.", "SPAN.interval"} <= {kind.replace("H1", "h1") for kind in worst}
    assert {kind: ratio for kind, ratio in worst.items() if ratio < 4.5} == {}


def with_all_text_replaced(value: Any) -> Any:
    """Every text and every key of the data's own replaced by an attack; what the contract fixes stays."""
    words = {"task", "logprob", "one", "pair", "triple", "all", "zero", "mean"}

    def replaced(value: Any, key: str = "") -> Any:
        if isinstance(value, str):
            return value if key in ("metric", "kind", "ablation") and value in words else name(value)
        if isinstance(value, list):
            return [replaced(item) for item in value]
        if isinstance(value, dict):
            return {(name(k) if k in TASKS else k): replaced(item, k) for k, item in value.items()}
        return value

    def name(text: str) -> str:
        return f"{text}{ATTACK}"

    return replaced(value)


def test_text_from_outside_stays_text(tmp_path: Path, browser: Any) -> None:
    page, _ = reported(tmp_path, with_all_text_replaced(full_summary()))
    opened = Opened(browser, page, 390)
    assert opened.complaints == []
    assert opened.asked_for_nothing
    assert opened.ask("() => document.querySelectorAll('script, img, [onload], [onerror]').length") == 0
    assert opened.ask("() => document.documentElement.scrollWidth") == 390
    said = opened.ask("() => document.body.textContent")
    assert said.count(ATTACK) > 100
    assert "49" not in opened.ask("() => document.querySelector('h1').textContent")


def test_the_page_may_not_run_scripts_or_load_anything(full: tuple[Path, Any]) -> None:
    html = full[0].read_text(encoding="utf-8")
    assert "default-src 'none'; style-src 'unsafe-inline'" in html
    assert re.findall(r"<script|\bsrc=|https?:|url\(|@import", html) == []


def test_it_prints_without_cutting_tables(full: tuple[Path, Any], browser: Any) -> None:
    opened = Opened(browser, full[0])
    opened.tab.emulate_media(media="print")
    clipped = "() => [...document.querySelectorAll('.scroll')].filter(e => getComputedStyle(e).overflow !== 'visible')"
    assert opened.ask(f"{clipped[:6]}({clipped[6:]}).length") == 0


# ------------------------------------------------------------------------------------- parts and sizes


def test_what_was_not_run_is_said_in_one_line(tmp_path: Path, browser: Any, capsys: pytest.CaptureFixture[str]) -> None:
    page, data = reported(tmp_path, minimal_summary())
    missing = {section["name"]: section["not_run"] for section in data["sections"] if "not_run" in section}
    assert list(missing) == OPTIONAL_PARTS
    shown = Opened(browser, page).ask("() => [...document.querySelectorAll('.not-run')].map(e => e.textContent)")
    assert shown == list(missing.values())
    assert all(line.startswith("Not run: summary.json has no ") for line in shown)
    assert "not run: heads found, neurons per layer" in capsys.readouterr().out


OPTIONAL = [key for key in full_summary() if key not in ("title", "model", "tasks")]


@pytest.mark.parametrize("left_out", OPTIONAL)
def test_each_part_can_be_left_out(tmp_path: Path, left_out: str) -> None:
    summary = full_summary()
    del summary[left_out]
    absent = read_summary(write(tmp_path / "absent", summary))
    assert read_summary(write(tmp_path / "null", {**summary, left_out: None})) == absent
    assert len(build_sections(absent)) == len(OPTIONAL_PARTS) + 2


def test_a_lone_task_has_no_selectivity(tmp_path: Path) -> None:
    summary = {**minimal_summary(), "masking": [next(r for r in full_summary()["masking"])]}
    row = summary["masking"][0]
    row |= {"task": "vqa", "other_drops": {}, "selectivity": None, "selectivity_ci95": None, "by_seed": None}
    _, data = reported(tmp_path, summary)
    table = next(table for name, table in tables_of(data) if name == "masking")
    assert table["rows"][0][table["columns"].index("selectivity")] is None


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (6, 8), (32, 32), (80, 64)], ids=lambda size: str(size))
def test_models_of_any_size_fit(tmp_path: Path, browser: Any, layers: int, heads: int) -> None:
    summary = minimal_summary()
    summary["model"] |= {"num_layers": layers, "num_heads": heads}
    scores = [[math.sin(layer * heads + head) for head in range(heads)] for layer in range(layers)]
    summary["heads"] = {"vqa": {"metric": "logprob", "scores": scores, "chosen": [[0, 0, 0.5]], "seeds": 1, "n": 8}}
    summary["neurons_per_layer"] = {"vqa": {"hones_task": [7.5] * layers, "a method of my own": [0] * layers}}
    page, _ = reported(tmp_path, summary)
    opened = Opened(browser, page, 390)
    assert opened.complaints == []
    assert opened.ask("() => document.documentElement.scrollWidth") == 390


def test_all_zero_and_constant_numbers_can_be_drawn(tmp_path: Path) -> None:
    def zero(value: Any, key: str = "") -> Any:
        if isinstance(value, list):
            return [zero(item, key) for item in value]
        if isinstance(value, dict):
            return {k: zero(item, k) for k, item in value.items()}
        return 0.0 if isinstance(value, float) and key not in ("fraction", "strength", "level") else value

    reported(tmp_path, zero(full_summary()))


def test_where_there_are_no_bystanders_their_cells_are_empty(tmp_path: Path) -> None:
    summary = full_summary()
    finding = summary["finding"] | {"bystanders": {task: [] for task in TASKS}, "matched": []}
    for row in (*finding["rows"], *finding["means"]):
        row |= {"bystander_drop": None, "bystander_drop_ci95": None}
    for row in finding["means"]:
        row["difference"] = {key: x for key, x in row["difference"].items() if not key.startswith("bystander")}
    _, data = reported(tmp_path, summary | {"finding": finding})
    tables = {table["caption"]: table for name, table in tables_of(data) if name == "finding"}
    for caption in ("Means over tasks", "Differences to DVP at the same size", "Each task's banks"):
        at = tables[caption]["columns"].index("bystander drop")
        assert {row[at] for row in tables[caption]["rows"]} == {None}
    assert "Harm to bystanders at equal own drop" not in tables


def test_keys_that_are_not_shown_are_named(tmp_path: Path) -> None:
    summary = full_summary() | {"maskings": []}
    summary["masking"][0]["note"] = "x"
    _, data = reported(tmp_path, summary)
    settings = next(section for section in data["sections"] if section["name"] == "settings")
    assert settings["notes"] == ["In summary.json, but not shown here: masking[].note, maskings."]


# ------------------------------------------------------------------------------------------ the command


def test_the_same_summary_gives_the_same_bytes_wherever_it_is_written(full: tuple[Path, Any], tmp_path: Path) -> None:
    run = write(tmp_path / "run", full_summary())
    assert report([str(run), "--out", str(tmp_path / "new" / "page.html")]) == 0
    assert (tmp_path / "new" / "page.html").read_bytes() == full[0].read_bytes()
    assert (tmp_path / "new" / "page.json").read_bytes() == full[0].with_suffix(".json").read_bytes()
    assert {file.name for file in run.iterdir()} == {"summary.json"}


def test_json_prints_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path, minimal_summary())
    assert report([str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((run / "report.json").read_bytes())


@pytest.mark.parametrize("name", ["summary.html", "page.json", "folder"])
def test_a_page_that_would_overwrite_something_is_refused(tmp_path: Path, name: str) -> None:
    run = write(tmp_path, minimal_summary())
    (run / "folder").mkdir()
    before = (run / "summary.json").read_bytes()
    with pytest.raises(DataError, match="give"):
        report([str(run), "--out", str(run / name)])
    assert (run / "summary.json").read_bytes() == before
    assert {file.name for file in run.iterdir()} == {"summary.json", "folder"}


def at(summary: Any, *path: Any) -> tuple[Any, Any]:
    for key in path[:-1]:
        summary = summary[key]
    return summary, path[-1]


def put(value: Any, *path: Any) -> Callable[[Any], None]:
    def change(summary: Any) -> None:
        holder, key = at(summary, *path)
        holder[key] = value

    return change


def drop(*path: Any) -> Callable[[Any], None]:
    def change(summary: Any) -> None:
        holder, key = at(summary, *path)
        del holder[key]

    return change


BROKEN = {
    "title is missing": drop("title"),
    "title is 3, not text": put(3, "title"),
    "model is [], no JSON object": put([], "model"),
    "model.num_heads is True, not a whole number": put(True, "model", "num_heads"),
    "model.parameters is -1, not a whole number": put(-1, "model", "parameters"),
    "tasks is empty": put({}, "tasks"),
    "tasks['sums'].base is nan, not a finite number": put(math.nan, "tasks", "sums", "base"),
    "tasks['sums'].base_ci95 is [1.0], no list of 2": put([1.0], "tasks", "sums", "base_ci95"),
    "tasks['sums'].base_ci95 is [2, 1], whose lower end is the higher": put([2, 1], "tasks", "sums", "base_ci95"),
    "settings['lr'] is or holds a number that is not finite": put([1, math.inf], "settings", "lr"),
    "heads['sums'].scores is not 30 layers x 9 heads": put([[0.1]], "heads", "sums", "scores"),
    "heads['sums'].chosen names a head": put([[30, 0, 0.1]], "heads", "sums", "chosen"),
    "heads['sums'].metric is 'x', none of logprob, task": put("x", "heads", "sums", "metric"),
    "heads names 'knitting', which is not in tasks": lambda s: s["heads"].update(knitting=s["heads"]["sums"]),
    "neurons_per_layer['sums']['dvp'] is not 30 counts": put([1.0], "neurons_per_layer", "sums", "dvp"),
    "overlap['dvp'].jaccard is not as wide": put([[1.0]], "overlap", "dvp", "jaccard"),
    "masking[3].own_drop is '0.5', not a finite number": put("0.5", "masking", 3, "own_drop"),
    "masking[3].other_drops is missing": drop("masking", 3, "other_drops"),
    "masking names 'knitting'": put("knitting", "masking", 3, "task"),
    "masking has 2 rows of 'antonyms', 'hones_task', 0.0025": lambda s: s["masking"].append(s["masking"][0]),
    "a fraction is 0, not above 0": put(0, "masking", 0, "fraction"),
    "finding.rows[0].ablation is 'noise', none of mean, zero": put("noise", "finding", "rows", 0, "ablation"),
    "finding.bystanders names 'knitting'": put(["knitting"], "finding", "bystanders", "sums"),
    "finding.means has 2 rows of 'dvp'": lambda s: s["finding"]["means"].append(s["finding"]["means"][0]),
    "finding.matched[0].level is missing": drop("finding", "matched", 0, "level"),
    "cross.drops['sums']['french'].drop is None": put(None, "cross", "drops", "sums", "french", "drop"),
    "groups[0].kind is 'many'": put("many", "groups", 0, "kind"),
    "steering is {}, no list": put({}, "steering"),
    "steering[1].value is 1000000": put(10**400, "steering", 1, "value"),
    "strength[0].n is 1.5, not a whole number": put(1.5, "strength", 0, "n"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_bad_summary_is_refused_by_the_name_of_what_is_bad(tmp_path: Path, message: str) -> None:
    summary = full_summary()
    BROKEN[message](summary)
    run = write(tmp_path, summary)
    with pytest.raises(DataError) as error:
        report([str(run)])
    assert str(error.value).startswith(f"{run / 'summary.json'}: {message}")
    assert len(str(error.value)) < 400
    assert {file.name for file in run.iterdir()} == {"summary.json"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("", "is damaged"),
        ("\xff", "the file is|is damaged"),
        ("[1]", r"the file is \[1\], no JSON object"),
        ("[" * 100_000, "is nested too deep"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "summary.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=message):
        report([str(tmp_path)])
    assert {file.name for file in tmp_path.iterdir()} == {"summary.json"}


def test_a_folder_without_summary_is_told_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no summary.json; `hones demo --out .*comparison"):
        report([str(tmp_path)])
    with pytest.raises(DataError, match="is no folder"):
        report([str(tmp_path / "missing")])


def test_a_task_may_be_called_like_the_contract_s_own_keys(tmp_path: Path) -> None:
    summary = minimal_summary()
    task = summary["tasks"].pop("vqa")
    summary["tasks"] = dict.fromkeys((EACH, "drop", "task", "bank of", "n?"), task)
    write(tmp_path, summary)
    assert list(read_summary(tmp_path)["tasks"]) == [EACH, "drop", "task", "bank of", "n?"]
    reported(tmp_path, summary)
