"""Which changes are proposed for a run that does not fit, and in which order."""

from __future__ import annotations

import dataclasses
import re

from axolotl._not_built import NO_EFFECT_YET, NOT_BUILT
from axolotl.utils.forecast import GIB, forecast
from axolotl.utils.forecast_test import llama_8b
from axolotl.utils.remedies import remedies
from axolotl.utils.schemas.config import AxolotlInputConfig


def test_remedies_are_ranked_and_honest():
    run = llama_8b()
    found = remedies(run, 24 * GIB, micro_batch_size=2, can_quantize=True)
    fits = [remedy.forecast.total <= 24 * GIB for remedy in found]
    assert fits == sorted(fits, reverse=True) and fits[0]
    assert found[0].change == "gradient_checkpointing: true, selective_checkpointing: true"
    assert found[1].change == "gradient_checkpointing: true" and found[0].effect == found[1].effect == "same result"
    exact = [
        remedy.slowdown for remedy in found if remedy.effect == "same result" and remedy.forecast.total <= 24 * GIB
    ]
    assert exact == sorted(exact)
    assert all(remedy.forecast.total < forecast(run).total for remedy in found)
    assert (
        not remedies(llama_8b(checkpointing=True), 1 * GIB, micro_batch_size=1, can_quantize=False)[0].forecast.total
        < GIB
    )


def test_no_more_is_computed_again_than_must_be():
    run = llama_8b(compiled=True, lora_kernels=True)
    whole = forecast(run).total
    one_layer = (whole - forecast(dataclasses.replace(run, checkpointing=True)).total) / run.num_layers
    found = remedies(run, whole - 5 * one_layer, micro_batch_size=1, can_quantize=True)
    # Every sixth layer of 32 would do; the next proposal is every fourth.
    assert found[0].change == "gradient_checkpointing: true, gradient_checkpointing_kwargs: {every_n_layers: 4}"
    assert found[0].slowdown < found[1].slowdown and not any("selective" in remedy.change for remedy in found)


def test_every_key_that_is_proposed_can_be_written():
    adapter = llama_8b(attention_kind="eager", row_length=8192)
    all_weights = dataclasses.replace(adapter, is_adapter=False, num_trained=adapter.num_params)
    changes = [
        remedy.change
        for run in (adapter, all_weights)
        for remedy in remedies(run, 24 * GIB, micro_batch_size=4, can_quantize=run.is_adapter)
    ]
    keys = {key for change in changes for key in re.findall(r"(?:^|, )(\w+)(?:: | x )", change)}
    assert {"tiled_mlp", "layer_offloading", "flash_attention", "gradient_accumulation_steps", "optimizer"} <= keys
    assert keys <= set(AxolotlInputConfig.model_fields) - set(NO_EFFECT_YET)
    assert keys & set(NOT_BUILT) <= {"optimizer"}  # of which one name is refused
