"""Files and folders appear whole or not at all, whatever happens meanwhile."""

import subprocess
import sys
from pathlib import Path

import pytest

from hones_steer.errors import DataError, ProfileError
from hones_steer.files import is_leftover, new_folder, write_atomically

FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from hones_steer.errors import DataError
from hones_steer.files import write_atomically
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing fails as it does on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for name in sys.argv[1:]:
    try:
        write_atomically(Path(name), b"n" * 2000)
    except DataError as error:
        print(error)
"""


def fill_the_disk(*files: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", FULL_DISK, *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    old = tmp_path / "step.json"
    write_atomically(old, b"old")
    result = fill_the_disk(old, tmp_path / "new" / "folder" / "step.json")
    assert result.stderr == ""
    first, second = result.stdout.splitlines()
    assert first == f"{old}: cannot be written: File too large"
    assert "folder/step.json: cannot be written: File too large" in second
    assert old.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [old]  # no folder either


def test_an_interrupt_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "new" / "file", b"x")
    assert list(tmp_path.iterdir()) == []


def test_files_may_be_read_by_whom_the_umask_says(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"x")
    (tmp_path / "plain").write_bytes(b"x")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_missing_folder_is_made_only_where_that_is_wanted(tmp_path: Path) -> None:
    file = tmp_path / "new" / "file"
    with pytest.raises(ProfileError, match="new/file: cannot be written: No such file or directory"):
        write_atomically(file, b"x", parents=False, error_type=ProfileError)
    assert list(tmp_path.iterdir()) == []
    write_atomically(file, b"x")
    assert file.read_bytes() == b"x"


def test_a_folder_appears_when_its_block_ends_well(tmp_path: Path) -> None:
    with new_folder(tmp_path / "new" / "folder") as temporary:
        (temporary / "file").write_bytes(b"x")
        assert not (tmp_path / "new" / "folder").exists()
        assert not is_leftover(temporary)  # which a run folder may delete, and a folder is none
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["file"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["folder"]


def test_a_folder_whose_block_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "file").write_bytes(b"x")
        raise KeyError

    with pytest.raises(KeyError), new_folder(tmp_path / "new" / "folder") as temporary:
        fail(temporary)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(DataError, match="exists already; name a new folder"), new_folder(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
