"""KV connectors of vLLM: those whose stores never hand one steering's cache to another, and the others by name.

A store finds a block of the KV cache by a key. vLLM's own block hashes hold the request's cache salt, and so the
profile's digest; a connector that takes them for its keys can be used, once a test has looked for wrong hits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

CERTIFIED = ("OffloadingConnector", "SimpleCPUOffloadConnector")
# Where they keep blocks, by an option of theirs, with the default that is certified.
_PLACES = {
    "OffloadingConnector": ("spec_name", "CPUOffloadingSpec", "spec"),
    "SimpleCPUOffloadConnector": ("kv_offload_backend", "cpu", "backend"),
}

# These hold the salt as well, but no test runs them; the first has nothing else of the hashes.
_BY_SALT = ("LMCacheMPConnector",)
_UNTESTED = (*_BY_SALT, "MooncakeStoreConnector")

_BY_TOKENS = "it finds blocks by their tokens alone, so one steering's cache would go to another"
_FROM_ELSEWHERE = "it takes over what another server has computed, and nothing says how that one steered"
_REFUSED = {
    "ExampleConnector": _BY_TOKENS,
    "HF3FSKVConnector": _BY_TOKENS,
    "LMCacheConnectorV1": _BY_TOKENS,
    "NixlConnector": _FROM_ELSEWHERE,
    "NixlPullConnector": _FROM_ELSEWHERE,
    "NixlPushConnector": _FROM_ELSEWHERE,
    "MooncakeConnector": _FROM_ELSEWHERE,
    "MoRIIOConnector": _FROM_ELSEWHERE,
    "DecodeBenchConnector": "it fills the cache with made-up values",
}


def unsupported(transfer: Any) -> list[str]:
    """Names, each with a reason, of the connectors in vLLM's KVTransferConfig (or None) that would steer wrongly."""
    return [
        f"the KV connector {name} ({reason})"
        for name, module, _ in _connectors(transfer)
        if (reason := _reason(name, module)) is not None
    ]


def untested(transfer: Any) -> list[str]:
    """Names of the connectors in vLLM's KVTransferConfig (or None) that may well work, but that no test runs."""
    names = []
    for name, module, options in _connectors(transfer):
        if module is None and name in _UNTESTED:
            names.append(f"the KV connector {name}")
        elif name in _PLACES:
            option, certified, kind = _PLACES[name]
            if (place := options.get(option, certified)) != certified:
                names.append(f"the offloading {kind} {place}")
    return names


def by_salt(transfer: Any) -> str | None:
    """The name of a connector in vLLM's KVTransferConfig (or None) whose keys have the cache salt, but not the hashes.

    Such keys do not tell a prompt from an answer of the same tokens.
    """
    return next((name for name, _, _ in _connectors(transfer) if name in _BY_SALT), None)


def _reason(name: str, module: str | None) -> str | None:
    """Why a connector cannot be used; None if it can, or may. `module` is the user's own that defines it, if any."""
    if module is not None:
        return "it is not vLLM's own, so nobody knows by what it finds blocks"
    if name in CERTIFIED or name in _UNTESTED:
        return None
    return _REFUSED.get(name, "hones-steer does not know by what it finds blocks")


def _connectors(transfer: Any) -> Iterator[tuple[str, str | None, Mapping[str, Any]]]:
    """Yield (name, module, options) of each connector of a KVTransferConfig, those in a MultiConnector one by one."""
    if transfer is None or transfer.kv_connector is None:
        return
    options = transfer.kv_connector_extra_config
    yield from _leaves(transfer.kv_connector, transfer.kv_connector_module_path, options)


def _leaves(
    name: str, module: str | None, options: Mapping[str, Any]
) -> Iterator[tuple[str, str | None, Mapping[str, Any]]]:
    if name != "MultiConnector" or module is not None:
        yield name, module, options
        return
    for inner in options.get("connectors", ()):
        inner_options = inner.get("kv_connector_extra_config", {})
        yield from _leaves(inner["kv_connector"], inner.get("kv_connector_module_path"), inner_options)
