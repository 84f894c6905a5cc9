"""The demo's task: an order written in English becomes JSON with fixed keys. Seeded rows, and a strict scorer.

    Hi, this is Marta. I would like 14 wooden spoons delivered on Friday at 3:30 pm, please.
    {"customer": "Marta", "item": "wooden spoons", "quantity": 14, "day": "Friday", "time": "15:30"}

Test rows share no customer, item (nor any word of one), quantity or time with the training rows; weekdays are shared,
as there are seven. One set of test rows uses the sentence templates of training, the other templates of its own.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["KEYS", "Row", "Task", "is_exact", "make_task", "score"]

KEYS = ("customer", "item", "quantity", "day", "time")
INSTRUCTION = "Turn the order into JSON with the keys customer, item, quantity, day and time (24-hour HH:MM)."

# What a test row names never stands in a training row: first the names of training, then those of the tests.
_CUSTOMERS = (
    "Marta Daniel Priya Tom Ingrid Ahmed Lucia Victor Hannah Oscar Mei Paul Fatima George Elena Ravi Julia Simon Aisha "
    "Martin Chloe Diego Nina Peter Yuki Carlos Emma Stefan Leila Robert Sofia Hugo Amira Frank Olga David Rosa Kevin "
    "Greta Samuel Irene Walter Tara Bruno Maya Edward Vera Liam Rosalind Anneliese Giulia Thaddeus Mwangi Saoirse "
    "Joaquin Svetlana Nkechi Bartholomew Yolanda Dmitri Xiulan Evangeline Okonkwo Lakshmi",
    "Clara Andre Zoe Henrik Salma Patrick Naomi Viktor Bianca Omar Judith Felix Ana Gavin Petra Tariq Louise Ernest "
    "Dalia Nolan Wanda Ivan Celia Marcus",
)
_ADJECTIVES = (
    "wooden red blue large small glass cotton round leather steel green silver paper white folding plastic black "
    "ceramic striped yellow knitted padded woven speckled lacquered quilted varnished enamelled turquoise crimson "
    "beige oval slender foldable embroidered hexagonal marbled wicker suede scented vintage velour metallic mahogany "
    "pine oak cedar birch walnut maple cherry ebony granite marble concrete bronze brass pewter tin chrome ivory "
    "pearl coral scarlet burgundy maroon violet lilac lavender indigo navy azure teal olive lime mint khaki tan amber "
    "ochre rusty charcoal pale vivid glossy matte frosted clear tinted tall short curved straight hollow solid sturdy "
    "light flat deep shallow portable compact rustic classic elegant plush fluffy silky canvas denim flannel fleece "
    "hemp jute nylon satin",
    "woollen copper purple tiny square velvet orange rubber golden heavy bamboo brown wide narrow plain dark bright "
    "soft thick thin antique modern linen checkered",
)
_NOUNS = (
    "spoons chairs lamps baskets candles towels plates notebooks blankets boxes mugs pillows brushes bottles cushions "
    "shelves pens ladders bowls curtains umbrellas folders trays clocks aprons goblets trestles pitchers sieves "
    "coasters lanterns corkscrews hammocks tablecloths bookends thermometers napkins crates funnels doormats hinges "
    "knobs screws bolts washers hammers saws drills wrenches pliers chisels rulers tapes levels nails hoses "
    "sprinklers rakes shovels spades planters trellises gates fences doors windows shutters blinds tiles bricks beams "
    "planks panels frames easels canvases palettes pencils erasers staplers binders envelopes stamps labels calendars "
    "diaries globes maps lenses tripods speakers headphones chargers cables plugs switches bulbs torches batteries "
    "fans heaters kettledrums whisks ladles spatulas tongs graters peelers colanders saucepans skillets casseroles "
    "tureens saucers tumblers decanters jugs flasks thermoses teapots cruets platters",
    "mats hooks vases buckets scarves stools forks benches mirrors tents ropes jars sponges desks cups rugs pots "
    "drawers kettles sofas racks bells",
)
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

_TEMPLATES = (
    "Hi, this is {customer}. I would like {quantity} {item} delivered on {day} at {time}, please.",
    "{customer} wants {quantity} {item}, to be picked up {day} at {time}.",
    "Please send {quantity} {item} to {customer} on {day}, at {time} if possible.",
    "Could you put {quantity} {item} aside for {customer}? Pick-up is {day} at {time}.",
    "On {day} at {time} {customer} will come by for {quantity} {item}.",
    "My name is {customer} and I need {quantity} {item} by {time} on {day}.",
    "Order for {customer}: {quantity} {item}, {day}, {time}.",
    "We spoke on the phone about {quantity} {item}. Deliver them {day} at {time}. Thanks, {customer}",
    "Hello! Can I get {quantity} {item} this {day}, around {time}? It is for {customer}.",
    "{quantity} {item} for {customer}, please have them ready at {time} on {day}.",
    "{customer} called and ordered {quantity} {item}; delivery on {day} at {time}.",
    "Next {day} at {time} we need {quantity} {item}. The name is {customer}.",
    "I'm {customer}. Are {quantity} {item} possible for {day}? I could be there at {time}.",
    "The {item} for {customer}: make it {quantity}, and bring them {day} at {time}.",
    "Reserve {item} for {customer}, {quantity} in total, collected at {time} on {day}.",
    "Good morning, {customer} here. At {time} on {day} I will fetch {quantity} {item}.",
)
_UNSEEN_TEMPLATES = (
    "Hey, {customer} speaking, could someone drop off {quantity} {item} at {time} this coming {day}?",
    "Put me down for {quantity} {item}, under {customer}. I will collect everything {day}, {time}.",
    "For {day}: {quantity} {item} go to {customer}, and the van should arrive at {time}.",
    "I am writing for {customer}, who asks for {quantity} {item} on {day} at {time}.",
    "Dear team, {quantity} {item} are needed at {time} on {day}. Kind regards, {customer}",
    "A customer named {customer} just bought {quantity} {item} and expects them {day} by {time}.",
    "It's {customer} again! Another {quantity} {item} would be great, say {day} at {time}.",
    "We promised {customer} that {quantity} {item} would be there on {day}, no later than {time}.",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One order."""

    text: str  # the English sentence
    answer: dict[str, Any]  # what should come out, keys in the order of KEYS

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The conversation up to the assistant's turn; the same for the base model and the trained one."""
        return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": self.text}]

    @property
    def training(self) -> dict[str, list[dict[str, str]]]:
        """The row as a training set has it: `messages` with the answer as the assistant's turn."""
        return {"messages": [*self.prompt, {"role": "assistant", "content": json.dumps(self.answer)}]}


