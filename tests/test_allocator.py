"""The caching allocator's rules, one by one, and its invariants on any tape."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effprof.allocator import Action, Settings, replay, round_size, segment_size
from effprof.errors import UsageError
from effprof.units import KIB, MIB

Events = list[tuple[int, int]]
EXPANDABLE = Settings(expandable=True)
SETTINGS = (
    Settings(),
    EXPANDABLE,
    Settings(max_split_size=32 * MIB),
    Settings(large_segment=64 * MIB),
    Settings(expandable=True, large_segment=12 * MIB),
)


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
    result = replay(events, 3, EXPANDABLE)
    assert result.peak_reserved == 40 * MIB
    assert result.peak_allocated == 40 * MIB


def test_expandable_always_splits() -> None:
    assert replay([(0, 35 * MIB)], 1, EXPANDABLE).blocks[0] == 35 * MIB


def test_an_expandable_tail_is_the_last_choice() -> None:
    """It counts as large as it could grow, so a larger hole is taken before it."""
    events = [(0, 24 * MIB), (1, 4 * MIB), (0, -24 * MIB), (2, 8 * MIB), (3, 10 * MIB)]
    actions: list[Action] = []
    replay(events, 4, EXPANDABLE, actions)
    found = {storage: address - 2**60 for name, address, _, storage in actions if name == "alloc"}
    assert found == {0: 0, 1: 24 * MIB, 2: 0, 3: 8 * MIB}  # not at 28 MiB, where 12 MiB are free


def test_oversize_blocks_are_not_split() -> None:
    settings = Settings(max_split_size=32 * MIB)
    events = [(0, 50 * MIB), (0, -50 * MIB), (1, 40 * MIB)]
    result = replay(events, 2, settings)
    assert result.blocks[1] == result.peak_reserved == 50 * MIB  # 10 MiB of it unused


def test_small_requests_leave_oversize_blocks_alone() -> None:
    settings = Settings(max_split_size=32 * MIB)
    events = [(0, 50 * MIB), (0, -50 * MIB), (1, 24 * MIB)]
    assert replay(events, 2, settings).peak_reserved == 74 * MIB


def test_an_oversize_block_serves_only_what_nearly_fills_it() -> None:
    settings = Settings(max_split_size=32 * MIB)
    events = [(0, 80 * MIB), (0, -80 * MIB), (1, 40 * MIB)]
    assert replay(events, 2, settings).peak_reserved == 120 * MIB


def test_large_segments_follow_their_setting() -> None:
    events = [(i, 5 * MIB) for i in range(4)]
    assert replay(events, 4, Settings(large_segment=64 * MIB)).peak_reserved == 64 * MIB
    assert replay(events, 4, Settings(expandable=True, large_segment=6 * MIB)).peak_reserved == (
        24 * MIB
    )


def test_where_reserved_grew_last_and_how_full_it_was() -> None:
    events = [(0, 20 * MIB), (1, 20 * MIB), (0, -20 * MIB), (2, 30 * MIB), (1, -20 * MIB)]
    result = replay(events, 3)
    assert (result.peak_reserved, result.reserved_event) == (70 * MIB, 3)
    assert result.allocated_then == 50 * MIB
    assert result.fragmentation == pytest.approx(20 / 70)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("default", Settings()),
        ("expandable", EXPANDABLE),
        ("expandable_segments:False", Settings()),
        (
            "max_split_size_mb:64,max_non_split_rounding_mb:24",
            Settings(False, 64 * MIB, 20 * MIB, 24 * MIB),
        ),
        ("large_segment_size_mb:40", Settings(large_segment=40 * MIB, non_split_rounding=40 * MIB)),
    ],
)
def test_settings_are_read_as_torch_reads_them(text: str, expected: Settings) -> None:
    assert Settings.of(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "expanding", "max_split_size_mb", "max_split_size_mb:x", "max_split_size_mb:-1"),
        *("expandable_segments:yes", "max_split_size_mb:8"),
        "expandable_segments:True,max_split_size_mb:64",
        *("large_segment_size_mb:2", "max_non_split_rounding_mb:40"),
    ],
)
def test_bad_settings_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Settings.of(text)


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


@given(tapes(), st.sampled_from(SETTINGS))
def test_no_block_overlaps_another_and_each_lies_in_a_segment(
    tape: tuple[Events, int], settings: Settings
) -> None:
    events, count = tape
    actions: list[Action] = []
    result = replay(events, count, settings, actions)
    mapped = [(at, at + size) for name, at, size, _ in actions if name.startswith("segment")]
    mapped.sort()
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(mapped))
    assert sum(end - start for start, end in mapped) == result.peak_reserved
    ranges = _joined(mapped) if settings.expandable else mapped
    alive: dict[int, tuple[int, int]] = {}
    for name, at, _, storage in actions:
        if name == "free":
            del alive[storage]
        if name != "alloc":
            continue
        end = at + result.blocks[storage]
        assert any(first <= at and end <= last for first, last in ranges)
        assert all(end <= first or last <= at for first, last in alive.values())
        alive[storage] = (at, end)


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbouring pages as one range."""
    found: list[tuple[int, int]] = []
    for first, last in ranges:
        if found and found[-1][1] == first:
            found[-1] = (found[-1][0], last)
        else:
            found.append((first, last))
    return found


@given(tapes(), st.sampled_from(SETTINGS))
def test_counters_only_grow_with_the_tape(tape: tuple[Events, int], settings: Settings) -> None:
    events, count = tape
    half, whole = (replay(events[:n], count, settings) for n in (len(events) // 2, len(events)))
    for name in ("peak_allocated", "peak_requested", "peak_reserved", "segments"):
        assert getattr(half, name) <= getattr(whole, name)


@given(tapes(), st.sampled_from(SETTINGS))
def test_invariants(tape: tuple[Events, int], settings: Settings) -> None:
    events, count = tape
    result = replay(events, count, settings)
    slack = 20 * MIB if settings.max_split_size else MIB
    assert result.peak_reserved >= result.peak_allocated >= result.peak_requested
    for storage, change in events:
        if change > 0:
            assert change <= result.blocks[storage] <= round_size(change) + slack
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
