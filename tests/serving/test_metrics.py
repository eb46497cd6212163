"""What Prometheus sees."""

import numpy as np
import pytest
from hones_serving.metrics import Metrics
from hones_serving.registry import ProfileRegistry
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from hones_steer import ModelIdentity, Profile, save_profile

IDENTITY = ModelIdentity("", None, "llama", 2, 8, 32, (1.0,) * 16)


@pytest.fixture
def registry(tmp_path):
    for task, scale in (("vqa", 2.0), ("ocr", 3.0)):
        layers = {0: (np.array([1], np.int32), np.array([scale], np.float32))}
        save_profile(Profile(task, layers, IDENTITY), tmp_path / f"{task}.safetensors")
    return ProfileRegistry(tmp_path, IDENTITY, max_profiles=4, always_enough=False)


def scraped(collector):
    """Sample name and labels -> value, as a Prometheus server reads them; without the creation times."""
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
    metrics.loads("ok")
    metrics.loads("error")
    assert scraped(collector) == {
        ("hones_requests_total", ("profile", "vqa"), ("route", "body")): 2,
        ("hones_requests_total", ("profile", "none"), ("route", "default")): 1,
        ("hones_tokens_total", ("profile", "blend")): 7,
        ("hones_profile_loads_total", ("result", "ok")): 1,
        ("hones_profile_loads_total", ("result", "error")): 1,
        ("hones_profiles_loaded",): 2,
        ("hones_slots_used",): 0,
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


def test_the_metrics_exist_once_per_collector(registry):
    collector = CollectorRegistry()
    Metrics(registry, collector)
    with pytest.raises(ValueError, match="Duplicated"):
        Metrics(registry, collector)
