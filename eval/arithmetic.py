"""Seeded arithmetic problems with worked answers.

A tenth of all pairs of two-digit numbers, chosen by a hash, never occurs as an addition in the training text
(``held_out``); they measure whether a model can add, or has only memorised sums.
"""

from __future__ import annotations

import hashlib
import random

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack", "Kate", "Leo")
THINGS = ("apples", "books", "coins", "eggs", "marbles", "pencils", "shells", "stamps", "stones", "tickets")


def held_out(a: int, b: int) -> bool:
    if not (10 <= a <= 99 and 10 <= b <= 99):
        return False
    return hashlib.sha256(f"{a}+{b}".encode()).digest()[0] < 26


def held_out_pairs() -> list[tuple[int, int]]:
    return [(a, b) for a in range(10, 100) for b in range(10, 100) if held_out(a, b)]


def question(a: int, b: int) -> str:
    """The prompt of an addition; a right answer continues it up to ``The answer is {a + b}.``"""
    return f"Question: What is {a} + {b}?\nAnswer:"


def _add_steps(a: int, b: int) -> str:
    """Column addition from the right, one short equation a column."""
    steps, carry = [], 0
    width = max(len(str(a)), len(str(b)))
    for place in range(width):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        steps.append(f"{x} + {y} + {carry} = {total}." if carry else f"{x} + {y} = {total}.")
        carry = total // 10
    return " ".join(steps)


def _subtract_steps(a: int, b: int) -> str:
    steps, borrow = [], 0
    for place in range(len(str(a))):
        x, y = a // 10**place % 10, b // 10**place % 10
        lend = 10 if x - y - borrow < 0 else 0
        result = x + lend - y - borrow
        steps.append(
            f"{x + lend} - {y} - {borrow} = {result}." if borrow else f"{x + lend} - {y} = {result}."
        )
        borrow = 1 if lend else 0
    return " ".join(steps)


def _multiply_steps(a: int, b: int) -> str:
    tens, ones = divmod(a, 10)
    if not tens:
        return f"{a} * {b} = {a * b}."
    return f"{tens * 10} * {b} = {tens * 10 * b}. {ones} * {b} = {ones * b}. {tens * 10 * b} + {ones * b} = {a * b}."


def _addition(rng: random.Random, wanted: bool) -> str:
    while True:
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        if held_out(a, b) == wanted:
            return f"{question(a, b)} {_add_steps(a, b)} The answer is {a + b}.\n"


def _subtraction(rng: random.Random) -> str:
    a, b = sorted((rng.randint(1, 99), rng.randint(1, 99)), reverse=True)
    return f"Question: What is {a} - {b}?\nAnswer: {_subtract_steps(a, b)} The answer is {a - b}.\n"


def _multiplication(rng: random.Random) -> str:
    a, b = rng.randint(2, 40), rng.randint(2, 9)
    while held_out(a // 10 * 10 * b, a % 10 * b):
        a, b = rng.randint(2, 40), rng.randint(2, 9)
    return f"Question: What is {a} * {b}?\nAnswer: {_multiply_steps(a, b)} The answer is {a * b}.\n"


def _word_problem(rng: random.Random) -> str:
    """A chain of two to four gains and losses; no addition of two two-digit numbers occurs."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    value = rng.randint(5, 60)
    story, work = [f"{name} has {value} {thing}."], []
    for _ in range(rng.randint(2, 4)):
        change = rng.randint(2, 9)
        if rng.random() < 0.5 or value - change < 1:
            story.append(rng.choice((f"{name} buys {change} more.", f"{name} finds {change} more.")))
            work.append(f"{value} + {change} = {value + change}.")
            value += change
        else:
            story.append(
                rng.choice((f"{name} gives {change} to {rng.choice(NAMES)}.", f"{name} loses {change}."))
            )
            work.append(f"{value} - {change} = {value - change}.")
            value -= change
    told = " ".join(story)
    return (
        f"Question: {told} How many {thing} does {name} have now?\n"
        f"Answer: {' '.join(work)} The answer is {value}.\n"
    )


def document(rng: random.Random, chars: int, *, use_held_out: bool = False) -> str:
    """Problems of all kinds, separated by blank lines, until ``chars`` characters are reached."""
    problems: list[str] = []
    while sum(map(len, problems)) < chars:
        kind = rng.random()
        if kind < 0.4:
            problems.append(_addition(rng, use_held_out))
        elif kind < 0.6:
            problems.append(_subtraction(rng))
        elif kind < 0.75:
            problems.append(_multiplication(rng))
        else:
            problems.append(_word_problem(rng))
    return "\n".join(problems)


def documents(seed: int, count: int, chars: int = 2500, *, use_held_out: bool = False) -> list[str]:
    rng = random.Random(seed)
    return [document(rng, chars, use_held_out=use_held_out) for _ in range(count)]
