"""effprof report: what each page holds, that it is closed to the network, and how a browser draws
it: no error in the console, no text over another, in light and dark, on a desk and on a phone.
"""

from __future__ import annotations

import html
import json
import os
import pickle
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers import run_cli

from effprof.errors import UsageError
from effprof.report.page import Chart, Grid, Page, render
from effprof.report.subject import read

KINDS = {
    "train": ("Loss", "Learning rate", "Memory over an update, estimated"),
    "runs": ("Runs", "Loss"),
    "probe": ("Estimated against measured", "At the peak", "Memory over an update, estimated"),
    "recording": ("Estimated against measured", "Memory over an update, recorded"),
    "validate": ("Plans",),
    "compare": ("Memory against perplexity", "Memory of the process", "Plans"),
    "trace": ("Memory over an update, traced", "Phases", "Largest tensors"),
    "snapshot": ("Memory over an update, recorded",),
    "estimate": ("Memory over an update, estimated", "Cards"),
}


def write(subjects: list[str], page: Path) -> dict[str, Any]:
    code, out, err = run_cli("report", *subjects, "--out", page, "--json")
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def charts(text: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    drawn: list[dict[str, Any]] = json.loads(found[1])["charts"]
    return drawn


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_holds_its_sections_and_loads_nothing(
    kind: str, documents: dict[str, list[str]], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    found = write(documents[kind], page)
    text = page.read_text(encoding="utf-8")
    assert set(KINDS[kind]) <= set(found["sections"])
    assert all(f"<h2>{title}</h2>" in text for title in KINDS[kind])
    assert "default-src 'none'" in text
    assert not re.search(r"\b(src|href)\s*=|@import|url\(|fetch\(|://", text)
    assert len(charts(text)) == text.count("data-chart=")
    assert len(text) < 250_000


def test_the_run_page_draws_what_the_run_wrote(
    documents: dict[str, list[str]], tmp_path: Path
) -> None:
    (run,) = documents["train"]
    write([run], tmp_path / "page.html")
    loss = charts((tmp_path / "page.html").read_text())[0]["data"]["series"]
    rows = [json.loads(row) for row in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((Path(run) / "summary.json").read_text())
    assert loss[0]["points"] == [[row["step"], row["loss"]] for row in rows]
    assert loss[1]["points"][-1] == [4, summary["validation"]["loss"]]


def test_the_timeline_names_tensors_and_keeps_the_peak(documents: dict[str, list[str]]) -> None:
    document = json.loads(Path(documents["trace"][0]).read_text())
    shown = document["timeline"]
    peak = max(shown["instants"], key=lambda one: sum(one[1]))
    assert sum(peak[1]) == document["memory"]["peak_allocated"]
    size, label = peak[2][0]
    role, name = shown["labels"][label]
    listed = {(one["role"], one["label"]): one["bytes"] for one in document["at_peak"]}
    assert listed[role, name] == size == max(listed.values())


def test_an_unfinished_run_has_a_page(documents: dict[str, list[str]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(documents["train"][0], run)
    (run / "summary.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    write([str(run)], tmp_path / "page.html")
    assert "<dd>4 of 4</dd>" in (tmp_path / "page.html").read_text()
    (run / "metrics.jsonl").unlink()
    write([str(run)], tmp_path / "page.html")
    assert "No update is finished yet." in (tmp_path / "page.html").read_text()


def test_a_measurement_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: dict[str, list[str]]
) -> None:
    monkeypatch.setenv("EFFPROF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert run_cli("probe", "--replay", documents["recording"][0], "--store")[0] == 0
    assert write(["1"], tmp_path / "page.html")["kinds"] == ["probe"]
    assert run_cli("report", "2")[0] == 2
    assert not (tmp_path / "report.html").exists()


def test_a_page_can_be_read_by_whom_the_umask_says(
    documents: dict[str, list[str]], tmp_path: Path
) -> None:
    before = os.umask(0o022)
    try:
        write(documents["compare"], tmp_path / "page.html")
    finally:
        os.umask(before)
    assert (tmp_path / "page.html").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_names_are_text_and_never_markup() -> None:
    nasty = '</script><b onclick="x">@DATA@ & co'
    chart = Chart(nasty, "bars", {"rows": [{"name": nasty, "parts": []}], "colours": {}}, nasty)
    text = render(
        Page(nasty, nasty, [(nasty, nasty, "")], [chart, Grid(nasty, [nasty], [[nasty]])])
    )
    assert nasty not in text
    assert text.count("</script>") == 2
    assert charts(text)[0]["data"]["rows"][0]["name"] == nasty
    assert html.escape(nasty) in text


BROKEN = {
    "nothing.json": None,
    "text.json": b"hello",
    "list.json": b"[1]",
    "other.json": b'{"schema": "somebody.else/1"}',
    "gpus.json": b'{"schema": "effprof.gpus/1", "gpus": []}',
    "cut.json": b'{"schema": "effprof.compare/1", "rows": [',
    "empty.json": b'{"schema": "effprof.compare/1", "rows": [], "plan": null}',
    "wrong.json": b'{"schema": "effprof.probe/1", "plan": 3}',
    "recording.jsonl": b'{"record": "start"}\n{',
    "bare.pickle": pickle.dumps({"device_traces": []}),
    "empty.pickle": pickle.dumps({"device_traces": [[]]}),
    "wrong.pickle": pickle.dumps({"device_traces": [[{"action": "alloc"}]]}),
    "binary": b"\x00\xff\xfe",
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_has_no_page_is_said(name: str, tmp_path: Path) -> None:
    content = BROKEN[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, out, err = run_cli("report", tmp_path / name, "--out", tmp_path / "page.html")
    assert (code, out) == ((1 if name.endswith("pickle") else 2), "")
    assert err.startswith("Error: ")
    assert "Hint: " in err
    assert not (tmp_path / "page.html").exists()


def test_other_folders_and_mixed_subjects_are_refused(
    documents: dict[str, list[str]], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"no run\.toml"):
        read(str(tmp_path))
    mixed = (documents["train"][0], documents["trace"][0])
    code, _, err = run_cli("report", *mixed, "--out", tmp_path / "page.html")
    assert (code, "have to be runs" in err) == (2, True)
    code, _, err = run_cli("report", documents["train"][0], "--out", tmp_path / "a" / ".." / "..")
    assert (code, "Cannot write" in err) == (1, True)


# ---- in a browser

LOOK = (Path(__file__).parent / "data" / "look.js").read_text(encoding="utf-8")
FRAME = """<body style="margin:0"><pre id="said"></pre><script>
const said = [];
addEventListener("message", event => {
  said.push(event.data);
  document.getElementById("said").textContent = JSON.stringify(said);
});
</script><iframe src="page.html" style="border:0;width:1200px;height:2000px"></iframe>
<iframe src="page.html" style="border:0;width:375px;height:2000px"></iframe></body>"""
CHROMIUM = next(
    (found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), ""
)


def look(page: Path, folder: Path, *, dark: bool) -> list[dict[str, Any]]:
    """Open a page in two widths, point at its charts, and hear what it says of itself."""
    text = page.read_text(encoding="utf-8").replace("</body>", f"<script>{LOOK}</script></body>")
    (folder / "page.html").write_text(text, encoding="utf-8")
    (folder / "frame.html").write_text(FRAME)
    shot = folder / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]
    flags += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--v=0"]
    flags += ["--enable-logging=stderr", "--window-size=1600,2000", f"--screenshot={shot}"]
    flags += ["--dump-dom", "--virtual-time-budget=2000", f"file://{folder}/frame.html"]
    done = subprocess.run(
        [CHROMIUM, *flags], capture_output=True, text=True, timeout=60, check=True
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    said = re.search(r'<pre id="said">(.+?)</pre>', done.stdout, re.DOTALL)
    assert said, done.stderr
    assert shot.read_bytes().startswith(b"\x89PNG")
    found: list[dict[str, Any]] = json.loads(html.unescape(said[1]))
    return found


@pytest.mark.skipif(not CHROMIUM, reason="no chromium is installed to draw the page")
@pytest.mark.parametrize(
    ("kind", "dark"),
    [*((kind, False) for kind in ("train", "probe", "compare", "snapshot")), ("trace", True)],
)
def test_a_browser_draws_it(
    kind: str, dark: bool, documents: dict[str, list[str]], tmp_path: Path
) -> None:
    page, folder = tmp_path / "page.html", tmp_path / "browser"
    folder.mkdir()
    write(documents[kind], page)
    wanted = len(charts(page.read_text()))
    seen = sorted(look(page, folder, dark=dark), key=lambda one: int(one["width"]))
    for found, width in zip(seen, (375, 1200), strict=True):
        assert found["width"] == width
        assert found["problems"] == []
        assert len(found["heights"]) == wanted
        assert all(height > 30 for height in found["heights"])
        assert all(len(said) > 1 for said in found["tips"])  # another place, another text
        ink, paper = (int(re.findall(r"\d+", found[name])[0]) for name in ("ink", "paper"))
        assert (paper < 60) is dark
        assert abs(ink - paper) > 150
