"""The README is true: its commands run, its first screen is printed, its table is measured."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from helpers import run_cli

from effprof.configuration import from_config
from effprof.estimator.estimate import estimate
from effprof.plan import Plan
from effprof.units import GIB

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
MEASURED = json.loads((Path(__file__).parent / "data" / "a6000.json").read_text())


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", README, flags=re.DOTALL)


def test_every_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("effprof ")]
    assert len(commands) >= 8
    for command in commands:
        code, out, err = run_cli(*command)
        assert code == 0, (command, err)
        assert out


def test_every_make_target_exists() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    targets = [
        line.split()[1]
        for block in blocks("bash")
        for line in block.splitlines()
        if line.startswith("make ")
    ]
    assert targets == ["demo", "test"]
    assert all(f"\n{target}:" in makefile for target in targets)


def test_the_first_screen_is_what_is_printed() -> None:
    (block,) = blocks("console")
    command, *shown = block.splitlines()
    code, out, _ = run_cli(*shlex.split(command)[2:])
    assert code == 0
    printed = [line.rstrip() for line in out.splitlines()]
    assert printed == shown
    assert any("fits with" in line for line in shown)


def test_the_python_example_runs() -> None:
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("case", MEASURED["cases"], ids=lambda c: "-".join(map(str, c.values())))
def test_measured_on_an_a6000(case: dict[str, Any], tmp_path: Path) -> None:
    """Within 0.06 % of the card, and as the README's table says."""
    config = MEASURED["models"][case["model"]]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert from_config(config, "x").parameters > 1e9
    flags = {key: case[key] for key in ("dtype", "attention", "checkpointing")}
    plan = Plan(model=str(tmp_path), gpu="rtx-a6000", **MEASURED["habits"], **flags)
    found = estimate(plan).memory.peak.size
    error = found / case["bytes"] - 1
    assert abs(error) < 6e-4
    row = [case["model"], case["dtype"], case["attention"], case["checkpointing"]]
    row += [f"{case['bytes'] / GIB:.3f}", f"{found / GIB:.3f}", f"{100 * error:+.3f} %"]
    assert f"| {' | '.join(row)} |" in README
