from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from axolotl.common.architectures import MOE_ARCH_BLOCK


@pytest.mark.parametrize("model_type", MOE_ARCH_BLOCK)
def test_each_class_exists_in_transformers(model_type):
    spec = importlib.util.find_spec("transformers")
    source = Path(spec.origin).parent / "models" / model_type / f"modeling_{model_type}.py"
    classes = set(re.findall(r"^class (\w+)", source.read_text(encoding="utf-8"), re.MULTILINE))
    blocks = MOE_ARCH_BLOCK[model_type]
    assert set([blocks] if isinstance(blocks, str) else blocks) <= classes
