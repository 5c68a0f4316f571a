"""Traced tapes: against the CPU's record, against the estimate, and as users see them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from helpers import record, run_cli, small

from effprof import readers, registry
from effprof import tape as tapes
from effprof.architectures import admit
from effprof.errors import EffprofError
from effprof.estimator.estimate import estimate
from effprof.plan import Plan
from effprof.snapshot import read, recorded_tape, snapshot
from effprof.tracer.foreign import stand_in
from effprof.tracer.trace import Trace, trace


@pytest.mark.parametrize("name", registry.names())
def test_every_method_traces_as_it_is_estimated(name: str, tiny: str) -> None:
    plan = small(tiny, name, dtype="bf16", micro_batch=4)
    traced, expected = trace(plan).memory.peak, estimate(plan).memory.peak
    assert traced.size == pytest.approx(expected.size, rel=1e-3)
    assert (traced.update, traced.phase) == (expected.update, expected.phase)
    for role in ("weights", "optimizer"):
        assert traced.by_role[role] == pytest.approx(expected.by_role[role], rel=2e-3)


RECORDED: list[dict[str, Any]] = [
    {"method": "full", "dtype": "amp-bf16", "checkpointing": "full"},
    {"method": "full", "loss": "chunked", "dtype": "amp-bf16"},
    {"method": "sltrain", "checkpointing": "full", "freeze_rest": True},
    {"method": "lowrank-restarts", "attention": "eager", "grad_accum": 2},
    {"method": "galore", "per_layer_update": True},
    {"method": "fira", "dtype": "bf16", "attention": "math"},
    {"method": "lomo", "dtype": "bf16"},
]


@pytest.mark.parametrize("values", RECORDED, ids=lambda v: "-".join(map(str, v.values())))
def test_a_trace_equals_the_record_of_the_real_step(values: dict[str, Any], tiny: str) -> None:
    plan = small(tiny, values["method"], **{k: v for k, v in values.items() if k != "method"})
    real = tapes.peak(record(plan))
    assert trace(plan).memory.peak.size == pytest.approx(real.size, rel=3e-3)


ON_A_GPU: list[dict[str, Any]] = [
    {"checkpointing": "full", "attention": "eager"},
    {"attention": "math", "dtype": "amp-bf16"},
    {"dtype": "fp16", "attention": "eager", "checkpointing": "full"},
    {"method": "galore", "state_dtype": "8bit", "per_layer_update": True},
    {"method": "lora", "freeze_rest": True, "optimizer_impl": "foreach"},
    {"state_dtype": "fp32", "rows": "packed-isolated"},
    {"loss": "chunked", "seq_len": 512, "allocator": "expandable"},
    {"method": "muon", "zero_grad": "zero", "grad_accum": 2},
    {"gpu": "t4", "seq_len": 128},
]


@pytest.mark.parametrize("values", ON_A_GPU, ids=lambda v: "-".join(map(str, v.values())))
def test_a_gpus_trace_equals_its_estimate(values: dict[str, Any]) -> None:
    plan = Plan(**{"model": "9m", "method": "full", "micro_batch": 4, **values})
    traced, expected = trace(plan).memory, estimate(plan).memory
    assert traced.requested == pytest.approx(expected.requested, rel=1e-3)
    assert traced.peak.size == pytest.approx(expected.peak.size, rel=5e-3)
    assert traced.peak.phase == expected.peak.phase


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_architectures_trace_as_they_are_estimated(
    name: str, dtype: str, configs: dict[str, str]
) -> None:
    """fp32 with grouped heads has no fused kernel on a GPU: both know."""
    plan = Plan(model=configs[name], micro_batch=4, dtype=dtype, loss="chunked")
    traced, expected = trace(plan).memory, estimate(plan).memory
    assert traced.requested == pytest.approx(expected.requested, rel=3e-3)


MASKED = {"rows": "packed-isolated", "micro_batch": 4}
VARIANTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"hidden_act": "relu"}, {"micro_batch": 8}),
    ({"num_key_value_heads": 1}, MASKED),
    ({"num_key_value_heads": 1}, {**MASKED, "gpu": "v100-16gb"}),
    ({"num_key_value_heads": 2}, {**MASKED, "gpu": "v100-16gb"}),
    ({}, {"method": "cola", "rank": 32, "targets": ("attention",)}),
    ({}, {"method": "relora", "rank": 32, "micro_batch": 1, "seq_len": 16}),
    ({}, {"method": "loro", "rank": 64, "micro_batch": 1, "seq_len": 16}),
]


@pytest.mark.parametrize(("config", "values"), VARIANTS)
def test_variants_trace_as_they_are_estimated(
    config: dict[str, Any], values: dict[str, Any], tmp_path: Path
) -> None:
    """What is kept for backward depends on them, or what a periodic step takes."""
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 2048}
    (tmp_path / "it.json").write_text(json.dumps({"model_type": "llama", **shape, **config}))
    plan = Plan(model=str(tmp_path / "it.json"), **values)
    traced, expected = trace(plan).memory, estimate(plan).memory
    assert traced.requested == pytest.approx(expected.requested, rel=2e-3)
    assert traced.peak.phase == expected.peak.phase


FOREIGN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "olmo2": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    "gpt_neox": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
}


def config_of(kind: str, folder: Path, **values: Any) -> str:
    path = folder / kind / "config.json"
    path.parent.mkdir()
    document = {"model_type": kind, "vocab_size": 1024, "num_attention_heads": 4, **values}
    path.write_text(json.dumps(document))
    return str(path)


@pytest.mark.parametrize("kind", FOREIGN)
def test_any_causal_language_model_of_transformers_traces(kind: str, tmp_path: Path) -> None:
    path = config_of(kind, tmp_path, **FOREIGN[kind])
    code, out, err = run_cli("trace", "--model", path, "--seq-len", "64", "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["memory"]["weights"] >= 2 * document["parameters"]["total"] > 0
    method = "lomo" if kind == "gpt2" else "lowrank"  # gpt2's layers are no nn.Linear
    code, out, _ = run_cli("trace", "--model", path, "--seq-len", "64", "--method", method)
    assert code == 0
    code, _, err = run_cli("estimate", "--model", path)
    assert (code, "effprof trace" in err) == (2, True)


@pytest.mark.parametrize("method", ["full", "lora", "galore"])
def test_a_foreign_model_is_traced_as_a_known_one(
    method: str, configs: dict[str, str], tmp_path: Path
) -> None:
    """llama, admitted as if effprof did not know it."""
    config = json.loads(Path(configs["llama"]).read_text())
    admit(str(tmp_path), stand_in(config, "unknown"))
    values = {"method": method, "rank": 8} if method != "full" else {"method": method}
    one, other = (
        trace(Plan(model=model, micro_batch=2, **values))
        for model in (configs["llama"], str(tmp_path))
    )
    assert other.memory.peak.size == one.memory.peak.size
    assert other.parameters["total"] == one.parameters["total"]


def test_what_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    code, _, err = run_cli("trace", "--model", config_of("nonesuch", tmp_path))
    assert (code, "no causal language model" in err) == (2, True)


@pytest.fixture(scope="module")
def galore() -> Trace:
    return trace(Plan(model="9m", method="galore", micro_batch=4))


def test_every_event_has_its_counterpart(galore: Trace) -> None:
    """A storage is allocated once and freed at most once, with its own bytes."""
    alive: dict[int, int] = {}
    seen: set[int] = set()
    for storage, change in galore.tape.events:
        if change > 0:
            assert storage not in seen
            seen.add(storage)
            alive[storage] = change
        else:
            assert alive.pop(storage) == -change
    held = sum(size for s, size in alive.items() if galore.tape.roles[s] == "weights")
    assert held == 2 * galore.plan.architecture.parameters


def test_the_timeline_keeps_the_peak_and_phases_cover_the_tape(galore: Trace) -> None:
    tape, blocks, peak = galore.tape, galore.memory.blocks, galore.memory.peak
    spans = readers.spans(tape, blocks)
    assert {span.phase for span in spans} >= {"forward", "backward", "update", "refresh"}
    assert max(span.peak for span in spans) == peak.size
    for points in (10, 100, 10_000):
        instants = readers.timeline(tape, blocks, 0, len(tape.events), points)
        assert len(instants) <= max(points, len(tape.events)) + 1
        assert max(sum(one.by_role.values()) for one in instants) == peak.size


def test_labels_name_the_module_that_made_a_tensor(galore: Trace) -> None:
    labels = set(galore.tape.labels)
    assert "model.layers.0.mlp.gate_proj.mm" in labels
    assert "model.layers.3.mlp.down_proj backward.mm" in labels
    assert "model.layers.2.self_attn.q_proj.weight.projector" in labels


def test_a_question_of_a_fake_tensor_is_answered_and_told() -> None:
    result = trace(Plan(model="9m", method="q-galore", micro_batch=2))
    assert sum(result.questions.values()) > 0
    assert "read" in next(iter(result.questions))


def test_a_difference_names_what_changed() -> None:
    one, other = (
        trace(Plan(model="9m", micro_batch=4, keep_logits=kept)).memory.peak
        for kept in (False, True)
    )
    changes = readers.diff(one, other)
    assert sum(change.after - change.before for change in changes) == other.size - one.size
    assert changes[0].label == "lm_head.mm"
    assert changes[0].before == 0


def test_snapshots_open_in_torchs_own_reader(galore: Trace, tmp_path: Path) -> None:
    from torch.cuda import _memory_viz

    path = tmp_path / "step.pickle"
    for allocator in ("default", "expandable"):
        from effprof.snapshot import write

        write(path, galore.tape, allocator)
        made = pickle.loads(path.read_bytes())
        assert "Total:" in _memory_viz.segsum(made) or _memory_viz.segsum(made)
        assert "galore" not in _memory_viz.trace(made)
        assert "<html" in _memory_viz.trace_plot(made).lower()
        assert "<html" in _memory_viz.segment_plot(made).lower()
        assert _memory_viz.Bytes(sum(s["total_size"] for s in made["segments"]))
        again = recorded_tape(read(path))
        assert [size for _, size in again.events] == [size for _, size in galore.tape.events]


def test_a_snapshots_blocks_fill_their_segments(galore: Trace) -> None:
    made = snapshot(galore.tape)
    assert sum(s["total_size"] for s in made["segments"]) == galore.memory.reserved
    for segment in made["segments"]:
        assert sum(block["size"] for block in segment["blocks"]) == segment["total_size"]
        at = segment["address"]
        for block in segment["blocks"]:
            assert block["address"] == at
            at += block["size"]


class _Harmful:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


def test_a_snapshot_that_would_run_code_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.pickle"
    path.write_bytes(pickle.dumps({"device_traces": [[_Harmful()]]}))
    with pytest.raises(EffprofError, match="not a memory snapshot"):
        read(path)
    assert "executed" not in capsys.readouterr().out


def test_the_command_draws_writes_and_prints_one_document(tmp_path: Path, tiny: str) -> None:
    files = {name: tmp_path / name for name in ("step.png", "step.html", "step.pickle")}
    plan = ["--model", tiny, "--micro-batch", "2", "--seq-len", "32"]
    code, out, err = run_cli(
        *("trace", *plan, "--json", "--png", str(files["step.png"])),
        *("--html", str(files["step.html"]), "--snapshot", str(files["step.pickle"])),
    )
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["schema"] == "effprof.trace/1"
    assert sum(row["bytes"] for row in document["at_peak"]) == document["memory"]["peak_allocated"]
    assert files["step.png"].read_bytes().startswith(b"\x89PNG")
    page = files["step.html"].read_text()
    assert "@DATA@" not in page
    assert "://" not in page
    assert document["timeline"]["title"] in page
    assert read(files["step.pickle"])["device_traces"]
    code, out, _ = run_cli("trace", *plan, "--gpu", "mem=100MB")
    assert code == 3
    assert "does not fit" in out
    assert max(map(len, out.splitlines())) <= 100


def test_the_command_compares_two_plans(tmp_path: Path, tiny: str) -> None:
    paths = []
    for name, flags in (("plain", ()), ("chunked", ("--loss", "chunked"))):
        _, out, _ = run_cli("estimate", "--model", tiny, "--seq-len", "64", "--json", *flags)
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(out)
    code, out, _ = run_cli("trace", "--diff", *map(str, paths))
    assert code == 0
    assert "plain" in out
    assert "log_softmax" in out
    document = json.loads(run_cli("trace", "--diff", *map(str, paths), "--json")[1])
    before, after = (document[side]["memory"]["peak_allocated"] for side in ("before", "after"))
    assert sum(c["after"] - c["before"] for c in document["changes"]) == after - before < 0
    code, _, err = run_cli("trace", "--diff", *map(str, paths), "--rank", "8")
    assert code == 2
    assert "--rank" in err
    (tmp_path / "broken.json").write_text("{")
    code, _, err = run_cli("trace", "--diff", str(tmp_path / "broken.json"), str(paths[0]))
    assert (code, "is not JSON" in err) == (2, True)


def test_a_picture_that_cannot_be_written_is_said(tmp_path: Path, tiny: str) -> None:
    missing = str(tmp_path / "no" / "step.png")
    code, _, err = run_cli("trace", "--model", tiny, "--seq-len", "32", "--png", missing)
    assert code == 2
    assert "Cannot write" in err
    twice = str(tmp_path / "x")
    code, _, err = run_cli("trace", "--model", tiny, "--png", twice, "--html", twice)
    assert (code, "given twice" in err) == (2, True)
