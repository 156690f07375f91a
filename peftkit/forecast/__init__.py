"""What a recipe will need of memory, before it runs: `trace` counts, `skeleton` is the model, `step` the run, `fit` compares with what there is."""

from peftkit.forecast.fit import Budget, Plan, Row, Sizes, budget, largest_micro_batch, of_micro_batch, of_recipe, plan_of, sizes_of, with_micro_batch, worst
from peftkit.forecast.skeleton import Skeleton, state_bytes
from peftkit.forecast.step import Forecast, Generation, Workload, forecast

__all__ = [
    "Budget",
    "Forecast",
    "Generation",
    "Plan",
    "Row",
    "Sizes",
    "Skeleton",
    "Workload",
    "budget",
    "forecast",
    "largest_micro_batch",
    "of_micro_batch",
    "of_recipe",
    "plan_of",
    "sizes_of",
    "state_bytes",
    "with_micro_batch",
    "worst",
]
