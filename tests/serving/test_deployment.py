"""Tests of deploy/: its files pass their own checkers, `hones serve` takes its commands, nginx its configuration."""

import json
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from hones_serving.commands import launch
from nginx import nginx
from serving.engines import Server, free_port, server
from serving.steered import write_profiles
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE, VLLM_COMPOSE = (yaml.safe_load((DEPLOY / name).read_text()) for name in ("compose.yaml", "compose.vllm.yaml"))
KUBERNETES = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
POD = KUBERNETES[0]["spec"]["template"]["spec"]
COMMANDS = {
    "compose": COMPOSE["services"]["replica-1"]["command"],
    "compose with vLLM": VLLM_COMPOSE["services"]["replica-2"]["command"],
    "kubernetes": POD["containers"][0]["args"],
}
GRACE = {
    "compose": COMPOSE["services"]["replica-2"]["stop_grace_period"],
    "compose with vLLM": COMPOSE["services"]["replica-2"]["stop_grace_period"],  # which the other file leaves as it is
    "kubernetes": f"{POD['terminationGracePeriodSeconds']}s",
}


@dataclass(frozen=True)
class Cluster:
    """Two replicas and nginx before them, as in compose.yaml."""

    url: str
    replicas: list[Server]


@pytest.fixture(scope="module")
def profiles(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "profiles"
    write_profiles(AutoModelForCausalLM.from_pretrained(llama), folder)
    return folder


@pytest.fixture(scope="module")
def cluster(llama: Path, profiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One for all tests; the last of them ends a replica."""
    command = [sys.executable, "-m", "hones_steer", "serve", *_here(COMMANDS["compose"], llama, profiles)]
    logs, folder, port = tmp_path_factory.mktemp("logs"), tmp_path_factory.mktemp("nginx"), free_port()
    with ExitStack() as stack:
        replicas = [stack.enter_context(server(command, logs / f"{i}.log", {})) for i in (1, 2)]
        conf = (DEPLOY / "nginx.conf").read_text().replace("listen 8080;", f"listen 127.0.0.1:{port};")
        for i, replica in enumerate(replicas, 1):
            conf = conf.replace(f"replica-{i}:8000", replica.url.removeprefix("http://"))
        yield Cluster(stack.enter_context(nginx(conf, port, folder)), replicas)


def _here(arguments: list[str], model: Path, profiles: Path) -> list[str]:
    """A container's arguments, with the folders of this machine."""
    return [{"/model": str(model), "/profiles": str(profiles)}.get(argument, argument) for argument in arguments]


def complete(url: str, **body: Any) -> httpx.Response:
    request = {"model": "model", "prompt": "w1 w2", "max_tokens": 4, "temperature": 0, **body}
    return httpx.post(f"{url}/v1/completions", json=request, timeout=60)


def answered(replica: Server) -> float:
    """How many requests a replica says it has answered."""
    lines = httpx.get(f"{replica.url}/metrics", timeout=60).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("hones_requests_total{"))


# Checkers of these formats ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["compose.yaml", "compose.vllm.yaml"])
def test_compose_files_are_what_their_specification_says(name: str) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / name]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("document", KUBERNETES, ids=lambda document: str(document["kind"]))
def test_kubernetes_takes_the_manifest(document: Mapping[str, Any]) -> None:
    import kubernetes_validate

    kubernetes_validate.validate(document, "1.37", strict=True)


# The server in a container ------------------------------------------------------------------------


@pytest.mark.parametrize("where", COMMANDS)
def test_hones_serve_takes_the_command(where: str, llama: Path, profiles: Path) -> None:
    arguments, environment = launch(_here(COMMANDS[where], llama, profiles), {}, ())
    assert arguments[arguments.index("--model") + 1] == str(llama)
    assert environment["HONES_PROFILES"] == str(profiles)


