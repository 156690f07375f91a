"""What a recipe will need of memory, before it runs."""

from peftkit.forecast.skeleton import Skeleton
from peftkit.forecast.step import Forecast, Generation, Workload, forecast

__all__ = ["Forecast", "Generation", "Skeleton", "Workload", "forecast"]
