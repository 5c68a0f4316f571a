"""Which GPU: its memory, peaks and bandwidth, from the catalog or from numbers."""

from __future__ import annotations

import functools
import re
import tomllib
from typing import TYPE_CHECKING, Any, NamedTuple

from effprof import calibration
from effprof.architectures import PRESETS
from effprof.calibration import Calibration
from effprof.errors import UsageError, unknown
from effprof.units import MIB, parse_bytes

if TYPE_CHECKING:
    from effprof.plan import Plan

# Memory of a process outside the allocator after its first kernels: measured on an RTX A6000 (torch
# 2.14.1+cu130) and a
# Tesla T4 (fitcheck-llm 0.3.1). A probe on the card itself replaces it.
CONTEXT = 744_685_568
CONTEXT_TURING = 141 * MIB

# Memory of one NCCL communicator, measured on A100s with NVLink: two GPUs, and more than two
# (NVIDIA/nccl discussion 964). It grows with the channels, of which slower links have fewer.
NCCL_PAIR = 544 * MIB
NCCL = 688 * MIB

# torch 2.13 CublasHandlePool.cpp: 2 × 4 MiB + 8 × 16 KiB per handle; 32 MiB from compute capability
# 9.0.
WORKSPACE = 8_519_680
WORKSPACE_HOPPER = 32 * MIB


class Gpu(NamedTuple):
    """A card: ``memory`` in bytes; dense peaks in FLOP/s with fp32 accumulation and without
    sparsity, ``bandwidth``, ``link`` (all links, both directions) and ``pcie`` (one direction) in
    bytes/s, ``power`` in watts. None where it is not known.
    """

    name: str
    title: str
    memory: int
    capability: float | None = None
    bf16_flops: float | None = None
    fp16_flops: float | None = None
    tf32_flops: float | None = None
    fp32_flops: float | None = None
    bandwidth: float | None = None
    link: float | None = None
    pcie: float | None = None
    power: float | None = None
    vendor: str = ""
    common: bool = False
    nominal: bool = False
    unified: bool = False
    source: str = ""
    calibration: Calibration | None = None

    @property
    def context(self) -> int:
        """Bytes a process holds outside the caching allocator."""
        if self.calibration and self.calibration.context is not None:
            return self.calibration.context
        return CONTEXT_TURING if self.capability and self.capability < 8 else CONTEXT

    def outside(self, gpus: int) -> int:
        """Bytes outside the allocator of one of so many processes: the context, and NCCL's own."""
        nccl = (0, NCCL_PAIR, NCCL)[min(gpus, 3) - 1]
        return self.context + nccl

    @property
    def workspace(self) -> int:
        """Bytes of one cuBLAS workspace."""
        if self.calibration and self.calibration.workspace is not None:
            return self.calibration.workspace
        return WORKSPACE_HOPPER if self.capability and self.capability >= 9 else WORKSPACE

    def as_dict(self) -> dict[str, Any]:
        """The JSON object: bytes, FLOP/s, bytes/s, watts."""
        names = [name for name in self._fields if name != "calibration"]
        return {name: getattr(self, name) for name in names}

    def calibrated(self) -> Gpu:
        """The card with what probes have measured of it here."""
        return self._replace(calibration=calibration.of(self.name))

    def peak(self, dtype: str) -> float | None:
        """FLOP/s of matrix products in a dtype (bf16, fp16 or fp32, which torch runs without tf32).

        A card without bf16 tensor cores runs bf16 products at most at its fp32 rate.
        """
        if dtype == "bf16":
            return self.fp32_flops if self.lacks_bf16 else self.bf16_flops
        if dtype == "fp16":
            old = self.capability is not None and self.capability < 7
            return self.fp32_flops if old else self.fp16_flops
        return self.fp32_flops

    @property
    def lacks_bf16(self) -> bool:
        """Whether it is known to have no bf16 tensor cores: before Ampere."""
        return self.capability is not None and self.capability < 8


