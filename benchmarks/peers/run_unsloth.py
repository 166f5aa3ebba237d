"""unsloth on the workload of a benchmark's YAML: `python run_unsloth.py config.yml`.

LoRA, QLoRA and all weights have run with unsloth 2026.10.9 on a CPU, where it has other code and cannot pack. Of its code for GPUs,
the trainer has made its batches here, full and packed; loading a model, its kernels and training on a GPU have not been tried.
"""

from __future__ import annotations

# isort: off
from unsloth import FastLanguageModel  # before what it patches
import torch
from sft import read_config, train
# isort: on

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    cfg = read_config()
    checkpointing = "unsloth" if cfg.get("gradient_checkpointing") else False
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=cfg["base_model"],
        max_seq_length=cfg["sequence_len"],
        dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
        load_in_4bit=bool(cfg.get("load_in_4bit")),
        full_finetuning=not cfg.get("adapter"),
        use_gradient_checkpointing=checkpointing,
    )
    if cfg.get("adapter"):
        model = FastLanguageModel.get_peft_model(
            model,
            r=cfg["lora_r"],
            lora_alpha=cfg["lora_alpha"],
            lora_dropout=0,
            bias="none",
            target_modules=PROJECTIONS,
            use_gradient_checkpointing=checkpointing,
            random_state=cfg["seed"],
        )
    train(model, tokenizer, cfg, gradient_checkpointing=bool(checkpointing))


if __name__ == "__main__":
    main()
