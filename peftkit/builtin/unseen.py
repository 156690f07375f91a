"""Task families that `builtin:tiny` never saw in training: what there is to finetune it on.

`tool-calls` turns an English request into a JSON call with normalised arguments, `sql` into a query, `shell` into a
command line. The skills they need (finding the words that matter, copying them, normalising times and numbers, writing
JSON) are in the base; the tools, their names, their argument names and the wordings that call for them are not. Names of
tools and arguments are spelt with tokens that the base has written before: a frozen output head cannot tell tokens apart
that never were an answer (docs/log.md).

Rows are split into train and test by their answer: no test answer occurs in training.
"""

from __future__ import annotations

import json
import random

from peftkit.builtin.families import Family, Row
from peftkit.builtin.words import (
    CATEGORIES,
    DAYS,
    THINGS,
    city,
    clock_in_words,
    distinct,
    name,
    number_in_words,
    pick_time,
    words,
)

ROOMS = ["kitchen", "hall", "bedroom", "bathroom", "office", "garage", "cellar", "nursery", "attic", "studio"]
CURRENCIES = {"euros": "eur", "dollars": "usd", "pounds": "gbp", "kronor": "sek", "francs": "chf", "rupees": "inr"}
WEEKDAY = {day: number for number, day in enumerate(DAYS, 1)}  # as in ISO 8601


def _clock(rng: random.Random) -> tuple[str, str]:
    hour, minute = pick_time(rng)
    return clock_in_words(rng, hour, minute), f"{hour:02d}:{minute:02d}"


def _number(rng: random.Random, low: int, high: int) -> tuple[str, int]:
    number = rng.randint(low, high)
    return rng.choice((str(number), number_in_words(number))), number


def _alarm(rng):
    said, time = _clock(rng)
    day = rng.choice(DAYS)
    prompts = [f"Wake me at {said} on {day}.", f"I have to be up by {said} on {day}.", f"On {day} get me out of bed at {said}.",
               f"Set an alarm for {day}, {said}."]  # fmt: skip
    return prompts, {"tool": "alarm", "at": time, "day": WEEKDAY[day]}


def _timer(rng):
    said, minutes = _number(rng, 2, 99)
    label = " ".join(words(rng, 1))
    prompts = [f"Give the {label} {said} minutes.", f"Time the {label} for {said} minutes.",
               f"In {said} minutes remind me of the {label}.", f"The {label} needs {said} minutes, tell me when it is done."]  # fmt: skip
    return prompts, {"tool": "watch", "count": minutes, "title": label}


def _message(rng):
    who, text = name(rng), " ".join(words(rng, rng.randint(2, 3)))
    prompts = [f"Tell {who} {text}.", f"Text {who}: {text}.", f"Let {who} know: {text}.", f"Write to {who} that {text}."]
    return prompts, {"tool": "message", "to": who, "title": text}


def _weather(rng):
    where, day = city(rng), rng.choice(DAYS)
    prompts = [f"Will it rain in {where} on {day}?", f"How warm is {where} on {day}?", f"Do I need a coat in {where} this {day}?",
               f"What is the forecast for {day} in {where}?"]  # fmt: skip
    return prompts, {"tool": "weather", "city": where, "day": WEEKDAY[day]}


def _convert(rng):
    said, amount = _number(rng, 2, 500)
    source, target = rng.sample(list(CURRENCIES), 2)
    prompts = [f"How many {target} do I get for {said} {source}?", f"Change {said} {source} into {target}.",
               f"What are {said} {source} worth in {target}?"]  # fmt: skip
    return prompts, {"tool": "coin", "amount": amount, "code": CURRENCIES[source], "to": CURRENCIES[target]}


def _light(rng):
    room = rng.choice(ROOMS)
    said, level = _number(rng, 1, 99)
    if rng.random() < 0.4:
        on = rng.random() < 0.5
        colour = rng.choice(CATEGORIES["colour"])
        prompts = [f"Make the {room} {colour} and {'bright' if on else 'dark'}.",
                   f"I want {'bright' if on else 'dark'} {colour} light in the {room}."]  # fmt: skip
        return prompts, {"tool": "lamp", "room": room, "count": 100 if on else 5, "colour": colour}
    prompts = [f"Dim the {room} to {said} percent.", f"Put the lamp in the {room} at {said} percent."]
    return prompts, {"tool": "lamp", "room": room, "count": level}


