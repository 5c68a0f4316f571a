"""The documentation: its commands run, and its generated pages hold what they are made from."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from helpers import run_cli

from effprof import registry
from effprof.cli import COMMANDS

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


def lines_of(page: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    for line in lines_of(page):
        command, _, target = line.partition(" > ")
        words = shlex.split(command)
        if words[0] != "effprof":
            place = words[1] if words[0] in ("bash", "pytest") else words[0]
            assert (ROOT / place).exists(), line
            continue
        code, out, err = run_cli(*words[1:])
        needs_gpu = "cuda" in words and not torch.cuda.is_available()
        assert code == (4 if needs_gpu else 0), (line, err)
        if target:
            (tmp_path / target).write_text(out)


@pytest.fixture(scope="module")
def generated() -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("docs_pages", ROOT / "scripts" / "docs_pages.py")
    assert spec
    assert spec.loader
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, str] = module.pages()
    return found


def test_a_page_for_every_method_with_all_its_facts(generated: dict[str, str]) -> None:
    for name in registry.names():
        facts, page = registry.method(name).facts, generated[f"methods/{name}.md"]
        settings = registry.setting_fields(registry.method(name).addressed)
        assert all(f"- {line}" in page for line in facts.deviations)
        assert facts.paper in page
        assert all(f"`{key}`" in page for key in settings)
        assert f"]({name}.md)" in generated["methods/index.md"]


def test_commands_and_documents_are_all_there(generated: dict[str, str]) -> None:
    for name in COMMANDS:
        assert f"## effprof {name}" in generated["commands.md"]
    for schema in (ROOT / "effprof" / "schemas").glob("*.json"):
        assert f"## effprof.{schema.stem}/1" in generated["json.md"]
    assert "`memory.peak_allocated`" in generated["json.md"]


def test_the_accuracy_page_counts_every_plan(generated: dict[str, str]) -> None:
    rows = (ROOT / "benchmarks" / "accuracy.csv").read_text().splitlines()
    page = generated["accuracy.md"]
    assert f"{len(rows) - 1} plans" in page
    by_method = page.partition("### By method")[2].partition("###")[0]
    counts = [int(count) for count in re.findall(r"^\| [a-z0-9-]+ \| (\d+) \|", by_method, re.M)]
    assert sum(counts) == len(rows) - 1


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2]
    assert all(page.name in navigation for page in PAGES)