@functools.cache
def _tables() -> dict[str, str]:
    """Each card's table as text: reading all of them as TOML would be a tenth of an estimate."""
    text = (PRESETS / "gpus.toml").read_text(encoding="utf-8")
    parts = re.split(r"^\[([^\]]+)\]$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@functools.cache
def _card(name: str) -> Gpu:
    row = tomllib.loads(_tables()[name])

    def times(key: str, unit: float) -> float | None:
        return row[key] * unit if key in row else None

    return Gpu(
        name,
        row["title"],
        row["memory_mib"] * MIB,
        row.get("capability"),
        bf16_flops=times("bf16_tflops", 1e12),
        fp16_flops=times("fp16_tflops", 1e12),
        tf32_flops=times("tf32_tflops", 1e12),
        fp32_flops=times("fp32_tflops", 1e12),
        bandwidth=times("bandwidth_gb_s", 1e9),
        link=times("link_gb_s", 1e9),
        pcie=times("pcie_gb_s", 1e9),
        power=times("tdp_w", 1.0),
        vendor=row["vendor"],
        common=row.get("common", False),
        nominal=row.get("nominal", False),
        unified=row.get("unified", False),
        source=row["source"],
    )


@functools.cache
def common() -> tuple[Gpu, ...]:
    """The cards of the "fits on" line, smallest first."""
    found = [_card(name) for name, text in _tables().items() if "common = true" in text]
    return tuple(sorted(found, key=lambda card: card.memory))


@functools.cache
def catalog() -> dict[str, Gpu]:
    """Every card by name."""
    return {name: _card(name) for name in _tables()}


_GIVEN = ("mem", "bw", "bf16", "fp16", "fp32")


def gpu(text: str) -> Gpu:
    """A card by catalog name, or by numbers as ``mem=24GB,bw=1TB/s,bf16=165T``. Raises
    UsageError.
    """
    name = text.lower().replace("_", "-").replace(" ", "-")
    for known in (name, f"rtx-{name}"):  # 4090 is what people say
        if known in _tables():
            return _card(known)
    if re.fullmatch(r"[0-9.]+gi?b", name):
        return gpu(f"mem={text}")
    if "=" not in text:
        found = recognise(text)
        if found is not None and not _SIZE.search(found.name):
            return found
        near = [one for one in _tables() if one.startswith(f"{name}-")]
        if near:
            raise UsageError(f"Unknown GPU {text!r}.", f"Did you mean {' or '.join(near[:4])}?")
        hint = "Or give its numbers: --gpu mem=24GB,bw=1TB/s,bf16=165T."
        raise unknown("GPU", text, _tables(), hint)
    given = {
        key.strip().lower(): value.strip()
        for part in text.split(",")
        for key, _, value in [part.partition("=")]
    }
    extra = given.keys() - set(_GIVEN)
    if extra or "mem" not in given or len(given) != text.count(",") + 1:
        raise UsageError(
            f"--gpu {text!r} is not understood.",
            "Give the memory as --gpu mem=24GB (or 22.5GiB), and for times bw=1TB/s,bf16=165T.",
        )
    rates = {key: _rate(key, given[key]) if key in given else None for key in _GIVEN[2:]}
    bandwidth = None
    if "bw" in given:
        rate = re.sub(r"/s$", "", given["bw"], flags=re.IGNORECASE)
        if re.search(r"[kKmMgGtT]b$", rate):
            raise UsageError(f"--gpu bw={given['bw']} is bits.", "Type bytes, such as bw=1TB/s.")
        bandwidth = float(parse_bytes(rate, "--gpu bw"))
    return Gpu(
        text,
        f"a card of {given['mem']}",
        parse_bytes(given["mem"], "--gpu mem"),
        bf16_flops=rates["bf16"],
        fp16_flops=rates["fp16"],
        fp32_flops=rates["fp32"],
        bandwidth=bandwidth,
    )


def _rate(key: str, text: str) -> float:
    """FLOP/s such as ``165T`` or ``1.3PFLOPS``; a bare number is refused: nobody means 165 FLOP/s.

    Raises UsageError.
    """
    match = re.fullmatch(r"([0-9.]+)\s*([gtp])(?:flop/?s?(?:/s)?)?", text.lower())
    try:
        value = float(match[1]) * {"g": 1e9, "t": 1e12, "p": 1e15}[match[2]] if match else 0.0
    except ValueError:
        value = 0.0
    if not 1e9 <= value < 1e18:
        raise UsageError(f"--gpu {key}={text} is no rate.", f"Type for example {key}=165T.")
    return value


def recognise(name: str, total: int | None = None) -> Gpu | None:
    """The catalog's card for a driver's device name, such as ``NVIDIA GeForce RTX 4090``.

    ``total`` bytes tell cards of one name apart, and a MIG instance or a vGPU from the whole card.
    None where no card has the name, or none of its size.
    """
    words = name.lower().replace("-", " ").replace("_", " ").split()
    kinds = _KINDS & set(words)
    found: list[tuple[int, Gpu]] = []
    for card in catalog().values():
        parts = [part for part in card.name.split("-") if not _SIZE.fullmatch(part)]
        sized = total is None or abs(total / card.memory - 1) < _SAME_SIZE
        if sized and all(part in words for part in parts) and kinds <= set(parts):
            found.append((len(parts), card))
    most = max((count for count, _ in found), default=0)
    best = [card for count, card in found if count == most]
    if total is not None:
        best.sort(key=lambda card: abs(total - card.memory))
    named = [card for card in best if card.name.split("-")[-1] in words]
    return next(iter(named or best), None)


def here(name: str, total: int, capability: float | None = None) -> Gpu:
    """The card of a driver's name and bytes: the catalog's, else one of these alone."""
    return recognise(name, total) or Gpu(name, name, total, capability)


# A card of another kind, and another speed, than the one whose name it begins with.
_KINDS = {"laptop", "max", "sff", "ti", "super", "mobile", "d", "v2"}
_SIZE = re.compile(r"[0-9]+gb")
_SAME_SIZE = 0.08  # what ECC and the driver keep back differs by a few per cent


def of(plan: Plan) -> Gpu:
    """The device a plan is estimated for: its card, an Ampere-class one, or this machine's CPU."""
    if plan.device == "cpu":
        name = calibration.this_cpu()
        return Gpu(name, name, 0)
    return gpu(plan.gpu) if plan.gpu else DEFAULT


DEFAULT = Gpu("", "an Ampere-class card", 0)
