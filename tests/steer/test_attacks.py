"""Broken files (`attacks/`), each refused with a sentence that names the file and the culprit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from steer.make_attacks import FOLDER, attacks, build, build_2, with_metadata

from hones_steer import ProfileError, load_profile
from hones_steer.profile import MAX_FILE_BYTES, MAX_HEADER_BYTES

ATTACKS = attacks()


def test_the_files_the_attacks_deviate_from_are_sound(tmp_path: Path) -> None:
    path = tmp_path / "sound.safetensors"
    for data, neurons in ((build(), 5), (build_2(), 6)):
        path.write_bytes(data)
        assert load_profile(path).num_neurons == neurons


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_refused(name: str) -> None:
    path = FOLDER / f"{name}.safetensors"
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert ATTACKS[name].message in message
    assert len(message) < len(str(path)) + 250
    assert message.isprintable()


def test_the_committed_files_are_what_the_script_makes() -> None:
    committed = {path.stem: path.read_bytes() for path in FOLDER.iterdir()}
    assert committed == {name: attack.data for name, attack in ATTACKS.items()}


def test_a_file_beyond_64_mib_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    path.write_bytes(build())
    os.truncate(path, MAX_FILE_BYTES + 1)  # sparse
    with pytest.raises(ProfileError, match="larger than 64 MiB"):
        load_profile(path)


def test_a_file_of_exactly_64_mib_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    path.write_bytes(build())
    os.truncate(path, MAX_FILE_BYTES)
    with pytest.raises(ProfileError, match="not a sound safetensors file"):
        load_profile(path)


def test_a_header_beyond_4_mib_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    path.write_bytes(with_metadata(description="a" * MAX_HEADER_BYTES))
    with pytest.raises(ProfileError, match=r"header has 4,[0-9,]+ bytes, more than the 4 MiB allowed"):
        load_profile(path)


def test_what_is_not_a_regular_file_is_refused(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.safetensors"
    os.mkfifo(fifo)
    with pytest.raises(ProfileError, match="not a regular file"):
        load_profile(fifo)
    with pytest.raises(ProfileError, match="Is a directory"):
        load_profile(tmp_path)


def test_a_missing_or_unreachable_file(tmp_path: Path) -> None:
    missing, loop = tmp_path / "missing.safetensors", tmp_path / "loop.safetensors"
    loop.symlink_to(loop)
    for path in (missing, loop):
        with pytest.raises(ProfileError, match=f"{path}: cannot be read"):
            load_profile(path)
