"""Profiles on the Hugging Face Hub: repositories with one or more of them.

A repository holds `<task>.safetensors` for each profile, a generated model card, and `hones_profiles.json`, which lists
each file's sha256 and its profile's digest. Every download is checked against both. Downloads go through
huggingface_hub's cache: with a commit as revision, cached files need no network, and reading them needs no permission
to write into the cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi, constants, errors
from huggingface_hub.file_download import repo_folder_name

from hones_steer.errors import DataError, MismatchError, ProfileError
from hones_steer.export.cards import GENERATED, hub_card
from hones_steer.files import new_folder
from hones_steer.profile import Profile, file_sha256, is_task_name, load_profile, serialize_profile
from hones_steer.store import SUFFIX, ProfileStore, known_tasks
from hones_steer.strict_json import parse_object

MANIFEST, CARD = "hones_profiles.json", "README.md"
MANIFEST_FORMAT = 1

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHORT_COMMIT = re.compile(r"[0-9a-f]{7,40}")
_SPEC = re.compile(r"hub:(?P<repo>[^@\s]+)(?:@(?P<revision>[^@\s]+))?")


@dataclass(frozen=True)
class Entry:
    """A manifest's entry for one profile: the sha256 of its file, and its digest."""

    sha256: str
    digest: str


@dataclass(frozen=True)
class Pulled:
    """Profiles of one commit of a repository, and all entries of its manifest, both by task."""

    repo: str
    commit: str
    profiles: Mapping[str, Profile]
    listed: Mapping[str, Entry]


