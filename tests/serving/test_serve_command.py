"""`hones serve`: arguments that it refuses at once, and the process that it becomes."""

import dataclasses
import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
from hones_serving import listening
from hones_serving.commands import check_address, launch
from serving.engines import ENVIRONMENT, ENVIRONMENT_V2, free_port, server
from steer.profiles import identity, make
from tiny_models import random_profile
from transformers import AutoModelForCausalLM

from hones_steer import DataError, save_profile
from hones_steer.cli import main
from hones_steer.ffns import FfnRun

FOR_VLLM = ["--max-model-len", "128", "--enforce-eager"]
SHAPES = {"num_hidden_layers": 6, "intermediate_size": 40, "hidden_size": 32}  # those of `make`'s profiles


@pytest.fixture
def profiles(tmp_path: Path) -> Path:
    folder = tmp_path / "profiles"
    folder.mkdir()
    for task in ("vqa", "ocr"):
        save_profile(make(task), folder / f"{task}.safetensors")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": SHAPES}))
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of error of `hones serve` with these arguments, which exits with 2."""
    assert main(["serve", *map(str, arguments)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hones serve: error: ")
    return error


# The process it becomes ---------------------------------------------------------------------------


def flags_for_vllm(arguments: Sequence[str]) -> list[str]:
    at = arguments.index("--model")
    assert arguments[0] == sys.executable
    return list(arguments[at:])


def test_options_become_flags_and_variables(model: Path, profiles: Path, tmp_path: Path) -> None:
    routing = tmp_path / "routing.yaml"
    routing.write_text("default: vqa\n")
    arguments, environment = launch(
        [
            *(str(model), "--profiles", str(profiles), "--routing", str(routing), "--max-profiles", "7"),
            *("--allow-profile-updates", "--playground", "--host", "127.0.0.1", "--port", "8123"),
            *("--max-expert-tables", "300"),
            *("--max-body-mb", "3"),
            *("--served-model-name", "a", "b", "--shutdown-timeout", "7"),
        ],
        {"HOME": "/home/me"},
        set(),
    )
    assert flags_for_vllm(arguments) == [
        *("--model", str(model), "--host", "127.0.0.1", "--port", "8123"),
        *("--shutdown-timeout", "7", "--served-model-name", "a", "b"),
    ]
    assert environment == {
        "HOME": "/home/me",
        "HONES_PROFILES": str(profiles),
        "HONES_ROUTING": str(routing),
        "HONES_MAX_PROFILES": "7",
        "HONES_MAX_EXPERT_TABLES": "300",
        "HONES_ALLOW_PROFILE_UPDATES": "1",
        "HONES_ALLOW_UNTESTED": "",
        "HONES_PLAYGROUND": "1",
        "HONES_MAX_BODY_MB": "3",
        "HONES_STATE_DIR": "",
        "VLLM_PLUGINS": "hones",
    }


def test_what_only_vllm_knows_is_passed_on_untouched(model: Path, profiles: Path) -> None:
    unknown = ["--max-model-len", "4096", "--max-p=1", "-tp", "2", "--enforce-eager", "--hf-overrides", '{"a": "-b c"}']
    arguments, _ = launch([str(model), *unknown[:4], "--profiles", str(profiles), *unknown[4:]], {}, set())
    assert flags_for_vllm(arguments) == ["--model", str(model), *unknown]


@pytest.mark.parametrize("flag", [["--api-server-count", "2"], ["--api_server_count=2"], ["-asc", "2"]])
def test_several_api_servers_are_started_as_vllm_serve_does(model: Path, profiles: Path, flag: list[str]) -> None:
    start = [sys.executable, "-P", "-m"]
    arguments, _ = launch([str(model), "--profiles", str(profiles), *flag], {}, set())
    assert arguments == [*start, "hones_serving.vllm.serve", "--model", str(model), "--api-server-count", "2"]
    arguments, _ = launch([str(model), "--profiles", str(profiles), flag[0].partition("=")[0], "1"], {}, set())
    assert arguments == [*start, "vllm.entrypoints.launchers.api_server.entry", "--model", str(model)]


def test_the_transformers_engine(model: Path, profiles: Path) -> None:
    arguments, environment = launch(
        [
            *(str(model), "--engine", "transformers", "--profiles", str(profiles), "--port", "8123"),
            *("--device", "cpu", "--api-key", "s3cret", "--allow-profile-updates"),
        ],
        {"HOME": "/home/me", "HONES_MAX_PROFILES": "7"},
        set(),
    )
    module = ["-P", "-m", "hones_serving.transformers_server.command"]
    assert arguments == [sys.executable, *module, "--model", str(model), "--port", "8123", "--device", "cpu"]
    assert environment == {
        "HOME": "/home/me",
        "HONES_PROFILES": str(profiles),
        "HONES_ROUTING": "",
        "HONES_MAX_PROFILES": "",
        "HONES_MAX_EXPERT_TABLES": "",
        "HONES_ALLOW_PROFILE_UPDATES": "1",
        "HONES_ALLOW_UNTESTED": "",
        "HONES_PLAYGROUND": "",
        "HONES_MAX_BODY_MB": "",
        "HONES_STATE_DIR": "",
        "HONES_API_KEY": "s3cret",
    }


@pytest.mark.parametrize("flag", [["--api-key", "s3cret"], ["--api-key=s3cret"], ["--api_key", "s3cret"]])
def test_the_key_is_not_in_the_process_list(model: Path, profiles: Path, flag: list[str]) -> None:
    arguments, environment = launch([str(model), "--profiles", str(profiles), *flag], {}, set())
    assert "s3cret" not in " ".join(arguments)
    assert environment["VLLM_API_KEY"] == "s3cret"


@pytest.mark.parametrize(
    ("before", "installed", "plugins"),
    [
        (None, {"hones"}, "hones"),
        (None, {"zebra", "hones", "ascend"}, "ascend,hones,zebra"),
        (None, {"zebra"}, "zebra,hones"),
        ("mine", {"zebra", "hones"}, "mine,hones"),
        ("hones,mine", {"zebra", "hones"}, "hones,mine"),
        ("", {"zebra", "hones"}, "hones"),
    ],
)
def test_other_plugins_stay_as_they_were(
    model: Path, profiles: Path, before: str | None, installed: set[str], plugins: str
) -> None:
    environ = {} if before is None else {"VLLM_PLUGINS": before}
    _, environment = launch([str(model), "--profiles", str(profiles)], environ, installed)
    assert environment["VLLM_PLUGINS"] == plugins


@pytest.mark.parametrize("environ", [{}, {"VLLM_USE_V2_MODEL_RUNNER": "0"}, {"HONES_ALLOW_UNTESTED": "1"}])
def test_the_model_runner_is_vllms_choice_and_the_users(model: Path, profiles: Path, environ: dict[str, str]) -> None:
    _, environment = launch([str(model), "--profiles", str(profiles)], environ, set())
    assert environment.get("VLLM_USE_V2_MODEL_RUNNER") == environ.get("VLLM_USE_V2_MODEL_RUNNER")
    assert environment["HONES_ALLOW_UNTESTED"] == environ.get("HONES_ALLOW_UNTESTED", "")


def test_variables_from_another_server_do_not_leak_in(model: Path, profiles: Path) -> None:
    left_over = {"HONES_ROUTING": "old.yaml", "HONES_MAX_PROFILES": "1", "HONES_ALLOW_PROFILE_UPDATES": "1"}
    left_over |= {"HONES_PLAYGROUND": "1", "HONES_MAX_EXPERT_TABLES": "1", "HONES_MAX_BODY_MB": "1"}
    left_over |= {"HONES_STATE_DIR": "/tmp/hones-old"}
    _, environment = launch([str(model), "--profiles", str(profiles)], left_over, set())
    assert [environment[name] for name in left_over] == [""] * 7


def test_a_hub_name_is_left_to_vllm(profiles: Path) -> None:
    arguments, _ = launch(["llava-hf/llava-1.5-7b-hf", "--profiles", str(profiles)], {}, set())
    assert flags_for_vllm(arguments) == ["--model", "llava-hf/llava-1.5-7b-hf"]


# Refusals at once ---------------------------------------------------------------------------------


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("MODEL", "--profiles", "--routing", "--max-profiles", "--api-key", "examples:", "X-Hones-Task"):
        assert option in text


def test_the_model_comes_first(profiles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "MODEL comes before all options" in refusal(capsys, "--max-model-len", "4096", "m", "--profiles", profiles)


@pytest.mark.parametrize("flag", ["--model=other", "--headless", "--grpc"])
def test_flags_that_would_be_ignored(flag: str, profiles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{flag.partition('=')[0].replace('_', '-')} cannot be given" in refusal(
        capsys, "m", "--profiles", profiles, flag
    )


def test_an_empty_key_would_protect_nothing(profiles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the key is empty" in refusal(capsys, "m", "--profiles", profiles, "--api-key", "")


ENGINES = pytest.mark.parametrize("engine", ["vllm", "transformers"])


@ENGINES
@pytest.mark.parametrize("port", ["99999", "65536", "0", "-1", "abc", "80.0", "08", "\u0668\u0660", ""])
def test_a_port_that_is_none(port: str, engine: str, profiles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names port 99999, which the operating system would take for 34463."""
    said = refusal(capsys, "m", "--profiles", profiles, "--engine", engine, f"--port={port}")
    assert f"argument --port: {port!r} is not a port, a whole number from 1 to 65535" in said


