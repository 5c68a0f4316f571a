"""Published validation perplexities on C4, each with its source, and how sure that source is."""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass

from effprof.model import PRESETS


@dataclass(frozen=True, slots=True)
class Published:
    """One number of a published table: ``tokens`` in billions, ``memory`` in GB as printed there.

    ``evidence`` says where it was read: the paper, a repository, or a third party's quotation.
    """

    method: str
    model: str
    rank: str
    tokens: str
    perplexity: float
    memory: str
    variant: str
    source: str
    table: str
    evidence: str


@functools.cache
def everything() -> tuple[Published, ...]:
    """The whole table, by method and then by model size."""
    with open(PRESETS / "published.csv", encoding="utf-8", newline="") as file:
        return tuple(
            Published(
                row["method"],
                row["model"],
                row["rank"],
                row["tokens_b"],
                float(row["perplexity"]),
                row["memory_gb"],
                row["variant"],
                row["source"],
                row["table"],
                row["evidence"],
            )
            for row in csv.DictReader(file)
        )


def of(method: str) -> tuple[Published, ...]:
    """What was published of one method."""
    return tuple(one for one in everything() if one.method == method)
