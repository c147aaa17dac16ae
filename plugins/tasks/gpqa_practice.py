"""Practice questions in the form of GPQA, made by code: what train and dev of that task are.

Each is a family's question with numbers of its own. The wrong options are what typical slips give, filled up with
neighbouring values. The right letter is dealt out evenly, so that no constant wins.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from fractions import Fraction

import msgspec

from bascule.plugins.tasks.splits import seeded_random

LETTERS = ("A", "B", "C", "D")
PER_SPLIT = 96


class Practice(msgspec.Struct, frozen=True):
    """One question; ``group`` is its family and numbers."""

    id: str
    group: str
    text: str
    options: dict[str, str]
    letter: str


class Drawn(msgspec.Struct, frozen=True):
    """What a family makes: the question, the right value, values that slips give, and the unit."""

    text: str
    right: Fraction
    slips: tuple[Fraction, ...]
    unit: str = ""


def kinetic(r: random.Random) -> Drawn:
    m, v = 2 * r.randint(1, 20), r.randint(2, 15)
    text = f"A body of mass {m} kg moves at {v} m/s. What is its kinetic energy?"
    return Drawn(text, Fraction(m * v * v, 2), (Fraction(m * v * v), Fraction(m * v), Fraction(m * v, 2)), "J")


def circuit(r: random.Random) -> Drawn:
    a, b = r.randint(2, 12), r.randint(2, 12)
    text = f"Resistors of {a} ohm and {b} ohm are connected in parallel. What is their resistance together?"
    slips = (Fraction(a + b), Fraction(a + b, 2), Fraction(a + b, a * b))
    return Drawn(text, Fraction(a * b, a + b), slips, "ohm")


def lens(r: random.Random) -> Drawn:
    f = r.randint(4, 20)
    u = f + r.randint(1, 20)
    text = f"An object is {u} cm before a thin lens of focal length {f} cm. How far behind the lens is its image?"
    return Drawn(text, Fraction(u * f, u - f), (Fraction(u * f, u + f), Fraction(u - f), Fraction(u + f)), "cm")


def decay(r: random.Random) -> Drawn:
    half, n = r.randint(2, 30), r.randint(2, 5)
    start = 2**n * r.randint(3, 40)
    text = f"A nuclide has a half-life of {half} days. How much of {start} mg is left after {half * n} days?"
    slips = (Fraction(start, n), Fraction(start, 2), Fraction(start, 2 ** (n + 1)))
    return Drawn(text, Fraction(start, 2**n), slips, "mg")


def dilution(r: random.Random) -> Drawn:
    c, v = r.randint(2, 12), 10 * r.randint(1, 9)
    total = v * r.randint(2, 8)
    text = f"{v} mL of a {c} M solution are diluted with water to {total} mL in all. What is the concentration then?"
    slips = (Fraction(c * v, total + v), Fraction(c * total, v), Fraction(c * (total - v), total))
    return Drawn(text, Fraction(c * v, total), slips, "M")


def gas(r: random.Random) -> Drawn:
    p, v = r.randint(1, 9), r.randint(2, 30)
    t, k = 100 * r.randint(2, 4), r.randint(2, 4)
    text = (
        f"An ideal gas has {v} L at {p} atm and {t} K. What is its volume at {p * k} atm and {2 * t} K, "
        "the amount being the same?"
    )
    return Drawn(text, Fraction(2 * v, k), (Fraction(v, 2 * k), Fraction(v, k), Fraction(2 * v * k)), "L")


def cross(r: random.Random) -> Drawn:
    n = 16 * r.randint(2, 30)
    both = r.random() < 0.5
    kind = "show both dominant traits" if both else "show both recessive traits"
    text = f"Two unlinked genes, complete dominance: of {n} offspring of AaBb × AaBb, how many are expected to {kind}?"
    slips = (Fraction(n * 3, 16), Fraction(n, 4), Fraction(n * 3, 4))
    return Drawn(text, Fraction(n * (9 if both else 1), 16), slips)


def remainder(r: random.Random) -> Drawn:
    a, b, m = r.randint(12, 99), r.randint(12, 99), r.randint(7, 19)
    text = f"What is the remainder of {a} × {b} divided by {m}?"
    right = a * b % m
    return Drawn(text, Fraction(right), (Fraction(a * b // m), Fraction((a + b) % m), Fraction(m - right)))


FAMILIES: tuple[Callable[[random.Random], Drawn], ...] = (
    *(kinetic, circuit, lens, decay),
    *(dilution, gas, cross, remainder),
)


def practice(seed: int) -> dict[str, list[Practice]]:
    """The questions of train and dev: as many of each family, no question twice, each letter right as often."""
    out: dict[str, list[Practice]] = {"train": [], "dev": []}
    seen: set[str] = set()
    for split, found in out.items():
        letters = LETTERS * (PER_SPLIT // len(LETTERS))
        order = sorted(range(PER_SPLIT), key=lambda i: hashlib.sha256(f"gpqa {seed} {split} {i}".encode()).digest())
        for i in range(PER_SPLIT):
            family = FAMILIES[i % len(FAMILIES)]
            attempt = 0
            while True:
                r = seeded_random(f"gpqa practice {seed} {split} {i} {attempt}")
                drawn = family(r)
                if drawn.text not in seen:
                    break
                attempt += 1
            seen.add(drawn.text)
            # The place of a letter must not follow the family, which the order of questions does.
            found.append(_with_options(f"practice-{split}-{i:03d}", family.__name__, drawn, letters[order.index(i)], r))
    return out


def _with_options(identity: str, family: str, drawn: Drawn, letter: str, r: random.Random) -> Practice:
    right = _shown(drawn.right, drawn.unit)
    wrong = [s for s in dict.fromkeys(_shown(s, drawn.unit) for s in drawn.slips) if s != right]
    step = 1
    while len(wrong) < len(LETTERS) - 1:
        near = _shown(drawn.right + step, drawn.unit)
        if near not in wrong:
            wrong.append(near)
        step += 1
    wrong = wrong[: len(LETTERS) - 1]
    r.shuffle(wrong)
    left: Sequence[str] = [other for other in LETTERS if other != letter]
    options = {letter: right, **dict(zip(left, wrong, strict=True))}
    digest = hashlib.sha256(drawn.text.encode()).hexdigest()[:12]
    return Practice(identity, f"{family}-{digest}", drawn.text, {key: options[key] for key in LETTERS}, letter)


def _shown(value: Fraction, unit: str) -> str:
    """A value with at most two decimals, and its unit."""
    whole = value.denominator == 1
    text = str(value.numerator) if whole else f"{float(value):.2f}".rstrip("0").rstrip(".")
    return f"{text} {unit}".strip()
