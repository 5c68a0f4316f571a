"""The catalog of cards, for people."""

from __future__ import annotations

from collections.abc import Sequence

from effprof.gpus import Gpu
from effprof.report.terminal import console, table
from effprof.units import gib, quantity


def show_gpus(cards: Sequence[Gpu]) -> None:
    """One line per card, smallest memory first."""
    out = console()
    rows = table("name", "memory", "bf16", "fp16", "fp32", "bandwidth", "link", "power", "arch")
    for card in sorted(cards, key=lambda one: (one.memory, one.name)):
        rows.add_row(
            card.name,
            gib(card.memory, 1),
            *(_tera(rate) for rate in (card.bf16_flops, card.fp16_flops, card.fp32_flops)),
            _rate(card.bandwidth),
            _rate(card.link or card.pcie),
            "" if card.power is None else f"{card.power:.0f} W",
            "AMD" if card.vendor == "AMD" else f"{card.capability}",
        )
    out.print(rows)
    out.print(
        "Peaks are dense, with fp32 accumulation, in TFLOP/s; the link is NVLink's (both ways) or "
        "PCIe's (one way).",
        style="dim",
    )
    out.print("Next: effprof gpus NAME for a card's source; --gpu NAME asks about one.")


def show_gpu(card: Gpu) -> None:
    """Everything known of one card."""
    out = console()
    out.print(card.title, style="bold")
    lines = {
        "memory": gib(card.memory)
        + (" (nominal)" if card.nominal else ", as the driver says" if card.source else ""),
        "shared": "with the system: less of it is free" if card.unified else "",
        "bandwidth": _rate(card.bandwidth),
        "bf16": _peak(card.bf16_flops),
        "fp16": _peak(card.fp16_flops),
        "tf32": _peak(card.tf32_flops),
        "fp32": _peak(card.fp32_flops),
        "link": "" if card.link is None else f"{_rate(card.link)}, all links, both ways",
        "pcie": "" if card.pcie is None else f"{_rate(card.pcie)}, one way",
        "power": "" if card.power is None else f"{card.power:.0f} W",
        "compute": "" if card.capability is None else f"capability {card.capability}",
        "context": gib(card.context),
        "measured": str(card.calibration) if card.calibration else "not here",
        "source": card.source,
    }
    for name, text in lines.items():
        if text:
            out.print(f"{name:<11}{text}", soft_wrap=True)


def _tera(rate: float | None) -> str:
    return "" if rate is None else f"{rate / 1e12:.4g}"


def _peak(rate: float | None) -> str:
    return "" if rate is None else quantity(rate, "FLOP/s")


def _rate(value: float | None) -> str:
    return "" if value is None else quantity(value, "B/s")