@pytest.mark.parametrize("where", COMMANDS)
def test_a_server_that_stops_has_time_for_its_last_answers(where: str) -> None:
    timeout = int(COMMANDS[where][COMMANDS[where].index("--shutdown-timeout") + 1])
    before = POD["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"] if where == "kubernetes" else 0
    assert int(GRACE[where].removesuffix("s")) >= timeout + before + 5  # after which the process ends in any case


def test_images_serve_as_a_user_without_rights() -> None:
    stages = re.split(r"^FROM .* AS ", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]
    images = {stage.split("\n", 1)[0]: stage for stage in stages if "ENTRYPOINT" in stage}
    used = [COMPOSE["x-replica"]["build"]["target"], VLLM_COMPOSE["x-replica"]["build"]["target"]]
    assert list(images) == used
    for image in images.values():
        lines = image.splitlines()
        assert f"USER {POD['securityContext']['runAsUser']}" in lines
        assert "useradd --uid 10001 " in image
        assert lines.index("USER 10001") < lines.index('ENTRYPOINT ["hones", "serve"]')


def test_the_image_is_built_from_all_that_the_package_needs(tmp_path: Path) -> None:
    copied = tmp_path / "context"
    for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines():
        if (name := line.removeprefix("!")) != line:
            source, target = ROOT / name, copied / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel"], cwd=copied, check=True)
    (wheel,) = (copied / "dist").iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    assert {"hones_steer/py.typed", "hones_serving/playground.html", "hones_offline/tiny_vlm/config.json"} <= {*names}


def test_prometheus_asks_every_replica() -> None:
    settings = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    (job,) = settings["scrape_configs"]
    replicas = [name for name in COMPOSE["services"] if name.startswith("replica")]
    assert [target for group in job["static_configs"] for target in group["targets"]] == [f"{r}:8000" for r in replicas]


# Behind nginx -------------------------------------------------------------------------------------


def test_a_stream_is_passed_on_event_by_event(cluster: Cluster) -> None:
    body = {"model": "model:vqa", "prompt": "w1 w2", "max_tokens": 8, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=60) as response:
        assert response.headers["x-hones-profile"].startswith("vqa (")
        assert "transfer-encoding" in response.headers
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert {json.loads(event)["model"] for event in events if event != "[DONE]"} == {"model:vqa"}


def test_what_concerns_one_replica_is_not_for_the_common_address(cluster: Cluster) -> None:
    assert httpx.get(f"{cluster.url}/v1/hones/profiles", timeout=60).status_code == 200
    assert httpx.post(f"{cluster.url}/v1/hones/steering", json={"enabled": False}, timeout=60).status_code == 403
    assert httpx.get(f"{cluster.url}/metrics", timeout=60).status_code == 404
    assert httpx.get(f"{cluster.url}/health", timeout=60).status_code == 200


def test_requests_are_steered_by_either_replica_and_outlive_one(cluster: Cluster) -> None:
    wanted = complete(cluster.replicas[0].url, hones_task="vqa")
    assert wanted.headers["x-hones-route"] == "body"
    before = [answered(replica) for replica in cluster.replicas]
    for _ in range(6):
        answer = complete(cluster.url, hones_task="vqa")
        assert answer.json()["choices"] == wanted.json()["choices"]
        assert answer.headers["x-hones-profile"] == wanted.headers["x-hones-profile"]
    after = [answered(replica) for replica in cluster.replicas]
    grown = [b - a for a, b in zip(before, after, strict=True)]
    assert sum(grown) == 6
    assert min(grown) >= 1

    header = httpx.post(
        f"{cluster.url}/v1/completions",
        json={"model": "model", "prompt": "w1 w2", "max_tokens": 4, "temperature": 0},
        headers={"X-Hones-Task": "vqa"},
        timeout=60,
    )
    assert header.headers["x-hones-route"] == "header"

    cluster.replicas[0].process.send_signal(signal.SIGTERM)
    for _ in range(20):  # while it stops, and when it is gone
        assert complete(cluster.url, hones_task="vqa").json()["choices"] == wanted.json()["choices"]
    assert cluster.replicas[0].process.wait(timeout=60) == 0
