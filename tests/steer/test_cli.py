"""`hones`: finding commands, exit codes, one-line errors; `inspect`, `diff` and `verify`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from steer.make_attacks import FOLDER as ATTACKS
from steer.profiles import make
from tiny_models import llama, llava, random_profile

import hones_steer
from hones_steer import Profile, load_profile, save_profile
from hones_steer.cli import main
from hones_steer.loading import load_model

GOLDEN = str(Path(__file__).parent / "golden" / "vqa.safetensors")


def run(script: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, **options)


def write(folder: Path, profile: Profile, name: str = "") -> str:
    path = folder / f"{name or profile.task}.safetensors"
    save_profile(profile, path)
    return str(path)


# The command line itself --------------------------------------------------------------------------


def test_help_lists_every_command_with_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in ("attribute", "fit", "evaluate", "inspect", "diff", "verify", "demo"):
        assert any(line.startswith(f"  {name} ") and len(line) > 30 for line in text.splitlines())
    assert "example:" in text
    assert "  130  interrupted by Ctrl-C\n" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hones-steer {hones_steer.__version__}\n"


def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("usage: hones")


@pytest.mark.parametrize(
    ("name", "hint"), [("inspekt", "did you mean 'inspect'?"), ("xyz", "see `hones --help`"), ("--jsn", "see `hones")]
)
def test_an_unknown_command(name: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"hones: error: there is no command '{name}'; ")
    assert hint in error


@pytest.mark.parametrize("name", ["inspect", "diff", "verify"])
def test_each_commands_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert f"example:\n  hones {name} " in capsys.readouterr().out


def test_a_usage_error_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect"]) == 2
    assert "hones inspect: error: the following arguments are required: FILE" in capsys.readouterr().err


def test_an_error_is_one_line_and_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(ATTACKS / "scales_nan.safetensors")
    line = f"hones inspect: error: {path}: layers.1.scales is nan at neuron 7; scales must be finite\n"
    assert main(["inspect", path]) == 2
    assert capsys.readouterr() == ("", line)
    assert main(["--debug", "inspect", path]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith(line)


def test_python_dash_m() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "hones_steer", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("hones-steer ")


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A distribution that adds the command `hones trial`, whose argument says how to behave."""
    (tmp_path / "trial-1.dist-info").mkdir()
    (tmp_path / "trial-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: trial\nVersion: 1\n")
    (tmp_path / "trial-1.dist-info" / "entry_points.txt").write_text("[hones.commands]\ntrial = trial_command:run\n")
    (tmp_path / "trial_command.py").write_text(
        "import time, warnings\n"
        "def run(argv):\n"
        "    if argv == ['warn']: warnings.warn('one\\ntwo')\n"
        "    if argv == ['missing']: open('missing/file')\n"
        "    if argv == ['interrupt']: raise KeyboardInterrupt\n"
        "    if argv == ['noted']:\n"
        "        interrupt = KeyboardInterrupt()\n"
        "        interrupt.add_note('run it again')\n"
        "        raise interrupt\n"
        "    if argv == ['pipe']: raise BrokenPipeError(32, 'Broken pipe')\n"
        "    if argv == ['chatter']:\n"
        "        for _ in range(10000): print('x' * 100)\n"
        "    if argv == ['descriptors']:\n"
        "        import os\n"
        "        return os.open(__file__, os.O_RDONLY) <= 2\n"
        "    if argv == ['sleep']: print('started', flush=True); time.sleep(60)\n"
        "    if argv == ['bug']: raise ZeroDivisionError\n"
        "    if argv == ['exit']: raise SystemExit\n"
        "    if argv == ['message']: raise SystemExit('no good')\n"
        "    if argv == ['import']: import no_such_module_of_ours\n"
        "    return 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return str(tmp_path)


@pytest.mark.usefixtures("plugin")
def test_a_command_of_another_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "  trial      trial_command:run\n" in capsys.readouterr().out
    assert main(["trial"]) == 1
    assert main(["trial", "exit"]) == 0
    assert main(["trial", "message"]) == 2
    assert capsys.readouterr().err == "hones trial: error: no good\n"
    assert main(["trial", "missing"]) == 2
    assert capsys.readouterr().err == "hones trial: error: missing/file: No such file or directory\n"


@pytest.mark.usefixtures("plugin")
def test_what_is_a_bug_stays_a_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        main(["trial", "bug"])
    with pytest.raises(ModuleNotFoundError):
        main(["trial", "import"])


@pytest.mark.usefixtures("plugin")
def test_an_interrupt_is_one_line_and_says_what_the_command_says_of_resuming(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["trial", "interrupt"]) == 130
    assert capsys.readouterr().err == "hones trial: interrupted\n"
    assert main(["trial", "noted"]) == 130
    assert capsys.readouterr().err == "hones trial: interrupted; run it again\n"


def test_control_c(plugin: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "hones_steer", "trial", "sleep"],
        env={**os.environ, "PYTHONPATH": plugin},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=300)[1]
    assert (process.returncode, error) == (130, "hones trial: interrupted\n")


