"""A document of every kind that `--json` prints, made by the real commands with tiny settings.

The schemas in effprof/schemas are drawn from these (scripts/generate.py) and held against them.
"""

from __future__ import annotations

import json
import os
import shutil
import textwrap
from pathlib import Path
from typing import Any

from helpers import run_cli

RECORDING = Path(__file__).parent / "data" / "probe_9m_galore_cpu.jsonl"
TINY = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
}
# Each command's arguments; {tiny} a model, {folder} a place of their own.
COMMANDS: dict[str, tuple[str, ...]] = {
    "estimate": (
        "--model 1b --method sltrain",
        "--model 350m --method galore --gpu rtx-4090 --tokens 6.4B --global-batch 512 "
        "--price-per-hour 0.4",
        "--model 60m --method full --gpu rtx-4090 --tokens 1.1B",
        "--model {tiny} --method q-galore --device cpu",
        "--model 350m --method full --tokens 3B",
    ),
    "compare": (
        "--model 350m --methods full,galore,lowrank --gpu t4 --tokens 6.4B",
        "--model 60m --methods full,galore --ranks 64,512",
    ),
    "trace": (
        "--model {tiny} --method galore --micro-batch 2 --seq-len 32 --snapshot {folder}/s.pickle",
        "--model {tiny} --method q-galore --micro-batch 2 --seq-len 32 --gpu t4",
        "--model {tiny} --seq-len 32 --micro-batch 2 --device cpu",
        "--diff {folder}/trace.json {folder}/trace.json",
    ),
    "probe": ("--replay {recording} --store", "--replay {recording} --tape", "--list"),
    "validate": ("--replay {recording}",),
    "train": (
        "--model {tiny} --method galore --micro-batch 2 --seq-len 32 --data {texts} --steps 4 "
        "--eval-every 2 --device cpu --out {folder}/one",
        "--model {tiny} --method galore --steps 4 --data {texts} --device cpu --dry-run",
    ),
    "bench": ("--model {tiny} --methods full,lowrank --steps 3 --data {texts} --dry-run",),
    "recommend": (
        "--model 60m --gpu rtx-4090 --methods full,scale-sgd --global-batch 8 --tokens 1.3B "
        "--objective cost --price-per-hour 0.4",
        "--model 60m --gpu mem=24GB --methods full --global-batch 8",
        "--model 7b --gpu mem=4GB --methods full,scale-sgd --global-batch 8",
    ),
    "report": ("{folder}/one --out {folder}/page.html",),
    "methods": ("", "galore"),
    "models": ("", "{tiny}"),
    "gpus": ("", "mem=24GB", "rtx-4090"),
    "doctor": ("",),
}


# What takes minutes, for `scripts/generate.py --slow` only. Tests of these commands hold their own
# documents against the schemas (helpers.check_document).
SLOW: dict[str, tuple[str, ...]] = {
    "probe": (
        "--model {tiny} --seq-len 64 --dtype fp32 --device cpu --find max-batch --max-memory 900MB",
    ),
    "bench": (
        "--model {tiny} --methods full,lowrank --lrs 1e-3 --steps 3 --seq-len 32 --micro-batch 2 "
        "--data {texts} --out {folder}/bench",
    ),
}


def texts(folder: Path) -> Path:
    """A small folder of real text, enough for both splits at 32 positions."""
    source = Path(textwrap.__file__).parent
    folder.mkdir(exist_ok=True)
    for path in sorted(source.glob("*.py"))[:60]:
        text = path.read_text(encoding="utf-8")[:6000]
        folder.joinpath(path.stem + ".txt").write_text(text, encoding="utf-8")
    return folder


def make(
    folder: Path, texts: Path, commands: dict[str, tuple[str, ...]] = COMMANDS
) -> dict[str, list[Any]]:
    """Documents by the schema they name, printed by the commands. ``folder`` keeps what they wrote:
    a file per command, a run, a snapshot.
    """
    before = os.environ.get("EFFPROF_HOME")
    os.environ["EFFPROF_HOME"] = str(folder / "home")
    tiny = folder / "tiny" / "config.json"
    tiny.parent.mkdir(parents=True)
    tiny.write_text(json.dumps({"model_type": "llama", **TINY}))
    places = {"folder": folder, "tiny": tiny, "texts": texts, "recording": RECORDING}
    found: dict[str, list[Any]] = {}
    try:
        for command, lines in commands.items():
            for number, line in enumerate(lines):
                arguments = [word.format(**places) for word in line.split()]
                code, out, err = run_cli(command, *arguments, "--json")
                assert code in (0, 3), (command, line, err)
                document = json.loads(out)
                found.setdefault(name_of(document), []).append(document)
                if not number:
                    (folder / f"{command}.json").write_text(out, encoding="utf-8")
    finally:
        os.environ.pop("EFFPROF_HOME")
        if before is not None:
            os.environ["EFFPROF_HOME"] = before
    if (folder / "one").exists():
        shutil.copytree(folder / "one", folder / "other")
    return found


def bench(folder: Path) -> Path:
    """A study's folder as `effprof bench` leaves it: of the study that examples/paper holds, which
    goes on, the first trial of the first 18 arms, and one that diverged.
    """
    import pandas

    from effprof.bench import JOURNAL
    from effprof.bench.against import beside
    from effprof.bench.results import document, summarize, write_results
    from effprof.bench.spec import read

    paper = Path(__file__).parents[1] / "examples" / "paper"
    frame = pandas.read_parquet(paper / "results" / "paper-tiny" / "results.parquet")
    frame = frame.drop_duplicates("arm").head(18)
    rows = json.loads(frame.to_json(orient="records"))
    rows = [row | {"curve": json.loads(row["curve"])} for row in rows]
    lost = {"lr": 0.09, "state": "diverged", "loss": None, "perplexity": None, "curve": []}
    rows.append(rows[0] | lost | {"reason": "Error: the loss is NaN."})
    spec = read(paper / "paper-tiny.toml", "cpu")
    lines = summarize(spec, rows)
    published = {"published": [one._asdict() for one in beside(lines)]}
    folder.mkdir()
    write_results(folder, document(spec, lines, rows) | published)
    (folder / JOURNAL).touch()
    return folder


def name_of(document: Any) -> str:
    """``estimate`` of effprof.estimate/1."""
    return str(document["schema"]).removeprefix("effprof.").partition("/")[0]