@ENGINES
def test_a_port_in_use(engine: str, model: Path, profiles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        for host in ("127.0.0.1", "0.0.0.0"):
            said = refusal(capsys, model, "--profiles", profiles, "--engine", engine, "--host", host, "--port", port)
            assert f"cannot listen on port {port} of {host}: Address already in use; name another one" in said


def test_of_two_servers_that_loaded_at_the_same_time_one_listens() -> None:
    """Both can bind the port, so only listening tells them apart."""
    port = free_port()
    first, second = (listening.bind("127.0.0.1", port) for _ in range(2))
    try:
        listening.listen(first)
        with pytest.raises(DataError, match=f"cannot listen on port {port} of 127.0.0.1: Address already in use"):
            listening.listen(second)
    finally:
        listening.close(first + second)


def test_every_address_of_a_host_is_bound() -> None:
    sockets = listening.bind("localhost", free_port())
    try:
        assert {one.getsockname()[0] for one in sockets} <= {"127.0.0.1", "::1"}
        assert "127.0.0.1" in {one.getsockname()[0] for one in sockets}
    finally:
        listening.close(sockets)


@ENGINES
@pytest.mark.parametrize(
    ("host", "words"),
    [("203.0.113.7", "is not this machine"), ("..", "is no address"), ("1.2.3.4.5.6.7.8::", "is no address")],
)
def test_a_host_that_is_none(
    host: str, words: str, engine: str, model: Path, profiles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, model, "--profiles", profiles, "--engine", engine, "--host", host, "--port", free_port())
    assert f"--host {host!r} {words}" in said


def test_a_socket_that_is_a_file_needs_no_port(model: Path, profiles: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = ("--host", "127.0.0.1", "--port", str(listener.getsockname()[1]))
        check_address([str(model), "--profiles", str(profiles), *address, "--uds", "/tmp/hones.sock"])
        with pytest.raises(DataError, match="Address already in use"):
            check_address([str(model), "--profiles", str(profiles), *address])


@ENGINES
@pytest.mark.parametrize("seconds", ["-1", "soon", "1.5", "1e3", ""])
def test_a_limit_that_is_none(seconds: str, engine: str, profiles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "m", "--profiles", profiles, "--engine", engine, f"--shutdown-timeout={seconds}")
    assert f"{seconds!r} is not a whole number of seconds from 0 to 999999" in said


@pytest.mark.parametrize("count", ["0", "-1", "many"])
def test_a_maximum_that_is_none(count: str, profiles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--max-profiles", "--max-expert-tables", "--api-server-count"):
        assert option in refusal(capsys, "m", "--profiles", profiles, f"{option}={count}")


@pytest.mark.parametrize("option", ["--max-expert-tables", "--api-server-count"])
def test_options_that_are_for_vllm(option: str, profiles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--engine", "transformers", option, "3")
    assert f"{option} is for vLLM" in refusal(capsys, "m", "--profiles", profiles, *options)


@pytest.mark.parametrize(("engine", "module", "extra"), [("vllm", "vllm", "vllm"), ("transformers", "openai", "serve")])
def test_without_the_engine(
    engine: str,
    module: str,
    extra: str,
    profiles: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    said = refusal(capsys, "m", "--profiles", profiles, "--engine", engine)
    assert f"{module} is not installed; run: pip install 'hones-steer[{extra}]'" in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--continuous-batching"], "--continuous-batching cannot be given: batching is on, and has --max-num-seqs"),
        (["--cb-block-size", "32"], "--cb-block-size cannot be given: batching is on"),
        (["--max-num-seqs", "0"], "'0' is not a whole number above 0"),
        (["--kv-cache-gib", "-1"], "'-1' is no number of GiB, such as 2 or 0.5"),
        (["--max-model-len", "4096"], "the transformers engine knows no --max-model-len; it has --dtype, --device"),
        (["--model=other"], "MODEL, the first argument, names the model"),
        (["--dtype", "int8"], "int8"),
        (["--allowed-origins", "*"], "no JSON list of origins"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_the_transformers_engine_does_not_do(
    flags: list[str], words: str, profiles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(capsys, "m", "--profiles", profiles, "--engine", "transformers", *flags)


def test_a_model_that_transformers_cannot_serve(profiles: Path, tmp_path: Path) -> None:
    """The new process finds this out, and ends as the command would."""
    model = tmp_path / "clip"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "clip"}))
    command = [sys.executable, "-m", "hones_steer", "serve", str(model), "--profiles", str(profiles)]
    command += ["--engine", "transformers", "--host", "127.0.0.1", "--port", str(free_port())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"hones serve: error: cannot load the weights of '{model}': ")


def test_no_profiles(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in refusal(capsys, model, "--profiles", tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"{empty}: holds no profiles" in refusal(capsys, model, "--profiles", empty)
    launch([str(model), "--profiles", str(empty), "--allow-profile-updates"], {}, set())  # they may come later


@pytest.mark.parametrize("name", ["caption", "my profile"])
def test_a_bad_profile(name: str, model: Path, profiles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (profiles / f"{name}.safetensors").write_bytes(b"nonsense")
    assert name in refusal(capsys, model, "--profiles", profiles)


def test_a_profile_for_a_model_of_another_shape(
    model: Path, profiles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_profile(make("cap", base_model=identity(hidden_size=48)), profiles / "cap.safetensors")
    error = refusal(capsys, model, "--profiles", profiles)
    assert "cap.safetensors" in error
    assert "48" in error
    assert "32" in error


def test_a_profile_of_several_widths_is_compared_as_far_as_config_json_tells(
    model: Path, profiles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = identity(intermediate_size=None, ffns=(FfnRun(0, 5, dense=40), FfnRun(5, 6, dense=80)))
    save_profile(make("cap", base_model=wide), profiles / "cap.safetensors")
    launch([str(model), "--profiles", str(profiles)], {}, set())
    longer = dataclasses.replace(wide, num_layers=7)
    save_profile(make("cap", base_model=longer), profiles / "cap.safetensors")
    error = refusal(capsys, model, "--profiles", profiles)
    assert "cap.safetensors: the profile belongs to another model: num_layers is 7 in the profile and 6 in the" in error


@pytest.mark.parametrize("config", ["", "[]", None])
def test_a_folder_that_is_no_model(
    config: str | None, model: Path, profiles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "config.json").unlink()
    if config is not None:
        (model / "config.json").write_text(config)
    assert str(model / "config.json") in refusal(capsys, model, "--profiles", profiles)


def test_a_path_to_nothing(tmp_path: Path, profiles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no such model folder" in refusal(capsys, tmp_path / "gone", "--profiles", profiles)


def test_a_routing_file_that_is_not_sound(
    model: Path, profiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    routing = tmp_path / "routing.yaml"
    routing.write_text("default: captions\n")
    error = refusal(capsys, model, "--profiles", profiles, "--routing", routing)
    assert f"{routing}" in error
    assert "captions" in error


# For real -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "environment"),
    [
        pytest.param(["--engine", "transformers"], ENVIRONMENT, id="transformers"),
        # test_http.py has a server of vLLM's for many tests
        pytest.param(FOR_VLLM, ENVIRONMENT, id="vllm", marks=pytest.mark.matrix),
        pytest.param(FOR_VLLM, ENVIRONMENT_V2, id="vllm, V2 runner", marks=pytest.mark.matrix),
    ],
)
def test_a_server_starts(options: list[str], environment: dict[str, str], llama: Path, tmp_path: Path) -> None:
    profiles = tmp_path / "profiles"
    profiles.mkdir()
    save_profile(
        random_profile(AutoModelForCausalLM.from_pretrained(llama), seed=0, task="vqa"), profiles / "vqa.safetensors"
    )
    command = [sys.executable, "-m", "hones_steer", "serve", str(llama), "--profiles", str(profiles)]
    command += ["--api-key", "s3cret", "--served-model-name", "tiny", *options]
    with server(command, tmp_path / "log", environment) as running:
        assert ("Using V2 Model Runner" in running.log.read_text()) == (environment is ENVIRONMENT_V2)
        assert b"s3cret" not in Path(f"/proc/{running.process.pid}/cmdline").read_bytes()
        models = f"{running.url}/v1/models"
        assert httpx.get(models).status_code == 401
        listed = httpx.get(models, headers={"Authorization": "Bearer s3cret"}).json()["data"]
        assert [model["id"] for model in listed] == ["tiny", "tiny:vqa"]
