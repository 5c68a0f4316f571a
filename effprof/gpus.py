"""Which GPU: its memory, compute capability and peak, from the catalog or from numbers."""

from __future__ import annotations

import dataclasses
import functools
import re
import tomllib
from dataclasses import dataclass

from effprof import calibration
from effprof.calibration import Calibration
from effprof.errors import UsageError, unknown
from effprof.model import PRESETS
from effprof.units import MIB, parse_bytes

# Memory of a process outside the allocator after its first kernels: measured on an RTX A6000 (torch
# 2.14.1+cu130) and a
# Tesla T4 (fitcheck-llm 0.3.1). A probe on the card itself replaces it.
CONTEXT = 744_685_568
CONTEXT_TURING = 141 * MIB

# torch 2.13 CublasHandlePool.cpp: 2 × 4 MiB + 8 × 16 KiB per handle; 32 MiB from compute capability
# 9.0.
WORKSPACE = 8_519_680
WORKSPACE_HOPPER = 32 * MIB


@dataclass(frozen=True, slots=True)
class Gpu:
    """``memory`` in bytes, ``bf16_flops`` the dense peak per second or None where it is not
    known.
    """

    name: str
    title: str
    memory: int
    capability: float | None = None
    bf16_flops: float | None = None
    common: bool = False
    calibration: Calibration | None = None

    @property
    def context(self) -> int:
        """Bytes a process holds outside the caching allocator."""
        if self.calibration and self.calibration.context is not None:
            return self.calibration.context
        return CONTEXT_TURING if self.capability and self.capability < 8 else CONTEXT

    @property
    def workspace(self) -> int:
        """Bytes of one cuBLAS workspace."""
        if self.calibration and self.calibration.workspace is not None:
            return self.calibration.workspace
        return WORKSPACE_HOPPER if self.capability and self.capability >= 9 else WORKSPACE

    def calibrated(self) -> Gpu:
        """The card with what probes have measured of it here."""
        return dataclasses.replace(self, calibration=calibration.of(self.name))


@functools.cache
def catalog() -> dict[str, Gpu]:
    """Every GPU by name."""
    with open(PRESETS / "gpus.toml", "rb") as file:
        table = tomllib.load(file)
    return {
        name: Gpu(
            name,
            row["title"],
            row["memory_mib"] * MIB,
            row["capability"],
            row["bf16_tflops"] * 1e12 if "bf16_tflops" in row else None,
            row.get("common", False),
        )
        for name, row in table.items()
    }


def gpu(text: str) -> Gpu:
    """A GPU by catalog name, or by its memory as ``mem=24GB``. Raises UsageError."""
    name = text.lower().replace("_", "-").replace(" ", "-")
    if name in catalog():
        return catalog()[name]
    if "=" in text:
        given = dict(part.partition("=")[::2] for part in text.split(","))
        extra = given.keys() - {"mem"}
        if extra or "mem" not in given:
            raise UsageError(
                f"--gpu {text!r} is not understood.",
                "Give the memory as --gpu mem=24GB (or 22.5GiB).",
            )
        return Gpu(text, text, parse_bytes(given["mem"], "--gpu mem"))
    raise unknown("GPU", text, catalog(), "Or give its memory: --gpu mem=24GB.")


def recognise(name: str, total: int | None = None) -> Gpu | None:
    """The catalog's card for a driver's device name, such as ``NVIDIA GeForce RTX 4090``.

    ``total`` bytes tell cards of one name apart, and a MIG instance or a vGPU from the whole card.
    None where no card has the name, or none of its size.
    """
    words = name.lower().replace("-", " ").replace("_", " ").split()
    found: list[tuple[int, Gpu]] = []
    for card in catalog().values():
        parts = [part for part in card.name.split("-") if not _SIZE.fullmatch(part)]
        sized = total is None or abs(total / card.memory - 1) < _SAME_SIZE
        if sized and all(part in words for part in parts):
            found.append((len(parts), card))
    most = max((count for count, _ in found), default=0)
    best = [card for count, card in found if count == most]
    if total is not None:
        best.sort(key=lambda card: abs(total - card.memory))
    named = [card for card in best if card.name.split("-")[-1] in words]
    return next(iter(named or best), None)


_SIZE = re.compile(r"[0-9]+gb")
_SAME_SIZE = 0.08  # what ECC and the driver keep back differs by a few per cent

DEFAULT = Gpu("", "an Ampere-class card", 0)
