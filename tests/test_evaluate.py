"""Metrics against figures by hand and independent implementations; what is missing or cannot be scored is said."""

from __future__ import annotations

import json
import math
import sys
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_llama
from rich.console import Console
from test_loss import MODELS, batch

import peftkit as pk
from peftkit import data, evaluate, loss
from peftkit.config import ConfigError
from peftkit.evaluate import EvalConfig, EvalSet, Prediction, final_number, text
from peftkit.evaluate.exact_match import after_thinking, generate_answers
from peftkit.loss import TokenLoss
from peftkit.recipe import load_recipe
from peftkit.run import Scorer, load_sets, to_batch

REAL = Path(__file__).parents[2] / "shared" / "data"
QUESTIONS = [
    {"prompt": "Which is a colour?", "completion": "red", "choices": ["red", "seven", "a long walk home"]},
    {"prompt": "Which is a number?", "completion": "B", "choices": {"text": ["red", "seven", "home"], "label": ["A", "B", "C"]}},
    {"prompt": "Which is a place?", "completion": "2", "choices": ["red", "seven", "home"]},
]


def recipe(tmp_path: Path, rows: list[dict], metrics: list[str], **options) -> dict:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = str(tmp_path / "rows.jsonl")
    return {
        "model": {"name": "builtin:tiny", "dtype": "float32"}, "methods": ["lora"],
        "data": {"train": file, "eval": file, **options.pop("data", {})}, "eval": {"metrics": metrics, **options}, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip


def scored(config: dict) -> tuple[dict, Scorer]:
    made = load_recipe(config)
    model, tokenizer = pk.load("builtin:tiny", dtype="float32")
    console = Console(quiet=True)
    scorer = Scorer(made, model, tokenizer, TokenLoss(model), load_sets(made, tokenizer, console), console)
    return scorer.score("of", None), scorer


# ---------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("chunk", [1024, 3])
@pytest.mark.parametrize("name", MODELS)
def test_losses_by_row_are_the_models_own(name, chunk, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    model, inputs = MODELS[name]().eval(), batch()
    sums, tokens = TokenLoss(model).by_row(**inputs)
    labels = inputs.pop("labels")
    with torch.no_grad():
        logits = model(**inputs).logits
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none", ignore_index=-100)
    torch.testing.assert_close(sums, each.sum(1), rtol=1e-5, atol=1e-5)
    assert tokens.tolist() == (labels[:, 1:] != -100).sum(1).tolist()


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_never_holds_the_logits_of_a_batch(name, monkeypatch):
    """The largest logits that the head makes: a chunk of supervised rows, or one row where a model caps its logits."""
    monkeypatch.setattr(loss, "CHUNK", 5)
    model, inputs, seen = MODELS[name]().eval(), batch(), []
    measure = TokenLoss(model)
    measure(**inputs)  # the first call compares the two ways on one row
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(output[..., 0].numel()))
    with torch.no_grad():
        measure(**inputs)
    assert max(seen) <= (23 if name == "gemma2" else 5) < batch()["labels"].numel()
    with torch.no_grad():
        model(**{key: value for key, value in inputs.items() if key != "labels"})
    assert seen[-1] == 4 * 23, "which the model's own forward does"


def test_perplexity_is_the_exponential_of_the_loss(tmp_path):
    rows = [{"prompt": f"Say {word}.", "completion": word} for word in ("red", "seven", "home")]
    values, _ = scored(recipe(tmp_path, rows, ["loss", "perplexity"]))
    assert values["perplexity"] == pytest.approx(math.exp(values["loss"]))
    assert scored(recipe(tmp_path, rows, ["perplexity"]))[0] == {"perplexity": values["perplexity"]}


# --------------------------------------------------------------------------------------------------------------- choices


def by_hand(question: data.Question, model) -> list[tuple[float, int, int]]:
    """(log-likelihood, tokens, characters) of each choice, one at a time from full logits."""
    found = []
    for candidate in question.candidates:
        ids = torch.tensor([candidate.input_ids])
        with torch.no_grad():
            logs = model(ids).logits.float().log_softmax(-1)
        places = [i for i, trained in enumerate(candidate.trained) if trained]
        found.append((sum(logs[0, i - 1, candidate.input_ids[i]].item() for i in places), len(places), len(candidate.answer)))
    return found


@pytest.mark.parametrize("length", ["total", "token", "character"])
def test_choice_accuracy_against_likelihoods_by_hand(length, tmp_path):
    options = {} if length == "total" else {"choice_length": length}
    values, scorer = scored(recipe(tmp_path, QUESTIONS, ["choice_accuracy"], batch_size=2, **options))
    model = scorer.model.eval()
    right = []
    for question in scorer.main.choices:
        sums = [total / {"total": 1, "token": tokens, "character": size}[length] for total, tokens, size in by_hand(question, model)]
        right.append(max(range(len(sums)), key=sums.__getitem__) == question.correct)
    assert values == {"choice_accuracy": sum(right) / 3}
    picked = evaluate.pick(scorer.loss, scorer.main.choices, lambda part: to_batch([[each] for each in part], scorer.loss), 2, length)
    hand = [total / {"total": 1, "token": tokens, "character": size}[length] for total, tokens, size in by_hand(scorer.main.choices[0], model)]
    assert picked[0].scores == pytest.approx(hand, rel=1e-4)
    assert [question.correct for question in scorer.main.choices] == [0, 1, 2]
    assert [[c.answer for c in question.candidates][1] for question in scorer.main.choices] == ["seven"] * 3


def test_the_total_favours_short_choices_and_a_length_undoes_it():
    """Two choices, each token of the long one likelier than the only one of the short one."""
    losses = {2: (2.0, 1), 9: (4.0, 8)}

    def by_row(rows):
        return torch.tensor([losses[row][0] for row in rows]), torch.tensor([losses[row][1] for row in rows])

    candidates = [SimpleNamespace(input_ids=[0] * size, trained=[True] * size, answer="x" * size) for size in (2, 9)]
    rows = [evaluate.ChoiceRow("here", candidates, 1)]
    measure = SimpleNamespace(by_row=by_row)

    def pick(length: str) -> bool:
        return evaluate.pick(measure, rows, lambda part: {"rows": [len(each.input_ids) for each in part]}, 8, length)[0].correct

    assert [pick("total"), pick("token"), pick("character")] == [False, True, True]
    losses[9] = (float("nan"), 8)
    with pytest.raises(ValueError, match="here: the log-likelihood of choice 2 is nan"):
        pick("total")


WRONG_QUESTIONS = {
    "no choices": ({"prompt": "p", "completion": "a"}, "no column 'choices' with at least two texts"),
    "one choice": ({"prompt": "p", "completion": "a", "choices": ["a"]}, "at least two texts"),
    "an answer that is none": ({"prompt": "p", "completion": "blu", "choices": ["red", "blue"]}, "'blu' is none of its choices; did you mean 'blue'?"),
    "a number beyond": ({"prompt": "p", "completion": "2", "choices": ["red", "blue"]}, "'2' is none of its choices"),
    "twice the same": ({"prompt": "p", "completion": "red", "choices": ["red", "red "]}, "two of its choices are the same"),
}


@pytest.mark.parametrize("row,message", WRONG_QUESTIONS.values(), ids=WRONG_QUESTIONS)
def test_rows_whose_right_choice_cannot_be_told(row, message, tmp_path):
    with pytest.raises(ConfigError, match=rf"rows\.jsonl:2: .*{message}"):
        scored(recipe(tmp_path, [QUESTIONS[0], row], ["choice_accuracy"]))
    values, scorer = scored(recipe(tmp_path, [QUESTIONS[0], row], ["choice_accuracy"], data={"on_bad_row": "skip"}))
    assert len(scorer.main.choices) == 1 and values["choice_accuracy"] in (0, 1)


def test_choices_of_every_row_and_of_chats(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": answer}]} for answer in ("no", "yes")]
    _, scorer = scored(recipe(tmp_path, rows, ["choice_accuracy"], choices=["yes", "no"]))
    assert [question.correct for question in scorer.main.choices] == [1, 0]
    assert [c.answer for c in scorer.main.choices[0].candidates] == ["yes", "no"]


def test_held_out_rows_are_those_of_the_examples(tmp_path):
    rows = [{**QUESTIONS[0], "prompt": f"Question {i}"} for i in range(10)]
    _, scorer = scored(recipe(tmp_path, rows, ["choice_accuracy"], data={"eval": None, "holdout": 0.3, "eval_rows": 2}))
    assert [question.where for question in scorer.main.choices] == [example.where for example in scorer.main.examples]
    assert len(scorer.main.choices) == 2


def test_predictions_are_written_where_some_rows_have_no_choices(tmp_path):
    """The trap: one choice too long among a hundred rows, and a run that ends without its result, after all the training."""
    rows = [{**QUESTIONS[0], "choices": ["red", "a " * 200]}, QUESTIONS[0]]
    _, scorer = scored(recipe(tmp_path, rows, ["choice_accuracy"], data={"max_length": 64}))
    scorer.score("after", tmp_path / "predictions.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(scorer.main.examples) == 2 and [line["set"] for line in lines] == ["choices"] and QUESTIONS[0]["prompt"] in lines[0]["prompt"]


def test_choices_beyond_max_length_are_counted(tmp_path):
    rows = [QUESTIONS[0], {**QUESTIONS[0], "choices": ["red", "a " * 200]}]
    made = load_recipe(recipe(tmp_path, rows, ["choice_accuracy"], data={"max_length": 64}))
    _, tokenizer = pk.load("builtin:tiny")
    questions, notes = data.load_choices(made.data, tokenizer, None)
    assert len(questions) == 1 and "1 rows left out: a choice of theirs ends beyond max_length 64" in notes[1]


def test_unread_options_are_errors():
    for options, message in (
        ({"choices": ["a", "b"]}, "choice_accuracy"),
        ({"choice_length": "token"}, "choice_accuracy"),
        ({"match": "number"}, "exact_match"),
    ):
        with pytest.raises(ValueError, match=message):
            EvalConfig(**options)


@pytest.mark.skipif(not REAL.is_dir(), reason="the shared data is not here")
def test_real_questions(tmp_path):
    choices = [f"the correct answer is answer{i}" for i in range(1, 5)]
    config = recipe(tmp_path, QUESTIONS, ["choice_accuracy"], choices=choices, data={"eval": str(REAL / "openbookqa" / "test.json"), "eval_rows": 40})
    values, scorer = scored(config)
    assert len(scorer.main.choices) == 40 and {len(question.candidates) for question in scorer.main.choices} == {4}
    rows = json.loads((REAL / "openbookqa" / "test.json").read_text())[:40]
    assert [f"answer{question.correct + 1}" for question in scorer.main.choices] == [row["answer"] for row in rows]
    assert 0 <= values["choice_accuracy"] <= 0.6, "a model that never saw such questions guesses"


# --------------------------------------------------------------------------------------------------------------- numbers


NUMBERS = {
    "She has 3 + 4 = 7 apples.\n#### 7": 7, "the answer is 1,250.50.": "1250.50", "####-3": -3, "$18": 18, "none": None, "It is 5. #### unclear": None,
    "5 then 6": 6, "#### 12 (not 13)": 12, "costs .5": "0.5", "3-2": 2, "x = -2": -2, "": None,
}  # fmt: skip


@pytest.mark.parametrize("said,number", NUMBERS.items(), ids=[repr(said)[:20] for said in NUMBERS])
def test_final_number(said, number):
    assert final_number(said) == (None if number is None else Decimal(number))


def test_numbers_match_where_texts_do_not():
    assert not Prediction("So 7.", "3 + 4\n#### 7").correct and Prediction("So 7.0", "3 + 4\n#### 7", "number").correct
    assert not Prediction("So 8.", "#### 7", "number").correct and not Prediction("no idea", "no number", "number").correct


@pytest.mark.skipif(not REAL.is_dir(), reason="the shared data is not here")
def test_every_real_answer_has_its_number():
    rows = [json.loads(line) for line in (REAL / "gsm8k" / "test.jsonl").read_text().splitlines()]
    for row in rows:
        wanted = row["answer"].split("####")[1].strip().replace(",", "")
        assert final_number(row["answer"]) == Decimal(wanted)


def test_the_option_is_read(tmp_path, monkeypatch):
    rows = [{"prompt": "What is 3 + 4?", "completion": "#### 7"}]
    monkeypatch.setattr(sys.modules["peftkit.evaluate.exact_match"], "generate_answers", lambda *args: ["It is 7."])
    assert scored(recipe(tmp_path, rows, ["exact_match"]))[0]["exact_match"] == 0
    assert scored(recipe(tmp_path, rows, ["exact_match"], match="number"))[0]["exact_match"] == 1


# ---------------------------------------------------------------------------------------------------------- ROUGE and BLEU


def test_rouge_and_bleu_by_hand(tmp_path, monkeypatch):
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    rows = [{"prompt": "p", "completion": "the cat sat on the mat"}, {"prompt": "q", "completion": "a b c d e"}]
    monkeypatch.setattr(sys.modules["peftkit.evaluate.exact_match"], "generate_answers", lambda *args: ["the cat sat on a mat", "a b c d e"])
    values, _ = scored(recipe(tmp_path, rows, ["rouge", "bleu", "exact_match"]))
    assert values["rouge1"] == pytest.approx((5 / 6 + 1) / 2) and values["rouge2"] == pytest.approx((3 / 5 + 1) / 2) == values["rouge2"]
    assert values["rougeL"] == pytest.approx((5 / 6 + 1) / 2) and values["exact_match"] == 0.5
    matched, possible = [10, 7, 5, 3], [11, 9, 7, 5]  # n-grams of both answers together
    assert values["bleu"] == pytest.approx(100 * math.prod(m / p for m, p in zip(matched, possible, strict=True)) ** 0.25)


def test_one_generation_serves_all(tmp_path, monkeypatch):
    pytest.importorskip("rouge_score")
    calls = []
    monkeypatch.setattr(sys.modules["peftkit.evaluate.exact_match"], "generate_answers", lambda *args: calls.append(1) or ["x"])
    scored(recipe(tmp_path, [{"prompt": "p", "completion": "x"}], ["rouge", "exact_match"]))
    assert len(calls) == 1


@pytest.mark.parametrize("metric,module", [("rouge", "rouge_score"), ("bleu", "sacrebleu")])
def test_a_missing_package_is_said_before_anything_is_loaded(metric, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(text, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf'{metric} needs the package .* pip install "peftkit\[text\]"'):
        load_recipe(recipe(tmp_path, QUESTIONS, [metric]))
    load_recipe(recipe(tmp_path, QUESTIONS, ["exact_match"]))


def test_progress_adds_up(tmp_path):
    _, scorer = scored(recipe(tmp_path, QUESTIONS, ["loss", "perplexity", "exact_match", "choice_accuracy"], max_new_tokens=2, retained=["builtin:copy/test"]))
    seen = []
    config = scorer.recipe.eval
    evaluate.evaluate(
        scorer.model, scorer.tokenizer, scorer.loss, scorer.main, scorer.retained, config,
        lambda examples: to_batch([[example] for example in examples], scorer.loss), seen.append,
    )  # fmt: skip
    assert sum(seen) == evaluate.steps(scorer.main, scorer.retained, config) == 3 + 3 + 3 + 25


def test_the_mode_stays_and_sets_without_metrics_cost_nothing():
    model = tiny_llama().train()
    found = evaluate.evaluate(model, None, None, EvalSet("eval", []), [], EvalConfig(metrics=[]), list)
    assert model.training and found.values == {}


@pytest.mark.parametrize(
    ("row", "correct"),
    [
        ({"prompt": "p", "choices": ["8", "2", "24", "120"], "completion": 2}, 2),  # MMLU's answer is a place, and its choices may be numbers
        ({"prompt": "p", "choices": {"text": ["0", "1", "2", "3"], "label": ["1", "2", "3", "4"]}, "completion": "2"}, 1),
        ({"prompt": "p", "choices": ["7", "12"], "completion": 12}, 1),
        ({"prompt": "p", "choices": ["7", "12"], "completion": "7"}, 0),
    ],
)
def test_which_choice_is_the_right_one(row, correct, tmp_path):
    _, scorer = scored(recipe(tmp_path, [row], ["choice_accuracy"]))
    assert [question.correct for question in scorer.main.choices] == [correct]


def test_thinking_before_an_answer_is_not_the_answer():
    assert after_thinking("<think>\n\n</think>\n\n4") == "4" == after_thinking(" 4 ")


def test_rouge_of_a_script_that_it_cannot_read_is_refused():
    """The trap: rouge-score drops every letter but a to z, and a perfect answer scores 0."""
    pytest.importorskip("rouge_score")
    with pytest.raises(ConfigError, match="rouge counts words of a-z and 0-9, and 1 references have none"):
        text.rouge(["Привет мир"], ["Привет мир"])


def test_answers_end_where_positions_do_and_no_batch_shortens_the_next(monkeypatch):
    """GPT-2 has no row for a position beyond its table; what rotates goes on beyond, with all the room that was asked for."""
    model, tokenizer = pk.load("builtin:tiny", dtype="float32")
    model.config.max_position_embeddings = 40
    rooms, real = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **options: rooms.append(options["generation_config"].max_new_tokens) or real(**options))
    assert len(generate_answers(model.eval(), tokenizer, [[5] * 50, [5] * 37, [5] * 6], 8, 1)) == 3
    assert rooms == [8, 3, 8]  # from the shortest prompt to the longest
