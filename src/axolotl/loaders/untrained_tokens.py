"""Tokens whose embeddings the base model never trained get the mean of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch.utils.data import IterableDataset

from axolotl.exceptions import ConfigError
from axolotl.loaders.adapter_init import ADAPTER


def fix_untrained(model: Any, wanted: bool | int | Sequence[int], train_dataset: Any) -> int:
    """Give tokens the mean of the trained rows, in embedding and head; returns how many.

    Args:
        model: changed in place.
        wanted: True for the untrained tokens that occur in the dataset, or the ids themselves.
        train_dataset: the rows to look at. Which tokens a stream will bring is not known: all untrained ones are taken.

    Raises:
        ConfigError: an id outside the embedding, or an adapter that would not save the new rows.
    """
    untrained = find_untrained(model)
    broken = torch.zeros_like(untrained)
    if wanted is not True:
        ids = [wanted] if isinstance(wanted, int) else list(wanted)
        check_ids(ids, len(untrained))
        broken[torch.as_tensor(ids, device=broken.device)] = True
    elif isinstance(train_dataset, IterableDataset):
        broken = untrained
    else:
        for row in train_dataset["input_ids"]:
            broken[torch.as_tensor(row, device=broken.device)] = True
        broken &= untrained
    if broken.any():
        set_to_mean(model, broken, ~(untrained | broken))
    return int(broken.sum())


def find_untrained(model: Any) -> torch.Tensor:
    """Which rows of the input embedding are all zero (bool, one per row)."""
    return (_base_weight(model.get_input_embeddings()).detach() == 0).all(dim=1)


def check_ids(ids: Sequence[int], num_rows: int) -> None:
    """Raise ConfigError for an id outside the embedding."""
    outside = [token for token in ids if not 0 <= token < num_rows]
    if outside:
        raise ConfigError(
            f"`fix_untrained_tokens`: {', '.join(map(str, outside))}: the embedding has the rows 0 to {num_rows - 1}."
        )


@torch.no_grad()
def set_to_mean(model: Any, broken: torch.Tensor, good: torch.Tensor) -> None:
    """Set rows of embedding and head to the mean of others, in the base and in what an adapter trains of it.

    Args:
        model: changed in place.
        broken: rows to set (bool).
        good: rows to average (bool).

    Raises:
        ConfigError: the model has an adapter that would not be saved with the new rows.
    """
    modules = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    if isinstance(model, PeftModel):
        _check_adapter_keeps(modules, broken, tied=bool(model.config.get_text_config().tie_word_embeddings))
    done: set[int] = set()
    for module in modules:
        weight = _base_weight(module)
        mean = weight[good].float().mean(dim=0) if weight.data_ptr() not in done else weight[broken][0].float()
        done.add(weight.data_ptr())
        for trained in _weights(module):
            trained[broken] = mean.to(trained.dtype)
        if isinstance(module, TrainableTokensWrapper):
            layer = module.token_adapter.tied_adapter or module.token_adapter
            chosen = broken[torch.as_tensor(layer.token_indices[ADAPTER], device=broken.device)]
            layer.trainable_tokens_delta[ADAPTER][chosen] = mean.to(layer.trainable_tokens_delta[ADAPTER].dtype)


def _base_weight(module: Any) -> torch.Tensor:
    if isinstance(module, ModulesToSaveWrapper | TrainableTokensWrapper):
        module = module.original_module
    return module.get_base_layer().weight if hasattr(module, "get_base_layer") else module.weight


def _weights(module: Any) -> list[torch.Tensor]:
    """The base weight, and its trained copy under `lora_modules_to_save`."""
    weights = [_base_weight(module)]
    if isinstance(module, ModulesToSaveWrapper):
        trained: Any = module.modules_to_save[ADAPTER]
        weights.append(trained.weight)
    return weights


def _check_adapter_keeps(modules: list[Any], broken: torch.Tensor, *, tied: bool) -> None:
    wanted = broken.nonzero().squeeze(-1).tolist()
    for module in modules[:1] if tied else modules:
        if isinstance(module, ModulesToSaveWrapper):
            continue
        if isinstance(module, TrainableTokensWrapper) and set(wanted) <= set(
            module.token_adapter.token_indices[ADAPTER]
        ):
            continue
        shown = ", ".join(map(str, wanted[:8])) + (", ..." if len(wanted) > 8 else "")
        raise ConfigError(
            f"`fix_untrained_tokens` would give the tokens {shown} new embeddings, which the adapter does not save: what is loaded "
            "later would not be what was trained. Write `lora_modules_to_save: [embed_tokens, lm_head]`, or list these ids under "
            "`peft_trainable_token_indices` for both."
        )
