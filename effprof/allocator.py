"""PyTorch's CUDA caching allocator as a pure function of a tape's events.

Constants and rules are those of torch 2.13 (c10/core/AllocatorConfig.h,
c10/cuda/CUDACachingAllocator.cpp): one stream, no memory limit. ``expandable`` grows one address
range per pool at its tail.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

from effprof.units import MIB

MIN_BLOCK = 512  # kMinBlockSize
SMALL_SIZE = MIB  # kSmallSize: larger requests go to the large pool
SMALL_SEGMENT = 2 * MIB  # kSmallBuffer
LARGE_SEGMENT = 20 * MIB  # large_segment_size, the default of large_segment_size_mb
MIN_LARGE = 10 * MIB  # kMinLargeAlloc: from here on a segment fits its request
ROUND_LARGE = 2 * MIB  # kRoundLarge


@dataclass(frozen=True, slots=True)
class Replay:
    """What the allocator did: bytes at their peaks, and each storage's block size (0 if never
    allocated).
    """

    peak_allocated: int
    peak_requested: int
    peak_reserved: int
    segments: int
    blocks: list[int]


class _Block:
    __slots__ = ("address", "free", "next", "previous", "size")

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size
        self.free = True
        self.previous: _Block | None = None
        self.next: _Block | None = None


_Pool = list[tuple[int, int, _Block]]


def round_size(size: int) -> int:
    """A request in bytes, rounded as the allocator rounds it."""
    return MIN_BLOCK if size < MIN_BLOCK else (size + MIN_BLOCK - 1) // MIN_BLOCK * MIN_BLOCK


def segment_size(size: int) -> int:
    """The segment asked of the driver for a rounded request that no free block can hold."""
    if size <= SMALL_SIZE:
        return SMALL_SEGMENT
    if size < MIN_LARGE:
        return LARGE_SEGMENT
    return (size + ROUND_LARGE - 1) // ROUND_LARGE * ROUND_LARGE


def replay(events: Iterable[tuple[int, int]], storages: int, *, expandable: bool = False) -> Replay:
    """Run a tape's events (storage, ± bytes) through the allocator.

    ``storages`` is how many there are.
    """
    small: _Pool = []
    large: _Pool = []
    held: list[_Block | None] = [None] * storages
    blocks = [0] * storages
    tails: dict[bool, _Block] = {}
    reserved = allocated = requested = segments = next_address = 0
    peak_allocated = peak_requested = 0
    for storage, change in events:
        if change > 0:
            size = round_size(change)
            is_small = size <= SMALL_SIZE
            pool = small if is_small else large
            place = bisect_left(pool, (size,))
            if place < len(pool):
                block = pool.pop(place)[2]
            elif expandable:
                block, grown = _grow(pool, tails, size, is_small=is_small)
                reserved += grown
            else:
                length = segment_size(size)
                block = _Block(next_address, length)
                next_address += length
                reserved += length  # never returned: without a limit nothing asks for it back
                segments += 1
            rest = block.size - size
            if rest >= MIN_BLOCK if is_small or expandable else rest > SMALL_SIZE:
                _split(block, size, pool, tails if expandable else None, is_small=is_small)
            block.free = False
            held[storage] = block
            blocks[storage] = block.size
            allocated += block.size
            requested += change
            if allocated > peak_allocated:
                peak_allocated = allocated
            if requested > peak_requested:
                peak_requested = requested
        elif change:
            freed = held[storage]
            assert freed is not None, f"storage {storage} freed before it was allocated"
            held[storage] = None
            allocated -= freed.size
            requested += change
            pool = small if -change <= SMALL_SIZE else large  # the pool follows the request
            _release(freed, pool, tails)
    if expandable:
        segments = len(tails)
    return Replay(peak_allocated, peak_requested, reserved, segments, blocks)


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
    pool: _Pool, tails: dict[bool, _Block], size: int, *, is_small: bool
) -> tuple[_Block, int]:
    """Map pages at the end of a pool's address range until its last block holds ``size``."""
    page = SMALL_SEGMENT if is_small else LARGE_SEGMENT
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
