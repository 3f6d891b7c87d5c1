"""What models run on: a table of common cards, and this machine's own memory.

Bandwidth is the maker's figure, from the page named; it is the bus's width times the rate a pin, and no more than an
upper bound of what a program gets. That of this machine's RAM is measured: one pass over a tensor too large to cache.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from quantkit.errors import UsageError
from quantkit.later import Device, on_cpu, torch

GIB = 2**30
NVIDIA, GEFORCE = "https://www.nvidia.com/en-us/", "https://www.nvidia.com/en-us/geforce/graphics-cards/"


@dataclass(frozen=True)
class Card:
    """A card: its memory in GiB, its memory bandwidth in GB/s (1e9 bytes), and where the maker says so."""

    name: str
    gib: float
    gb_per_s: float
    source: str


CARDS = (
    Card("RTX 2080 Ti", 11, 616, GEFORCE + "compare/"),
    Card("RTX 3060", 12, 360, GEFORCE + "30-series/rtx-3060-3060ti/"),
    Card("RTX 3080", 10, 760, GEFORCE + "30-series/rtx-3080-3080ti/"),
    Card("RTX 3090", 24, 936, GEFORCE + "30-series/rtx-3090-3090ti/"),
    Card("RTX 4060", 8, 272, GEFORCE + "40-series/rtx-4060-4060ti/"),
    Card("RTX 4060 Ti 16GB", 16, 288, GEFORCE + "40-series/rtx-4060-4060ti/"),
    Card("RTX 4070", 12, 504, GEFORCE + "40-series/rtx-4070-family/"),
    Card("RTX 4080", 16, 717, GEFORCE + "40-series/rtx-4080-family/"),
    Card("RTX 4090", 24, 1008, GEFORCE + "40-series/rtx-4090/"),
    Card("RTX 5070 Ti", 16, 896, GEFORCE + "50-series/rtx-5070-family/"),
    Card("RTX 5080", 16, 960, GEFORCE + "50-series/rtx-5080/"),
    Card("RTX 5090", 32, 1792, GEFORCE + "50-series/rtx-5090/"),
    Card("RTX A6000", 48, 768, NVIDIA + "design-visualization/rtx-a6000/"),
    Card("RTX 6000 Ada", 48, 960, NVIDIA + "design-visualization/rtx-6000/"),
    Card("Tesla P40", 24, 346, NVIDIA + "data-center/tesla-p40/"),
    Card("T4", 16, 320, NVIDIA + "data-center/tesla-t4/"),
    Card("L4", 24, 300, NVIDIA + "data-center/l4/"),
    Card("L40S", 48, 864, NVIDIA + "data-center/l40s/"),
    Card("A100 40GB", 40, 1555, NVIDIA + "data-center/a100/"),
    Card("A100 80GB", 80, 2039, NVIDIA + "data-center/a100/"),
    Card("H100", 80, 3350, NVIDIA + "data-center/h100/"),
    Card("H200", 141, 4800, NVIDIA + "data-center/h200/"),
    Card("RX 7900 XTX", 24, 960, "https://www.amd.com/en/products/graphics/desktops/radeon/7000-series.html"),
    Card("MI300X", 192, 5300, "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html"),
)


@dataclass(frozen=True)
class Machine:
    """Memory to run in: bytes of VRAM (all cards together; None for no card) and RAM, and GB/s where they are known.

    `cards` are those whose speed is told: the one that is there, or all of the table with as much memory.
    """

    vram: int | None
    ram: int
    cards: tuple[Card, ...] = ()
    ram_gb_per_s: float | None = None


def parse_size(text: str, where: str) -> int:
    """`24GiB`, `24G` (1024-based, as memory is sold), `24GB` (1e9), 512MiB or 1TiB in bytes; UsageError otherwise."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([MGT])(iB|B)?", text.strip(), re.IGNORECASE | re.ASCII)
    if not match:
        raise UsageError(f"{text!r} is no size such as 24GiB", where=where, hint="give GiB, or GB for 1e9 bytes")
    number, unit, kind = float(match[1]), match[2].upper(), (match[3] or "iB").lower()
    base = 1000 if kind == "b" else 1024
    return int(number * base ** {"M": 2, "G": 3, "T": 4}[unit])


