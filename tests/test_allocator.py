"""The caching allocator's rules, one by one, and its invariants on any tape."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from effprof.allocator import replay, round_size, segment_size
from effprof.units import KIB, MIB

Events = list[tuple[int, int]]


def test_rounding_to_512() -> None:
    assert [round_size(n) for n in (1, 512, 513, 1024)] == [512, 512, 1024, 1024]


def test_segment_sizes() -> None:
    assert segment_size(MIB) == 2 * MIB
    assert segment_size(MIB + 512) == 20 * MIB
    assert segment_size(10 * MIB) == 10 * MIB
    assert segment_size(11 * MIB) == 12 * MIB


def test_small_blocks_share_a_segment() -> None:
    result = replay([(i, MIB) for i in range(2)], 2)
    assert (result.peak_reserved, result.segments) == (2 * MIB, 1)


def test_a_remainder_of_one_mib_is_not_split() -> None:
    """35 MiB in a 36 MiB segment: the rest stays with the block and counts as allocated."""
    result = replay([(0, 35 * MIB)], 1)
    assert result.peak_allocated == result.blocks[0] == 36 * MIB
    assert result.peak_requested == 35 * MIB


def test_a_larger_remainder_is_split_and_reused() -> None:
    result = replay([(0, 5 * MIB), (1, 14 * MIB)], 2)
    assert result.blocks == [5 * MIB, 15 * MIB]  # 1 MiB of the rest is not split
    assert result.peak_reserved == 20 * MIB


def test_best_fit_takes_the_smallest_block() -> None:
    events = [(0, 40 * MIB), (1, 30 * MIB), (0, -40 * MIB), (1, -30 * MIB), (2, 28 * MIB)]
    result = replay(events, 3)
    assert result.peak_reserved == 70 * MIB
    assert result.blocks[2] == 28 * MIB


def test_free_neighbours_merge() -> None:
    events = [(0, 8 * MIB), (1, 8 * MIB), (0, -8 * MIB), (1, -8 * MIB), (2, 9 * MIB)]
    assert replay(events, 3).peak_reserved == 20 * MIB


def test_fragments_force_a_new_segment() -> None:
    """Two holes of 8 MiB cannot hold 12: fragmentation is what reserved shows above allocated."""
    events = [(i, 20 * MIB) for i in range(2)]
    events += [(0, -20 * MIB), (1, -20 * MIB), (2, 30 * MIB)]
    assert replay(events, 3).peak_reserved == 70 * MIB


def test_expandable_segments_grow_instead() -> None:
    events = [(i, 20 * MIB) for i in range(2)]
    events += [(0, -20 * MIB), (1, -20 * MIB), (2, 30 * MIB)]
    result = replay(events, 3, expandable=True)
    assert result.peak_reserved == 40 * MIB
    assert result.peak_allocated == 40 * MIB


def test_expandable_always_splits() -> None:
    assert replay([(0, 35 * MIB)], 1, expandable=True).blocks[0] == 35 * MIB


def test_pools_do_not_mix() -> None:
    events = [(0, 20 * MIB), (0, -20 * MIB), (1, 4 * KIB)]
    assert replay(events, 2).peak_reserved == 22 * MIB


@st.composite
def tapes(draw: st.DrawFn) -> tuple[Events, int]:
    """Any order of allocations and frees."""
    events: Events = []
    alive: dict[int, int] = {}
    count = draw(st.integers(1, 40))
    for storage in range(count):
        size = draw(st.one_of(st.integers(1, 4096), st.integers(1, 64 * MIB)))
        events.append((storage, size))
        alive[storage] = size
        while alive and draw(st.booleans()):
            gone = draw(st.sampled_from(sorted(alive)))
            events.append((gone, -alive.pop(gone)))
    return events, count


@given(tapes(), st.booleans())
def test_invariants(tape: tuple[Events, int], expandable: bool) -> None:
    events, count = tape
    result = replay(events, count, expandable=expandable)
    assert result.peak_reserved >= result.peak_allocated >= result.peak_requested
    for storage, change in events:
        if change > 0:
            assert change <= result.blocks[storage] <= round_size(change) + MIB
    live = most = 0
    for storage, change in events:
        live += result.blocks[storage] if change > 0 else -result.blocks[storage]
        most = max(most, live)
    assert most == result.peak_allocated


@given(tapes())
def test_freeing_everything_lets_the_same_tape_run_again_in_the_same_memory(
    tape: tuple[Events, int],
) -> None:
    events, count = tape
    alive = dict(event for event in events if event[1] > 0)
    for storage, change in events:
        if change < 0:
            alive.pop(storage, None)
    closed = events + [(storage, -size) for storage, size in alive.items()]
    again = closed + [(storage + count, change) for storage, change in closed]
    once, twice = replay(closed, count), replay(again, 2 * count)
    assert twice.peak_requested == once.peak_requested
    assert twice.peak_reserved >= once.peak_reserved
