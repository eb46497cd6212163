"""benchmarks/soak.py: a short soak of one replica finds nothing wrong, and wrong answers do not pass."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving.engines import ENVIRONMENT

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module."""
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    return importlib.import_module("soak")


@pytest.fixture
def judge(soak: Any) -> Any:
    """Knows one prompt: unsteered 1 2 3, by the old version 1 5 6, by the new 1 5 7; replaced from 10 s to 12 s."""
    expected = {(0, None, version): soak.Expected("none", (1, 2, 3)) for version in soak.VERSIONS}
    expected[0, "vqa", "old"] = soak.Expected("vqa (aa)", (1, 5, 6))
    expected[0, "vqa", "new"] = soak.Expected("vqa (bb)", (1, 5, 7))
    made = soak.Judge(expected)
    made.version.changes.append((10.0, 12.0, "new"))
    return made


OLD, NEW = ("vqa (aa)", (1, 5, 6)), ("vqa (bb)", (1, 5, 7))


@pytest.mark.parametrize(
    ("sent", "begun", "said", "complaint"),
    [
        (1, 2, OLD, None),
        (11, 11.5, OLD, None),
        (11, 11.5, NEW, None),
        (9, 13, OLD, None),
        (13, 14, NEW, None),
        (13, 14, OLD, "only ['new']"),
        (1, 2, NEW, "only ['old']"),
        (13, 14, ("vqa (bb)", (1, 5, 6)), "other tokens"),
        (13, 14, ("vqa (aa)", (1, 5, 7)), "other tokens"),
        (13, 14, ("none", (1, 2, 3)), "other tokens"),
        (13, 14, ("vqa (bb)", (1, 5)), "2 tokens instead of 3"),
    ],
)
def test_an_answer_is_right_if_its_contents_were_in_force(
    soak: Any, judge: Any, sent: float, begun: float, said: Any, complaint: str | None
) -> None:
    profile, tokens = said
    asked = soak.Asked(0, "vqa", 3)
    judge.take(soak.Answer(asked, "whole", sent, begun, 200, profile, "header", tokens, ""))
    assert judge.counts["wrong"] == len(judge.complaints) == (complaint is not None)
    assert (complaint or "") in "".join(judge.complaints)


def test_what_is_not_answered_counts(soak: Any, judge: Any) -> None:
    asked = soak.Asked(0, "vqa", 3)
    judge.take(soak.Answer(asked, "whole", 1, 2, 429, "", "", (), "busy"))
    judge.take(soak.Answer(asked, "streamed", 1, 2, 0, "", "", (), "ReadError: closed"))
    judge.take(soak.Answer(asked, "gone", 1, 1, 0, "", "", (), ""))  # as the client wanted it
    judge.take(soak.Answer(asked, "left", 1, 2, 200, "vqa (aa)", "header", (1,), ""))
    assert (judge.counts["answered"], judge.counts["wrong"], judge.counts["gone"]) == (3, 2, 1)


def test_a_switch_that_is_off_steers_nothing(soak: Any, judge: Any) -> None:
    judge.switch.changes.append((20.0, 21.0, "off"))
    asked = soak.Asked(0, "vqa", 3)
    judge.take(soak.Answer(asked, "whole", 22, 23, 200, "none", "off", (1, 2, 3), ""))
    assert not judge.complaints
    judge.take(soak.Answer(asked, "whole", 22, 23, 200, *NEW[:1], "header", NEW[1], ""))
    assert "['off'] were in force" in judge.complaints[0]


@pytest.mark.matrix
@pytest.mark.parametrize("replicas", ["1", "2"])
def test_nothing_goes_wrong_in_a_short_soak(replicas: str) -> None:
    options = ["--json", "--requests", "300", "--replicas", replicas, "--clients", "2", "--every", "0.5"]
    env = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), *options], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["answers"] >= 300
    assert result["wrong"] == 0
    assert result["steered to other tokens"] >= 100
    assert min(result[name] for name in ("whole", "streamed", "streams left", "profiles replaced")) > 0
