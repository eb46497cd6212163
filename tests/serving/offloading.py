"""Movers of KV blocks for engines on CPUs: vLLM's offloading connectors have theirs for GPUs only.

A mover is told which block of the cache goes to which place of the store, or back. What is stored, under which key, and
what is found again is decided before, by vLLM's own code.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch


class Mover:
    """Moves blocks for OffloadingConnector, as vLLM's `OffloadingWorker` does: each job is done at once."""

    def __init__(self, spec: Any, caches: Any) -> None:
        assert spec.blocks_per_chunk == 1
        self._cached = [cache.tensor for cache in caches.tensors]
        self._stored = [torch.zeros(spec.num_chunks, *cache.shape[1:], dtype=cache.dtype) for cache in self._cached]
        self._done: list[Any] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Copy blocks of the cache to the store."""
        return self._move(job_id, self._cached, src_spec, self._stored, dst_spec)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Copy blocks of the store to the cache."""
        return self._move(job_id, self._stored, src_spec, self._cached, dst_spec)

    def _move(self, job_id: int, sources: Any, src_spec: Any, targets: Any, dst_spec: Any) -> bool:
        from vllm.v1.kv_offload.base import TransferResult

        for source, target in zip(sources, targets, strict=True):
            target[dst_spec.block_ids] = source[src_spec.block_ids]
        self._done.append(TransferResult(job_id=job_id, success=True))
        return True

    def get_finished(self) -> list[Any]:
        """The jobs that were done since the last call."""
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """Nothing to wait for."""

    def shutdown(self) -> None:
        """Nothing to end."""


class Done:
    """A `torch.Event` of what is done at once."""

    def record(self, *_: Any) -> None:
        """Nothing to record."""

    def query(self) -> bool:
        """Whether it has happened."""
        return True


class Copier:
    """Moves blocks for SimpleCPUOffloadConnector, in the place of vLLM's `DmaCopyBackend`."""

    def init(self, cached: dict[str, torch.Tensor], stored: dict[str, torch.Tensor], *_: Any) -> None:
        """Note the blocks of the cache and the places of the store."""
        self._pairs = [(cached[name], stored[name]) for name in cached]

    def launch_copy(
        self,
        src_blocks: list[int],
        dst_blocks: list[int],
        *,
        is_store: bool,
        event_idx: int,
        events_list: Any,
        **_: Any,
    ) -> None:
        """Copy blocks to the store, or back."""
        for cached, stored in self._pairs:
            source, target = (cached, stored) if is_store else (stored, cached)
            target[dst_blocks] = source[src_blocks]
        events_list.append((event_idx, Done()))

    def shutdown(self) -> None:
        """Nothing to end."""


class Streams:
    """PyTorch with CUDA streams that do nothing."""

    Event = Done

    class cuda:  # noqa: N801 -- as in PyTorch
        """Parts of `torch.cuda` that a worker asks for."""

        @staticmethod
        def current_stream() -> None:
            """No stream."""

        class Stream(SimpleNamespace):
            """A stream."""

            @staticmethod
            def priority_range() -> tuple[int, int]:
                """Priorities, lowest first."""
                return 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def move_on_a_cpu(patch: pytest.MonkeyPatch) -> None:
    """Give vLLM's offloading connectors these movers."""
    from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
    from vllm.v1.simple_kv_offload import worker

    patch.setattr(CPUOffloadingSpec, "get_worker", lambda spec, caches: Mover(spec, caches))
    patch.setattr(worker, "DmaCopyBackend", Copier)
    patch.setattr(worker, "torch", Streams())
