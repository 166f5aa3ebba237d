"""Every knob that saves memory leaves losses, gradients and weights as they are, in whole runs and as the config applies it."""

from __future__ import annotations

import gc
import json

import pytest
import torch

from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.monkeypatch.gradient_checkpointing import Disco
from axolotl.monkeypatch.ledger import rows_for
from axolotl.utils.callbacks.layer_offloading import LayerOffloadingCallback
from axolotl.utils.callbacks.loss_scale import SCALE, SKIPPED, LossScaleCallback
from axolotl.utils.dict import DictDefault
from tests.integration.training_runs import make_rows, make_trainer, steps_of, weights_of
from tests.tiny import make_tiny_model

KNOBS = {
    "checkpointing": {"gradient_checkpointing": True},
    "true": {"gradient_checkpointing": True, "activation_offloading": True},
    "legacy": {"gradient_checkpointing": True, "activation_offloading": "legacy"},
    "disk": {"gradient_checkpointing": True, "activation_offloading": "disk"},
    "hidden_states": {"gradient_checkpointing": True, "activation_offloading": "hidden_states"},
    "selective": {"gradient_checkpointing": True, "selective_checkpointing": {"save": ["attention"], "offload": True}},
    "layers": {"gradient_checkpointing": True, "activation_offloading": True, "layer_offloading": True},
    "layers alone": {"layer_offloading": True},
}
LORA = {"lora_dropout": 0.1}


def run(folder, knobs=None, *, reentrant=False, lora=None, packed=True, **args):
    """Four steps of two micro-batches, evaluated in between."""
    cfg = DictDefault(knobs or {})
    trainer = make_trainer(
        folder,
        packed=packed,
        lora=lora,
        rows=make_rows(64),
        model_config={"num_hidden_layers": 3, "attention_dropout": 0.1},
        callbacks=[LayerOffloadingCallback()] if cfg.layer_offloading else None,
        **{
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "gradient_checkpointing": bool(cfg.gradient_checkpointing),
            "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
            **args,
        },
    )
    for row in rows_for(cfg):
        if row.name in ("activation policies", "tiled MLP"):
            row.apply(cfg, trainer.model)
    trainer.train()
    return trainer


def assert_same(one: AxolotlTrainer, other: AxolotlTrainer):
    assert steps_of(one) == steps_of(other)
    evals = [[entry["eval_loss"] for entry in t.state.log_history if "eval_loss" in entry] for t in (one, other)]
    assert evals[0] == evals[1] and len(evals[0]) == 2
    weights = weights_of(other)
    for name, weight in weights_of(one).items():
        assert torch.equal(weight, weights[name]), name


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return {"full": run(folder / "full"), "lora": run(folder / "lora", lora=LORA)}


@pytest.mark.parametrize(
    ("knob", "adapter"),
    # Layer offloading moves frozen weights.
    [(knob, adapter) for knob in KNOBS for adapter in ("full", "lora") if adapter == "lora" or "layers" not in knob],
)
def test_a_run_with_packing_accumulation_and_evaluations_is_the_plain_one(tmp_path, plain, knob, adapter):
    lora = LORA if adapter == "lora" else None
    assert_same(run(tmp_path, KNOBS[knob], lora=lora), plain[adapter])
    gc.collect()
    assert not Disco.get_instance()._kept, "nothing stays on the disk after a run"


@pytest.mark.parametrize("knob", ["true", "disk"])
def test_reentrant_checkpointing_too(tmp_path, plain, knob):
    assert_same(run(tmp_path, KNOBS[knob], reentrant=True, lora=LORA), plain["lora"])


def test_tiles_sum_in_another_order_only(tmp_path, plain):
    tiled = run(tmp_path, {"tiled_mlp": True, "tiled_mlp_num_shards": 3})
    for one, other in zip(steps_of(tiled), steps_of(plain["full"]), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_chunks_of_the_loss_sum_in_another_order_only(tmp_path, plain):
    chunked = run(tmp_path, loss_num_chunks=5)
    for one, other in zip(steps_of(chunked), steps_of(plain["full"]), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_the_number_of_chunks_bounds_the_logits(monkeypatch):
    from axolotl.core.trainers import causal_loss
    from axolotl.core.trainers.causal_loss import OutputHead, fused_loss

    limits = []
    honest = causal_loss.linear_cross_entropy
    monkeypatch.setattr(
        causal_loss, "linear_cross_entropy", lambda *a, **k: (limits.append(k["chunk_elements"]), honest(*a, **k))[1]
    )
    head = torch.nn.Linear(4, 10, bias=False)
    model = torch.nn.Module()
    model.__dict__["_loss_function"] = None
    type(model).loss_function = property(
        lambda self: self._loss_function, lambda self, f: setattr(self, "_loss_function", f)
    )
    try:
        labels = torch.zeros(2, 15, dtype=torch.int64)
        with fused_loss(OutputHead(model, head), labels, 1, num_chunks=4):
            head(torch.randn(2, 15, 4))
    finally:
        del torch.nn.Module.loss_function
    assert limits == [8 * 10]


def scaled_trainer(folder, init_scale, **args):
    trainer = make_trainer(folder, max_steps=6, per_device_train_batch_size=2, max_grad_norm=0.0, **args)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=2)
    trainer.add_callback(LossScaleCallback(trainer))
    return trainer


def test_overflowing_steps_are_skipped_and_counted_and_the_scale_is_resumed(tmp_path):
    # Scaled by 2**126 the loss overflows: the scaler halves until it does not, and tries more again two good steps later.
    trainer = scaled_trainer(tmp_path / "a", 2.0**126, save_strategy="steps", save_steps=3)
    before = weights_of(trainer)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if SKIPPED in entry]
    skipped = [entry[SKIPPED] for entry in logs]
    assert skipped[0] == 1 and skipped == sorted(skipped) and len(skipped) == 6
    assert logs[0][SCALE] == 2.0**125
    assert any(not torch.equal(before[name], weight) for name, weight in weights_of(trainer).items()) == (
        skipped[-1] < 6
    )
    checkpoint = tmp_path / "a" / "out" / "checkpoint-3"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    resumed = scaled_trainer(tmp_path / "a", 1.0)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert [entry[SKIPPED] for entry in state["log_history"] if SKIPPED in entry] == skipped[:3]
    again = [entry for entry in resumed.state.log_history if SKIPPED in entry]
    assert [(entry[SKIPPED], entry[SCALE]) for entry in again] == [(entry[SKIPPED], entry[SCALE]) for entry in logs]


def test_shifted_attention_trains(tmp_path):
    from axolotl.monkeypatch.attention import shifted, varlen
    from axolotl.monkeypatch.ledger import LEDGER

    shifted.register()
    varlen.register()
    losses = {}
    for name in (shifted.NAME, varlen.NAME):
        model = make_tiny_model(tmp_path / name, "llama")
        model.set_attn_implementation(name)
        hook = next(row for row in LEDGER if row.name == "document borders")
        hook.apply(DictDefault(), model)
        trainer = make_trainer(tmp_path / name, model=model, packed=True, max_steps=3, per_device_train_batch_size=2)
        losses[name] = [trainer.evaluate()["eval_loss"]]
        trainer.train()
        losses[name] += [loss for loss, _ in steps_of(trainer)]
    assert losses[shifted.NAME][0] == losses[varlen.NAME][0], "evaluation attends in full"
    assert all(a != b for a, b in zip(losses[shifted.NAME][1:], losses[varlen.NAME][1:], strict=True))
