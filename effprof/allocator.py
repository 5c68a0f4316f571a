"""PyTorch's CUDA caching allocator as a pure function of a tape's events.

Constants and rules are those of torch 2.13 (c10/core/AllocatorConfig.h,
c10/cuda/CUDACachingAllocator.cpp): one stream, no memory limit. Held against memory snapshots of
real runs by ``benchmarks/snapshot_replay.py``.
"""

from __future__ import annotations

import os
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from effprof.errors import UsageError, unknown
from effprof.units import MIB

MIN_BLOCK = 512  # kMinBlockSize
SMALL_SIZE = MIB  # kSmallSize: larger requests go to the large pool
SMALL_SEGMENT = 2 * MIB  # kSmallBuffer
LARGE_SEGMENT = 20 * MIB  # large_segment_size, the default of large_segment_size_mb
MIN_LARGE = 10 * MIB  # kMinLargeAlloc: from here on a segment fits its request
ROUND_LARGE = 2 * MIB  # kRoundLarge
_NAMES = {"default": "", "expandable": "expandable_segments:True"}


@dataclass(frozen=True, slots=True)
class Settings:
    """What PYTORCH_CUDA_ALLOC_CONF sets, sizes in bytes.

    Blocks of ``max_split_size`` and more are never split (None: every block may be);
    ``large_segment`` is what a request of 1 to 10 MiB allocates, and the page of an expandable
    segment; an oversize block may be ``non_split_rounding`` larger than the request it serves.
    """

    expandable: bool = False
    max_split_size: int | None = None
    large_segment: int = LARGE_SEGMENT
    non_split_rounding: int = LARGE_SEGMENT

    @classmethod
    def of(cls, text: str) -> Settings:
        """``default``, ``expandable``, or PYTORCH_CUDA_ALLOC_CONF's own text. Raises UsageError."""
        values: dict[str, int] = {}
        for part in _NAMES.get(text, text).split(",") if text != "default" else ():
            key, _, value = part.partition(":")
            name = key.strip()
            if name not in _KEYS:
                raise unknown("allocator setting", name, (*_NAMES, *_KEYS), "Names stand alone.")
            values[_KEYS[name]] = _parsed(name, value.strip())
        if "large_segment" in values:
            values.setdefault("non_split_rounding", values["large_segment"])
        elif "non_split_rounding" in values and "max_split_size" not in values:
            raise UsageError(
                "max_non_split_rounding_mb has no effect without max_split_size_mb.",
                "Add max_split_size_mb:128, or leave it out.",
            )
        found = cls(**values)  # type: ignore[arg-type]
        if found.max_split_size is not None:
            if found.expandable:
                raise UsageError(
                    "max_split_size_mb with expandable_segments lets reserved memory grow without "
                    "bound (pytorch#123548).",
                    "Leave one of them out.",
                )
            if found.max_split_size < found.large_segment:
                raise UsageError(
                    f"max_split_size_mb {found.max_split_size // MIB} is below a large segment's "
                    f"{found.large_segment // MIB} MiB.",
                    f"Type max_split_size_mb:{found.large_segment // MIB} or more.",
                )
        return found


_KEYS = {
    "expandable_segments": "expandable",
    "max_split_size_mb": "max_split_size",
    "large_segment_size_mb": "large_segment",
    "max_non_split_rounding_mb": "non_split_rounding",
}


# torch refuses less.
_LEAST_MIB = {"max_split_size_mb": 2, "large_segment_size_mb": 11, "max_non_split_rounding_mb": 20}


def configuration(text: str) -> str:
    """The PYTORCH_CUDA_ALLOC_CONF of a plan's allocator."""
    return _NAMES.get(text, text)


def of_environment() -> str:
    """What torch takes from this process's environment: its text, or ``default``.

    Raises UsageError for settings whose effect is not known here.
    """
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        text = os.environ.get(name, "")
        if text:
            try:
                return text if Settings.of(text) != Settings() else "default"
            except UsageError as problem:
                raise UsageError(f"{name}={text}: {problem.message}", f"Unset {name}.") from None
    return "default"


