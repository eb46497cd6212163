"""A run's summary as one HTML page, and as JSON."""

from hones_offline.report.page import report

__all__ = ["report"]
