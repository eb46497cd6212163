"""Segments in buckets of similar length, so that many copies of all of them cost least."""

from collections.abc import Iterator, Sequence

from hones_offline.running.batching import PrefixBatch, Run, Segment, gib
from hones_offline.running.cache import KVCache
from hones_offline.running.decoder import TextDecoder
from hones_offline.running.execution import Execution


class LengthBuckets:
    """Segments in buckets of similar length, each the rows of one forward; a prefix that all share runs once for them.

    Iterating gives each bucket's (numbers of its segments, batch).
    """

    def __init__(
        self, decoder: TextDecoder, segments: Sequence[Segment], tail: Sequence[int], execution: Execution
    ) -> None:
        """Prepare segments of which the hidden states of the last `tail[i]` tokens will be read.

        A bucket has at most `execution.batch_size` of them.
        """
        shared = decoder.shared_length(segments, tail)
        heads = max(layer.num_heads or 1 for layer in decoder.layout.layers)
        self.items = cut_buckets([len(segment) - shared for segment in segments], heads, execution.batch_size)
        self.batches = [
            decoder.prefix_batch([segments[i] for i in bucket], [tail[i] for i in bucket], shared)
            for bucket in self.items
        ]
        self.token_count = shared + sum(batch.token_count - shared for batch in self.batches)
        """Tokens that one copy of all segments runs, padding included."""
        cache_tokens = gib(execution.memory_gb) // decoder.cache_token_bytes(segments[0]) if shared else 0
        self.copies = min(
            batch.copies_at_once(batch_size=execution.batch_size, cache_tokens=cache_tokens) for batch in self.batches
        )
        """How many copies of all segments fit a forward."""

    def __iter__(self) -> Iterator[tuple[list[int], PrefixBatch]]:
        return zip(self.items, self.batches, strict=True)

    def run_prefix(self, run: Run) -> KVCache | None:
        """Run the prefix that all share, for `PrefixBatch.run_rest` of each bucket."""
        return self.batches[0].run_prefix(run)


def cut_buckets(lengths: Sequence[int], copies: int, most: int) -> list[list[int]]:
    """Indices in buckets of similar length, at most `most` in one, so that `copies` of all are run at least cost.

    The cost is the number of tokens run, padding included, and that of some tokens more for each forward.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    costs, starts = [0], [0]  # of the first n segments in order: the least cost, and where its last bucket starts
    for end in range(1, len(order) + 1):
        widest = lengths[order[end - 1]]
        options = [
            (costs[start] + copies * (end - start) * widest + _FORWARD, start)
            for start in range(max(0, end - most), end)
        ]
        cost, start = min(options)
        costs.append(cost)
        starts.append(start)
    buckets: list[list[int]] = []
    end = len(order)
    while end:
        buckets.append(order[starts[end] : end])
        end = starts[end]
    return buckets[::-1]


_FORWARD = 100  # tokens; SmolLM2-135M on a CPU: about 60
