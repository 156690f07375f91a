"""Suites: one recipe, several methods, tasks and seeds; and the cells they unfold into, addressed by their content."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from peftkit.amounts import parse_bytes
from peftkit.bench.keys import Code, key
from peftkit.config import Config, ConfigError, Keys, Source, read_yaml, suggest, validate

OWNED = {("train", "seed"): "list the seeds under 'seeds'", ("output_dir",): "each cell gets a folder of its own"}  # set by the harness
SAVES = 3  # checkpoints on the way of a cell that says nothing of it, so that a killed one goes on
SAVE_EVERY = 500  # steps between them for a recipe in epochs, whose length is known only once its data is read
FOLDER = Path("benchmarks/suites")
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")]  # becomes part of a folder's name
Rate = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Stage = Literal["search", "final", "timing"]


@dataclass(frozen=True)
class Metric:
    """How a value of a run's evaluation is compared."""

    asked_by: str
    """The entry of eval.metrics that measures it."""
    higher_better: bool = True
    answers: str | None = None
    """The set of predictions.jsonl whose single answers it is the mean of; None for a number without single answers."""


METRICS = {
    "exact_match": Metric("exact_match", answers="eval"),
    "choice_accuracy": Metric("choice_accuracy", answers="choices"),
    "loss": Metric("loss", higher_better=False),
    "perplexity": Metric("perplexity", higher_better=False),
    "rouge1": Metric("rouge"),
    "rouge2": Metric("rouge"),
    "rougeL": Metric("rouge"),
    "bleu": Metric("bleu"),
}


class Search(Config):
    """How a learning rate is chosen from several: by successive halving, on the loss of rows that the final runs are not judged by."""

    seeds: list[Seed] = Field([100], min_length=1)
    """Of the search's runs; other seeds than the final ones."""
    rungs: list[Annotated[int, Field(gt=0)]] = Field([40, 120], min_length=1)
    """Training steps of each rung: every rate is tried for the first, those that keep up for the next."""
    holdout: float = Field(0.05, gt=0, lt=1)
    """Share of the training rows that the rates are judged by; a recipe with a holdout of its own keeps that one."""

    @field_validator("rungs")
    @classmethod
    def _rising(cls, rungs: list[int]) -> list[int]:
        if rungs != sorted(set(rungs)):
            raise ValueError(f"each rung must take more steps than the one before, not {rungs}")
        return rungs


class Budget(Config):
    """What every method may spend on a final cell; one of the four."""

    steps: int | None = Field(None, gt=0)
    """Optimizer steps."""
    tokens: int | None = Field(None, gt=0)
    """Tokens trained on, to the nearest step; a short run counts a method's tokens per step."""
    seconds: float | None = Field(None, gt=0)
    """Seconds of training; a short run measures a method's seconds per step."""
    memory: str | None = None
    """Peak memory, such as 2GB: a cell that takes more counts as out of memory."""

    @model_validator(mode="after")
    def _one(self) -> Budget:
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            raise ValueError(f"give one of steps, tokens, seconds, memory, not {' and '.join(given) or 'none'}")
        if self.memory is not None:
            parse_bytes(self.memory)
        return self


class Timing(Config):
    """Cells that measure the step time of each method over that of the frozen base."""

    rounds: int = Field(15, gt=1)
    """Interleaved rounds of base and adapted steps."""


class Published(Config):
    """A number from a paper, shown beside ours."""

    method: str
    task: str = ""
    metric: str
    value: float
    source: str


