"""How FSDP2 cuts a tensor over processes, and which process updates which matrix.

torch shards dimension 0 by ``torch.chunk``: every process holds ``ceil(rows / gpus)`` rows, padded
where they do not divide (torch 2.13 _fsdp_param.py). A rule that needs a whole matrix runs on one
process, its owner, which alone keeps that matrix' states.
"""

from __future__ import annotations

from collections.abc import Sequence


def rows_held(rows: int, gpus: int) -> int:
    """Rows of dimension 0 that each process has room for, padding included."""
    return -(-rows // gpus)


def held(shape: Sequence[int], gpus: int) -> int:
    """Numbers of a tensor of this shape that each process has room for, padding included."""
    count = rows_held(shape[0], gpus) if shape else 1
    for length in shape[1:]:
        count *= length
    return count


def owners(costs: Sequence[int], gpus: int) -> list[int]:
    """The process that updates each of several things, so that their costs are shared evenly.

    The dearest go first, each to the process with least so far; process 0 ends with the most.
    """
    loads = [0] * gpus
    found = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda one: (-costs[one], one)):
        found[index] = min(range(gpus), key=lambda one: (loads[one], one))
        loads[found[index]] += costs[index]
    order = sorted(range(gpus), key=lambda one: (-loads[one], one))
    place = {owner: rank for rank, owner in enumerate(order)}
    return [place[owner] for owner in found]


def rounds(owned: Sequence[int], gpus: int) -> list[list[int]]:
    """Things by rounds, at most one of each process in each, in the order they are given."""
    queues: list[list[int]] = [[] for _ in range(gpus)]
    for index, owner in enumerate(owned):
        queues[owner].append(index)
    longest = max(map(len, queues), default=0)
    return [[queue[turn] for queue in queues if turn < len(queue)] for turn in range(longest)]
