"""All attacks, in the order of the table."""

from __future__ import annotations

from tests.attacks import confined, grading, harness_attacks, injection, kernel_attacks, leaks, matrix_attacks
from tests.attacks.attack import Attack

ATTACKS: tuple[Attack, ...] = tuple(
    attack
    for module in (confined, kernel_attacks, matrix_attacks, grading, harness_attacks, injection, leaks)
    for attack in module.attacks()
)
