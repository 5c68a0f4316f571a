"""Losses that are no number, or far above the last ones: noticed, and what they came from kept."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from effprof.files import cannot_write
from effprof.trainer.batch import Batch
from effprof.trainer.metrics import plain_json

ON_NAN = ("stop", "skip", "rollback")
WINDOW = 64  # losses that say what is usual
_FEWEST = 16
_DEVIATIONS = 8.0  # of the usual noise, above the usual loss
_LEAST = 0.5  # nats: a run that hardly moves has no spikes of hundredths


class Guard:
    """Knows the last losses. Its state is a list of numbers.

    A spike is a loss half a nat, and eight times the usual noise (1.4826 / √2 × the median of the
    absolute steps from one to the next), above the median of the last 64.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []

    def judge(self, numbers: Mapping[str, float], *, scaled: bool) -> str:
        """``nan``, ``spike`` or nothing, of an update's loss and gradient norm.

        ``scaled`` losses overflow in backward now and then: their scaler leaves that update out.
        """
        loss = numbers["loss"]
        norm = 0.0 if scaled else numbers.get("grad_norm", 0.0)
        if not math.isfinite(loss) or not math.isfinite(norm):
            return "nan"
        spike = False
        if len(self.losses) >= _FEWEST:
            median = statistics.median(self.losses)
            steps = (abs(b - a) for a, b in itertools.pairwise(self.losses))
            spread = 1.4826 * statistics.median(steps) / math.sqrt(2)
            spike = loss > median + max(_DEVIATIONS * spread, _LEAST)
        self.losses = [*self.losses, loss][-WINDOW:]
        return "spike" if spike else ""


def record(
    run: Path, step: int, kind: str, numbers: Mapping[str, Any], batches: Sequence[Batch]
) -> Path:
    """Keep an update's tokens and numbers in ``incidents/``: safetensors and JSON.

    Raises EffprofError where the disk refuses.
    """
    path = run / "incidents" / f"step-{step:08d}-{kind}"
    tensors = {
        f"{index}.{name}": tensor.cpu().contiguous()
        for index, batch in enumerate(batches)
        for name, tensor in (("ids", batch.ids), ("labels", batch.labels.clone()))
    }
    try:
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, path.with_suffix(".safetensors"))
        path.with_suffix(".json").write_text(plain_json({"step": step, "kind": kind, **numbers}))
    except OSError as problem:
        raise cannot_write(path, problem) from None
    return path.with_suffix(".safetensors")
