"""Word lists and small random helpers shared by the task families.

Real words make the prompts read like prompts; pseudo-words (`coin`) keep the vocabulary open, so that a model has
to copy what stands in front of it instead of remembering what it once saw.
"""

from __future__ import annotations

import random

# fmt: off
NAMES = (
    "Ada Alan Alice Amir Ana Anders Anna Arun Aya Bao Bela Ben Bianca Boris Bruno Carla Carlos Cem Chen Chloe Clara "
    "Dana Daniel Dario David Diego Dina Dora Edith Elena Eli Ella Emil Emma Eric Eva Farah Felix Fiona Frank Freya "
    "Gina Grace Greta Gus Hana Hans Hasan Helen Hugo Ida Igor Ines Ingrid Ira Iris Ivan Jack Jana Jin Joan Jonas Jose "
    "Juan Julia June Kai Karim Kate Kenji Kira Klara Lars Laura Lea Leila Lena Leo Liam Lily Lin Lisa Lola Luca Lucy "
    "Luis Mara Marco Maria Mark Marta Max Maya Mei Mia Mila Milo Mina Mira Nadia Nana Nia Nico Nils Nina Noah Nora "
    "Olga Oliver Omar Oscar Otto Paula Pavel Pedro Petra Pia Priya Quinn Rafa Raj Rania Rita Robin Rosa Ruth Sam Sara "
    "Selma Simon Sofia Sven Tania Tara Theo Tina Tom Uma Vera Victor Vito Wanda Wei Yara Yuki Yusuf Zara Zoe"
).split()

CITIES = (
    "Accra Aden Ankara Athens Baku Bergen Berlin Bern Bogota Boston Cairo Calgary Chicago Cork Dakar Dallas Delhi "
    "Denver Dublin Geneva Ghent Hanoi Havana Houston Istanbul Jakarta Kyoto Lagos Leeds Lima Lisbon London Luanda "
    "Lyon Madrid Malaga Manila Miami Milan Minsk Munich Nairobi Naples Nice Osaka Oslo Paris Perth Porto Prague Quito "
    "Riga Rome Seoul Sofia Sydney Tallinn Tampa Tokyo Toronto Tripoli Tunis Turin Venice Vienna Warsaw York Zagreb Zurich"
).split()

JOBS = (
    "actor baker banker barber builder butcher carpenter chef clerk coach dentist doctor driver editor engineer farmer "
    "fisher gardener guard judge lawyer librarian mechanic miner nurse painter pilot plumber poet potter sailor singer "
    "tailor teacher waiter weaver welder writer"
).split()

CATEGORIES = {
    "animal": "badger bear beaver camel cat cow crab deer dog donkey duck eagle fox frog goat goose hamster hawk horse "
    "lion lizard monkey moose mouse otter owl panda pig rabbit rat seal shark sheep snake spider swan tiger turtle "
    "whale wolf zebra".split(),
    "fruit": "apple apricot banana cherry date fig grape guava kiwi lemon lime mango melon olive orange papaya peach "
    "pear pineapple plum quince raspberry".split(),
    "colour": "amber beige black blue brown crimson cyan gold green grey indigo ivory magenta maroon pink purple red "
    "silver teal turquoise violet white yellow".split(),
    "tool": "axe broom chisel clamp drill file hammer hoe ladder mallet needle pliers rake ruler saw scissors shovel "
    "spade spanner wrench".split(),
    "drink": "beer cider cocoa coffee juice lemonade milk soda tea water wine".split(),
    "clothing": "belt boot coat dress glove hat jacket scarf shirt shoe skirt sock sweater tie vest".split(),
    "vehicle": "bicycle boat bus canoe car ferry plane rocket scooter ship sledge tractor train tram truck van".split(),
    "instrument": "banjo bell cello clarinet drum fiddle flute guitar harp horn lute organ piano trumpet tuba".split(),
}

THINGS = sorted({word for words in CATEGORIES.values() for word in words}) + (
    "arrow bag ball basket bed blanket book bottle bowl box brick bridge bucket button cable candle card carpet chain "
    "chair clock cloud coin comb corner cup cushion desk door engine envelope farm fence field flag floor flower fork "
    "garden gate glass hill house island jar jug kettle key kite knife lake lamp leaf letter lock map market mirror "
    "mountain nail nest net paper path pen pencil phone picture pillow pipe plate pocket pond pool poster road rock roof "
    "room rope sand school seed shelf shop sign soap spoon stamp star station stone stove street string table tent "
    "ticket towel tower toy tree tunnel umbrella valley vase village wall wallet watch wheel window wire wood yard"
).split()