def push_profile(
    profile: Profile | Sequence[Profile],
    repo: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Add profiles to a repository, made if it does not exist, in one commit; return the commit's hash.

    Profiles of other tasks stay; one of the same task is replaced. The model card is written anew. `revision` is a
    branch that exists (default: main); `private` is for a new repository; `token` is by default the one of
    `hf auth login`.

    Raises:
        ProfileError: no profile, or two for one task.
        MismatchError: the repository's profiles are for another model.
        DataError: no permission, no network, or somebody else pushed meanwhile.
    """
    additions = [profile] if isinstance(profile, Profile) else list(profile)
    tasks = [each.task for each in additions]
    if not additions or len(set(tasks)) < len(tasks):
        raise ProfileError(
            f"the profiles to push are for {', '.join(tasks) or 'no task'}; give one or more, one per task"
        )
    api = HfApi(token=token)
    with _hub_errors(f"{repo}: cannot be pushed to"):
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        parent = api.repo_info(name, revision=revision).sha
        assert parent is not None  # a repository has a first commit
        has_profiles = api.file_exists(name, MANIFEST, revision=parent)
        listed = _pull(name, parent, [], token).listed if has_profiles else {}
        kept = [task for task in listed if task not in tasks]  # the others are replaced, and may be damaged
        kept_profiles = _pull(name, parent, kept, token).profiles if kept else {}
        profiles = {**kept_profiles, **{each.task: each for each in additions}}
        _require_one_model(name, list(profiles.values()))
        has_card = api.file_exists(name, CARD, revision=parent)
        custom_card = has_card and GENERATED not in _text(name, CARD, parent, token)
        if custom_card:
            warnings.warn(f"{name}: its {CARD} is not ours and is kept; describe the new profiles there", stacklevel=2)
        files = {each.task + SUFFIX: serialize_profile(each) for each in additions}
        files[MANIFEST] = _manifest({**listed, **{each.task: _entry(each) for each in additions}})
        if not custom_card:
            files[CARD] = hub_card(name, [profiles[task] for task in sorted(profiles)]).encode()
        commit = api.create_commit(
            name,
            operations=[CommitOperationAdd(path, data) for path, data in files.items()],
            commit_message=message or f"hones push: {', '.join(tasks)}",
            revision=revision,
            parent_commit=parent,
        )
    return str(commit.oid)


def pull_profile(
    repo: str, task: str | None = None, *, revision: str | None = None, token: str | None = None
) -> Profile:
    """Download a profile and check it; `task` may be left out where the repository has only one.

    `revision` is a branch, a tag or a commit (default: main); only a commit always means the same profile. Of a commit
    that is in the cache, 7 letters are enough.

    Raises:
        ProfileError: the repository has no profiles, none for `task`, or several where `task` is None; or a file is not
            what the repository's `hones_profiles.json` says.
        DataError: no such repository or revision, no permission, no network, or a cache that cannot be read, or not
            written where something must be downloaded.
    """
    pulled = pull_profiles(repo, None if task is None else [task], revision=revision, token=token)
    if len(pulled.profiles) > 1:
        names = list(pulled.profiles)
        listing = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise ProfileError(f"{repo}: has {len(names):,} profiles ({listing}); name the task")
    return next(iter(pulled.profiles.values()))


def pull_profiles(
    repo: str, tasks: Sequence[str] | None = None, *, revision: str | None = None, token: str | None = None
) -> Pulled:
    """Download the profiles of these tasks (None: all) from one commit. Raises as `pull_profile` does."""
    with _hub_errors(f"{repo}{f'@{revision}' if revision else ''}: cannot be pulled"):
        return _pull(repo, revision, tasks, token)


def local_folder(spec: str) -> Path:
    """Download and check the profiles of "hub:org/name" or "hub:org/name@revision"; return the folder they are in.

    The folder holds plain files and lies under huggingface_hub's home, one for each commit; if the home cannot be
    written, it is a new temporary folder.

    Raises:
        ProfileError, DataError: as `pull_profile` does, or `spec` is not of this form.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise DataError(f"{spec!r} names no repository; write hub:ORG/NAME or hub:ORG/NAME@REVISION")
    pulled = pull_profiles(match["repo"], revision=match["revision"])
    folder = Path(constants.HF_HOME, "hones-steer", pulled.repo.replace("/", "--"), pulled.commit)
    if not os.access(folder, os.R_OK | os.X_OK):
        folder = _copied(pulled, folder)
    store = ProfileStore(folder)
    for task in sorted({*pulled.profiles, *store.names()}):
        file = store.folder / (task + SUFFIX)
        if task not in pulled.profiles:
            change = "was added"
        elif not file.exists():
            change = "was deleted"
        elif file.read_bytes() != serialize_profile(pulled.profiles[task]):
            change = "was changed"
        else:
            continue
        raise ProfileError(f"{file}: {change} after the download; delete {folder}, and it is made anew")
    return folder


def _copied(pulled: Pulled, folder: Path) -> Path:
    """Write the profiles into `folder`, or if that cannot be written into a temporary one; return the one written."""
    try:
        _copy(pulled, folder)
    except (DataError, OSError) as error:
        if os.access(folder, os.R_OK | os.X_OK):  # another server has made it meanwhile
            return folder
        try:
            folder = Path(tempfile.mkdtemp(prefix="hones-"), pulled.commit)
            _copy(pulled, folder)
        except (DataError, OSError) as second:
            raise DataError(
                f"{error}, and no temporary folder can be either ({second}); set HF_HOME or TMPDIR to a folder that "
                f"can, or serve the folder that `hones pull {pulled.repo} --out FOLDER` has written before"
            ) from second
    return folder


def _copy(pulled: Pulled, folder: Path) -> None:
    with new_folder(folder) as temporary:
        for task, profile in pulled.profiles.items():
            (temporary / (task + SUFFIX)).write_bytes(serialize_profile(profile))


# Reading ------------------------------------------------------------------------------------------


def _pull(repo: str, revision: str | None, tasks: Sequence[str] | None, token: str | None) -> Pulled:
    revision = _full_commit(repo, revision)
    # The download alone would, without a network, silently return what is in the cache.
    present = _present_commit(repo, revision, token)
    file = _download(repo, MANIFEST, revision, token)
    commit = file.parent.name  # the snapshot's, and so that of every file read below
    if present not in (None, commit):
        raise DataError(f"{repo}: {revision or 'main'} is being changed; pull again")
    listed = _read_manifest(repo, file)
    for task in tasks or ():
        if task not in listed:
            hint = known_tasks(task, listed, f"its {MANIFEST}")
            raise ProfileError(f"{repo}: has no profile for the task {task!r}; {hint}")
    selected = [task for task in listed if tasks is None or task in tasks]
    profiles = {task: _checked(repo, commit, task, listed[task], token) for task in selected}
    return Pulled(repo, commit, profiles, listed)


def _full_commit(repo: str, revision: str | None) -> str | None:
    """The whole commit, if `revision` is the beginning of one in the cache and no branch or tag; else `revision`."""
    short = (revision or "").lower()
    if revision is None or not _SHORT_COMMIT.fullmatch(short):
        return revision
    if len(short) == 40:
        return short
    cache = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"))
    if (cache / "refs" / revision).is_file():
        return revision
    commits = sorted(folder.name for folder in cache.glob(f"snapshots/{short}*") if _COMMIT.fullmatch(folder.name))
    if len(commits) > 1:
        raise DataError(f"{repo}: {revision} may be any of {', '.join(commits)}; write the whole commit")
    return commits[0] if commits else revision


def _present_commit(repo: str, revision: str | None, token: str | None) -> str | None:
    """The commit that a branch or tag names at present; None if `revision` is a commit, or with HF_HUB_OFFLINE."""
    if constants.HF_HUB_OFFLINE or (revision and _COMMIT.fullmatch(revision)):
        return None
    return HfApi(token=token).repo_info(repo, revision=revision).sha


def _read_manifest(repo: str, file: Path) -> dict[str, Entry]:
    try:
        manifest = parse_object(file.read_bytes(), MANIFEST, ProfileError)
        if manifest["format"] != MANIFEST_FORMAT:
            raise ProfileError(f"{MANIFEST} has the format {manifest['format']!r}; upgrade hones-steer")
        listed = {task: Entry(str(e["sha256"]), str(e["digest"])) for task, e in manifest["profiles"].items()}
        if invalid := [task for task in listed if not is_task_name(task)]:
            raise ProfileError(f"{MANIFEST} lists {invalid[0]!r}, which is no task's name; push the profiles again")
        if not listed:
            raise ProfileError(f"{MANIFEST} lists no profiles; push one")
    except ProfileError as error:
        raise ProfileError(f"{repo}: {error}") from error
    except (KeyError, AttributeError, TypeError) as error:
        raise ProfileError(
            f"{repo}: {MANIFEST} is damaged ({error!r}); delete it there and push the profiles again"
        ) from error
    return dict(sorted(listed.items()))


def _checked(repo: str, commit: str, task: str, expected: Entry, token: str | None) -> Profile:
    file = _download(repo, task + SUFFIX, commit, token)
    sha256 = file_sha256(file)
    if sha256 != expected.sha256:
        raise ProfileError(
            f"{repo}: {task}{SUFFIX} has the sha256 {sha256[:12]} where {MANIFEST} has {expected.sha256[:12]}: the "
            f"download is damaged or the file was replaced by hand; delete {file} and pull again, or push it again"
        )
    profile = load_profile(file)
    if (profile.digest, profile.task) != (expected.digest, task):
        raise ProfileError(
            f"{repo}: {task}{SUFFIX} holds {profile.task!r} with digest {profile.short_digest} where {MANIFEST} has "
            f"{task!r} with {expected.digest[:12]}; push the profile again"
        )
    return profile


def _download(repo: str, file: str, revision: str | None, token: str | None) -> Path:
    try:
        return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision, token=token))
    except errors.LocalEntryNotFoundError as error:
        where = f"{repo}@{revision}" if revision else repo
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        raise DataError(
            f"{where}: cannot be pulled: {offline}, and its {file} is not in the cache; pull it once with a network"
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        where = f"{repo}@{revision}" if revision else repo
        reason = "it holds no profiles" if file == MANIFEST else f"{MANIFEST} lists it"
        raise ProfileError(f"{where}: has no {file}, and {reason}; publish profiles with hones push") from error


def _text(repo: str, file: str, commit: str, token: str | None) -> str:
    return _download(repo, file, commit, token).read_text(encoding="utf-8", errors="replace")


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """Turn errors of huggingface_hub inside the block into a DataError whose sentence begins with `what`."""
    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise DataError(f"{what}: HF_HUB_OFFLINE is set; unset it") from error
    except errors.GatedRepoError as error:
        raise DataError(f"{what}: access must be granted on its page first; ask there, then hf auth login") from error
    except errors.RevisionNotFoundError as error:
        raise DataError(
            f"{what}: there is no such branch, tag or commit; write one that there is, a commit with all 40 letters"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(f"{what}: there is no such repository, or it is private; see hf auth login") from error
    except errors.HFValidationError as error:
        raise DataError(f"{what}: not the name of a repository; write ORG/NAME") from error
    except errors.HfHubHTTPError as error:
        raise DataError(f"{what}: {_http_reason(error)}") from error
    except OSError as error:
        file = f"{error.filename}: " if error.filename is not None else ""
        raise DataError(
            f"{what}: {file}{error.strerror or error}; the cache must be readable, and writable for what is not in it "
            "yet: set HF_HOME to a folder that is"
        ) from error
    except (RuntimeError, ValueError) as error:  # an upload that failed in another thread
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())
        raise DataError(f"{what}: {reason}") from error
    except huggingface_hub.utils.httpx.HTTPError as error:  # type: ignore[attr-defined]  # it is, dynamically
        raise DataError(
            f"{what}: {constants.ENDPOINT} cannot be reached ({error}); what is in the cache can be had by its "
            "commit as revision, or with HF_HUB_OFFLINE=1"
        ) from error


def _http_reason(error: errors.HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 412:
        return "somebody else has pushed meanwhile; push again"
    if status in (401, 403):
        return f"not permitted (HTTP {status}); use a token with write access (hf auth login)"
    return f"the Hub answered HTTP {status} {error.server_message or ''}".strip()


# Writing ------------------------------------------------------------------------------------------


def _require_one_model(repo: str, profiles: Sequence[Profile]) -> None:
    for profile in profiles[1:]:
        try:
            profiles[0].base_model.require_same(profile.base_model)
        except MismatchError as error:
            raise MismatchError(f"{repo}: a repository holds profiles of one model; {error}") from error


def _entry(profile: Profile) -> Entry:
    return Entry(hashlib.sha256(serialize_profile(profile)).hexdigest(), profile.digest)


def _manifest(entries: Mapping[str, Entry]) -> bytes:
    content = {"format": MANIFEST_FORMAT, "profiles": {task: asdict(entry) for task, entry in entries.items()}}
    return json.dumps(content, indent=2, sort_keys=True).encode() + b"\n"
