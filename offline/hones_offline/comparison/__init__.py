"""Methods compared over tasks, sizes and seeds: what masking and steering their banks does to every task."""

from hones_offline.comparison.comparison import Comparison, compare, header, steering_row

__all__ = ["Comparison", "compare", "header", "steering_row"]
