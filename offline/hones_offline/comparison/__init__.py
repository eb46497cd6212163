"""Methods compared over tasks, sizes and seeds: what masking and steering their banks does to every task."""

from hones_offline.comparison.comparison import compare

__all__ = ["compare"]
