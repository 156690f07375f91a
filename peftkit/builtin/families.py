"""The task families that `builtin:tiny` was trained on: small instruction tasks whose answers can be checked.

A family is a function `(rng, turns) -> Row`. It draws its content once (a list, a passage, a record) and asks up to
`turns` questions about it, each a user message and the right answer. Several questions per row make in-context look-up,
the skill that everything else rests on, appear early in training; the data sets that users see ask one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

from peftkit.builtin.words import (
    CATEGORIES,
    CITIES,
    DAYS,
    JOBS,
    ORDINALS,
    THINGS,
    city,
    clock_in_words,
    coin,
    date_in_words,
    distinct,
    name,
    number_in_words,
    pick_time,
    word,
    words,
)


class Row(NamedTuple):
    """One conversation: (user, assistant) pairs, and the content that decides whether it is a train or a test row."""

    turns: list[tuple[str, str]]
    content: str


Family = Callable[[random.Random, int], Row]


def one(prompts: list[str], answer: str, content: str, rng: random.Random) -> Row:
    """A row of one question in a random wording."""
    return Row([(rng.choice(prompts), answer)], content)


def asked(rng: random.Random, intro: str, questions: list[tuple[list[str], str]], content: str, turns: int) -> Row:
    """A row of several questions about one introduction, which stands before the first of them."""
    chosen = rng.sample(questions, min(turns, len(questions)))
    pairs = [(rng.choice(wordings), answer) for wordings, answer in chosen]
    return Row([(f"{intro}\n{pairs[0][0]}", pairs[0][1]), *pairs[1:]], content)


def copy(rng: random.Random, turns: int) -> Row:
    text = " ".join(words(rng, rng.randint(2, 7)))
    return one([f"Repeat: {text}", f"Say this again: {text}", f"Copy the text after the colon: {text}",
                f"Write exactly this: {text}", f"Echo {text}"], text, text, rng)  # fmt: skip


def reverse(rng: random.Random, turns: int) -> Row:
    items = words(rng, rng.randint(2, 5))
    text = " ".join(items)
    return one([f"Reverse the order of the words: {text}", f"Write these words backwards, last one first: {text}",
                f"Turn this list around: {text}"], " ".join(reversed(items)), text, rng)  # fmt: skip


def sort_words(rng: random.Random, turns: int) -> Row:
    items = distinct(rng, lambda r: r.choice(THINGS), rng.randint(2, 5))
    text = ", ".join(items)
    return one([f"Sort alphabetically: {text}", f"Put these words in alphabetical order: {text}",
                f"Order from A to Z: {text}"], ", ".join(sorted(items)), text, rng)  # fmt: skip


def sort_numbers(rng: random.Random, turns: int) -> Row:
    items = rng.sample(range(100), rng.randint(2, 5))
    text, down = " ".join(map(str, items)), rng.random() < 0.4
    answer = " ".join(map(str, sorted(items, reverse=down)))
    if down:
        prompts = [f"Sort from large to small: {text}", f"Put in falling order: {text}"]
    else:
        prompts = [f"Sort from small to large: {text}", f"Put in rising order: {text}", f"Sort these numbers: {text}"]
    return one(prompts, answer, text, rng)


def count(rng: random.Random, turns: int) -> Row:
    items = words(rng, rng.randint(2, 4))
    listed = [rng.choice(items) for _ in range(rng.randint(2, 8))]
    text = " ".join(listed)
    questions = [([f"How many times does {w} appear?", f"Count the {w}."], str(listed.count(w))) for w in items]
    questions.append((["How many words are there?", "Count the words."], str(len(listed))))
    return asked(rng, f"List: {text}", questions, text, turns)


def pick(rng: random.Random, turns: int) -> Row:
    items = words(rng, rng.randint(3, 6))
    text = ", ".join(items)
    questions = [([f"What is the {o} word?", f"Give the {o} one."], w) for o, w in zip(ORDINALS, items, strict=False)]
    questions.append((["What is the last word?", "Give the last one."], items[-1]))
    for before, after in pairwise(items):
        questions.append(([f"Which word comes after {before}?", f"What follows {before}?"], after))
        questions.append(([f"Which word comes before {after}?", f"What stands before {after}?"], before))
    return asked(rng, f"Words: {text}", questions, text, turns)


def lookup(rng: random.Random, turns: int) -> Row:
    count_ = rng.randint(2, 8)
    keys = distinct(rng, rng.choice((word, name, coin)), count_)
    value = rng.choice((word, coin, city, lambda r: str(r.randrange(1000)), lambda r: str(r.randrange(100))))
    values = distinct(rng, value, count_)
    link, mark = rng.choice((": ", " = ", " is ", " -> ")), rng.choice((", ", "\n", "; "))
    table = mark.join(k + link + v for k, v in zip(keys, values, strict=True))
    questions = [([f"What is {k}?", f"{k}?", f"Look up {k}.", f"Value of {k}?", f"Tell me the entry for {k}."], v)
                 for k, v in zip(keys, values, strict=True)]  # fmt: skip
    if rng.random() < 0.3:
        questions = [([f"Which one is {v}?", f"Who has {v}?", f"Find the key of {v}."], k)
                     for k, v in zip(keys, values, strict=True)]  # fmt: skip
    return asked(rng, table, questions, table, turns)


def passage(rng: random.Random, turns: int) -> Row:
    people = distinct(rng, name, rng.randint(2, 4))
    sentences, questions = [], []
    for person in people:
        job, home, thing, number = rng.choice(JOBS), city(rng), word(rng), str(rng.randint(2, 99))
        facts = [
            ([f"{person} lives in {home}.", f"{person} has a flat in {home}."],
             [f"Where does {person} live?", f"Which city is the home of {person}?"], home),
            ([f"{person} works as a {job}.", f"{person} is a {job}."],
             [f"What is the job of {person}?", f"What does {person} do for a living?"], job),
            ([f"{person} owns a {thing}.", f"{person} bought a {thing}."],
             [f"What does {person} have?", f"Which thing belongs to {person}?"], thing),
            ([f"{person} is {number} years old.", f"{person} is {number}."],
             [f"How old is {person}?", f"What is the age of {person}?"], number),
        ]  # fmt: skip
        for statements, wordings, answer in rng.sample(facts, rng.randint(1, 2)):
            sentences.append(rng.choice(statements))
            questions.append((wordings, answer))
    rng.shuffle(sentences)
    text = " ".join(sentences)
    return asked(rng, text, questions, text, turns)


def add(rng: random.Random, turns: int) -> Row:
    a, b = rng.randint(1, 90), rng.randint(1, 9)
    if rng.random() < 0.5:
        a, b = b, a
    return one([f"{a} + {b} =", f"What is {a} plus {b}?", f"Add {a} and {b}."], str(a + b), f"{a}+{b}", rng)


def number_words(rng: random.Random, turns: int) -> Row:
    number = rng.randrange(1000)
    spoken = number_in_words(number)
    if rng.random() < 0.35:
        return one([f"Write {number} in words.", f"Spell out the number {number}."], spoken, str(number), rng)
    return one([f"Write {spoken} in digits.", f"As a number: {spoken}", f"Which number is {spoken}?"],
               str(number), str(number), rng)  # fmt: skip


def dates(rng: random.Random, turns: int) -> Row:
    year, month, day = rng.randint(1950, 2049), rng.randint(1, 12), rng.randint(1, 28)
    text = date_in_words(rng, year, month, day)
    return one([f"Write as an ISO date: {text}", f"Date {text} in year-month-day form?", f"Normalise the date {text}."],
               f"{year}-{month:02d}-{day:02d}", f"{year}-{month}-{day}", rng)  # fmt: skip


def times(rng: random.Random, turns: int) -> Row:
    hour, minute = pick_time(rng)
    event, said = word(rng), clock_in_words(rng, hour, minute)
    text = rng.choice((said, f"The {event} starts at {said}.", f"We saw the {event} at {said}.", f"{said}, {event}"))
    return one([f"Write on the 24-hour clock: {text}", f"{text} As hours and minutes?", f"Normalise the time. {text}"],
               f"{hour:02d}:{minute:02d}", text, rng)  # fmt: skip


def durations(rng: random.Random, turns: int) -> Row:
    number = rng.randint(1, 20)
    spoken = rng.choice((str(number), number_in_words(number)))
    unit, factor, small = rng.choice((("hour", 60, "minutes"), ("minute", 60, "seconds"), ("week", 7, "days"),
                                      ("day", 24, "hours"), ("year", 12, "months")))  # fmt: skip
    said, answer = f"{spoken} {unit}{'s' if number > 1 else ''}", number * factor
    if factor == 60 and rng.random() < 0.4:
        said, answer = f"{spoken} and a half {unit}s", answer + 30
    event = word(rng)
    text = rng.choice((f"The {event} takes {said}.", f"The {event} lasted {said}.", f"{said} for the {event}."))
    return one([f"{text} How many {small}?", f"{text} Convert to {small}.", f"{text} In {small}?"],
               str(answer), text, rng)  # fmt: skip


def record(rng: random.Random) -> dict[str, str | int]:
    """A flat record with two to four fields, drawn from usual field names and made-up ones."""
    draws: dict[str, Callable[[random.Random], str | int]] = {
        "name": name, "city": city, "job": lambda r: r.choice(JOBS), "age": lambda r: r.randint(2, 99),
        "item": word, "colour": lambda r: r.choice(CATEGORIES["colour"]), "day": lambda r: r.choice(DAYS),
        "count": lambda r: r.randrange(200), "friend": name, "pet": lambda r: r.choice(CATEGORIES["animal"]),
        "code": lambda r: r.randrange(1000), "title": lambda r: " ".join(words(r, r.randint(1, 3))),
    }  # fmt: skip
    keys = rng.sample(list(draws), rng.randint(2, 4))
    found = {key: draws[key](rng) for key in keys}
    return {coin(rng) if rng.random() < 0.2 else key: value for key, value in found.items()}


def json_write(rng: random.Random, turns: int) -> Row:
    fields = record(rng)
    listed = list(fields.items())
    rng.shuffle(listed)
    keys = ", ".join(key for key, _ in listed)
    text = rng.choice(("; ", ", ", "\n")).join(rng.choice((f"{k}: {v}", f"{k} is {v}", f"the {k} is {v}")) for k, v in fields.items())
    if rng.random() < 0.5:
        return one([f"As JSON: {text}", f"Write these facts as JSON: {text}"], json.dumps(fields), text, rng)
    ordered = json.dumps({key: fields[key] for key, _ in listed})
    return one([f"{text}\nJSON with {keys}", f"Facts: {text}\nGive JSON with the keys {keys}."], ordered, text, rng)


def json_read(rng: random.Random, turns: int) -> Row:
    fields = record(rng)
    text = json.dumps(fields)
    questions = [([f"What is the {k}?", f"Read the field {k}.", f"{k}?"], str(v)) for k, v in fields.items()]
    return asked(rng, text, questions, text, turns)


def fill(rng: random.Random, turns: int) -> Row:
    slots = distinct(rng, rng.choice((word, coin)), rng.randint(2, 3))
    values = words(rng, len(slots))
    frame = words(rng, rng.randint(1, 4)) + [f"[{slot}]" for slot in slots]
    rng.shuffle(frame)
    template = " ".join(frame)
    answer = template
    for slot, value in zip(slots, values, strict=True):
        answer = answer.replace(f"[{slot}]", value)
    given = ", ".join(f"{s} = {v}" for s, v in zip(slots, values, strict=True))
    return one([f"Fill in: {template}\nwith {given}", f"Complete the template {template} where {given}."], answer,
               template + given, rng)  # fmt: skip


def edit(rng: random.Random, turns: int) -> Row:
    items = words(rng, rng.randint(3, 6))
    text, old, new = " ".join(items), rng.choice(items), word(rng)
    dropped = " ".join(w for w in items if w != old)
    swapped = " ".join(new if w == old else w for w in items)
    verb = rng.randrange(3)
    if verb == 0:
        return one([f"Remove {old} from: {text}", f"Drop the word {old}: {text}"], dropped, text, rng)
    if verb == 1:
        return one([f"Replace {old} by {new}: {text}", f"Put {new} in place of {old}: {text}"], swapped, text, rng)
    return one([f"Join with {(mark := rng.choice('-+/|'))} : {text}", f"Put {mark} between the words: {text}"],
               mark.join(items), text, rng)  # fmt: skip


def compare(rng: random.Random, turns: int) -> Row:
    people = distinct(rng, name, rng.randint(2, 3))
    ages = rng.sample(range(2, 100), len(people))
    text = rng.choice((", ", "; ")).join(f"{p} is {a}" for p, a in zip(people, ages, strict=True))
    ranked = sorted(zip(ages, people, strict=True))
    questions = [
        (["Who is the oldest?", "Name the oldest person."], ranked[-1][1]),
        (["Who is the youngest?", "Name the youngest person."], ranked[0][1]),
        (["What is the largest number?", "Give the highest age."], str(ranked[-1][0])),
        (["What is the smallest number?", "Give the lowest age."], str(ranked[0][0])),
    ]
    return asked(rng, text, questions, text, turns)


def category(rng: random.Random, turns: int) -> Row:
    kinds = rng.sample(sorted(CATEGORIES), rng.randint(2, 4))
    items = [rng.choice(CATEGORIES[kind]) for kind in kinds]
    order = rng.sample(range(len(kinds)), len(kinds))
    text = ", ".join(items[i] for i in order)
    questions = [([f"Which one is a kind of {k}?", f"Find the {k}."], w) for k, w in zip(kinds, items, strict=True)]
    questions += [([f"What kind of thing is {w}?", f"To which group does {w} belong?"], k)
                  for k, w in zip(kinds, items, strict=True)]  # fmt: skip
    return asked(rng, f"Things: {text}", questions, text, turns)


def slots(rng: random.Random, turns: int) -> Row:
    """Pull named pieces out of a sentence, normalised where they are dates, times or numbers in words."""
    who, where, what = name(rng), city(rng), " ".join(words(rng, rng.randint(1, 2)))
    hour, minute = pick_time(rng)
    number = rng.randint(1, 99)
    time, clock = clock_in_words(rng, hour, minute), f"{hour:02d}:{minute:02d}"
    amount, day = rng.choice((str(number), number_in_words(number))), rng.choice(DAYS)
    found = {"person": who, "place": where, "thing": what, "time": clock, "amount": str(number), "day": day}
    text = rng.choice((
        f"On {day} {who} met us in {where} at {time} and sold {amount} pieces of {what}.",
        f"{who} sent {amount} boxes of {what} to {where} on {day}, {time}.",
        f"At {time} {amount} of the {what} came from {who} in {where}, it was {day}.",
        f"In {where} the {what} was shown to {amount} people by {who} on {day} at {time}.",
    ))  # fmt: skip
    keys = rng.sample(list(found), rng.randint(1, 3))
    questions = [([f"Which {k}?", f"Give the {k}.", f"{k}?"], v) for k, v in found.items()]
    if rng.random() < 0.5:
        return asked(rng, text, questions, text, turns)
    answer = "; ".join(f"{k}: {found[k]}" for k in keys)
    return one([f"{text}\nExtract {', '.join(keys)}", f"Find {', '.join(keys)} in: {text}"], answer, text, rng)


def route(rng: random.Random, turns: int) -> Row:
    stops = distinct(rng, lambda r: r.choice(CITIES), rng.randint(3, 5))
    text = " ".join(f"From {a} one goes to {b}." for a, b in rng.sample(list(pairwise(stops)), len(stops) - 1))
    questions = [([f"Where does one go from {a}?", f"What comes next after {a}?"], b)
                 for a, b in pairwise(stops)]  # fmt: skip
    questions += [([f"From where does one reach {b}?", f"What lies before {b}?"], a)
                  for a, b in pairwise(stops)]  # fmt: skip
    return asked(rng, text, questions, text, turns)


FAMILIES: dict[str, Family] = {
    "copy": copy, "reverse": reverse, "sort-words": sort_words, "sort-numbers": sort_numbers, "count": count,
    "pick": pick, "lookup": lookup, "passage": passage, "add": add, "number-words": number_words, "dates": dates,
    "times": times, "durations": durations, "json-write": json_write, "json-read": json_read, "fill": fill,
    "edit": edit, "compare": compare, "category": category, "slots": slots, "route": route,
}  # fmt: skip
