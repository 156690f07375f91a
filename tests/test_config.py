"""config.py: every error with its file, line, key and remedy; overrides; the round trip through YAML."""

from __future__ import annotations

import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import pytest
from pydantic import Field

from peftkit.config import Config, ConfigError, Source, apply_overrides, defaults_table, dump_yaml, parse_yaml, read_yaml, suggest, validate


class Color(Enum):
    RED = "red"
    BLUE = "blue"


class Train(Config):
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate."""
    max_steps: int = Field(ge=1)
    """Optimizer steps."""
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    bf16: bool = True
    betas: tuple[float, float] = (0.9, 0.999)

    @pydantic.field_validator("max_steps")
    @classmethod
    def not_unlucky(cls, value: int) -> int:
        if value == 13:
            raise ValueError("13 steps bring no luck: take 14")
        return value

    @pydantic.model_validator(mode="after")
    def small_rate_for_constant(self) -> Train:
        if self.lr_scheduler == "constant" and self.learning_rate > 1:
            raise ValueError("a constant schedule needs learning_rate <= 1")
        return self


class Data(Config):
    train: str | None = None
    max_length: int = 512
    files: list[str] = Field(default_factory=list)
    """Files to read."""
    folder: Path | None = None
    weights: dict[str, float] = {}
    color: Color = Color.RED


class LoRA(Config):
    r: int = Field(default=8, ge=1)
    alpha: int | Literal["auto"] = 16
    target_modules: str | list[str] = "all-linear"


class Qlora(LoRA):
    double: bool = True


class Entry(Config):
    lora: LoRA | None = None
    qlora: Qlora | None = None


class Recipe(Config):
    train: Train
    data: Data = Data()
    methods: list[Entry] = []
    quantize: Literal["nf4", "int8"] | None = None
    output_dir: str = "runs/x"


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(text: str | bytes, name: str = "recipe.yaml") -> str:
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


def read_error(text: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        read_yaml(write(text))
    return str(caught.value)


def recipe_error(text: str, *overrides: str, model: type[Config] = Recipe) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(model, apply_overrides(read_yaml(write(text)), list(overrides)))
    return str(caught.value)


def recipe(text: str, *overrides: str) -> Recipe:
    return validate(Recipe, apply_overrides(read_yaml(write(text)), list(overrides)))


# --- reading ------------------------------------------------------------------------------------------------------------

GOOD = """\
# a comment
train:
  max_steps: 5
  learning_rate: 1
data: {train: a.jsonl, files: [x, "y"], weights: {x: 1, y: 0.5}}
methods:
  - qlora: {r: 4}
  - lora:
      target_modules: [q_proj]
