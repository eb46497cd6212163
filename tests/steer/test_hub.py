"""Profiles on the Hub: huggingface_hub's own client against a server that speaks the routes it uses."""

import ctypes
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants
from steer.hub_server import TOKEN, Repository, running
from steer.profiles import identity, make

from hones_steer import MismatchError, ProfileError, load_profile, pull_profile, push_profile, save_profile
from hones_steer.cli.hub_commands import pull, push
from hones_steer.errors import DataError
from hones_steer.hub import local_folder, pull_profiles
from hones_steer.profile import serialize_profile
from hones_steer.store import ProfileStore

# huggingface_hub's own, when it uploads without hf_xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "org/profiles"
EVIDENCE = {
    "metric": "accuracy",
    "split": "test",
    "n": 300,
    "base": 0.7,
    "steered": 0.73,
    "gain_ci95": [0.01, 0.05],
}


def vqa(**fields):
    return make("vqa", description="Short answers.", license="apache-2.0", evidence=EVIDENCE, **fields)


def ocr():
    return make("ocr", {2: {5: 1.25}})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that the client in this process is logged in to, with an empty cache."""
    with running() as state:
        monkeypatch.setattr(constants, "ENDPOINT", state.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", state.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield state


def test_what_is_pushed_is_pulled_byte_for_byte(hub):
    commit = push_profile(vqa(), REPO)
    assert hub.repos[REPO].resolve("main") == commit
    assert serialize_profile(pull_profile(REPO)) == serialize_profile(vqa())
    assert hub.repos[REPO].files()["vqa.safetensors"] == serialize_profile(vqa())


def test_a_repository_holds_several_and_keeps_what_is_there(hub):
    push_profile(vqa(), REPO)
    second = push_profile([ocr(), make("cap")], REPO)
    assert len(hub.repos[REPO].commits) == 3  # the repository's own, and one for each push
    pulled = pull_profiles(REPO)
    assert (pulled.commit, list(pulled.profiles)) == (second, ["cap", "ocr", "vqa"])
    assert pulled.profiles["vqa"] == vqa()
    assert pull_profile(REPO, "ocr") == ocr()
    with pytest.raises(ProfileError, match="has 3 profiles \\(cap, ocr, vqa\\); name the task"):
        pull_profile(REPO)
    with pytest.raises(ProfileError, match="has no profile for the task 'vqaa'; known tasks: cap, ocr, vqa"):
        pull_profile(REPO, "vqaa")


def test_only_what_is_asked_for_is_downloaded(hub):
    push_profile([vqa(), ocr()], REPO)
    hub.requests.clear()
    pull_profile(REPO, "ocr")
    assert not [request for request in hub.requests if "vqa" in request]


def test_a_revision_pins_what_is_pulled(hub):
    first = push_profile(vqa(), REPO)
    changed = vqa(scales={1: {0: 0.25}})
    hub.repos[REPO].refs["v1"] = first
    push_profile(changed, REPO)
    assert pull_profile(REPO) == changed
    assert pull_profile(REPO, revision=first) == pull_profile(REPO, revision="v1") == vqa()
    with pytest.raises(DataError, match="org/profiles@v9: cannot be pulled: there is no such branch, tag or commit"):
        pull_profile(REPO, revision="v9")


def test_a_branch_is_pushed_to(hub):
    push_profile(vqa(), REPO)
    hub.repos[REPO].refs["next"] = hub.repos[REPO].refs["main"]
    push_profile(ocr(), REPO, revision="next", message="try ocr")
    assert list(pull_profiles(REPO).profiles) == ["vqa"]
    assert list(pull_profiles(REPO, revision="next").profiles) == ["ocr", "vqa"]


def test_the_card_tells_model_tasks_evidence_and_use(hub):
    push_profile([vqa(), ocr()], REPO)
    text = hub.repos[REPO].files()["README.md"].decode()
    data = ModelCard(text).data
    assert (data.base_model, data.license, data.library_name) == ("org/tiny", "apache-2.0", "hones-steer")
    assert "# Steering profiles: ocr, vqa" in text
    assert "| vqa | accuracy | test | 300 | 0.7 | 0.73 | [0.01, 0.05] |" in text
    for usage in (
        f'pull_profile("{REPO}", "ocr", revision="main")',
        f"hones serve org/tiny --profiles hub:{REPO}@main",
        "hones export ocr.safetensors org/tiny --to peft",
    ):
        assert usage in text


def test_the_card_tells_what_other_tasks_lose(hub):
    others = {"ocr": {"n": 9, "base": 0.123456, "gain_ci95": [-0.03, 0.01]}, "x|y": {}}
    push_profile(make("vqa", evidence={"n": 3, "others": others, "others_mean": {"gain": -0.0123456}}), REPO)
    text = hub.repos[REPO].files()["README.md"].decode()
    assert "| task | n | others | others_mean |" in text
    assert "| vqa | 3 | ocr: (n: 9, base: 0.1235, gain_ci95: [-0.03, 0.01]), x\\|y: () | gain: -0.01235 |" in text


def test_text_from_a_profile_stays_in_its_cell(hub):
    nasty = make("vqa", description="a | b\n\n# Head <script>", evidence={"x|y": "1\n|---|"})
    push_profile(nasty, REPO)
    text = hub.repos[REPO].files()["README.md"].decode()
    assert "a \\| b # Head &lt;script>" in text
    assert "| vqa | 1 \\|---\\| |" in text


def test_a_card_of_somebodys_own_is_kept(hub):
    push_profile(vqa(), REPO)
    files = hub.repos[REPO].files()
    hub.repos[REPO].commit({**files, "README.md": b"---\nlicense: mit\n---\nMine."})
    with pytest.warns(UserWarning, match=r"its README\.md is not ours and is kept"):
        push_profile(ocr(), REPO)
    assert hub.repos[REPO].files()["README.md"] == b"---\nlicense: mit\n---\nMine."
    assert pull_profile(REPO, "ocr") == ocr()


def test_a_private_repository(hub, monkeypatch):
    push_profile(vqa(), REPO, private=True)
    assert hub.repos[REPO].private
    assert pull_profile(REPO) == vqa()
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(DataError, match="no such repository, or it is private; see hf auth login"):
        pull_profile(REPO, revision="main")


# Refused ------------------------------------------------------------------------------------------


def test_nothing_and_two_for_one_task_are_refused(hub):
    for profiles in ([], [vqa(), make("vqa")]):
        with pytest.raises(ProfileError, match=r"the profiles to push are for .*; give one or more, one per task"):
            push_profile(profiles, REPO)
    assert hub.requests == []


@pytest.mark.usefixtures("hub")
def test_profiles_of_another_model_do_not_join():
    push_profile(vqa(), REPO)
    with pytest.raises(MismatchError, match=r"a repository holds profiles of one model; .* hidden_size is 32"):
        push_profile(make("ocr", base_model=identity(hidden_size=64)), REPO)
    assert list(pull_profiles(REPO).profiles) == ["vqa"]


def test_a_repository_without_profiles(hub):
    hub.repos[REPO] = Repository()
    hub.repos[REPO].commit({"model.safetensors": b"large"})
    with pytest.raises(ProfileError, match=r"org/profiles: has no hones_profiles\.json, and it holds no profiles"):
        pull_profile(REPO)
    with pytest.raises(DataError, match="no such repository"):
        pull_profile("org/nothing")
    with pytest.raises(DataError, match="write ORG/NAME"):
        pull_profile("not a/repo/name")


def test_a_file_that_is_not_what_the_manifest_says(hub):
    push_profile(vqa(), REPO)
    files = hub.repos[REPO].files()
    hub.repos[REPO].commit({**files, "vqa.safetensors": serialize_profile(vqa(scales={1: {0: 3.0}}))})
    with pytest.raises(ProfileError, match=r"vqa\.safetensors has the sha256 .* where hones_profiles\.json has"):
        pull_profile(REPO)
    push_profile([vqa(), ocr()], REPO)  # puts it right
    assert pull_profile(REPO, "vqa") == vqa()


@pytest.mark.usefixtures("hub")
def test_a_file_that_was_damaged_in_the_cache():
    commit = push_profile(vqa(), REPO)
    pull_profile(REPO)
    path = Path(constants.HF_HUB_CACHE, "models--org--profiles", "snapshots", commit, "vqa.safetensors")
    with path.resolve().open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(ProfileError, match="download is damaged or the file was replaced") as caught:
        pull_profile(REPO, revision=commit)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.update(format=2), "has the format 2; upgrade hones-steer"),
        (lambda manifest: manifest.pop("profiles"), "is damaged"),
        (lambda manifest: manifest["profiles"].clear(), "lists no profiles"),
        (lambda manifest: manifest["profiles"].update({"../x": manifest["profiles"]["vqa"]}), "'../x', which is no"),
        (
            lambda manifest: manifest["profiles"]["vqa"].update(digest="0" * 64),
            "with digest .* 000000000000",
        ),
        (lambda manifest: manifest["profiles"].update(ocr=manifest["profiles"]["vqa"]), r"has no ocr\.safetensors"),
    ],
)
def test_a_damaged_manifest(hub, change, message):
    push_profile(vqa(), REPO)
    files = hub.repos[REPO].files()
    manifest = json.loads(files["hones_profiles.json"])
    change(manifest)
    hub.repos[REPO].commit({**files, "hones_profiles.json": json.dumps(manifest).encode()})
    with pytest.raises(ProfileError, match=message) as caught:
        pull_profiles(REPO)
    assert str(caught.value).startswith(REPO)


def test_somebody_else_pushes_meanwhile(hub):
    push_profile(vqa(), REPO)
    hub.break_in = REPO
    with pytest.raises(DataError, match="somebody else has pushed meanwhile; push again"):
        push_profile(ocr(), REPO)
    assert "ocr.safetensors" not in hub.repos[REPO].files()


def test_without_permission(hub, monkeypatch):
    push_profile(vqa(), REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(DataError, match=r"cannot be pushed to: .*\(HTTP 403\); use a token with write access"):
        push_profile(ocr(), REPO)
    hub.repos[REPO].gated = True
    with pytest.raises(DataError, match="access must be granted"):
        pull_profile(REPO)


def test_a_hub_that_fails(hub):
    hub.down = True
    with pytest.raises(DataError, match="the Hub answered HTTP 400 the Hub is out of order"):
        push_profile(vqa(), REPO)
    hub.down, hub.full = False, True
    with pytest.raises(DataError, match=r"Error while uploading .* storage limit reached"):
        push_profile(vqa(), REPO)
    assert list(hub.repos[REPO].files()) == [".gitattributes"]


# Offline ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hub")
def test_with_hf_hub_offline_the_cache_is_enough(monkeypatch):
    push_profile(vqa(), REPO)
    commit = pull_profiles(REPO).commit
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull_profile(REPO, revision=commit) == pull_profile(REPO) == vqa()
    with pytest.raises(DataError, match="org/other: cannot be pulled: HF_HUB_OFFLINE is set"):
        pull_profile("org/other")
    with pytest.raises(DataError, match="cannot be pushed to: HF_HUB_OFFLINE is set; unset it"):
        push_profile(ocr(), REPO)


@pytest.mark.usefixtures("hub")
def test_a_hub_that_cannot_be_reached(monkeypatch):
    commit = push_profile(vqa(), REPO)
    pull_profile(REPO)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    # What main was is in the cache; whether it still is, nobody can tell.
    for call in (lambda: pull_profile(REPO), lambda: push_profile(vqa(), REPO)):
        with pytest.raises(DataError, match=r"http://127\.0\.0\.1:1 cannot be reached .* by its commit as revision"):
            call()
    assert pull_profile(REPO, revision=commit) == vqa()


@pytest.mark.usefixtures("hub")
def test_a_commit_in_the_cache_can_be_written_short_and_in_capitals(monkeypatch):
    commit = push_profile(vqa(), REPO)
    pull_profile(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in (commit.upper(), commit[:7], commit[:12].upper()):
        assert pull_profiles(REPO, revision=revision).commit == commit
    with pytest.raises(DataError, match=f"org/profiles@{commit[:6]}: cannot be pulled: HF_HUB_OFFLINE is set"):
        pull_profile(REPO, revision=commit[:6])
    (Path(constants.HF_HUB_CACHE, "models--org--profiles", "snapshots") / (commit[:7] + "0" * 33)).mkdir()
    with pytest.raises(DataError, match=f"{commit[:7]} may be any of .*{commit}.*; write the whole commit"):
        pull_profile(REPO, revision=commit[:7])


def test_a_branch_that_looks_like_a_commit_is_a_branch(hub):
    commit = push_profile(vqa(), REPO)
    pull_profile(REPO)
    name = commit[:7]
    other = hub.repos[REPO].commit({**hub.repos[REPO].files(), "note": b""}, name)
    hub.repos[REPO].refs["main"] = other
    folder = Path(constants.HF_HUB_CACHE, "models--org--profiles", "refs")
    (folder / name).write_text(other)  # it was pulled once
    assert pull_profiles(REPO, revision=name).commit == other
    assert pull_profiles(REPO, revision=commit).commit == commit


@pytest.mark.usefixtures("hub")
def test_a_file_that_was_deleted_in_the_cache(monkeypatch):
    commit = push_profile([vqa(), ocr()], REPO)
    pull_profiles(REPO)
    snapshot = Path(constants.HF_HUB_CACHE, "models--org--profiles", "snapshots", commit)
    for name in ("vqa.safetensors", "hones_profiles.json"):
        (snapshot / name).unlink()
        with monkeypatch.context() as patch:
            patch.setattr(constants, "HF_HUB_OFFLINE", True)
            with pytest.raises(DataError, match=f"its {name} is not in the cache; pull it once with a network"):
                pull_profiles(REPO, revision=commit)
        assert pull_profile(REPO, "vqa", revision=commit) == vqa()


# A folder to serve from ---------------------------------------------------------------------------


@pytest.mark.usefixtures("hub")
def test_a_folder_to_serve_from():
    first = push_profile([vqa(), ocr()], REPO)
    folder = local_folder(f"hub:{REPO}@{first}")
    assert (folder.name, ProfileStore(folder).names()) == (first, ["ocr", "vqa"])
    push_profile(vqa(scales={1: {0: 0.25}}), REPO)
    latest = local_folder(f"hub:{REPO}")
    assert latest != folder
    assert ProfileStore(folder).get("vqa") == vqa()
    assert local_folder(f"hub:{REPO}@main") == latest
    for wrong in ("hub:", "hub:org/name@", "hub:org/name@a b"):
        with pytest.raises(DataError, match="write hub:ORG/NAME or hub:ORG/NAME@REVISION"):
            local_folder(wrong)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda folder: save_profile(make("vqa", {1: {0: 9.0}}), folder / "vqa.safetensors"), r"vqa\..* was changed"),
        (lambda folder: (folder / "vqa.safetensors").write_bytes(b""), r"vqa\..* was changed"),
        (lambda folder: (folder / "ocr.safetensors").unlink(), r"ocr\..* was deleted"),
        (lambda folder: save_profile(make("cap"), folder / "cap.safetensors"), r"cap\..* was added"),
    ],
    ids=["changed", "emptied", "deleted", "added"],
)
def test_a_copy_that_is_no_longer_the_repositorys_says_what_to_do(change, what):
    spec = f"hub:{REPO}@{push_profile([vqa(), ocr()], REPO)}"
    folder = local_folder(spec)
    change(folder)
    message = f"{what} after the download; delete {re.escape(str(folder))}, and it is made anew"
    with pytest.raises(ProfileError, match=message):
        local_folder(spec)


READ_ONLY = """
import json, os, sys, tempfile
from hones_steer.errors import DataError
from hones_steer.hub import constants, local_folder, pull_profile
from hones_steer.store import ProfileStore
try:
    open(os.path.join(os.environ["HF_HOME"], "probe"), "x").close()
