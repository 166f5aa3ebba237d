"""Keys of the kd plugin."""

from __future__ import annotations

from typing import Annotated, Literal

from axolotl.utils.schemas.fields import IGNORE_CASE, Float, Int, Words, key


class KDArgs(Words):
    """Distil a teacher's log probabilities into the model."""

    kd_trainer: bool | None = key("Train by distillation.")
    kd_ce_alpha: Float | None = key("Weight of the cross-entropy with the data.")
    kd_alpha: Float | None = key("Weight of the divergence from the teacher.")
    kd_temperature: Float | None = key("Temperature of both distributions.", gt=0)
    kd_temperature_min: Float | None = key("Lowest temperature, when it varies.", gt=0)
    kd_beta: Float | None = key("Between forward (0) and reverse (1) divergence.", 0.0, ge=0, le=1)
    kd_normalize_topk: bool | None = key("Let the teacher's listed probabilities sum to one.")
    kd_online_server_base_url: str | None = key("Address of a server that runs the teacher.")
    kd_online_topk: Int | None = key("Tokens per position to ask the teacher for.", ge=1)
    kd_online_server: Annotated[Literal["vllm", "sglang"] | None, IGNORE_CASE] = key("Kind of that server.", "vllm")
    kd_online_timeout: Int | None = key("Seconds to wait for the teacher.", 120, ge=1)