def test_a_warning_is_one_line(plugin: str) -> None:
    script = "import sys; from hones_steer.cli import main; sys.exit(main(['trial', 'warn']))"
    result = run(script, env={**os.environ, "PYTHONPATH": plugin})
    assert result.stderr == "hones trial: warning: one two\n"


def hones(*arguments: str, redirect: str, plugin: str) -> subprocess.CompletedProcess[str]:
    """Run `hones` in another process, whose streams a shell redirects."""
    command = ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, "-m", "hones_steer", *arguments]
    return subprocess.run(command, env=environment(plugin), capture_output=True, text=True, check=False)


def environment(plugin: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return {**kept, "PYTHONPATH": plugin}


BROKEN = str(ATTACKS / "empty.safetensors")


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (["inspect", GOLDEN], 0, ""),
        (["inspect", "--help"], 0, ""),
        (["--help"], 0, ""),
        (["trial", "message"], 2, "hones trial: error: no good\n"),
        (["trial", "warn"], 1, "hones trial: warning: one two\n"),
        (["trial", "interrupt"], 130, "hones trial: interrupted\n"),
        (["trial", "chatter"], 1, ""),
        (["trial", "descriptors"], 0, ""),  # no file gets the number of a closed stream
    ],
)
def test_closed_streams_change_no_exit_code(arguments: list[str], code: int, error: str, plugin: str) -> None:
    """A caller that closes a stream (`>&-`) does not want to read it."""
    result = hones(*arguments, redirect=">&-", plugin=plugin)
    assert (result.returncode, result.stderr) == (code, error)
    assert hones(*arguments, redirect="<&- >&- 2>&-", plugin=plugin).returncode == code


@pytest.mark.parametrize("arguments", [["inspect", GOLDEN], ["--help"], ["inspect", "--help"], ["trial", "chatter"]])
def test_a_reader_that_leaves_is_no_error(arguments: list[str], plugin: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command, env = [sys.executable, "-m", "hones_steer", *arguments], environment(plugin)
    result = subprocess.run(command, env=env, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    assert (result.returncode, result.stderr) == (141, "")
    assert subprocess.run(command, env=env, stdout=writer, stderr=writer, check=False).returncode == 141
    os.close(writer)


@pytest.mark.parametrize(("argument", "code"), [("message", 2), ("warn", 1), ("interrupt", 130)])
def test_errors_that_nobody_reads_change_no_exit_code(argument: str, code: int, plugin: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "hones_steer", "trial", argument]
    assert subprocess.run(command, env=environment(plugin), stderr=writer, check=False).returncode == code
    os.close(writer)


@pytest.mark.usefixtures("plugin")
def test_a_pipe_that_is_not_ours_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trial", "pipe"]) == 2
    assert capsys.readouterr().err == "hones trial: error: Broken pipe\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here, a disk that is full")
def test_output_that_cannot_be_written_is_an_error(plugin: str) -> None:
    for arguments, what in ((["inspect", "--help"], "the output: "), (["trial", "chatter"], "")):
        result = hones(*arguments, redirect=">/dev/full", plugin=plugin)
        expected = f"hones {arguments[0]}: error: {what}No space left on device\n"
        assert (result.returncode, result.stderr) == (2, expected)
    assert hones("trial", "message", redirect="2>/dev/full", plugin=plugin).returncode == 2


def test_a_terminal_without_unicode_is_no_error() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "hones_steer", "inspect", GOLDEN],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Frage \\u2192 Antwort" in result.stdout