def _parsed(name: str, value: str) -> int:
    if name == "expandable_segments" and value in ("True", "False"):
        return value == "True"
    least = _LEAST_MIB.get(name)
    if least is not None and value.isdecimal() and int(value) >= least:
        return int(value) * MIB
    example = f"{name}:True" if least is None else f"{name}:{max(least, 128)}"
    known = "True or False" if least is None else f"a whole number of MiB from {least}"
    raise UsageError(f"{name} is {known}, not {value!r}.", f"Type --allocator {example}.")


@dataclass(frozen=True, slots=True)
class Replay:
    """What the allocator did: bytes at their peaks, and each storage's block size (0 if never
    allocated).

    Reserved memory last grew at event ``reserved_event``, where ``allocated_then`` bytes were in
    blocks. ``segments`` counts what was asked of the driver (address ranges, where expandable).
    """

    peak_allocated: int
    peak_requested: int
    peak_reserved: int
    segments: int
    blocks: list[int]
    reserved_event: int
    allocated_then: int

    @property
    def fragmentation(self) -> float:
        """The share of reserved memory that no block used when it last grew."""
        return 1 - self.allocated_then / self.peak_reserved if self.peak_reserved else 0.0


class _Block:
    __slots__ = ("address", "free", "next", "previous", "size")

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size
        self.free = True
        self.previous: _Block | None = None
        self.next: _Block | None = None


_Pool = list[tuple[int, int, _Block]]
Action = tuple[str, int, int, int]  # what happened, address, bytes, storage


def round_size(size: int) -> int:
    """A request in bytes, rounded as the allocator rounds it."""
    return MIN_BLOCK if size < MIN_BLOCK else (size + MIN_BLOCK - 1) // MIN_BLOCK * MIN_BLOCK


def segment_size(size: int, large_segment: int = LARGE_SEGMENT) -> int:
    """The segment asked of the driver for a rounded request that no free block can hold."""
    if size <= SMALL_SIZE:
        return SMALL_SEGMENT
    if size < MIN_LARGE:
        return large_segment
    return (size + ROUND_LARGE - 1) // ROUND_LARGE * ROUND_LARGE


_DEFAULT = Settings()


def replay(
    events: Iterable[tuple[int, int]],
    storages: int,
    settings: Settings = _DEFAULT,
    actions: list[Action] | None = None,
) -> Replay:
    """Run a tape's events (storage, ± bytes) through the allocator.

    ``storages`` is how many there are. ``actions`` receives what it did, in order: segment_alloc
    (or segment_map), alloc and free, each with its address.
    """
    small: _Pool = []
    large: _Pool = []
    held: list[_Block | None] = [None] * storages
    blocks = [0] * storages
    tails: dict[bool, _Block] = {}
    expandable, oversize = settings.expandable, settings.max_split_size
    reserved = allocated = requested = segments = next_address = 0
    peak_allocated = peak_requested = grown_at = allocated_then = 0
    for number, (storage, change) in enumerate(events):
        if change > 0:
            size = round_size(change)
            is_small = size <= SMALL_SIZE
            pool = small if is_small else large
            place = bisect_left(pool, (size,))
            if expandable and place + 1 < len(pool) and pool[place][2] is tails.get(is_small):
                place += 1  # the tail counts as large as it could grow
            if place < len(pool) and (
                oversize is None or _serves(pool[place][0], size, oversize, settings)
            ):
                block = pool.pop(place)[2]
            else:
                if expandable:
                    page = SMALL_SEGMENT if is_small else settings.large_segment
                    block, grown = _grow(pool, tails, size, page, is_small=is_small)
                    if actions is not None:
                        end = block.address + block.size
                        actions.append(("segment_map", end - grown, grown, -1))
                else:
                    grown = segment_size(size, settings.large_segment)
                    block = _Block(next_address, grown)
                    next_address += grown
                    segments += 1
                    if actions is not None:
                        actions.append(("segment_alloc", block.address, grown, -1))
                reserved += grown  # never returned: without a limit nothing asks for it back
                grown_at, allocated_then = number, -1
            rest = block.size - size
            if is_small or expandable:
                splits = rest >= MIN_BLOCK
            else:
                splits = rest > SMALL_SIZE and (oversize is None or size < oversize)
            if splits:
                _split(block, size, pool, tails if expandable else None, is_small=is_small)
            assert block.size >= size
            block.free = False
            held[storage] = block
            blocks[storage] = block.size
            allocated += block.size
            requested += change
            if allocated_then < 0:
                allocated_then = allocated
            if allocated > peak_allocated:
                peak_allocated = allocated
            if requested > peak_requested:
                peak_requested = requested
            if actions is not None:
                actions.append(("alloc", block.address, change, storage))
        elif change:
            freed = held[storage]
            assert freed is not None, f"storage {storage} freed before it was allocated"
            held[storage] = None
            allocated -= freed.size
            requested += change
            if actions is not None:
                actions.append(("free", freed.address, -change, storage))
            pool = small if -change <= SMALL_SIZE else large  # the pool follows the request
            _release(freed, pool, tails)
    return Replay(
        peak_allocated,
        peak_requested,
        reserved,
        len(tails) if expandable else segments,
        blocks,
        grown_at,
        allocated_then,
    )


