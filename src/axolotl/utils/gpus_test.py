from __future__ import annotations

import pytest

from axolotl.exceptions import ConfigError
from axolotl.utils.gpus import ARCHITECTURES, GPUS, capabilities_of, find_gpu


def test_every_card_has_one_architecture():
    listed = [name for names in ARCHITECTURES.values() for name in names]
    assert sorted(listed) == sorted(GPUS)
    assert capabilities_of("NVIDIA GeForce RTX 4090")["compute_capability"] == "sm_89"
    assert (capabilities_of("T4")["bf16"], capabilities_of("a100")["bf16"], capabilities_of("a100")["fp8"]) == (
        False, True, False
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("H100", "h100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("rtx_pro_6000", "rtx-pro-6000"),
        ("A100 80GB", "a100-80gb"),
    ],
)
def test_names_as_people_write_them(name, key):
    assert find_gpu(name) == key


def test_an_unknown_card():
    with pytest.raises(ConfigError, match=r"h999.*--memory 24GiB"):
        find_gpu("h999")
