"""The safetensors file that a profile is kept in: its size, its header, and the names and types of its tensors."""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Mapping
from typing import Any

from hones_steer.errors import ProfileError
from hones_steer.ffn_scales import check_ffn
from hones_steer.ffns import DENSE, EXPERTS, Ffn
from hones_steer.identity import ModelIdentity
from hones_steer.json_values import shown
from hones_steer.strict_json import parse_object

MAX_FILE_BYTES = 64 * 2**20
MAX_HEADER_BYTES = 4 * 2**20
METADATA_KEY = "hones_steer"
TENSOR_DTYPES = {"neurons": "I32", "scales": "F32", "index": "I32"}  # in the order of the fields of `Entries`

_TENSOR_NAME = re.compile(r"layers\.(0|[1-9][0-9]{0,8})(?:\.(shared|experts))?\.(neurons|scales|index)")


def read_bounded(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file; raises ProfileError if it is no regular file or larger than 64 MiB, and OSError."""
    # Non-blocking, or opening a FIFO would wait for a writer forever.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ProfileError("is not a regular file; give the path of a profile (.safetensors)")
        data = b"" if status.st_size > MAX_FILE_BYTES else file.read(MAX_FILE_BYTES + 1)
    if status.st_size > MAX_FILE_BYTES or len(data) > MAX_FILE_BYTES:
        raise ProfileError(f"is larger than 64 MiB ({status.st_size:,} bytes); a profile has a few kilobytes")
    return data


def header_length(data: bytes) -> int:
    """Number of bytes of the header that the bytes of a safetensors file begin with."""
    length: int = struct.unpack("<Q", data[:8])[0]
    return length


def parse_header(data: bytes) -> dict[str, Any]:
    """Parse the header; raises ProfileError if it is cut short, too large, or no JSON object."""
    if len(data) < 8:
        raise ProfileError(f"not a safetensors file: {len(data)} bytes are too few for a header")
    length = header_length(data)
    if length > len(data) - 8:
        raise ProfileError(
            f"not a safetensors file, or a truncated one: the header claims {length} bytes of {len(data) - 8}"
        )
    if length > MAX_HEADER_BYTES:
        raise ProfileError(f"the safetensors header has {length:,} bytes, more than the 4 MiB allowed")
    return parse_object(data[8 : 8 + length], "the safetensors header", ProfileError)


def metadata_text(entry: object) -> str:
    """The text of our key in the header's `__metadata__`; raises ProfileError if there is none, or anything beside."""
    if not isinstance(entry, dict) or METADATA_KEY not in entry:
        raise ProfileError(f"not a steering profile: __metadata__ has no key {METADATA_KEY!r}")
    if len(entry) > 1:
        extra = next(key for key in entry if key != METADATA_KEY)
        raise ProfileError(f"__metadata__ has the key {shown(extra)} beside {METADATA_KEY!r}, the only one allowed")
    text = entry[METADATA_KEY]
    if not isinstance(text, str):
        raise ProfileError(f"__metadata__.{METADATA_KEY} is not a string")
    return text


def listed_groups(header: Mapping[str, Any], base_model: ModelIdentity) -> list[Ffn]:
    """Check the tensors' names and types; return the groups of FFNs (see `FfnScales`) that they are of."""
    groups: dict[Ffn, set[str]] = {}
    for name, entry in header.items():
        match = _TENSOR_NAME.fullmatch(name)
        part = DENSE if match is None else match[2] or DENSE
        if match is None or (match[3] == "index" and part != EXPERTS) or (part != DENSE and base_model.format == 1):
            belong = "layers.<l>.neurons and layers.<l>.scales"
            if base_model.format == 2:
                belong = "layers.<l>[.shared|.experts].neurons|scales and layers.<l>.experts.index"
            raise ProfileError(f"unexpected tensor {shown(name)}; only {belong} belong here")
        ffn, kind = Ffn(int(match[1]), part), match[3]
        check_ffn(ffn, base_model)
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        if dtype != TENSOR_DTYPES[kind]:
            raise ProfileError(f"tensor {name} has dtype {shown(dtype)}, expected {TENSOR_DTYPES[kind]}")
        groups.setdefault(ffn, set()).add(kind)
    for ffn, kinds in groups.items():
        needed = TENSOR_DTYPES.keys() - (set() if ffn.part == EXPERTS else {"index"})
        for kind in sorted(needed - kinds):
            raise ProfileError(f"tensor {ffn.prefix}.{kind} is missing")
    return list(groups)
