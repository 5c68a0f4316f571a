"""Published runs: validation perplexities and memory, each with its source and how sure it is."""

from __future__ import annotations

import csv
import functools
import tomllib
from collections.abc import Iterable
from typing import NamedTuple

from effprof.architectures import PRESETS

_TABLE = PRESETS / "published.csv"


class Published(NamedTuple):  # a dataclass of so many fields takes milliseconds to define
    """One number of a published table; fields are text as printed there, empty where not stated.

    ``tokens`` in billions as the source counts them (``counted``: text without padding, or
    positions), ``memory`` in GB, ``parameters`` in millions. ``settings`` are flags the run
    differed by, ``differs`` what no plan can be, ``remark`` what has to be said beside the number,
    ``inferred`` which fields the source leaves out and its group's other tables supply.
    ``lineage`` groups runs that compare. ``evidence`` says where it was read: the paper, a
    repository, or a third party's quotation.
    """

    method: str
    published_as: str
    model: str
    rank: str
    tokens: str
    seq_len: str
    perplexity: float | None
    memory: str
    memory_kind: str
    parameters: str
    variant: str
    settings: str
    differs: str
    remark: str
    inferred: str
    counted: str
    dataset: str
    lineage: str
    source: str
    table: str
    evidence: str

    @property
    def citation(self) -> str:
        """The source and its table, as one cites it."""
        known = "arXiv " if self.source[:4].isdigit() else ""
        return f"{known}{self.source} {self.table}"


class Lineage(NamedTuple):
    """A group of runs that compare: ``batch`` in rows per update, 0 where not stated.

    ``k`` bounds K of an evaluation that reports the loss × K/(K+1); None where it is not known to.
    """

    title: str
    batch: int = 0
    k: tuple[int, int] | None = None
    benchmark: bool = False  # whether it is arXiv 2505.22922's, on which effprof stands


def everything() -> tuple[Published, ...]:
    """The whole table, by method (those effprof lacks last) and then by model size."""
    with open(_TABLE, encoding="utf-8", newline="") as file:
        next(file)
        return _rows(file)


@functools.cache
def of(method: str) -> tuple[Published, ...]:
    """The perplexities published of one method."""
    with open(_TABLE, encoding="utf-8", newline="") as file:
        own = [line for line in file if line.startswith(f"{method},")]
    return tuple(one for one in _rows(own) if one.perplexity is not None)


def _rows(lines: Iterable[str]) -> tuple[Published, ...]:
    made = map(Published._make, csv.reader(lines))
    return tuple(
        one._replace(perplexity=float(one.perplexity) if one.perplexity else None) for one in made
    )


@functools.cache
def lineages() -> dict[str, Lineage]:
    """Every lineage by its key, in the order in which they are asked."""
    with open(PRESETS / "lineages.toml", "rb") as file:
        return {key: Lineage(**value) for key, value in tomllib.load(file).items()}
