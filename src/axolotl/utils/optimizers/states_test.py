"""Forecast bytes of optimizer states against those that the real optimizers keep after two steps on a tiny model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.core.training_args import AxolotlTrainingArguments
from axolotl.exceptions import ConfigError, MissingExtraError
from axolotl.utils.dict import DictDefault
from axolotl.utils.forecast_states import STATES, Weight, state_bytes
from axolotl.utils.optimizers.states import read_state_options, trained_weights
from axolotl.utils.optimizers.table import OPTIMIZERS, RENAMED, read_any_name, read_optimizer, read_optimizer_args
from axolotl.utils.schemas.enums import OPTIMIZERS as ACCEPTED

SHAPE = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
Q_GALORE = {
    "qgalore_rank": 16, "qgalore_proj_bits": 4, "qgalore_proj_group_size": 256, "qgalore_cos_threshold": 0.4,
    "qgalore_update_proj_gap": 1,
}  # fmt: skip
UNCOMPRESSED = {"quantize": False, "master_weight_bits": None}  # what flash optimizers are on a CPU

# Name -> keys beside the optimizer, where its own would not show all that it keeps.
KEYS: dict[str, dict[str, Any]] = {
    "q_galore_adamw8bit": Q_GALORE,
    **{name: {"optim_args": {"rank": 16}} for name in OPTIMIZERS if name.startswith(("galore", "apollo"))},
}
# The same with options that change what is kept.
CHANGED: list[tuple[str, dict[str, Any]]] = [
    ("adamw_torch", {"optim_args": "amsgrad=true"}),
    ("sgd", {"optim_args": {"momentum": 0.9}}),
    ("rmsprop", {"optim_args": {"momentum": 0.9, "centered": True}}),
    ("adafactor", {"optim_args": {"beta1": 0.9}}),
    ("adamw_bnb_8bit", {"optim_args": {"min_8bit_size": 20_000}}),
    ("stable_adamw", {"optim_args": {"kahan_sum": False}}),
    ("adamw_anyprecision", {"optim_args": {"use_kahan_summation": True, "momentum_dtype": "bfloat16"}}),
    ("flash_sgd", {"optim_args": {"momentum": 0.9}}),
    ("dion", {"dion_rank_fraction": 0.25, "dion_rank_multiple_of": 24}),
    *(("galore_adamw", {"optim_args": {"rank": 16, "proj_type": side}}) for side in ("reverse_std", "left", "right")),
    ("galore_adamw", {"optim_args": {"rank": 1000}}),
    ("galore_adamw", {"optim_args": {"rank": 16}, "optim_target_modules": ["mlp"]}),
    ("apollo_adamw", {"optim_args": {"rank": 16, "proj": "svd"}}),
    ("apollo_adamw", {"optim_args": {"rank": 16, "proj_type": "reverse_std", "scale_type": "tensor"}}),
    ("apollo_adamw", {"optim_args": {"rank": 16}, "optim_target_modules": ["self_attn"]}),
]  # fmt: skip


def kept_bytes(optimizer: Any, model: torch.nn.Module) -> int:
    """Bytes of the distinct storages that an optimizer holds beside the weights, without those of single numbers."""
    weights = [tensor for p in model.parameters() for tensor in (p, p.grad) if tensor is not None]
    outside = {tensor.untyped_storage().data_ptr() for tensor in weights}
    sizes: dict[int, int] = {}
    seen: dict[int, Any] = {}  # alive, so that no other object gets their ids

    def walk(found: Any) -> None:
        if id(found) in seen:
            return
        seen[id(found)] = found
        if isinstance(found, torch.Tensor):
            if hasattr(found, "__tensor_flatten__"):
                walk([getattr(found, name) for name in found.__tensor_flatten__()[0]])
            elif found.numel() > 1 and found.untyped_storage().data_ptr() not in outside:
                sizes[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
        elif isinstance(found, dict):
            walk([*found.keys(), *found.values()])
        elif isinstance(found, (list, tuple)):
            for item in found:
                walk(item)
        elif isinstance(found, torch.optim.Optimizer):
            walk(
                [
                    value
                    for name, value in vars(found).items()
                    if name in ("state", "param_groups", "inner", "_projected")
                ]
            )
        elif type(found).__module__.partition(".")[0] in ("apollo_torch", "flashoptim"):
            walk([getattr(found, name) for name in (*vars(found), *getattr(type(found), "__slots__", ()))])

    walk(optimizer)
    return sum(sizes.values())


def measure(folder, name: str, dtype: torch.dtype, keys: dict[str, Any]) -> tuple[float, int]:
    """Forecast and real bytes of state."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(dtype)
    cfg = DictDefault(
        {"optimizer": name, "learning_rate": 1e-4, "weight_decay": 0.1, "optim_target_modules": "all_linear", **keys}
    )
    named = {key: value for key, value in read_optimizer_args(cfg).items() if key != "optim_args"}
    args = AxolotlTrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", optim_target_modules=cfg.optim_target_modules, **named
    )
    try:
        found = read_optimizer(cfg, args)
        optimizer = AxolotlTrainer(model=model, args=args, optimizer_cls_and_kwargs=found).create_optimizer()
    except MissingExtraError as error:
        pytest.skip(f"{error.name or error}")
    except ConfigError as error:
        if "CUDA" in str(error) or "which is not installed" in str(error):
            pytest.skip(str(error))
        raise
    train = getattr(optimizer, "train", None)
    if train is not None:  # schedule-free ones
        train()
    ids = torch.arange(64)[None]
    with torch.compiler.set_stance("force_eager"):
        for _ in range(2):
            loss = model(input_ids=ids, labels=ids).loss
            if name == "lomo":
                optimizer.fused_backward(loss, lr=1e-4)
            else:
                loss.backward()
                optimizer.step()
    weights = trained_weights(cfg, model)
    assert sum(w.count * w.numel for w in weights) == sum(p.numel() for p in model.parameters())
    options = {**read_state_options(cfg), **(UNCOMPRESSED if name.startswith("flash_") else {})}
    return state_bytes(read_any_name(cfg), weights, options), kept_bytes(optimizer, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_forecast_is_what_the_optimizer_keeps(tmp_path, name, dtype):
    forecast, real = measure(tmp_path, name, dtype, KEYS.get(name, {}))
    if name == "grokadamw":
        assert forecast == 0  # on a GPU; its states wait in main memory, where a CPU has them all
    else:
        assert forecast == pytest.approx(real, rel=0.02, abs=64)


@pytest.mark.parametrize(("name", "keys"), CHANGED, ids=[f"{name}-{keys}" for name, keys in CHANGED])
def test_options_that_change_what_is_kept(tmp_path, name, keys):
    forecast, real = measure(tmp_path, name, torch.bfloat16, keys)
    assert forecast == pytest.approx(real, rel=0.02)


def test_every_accepted_optimizer_has_its_bytes():
    assert set(STATES) == set(OPTIMIZERS)
    assert {RENAMED.get(name, name) for name in ACCEPTED} - set(STATES) == {"polora"}  # refused


def test_the_compressed_states_of_flash_optimizers():
    """Two codes of a byte each, a half for every 32 of them, and the byte that a half weight lacks to 24 bits."""
    weight = Weight((64, 128), 2)
    assert state_bytes("flash_adamw", [weight], {}) == weight.numel * (2 + 2 * 2 / 32 + 1)
    assert state_bytes("flash_sgd", [Weight((64, 128), 4)], {}) == 0


def test_galore_needs_less_than_adam_for_a_real_model():
    """Rank 128 on the projections of Llama-3.1-8B: two moments and a step of 128 x 4096 to 14336, and the projection."""
    down = Weight((4096, 14336), 2, projected=True)
    options = {"rank": 128, "proj_type": "std"}
    assert state_bytes("galore_adamw", [down], options) == 2 * (3 * 128 * 14336 + 128 * 4096)
    assert state_bytes("apollo_adamw", [down], options) == 2 * (2 * 128 * 14336 + 128 * 4096)
    assert state_bytes("adamw_torch", [down], {}) == 2 * 2 * 4096 * 14336