def replay_streams(
    events: Sequence[tuple[int, int]],
    storages: int,
    streams: Mapping[int, int],
    settings: Settings = _DEFAULT,
) -> Replay:
    """``replay`` of a tape whose storages are of several CUDA streams: the allocator gives a block
    to its own stream only, so that each has segments of its own (CUDACachingAllocator.cpp).
    """
    if not streams:
        return replay(events, storages, settings)
    live = most = 0
    parts: dict[int, list[tuple[int, int]]] = {}
    for storage, change in events:
        parts.setdefault(streams.get(storage, 0), []).append((storage, change))
        live += change
        most = max(most, live)
    found = [replay(part, storages, settings) for part in parts.values()]
    blocks = [max(sizes) for sizes in zip(*(one.blocks for one in found), strict=True)]
    live = highest = 0
    for storage, change in events:
        live += blocks[storage] if change > 0 else -blocks[storage]
        highest = max(highest, live)
    return Replay(
        highest,
        most,
        sum(one.peak_reserved for one in found),
        sum(one.segments for one in found),
        blocks,
        found[0].reserved_event,
        sum(one.allocated_then for one in found),
    )


def _serves(block: int, size: int, oversize: int, settings: Settings) -> bool:
    """Whether the best fit may be taken: large blocks are kept for large requests, nearly whole."""
    if size < oversize:
        return block < oversize
    return block < size + settings.non_split_rounding


def _split(
    block: _Block, size: int, pool: _Pool, tails: dict[bool, _Block] | None, *, is_small: bool
) -> None:
    rest = _Block(block.address + size, block.size - size)
    rest.previous, rest.next = block, block.next
    if block.next is not None:
        block.next.previous = rest
    block.next = rest
    block.size = size
    if tails is not None and tails.get(is_small) is block:
        tails[is_small] = rest
    insort(pool, (rest.size, rest.address, rest))


def _release(block: _Block, pool: _Pool, tails: dict[bool, _Block]) -> None:
    """Free a block and merge it with its free neighbours."""
    before, after = block.previous, block.next
    if before is not None and before.free:
        del pool[bisect_left(pool, (before.size, before.address))]
        block.address, block.size = before.address, before.size + block.size
        block.previous = before.previous
        if before.previous is not None:
            before.previous.next = block
    if after is not None and after.free:
        del pool[bisect_left(pool, (after.size, after.address))]
        block.size += after.size
        block.next = after.next
        if after.next is not None:
            after.next.previous = block
        for kind, tail in tails.items():
            if tail is after:
                tails[kind] = block
    block.free = True
    insort(pool, (block.size, block.address, block))


def _grow(
    pool: _Pool, tails: dict[bool, _Block], size: int, page: int, *, is_small: bool
) -> tuple[_Block, int]:
    """Map pages at the end of a pool's address range until its last block holds ``size``."""
    tail = tails.get(is_small)
    if tail is not None and tail.free:
        del pool[bisect_left(pool, (tail.size, tail.address))]
        grown = -(-(size - tail.size) // page) * page
        tail.size += grown
        return tail, grown
    grown = -(-size // page) * page
    base = tail.address + tail.size if tail is not None else (0 if is_small else 2**60)
    block = _Block(base, grown)
    block.previous = tail
    if tail is not None:
        tail.next = block
    tails[is_small] = block
    return block, grown
