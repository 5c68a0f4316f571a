"""What each of several processes runs in tests/test_parallel.py: many small plans, one group."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from effprof.measure.recorder import CpuRecorder
from effprof.phase import listening
from effprof.plan import Plan, from_dict
from effprof.trainer import synthetic
from effprof.trainer.build import build
from effprof.trainer.data import Batch
from effprof.trainer.distributed import Engine, engine, local
from effprof.trainer.optimizer import MethodOptimizer
from effprof.trainer.step import training_step

ROWS = 2  # of a micro-batch
CPU = torch.device("cpu")
_SETTLED = 0.003  # seconds after which gloo's thread has let go of a collective's tensors


def run(tasks: list[dict[str, Any]], size: int, folder: Path) -> list[list[Any]]:
    """Each task's answers, by process. A task is a plan, and what to do with it."""
    (folder / "tasks.json").write_text(json.dumps(tasks))
    command = [sys.executable, __file__, str(folder), str(size)]
    environment = {"KINETO_LOG_LEVEL": "99", **os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(size)
    ]
    told = [worker.communicate()[1] for worker in workers]
    failed = [text for worker, text in zip(workers, told, strict=True) if worker.returncode]
    assert not failed, "\n".join(text[-3000:] for text in failed)
    read = [(folder / f"{rank}.jsonl").read_text().splitlines() for rank in range(size)]
    return [[json.loads(line) for line in lines] for lines in zip(*read, strict=True)]


def main() -> None:
    """One of the processes: folder, how many, which."""
    folder, size, rank = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=size)
    with (folder / f"{rank}.jsonl").open("w") as answers:
        for task in json.loads((folder / "tasks.json").read_text()):
            plan = from_dict(task["plan"])
            try:
                found = (losses if task["what"] == "losses" else tape)(plan, rank, size)
            except BaseException:  # noqa: BLE001 - told on standard error
                sys.stderr.write(f"task {task['what']} {plan.method} {plan.parallel}\n")
                traceback.print_exc()
                os._exit(1)  # the other waits for it: its collective fails
            answers.write(json.dumps(found) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def losses(plan: Plan, rank: int = 0, size: int = 1, updates: int = 4) -> dict[str, Any]:
    """The losses of a few updates on rows that do not depend on how many processes there are, and
    a checksum of the weights after them.
    """
    model, optimizer = build(plan, lr=1e-2)
    driver = engine(plan, optimizer)
    found = []
    generator = torch.Generator().manual_seed(1)
    for _ in range(updates):
        count = plan.micro_batch * plan.grad_accum * size // ROWS
        drawn = [_batch(plan, generator) for _ in range(count)]
        targets = sum(batch.targets for batch in drawn)
        mine = drawn[rank::size] if size > 1 else [_joined(drawn)]
        total = training_step(
            model, optimizer, mine, plan, engine=driver, targets=targets if driver else None
        )
        found.append(float(total))
    weights = [local(p.detach()).double().abs().sum() for p in model.parameters()]
    return {"losses": found, "weights": float(torch.stack(weights).sum())}


def _batch(plan: Plan, generator: torch.Generator) -> Batch:
    """Random rows, of which some positions are no targets."""
    size = (ROWS, plan.seq_len)
    ids = torch.randint(0, plan.architecture.vocab, size, generator=generator)
    labels = ids.masked_fill(torch.rand(size, generator=generator) < 0.3, -100)
    return Batch(ids, labels, None, int((labels[:, 1:] != -100).sum()), ids.numel())


def _joined(drawn: list[Batch]) -> Batch:
    ids, labels = (
        torch.cat(parts) for parts in zip(*((b.ids, b.labels) for b in drawn), strict=True)
    )
    return Batch(ids, labels, None, sum(b.targets for b in drawn), ids.numel())


def tape(plan: Plan, rank: int, size: int) -> dict[str, Any]:
    """The CPU allocator's tape of the updates that an estimate replays."""
    _settle()
    torch.manual_seed(0)
    recorder = CpuRecorder()
    recorder.start()
    model, optimizer = build(plan, lr=1e-3)
    driver = engine(plan, optimizer)
    first, steady, *periodic = plan.updates
    for kind, number in (first, steady, (steady[0], steady[1] + 1), *periodic):
        optimizer.seek(number)
        assert driver is not None
        driver.updated()
        _record(recorder, kind, model, optimizer, driver)
    recorder.stop()
    found = recorder.tape()
    return {"events": found.events, "roles": found.roles, "labels": found.labels}


def _record(
    recorder: CpuRecorder, kind: str, model: Any, optimizer: MethodOptimizer, driver: Engine
) -> None:
    def on_phase(phase: str) -> None:
        recorder.mark(kind, phase)

    with listening(recorder.inner):
        synthetic.one_update(model, optimizer, driver.plan, CPU, on_phase, driver)


def _settle() -> None:
    """gloo's own thread lets go of tensors a moment after the waiting one goes on; what it is then
    the last to free is in no thread's record.
    """
    for name in ("all_gather_single", "reduce_scatter_single", "gather", "scatter", "all_reduce"):
        original = getattr(dist, name)
        if getattr(original, "settles", False):
            continue

        def settled(*arguments: Any, original: Any = original, **options: Any) -> None:
            work = original(*arguments, **{**options, "async_op": True})
            work.wait()
            time.sleep(_SETTLED)

        settled.settles = True  # type: ignore[attr-defined]
        setattr(dist, name, settled)


if __name__ == "__main__":
    main()
