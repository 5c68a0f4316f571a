"""effprof compare: methods side by side, one lineage's perplexities, the front, pictures."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from helpers import run_cli

from effprof import registry
from effprof.estimator.estimate import estimate
from effprof.plan import Plan
from effprof.recommender.compare import ranks_of


def rows(*arguments: str) -> list[dict[str, Any]]:
    code, out, err = run_cli("compare", *arguments, "--json")
    assert code == 0, err
    return list(json.loads(out)["rows"])


def test_every_method_is_there_and_is_its_estimate() -> None:
    found = {row["method"]: row for row in rows("--model", "60m", "--gpu", "rtx-3060")}
    assert found.keys() == set(registry.names())
    for name in ("full", "galore", "sltrain"):
        own = estimate(Plan(model="60m", method=name, gpu="rtx-3060"))
        assert found[name]["total"] == own.total
        assert found[name]["fits"] is own.fits[0].fits
        assert found[name]["update_seconds"] == own.time.update
        roles = ("weights", "gradients", "optimizer", "buffers", "activations", "workspace")
        assert sum(found[name][role] for role in roles) == found[name]["peak_allocated"]


def test_perplexities_are_of_one_lineage() -> None:
    code, out, _ = run_cli("compare", "--model", "1b", "--json")
    document = json.loads(out)
    known = [row for row in document["rows"] if row["perplexity"]]
    assert code == 0
    assert len(known) >= 4
    assert {row["lineage"] for row in known} == {document["lineage"]}
    other = rows("--model", "1b", "--lineage", "optimai")
    assert {row["lineage"] for row in other if row["perplexity"]} == {"optimai"}


def test_the_front_is_not_dominated() -> None:
    found = [row for row in rows("--model", "350m", "--ranks", "128:512") if row["perplexity"]]
    for row in found:
        beaten = any(
            one["total"] <= row["total"] and one["perplexity"] <= row["perplexity"] and one != row
            for one in found
        )
        assert row["best"] is not beaten


@pytest.mark.parametrize("order", ["memory", "time", "perplexity", "method"])
def test_orders(order: str) -> None:
    key = {"memory": "total", "time": "update_seconds"}.get(order, order)
    chosen = "full,galore,lowrank,apollo,sltrain"
    found = rows("--model", "130m", "--gpu", "t4", "--methods", chosen, "--sort", order)
    values = [row[key] for row in found if row[key] is not None]
    assert values == sorted(values)
    assert all(row[key] is None for row in found[len(values) :])


def test_ranks() -> None:
    assert ranks_of("64:1024") == [64, 128, 256, 512, 1024]
    assert ranks_of("100:399") == [100, 200]
    assert ranks_of("256,64") == [64, 256]
    found = rows("--model", "60m", "--methods", "full,galore", "--ranks", "64,128,100000")
    assert [(row["method"], row["rank"]) for row in found].count(("full", None)) == 1
    assert {row["rank"] for row in found if row["method"] == "galore"} == {64, 128}
    document = json.loads(
        run_cli("compare", "--model", "60m", "--methods", "galore", "--ranks", "64,512", "--json")[
            1
        ]
    )
    assert list(document["left_out"]) == ["galore rank 512"]


def test_table_and_csv_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFPROF_QUIET", "1")  # a slow machine would tell its progress
    png, page = tmp_path / "a.png", tmp_path / "a.html"
    code, out, err = run_cli(
        *("compare", "--model", "350m", "--gpu", "rtx-4090", "--tokens", "6.4B"),
        *("--png", png, "--html", page),
    )
    assert (code, err) == (0, "")
    *lines, following = out.splitlines()
    assert max(map(len, lines)) <= 100
    assert following.endswith("--gpu rtx-4090 --tokens 6.4B shows one of them in full.")
    assert "sltrain-restarts" in out
    assert "galore" in page.read_text(encoding="utf-8")
    assert png.read_bytes().startswith(b"\x89PNG")
    text = run_cli("compare", "--model", "60m", "--methods", "full,galore", "--csv")[1]
    table = list(csv.DictReader(io.StringIO(text)))
    assert [row["method"] for row in table] in (["full", "galore"], ["galore", "full"])


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("--model", "60m", "--method", "full"), "--method"),
        (("--model", "60m", "--methods", "full,galor"), "galore"),
        (("--model", "60m", "--methods", ","), "--methods all"),
        (("--model", "60m", "--ranks", "9:x"), "64:1024"),
        (("--model", "60m", "--ranks", "512:64"), "64:1024"),
        (("--model", "60m", "--sort", "size"), "time"),
        (("--model", "60m", "--lineage", "nobody"), "Known"),
        (("--model", "60m", "--csv", "--json"), "one of them"),
        (("--model", "60m", "--methods", "lomo", "--grad-accum", "2"), "Leave"),
        ((), "--model 60m"),
    ],
)
def test_usage(arguments: tuple[str, ...], hint: str) -> None:
    code, out, err = run_cli("compare", *arguments)
    assert (code, out) == (2, "")
    assert hint in err
