"""The captions of the bench: a small grammar whose every sentence can be listed.

    a COLOR SHAPE moving DIRECTION [slowly|quickly] [on BACKGROUND]

22 words, at most 8 in a caption, 1152 captions. A caption that leaves out the speed or the background is
drawn with any of them.
"""

import dataclasses
import functools
import itertools
import random
from typing import Final

from qvdjax.errors import UserError

# RGB in [0, 1]. Far from each other and from the backgrounds: the closest pair (cyan, white) is 0.78 apart.
COLORS: Final = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.05, 0.85, 0.10),
    "blue": (0.10, 0.20, 0.95),
    "yellow": (0.95, 0.85, 0.05),
    "magenta": (0.85, 0.10, 0.85),
    "cyan": (0.05, 0.85, 0.90),
}
BACKGROUNDS: Final = {"black": (0.02, 0.02, 0.02), "grey": (0.40, 0.40, 0.40), "white": (0.98, 0.98, 0.98)}
SHAPES: Final = ("disc", "ring", "triangle", "cross")
# Unit vector (x to the right, y downwards, as pixels are counted).
DIRECTIONS: Final = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
# Pixels a frame, uniform between the two; the gap keeps the words apart.
SPEEDS: Final = {"slowly": (0.7, 1.0), "quickly": (1.7, 2.1)}

WORDS: Final = ("a", "moving", "on", *COLORS, *SHAPES, *DIRECTIONS, *SPEEDS, *BACKGROUNDS)
TOKENS: Final = 8


@dataclasses.dataclass(frozen=True)
class Caption:
    """What a clip shows. `speed` and `background` are None where the sentence does not say them."""

    color: str
    shape: str
    direction: str
    speed: str | None = None
    background: str | None = None

    def __post_init__(self) -> None:
        for field, known in _FIELDS.items():
            if getattr(self, field) not in known:
                names = ", ".join(str(name) for name in known)
                raise UserError(f"{field} {getattr(self, field)!r} is unknown", remedy=f"use one of {names}")

    def __str__(self) -> str:
        text = f"a {self.color} {self.shape} moving {self.direction}"
        if self.speed:
            text += f" {self.speed}"
        if self.background:
            text += f" on {self.background}"
        return text

    @classmethod
    def parse(cls, text: str) -> "Caption":
        """The caption that a sentence says; upper case and extra spaces do not matter.

        Raises:
            UserError: The sentence does not follow the grammar; the part that does not is named.
        """
        remedy = "write 'a COLOR SHAPE moving DIRECTION [slowly|quickly] [on BACKGROUND]'"
        words = text.lower().split()
        if len(words) < 5 or words[0] != "a" or words[3] != "moving":
            raise UserError(f"caption {text!r} does not follow the grammar", remedy=remedy)
        rest = words[5:]
        speed = rest.pop(0) if rest and rest[0] in SPEEDS else None
        background = rest[1] if len(rest) == 2 and rest[0] == "on" else None
        if rest and background is None:
            raise UserError(f"caption {text!r} goes on with {' '.join(rest)!r}", remedy=remedy)
        return cls(words[1], words[2], words[4], speed, background)


_FIELDS: Final = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "direction": tuple(DIRECTIONS),
    "speed": (None, *SPEEDS),
    "background": (None, *BACKGROUNDS),
}


@functools.cache
def all_captions() -> tuple[Caption, ...]:
    """Every caption of the grammar, always in the same order."""
    return tuple(Caption(*fields) for fields in itertools.product(*_FIELDS.values()))


def prompts(count: int, seed: int = 0) -> list[str]:
    """`count` sentences, balanced and without repetition until all captions are used.

    Balanced: in any 96 sentences from the start (and from every multiple of 96) each colour, shape and
    direction combination appears once; speeds and backgrounds are spread evenly over them.
    """
    stream = random.Random(seed)
    extras = list(itertools.product(_FIELDS["speed"], _FIELDS["background"]))
    core = list(itertools.product(COLORS, SHAPES, DIRECTIONS))
    sentences: list[str] = []
    while len(sentences) < count:
        # Twelve turns show every caption once: each core begins at an ending of its own and goes on.
        starts = [stream.randrange(len(extras)) for _ in core]
        for turn in range(len(extras)):
            order = _spread(core, stream)
            sentences += [str(Caption(*core[i], *extras[(starts[i] + turn) % len(extras)])) for i in order]
    return sentences[:count]


def _spread(core: list[tuple[str, ...]], stream: random.Random) -> list[int]:
    """An order of `core` in which short prefixes are balanced too: 24 rows of 4 x each direction, and so on.

    Every run of 24 holds each (colour, shape) pair once and each direction six times.
    """
    pairs = list(itertools.product(COLORS, SHAPES))
    turns = {pair: stream.sample(list(DIRECTIONS), len(DIRECTIONS)) for pair in pairs}
    index = {key: i for i, key in enumerate(core)}
    order = []
    for block in range(len(DIRECTIONS)):
        stream.shuffle(pairs)
        order += [index[(*pair, turns[pair][block])] for pair in pairs]
    return order
