"""Implements the ReLoRA training procedure from https://arxiv.org/abs/2307.05695, minus the initial full fine-tune.

Every `jagged_restart_steps` the adapter is merged into the base model, its matrices start anew, and most of what the optimizer
remembers of them is dropped. The sum of many low-rank updates has a high rank.

The base model is merged in its files, in the precision they are stored in, shard by shard on the CPU: `output_dir/relora` is
the base model as of the last restart, a whole model that loads by itself. The weights in memory are read back from there, and
rounded again if the run trains on 4 or 8 bits, so that rounding does not add up. Checkpoints hold links to these files.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import TrainerCallback

from axolotl.loaders.adapter_init import ADAPTER, PEFT_PREFIX
from axolotl.loaders.quantization import requantize_
from axolotl.loaders.utils import read_seed
from axolotl.monkeypatch.relora_optimizer import PRUNE_RATIOS, prune_optimizer_state
from axolotl.utils.dict import DictDefault
from axolotl.utils.distributed import barrier, is_main_process
from axolotl.utils.logging import get_logger
from axolotl.utils.merge import merge_adapter
from axolotl.utils.merge.base import BaseWeights

LOG = get_logger(__name__)

RELORA = "relora"


class ReLoRACallback(TrainerCallback):
    """Callback to merge LoRA weights into the base model and save full-weight checkpoints.

    Args:
        cfg: `jagged_restart_steps`, `relora_prune_method`, `relora_prune_ratio`, `base_model`, `output_dir` and `seed` are read.

    Attributes:
        num_restarts: restarts so far.
    """

    def __init__(self, cfg: DictDefault):
        self.every = int(cfg.jagged_restart_steps)
        self.prune_method = str(cfg.relora_prune_method or "magnitude")
        ratio = cfg.relora_prune_ratio
        self.prune_ratio = PRUNE_RATIOS[self.prune_method] if ratio is None else float(ratio)
        self.seed = read_seed(cfg)
        self.base = str(cfg.base_model)
        self.revision = cfg.revision_of_model
        self.trust_remote_code = bool(cfg.trust_remote_code)
        self.merged = Path(cfg.output_dir) / RELORA
        self.num_restarts = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # The restart that is due at a checkpoint's step comes after the checkpoint is written.
        self.num_restarts = max(0, state.global_step - 1) // self.every
        if self.num_restarts == 0 and is_main_process():
            shutil.rmtree(self.merged, ignore_errors=True)  # of an earlier run
        barrier()

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step == 0 or state.global_step % self.every:
            return
        self._merge(model)
        read_base(model, self.merged)
        self.num_restarts += 1
        model.peft_config[ADAPTER].base_model_name_or_path = str(self.merged.resolve())
        parameters = restart_adapter(model, seed=self.seed + self.num_restarts)
        prune_optimizer_state(
            optimizer, parameters, self.prune_method, self.prune_ratio, seed=self.seed + self.num_restarts
        )
        LOG.info(f"ReLoRA restart {self.num_restarts} at step {state.global_step}: merged into {self.merged}.")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        for entry in (logs, state.log_history[-1] if state.log_history else None):
            if entry is not None and "loss" in entry:
                entry["num_lora_restarts"] = self.num_restarts

    def _merge(self, model: PeftModel) -> None:
        """Base model of the last restart + adapter -> `self.merged`."""
        source, revision = (self.merged, None) if self.num_restarts else (self.base, self.revision)
        following = self.merged.with_name(f"{RELORA}.next")
        if is_main_process():
            with tempfile.TemporaryDirectory(dir=self.merged.parent, prefix=".relora-adapter-") as folder:
                model.save_pretrained(folder)
                merge_adapter(
                    source,
                    folder,
                    following,
                    dequantize=True,
                    prove=False,
                    revision=revision,
                    trust_remote_code=self.trust_remote_code,
                )
            shutil.rmtree(self.merged, ignore_errors=True)  # checkpoints have names of their own for the files
            os.replace(following, self.merged)
        barrier()

    # --- checkpoints: called by the trainer when it writes or reads one -----------------------------------------------

    def save_to_checkpoint(self, folder: Path, final: Path) -> None:
        """Put the base model into a checkpoint, and its place into the adapter's config.

        Args:
            folder: where the checkpoint is written.
            final: where it will lie.
        """
        if not self.num_restarts:
            return
        shutil.copytree(self.merged, folder / RELORA, copy_function=_link, dirs_exist_ok=True)
        point_to_base(folder, final / RELORA)

    def load_from_checkpoint(self, folder: Path, model: Any) -> None:
        """Take the base model of a checkpoint."""
        if is_main_process():
            shutil.rmtree(self.merged, ignore_errors=True)
            if (folder / RELORA).is_dir():
                shutil.copytree(folder / RELORA, self.merged, copy_function=_link)
        barrier()
        if self.merged.is_dir():
            read_base(model, self.merged)
            model.peft_config[ADAPTER].base_model_name_or_path = str(self.merged.resolve())


def _link(source: str, target: str) -> None:
    """A second name for a file that is never changed in place; a copy on file systems without."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def point_to_base(adapter: Path, base: Path) -> None:
    """Write into an adapter's config which base model it belongs to."""
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = str(base.resolve())
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


@torch.no_grad()
def read_base(model: PeftModel, folder: Path) -> None:
    """Set the weights under LoRA to those of a model folder."""
    plain: Any = model.get_base_model()
    weights = BaseWeights(folder, type(plain), plain.config)
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or isinstance(module, ParamWrapper):
            continue
        base = module.get_base_layer()
        requantize_(base, weights.read(f"{name.removeprefix(PEFT_PREFIX)}.weight"))
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            path = name.removeprefix(PEFT_PREFIX).replace(".base_layer", "")
            parameter = module.get_base_layer().get_parameter(module.parameter_name)
            parameter.copy_(weights.read(f"{path}.{module.parameter_name}"))
    weights.store.close()


@torch.no_grad()
def restart_adapter(model: PeftModel, *, seed: int) -> list[nn.Parameter]:
    """Start the LoRA matrices anew, in place: A at random, the same on every rank, B at zero.

    Returns:
        The parameters that were started.
    """
    started: list[Any] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in model.modules():
            if not isinstance(module, LoraLayer):
                continue
            # peft fills the matrices in place for every start but those that change the base.
            module.reset_lora_parameters(ADAPTER, True)
            if ADAPTER in module.lora_A:
                started += [module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight]
            if ADAPTER in module.lora_embedding_A:
                started += [module.lora_embedding_A[ADAPTER], module.lora_embedding_B[ADAPTER]]
            if ADAPTER in module.lora_magnitude_vector:
                started.append(_restart_magnitude(module))
    return started


def _restart_magnitude(module: Any) -> nn.Parameter:
    """DoRA: the norms of the merged weight, in the parameter that the optimizer knows."""
    parameter = module.lora_magnitude_vector[ADAPTER].weight
    module.lora_variant[ADAPTER].init(module, ADAPTER)
    layer = module.lora_magnitude_vector[ADAPTER]
    parameter.copy_(layer.weight)
    layer.weight = parameter
    return parameter
