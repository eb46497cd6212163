"""The Grafana dashboard and the page about operations name all metrics that exist, and no others."""

import json
import re
from pathlib import Path

import numpy as np
from hones_serving.metrics import Metrics
from hones_serving.registry import ProfileRegistry
from prometheus_client import CollectorRegistry

from hones_steer import ModelIdentity, Profile, save_profile

DOCS = Path(__file__).parents[2] / "docs"


def real_metrics(folder):
    """Name of every metric as Prometheus stores it -> its labels."""
    identity = ModelIdentity("", None, "llama", 2, 8, 32, (1.0,) * 16)
    layers = {0: (np.array([1], np.int32), np.array([2.0], np.float32))}
    save_profile(Profile("vqa", layers, identity), folder / "vqa.safetensors")
    collector = CollectorRegistry()
    metrics = Metrics(ProfileRegistry(folder, identity, max_profiles=4, always_enough=False), collector)
    metrics.requests("vqa", "body")
    metrics.tokens("vqa", 1)
    metrics.drafts("vqa", 3, 1)
    metrics.loads("ok")
    metrics.unreached_defaults("vqa")
    samples = [sample for family in collector.collect() for sample in family.samples]
    return {sample.name: set(sample.labels) for sample in samples if not sample.name.endswith("_created")}


def test_the_dashboard_shows_every_metric_and_no_other(tmp_path):
    dashboard = json.loads((DOCS / "grafana.json").read_text(encoding="utf-8"))
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    real = real_metrics(tmp_path)
    used = set()
    for expression in expressions:
        names = set(re.findall(r"hones_\w+", expression))
        used |= names
        labels = set(re.findall(r"by \((\w+)\)", expression)) | set(re.findall(r"(\w+)=~?\"", expression))
        assert names
        assert all(labels - {"job"} <= real[name] for name in names), expression
    assert used == real.keys()


def test_the_dashboard_can_be_imported_anywhere():
    dashboard = json.loads((DOCS / "grafana.json").read_text(encoding="utf-8"))
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_page_lists_every_metric_with_its_labels(tmp_path):
    page = (DOCS / "operations.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(hones_\w+)` \| \w+ \| (.*?) \|", page, re.MULTILINE)
    assert {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows} == real_metrics(tmp_path)
