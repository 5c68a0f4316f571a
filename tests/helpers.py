"""A plan run for real, recorded; used by several tests."""

from __future__ import annotations

from typing import Any

from effprof.phase import listening
from effprof.plan import Plan
from effprof.tape import Tape


def record(plan: Plan) -> Tape:
    """The CPU allocator's tape of a first, a steady and, where due, a refreshing update."""
    import torch

    from effprof.measure.recorder import CpuRecorder, pointers
    from effprof.trainer import synthetic
    from effprof.trainer.build import build

    recorder = CpuRecorder()
    recorder.start()
    model, optimizer = build(plan, lr=1e-3)
    recorder.name(pointers(dict(model.named_parameters()), "weights"))
    recorder.name(pointers(dict(model.named_buffers()), "buffers"))
    for kind, number in plan.updates:
        optimizer.seek(number)

        def on_phase(phase: str, kind: str = kind) -> None:
            recorder.mark(kind, phase)

        with listening(recorder.inner):
            synthetic.one_update(model, optimizer, plan, torch.device("cpu"), on_phase)
        recorder.name(pointers(synthetic.state_tensors(optimizer), "optimizer"))
    recorder.stop()
    return recorder.tape()


def run_cli(*arguments: str) -> tuple[int, str, str]:
    """The command line in this process: exit code, stdout, stderr."""
    import contextlib
    import io

    from effprof.cli import run

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def small(model: str, method: str, **changes: Any) -> Plan:
    """A plan small enough for a test."""
    values = {"micro_batch": 2, "seq_len": 32, "dtype": "fp32", "device": "cpu", **changes}
    return Plan(model=model, method=method, **values)


def check_document(document: Any) -> None:
    """Hold a document against its schema in the package; a name the schema lacks is an error."""
    import json
    from pathlib import Path

    import jsonschema

    name = str(document["schema"]).removeprefix("effprof.").partition("/")[0]
    path = Path(__file__).parent.parent / "effprof" / "schemas" / f"{name}.json"
    assert path.exists(), f"{name} has no schema: add it to tests/samples.py, make generate"
    schema = _closed(json.loads(path.read_text(encoding="utf-8")))
    found = sorted(jsonschema.Draft202012Validator(schema).iter_errors(document), key=str)
    assert not found, f"{found[0].json_path}: {found[0].message[:200]} (make generate?)"


def _closed(schema: Any) -> Any:
    """A schema that admits no name it does not describe."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _closed(value) for key, value in schema.items()}
    if isinstance(made.get("required"), list):
        made.setdefault("additionalProperties", False)
    return made