@dataclasses.dataclass(frozen=True)
class Task:
    """Rows to train on and to score."""

    train: list[Row]
    test_seen: list[Row]  # templates of training, values that it never saw
    test_unseen: list[Row]  # templates and values that training never saw


def make_task(rows: int = 960, test_rows: int = 40, *, seed: int = 0) -> Task:
    """The same rows for the same arguments, on every machine.

    Args:
      rows: training rows, all different.
      test_rows: rows of each of the two test sets.
      seed: of the draw.

    Raises:
      ValueError: a number of rows below 1.
    """
    if rows < 1 or test_rows < 1:
        raise ValueError(f"the task wants at least one row of each kind; got rows={rows}, test_rows={test_rows}")
    streams = np.random.default_rng(seed).spawn(3)
    return Task(
        train=_draw(streams[0], rows, _TEMPLATES, part=0),
        test_seen=_draw(streams[1], test_rows, _TEMPLATES, part=1),
        test_unseen=_draw(streams[2], test_rows, _UNSEEN_TEMPLATES, part=1),
    )


def is_exact(answer: str, wanted: dict[str, Any]) -> bool:
    """Whether the text is JSON and nothing else, with exactly the wanted keys, values and types ("14" is not 14)."""
    try:
        # Duplicate keys would otherwise pass in silence.
        pairs = json.loads(answer, object_pairs_hook=list)
    except ValueError:
        return False
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        return False  # a JSON array or a bare value
    found = dict(pairs)
    same_keys = len(pairs) == len(wanted) and found.keys() == wanted.keys()
    return same_keys and all(type(found[k]) is type(v) and found[k] == v for k, v in wanted.items())


def score(answers: Sequence[str], rows: Sequence[Row]) -> int:
    """How many answers are exact."""
    return sum(is_exact(answer, row.answer) for answer, row in zip(answers, rows, strict=True))


def _draw(rng: np.random.Generator, count: int, templates: Sequence[str], part: int) -> list[Row]:
    customers, adjectives, nouns = (words[part].split() for words in (_CUSTOMERS, _ADJECTIVES, _NOUNS))
    # One in three quantities and one in four times (in steps of five minutes, from 8:00 to 17:55) are kept for tests.
    quantities = [n for n in range(2, 100) if (n % 3 == 0) == (part == 1)]
    times = [t for t in range(8 * 60, 18 * 60, 5) if (t // 5 * 7 % 4 == 1) == (part == 1)]
    rows: dict[str, Row] = {}
    while len(rows) < count:
        template = templates[len(rows) % len(templates)]  # every template as often as the others
        minute = int(rng.choice(times))
        answer = {
            "customer": str(rng.choice(customers)),
            "item": f"{rng.choice(adjectives)} {rng.choice(nouns)}",
            "quantity": int(rng.choice(quantities)),
            "day": str(rng.choice(_DAYS)),
            "time": f"{minute // 60:02d}:{minute % 60:02d}",
        }
        text = template.format(**{**answer, "time": _spoken(minute)})
        rows[text] = Row(text[0].upper() + text[1:], answer)
    return [list(rows.values())[i] for i in rng.permutation(count)]


def _spoken(minute: int) -> str:
    """A time of day as people write it: 9:05 am, 3 pm."""
    hour, rest = divmod(minute, 60)
    return f"{(hour - 1) % 12 + 1}{f':{rest:02d}' if rest else ''} {'am' if hour < 12 else 'pm'}"
