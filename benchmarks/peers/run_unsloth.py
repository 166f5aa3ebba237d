"""unsloth on the workload of a benchmark's YAML: `python run_unsloth.py config.yml`. Written from its documentation; needs CUDA.

Has not been run as it stands: unsloth was not installed on any machine of this project's tests.
"""

from __future__ import annotations

# isort: off
from unsloth import FastLanguageModel  # before what it patches
from sft import read_config, train
# isort: on

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    cfg = read_config()
    checkpointing = "unsloth" if cfg.get("gradient_checkpointing") else False
    model, _ = FastLanguageModel.from_pretrained(
        model_name=cfg["base_model"],
        max_seq_length=cfg["sequence_len"],
        dtype=None,
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
    train(model, cfg, gradient_checkpointing=bool(checkpointing))


if __name__ == "__main__":
    main()