except OSError:
    repo, commit = sys.argv[1:]
    folders = [local_folder(f"hub:{repo}@{revision}") for revision in (commit, "main")]
    constants.HF_HUB_OFFLINE = True
    folders += [local_folder(f"hub:{repo}@{revision}") for revision in (commit[:7], "main")]
    constants.HF_HOME = os.path.join(constants.HF_HOME, "locked", "home")
    folders.append(local_folder(f"hub:{repo}@{commit}"))
    tempfile.tempdir = os.environ["HF_HOME"]
    try:
        local_folder(f"hub:{repo}@{commit}")
        reason = ""
    except DataError as error:
        reason = str(error)
    constants.HF_HUB_OFFLINE = False
    try:
        pull_profile(repo, revision="next")
        missing = ""
    except DataError as error:
        missing = str(error)
    names = [ProfileStore(folder).names() for folder in folders]
    print(json.dumps({"folders": list(map(str, folders)), "names": names, "reason": reason, "missing": missing}))
"""


def heed_permissions():
    """Give up CAP_DAC_OVERRIDE before an exec, if it can be: with it, root is above permissions."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


def test_what_is_cached_is_served_from_a_home_that_cannot_be_written(hub, tmp_path):
    """An image pulls the profiles when it is built, and runs read-only."""
    commit = push_profile([vqa(), ocr()], REPO)
    pull_profiles(REPO)
    hub.repos[REPO].commit({**hub.repos[REPO].files(), "vqa.safetensors": b"new"}, "next")
    home = tmp_path / "home"
    for folder in (tmp_path / "tmp", home / "locked"):
        folder.mkdir()
    for folder in (home, *(path for path in home.rglob("*") if path.is_dir())):
        folder.chmod(0o000 if folder.name == "locked" else 0o555)
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_HUB_OFFLINE": "0",
        "TMPDIR": str(tmp_path / "tmp"),
    }
    command = [sys.executable, "-c", READ_ONLY, REPO, commit]
    done = subprocess.run(command, env=env, capture_output=True, text=True, preexec_fn=heed_permissions)
    for folder in (home, *(path for path in home.rglob("*") if path.is_dir())):
        folder.chmod(0o755)
    assert (done.returncode, done.stderr) == (0, "")
    if not done.stdout:
        pytest.skip("this user may write to read-only folders (root that cannot give up CAP_DAC_OVERRIDE)")
    found = json.loads(done.stdout)
    assert found["names"] == [["ocr", "vqa"]] * 5
    assert all(Path(folder).is_relative_to(tmp_path / "tmp") for folder in found["folders"])
    assert ProfileStore(found["folders"][0]).get("vqa") == vqa()
    assert re.search(r"no temporary folder .* set HF_HOME or TMPDIR .* `hones pull org/profiles --out", found["reason"])
    assert "Permission denied; the cache must be readable, and writable for what is not in it yet" in found["missing"]
    assert not (home / "hones-steer").exists()