"""


def test_good_recipe_and_lines() -> None:
    source = read_yaml(write(GOOD))
    assert source.path == "recipe.yaml"
    assert source.data["methods"] == [{"qlora": {"r": 4}}, {"lora": {"target_modules": ["q_proj"]}}]
    assert source.line(("train",)) == 2
    assert source.line(("train", "learning_rate")) == 4
    assert source.line(("train", "absent", "deeper")) == 2
    assert source.line(("data", "weights", "y")) == 5
    assert source.line(("methods", 1)) == 8
    assert source.line(("methods", 1, "lora", "target_modules", 0)) == 9
    assert source.line(()) is None and source.line(("absent",)) is None
    assert source.where(("train",)) == "recipe.yaml:2" and source.where(()) == "recipe.yaml"
    made = validate(Recipe, source)
    assert made.train.learning_rate == 1.0 and type(made.train.learning_rate) is float
    assert made.methods[0].qlora == Qlora(r=4) and made.methods[1].lora == LoRA(target_modules=["q_proj"])
    assert made.data.weights == {"x": 1.0, "y": 0.5}


def test_plain_scalars() -> None:
    text = "{a: 2.0e-4, b: .5, c: 0x10, d: ~, e: True, f: '2e-4', g: \"no\", h: 1_000, i: '1:30', j: 0, k: builtin:tiny, l: =, m: y}"
    assert parse_yaml(text).data == {
        **{"a": 2e-4, "b": 0.5, "c": 16, "d": None, "e": True, "f": "2e-4", "g": "no", "h": 1000, "i": "1:30", "j": 0},
        **{"k": "builtin:tiny", "l": "=", "m": "y"},
    }


@pytest.mark.parametrize(
    ("scalar", "message"),
    [
        ("2e-4", "YAML reads 2e-4 as text, not as a number: write 2.0e-4, or quote it if it is a text"),
        ("1E5", "write 1.0e+5,"),
        ("2e4", "write 2.0e+4,"),
        ("1.5e3", "write 1.5e+3,"),
        ("-.5", "write -0.5,"),
        ("yes", "YAML reads yes as true: write true or false, or quote it if it is a text"),
        ("NO", "YAML reads NO as false: write true or false"),
        ("On", "YAML reads On as true"),
        ("off", "YAML reads off as false"),
        ("0123", "YAML reads 0123 as an octal number: write it without the leading zero, or quote it if it is a text"),
        ("0899", "YAML reads 0899 as text: write it without the leading zero"),
        ("0o17", "YAML reads 0o17 as text"),
        ("1:30", "YAML reads 1:30 as a number in base 60: write a plain number, or quote it"),
        ("1:30:00.5", "YAML reads 1:30:00.5 as a number in base 60"),
        ("2024-01-02", "YAML reads 2024-01-02 as a date: quote it"),
        ("2024-01-02 10:00:00", "as a date: quote it"),
        ("None", "YAML reads None as text: write null"),
        ("!!int abc", "'abc' is no int"),
        ("!!bool abc", "'abc' is no bool"),
        ("!!python/name:os.system x", "is not supported"),
        ("!!seq {a: 1}", "the YAML tag seq is not supported"),
        ('!!timestamp "2024-01-02"', "the YAML tag timestamp is not supported"),
        ("!!set {a, b}", "the YAML tag set is not supported"),
    ],
)
def test_scalars_that_yaml_reads_otherwise(scalar: str, message: str) -> None:
    text = read_error(f"train:\n  max_steps: 1\n  x: {scalar}\n")
    assert text.startswith("recipe.yaml:3: train.x: ") and message in text
    text = read_error(f"train:\n  - 1\n\n  - {scalar}\n")
    assert text.startswith("recipe.yaml:4: train.1: ") and message in text


def test_what_a_scalar_error_proposes_is_accepted() -> None:
    assert parse_yaml("a: 2.0e-4\nb: 1.0e+5\nc: -0.5\nd: '2e-4'\n").data == {"a": 2e-4, "b": 1e5, "c": -0.5, "d": "2e-4"}


def test_all_problems_of_a_file_at_once() -> None:
    lines = read_error("a: 2e-4\nb: {c: no,\n  c: 1}\nd: [.5, +.5]\n").splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["recipe.yaml:1", "a"],
        ["recipe.yaml:3", "b.c"],
        ["recipe.yaml:2", "b.c"],
        ["recipe.yaml:4", "d.1"],
    ]


def test_missing_file_names_the_nearest_and_the_current_directory(tmp_path: Path) -> None:
    write("a: 1", "quickstart.yaml")
    with pytest.raises(ConfigError, match=r"did you mean 'quickstart.yaml'") as caught:
        read_yaml("quickstrat.yaml")
    assert str(caught.value).startswith("quickstrat.yaml: no such file") and f"current directory: {Path.cwd()}" in str(caught.value)
    with pytest.raises(ConfigError, match=r"did you mean 'quickstart.yaml'") as caught:
        read_yaml(tmp_path / "quickstart.yml")
    assert "current directory" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"no such file .current directory: .*; there is no folder recipes$"):
        read_yaml("recipes/quickstart.yaml")
    with pytest.raises(ConfigError, match=r"^quickstart.yaml/x.yaml: cannot be read: "):
        read_yaml("quickstart.yaml/x.yaml")


def test_folder_encoding_empty_and_top_level(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read: it is a folder"):
        read_yaml(tmp_path)
    assert read_error(b"a: 1\nb: caf\xe9\n") == "recipe.yaml:2: not UTF-8 (byte 0xe9): save the file as UTF-8"
    assert read_error("a: 1\nb: \x07\n").startswith("recipe.yaml:2: not valid YAML: the character '\\x07'")
    assert "expected a mapping (key: value), got an empty file" in read_error("")
    assert "expected a mapping (key: value), got an empty file" in read_error("# only a comment\n")
    assert "expected a mapping (key: value), got a list of 2 items" in read_error("- a\n- b\n")
    assert "got the text 'hello'" in read_error("hello\n")
    assert read_yaml(write(b"\xef\xbb\xbfa: caf\xc3\xa9\r\nb: 2\r\n")).data == {"a": "café", "b": 2}


def test_syntax_errors_have_line_and_column() -> None:
    assert read_error("train:\n  a: [1, 2\nb: 3\n").startswith("recipe.yaml:3:2: not valid YAML: ")
    assert read_error("a: 1\n b: 2\n").startswith("recipe.yaml:2:3: not valid YAML: ")
    text = read_error("a:\n\tb: 2\n")
    assert text.startswith("recipe.yaml:2:1: not valid YAML: ") and text.endswith("indent with spaces, not tabs")
    assert read_error("a: 1\n---\nb: 2\n").startswith("recipe.yaml:2:1: not valid YAML: ")
    assert "undefined alias" in read_error("a: *b\n")


def test_duplicate_keys_at_any_level() -> None:
    assert read_error("a: 1\nb: 2\na: 3\n") == "recipe.yaml:3: a: duplicate key: line 1 already has it"
    text = read_error("methods:\n  - lora:\n      r: 1\n      alpha: 2\n      r: 3\n")
    assert text == "recipe.yaml:5: methods.0.lora.r: duplicate key: line 3 already has it"
    assert read_error("a: {x: 1, 'x': 2}\n") == "recipe.yaml:1: a.x: duplicate key: line 1 already has it"


def test_keys_are_texts() -> None:
    assert read_error("a:\n  1: x\n") == "recipe.yaml:2: a: a key must be a text: quote 1"
    assert read_error("on: 1\n") == "recipe.yaml:1: a key must be a text: quote on"
    assert read_error("? [a, b]\n: 1\n") == "recipe.yaml:1: a key must be a text"
    assert parse_yaml("'on': 1\n").data == {"on": 1}


def test_anchors_aliases_and_merges() -> None:
    text = """\
