"""DataConfig: the `data` section of a recipe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from peftkit.config import Config, suggest
from peftkit.data.formats import NEEDED, OPTIONAL


def known_columns(columns: dict[str, str] | None) -> dict[str, str] | None:
    """The columns as they are. Raises ValueError for a name that no format has."""
    names = sorted(NEEDED | OPTIONAL)
    for name in columns or {}:
        if name not in names:
            raise ValueError(f"{name!r} is no standard column{suggest(name, names)} (there are: {', '.join(names)})")
    return columns


class Part(Config):
    """A further source of training rows, and how much of the training it makes up."""

    source: str
    """Named like `data.train`."""

    share: float = Field(gt=0, lt=1)
    """Its share of the tokens trained on. Repeated where it holds fewer, which the report says."""

    columns: dict[str, str] | None = None
    """As `data.columns`, for this source; the other keys of `data` hold for it too."""

    _known_columns = field_validator("columns")(known_columns)


class DataConfig(Config):
    train: str
    """What to train on: `builtin:<task>/<split>`; a local .json, .jsonl, .csv, .parquet or .txt file, or a folder of them; or a
    data set on the hub, `owner/name`, with `/subset` and `:split` where needed (`tatsu-lab/alpaca:train[:1%]`; `:train` if not given)."""

    replay: Part | None = None
    """An old corpus kept in the training, so that it is not forgotten: `{source: old.jsonl, share: 0.05}`."""

    mix: list[Part] = []
    """More sources, `{source, share}` each; `train` makes up what all shares leave."""

    eval: str | None = None
    """What to evaluate on, named in the same way (`:test` if a hub data set is named without a split)."""

    holdout: float = Field(0.0, ge=0, lt=1)
    """Share of the rows of `train`, the last ones, set aside for evaluation where `eval` is not given; of a .txt file, the
    last share of its tokens."""

    columns: dict[str, str] | None = None
    """The file's own column names for the standard ones, as in `{prompt: question, completion: answer}`."""

    system: str | None = None
    """System message put before rows that have none."""

    loss_on: Literal["assistant", "last", "all"] = "assistant"
    """The tokens that are trained: every assistant turn, the last one, or the whole row. Of prompt and completion,
    `assistant` and `last` both mean the completion, and of a preference pair the chosen answer. Plain text is always trained as a whole."""

    max_length: int = Field(512, ge=2)
    """Longest row, in tokens; also the size of a packed row, and of the blocks a .txt file is cut into."""

    truncation: Literal["drop", "right"] = "drop"
    """What happens to a longer row: `drop` leaves it out, `right` cuts its end off. The report counts both."""

    packing: bool = False
    """Put several short rows into one of `max_length` tokens; none of them sees another."""

    group_by_length: bool = True
    """Without packing: make batches of rows of similar length, so that less is padding. Batches come in random order."""

    cache: bool = True
    """Keep tokenised rows, where they are many, on disk, and read them from there: now and, while nothing has changed, in later runs."""

    train_rows: int | None = Field(None, ge=1)
    """Train on the first rows of `train` only, this many."""

    eval_rows: int | None = Field(None, ge=1)
    """Evaluate on the first rows only, this many."""

    on_bad_row: Literal["error", "skip"] = "error"
    """What happens when rows cannot be used: stop and list them, or leave them out and list them in the report."""

    @property
    def parts(self) -> list[Part]:
        """The sources beside `train`."""
        return [*([self.replay] if self.replay else []), *self.mix]

    def alone(self, source: str, rows: int | None = None, columns: dict[str, str] | None = None) -> DataConfig:
        """The same treatment for one other source, with nothing mixed in and nothing held out."""
        changes: dict[str, Any] = {"train": source, "train_rows": rows, "columns": columns, "replay": None, "mix": [], "eval": None, "holdout": 0.0}
        return self.model_copy(update=changes)

    _known_columns = field_validator("columns")(known_columns)

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if self.eval and self.holdout:
            raise ValueError("'eval' names the rows to evaluate on, so 'holdout' would do nothing: give one of the two")
        if sum(part.share for part in self.parts) >= 1:
            raise ValueError("the shares of 'replay' and 'mix' leave nothing to 'train': make them less than 1 together")
        return self