class Suite(Config):
    """What to compare: every method times every task times every seed is one cell."""

    name: Name
    """Name of the suite, and of its folder."""
    recipe: dict[str, Any] | str
    """What all cells share: a recipe without output_dir, or the path of a recipe file, relative to the suite's file."""
    methods: dict[Name, dict[str, Any]] = Field(min_length=1)
    """Row name -> changes to the recipe, merged deep: mappings merge, everything else replaces. Differences are told to the first row."""
    tasks: dict[Name, dict[str, Any]] = {}
    """Task name -> changes to the recipe before those of the method; without tasks, the recipe itself is the only one."""
    seeds: list[Seed] = Field(min_length=1)
    """Each becomes train.seed of one cell per method and task."""
    other_seeds: dict[Name, list[Seed]] = {}
    """Method -> its own seeds, instead of `seeds`."""
    learning_rates: list[Rate] | dict[Name, list[Rate]] = {}
    """For all methods, or method -> list: of several, one is chosen per task and method before the final cells."""
    search: Search = Field(default_factory=Search)
    """How it is chosen."""
    budget: Budget | None = None
    """What every method may spend; by default what its recipe says."""
    metric: Literal["exact_match", "choice_accuracy", "loss", "perplexity", "rouge1", "rouge2", "rougeL", "bleu"] = "exact_match"
    """What is compared."""
    target: float | None = Field(None, ge=0)
    """A value of the metric; the report counts the seeds that reached it."""
    target_loss: float | None = Field(None, gt=0)
    """A loss; the report says at which step and second it was first reached."""
    published: list[Published] = []
    """Numbers from papers, shown beside ours."""
    timing: Timing | Literal[False] = False
    """One timing cell per method, run alone after the others."""

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"a seed stands twice in {seeds}: equal runs would pass for independent ones")
        return seeds

    @field_validator("other_seeds")
    @classmethod
    def _each_different(cls, found: dict[str, list[int]]) -> dict[str, list[int]]:
        for method, seeds in found.items():
            if not seeds or len(set(seeds)) < len(seeds):
                raise ValueError(f"{method}: give at least one seed, and each once, not {seeds}: equal runs would pass for independent ones")
        return found

    @property
    def task_names(self) -> list[str]:
        """The tasks; one without a name where the suite has none."""
        return list(self.tasks) or [""]

    def seeds_of(self, method: str) -> list[int]:
        return self.other_seeds.get(method, self.seeds)

    def rates_of(self, method: str) -> list[float]:
        """The learning rates to choose from; empty where the recipe's own is taken."""
        return self.learning_rates if isinstance(self.learning_rates, list) else self.learning_rates.get(method, [])

    def recipe_of(self, task: str, method: str, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The whole recipe of a method on a task, but output_dir, with further changes."""
        if not isinstance(self.recipe, dict):
            raise TypeError("suite.recipe is a path: read the suite with load_suite")
        recipe = merge(merge(self.recipe, self.tasks.get(task, {})), self.methods[method])
        if self.budget and self.budget.steps:
            recipe = merge(recipe, in_steps(self.budget.steps))
        recipe.pop("output_dir", None)
        return merge(recipe, changes or {})


@dataclass(frozen=True)
class Cell:
    """One run of a suite."""

    method: str
    seed: int
    recipe: dict[str, Any]
    """The whole recipe but output_dir."""
    key: str
    """Hash of all that decides the outcome: recipe, local input files, code, versions."""
    task: str = ""
    stage: Stage = "final"
    learning_rate: float | None = None
    """As the recipe has it; None where it takes the default."""
    rounds: int | None = None
    """Of a timing cell."""

    @property
    def label(self) -> str:
        """What a person is shown."""
        search = f"{self._rate} {self.recipe.get('train', {}).get('max_steps')} steps, seed {self.seed}"
        what = {"final": f"seed {self.seed}", "timing": "timing", "search": search}[self.stage]
        return f"{self.task + ': ' if self.task else ''}{self.method} {what}"

    @property
    def folder(self) -> str:
        what = {"final": f"seed{self.seed}", "timing": "timing", "search": f"search-{self._rate}-seed{self.seed}"}[self.stage]
        return "-".join([*([self.task] if self.task else []), self.method, what, self.key])

    @property
    def _rate(self) -> str:
        return "lr" if self.learning_rate is None else f"lr{self.learning_rate:g}"


def load_suite(path: str | Path) -> Suite:
    """The suite in a YAML file, its recipe read in. Raises ConfigError for whatever is wrong with it, cells included."""
    source = read_yaml(path)
    suite = validate(Suite, source)
    recipe = suite.recipe if isinstance(suite.recipe, dict) else read_yaml(Path(path).parent / suite.recipe).data
    suite = suite.model_copy(update={"recipe": recipe})
    if problems := [source.problem(keys, text) for keys, text in _inconsistent(suite)]:
        raise ConfigError("\n".join(problems))
    _check(suite, source)
    return suite


def find_suite(name: str, folder: Path = FOLDER) -> Path:
    """The file of a suite given by path, or by the name of one in `folder`. Raises ConfigError, saying what there is."""
    if Path(name).suffix in (".yaml", ".yml") or Path(name).is_file():
        return Path(name)
    there = sorted(path.stem for path in folder.glob("*.yaml"))
    if name in there:
        return folder / f"{name}.yaml"
    listed = f"{suggest(name, there)} (there are: {', '.join(there)})" if there else f", as there is no suite in {folder.absolute()}"
    raise ConfigError(f"no suite is called {name!r}{listed}; give the path of a YAML file, or --recipe for methods on a recipe of your own")


def cells(suite: Suite, rates: Mapping[tuple[str, str], float] | None = None, steps: Mapping[tuple[str, str], int] | None = None) -> list[Cell]:
    """The final cells, task by task and method by method; `suite.recipe` must be the recipe itself, as `load_suite` leaves it.

    rates, steps: by (task, method), where a search has chosen the rate and a budget the steps.
    """
    code, found = Code(), []
    for task in suite.task_names:
        for method in suite.methods:
            changes = final_changes(suite, method, (rates or {}).get((task, method)), (steps or {}).get((task, method)))
            found += [make_cell(suite, code, task, method, seed, changes) for seed in suite.seeds_of(method)]
    return found


def final_changes(suite: Suite, method: str, rate: float | None, steps: int | None) -> dict[str, Any]:
    """What a final cell changes in the recipe of its task and method."""
    listed = suite.rates_of(method)
    rate = rate if rate is not None else listed[0] if len(listed) == 1 else None
    return merge({} if rate is None else {"train": {"learning_rate": rate}}, in_steps(steps) if steps else {})


def make_cell(suite: Suite, code: Code, task: str, method: str, seed: int, changes: Mapping[str, Any], stage: Stage = "final") -> Cell:
    """A cell that trains."""
    recipe = suite.recipe_of(task, method, merge(changes, {"train": {"seed": seed}}))
    train = recipe["train"]
    if "save_every" not in train and not train.get("eval_every"):
        every = max(train["max_steps"] // (SAVES + 1), 1) if train.get("max_steps") else SAVE_EVERY
        train |= {"save_every": every, "keep_last": train.get("keep_last", 1)}
    # What is kept of a run depends on the metric, and whether it counts on the memory that it may take.
    judged: dict[str, Any] = {"metric": suite.metric} if suite.metric != "exact_match" and stage == "final" else {}
    judged |= {"memory": suite.budget.memory} if suite.budget and suite.budget.memory and stage == "final" else {}
    return Cell(method, seed, recipe, key(recipe, code, judged=judged), task, stage, train.get("learning_rate"))


def timing_cells(suite: Suite) -> list[Cell]:
    """One cell per method, on the first task."""
    if not suite.timing:
        return []
    code, task, rounds, made = Code(), suite.task_names[0], suite.timing.rounds, []
    for method in suite.methods:
        recipe = suite.recipe_of(task, method, {"train": {"seed": suite.seeds[0]}})
        made.append(Cell(method, suite.seeds[0], recipe, key(recipe, code, rounds), task, "timing", recipe["train"].get("learning_rate"), rounds))
    return made


def in_steps(steps: int) -> dict[str, Any]:
    """The changes that make a recipe train for so many steps."""
    return {"train": {"max_steps": steps, "num_epochs": None}}


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, as a new dict: mappings merge deep, everything else (lists too) replaces."""
    merged = copy.deepcopy(dict(base))
    for name, value in changes.items():
        old = merged.get(name)
        merged[name] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else copy.deepcopy(value)
    return merged


# --- what is wrong with a suite -----------------------------------------------------------------------------------------------


def _inconsistent(suite: Suite) -> Iterator[tuple[Keys, str]]:
    """(where, what) of every part that does not fit another."""
    for section, entries in (("methods", suite.methods), ("tasks", suite.tasks)):
        for name, changes in entries.items():
            for keys, hint in OWNED.items():
                if _has(changes, keys):
                    yield (section, name, *keys), f"is set by the harness: {hint}"
    rates = suite.learning_rates if isinstance(suite.learning_rates, dict) else {}
    for section, listed in (("learning_rates", rates), ("other_seeds", suite.other_seeds)):
        for name in listed:
            if name not in suite.methods:
                yield (section, name), f"no method of this suite{suggest(name, suite.methods)} (it has: {', '.join(suite.methods)})"
    for i, row in enumerate(suite.published):
        if row.method not in suite.methods or (row.task and row.task not in suite.tasks):
            what, name, known = ("method", row.method, suite.methods) if row.method not in suite.methods else ("task", row.task, suite.tasks)
            yield ("published", str(i), what), f"no {what} of this suite: {name!r}{suggest(name, known)} (it has: {', '.join(known) or 'none'})"
    for method, changes in suite.methods.items():
        own, steps = suite.rates_of(method), _at(changes, ("train", "max_steps"))
        if own and _has(changes, ("train", "learning_rate")):
            yield ("methods", method, "train", "learning_rate"), f"learning_rates gives this method {own} too: keep one of the two"
        if len(own) > 1 and (shared := set(suite.search.seeds) & set(suite.seeds_of(method))):
            yield ("search", "seeds"), f"{sorted(shared)} are seeds of {method}'s final cells too: a rate would be chosen on the run that it is judged by"
        steps = steps or _at(suite.recipe, ("train", "max_steps"))
        if len(own) > 1 and isinstance(steps, int) and suite.search.rungs[-1] > steps and suite.budget is None:
            yield ("search", "rungs"), f"the last rung trains for {suite.search.rungs[-1]} steps, and {method} itself for {steps}"


def _at(data: Any, keys: tuple[str, ...]) -> Any:
    for name in keys:
        data = data.get(name) if isinstance(data, dict) else None
    return data


def _has(changes: Any, keys: tuple[str, ...]) -> bool:
    return isinstance(changes, dict) and keys[0] in changes and (len(keys) == 1 or _has(changes[keys[0]], keys[1:]))


def _check(suite: Suite, source: Source) -> None:
    """Validates the recipe of every method and task now, rather than as one crashed cell after the other."""
    from peftkit.recipe import load_recipe  # imports torch, which readers of results do not need

    problems = []
    for task in suite.task_names:
        for method in suite.methods:
            at, on = ("methods", method), f"on task {task}: " if task else ""
            try:
                recipe = load_recipe(suite.recipe_of(task, method, {"output_dir": "cell"}))
            except ConfigError as error:
                problems.append(source.problem(at, f"{on}{error}"))
                continue
            if METRICS[suite.metric].asked_by not in recipe.eval.metrics:
                problems.append(source.problem(at, f"{on}its recipe does not measure {suite.metric}: add {METRICS[suite.metric].asked_by} to eval.metrics"))
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