def find_card(name: str) -> Card | None:
    """The card of the table that is called `name`, or whose name is in it: the longest, so 4060 Ti is not 4060."""
    plain = name.lower().replace("nvidia", "").replace("geforce", "")
    found = [c for c in CARDS if c.name.lower() in plain]
    return max(found, key=lambda c: len(c.name)) if found else None


def machine(vram: str | None, ram: str | None) -> Machine:
    """The machine that is asked about; what is not given is this machine's own. `vram` is a size or a card's name."""
    if vram is None:
        return this_machine() if ram is None else Machine(None, parse_size(ram, "--ram"))
    own = parse_size(ram, "--ram") if ram else ram_bytes()
    if card := find_card(vram):
        return Machine(int(card.gib * GIB), own, (card,))
    size = parse_size(vram, "--vram")
    return Machine(size, own, tuple(c for c in CARDS if round(c.gib) == round(size / GIB)))


def this_machine() -> Machine:
    """This machine's cards and RAM; the bandwidth of its RAM is measured."""
    if not torch.cuda.is_available():
        return Machine(None, ram_bytes(), (), ram_bandwidth())
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    card = find_card(properties[0].name)
    vram = sum(p.total_memory for p in properties)
    return Machine(vram, ram_bytes(), (card,) if card else (), ram_bandwidth())


def multiplies_bf16(device: Device) -> bool:
    """Whether products of bf16 numbers are instructions of the device: they take half of float32's time or less."""
    if not on_cpu(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return has_tiles() or bool(torch.cpu.get_capabilities().get("avx512_bf16"))


@functools.cache
def has_tiles() -> bool:
    """Whether the CPU multiplies bf16 by AMX, tile by tile: in a fifth of float32's time or less."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def multiply_at_full_width() -> None:
    """Have oneDNN make torch's float32 products where MKL uses half of a CPU's registers: for the whole process.

    That is on AMD's with AVX-512, where MKL keeps to AVX2: on Zen 5 it takes twice the time. Torch hands such products
    over where their factors may be rounded to bf16, which oneDNN does by AMX alone (Intel's). One is tried, and had it
    been rounded, all would stay as it was.
    """
    can, onednn = torch.cpu.get_capabilities(), cast(Any, torch.backends.mkldnn)  # typed without its `matmul`
    if not can.get("avx512_f") or "AMD" not in can.get("cpu_name", ""):
        return
    before, onednn.matmul.fp32_precision = onednn.matmul.fp32_precision, "bf16"
    fine = torch.full((64, 64), 1 + 2**-20)
    if not torch.equal(fine @ torch.eye(64), fine):
        onednn.matmul.fp32_precision = before


def may_have_card() -> bool:
    """False where Linux shows the driver of no card; elsewhere it is torch that knows."""
    return sys.platform != "linux" or any(Path("/dev", name).exists() for name in ("nvidiactl", "kfd", "dxg"))


def keep_freed_memory() -> None:
    """Have freed memory kept for what comes next, and not given back to the system: glibc only, for the whole process.

    A block's activations are freed and made anew all the time, and in a virtual machine a page that is new to a
    process costs as much as several thousand multiplications (mallopt(3): M_MMAP_THRESHOLD, M_TRIM_THRESHOLD).
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, most in ((-3, 32 << 20), (-1, 2**31 - 1)):
            libc.mallopt(option, most)


def ram_bytes() -> int:
    """This machine's RAM."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def ram_bandwidth() -> float:
    """GB/s of reading RAM with all cores: the best of eight passes over 512 MiB."""
    numbers = torch.ones(1 << 27)
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        numbers.sum()
        best = max(best, numbers.nbytes / (time.perf_counter() - start) / 1e9)
    return best
