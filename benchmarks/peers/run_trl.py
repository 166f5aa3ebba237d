"""TRL on the workload of a benchmark's YAML: `python run_trl.py config.yml`.

Liger's kernels and flash-attn are used where they are installed. Documents of packed rows do not see each other, without flash-attn
either (TRL 1.16). LoRA, QLoRA, all weights and packed rows have run on a CPU; flash-attn and Liger have not been tried.
"""

from __future__ import annotations

import torch
from peft import LoraConfig
from sft import read_config, train
from step_clock import installed_versions
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def main() -> None:
    cfg = read_config()
    has_gpu = torch.cuda.is_available()
    keys = {}
    if cfg.get("load_in_4bit"):
        keys["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if has_gpu else torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(
        cfg["base_model"],
        dtype="auto",
        device_map={"": 0} if has_gpu else None,
        attn_implementation="flash_attention_2" if "flash-attn" in installed_versions() else "sdpa",
        **keys,
    )
    lora = None
    if cfg.get("adapter"):
        lora = LoraConfig(
            r=cfg["lora_r"], lora_alpha=cfg["lora_alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
        )
    train(
        model,
        AutoTokenizer.from_pretrained(cfg["base_model"]),
        cfg,
        peft_config=lora,
        gradient_checkpointing=bool(cfg.get("gradient_checkpointing")),
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_liger_kernel=has_gpu and "liger-kernel" in installed_versions(),
    )


if __name__ == "__main__":
    main()
