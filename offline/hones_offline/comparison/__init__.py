"""Methods compared over tasks, sizes and seeds: what masking and steering their banks does to every task."""

from hones_offline.comparison.comparison import Comparison, compare, header
from hones_offline.comparison.steering import steering_row

__all__ = ["Comparison", "compare", "header", "steering_row"]
