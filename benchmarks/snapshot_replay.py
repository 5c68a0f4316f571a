"""The allocator model against memory snapshots of real CUDA runs: its segments against theirs.

    python benchmarks/snapshot_replay.py SNAPSHOT.pickle [...]

Each file is what torch.cuda.memory._dump_snapshot() wrote. A device's trace is taken where it
starts from an empty allocator, up to the first segment given back; its allocations and frees are
replayed, and every growth of reserved memory is compared, in order and in size. Exit 1 where one
differs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from effprof.allocator import Action, Settings, replay
from effprof.errors import EffprofError
from effprof.snapshot import read, recorded_tape

_GIVEN_BACK = ("segment_free", "segment_unmap", "oom")
_GROWN = ("segment_alloc", "segment_map")


def cut(trace: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Up to the first segment given back."""
    ends = (i for i, event in enumerate(trace) if event["action"] in _GIVEN_BACK)
    return trace[: next(ends, len(trace))]


def starts_empty(snapshot: dict[str, Any], device: int) -> bool:
    """Whether every segment at the end was allocated within the trace."""
    trace = snapshot["device_traces"][device]
    total = sum(s["total_size"] for s in snapshot["segments"] if s.get("device", 0) == device)
    grown = sum(e["size"] for e in trace if e["action"] in _GROWN)
    given = sum(e["size"] for e in trace if e["action"] in _GIVEN_BACK[:2])
    return total == grown - given


def main() -> int:
    good, compared = True, 0
    print(
        f"{'snapshot':44}{'allocs':>8}{'segments':>10}{'reserved':>16}{'recorded':>16}{'same':>12}"
    )
    for name in sys.argv[1:]:
        try:
            snapshot = read(Path(name))
        except EffprofError as error:
            print(f"{Path(name).name:44}{error.message}")
            good = False
            continue
        for device, whole in enumerate(snapshot["device_traces"]):
            if not whole or not starts_empty(snapshot, device):
                continue
            trace = cut(whole)
            tape = recorded_tape({"device_traces": [trace]})
            recorded = [event["size"] for event in trace if event["action"] in _GROWN]
            expandable = any(event["action"] == "segment_map" for event in trace)
            actions: list[Action] = []
            result = replay(tape.events, len(tape.roles), Settings(expandable), actions)
            grown = [size for action, _, size, _ in actions if action in _GROWN]
            same = sum(a == b for a, b in zip(grown, recorded, strict=False))
            good, compared = good and grown == recorded, compared + 1
            print(
                f"{f'{Path(name).name} gpu {device}':44}{len(tape.roles):8}{len(grown):10}"
                f"{result.peak_reserved:16,}{sum(recorded):16,}{f'{same}/{len(recorded)}':>12}"
            )
    return 0 if good and compared else 1


if __name__ == "__main__":
    sys.exit(main())
