"""The catalog: plausible everywhere, found by name, by a driver's name, or given by numbers."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from helpers import run_cli

from effprof import gpus
from effprof.architectures import PRESETS
from effprof.errors import UsageError

GIB = 2**30
TABLE = tomllib.loads((PRESETS / "gpus.toml").read_text(encoding="utf-8"))

# What drivers call cards -> the catalog's name.
NAMES = {
    "NVIDIA GeForce RTX 4090": "rtx-4090",
    "NVIDIA GeForce RTX 4090 D": "rtx-4090-d",
    "NVIDIA GeForce RTX 4090 Laptop GPU": "rtx-4090-laptop",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100 80GB PCIe": "a100-pcie-80gb",
    "NVIDIA A100-PCIE-40GB": "a100-pcie-40gb",
    "NVIDIA A800-SXM4-80GB": "a800-80gb",
    "NVIDIA H100 80GB HBM3": "h100-80gb",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H800": "h800",
    "NVIDIA H800 PCIe": "h800-pcie",
    "NVIDIA H20": "h20",
    "NVIDIA H200": "h200",
    "NVIDIA H200 NVL": "h200-nvl",
    "NVIDIA GH200 480GB": "gh200",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
    "NVIDIA B300 SXM6 AC": "b300",
    "NVIDIA GB300": "gb300",
    "Tesla V100-SXM2-16GB": "v100-16gb",
    "Tesla V100-PCIE-32GB": "v100-pcie-32gb",
    "Tesla V100-SXM2-32GB": "v100-32gb",
    "Tesla P100-PCIE-16GB": "p100-pcie",
    "Tesla P100-SXM2-16GB": "p100-sxm2",
    "Tesla P40": "p40",
    "Tesla T4": "t4",
    "NVIDIA A2": "a2",
    "NVIDIA A10": "a10",
    "NVIDIA A10G": "a10g",
    "NVIDIA A16": "a16",
    "NVIDIA A30": "a30",
    "NVIDIA A40": "a40",
    "NVIDIA L4": "l4",
    "NVIDIA L20": "l20",
    "NVIDIA L40": "l40",
    "NVIDIA L40S": "l40s",
    "NVIDIA RTX A6000": "rtx-a6000",
    "NVIDIA RTX 6000 Ada Generation": "rtx-6000-ada",
    "Quadro RTX 6000": "quadro-rtx-6000",
    "NVIDIA TITAN RTX": "titan-rtx",
    "NVIDIA TITAN V": "titan-v",
    "NVIDIA RTX A2000 12GB": "rtx-a2000-12gb",
    "NVIDIA GeForce RTX 4070 Ti SUPER": "rtx-4070-ti-super",
    "NVIDIA GeForce RTX 4070 SUPER": "rtx-4070-super",
    "NVIDIA GeForce RTX 3060": "rtx-3060",
    "NVIDIA GeForce RTX 3060 Laptop GPU": "rtx-3060-laptop",
    "NVIDIA GeForce RTX 3080 Ti Laptop GPU": "rtx-3080-ti-laptop",
    "NVIDIA GeForce RTX 4060 Ti": "rtx-4060-ti",
    "NVIDIA GeForce RTX 5060 Ti": "rtx-5060-ti",
    "NVIDIA GeForce RTX 5090 D": "rtx-5090-d",
    "NVIDIA GeForce RTX 5090 D v2": "rtx-5090-d-v2",
    "NVIDIA GeForce RTX 5090 Laptop GPU": "rtx-5090-laptop",
    "NVIDIA GeForce RTX 5070 Ti Laptop GPU": "rtx-5070-ti-laptop",
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": "rtx-pro-6000",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "rtx-pro-6000-server",
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": "rtx-pro-6000-max-q",
    "NVIDIA RTX PRO 5000 Blackwell": "rtx-pro-5000",
    "NVIDIA GeForce GTX 1080 Ti": "gtx-1080-ti",
    "NVIDIA GB10": "gb10",
    "AMD Instinct MI300X": "mi300x",
    "AMD Instinct MI250X": "mi250x",
    "AMD Radeon RX 7900 XTX": "7900-xtx",
    "AMD Radeon RX 9070 XT": "9070-xt",
    "AMD Radeon PRO W7900": "w7900",
    "AMD Radeon 8060S Graphics": "8060s",
    "AMD Radeon AI PRO R9700": "r9700",
}
# Cards that are not in the catalog, though one with a shorter name is: another speed.
OTHERS = (
    "NVIDIA GeForce RTX 5060 Laptop GPU",
    "NVIDIA GeForce RTX 3070 Ti Laptop GPU",
    "NVIDIA GeForce GTX 1070 Ti",
    "NVIDIA GeForce RTX 2070 with Max-Q Design",
    "NVIDIA RTX 4000 SFF Ada Generation",
    "AMD Radeon Graphics",
    "Tesla K80",
    "",
)


def test_the_catalog_is_whole() -> None:
    cards = gpus.catalog()
    assert len(cards) == len(TABLE) >= 60
    for name, card in cards.items():
        row = TABLE[name]
        assert name == card.name == name.lower()
        assert card.memory == row["memory_mib"] * 2**20
        assert 2 * GIB < card.memory < 320 * GIB
        assert card.source
        assert card.vendor in ("NVIDIA", "AMD")
        assert (card.capability is None) == (card.vendor == "AMD")
        assert card.bandwidth is not None
        assert 1e11 < card.bandwidth < 1e13
        for rate in (card.bf16_flops, card.fp16_flops, card.fp32_flops):
            assert rate is None or 3e12 < rate < 3e15
        if card.bf16_flops and card.vendor == "NVIDIA":
            assert card.fp16_flops == card.bf16_flops
        if card.capability and card.capability < 8:
            assert card.bf16_flops is None  # no bf16 tensor cores before Ampere
        assert card.power is None or 15 <= card.power <= 1500


def test_the_usual_ones_are_there() -> None:
    for name in (
        "gtx-1080-ti",
        "rtx-3060",
        "rtx-4090",
        "t4",
        "v100-16gb",
        "a100-40gb",
        "h100-80gb",
    ):
        assert name in gpus.catalog()
    for name in (
        "h200",
        "b200",
        "b300",
        "mi300x",
        "mi325x",
        "rtx-4090-laptop",
        "l40s",
        "h100-80gb",
    ):
        assert name in gpus.catalog()
    assert [card.name for card in gpus.common()] == sorted(
        (name for name, row in TABLE.items() if row.get("common")),
        key=lambda name: TABLE[name]["memory_mib"],
    )


@pytest.mark.parametrize("text", NAMES)
def test_a_drivers_name_is_recognised(text: str) -> None:
    wanted = NAMES[text]
    card = gpus.recognise(text, gpus.catalog()[wanted].memory)
    assert card is not None
    assert card.name == wanted


@pytest.mark.parametrize("text", OTHERS)
def test_an_unknown_card_is_not_taken_for_another(text: str) -> None:
    assert gpus.recognise(text) is None


def test_a_slice_is_not_the_card() -> None:
    assert gpus.recognise("NVIDIA A100-SXM4-80GB MIG 1g.10gb", 10 * GIB) is None


def test_given_by_numbers() -> None:
    card = gpus.gpu("mem=24GB,bw=1TB/s,bf16=165T")
    assert (card.memory, card.bandwidth, card.bf16_flops) == (24 * 10**9, 1e12, 165e12)
    assert gpus.gpu("mem=24GiB").bandwidth is None
    assert gpus.gpu("RTX 4090").name == gpus.gpu("rtx_4090").name == "rtx-4090"
    assert gpus.gpu("MEM=24GB,BW=1000GB/S,bf16=0.165pflops") == gpus.gpu(
        "MEM=24GB,BW=1000GB/S,bf16=0.165pflops"
    )
    assert gpus.gpu("mem=24GB,bf16=165TFLOP/s").bf16_flops == 165e12
    assert gpus.gpu("NVIDIA GeForce RTX 4090").name == "rtx-4090"
    with pytest.raises(UsageError) as caught:
        gpus.gpu("a100")
    assert "a100-80gb" in caught.value.hint
    bad = ("mem=24GB,bf16=165", "bw=1TB/s", "mem=24GB,cores=9", "mem=24GB,mem=12GB", "mem=")
    bad += ("mem=24GB,bw=1Tb/s", "mem=24GB,bw=0.0001kB/s", "mem=0.0001kB", "mem=24GB,bf16=1e400T")
    for text in bad:
        with pytest.raises(UsageError):
            gpus.gpu(text)


def test_command() -> None:
    code, out, _ = run_cli("gpus")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 100
    assert len(out.splitlines()) >= len(TABLE)
    found = json.loads(run_cli("gpus", "rtx-4090", "--json")[1])["gpus"]
    assert found[0]["bf16_flops"] == 165.2e12
    assert "whitepaper" in run_cli("gpus", "rtx-4090")[1]
    code, _, err = run_cli("gpus", "rtx-4099")
    assert code == 2
    assert "rtx-4090" in err


def test_the_file_is_small_enough_to_scan() -> None:
    assert Path(PRESETS / "gpus.toml").stat().st_size < 100_000


@pytest.mark.parametrize(
    ("said", "name"), [("4090", "rtx-4090"), ("A6000", "rtx-a6000"), ("24GB", "mem=24GB")]
)
def test_a_card_as_people_say_it(said: str, name: str) -> None:
    assert gpus.gpu(said).name == name
