"""Averaging and arithmetic of adapters: `average(folders, weights, output) -> AverageReport`."""

from peftkit.average.combine import AverageReport, average

__all__ = ["AverageReport", "average"]