base: &base
  r: 4
  alpha: 8
more: &more {alpha: 9, x: 1}
copy: *base
lora:
  alpha: 32
  <<: *base
both:
  <<: [*base, *more]
"""
    source = read_yaml(write(text))
    assert source.data["copy"] == {"r": 4, "alpha": 8} and source.data["copy"] is not source.data["base"]
    assert source.data["lora"] == {"alpha": 32, "r": 4}
    assert source.data["both"] == {"r": 4, "alpha": 8, "x": 1}
    assert source.line(("lora", "alpha")) == 7 and source.line(("lora", "r")) == 2 and source.line(("copy",)) == 5
    assert apply_overrides(source, ["copy.r=1"]).data["base"]["r"] == 4


def test_bad_anchors_and_merges() -> None:
    for text in ("a: &a\n  b: *a\n", "a: &a [*a, *a]\n", "a: &a\n  <<: *a\n", "a: " + "[" * 600):
        assert read_error(text) == "recipe.yaml: nested too deeply; does an anchor contain itself?"
    assert read_error("a: 1\nb:\n  <<: 3\n").startswith("recipe.yaml:3: b: '<<' takes a mapping")
    assert "duplicate key" in read_error("x: &x {a: 1}\nb:\n  <<: *x\n  <<: *x\n")


# --- overrides ----------------------------------------------------------------------------------------------------------


def test_overrides() -> None:
    source = read_yaml(write(GOOD))
    new = apply_overrides(
        source,
        [
            *("train.max_steps=50", "quantize=null", "methods.0.qlora.r=16", "data.train=b=c.jsonl", "train.learning_rate=2e-4"),
            *("data.folder=' x'", "output_dir='no'", "train.betas=[5e-1, .9]", "data.weights.z=1E2"),
        ],
    )
    assert new.data["train"] == {"max_steps": 50, "learning_rate": 2e-4, "betas": [0.5, 0.9]}
    assert new.data["quantize"] is None and new.data["methods"][0] == {"qlora": {"r": 16}} and new.data["output_dir"] == "no"
    assert new.data["data"] == {"train": "b=c.jsonl", "files": ["x", "y"], "weights": {"x": 1, "y": 0.5, "z": 100.0}, "folder": " x"}
    assert source.data == read_yaml("recipe.yaml").data and source.marks == read_yaml("recipe.yaml").marks  # untouched
    assert new.line(("train", "max_steps")) is None and new.line(("train", "learning_rate")) is None and new.line(("train",)) == 2
    assert new.where(("train", "max_steps")) == "command line: train.max_steps=50"
    assert validate(Recipe, new).train == Train(max_steps=50, learning_rate=2e-4, betas=(0.5, 0.9))


def test_overrides_in_order_and_whole_values() -> None:
    source = parse_yaml("train: {max_steps: 1}\n")
    overrides = ["methods=[{lora: {r: 4}}, {qlora: {}}]", "methods.1.qlora.r=5", "data.weights.a=1", "train={max_steps: 3}"]
    new = apply_overrides(source, overrides)
    made = validate(Recipe, new)
    assert made.methods == [Entry(lora=LoRA(r=4)), Entry(qlora=Qlora(r=5))]
    assert made.data.weights == {"a": 1.0} and made.train.max_steps == 3
    assert apply_overrides(source, []).data == source.data


def test_the_value_of_an_override_may_hold_an_equals_sign_and_aliases_do_not_leak() -> None:
    new = apply_overrides(parse_yaml("a: 1"), ["b=&x {c: 1}", "d=[&y {e: 1}, *y]"])
    assert new.data == {"a": 1, "b": {"c": 1}, "d": [{"e": 1}, {"e": 1}]}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_steps", "expected key=value, for example train.max_steps=50"),
        ("=5", "expected key=value, for example train.max_steps=50"),
        ("train.=5", "expected key=value"),
        ("train..max_steps=5", "expected key=value"),
        ("output_dir=", "the value is empty: write output_dir=null, or output_dir='\"\"'"),
        ("output_dir=#1", "the value is empty"),
        ("quantize=no", "quantize: YAML reads no as false: write true or false, or quote it"),
        ("train.bf16=Yes", "train.bf16: YAML reads Yes as true"),
        ("quantize=None", "quantize: YAML reads None as text: write null"),
        ("train.max_steps=010", "train.max_steps: YAML reads 010 as an octal number"),
        ("train.max_steps=08", "train.max_steps: YAML reads 08 as text"),
        ("train.betas=[no, 1]", "train.betas.0: YAML reads no as false"),
        ("methods=[{lora: {r: 1}}", "not valid YAML: "),
        ("output_dir=@x", "quote the value"),
        ("output_dir=a #b", "output_dir: the text after ' #' would be lost: quote the value"),
        ("train.betas=[1, 2] # x", "the text after ' #' would be lost"),
        ("output_dir=\x07", "the character '\\x07' is not allowed"),
        ("train.max_steps.x=1", "recipe.yaml:3: 'train.max_steps' is the number 5, not a mapping or a list: it has no 'x'"),
        ("data.train.x=1", "recipe.yaml:5: 'data.train' is the text 'a.jsonl', not a mapping"),
        ("methods.2.lora.r=1", "recipe.yaml:6: 'methods' is a list of 2 items, counted from 0: it has no '2'"),
        ("methods.-1.lora.r=1", "it has no '-1'"),
        ("methods.lora.r=1", "it has no 'lora'"),
        ("data.files.5=1", "recipe.yaml:5: 'data.files' is a list of 2 items"),
    ],
)
def test_bad_overrides(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(read_yaml(write(GOOD)), [override])
    assert str(caught.value).startswith(f"command line: {override}: ") and message in str(caught.value)


def test_errors_after_an_override_name_the_command_line() -> None:
    text = "train: {max_steps: 5}\nmethods:\n  - lora: {r: 1}\n"
    for override, message in {
        "train.max_step=5": "train.max_step: unknown key; did you mean 'max_steps'?",
        "train.max_steps=1e3": "train.max_steps: expected a whole number, got the number 1000.0",
        "methods=[{lora: {r: 0}}]": "methods.0.lora.r: expected a number of at least 1, got the number 0",
        "train={}": "missing key 'train.max_steps'",
        "data.files=[1]": "data.files.0: expected a text, got the number 1; quote it if it is a text",
    }.items():
        assert recipe_error(text, override) == f"command line: {override}: {message}"
    assert recipe_error("output_dir: x\n", "train.bf16=true") == "command line: train.bf16=true: missing key 'train.max_steps'"


# --- validation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  learning_rat: 1.0\n  max_steps: 1\n", "2: train.learning_rat: unknown key; did you mean 'learning_rate'?"),
        ("train:\n  max_steps: 1\n  zzz: 1\n", "3: train.zzz: unknown key"),
        ("train:\n  max_steps: 1\n  max_length: 1\n", "3: train.max_length: unknown key; it belongs under 'data'"),
        ("train:\n  max_steps: 1\n  output_dir: x\n", "3: train.output_dir: unknown key; it belongs at the top level"),
        ("learning_rate: 1.0\ntrain: {max_steps: 1}\n", "1: learning_rate: unknown key; it belongs under 'train'"),
        ("train: {max_steps: 1}\ndouble: true\n", "2: double: unknown key; it belongs under 'methods[].qlora'"),
        ("train: {max_steps: 1}\ntrian: 1\n", "2: trian: unknown key; did you mean 'train'?"),
        ("train:\n  max_steps: 1\n  learning_rate: 1e-4x\n", "3: train.learning_rate: expected a number, got the text '1e-4x'"),
        (
            "train:\n  max_steps: 1\n  learning_rate: '2e-4'\n",
            "3: train.learning_rate: expected a number, got the text '2e-4'; write it without quotes",
        ),
        ("train:\n  max_steps: 1\n  learning_rate: true\n", "3: train.learning_rate: expected a number, got true"),
        ("train:\n  max_steps: 1\n  learning_rate:\n", "3: train.learning_rate: expected a number, got null"),
        ("train:\n  max_steps: 1\n  learning_rate: 0\n", "3: train.learning_rate: expected a number above 0.0, got the number 0"),
        ("train:\n  max_steps: 1\n  learning_rate: .inf\n", "3: train.learning_rate: expected a finite number, got the number inf"),
        ("train:\n\n  max_steps: true\n", "3: train.max_steps: expected a whole number, got true"),
        ("train:\n\n  max_steps: 1.0\n", "3: train.max_steps: expected a whole number, got the number 1.0"),
        ("train:\n\n  max_steps: [1]\n", "3: train.max_steps: expected a whole number, got a list of 1 item"),
        ("train:\n\n  max_steps: 0\n", "3: train.max_steps: expected a number of at least 1, got the number 0"),
        ("train:\n\n  max_steps: 13\n", "3: train.max_steps: 13 steps bring no luck: take 14"),
        ("train:\n  max_steps: 1\n  bf16: 1\n", "3: train.bf16: expected true or false, got the number 1"),
        ("train:\n  max_steps: 1\n  bf16: 'true'\n", "3: train.bf16: expected true or false, got the text 'true'"),
        (
            "train:\n  max_steps: 1\n  lr_scheduler: cosin\n",
            "3: train.lr_scheduler: expected 'cosine', 'linear' or 'constant', got the text 'cosin'; did you mean 'cosine'?",
        ),
        ("train:\n  max_steps: 1\n  betas: [0.9, x]\n", "3: train.betas.1: expected a number, got the text 'x'"),
        (
            "output_dir: x\n\ntrain: {max_steps: 1, lr_scheduler: constant, learning_rate: 2.0}\n",
            "3: train: a constant schedule needs learning_rate <= 1",
        ),
        ("output_dir: x\ntrain: {}\n", "2: missing key 'train.max_steps'"),
        ("output_dir: x\ntrain:\n", "2: train: expected a mapping, got null; write {} for the defaults"),
        ("output_dir: x\ntrain: 3\n", "2: train: expected a mapping, got the number 3"),
        ("train: {max_steps: 1}\noutput_dir: 3\n", "2: output_dir: expected a text, got the number 3; quote it if it is a text"),
        ("train: {max_steps: 1}\nquantize: nf5\n", "2: quantize: expected 'nf4' or 'int8', got the text 'nf5'; did you mean 'nf4'?"),
        ("train: {max_steps: 1}\nquantize: false\n", "2: quantize: expected 'nf4' or 'int8', got false"),
        ("train: {max_steps: 1}\ndata:\n  files: a\n", "3: data.files: expected a list, got the text 'a'"),
        (
            "train: {max_steps: 1}\ndata:\n  files:\n    - a\n    - 3\n",
            "5: data.files.1: expected a text, got the number 3; quote it if it is a text",
        ),
        ("train: {max_steps: 1}\ndata:\n  weights: {a: 1,\n    b: x}\n", "4: data.weights.b: expected a number, got the text 'x'"),
        ("train: {max_steps: 1}\ndata:\n  weights: [1]\n", "3: data.weights: expected a mapping, got a list of 1 item"),
        (
            "train: {max_steps: 1}\ndata:\n  color: re\n",
            "3: data.color: expected 'red' or 'blue', got the text 're'; did you mean 'red'?",
        ),
        (
            "train: {max_steps: 1}\nmethods:\n  - lora: {r: 1}\n  - qlroa: {}\n",
            "4: methods.1.qlroa: unknown key; did you mean 'qlora'?",
        ),
        ("train: {max_steps: 1}\nmethods:\n  - lora:\n      rr: 1\n", "4: methods.0.lora.rr: unknown key; did you mean 'r'?"),
        ("train: {max_steps: 1}\nmethods:\n  - qlora\n", "3: methods.0: expected a mapping, got the text 'qlora'"),
    ],
)
def test_one_line_for_one_problem(text: str, message: str) -> None:
    assert recipe_error(text) == f"recipe.yaml:{message}"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{alpha: aut}", "alpha: expected a whole number or 'auto', got the text 'aut'; did you mean 'auto'?"),
        ("{alpha: 1.5}", "alpha: expected a whole number or 'auto', got the number 1.5"),
        ("{target_modules: 3}", "target_modules: expected a text or a list, got the number 3; quote it if it is a text"),
        ("{target_modules: {a: 1}}", "target_modules: expected a text or a list, got a mapping"),
        ("{target_modules: [a, 3]}", "target_modules.1: expected a text, got the number 3; quote it if it is a text"),
        ("{target_modules: [4, 3]}", None),
    ],
)
def test_unions_are_one_line_per_key(value: str, message: str | None) -> None:
    text = recipe_error(f"train: {{max_steps: 1}}\n\nmethods:\n  - lora: {value}\n")
    if message is None:
        assert [line.split(": ")[:2] for line in text.splitlines()] == [
            ["recipe.yaml:4", "methods.0.lora.target_modules.0"],
            ["recipe.yaml:4", "methods.0.lora.target_modules.1"],
        ]
    else:
        assert text == f"recipe.yaml:4: methods.0.lora.{message}"


def test_unions_of_configs() -> None:
    class Cosine(Config):
        kind: Literal["cosine"]
        cycles: float = 0.5

    class Linear(Config):
        kind: Literal["linear"]
        end: float = 0.0

    class Union(Config):
        schedule: str | Linear = "cosine"
        tagged: Annotated[Cosine | Linear, Field(discriminator="kind")] = Linear(kind="linear")
        deep: list[list[int] | dict[str, int | str]] = []

    def error(text: str) -> str:
        return recipe_error(text, model=Union)

    assert error("schedule:\n  kind: linear\n  ende: 1\n") == "recipe.yaml:3: schedule.ende: unknown key; did you mean 'end'?"
    assert error("schedule:\n  kind: linear\n  end: x\n") == "recipe.yaml:3: schedule.end: expected a number, got the text 'x'"
    assert error("schedule: 3\n").startswith("recipe.yaml:1: schedule: expected a text or a mapping, got the number 3")
    assert error("tagged:\n  kind: cosine\n  cycels: 1\n") == "recipe.yaml:3: tagged.cycels: unknown key; did you mean 'cycles'?"
    assert error("tagged:\n  kind: cosin\n").startswith("recipe.yaml:1: tagged: ") and "'cosine', 'linear'" in error("tagged: {kind: x}\n")
    assert error("deep:\n  - [1]\n  - {a: [1]}\n") == "recipe.yaml:3: deep.1.a: expected a whole number or a text, got a list of 1 item"


def test_many_problems_in_the_order_of_the_file_and_without_pydantics_noise() -> None:
    text = recipe_error("zzz: 1\ndata: {max_length: x}\ntrain:\n  lerning_rate: 1\nmethods: 3\n")
    assert [line.split(": ")[:2] for line in text.splitlines()] == [
        ["recipe.yaml:1", "zzz"],
        ["recipe.yaml:2", "data.max_length"],
        ["recipe.yaml:3", "missing key 'train.max_steps'"],
        ["recipe.yaml:4", "train.lerning_rate"],
        ["recipe.yaml:5", "methods"],
    ]
    assert "pydantic" not in text and "type=" not in text and "Input should" not in text


def test_missing_section_and_bounds() -> None:
    class Bounds(Config):
        few: list[int] = Field(default=[1, 2], min_length=2, max_length=3)
        name: str = Field(default="ab", min_length=2, max_length=3, pattern="^a")
        ratio: float = Field(default=0.5, lt=1)
        share: float = Field(default=0.5, le=1)
        block: int = Field(default=8, multiple_of=8)

    assert recipe_error("output_dir: x\n") == "recipe.yaml: missing key 'train'"
    for text, message in {
        "few: [1]": "expected 2 or more items, got a list of 1 item",
        "few: [1, 2, 3, 4]": "expected at most 3 items, got a list of 4 items",
        "name: a": "expected a text of 2 or more characters, got the text 'a'",
        "name: abcd": "expected a text of at most 3 characters",
        "name: bc": "expected a text that matches the pattern ^a",
        "ratio: 1": "expected a number below 1.0, got the number 1",
        "share: 2": "expected a number of at most 1.0, got the number 2",
        "block: 9": "expected a multiple of 8, got the number 9",
    }.items():
        assert message in recipe_error(text, model=Bounds)


def test_an_assertion_in_a_validator_is_shown() -> None:
    class Total(Config):
        total: int = 0

        @pydantic.model_validator(mode="after")
        def check(self) -> Total:
            if self.total > 10:
                raise AssertionError("total must stay below 10")
            return self

    assert recipe_error("total: 11\n", model=Total) == "recipe.yaml: total must stay below 10"


def test_a_wrong_default_is_an_error() -> None:
    class Wrong(Config):
        size: int = "x"  # type: ignore[assignment]

    assert recipe_error("{}\n", model=Wrong) == "recipe.yaml: size: expected a whole number, got the text 'x'"


def test_validate_at_a_part() -> None:
    source = read_yaml(write("methods:\n  - lora:\n      r: 4\n  - lora:\n      rank: 4\n      r: x\n"))
    assert validate(LoRA, source, ("methods", 0, "lora")) == LoRA(r=4)
    with pytest.raises(ConfigError) as caught:
        validate(LoRA, source, ("methods", 1, "lora"))
    assert str(caught.value).splitlines() == [
        "recipe.yaml:5: methods.1.lora.rank: unknown key",
        "recipe.yaml:6: methods.1.lora.r: expected a whole number, got the text 'x'",
    ]
    assert validate(LoRA, source, ("absent",)) == LoRA()
    with pytest.raises(ConfigError, match=r"recipe.yaml: missing key 'train.max_steps'"):
        validate(Train, source, ("train",))
    with pytest.raises(ConfigError, match=r"recipe.yaml:1: methods: expected a mapping or a list, got a list"):
        validate(LoRA, source, ("methods", "lora"))


def test_a_source_from_plain_python_data() -> None:
    made = validate(Recipe, Source({"train": {"max_steps": 3}, "data": {"folder": Path("a/b")}}))
    assert made.data.folder == Path("a/b")
    with pytest.raises(ConfigError, match=r"^recipe: train.max_steps: expected a whole number, got the text 'x'$"):
        validate(Recipe, Source({"train": {"max_steps": "x"}}))


def test_configs_are_frozen_and_strict_in_python() -> None:
    train = Train(max_steps=1)
    with pytest.raises(pydantic.ValidationError):
        train.max_steps = 2  # type: ignore[misc]
    for wrong in ({"max_steps": "1"}, {"max_steps": True}, {"max_steps": 1, "learning_rate": True}, {"max_steps": 1, "x": 1}):
        with pytest.raises(pydantic.ValidationError):
            Train(**wrong)
    assert Train.model_fields["max_steps"].description == "Optimizer steps."


# --- helpers ------------------------------------------------------------------------------------------------------------


def test_suggest() -> None:
    assert suggest("lora_r", ["r", "lora", "alpha"]) == "; did you mean 'lora'?"
    assert suggest("NF4", ["nf4", "int8"]) == "; did you mean 'nf4'?"
    assert suggest("zzzz", ["nf4", "int8"]) == "" and suggest("a", []) == ""


def test_source_problem() -> None:
    source = apply_overrides(read_yaml(write(GOOD)), ["quantize=nf4"])
    assert source.problem(("train", "max_steps"), "too few") == "recipe.yaml:3: train.max_steps: too few"
    assert source.problem(("quantize",), "no GPU") == "command line: quantize=nf4: quantize: no GPU"
    assert source.problem((), "nothing to do") == "recipe.yaml: nothing to do"


def test_dump_of_a_config_reads_back_equal() -> None:
    made = recipe(GOOD, "train.learning_rate=1e-05", "data.folder=a/b", "data.train='no'", "train.betas=[1e-3, 1e16]", "output_dir='2e-4'")
    text = dump_yaml(made)
    assert validate(Recipe, parse_yaml(text)) == made
    assert "learning_rate: 1.0e-05" in text and "quantize: null" in text and "output_dir: '2e-4'" in text and "color: red" in text
    assert text.index("train:") < text.index("data:") < text.index("methods:")


@pytest.mark.parametrize(
    "value",
    [
        *("2e-4", "1E5", "no", "On", "None", "null", "~", "", " ", "0123", "08", "1:30", "2024-01-02", "1.5", "-.5", "true", "=", "<<"),
        *("a: b", "# x", "a #b", "- a", "[a", "{a", "*a", "&a", "!a", "@a", "%a", "'", '"', "a\nb\n", "\n a", "tab\t", "é", "日本語", "🙂"),
        *("x" * 300, "word " * 80, "\x07", "\ufeff", "a\r\nb", "{{ messages }}", ".inf", "inf", "+.5", "0o17", "1_000", "y"),
        *(0.0002, 1e-05, 1e16, 1e300, -1e-300, 0.1 + 0.2, 3.0, 0, -7, 10**20, True, False, None),
        *([], {}, [[]], [{}], [{"a": None}], {"no": 1, "2e-4": [2], "a b": "c", "": 0, "8": 1}),
    ],
)
def test_dump_reads_back_equal(value: Any) -> None:
    back = parse_yaml(dump_yaml({"x": value, "list": [value, value]})).data
    assert back == {"x": value, "list": [value, value]} and type(back["x"]) is type(value)


def test_dump_writes_no_aliases_and_takes_tuples_and_paths() -> None:
    shared = [1, 2]
    assert dump_yaml({"a": shared, "b": shared, "c": (Path("x/y"), 2.0)}) == "a:\n- 1\n- 2\nb:\n- 1\n- 2\nc:\n- x/y\n- 2.0\n"


def test_defaults_table() -> None:
    rows = {key: (kind, default, text) for key, kind, default, text in defaults_table(Recipe)}
    assert list(rows)[:2] == ["train.learning_rate", "train.max_steps"]
    assert rows["train.learning_rate"] == ("float (> 0)", "0.0002", "Peak learning rate.")
    assert rows["train.max_steps"] == ("int (>= 1)", "required", "Optimizer steps.")
    assert rows["train.lr_scheduler"] == ("'cosine' | 'linear' | 'constant'", "cosine", "")
    assert rows["train.betas"] == ("tuple[float, float]", "[0.9, 0.999]", "")
    assert rows["data.train"] == ("str | null", "null", "")
    assert rows["data.files"] == ("list[str]", "[]", "Files to read.")
    assert rows["data.weights"] == ("dict[str, float]", "{}", "")
    assert rows["data.color"] == ("Color", "red", "")
    assert rows["methods"] == ("list[Entry]", "[]", "")
    assert rows["methods[].lora"] == ("LoRA | null", "null", "")
    assert rows["methods[].lora.r"] == ("int (>= 1)", "8", "")
    assert rows["methods[].lora.alpha"] == ("int | 'auto'", "16", "")
    assert rows["quantize"] == ("'nf4' | 'int8' | null", "null", "")
    assert "train" not in rows and "data" not in rows


def test_import_is_light() -> None:
    code = "import sys, peftkit.config; print([m for m in ('torch', 'transformers', 'rich', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    assert done.stdout.strip() == "[]"


def test_overrides_reach_below_what_a_resolved_recipe_writes_as_null():
    source = apply_overrides(Source({"data": {"columns": None}}), ["data.columns.prompt=question"])
    assert source.data == {"data": {"columns": {"prompt": "question"}}}
