"""The reference page and the flags of the command line are those of the schema."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from axolotl.utils.schemas.config import AxolotlInputConfig

ROOT = Path(__file__).resolve().parents[2]


def test_generated_files_are_current():
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "config_reference.py"), "--check"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_key_is_described_on_the_page_and_is_a_flag():
    page = (ROOT / "docs" / "config-reference.md").read_text("utf-8")
    flags = {row["flag"] for row in json.loads((ROOT / "src/axolotl/cli/config_options.json").read_text("utf-8"))}
    for name in AxolotlInputConfig.model_fields:
        assert f"| `{name}` |" in page
        assert f"--{name.replace('_', '-')}" in flags
    assert {"--trl.beta", "--special-tokens.pad-token", "--model-type", "--liger-rope", "--diffusion.eps"} <= flags


def test_only_plain_switches_are_switches():
    rows = {row["flag"]: row for row in json.loads((ROOT / "src/axolotl/cli/config_options.json").read_text("utf-8"))}
    assert rows["--sample-packing"]["is_bool"]
    assert not rows["--bf16"]["is_bool"]
    assert rows["--plugins"]["multiple"]
    assert not rows["--micro-batch-size"]["multiple"]
