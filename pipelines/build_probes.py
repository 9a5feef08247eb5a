"""Makes the fidelity probes that ship: short questions about passages written for them, by templates and a seed.

    python pipelines/build_probes.py --out compllm_rag/data/probes.jsonl.gz

Each kind asks for something that compression may lose: a digit, a date, who of several people, an identifier, a "not",
which came first, or one sentence somewhere in a long passage. Each passage names several things of the same sort, so
that a guess at the sort of the answer is not enough. No text of others is in it, and no model was asked while it was
made. Rows are those of `compllm-rag eval --data`, with `kind` and, for needles, `depth` (percent of the passage).
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

SEED, EACH, NEEDLES, DEPTHS = 20260, 36, 8, (0, 25, 50, 75, 100)

Row = dict[str, Any]


def _words(text: str) -> list[str]:
    return text.split()


PLACES = _words(
    "Aldermoor Brackwell Cinderford Dunhallow Eastmere Farrowby Glenhaven Hartsfell Inchmore Juniper-Hill Kestrelton "
    "Larkbridge Millbeck Northwick Oldcastle Pennyworth Quarrington Ravensholm Stonebarrow Thistledown Underwood "
    "Vinterby Westerlow Yarrowdale"
)
FIRST = _words(
    "Agnes Bertil Carla Dmitri Edda Farid Greta Hugo Imani Jonas Katya Leopold Mirela Nadim Oskar Petra Ruben Sunniva "
    "Tomasz Ulrike Viktor Wanda Yusuf Zelda"
)
LAST = _words(
    "Abernathy Bjornson Castellan Dvorak Eriksen Fontaine Grimaldi Halvorsen Ivanov Jankowski Kowalczyk Lindqvist "
    "Moreau Novak Okafor Petrov Quist Rasmussen Szabo Takacs Ullman Varga Weiss Zeller"
)
MONTHS = _words("January February March April May June July August September October November December")
NOUNS = _words("ledger parcel ticket receipt sensor report cargo voucher beacon roster turbine catalog")
WORDS = _words("copper lantern saffron walrus marble falcon juniper anchor velvet comet cedar harpoon")


def numbers(rng: random.Random, number: int) -> Row:
    """Counts, prices and lengths beside each other."""
    place, other, third = rng.sample(PLACES, 3)
    kind = number % 3
    if kind == 0:
        works, goods = rng.choice([("brickworks", "bricks"), ("dairy", "cheeses"), ("foundry", "bells")])
        a, b, c, d = (rng.randrange(*span) for span in ((31, 980), (1100, 5000), (5100, 9900), (110, 890)))
        text = (
            f"The {place} {works} employs {a} people. In an ordinary week it turns out {b} {goods}, in the weeks "
            f"before a holiday {c}. Its oldest machine weighs {d} kilograms and still runs every day."
        )
        asked: list[tuple[str, float, str]] = [
            (f"How many people does the {place} {works} employ?", a, "people"),
            (f"How many {goods} does the {place} {works} turn out in an ordinary week?", b, goods),
            (f"How many {goods} does the {place} {works} turn out in the weeks before a holiday?", c, goods),
            (f"How many kilograms does the oldest machine of the {place} {works} weigh?", d, "kilograms"),
        ]
    elif kind == 1:
        lots = rng.sample(range(12, 99), 3)
        prices = rng.sample(range(215, 9800), 3)
        text = (
            f"At the {place} auction lot {lots[0]}, a clock, went for {prices[0]} euros. Lot {lots[1]}, a chest from "
            f"{other}, brought {prices[1]} euros after a long fight. Nobody had expected {prices[2]} euros for lot "
            f"{lots[2]}, a box of letters."
        )
        asked = [
            (f"For how many euros did lot {lot} go at the {place} auction?", price, "euros")
            for lot, price in zip(lots, prices, strict=True)
        ]
    else:
        length, width, height = (
            rng.randrange(1010, 9990) / 10,
            rng.randrange(310, 990) / 100,
            rng.randrange(101, 890) / 10,
        )
        text = (
            f"The bridge between {other} and {third} is {length} metres long and {width} metres wide. Its deck lies "
            f"{height} metres above the water, and the toll house stands on the {third} side."
        )
        bridge = f"the bridge between {other} and {third}"
        asked = [
            (f"How many metres long is {bridge}?", length, "metres"),
            (f"How many metres wide is {bridge}?", width, "metres"),
            (f"How many metres above the water does the deck of {bridge} lie?", height, "metres"),
        ]
    question, value, unit = rng.choice(asked)
    return {"title": place, "context": text, "question": question, "answers": [f"{value}", f"{value} {unit}"]}


def _dates(rng: random.Random) -> list[str]:
    """Three dates, the earliest first."""
    begin = rng.randrange(1780, 1950)
    years = sorted(rng.sample(range(begin, begin + 40), 3))
    return [f"{rng.randrange(1, 29)} {rng.choice(MONTHS)} {year}" for year in years]


def dates(rng: random.Random, number: int) -> Row:
    """Several full dates in one passage."""
    place, keeper = rng.choice(PLACES), rng.choice(LAST)
    a, b, c = _dates(rng)
    kind = number % 2
    if kind == 0:
        text = (
            f"The survey of {place} began on {a}, with two men and a mule. It was broken off on {b} when the money ran "
            f"out. {keeper} printed the map on {c}, and gave the first copy to the school."
        )
        asked = [
            (f"On what date did the survey of {place} begin?", a),
            (f"On what date was the survey of {place} broken off?", b),
            (f"On what date did {keeper} print the map?", c),
        ]
    else:
        text = (
            f"{keeper} was born in {place} on {a}. The letter that made the name known is dated {b}; it was found in "
            f"an attic and sold on {c}."
        )
        asked = [
            (f"When was {keeper} born?", a),
            ("What is the date of the letter?", b),
            ("When was the letter sold?", c),
        ]
    question, value = rng.choice(asked)
    return {"title": place, "context": text, "question": question, "answers": [value, f"on {value}"]}


def names(rng: random.Random, number: int) -> Row:
    """Four people with different parts."""
    place = rng.choice(PLACES)
    people = [f"{a} {b}" for a, b in zip(rng.sample(FIRST, 4), rng.sample(LAST, 4), strict=True)]
    kind = number % 2
    if kind == 0:
        text = (
            f"The {place} rowing club is led by {people[0]}. Its treasurer is {people[1]}, who took over from "
            f"{people[2]} last spring. {people[3]} looks after the boats and has the only key to the shed."
        )
        parts = ("leads the {} rowing club", "is treasurer of the {} rowing club")
        asked = [(f"Who {part.format(place)}?", people[i]) for i, part in enumerate(parts)]
        asked += [
            (f"Who was treasurer of the {place} rowing club before?", people[2]),
            (f"Who looks after the boats of the {place} rowing club?", people[3]),
        ]
    else:
        text = (
            f"When the bakery in {place} burned, {people[0]} raised the alarm and {people[1]} carried out the flour. "
            f"{people[2]} lent the baker an oven. The new house was drawn by {people[3]}."
        )
        asked = [
            (f"Who raised the alarm when the bakery in {place} burned?", people[0]),
            ("Who carried out the flour?", people[1]),
            ("Who lent the baker an oven?", people[2]),
            ("Who drew the new house?", people[3]),
        ]
    question, value = rng.choice(asked)
    return {"title": place, "context": text, "question": question, "answers": [value]}


def code(rng: random.Random, number: int) -> Row:
    """Identifiers, constants and paths."""
    noun, other = rng.sample(NOUNS, 2)
    verb, undo = rng.choice([("load", "flush"), ("parse", "render"), ("open", "close"), ("fetch", "push")])
    limit = f"{noun.upper()}_MAX_{rng.choice(['RETRIES', 'ROWS', 'BYTES', 'DEPTH'])}"
    reads, writes = f"{verb}_{noun}_{rng.choice(['rows', 'index', 'batch'])}", f"{undo}{noun.title()}{other.title()}"
    fails, path = f"{noun.title()}{rng.choice(['Lock', 'Format', 'Quota'])}Error", f"/etc/{other}d/{noun}.conf"
    text = (
        f"Call `{reads}` to read a {noun}. Writing goes through `{writes}`, which is buffered. If the {noun} cannot be "
        f"used, `{fails}` is raised. The limit is the constant `{limit}`; defaults are read from `{path}`."
    )
    question, value = rng.choice(
        [
            (f"Which function reads a {noun}?", reads),
            (f"Which function writes a {noun}?", writes),
            (f"What is raised if the {noun} cannot be used?", fails),
            ("Which constant is the limit?", limit),
            ("From which file are defaults read?", path),
        ]
    )
    return {"title": f"{noun.title()} guide", "context": text, "question": question, "answers": [value]}


def negation(rng: random.Random, number: int) -> Row:
    """What was and what was not; half of the answers are no."""
    place, person = rng.choice(PLACES), f"{rng.choice(FIRST)} {rng.choice(LAST)}"
    things = rng.sample(["pump", "roof", "fence", "stove", "gate", "well", "organ", "clock"], 3)
    done, undone = rng.choice([("was repaired", "was not repaired"), ("was painted", "was not painted")])
    if number % 3:
        wanted = number % 2 == 0
        states = [wanted, not wanted, rng.random() < 0.5]
        rng.shuffle(states)
        says = [done if state else undone for state in states]
        text = (
            f"Before the winter {person} went through the house in {place}. As the notes say, the {things[0]} "
            f"{says[0]}. The {things[1]} {says[1]}. As for the {things[2]}, it {says[2]} before the first snow."
        )
        at = states.index(wanted)
        question, options = f"Was the {things[at]} {done.split()[1]}?", ["yes", "no"]
        right = "yes" if wanted else "no"
    else:
        left_out = rng.randrange(3)
        kept = [t for i, t in enumerate(things) if i != left_out]
        text = (
            f"{person} mended the {kept[0]} and the {kept[1]} of the house in {place}, but not the {things[left_out]}. "
            "The neighbours said that it showed."
        )
        question, options, right = (
            f"What did {person} not mend?",
            [f"the {t}" for t in things],
            f"the {things[left_out]}",
        )
    return {
        "title": place,
        "context": text,
        "question": question,
        "answers": [right],
        "options": options,
        "answer_index": options.index(right),
    }


def order(rng: random.Random, number: int) -> Row:
    """What came before what, told out of order."""
    place, person = rng.choice(PLACES), rng.choice(FIRST)
    acts = rng.sample(
        ["fed the goats", "wrote a letter", "locked the mill", "lit the stove", "rang the bell", "sold the cart"], 3
    )
    kind = number % 3
    if kind == 0:
        text = f"On market day in {place}, {person} {acts[1]}, but not before {person} {acts[0]}. "
        text += f"Last of all, {person} {acts[2]}."
    elif kind == 1:
        text = f"In {place}, {person} {acts[2]} in the end. Before that {person} {acts[1]}, "
        text += f"and before anything else {person} {acts[0]}."
    else:
        text = f"{person} came home to {place} and {acts[0]}. Then {person} {acts[1]}, and having done so {acts[2]}."
    at = rng.choice([0, 2])  # the one in the middle is the easiest to argue about
    options = sorted(acts)
    return {
        "title": place,
        "context": text,
        "question": f"What did {person} do {'first' if at == 0 else 'last'}?",
        "answers": [acts[at], f"{person} {acts[at]}"],
        "options": options,
        "answer_index": options.index(acts[at]),
    }


def filler(rng: random.Random, sentences: int) -> list[str]:
    """Sentences of village life that answer no question."""
    who = ["the miller", "the postman", "an old teacher", "the ferryman", "a girl from the farm", "the smith"]
    where = ["by the river", "behind the church", "at the edge of the wood", "in the square", "under the old lime tree"]
    what = ["waited for the rain to stop", "talked about the harvest", "looked for a lost dog", "sat and ate an apple"]
    what += ["counted the swallows on the roof", "listened to the band", "mended a net", "said nothing for a while"]
    when = [
        "In the morning",
        "Towards evening",
        "On Sundays",
        "After the fair",
        "When the wind turned",
        "In late autumn",
    ]
    more = [
        "It was nothing unusual.",
        "Nobody took much notice.",
        "The days went by like that.",
        "So it had always been.",
    ]
    out: list[str] = []
    while len(out) < sentences:
        sentence = f"{rng.choice(when)} {rng.choice(who)} {rng.choice(what)} {rng.choice(where)}."
        sentence = rng.choice(more) if rng.random() < 0.2 else sentence
        # A sentence may come back later, as in all such talk, but not at once.
        if sentence not in out[-6:]:
            out.append(sentence)
    return out


def needles(rng: random.Random) -> list[Row]:
    """The same sentences at each depth of the same filler."""
    rows = []
    for number in range(NEEDLES):
        place, person, word = PLACES[3 * number], f"{rng.choice(FIRST)} {rng.choice(LAST)}", WORDS[number]
        size = rng.randrange(1200, 9900)
        ship = f"Silver {word.title()}"
        needle, question, answer = [
            (f"The password of the {place} harbour is {word}.", "What is the password of the {} harbour?", word),
            (f"The safe in {place} was opened by {person}.", "Who opened the safe in {}?", person),
            (f"The {place} lighthouse has {size} steps.", "How many steps does the {} lighthouse have?", f"{size}"),
            (f"In {place} the ferry is called the {ship}.", "What is the ferry in {} called?", ship),
        ][number % 4]
        around = filler(rng, 30)
        for depth in DEPTHS:
            at = round(depth / 100 * len(around))
            rows.append(
                {
                    "kind": "needle",
                    "depth": depth,
                    "title": "Village notes",
                    "context": " ".join([*around[:at], needle, *around[at:]]),
                    "question": question.format(place),
                    "answers": [answer],
                }
            )
    return rows


KINDS: dict[str, Callable[[random.Random, int], Row]] = {
    "numbers": numbers,
    "dates": dates,
    "names": names,
    "code": code,
    "negation": negation,
    "order": order,
}


def build() -> list[Row]:
    """All probes, in the order of the file."""
    rows: list[Row] = []
    for kind, make in KINDS.items():
        rng = random.Random(f"{SEED}/{kind}")
        seen: set[str] = set()
        while len(seen) < EACH:
            row = make(rng, len(seen))
            if row["context"] not in seen:
                seen.add(row["context"])
                rows.append({"id": f"{kind}-{len(seen)}", "kind": kind, **row})
    made = needles(random.Random(f"{SEED}/needle"))
    return rows + [{"id": f"needle-{number}", **row} for number, row in enumerate(made, 1)]


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description="Make the fidelity probes.")
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in build())
    buffer = io.BytesIO()
    # No time and no name in the file: the same probes are the same bytes.
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as file:
        file.write(text.encode())
    out.write_bytes(buffer.getvalue())
    print(f"{text.count(chr(10))} probes, {len(buffer.getvalue())} bytes: {out}")


if __name__ == "__main__":
    main()