@pytest.mark.parametrize(
    ("missing", "command", "extra"),
    [("torch", ["verify", GOLDEN, "model"], "hf"), ("PIL", ["fit", "--help"], "offline")],
)
def test_a_missing_extra_names_the_command_that_installs_it(missing: str, command: list[str], extra: str) -> None:
    script = f"import sys; sys.modules[{missing!r}] = None\n"
    script += f"from hones_steer.cli import main; sys.exit(main({command!r}))"
    result = run(script)
    expected = f"hones {command[0]}: error: {missing} is not installed; run: pip install 'hones-steer[{extra}]'\n"
    assert (result.returncode, result.stderr) == (2, expected)


def test_a_missing_extra_in_code() -> None:
    result = run("import sys; sys.modules['torch'] = None\nfrom hones_steer import steer")
    assert "ModuleNotFoundError: hones_steer.steer needs torch: pip install 'hones-steer[hf]'" in result.stderr


# inspect ------------------------------------------------------------------------------------------


def test_inspect_explains_a_profile(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", GOLDEN]) == 0
    lines = capsys.readouterr().out.splitlines()
    profile = load_profile(GOLDEN)
    for line in (
        "task         vqa",
        "description  Frage → Antwort",
        "license      Apache-2.0",
        f"digest       {profile.short_digest}  ({profile.digest})",
        "model        org/model at 0123abc, llava, 12 layers x 32 FFN neurons, hidden 64",
        "neurons      5 of 384 (1.30%), in 2 of 12 layers",
        "scales       -1.5 to 100, mean 20.05 (1 = unchanged)",
        "   2 3 " + "#" * 40,
        "   3 0",
        "  11 2 " + "#" * 27,
        "  top_fraction  0.01",
        "         base  hones        metric    n",
        "  test  0.652  0.673  vqa_accuracy  300",
    ):
        assert line in lines


def test_inspect_counts_scales_once_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = [-100.0, -0.5, 0.0, 0.5, 0.9, 1.0, 1.1, 1.5, 2.0, 100.0]
    path = write(tmp_path, make(scales={0: dict(enumerate(values))}))
    assert main(["inspect", path, "--json"]) == 0
    histogram = json.loads(capsys.readouterr().out)["scales"]["histogram"]
    assert sum(histogram.values()) == len(values)
    assert histogram["below 0 (reversed)"] == 2


def test_inspect_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", GOLDEN, "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    profile = load_profile(GOLDEN)
    assert described["digest"] == profile.digest
    assert described["file"]["sha256"] == hones_steer.profile.file_sha256(GOLDEN)
    assert described["layers"] == {"2": 3, "11": 2}
    assert described["scales"]["min"] == -1.5
    assert described["evidence"] == profile.evidence
    assert described["base_model"]["num_layers"] == 12


def test_inspect_shows_free_json_of_any_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evidence = {
        "seed": 3407,
        "runs": [1, {"a": None}],
        "empty": {},
        "dev": {"base": {"score": 0.5, "ci95": [0.4, 0.61239]}, "hones": {"score": 0.75, "n": 300}},
    }
    assert main(["inspect", write(tmp_path, make(evidence=evidence))]) == 0
    text = capsys.readouterr().out
    for part in ("3407", '[1, {"a": null}]', "ci95", "[0.4, 0.6124]", "0.75"):
        assert part in text


def test_inspect_neutralises_terminal_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nasty = "\x1b[2J\x07\u202e"
    profile = make(description=nasty, license=nasty, evidence={nasty: {nasty: nasty}, "list": [nasty]})
    path = write(tmp_path, profile)
    other = write(tmp_path, make(), "other")
    assert main(["inspect", path]) == 0
    assert main(["diff", path, other]) == 0
    text = capsys.readouterr().out
    assert "\\x1b[2J" in text
    assert text.replace("\n", "").isprintable()


# diff ---------------------------------------------------------------------------------------------


def test_diff_of_equal_content(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    renamed = write(tmp_path, make(description="new words"), "b")
    assert main(["diff", write(tmp_path, make()), renamed]) == 0
    text = capsys.readouterr().out
    assert "the neurons and scales are the same" in text
    assert "+ new words" in text


def test_diff_of_different_content(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path, make("a", {1: {0: 0.5, 7: 1.5}, 3: {4: 2.0}}))
    b = write(tmp_path, make("b", {1: {0: 0.5, 7: 3.0, 9: 1.0}}))
    assert main(["diff", a, b, "--json"]) == 1
    comparison = json.loads(capsys.readouterr().out)
    assert comparison["layers"] == [
        {"layer": 1, "shared": 2, "rescaled": 1, "removed": 0, "added": 1},
        {"layer": 3, "shared": 0, "rescaled": 0, "removed": 1, "added": 0},
    ]
    assert comparison["max_difference"] == 1.5
    # offsets (-0.5, 0.5, 0, 1) and (-0.5, 2, 0, 0)
    assert comparison["offset_cosine"] == pytest.approx(1.25 / (1.5**0.5 * 4.25**0.5))
    assert comparison["metadata"] == {"task": ["a", "b"]}
    assert main(["diff", a, b]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "layer 1       2         1        0      1" in lines
    assert "largest difference of a scale: 1.5" in lines


def test_diff_where_no_scale_differs_from_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path, make("a", {1: {0: 1.0}})), write(tmp_path, make("b", {2: {0: 1.0}}))
    assert main(["diff", a, b]) == 1
    assert "cosine of the offsets (scale - 1): undefined" in capsys.readouterr().out


def test_diff_of_a_broken_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", GOLDEN, str(ATTACKS / "empty.safetensors")]) == 2
    assert "empty.safetensors: not a safetensors file" in capsys.readouterr().err


# verify -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, llava])
def test_verify_says_yes(build: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build()
    model.save_pretrained(tmp_path / "model")
    path = write(tmp_path, random_profile(model, seed=1))
    assert main(["verify", path, str(tmp_path / "model")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "yes"
    assert len(lines) > 1
    assert main(["verify", path, str(tmp_path / "model"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["fits"], answer["reason"]) == (True, None)


def test_verify_loads_the_stored_dtype(tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    path = write(tmp_path, random_profile(model, seed=1))
    model.save_pretrained(tmp_path / "model")
    assert load_model(str(tmp_path / "model")).dtype == torch.bfloat16
    assert main(["verify", path, str(tmp_path / "model")]) == 0


def test_verify_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama(seed=1).save_pretrained(tmp_path / "model")
    path = write(tmp_path, random_profile(llama(seed=0), seed=1))
    assert main(["verify", path, str(tmp_path / "model")]) == 1
    answer = capsys.readouterr().out
    assert answer.startswith("no: ")
    assert "the final norm's weight at position 0 is" in answer
    assert main(["verify", path, str(tmp_path / "model"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["fits"] is False


def test_verify_of_what_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "missing")
    assert main(["verify", missing, missing]) == 2
    assert capsys.readouterr().err == f"hones verify: error: {missing}: cannot be read: No such file or directory\n"
    assert main(["verify", GOLDEN, missing]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"hones verify: error: cannot load the model '{missing}'")
    assert error.count("\n") == 1


def test_verify_of_a_model_with_broken_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"broken")
    assert main(["verify", GOLDEN, str(tmp_path / "model")]) == 2
    assert "cannot load the weights" in capsys.readouterr().err
