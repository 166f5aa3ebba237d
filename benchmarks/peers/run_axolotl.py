"""The existing axolotl on a benchmark's YAML: `python run_axolotl.py config.yml`, with the python of an environment that has it.

The YAML is the same but for what makes it fast there: the Liger plugin and its LoRA kernels. Keys that mean something else there
(`fp8`) are left out. Has not been run here: this project's environments have its own package of that name.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import yaml
from step_clock import installed_versions

LIGER = {
    "liger_rope": True,
    "liger_rms_norm": True,
    "liger_glu_activation": True,
    "liger_fused_linear_cross_entropy": True,
}
KERNELS = {"lora_mlp_kernel": True, "lora_qkv_kernel": True, "lora_o_kernel": True}


def translated(cfg: dict[str, Any]) -> dict[str, Any]:
    cfg = {key: value for key, value in cfg.items() if key not in ("fp8", "flash_attention", "torch_compile")}
    cfg["plugins"] = ["axolotl.integrations.liger.LigerPlugin", *cfg["plugins"]]
    cfg |= LIGER | (KERNELS if cfg.get("adapter") else {})
    cfg["flash_attention" if "flash-attn" in installed_versions() else "sdp_attention"] = True
    return cfg


def main() -> None:
    path = Path(sys.argv[1])
    changed = path.with_name(f"{path.stem}-translated.yml")
    changed.write_text(yaml.safe_dump(translated(yaml.safe_load(path.read_text())), sort_keys=False))
    os.execv(sys.executable, [sys.executable, "-m", "axolotl.cli.train", str(changed)])


if __name__ == "__main__":
    main()