MONTHS = (
    "January February March April May June July August September October November December".split()
)
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
ORDINALS = "first second third fourth fifth sixth".split()

# fmt: on

_ONSETS = "b bl br c ch cl d dr f fl g gl gr h j k kl l m n p pl pr qu r s sh sk sl st t th tr v w z".split()
_VOWELS = "a e i o u ai ea ee oa ou".split()
_CODAS = ["", "", "", *"b ck d g l m n p r s t x nd nk rt st".split()]


def coin(rng: random.Random) -> str:
    """A pronounceable pseudo-word of one to three syllables."""
    syllables = rng.choice((1, 2, 2, 3))
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables)) + rng.choice(_CODAS)


def word(rng: random.Random) -> str:
    """A real word or a pseudo-word, half and half."""
    return rng.choice(THINGS) if rng.random() < 0.5 else coin(rng)


def words(rng: random.Random, count: int) -> list[str]:
    """`count` different words."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[word(rng)] = None
    return list(found)


def name(rng: random.Random) -> str:
    """A first name, one time in four a made-up one."""
    return rng.choice(NAMES) if rng.random() < 0.75 else coin(rng).capitalize()


def city(rng: random.Random) -> str:
    """A city, one time in four a made-up one."""
    return rng.choice(CITIES) if rng.random() < 0.75 else coin(rng).capitalize()


def distinct(rng: random.Random, draw, count: int) -> list[str]:
    """`count` different results of `draw(rng)`."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw(rng)] = None
    return list(found)


def number_in_words(number: int) -> str:
    """0 to 999 in English words: 342 -> "three hundred and forty-two"."""
    if number < 20:
        return UNITS[number]
    if number < 100:
        tens, rest = divmod(number, 10)
        return TENS[tens] + (f"-{UNITS[rest]}" if rest else "")
    hundreds, rest = divmod(number, 100)
    return f"{UNITS[hundreds]} hundred" + (f" and {number_in_words(rest)}" if rest else "")


def clock_in_words(rng: random.Random, hour: int, minute: int) -> str:
    """A time of day as people say it; always names the half of the day, so that it has one answer."""
    twelve = (hour - 1) % 12 + 1
    spoken, following = number_in_words(twelve), number_in_words(twelve % 12 + 1)
    part = "in the morning" if hour < 12 else "in the afternoon" if hour < 18 else "in the evening"
    half = "am" if hour < 12 else "pm"
    forms = [f"{twelve}:{minute:02d} {half}"]
    if minute == 0:
        forms += [f"{twelve} {half}", f"{spoken} o'clock {part}", f"{spoken} {part}"]
    elif minute == 30:
        forms += [f"half past {spoken} {part}", f"{spoken} thirty {part}"]
    elif minute == 15:
        forms += [f"quarter past {spoken} {part}"]
    elif minute == 45 and hour % 12 != 11:  # "quarter to twelve" would change the half of the day
        forms += [f"quarter to {following} {part}"]
    else:
        forms += [f"{spoken} {number_in_words(minute)} {part}"] if minute >= 10 else []
    return rng.choice(forms)


def date_in_words(rng: random.Random, year: int, month: int, day: int) -> str:
    """A date in one of the usual English forms."""
    suffix = "th" if 10 <= day <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    name_, short = MONTHS[month - 1], MONTHS[month - 1][:3]
    forms = (
        f"{day} {name_} {year}",
        f"{name_} {day}, {year}",
        f"{day}{suffix} of {name_} {year}",
        f"{short} {day} {year}",
        f"{name_} {day}{suffix}, {year}",
        f"{day} {short} {year}",
    )
    return rng.choice(forms)


def pick_time(rng: random.Random) -> tuple[int, int]:
    """Hour 5 to 22, minute in steps of five with the quarters favoured."""
    return rng.randint(5, 22), rng.choice((0, 0, 15, 30, 30, 45, rng.randrange(5, 60, 5)))
