"""Cutting a release: no entry of the changelog is lost, and nothing is cut twice."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RELEASE: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "release.py"))


def test_the_entries_move_under_the_version() -> None:
    text = (
        "# Changelog\n\n## [Unreleased]\n\n### Added\n\n- One.\n\n## [0.0.1] - 2026-01-01\n\n- A.\n"
    )
    found = RELEASE["cut"](text, "0.1.0", "2026-11-22")
    assert RELEASE["sections"](found) == ["Unreleased", "0.1.0", "0.0.1"]
    assert RELEASE["unreleased"](found) == ""
    assert found.replace("## [0.1.0] - 2026-11-22\n", "").split() == text.split()
    for wrong in (found, "# Changelog\n\n## [Unreleased]\n"):
        with pytest.raises(AssertionError):
            RELEASE["cut"](wrong, "0.1.0", "2026-11-22")


def test_this_changelog_can_be_cut_or_was() -> None:
    text, number = RELEASE["CHANGELOG"].read_text(encoding="utf-8"), RELEASE["version"]()
    if number not in RELEASE["sections"](text):
        entries = RELEASE["unreleased"](text)
        assert entries in RELEASE["cut"](text, number, "2026-11-22")
    assert RELEASE["version_is_everywhere"]() == number