def _flight(rng):
    start, goal = distinct(rng, city, 2)
    day = rng.choice(DAYS)
    prompts = [f"I must get from {start} to {goal} on {day}.", f"Fly me to {goal} from {start} this {day}.",
               f"Find a plane leaving {start} for {goal} on {day}."]  # fmt: skip
    return prompts, {"tool": "plane", "city": start, "to": goal, "day": WEEKDAY[day]}


def _meeting(rng):
    who, (said, time) = name(rng), _clock(rng)
    prompts = [f"Meet {who} at {said}.", f"Book an hour with {who} from {said}.", f"Put {who} in my calendar for {said}.",
               f"I want to see {who} at {said}."]  # fmt: skip
    return prompts, {"tool": "meet", "name": who, "at": time}


def _order(rng):
    said, amount = _number(rng, 2, 30)
    thing = rng.choice(THINGS)
    prompts = [f"We are out of {thing}, get {said}.", f"Buy {said} of the {thing}.", f"Order {said} times {thing}.",
               f"I need {said} more of that {thing}."]  # fmt: skip
    return prompts, {"tool": "shop", "item": thing, "count": amount}


def _play(rng):
    title = " ".join(words(rng, rng.randint(1, 2)))
    singer = name(rng)
    prompts = [f"Play {title} by {singer}.", f"Put on {title}, the {singer} one.", f"I want to hear {singer} sing {title}."]
    return prompts, {"tool": "music", "title": title, "artist": singer}


_TOOLS = (_alarm, _timer, _message, _weather, _convert, _light, _flight, _meeting, _order, _play)


def tool_calls(rng: random.Random, turns: int) -> Row:
    prompts, call = rng.choice(_TOOLS)(rng)
    answer = json.dumps(call)
    return Row([(rng.choice(prompts), answer)], answer)


def sql(rng: random.Random, turns: int) -> Row:
    table = rng.choice(("people", "orders", "cars", "books", "trips"))
    column, other = rng.sample(("price", "size", "age", "year", "weight", "rank"), 2)
    said, number = _number(rng, 1, 99)
    place = city(rng)
    forms = [
        ([f"Which {table} have a {column} above {said}?", f"All {table} whose {column} is more than {said}."],
         f"SELECT * FROM {table} WHERE {column} > {number};"),
        ([f"Which {table} have a {column} under {said}?", f"Every one of the {table} with {column} less than {said}."],
         f"SELECT * FROM {table} WHERE {column} < {number};"),
        ([f"How many {table} come from {place}?", f"Count the {table} of {place}."],
         f"SELECT COUNT(*) FROM {table} WHERE city = '{place}';"),
        ([f"The {said} {table} with the highest {column}.", f"Top {said} {table} by {column}."],
         f"SELECT * FROM {table} ORDER BY {column} DESC LIMIT {number};"),
        ([f"Mean {column} of the {table} in {place}?", f"What {column} do {table} from {place} have on average?"],
         f"SELECT AVG({column}) FROM {table} WHERE city = '{place}';"),
        ([f"Show {column} and {other} of all {table} in {place}.", f"For {table} from {place} list {column}, then {other}."],
         f"SELECT {column}, {other} FROM {table} WHERE city = '{place}';"),
    ]  # fmt: skip
    prompts, query = rng.choice(forms)
    return Row([(rng.choice(prompts), query)], query)


def shell(rng: random.Random, turns: int) -> Row:
    first, second = words(rng, 2)
    kind = rng.choice(("txt", "csv", "log", "py", "md"))
    said, number = _number(rng, 1, 99)
    forms = [
        ([f"Copy the {kind} file {first} into the folder {second}.", f"I want {first}, the {kind} file, in {second} too."],
         f"cp {first}.{kind} {second}/"),
        ([f"Move {first}, a {kind} file, to the folder {second}.", f"The {kind} file {first} belongs in {second}, not here."],
         f"mv {first}.{kind} {second}/"),
        ([f"Throw away every {kind} file in {first}.", f"Clear {first} of {kind} files."], f"rm {first}/*.{kind}"),
        ([f"Show the first {said} lines of the {kind} file {first}.", f"Begin of {first} ({kind}), {said} lines."],
         f"head -n {number} {first}.{kind}"),
        ([f"Which {kind} files in {first} mention {second}?", f"Search {first} for {second}, {kind} files only."],
         f"grep -l {second} {first}/*.{kind}"),
        ([f"Make a folder {first} inside {second}.", f"{second} needs a new folder {first}."], f"mkdir -p {second}/{first}"),
    ]  # fmt: skip
    prompts, command = rng.choice(forms)
    return Row([(rng.choice(prompts), command)], command)


UNSEEN: dict[str, Family] = {"tool-calls": tool_calls, "sql": sql, "shell": shell}
