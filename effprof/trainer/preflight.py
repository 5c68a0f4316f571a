"""What is checked before a run starts: the device, whether it fits, and room on the disk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

import torch

from effprof.errors import DoesNotFitError, EffprofError
from effprof.estimator.estimate import Estimate, estimate
from effprof.measure.device import DeviceMeter, meter
from effprof.trainer.build import resolve_device
from effprof.trainer.run import Run


@dataclass(frozen=True)
class Ready:
    """Where a run will be, and what is expected of it."""

    device: torch.device
    expected: Estimate
    machine: DeviceMeter


def prepare(run: Run, *, force: bool) -> Ready:
    """Check device, memory and disk.

    Raises NoDeviceError, DoesNotFitError, or EffprofError where the disk is too small.
    """
    device = resolve_device(run.plan.device, run.plan.allocator)
    expected, machine = estimate(run.plan), meter(device)
    if expected.total > machine.total() and not force:
        raise DoesNotFitError(
            f"The estimate is {expected.total:,} bytes, the device has {machine.total():,}.",
            "Use a smaller --micro-batch or --checkpointing full, or --force to try anyway.",
        )
    needed, free = disk_needed(run, expected), disk_free(run)
    if free < needed and not force:
        raise EffprofError(
            f"The run needs up to {needed:,} bytes at {str(run.out)!r}, {free:,} are free.",
            "Free some space, give another --out, or --force to try anyway.",
        )
    return Ready(device, expected, machine)


def checkpoint_bytes(expected: Estimate) -> int:
    """The tensors of one checkpoint."""
    held = expected.step.resident()
    return held["weights"] + held["optimizer"] + held["buffers"]


def disk_needed(run: Run, expected: Estimate) -> int:
    """Room for the checkpoints a run keeps, one being written, and the exported model."""
    model = expected.step.architecture.parameters * 4
    return run.keep.most * checkpoint_bytes(expected) + model


def disk_free(run: Run) -> int:
    """Bytes free where the run's folder is or will be."""
    existing = next(path for path in (run.out, *run.out.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free
