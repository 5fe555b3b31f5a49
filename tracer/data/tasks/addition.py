"""Sums of two numbers below 100, asked of a chat model.

Knows the 10,000 sums, what is labelled of each, and their split. Refuses to know models.
"""

from __future__ import annotations

from tracer.data.tasks.questions import Question, drawn, part

TEMPLATE = "What is {x} + {y}?"
SEED = "Answer: "
BELOW = 100
MODULI = tuple(range(2, 11))


def questions(split: str, count: int, seed: int = 0) -> list[Question]:
    """`count` different sums, drawn from all of the split; the target is the sum.

    Labels: ``x``, ``y``, ``sum``; ``mod2`` to ``mod10``, the sum's remainders; ``tens``, its digit of the tens.

    Args:
        split: ``all`` (10,000), or ``train`` or ``test`` (a third): x + y and y + x are on one side.

    Raises:
        JobError: an unknown split, or more than there are.
    """
    groups = [(x, y) for x in range(BELOW) for y in range(x, BELOW)]
    sums = [both for x, y in part(split, groups, "addition") for both in dict.fromkeys([(x, y), (y, x)])]
    return drawn("addition", split, [_question(x, y) for x, y in sums], count, seed)


def _question(x: int, y: int) -> Question:
    total = x + y
    labels = {"x": x, "y": y, "sum": total, "tens": total // 10 % 10}
    labels |= {f"mod{modulus}": total % modulus for modulus in MODULI}
    said = {name: str(value) for name, value in labels.items()}
    return Question(TEMPLATE.format(x=x, y=y), str(total), said, SEED)
