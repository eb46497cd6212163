"""The metrics as Prometheus sees them."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hones_serving.metrics import Metrics
from hones_serving.registry import ProfileRegistry
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from hones_steer import ModelIdentity, Profile, save_profile

IDENTITY = ModelIdentity("", None, "llama", 2, 8, 32, (1.0,) * 16)


@pytest.fixture
def folder(tmp_path):
    for task, scale in (("vqa", 2.0), ("ocr", 3.0)):
        layers = {0: (np.array([1], np.int32), np.array([scale], np.float32))}
        save_profile(Profile(task, layers, IDENTITY), tmp_path / f"{task}.safetensors")
    return tmp_path


@pytest.fixture
def registry(folder):
    return ProfileRegistry(folder, IDENTITY, max_profiles=4, always_enough=False)


def scraped(collector):
    """Samples as a Prometheus server reads them, without creation times: name and labels -> value."""
    families = text_string_to_metric_families(generate_latest(collector).decode())
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_what_is_counted(registry):
    collector = CollectorRegistry()
    metrics = Metrics(registry, collector)
    metrics.requests("vqa", "body")
    metrics.requests("vqa", "body")
    metrics.requests("none", "default")
    metrics.tokens("blend", 7)
    metrics.drafts("blend", 6, 2)
    metrics.loads("ok")
    metrics.loads("error")
    metrics.unreached_defaults("vqa")
    assert scraped(collector) == {
        ("hones_requests_total", ("profile", "vqa"), ("route", "body")): 2,
        ("hones_requests_total", ("profile", "none"), ("route", "default")): 1,
        ("hones_tokens_total", ("profile", "blend")): 7,
        ("hones_draft_tokens_total", ("profile", "blend")): 6,
        ("hones_accepted_draft_tokens_total", ("profile", "blend")): 2,
        ("hones_profile_loads_total", ("result", "ok")): 1,
        ("hones_profile_loads_total", ("result", "error")): 1,
        ("hones_unreached_defaults_total", ("profile", "vqa")): 1,
        ("hones_profiles_loaded",): 2,
        ("hones_slots_used",): 0,
        ("hones_requests_in_flight",): 0,
    }


def test_the_gauges_say_what_is_so_now(registry):
    collector = CollectorRegistry()
    Metrics(registry, collector)
    registry.load("third", "vqa.safetensors")
    registry.hold("a digest")
    registry.hold("another")
    now = scraped(collector)
    assert (now["hones_profiles_loaded",], now["hones_slots_used",]) == (3, 2)
    registry.release("another")
    registry.unload("vqa")
    now = scraped(collector)
    assert (now["hones_profiles_loaded",], now["hones_slots_used",]) == (2, 1)
    admission = registry.admit(None, "none")
    assert scraped(collector)["hones_requests_in_flight",] == 1
    registry.leave(admission)
    registry.leave(admission)
    assert scraped(collector)["hones_requests_in_flight",] == 0


PROCESS = """
import os, sys
from hones_serving.metrics import Metrics
from hones_serving.registry import ProfileRegistry
from hones_steer import ModelIdentity

identity = ModelIdentity("", None, "llama", 2, 8, 32, (1.0,) * 16)
registry = ProfileRegistry(sys.argv[1], identity, max_profiles=9, always_enough=False)
metrics = Metrics(registry, several="SEVERAL" in os.environ)
for name in sys.argv[3:]:
    registry.load(name, "vqa.safetensors")
for i in range(int(sys.argv[2])):
    registry.hold(f"digest {i}")
    registry.admit(None, "none")
    metrics.requests("vqa", "body")
    metrics.tokens("vqa", 5)
metrics.loads("ok")
os._exit(0)  # as where a process is killed: nothing is tidied up
"""


def test_where_processes_share_a_folder_the_gauges_are_those_of_the_last(folder):
    """Sets PROMETHEUS_MULTIPROC_DIR, so that a scrape reads files, also those of processes that have ended."""
    shared = folder / "shared"
    shared.mkdir()
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(shared)}
    for used, extra in (("3", ["third", "fourth"]), ("2", ["third"])):
        subprocess.run([sys.executable, "-c", PROCESS, str(folder), used, *extra], env=environment, check=True)
    collector = CollectorRegistry()
    MultiProcessCollector(collector, str(shared))
    assert scraped(collector) == {
        ("hones_profiles_loaded",): 3,
        ("hones_slots_used",): 2,
        ("hones_requests_in_flight",): 2,
        ("hones_requests_total", ("profile", "vqa"), ("route", "body")): 5,
        ("hones_tokens_total", ("profile", "vqa")): 25,
        ("hones_profile_loads_total", ("result", "ok")): 2,
    }


def test_of_several_api_servers_what_is_in_use_is_added_up(folder):
    shared = folder / "shared"
    shared.mkdir()
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(shared), "SEVERAL": "1"}
    for used, extra in (("3", ["third", "fourth"]), ("2", ["third", "fourth"])):
        subprocess.run([sys.executable, "-c", PROCESS, str(folder), used, *extra], env=environment, check=True)
    collector = CollectorRegistry()
    MultiProcessCollector(collector, str(shared))
    now = scraped(collector)
    gauges = [now[f"hones_{name}",] for name in ("profiles_loaded", "slots_used", "requests_in_flight")]
    assert gauges == [4, 5, 5]
    assert now["hones_profile_loads_total", ("result", "ok")] == 2


def test_a_folder_for_metrics_that_is_not_there_is_named(folder):
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder / "nowhere")}
    command = [sys.executable, "-c", PROCESS, str(folder), "0"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.stderr.splitlines()[-1].startswith("hones_steer.errors.DataError: PROMETHEUS_MULTIPROC_DIR is ")


def test_the_metrics_exist_once_per_collector(registry):
    collector = CollectorRegistry()
    Metrics(registry, collector)
    with pytest.raises(ValueError, match="Duplicated"):
        Metrics(registry, collector)
