"""The loss of a step is that of its rows one by one, fused or not, packed or not (`test_exactness` splits it)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from axolotl.core.trainers.causal_loss import OutputHead
from tests.integration.training_runs import make_rows, make_trainer, steps_of
from tests.tiny import make_tiny_model


def run(folder: Path, micro_batch_size: int, accumulation: int, **kwargs):
    trainer = make_trainer(
        folder,
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=2,
        **kwargs,
    )
    trainer.train()
    return trainer


def naive_step(model, rows) -> tuple[float, float]:
    """Loss and gradient norm of one step over rows, one at a time, with nothing of this package."""
    total, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        logits = model(input_ids=ids).logits[0, :-1]
        total = total + F.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
        count += int((labels[1:] != -100).sum())
    loss = total / count
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return loss.item(), norm.item()


@pytest.mark.parametrize("split", [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_every_split_of_a_batch_has_the_loss_of_its_rows(tmp_path, split):
    trainer = run(tmp_path, *split)
    rows = trainer.train_dataset.select(trainer.train_order.order()[:8])
    loss, norm = naive_step(make_tiny_model(tmp_path / "again"), rows)
    assert steps_of(trainer)[0] == pytest.approx((loss, norm), rel=1e-6)


def test_packed_equals_unpacked(tmp_path):
    rows = make_rows(12)
    packed = make_trainer(
        tmp_path / "p", packed=True, rows=rows, per_device_train_batch_size=64, max_steps=1, curriculum_sampling=True
    )
    packed.train()
    loss, norm = naive_step(make_tiny_model(tmp_path / "again"), rows)
    assert steps_of(packed)[0] == pytest.approx((loss, norm), rel=2e-6)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gemma3_text", "phi3"])
@pytest.mark.parametrize("tied", [False, True])
def test_fused_loss_equals_the_models_own(tmp_path, architecture, tied):
    results = []
    for fused in (True, False):
        trainer = run(
            tmp_path / str(fused),
            2,
            1,
            architecture=architecture,
            fused_linear_loss=fused,
            model_config={"tie_word_embeddings": tied},
        )
        assert isinstance(trainer._output_head, OutputHead) == fused
        results.append((steps_of(trainer), trainer.evaluate()["eval_loss"]))
    (ours, our_eval), (theirs, their_eval) = results
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert our_eval == pytest.approx(their_eval, rel=1e-5)


def test_a_softcap_is_learnt_from_the_model(tmp_path):
    trainer = run(tmp_path, 1, 1, architecture="gemma2", model_config={"final_logit_softcapping": 5.0})
    assert trainer._output_head.softcap == 5.0


def test_a_scale_is_learnt_from_the_model(tmp_path):
    from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM

    from tests.tiny import TINY_SHAPE

    for model, scale in (
        (GraniteForCausalLM(GraniteConfig(**TINY_SHAPE, vocab_size=384, logits_scaling=4.0, pad_token_id=2)), 0.25),
        (CohereForCausalLM(CohereConfig(**TINY_SHAPE, vocab_size=384, logit_scale=0.5, pad_token_id=2)), 0.5),
    ):
        assert run(tmp_path, 1, 1, model=model)._output_head.logit_scale == scale


@pytest.mark.parametrize("lora", [{}, {"modules_to_save": ["lm_head"]}, {"bias": "lora_only"}])
def test_with_an_adapter(tmp_path, lora):
    results = []
    for fused in (True, False):
        trainer = run(tmp_path / str(fused), 2, 1, lora=lora, fused_linear_loss=fused)
        results.append(steps_of(trainer))
        assert isinstance(trainer._output_head, OutputHead) == fused
    for a, b in zip(*results, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"label_smoothing_factor": 0.2},
        {"loss_token_scaling": True},
        {"loss_entropy_top_k": 20, "loss_entropy_alpha": 2.0},
    ],
)
def test_smoothed_and_weighted_losses(tmp_path, kwargs):
    results = []
    for fused in (True, False):
        trainer = run(tmp_path / str(fused), 2, 2, fused_linear_loss=fused, **kwargs)
        assert isinstance(trainer._output_head, OutputHead) == fused
        results.append((steps_of(trainer), trainer.evaluate()["eval_loss"]))
    (ours, our_eval), (theirs, their_eval) = results
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert our_eval == pytest.approx(their_eval, rel=1e-5)


def test_what_a_token_weighs_changes_what_is_learnt_and_not_what_is_measured(tmp_path):
    plain, weighed = (run(tmp_path / str(on), 2, 1, loss_token_scaling=on) for on in (False, True))
    assert steps_of(weighed)[0][0] < 0.5 * steps_of(plain)[0][0]
    for trainer in (plain, weighed):
        model = trainer.model.eval()
        loss, _ = naive_step(model, trainer.eval_dataset)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("kwargs", [{"gradient_checkpointing": True}, {"bf16": True}])
def test_with_checkpointing_and_autocast(tmp_path, kwargs):
    results = []
    for fused in (True, False):
        trainer = run(tmp_path / str(fused), 2, 1, fused_linear_loss=fused, **kwargs)
        results.append(steps_of(trainer))
    for a, b in zip(*results, strict=True):
        assert a == pytest.approx(b, rel=2e-2 if "bf16" in kwargs else 1e-5)


def test_evaluation_weighs_tokens_not_batches(tmp_path):
    for packed in (False, True):
        trainer = make_trainer(tmp_path / str(packed), packed=packed, per_device_eval_batch_size=3)
        loss, _ = naive_step(make_tiny_model(tmp_path / "again"), trainer.eval_dataset)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-6)


def test_counters_count(tmp_path):
    rows = make_rows(8)
    trainer = make_trainer(tmp_path, rows=rows, per_device_train_batch_size=4, num_train_epochs=2)
    trainer.train()
    assert trainer.num_tokens_seen == 2 * sum(rows["length"])
    assert trainer.num_tokens_trained == 2 * sum(sum(label != -100 for label in row[1:]) for row in rows["labels"])


def test_the_model_is_left_as_it_was(tmp_path):
    trainer = run(tmp_path, 2, 1)
    head = trainer.model.get_output_embeddings()
    assert "forward" not in vars(head)
    assert "_loss_function" not in vars(trainer.model)
    logits = trainer.model(input_ids=torch.tensor([[5, 6, 7]])).logits
    assert logits.shape == (1, 3, head.out_features)