@pytest.mark.usefixtures("hub")
def test_serve_takes_a_repository():
    from hones_serving.commands import launch

    commit = push_profile(vqa(), REPO)
    _, environment = launch(["org/tiny", "--profiles", f"hub:{REPO}@{commit}", "--engine", "transformers"], {}, set())
    assert environment["HONES_PROFILES"] == str(local_folder(f"hub:{REPO}@{commit}"))


# Commands -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hub")
def test_the_commands(tmp_path, capsys):
    for profile in (vqa(), ocr()):
        save_profile(profile, tmp_path / f"{profile.task}.safetensors")
    files = [str(tmp_path / name) for name in ("vqa.safetensors", "ocr.safetensors")]
    assert push([REPO, *files, "--private", "--json"]) == 0
    commit = json.loads(capsys.readouterr().out)["commit"]
    assert pull([REPO, "--out", str(tmp_path / "new" / "pulled")]) == 0
    assert f"from hub:{REPO}@{commit}" in capsys.readouterr().out
    assert load_profile(tmp_path / "new" / "pulled" / "vqa.safetensors") == vqa()
    assert pull([REPO, "--out", str(tmp_path / "one"), "--task", "ocr", "--revision", commit, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["profiles"]["ocr"]["digest"] == ocr().digest
    assert [file.name for file in (tmp_path / "one").iterdir()] == ["ocr.safetensors"]


def test_hf_endpoint_decides_which_hub(hub, tmp_path):
    """Pulling takes only the environment variables that huggingface_hub reads, and no torch."""
    push_profile(vqa(), REPO)
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    env |= {"HF_HOME": str(tmp_path / "elsewhere"), "HF_HUB_CACHE": str(tmp_path / "elsewhere" / "hub")}
    code = "import sys; from hones_steer.cli.hub_commands import pull; pull(sys.argv[1:])\n"
    code += "assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, REPO, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert load_profile(tmp_path / "out" / "vqa.safetensors") == vqa()
