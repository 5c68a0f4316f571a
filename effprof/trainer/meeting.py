"""Where the processes of a run that torchrun started meet, also when it starts them again.

torch 2.13's agents keep one store for all attempts, so that processes started again read the
addresses of dead ones there and wait for them forever. Counts of restarts differ between machines:
an attempt's keys get a name that its own processes agree on.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from effprof.errors import EffprofError

_POLL = 0.02  # seconds
_COMES = 1800.0  # seconds in which every process is there


def meet() -> tuple[Store, int, int]:
    """A store with nothing of an earlier attempt in it, this process's rank, and how many there
    are. Raises EffprofError where some do not come.

    Each says a name of its own. The first repeats the names it reads beside one for the attempt,
    until all have answered to that; who reads its own name there knows that it is not an old one.
    """
    store, rank, size = next(rendezvous("env://"))
    own, until = uuid.uuid4().hex, time.monotonic() + _COMES
    store.set(f"effprof/here/{rank}", own)
    while time.monotonic() < until:
        attempt = _call(store, own, size) if rank == 0 else _answer(store, own, rank)
        if attempt:
            return PrefixStore(attempt, store), rank, size
        time.sleep(_POLL)
    raise EffprofError(
        f"Not all of the {size} processes came within {_COMES / 60:.0f} minutes.",
        "See what torchrun says on the other machines.",
    )


def _call(store: Any, attempt: str, size: int) -> str:
    """The first process's part, of which one round is over: the attempt once all have answered."""
    keys = [f"effprof/here/{rank}" for rank in range(size)]
    names = [store.get(key).decode() for key in keys if store.check([key])]
    store.set("effprof/roll", json.dumps({"attempt": attempt, "names": names}))
    answers = [f"effprof/{attempt}/{rank}" for rank in range(1, size)]
    return attempt if not answers or store.check(answers) else ""


def _answer(store: Any, own: str, rank: int) -> str:
    """Another process's part: the attempt once this process is named in it."""
    if not store.check(["effprof/roll"]):
        return ""
    roll = json.loads(store.get("effprof/roll"))
    if own not in roll["names"]:
        return ""
    store.set(f"effprof/{roll['attempt']}/{rank}", own)
    return str(roll["attempt"])
