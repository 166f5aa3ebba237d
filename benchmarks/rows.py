"""The workloads that are compared: what each one trains, the best measured peer, and what is to be reached.

Peers were measured on one NVIDIA H200 with the same shapes, rows and batches: axolotl 0.19 with Liger and its LoRA kernels, and
unsloth 2026.10.9. Rates are tokens per second, memory is GiB.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

LORA = {"adapter": "lora", "lora_r": 16, "lora_alpha": 32, "lora_target_linear": True, "learning_rate": 1e-3}
QLORA = {**LORA, "adapter": "qlora", "load_in_4bit": True}
FULL = {"learning_rate": 1e-4}
CHECKPOINTING = {"gradient_checkpointing": True}


TARGETS = ("peer", "peer_rate", "peer_gib", "reach", "reach_gib", "aim", "longest", "first_step_seconds")


@dataclass(frozen=True)
class Row:
    """One workload.

    Attributes:
        shape: a key of `common.SHAPES`.
        keys: YAML keys beside those of the batch.
        packed: whether short documents are packed to `sequence_len`; else every row is as long.
        lengths: lengths to try in turn until one does not fit, in place of `sequence_len`.
        steps: optimizer steps; the median of steps 4 to 12 counts.
        peer: the best of the others, its rate and peak.
        reach, aim: rates to reach at no more than `reach_gib`, and then.
        longest: lengths to reach, where there are `lengths`.
        first_step_seconds: by when the first step is to be over, with and without compiled code to find.
    """

    shape: str
    keys: dict[str, Any]
    packed: bool = False
    sequence_len: int = 4096
    micro_batch_size: int = 2
    accumulation: int = 4
    lengths: tuple[int, ...] = ()
    steps: int = 20
    peer: str | None = None
    peer_rate: float | None = None
    peer_gib: float | None = None
    reach: float | None = None
    reach_gib: float | None = None
    aim: float | None = None
    longest: dict[str, int] | None = None
    first_step_seconds: dict[str, int] | None = None

    def split(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is trained, and what it is held against."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        targets = {name: values.pop(name) for name in TARGETS if name in values}
        return values, targets


PACKED = {"packed": True, "sequence_len": 8192, "micro_batch_size": 1}
AXOLOTL, UNSLOTH = "axolotl 0.19 + Liger", "unsloth 2026.10.9"

ROWS: dict[str, Row] = {
    "lora-8b": Row(
        "8b", LORA, peer=UNSLOTH, peer_rate=15009, peer_gib=45.8, reach=17500, reach_gib=43, aim=19000,
        first_step_seconds={"cold": 120, "warm": 60},
    ),
    "lora-8b-fp8": Row("8b", {**LORA, "fp8": True}, reach=21000, aim=25000),
    "lora-8b-checkpointing": Row(
        "8b", {**LORA, **CHECKPOINTING}, peer=AXOLOTL, peer_rate=9981, peer_gib=18.8, reach=12500, reach_gib=18
    ),
    "qlora-8b": Row("8b", QLORA, peer=AXOLOTL, peer_rate=13335, peer_gib=33.6, reach=16500, reach_gib=33),
    "qlora-8b-checkpointing": Row(
        "8b", {**QLORA, **CHECKPOINTING}, peer=UNSLOTH, peer_rate=10422, peer_gib=8.1, reach=12000, reach_gib=8
    ),
    "lora-8b-packed": Row(
        "8b", LORA, **PACKED, peer=AXOLOTL, peer_rate=14986, peer_gib=46.1, reach=18500, reach_gib=44, aim=20000
    ),
    "lora-1b": Row("1b", LORA, peer=AXOLOTL, peer_rate=60347, peer_gib=10.0, reach=85000, aim=110000),
    "lora-1b-packed": Row("1b", LORA, **PACKED, peer=AXOLOTL, peer_rate=62197, peer_gib=10.8, reach=90000, aim=110000),
    "full-1b": Row(
        "1b", FULL, micro_batch_size=4, accumulation=2,
        peer=AXOLOTL, peer_rate=54129, peer_gib=37.3, reach=68000, reach_gib=36, aim=75000,
    ),
    "full-8b": Row(
        "8b", {**FULL, **CHECKPOINTING, "learning_rate": 2e-5, "bf16": "full", "optimizer": "adamw_bnb_8bit"},
        sequence_len=8192, micro_batch_size=1, reach=8000, aim=9000,
    ),
    # The compiler is on by itself only in runs of 20 steps and more, and 200 documents would not fill such a row.
    "longest-row": Row(
        "8b",
        {**LORA, **CHECKPOINTING, "activation_offloading": True, "torch_compile": True, "sample_packing_bin_size": 8192},
        packed=True, micro_batch_size=1, accumulation=1, steps=6, lengths=(65536, 131072, 262144, 393216, 524288),
        longest={"reach": 262144, "aim": 524288},
    ),
}  # fmt: skip


def described() -> Iterator[str]:
    """The table as lines of text."""
    line = "{:24}{:10}{:>10}{:>8}{:>12}{:>8}{:>10}  {}"
    yield line.format("row", "batch", "best peer", "GiB", "reach tok/s", "GiB", "aim", "peer")
    for name, row in ROWS.items():
        batch = f"{row.accumulation}x{row.micro_batch_size}x{row.lengths[0] if row.lengths else row.sequence_len}"
        numbers = (row.peer_rate, row.peer_gib, row.reach, row.reach_gib, row.aim)
        rate, gib, reach, reach_gib, aim = ("-" if number is None else f"{number:,g}" for number in numbers)
        if row.longest:
            reach, aim = (f"{row.longest[key] // 1024}k long" for key in ("reach", "aim"))
        yield line.format(name, batch, rate, gib, reach, reach_gib, aim, row.peer or "-")
