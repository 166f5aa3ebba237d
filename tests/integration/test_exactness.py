"""The same rows give the same losses: however a global batch is split, on one process or several, run once or twice."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from axolotl.monkeypatch.ledger import rows_for
from axolotl.utils.dict import DictDefault
from tests.integration.training_runs import (
    evaluations_of,
    make_rows,
    make_trainer,
    run_on_ranks,
    steps_of,
    weights_of,
)
from tests.tiny import make_tiny_model

SPLITS = [(1, 8), (2, 4), (4, 2), (8, 1)]

# 27 rows, or their bins, do not fill whole steps of 8: the last step of an epoch has fewer on one rank than on the other.
FORMS: dict[str, dict[str, Any]] = {
    "unpacked": {},
    "unpacked, silent rows": {"silent": 3},
    "packed": {"packed": True},
    "packed, silent rows": {"packed": True, "silent": 3},
    "packed in one row": {"packed": True, "multipack_real_batches": False},
    "by length": {"train_sampling_strategy": "group_by_length"},
    "smooth": {"packed": True, "silent": 3, "label_smoothing_factor": 0.1},
    "in order": {"packed": True, "sample_packing_sequentially": True, "sample_packing_bin_size": 2},
}

ON_TWO_RANKS = {
    "unpacked, silent rows": (1, 4),
    "packed, silent rows": (2, 2),
    "packed in one row": (2, 2),
    "by length": (1, 4),
}


def figures(folder: Path, form: str, split: tuple[int, int], **args: Any) -> dict[str, Any]:
    """What a run that ends in its second epoch has logged and counted."""
    form_args = dict(FORMS[form])
    trainer = make_trainer(
        folder,
        rows=make_rows(27, silent=form_args.pop("silent", None)),
        per_device_train_batch_size=split[0],
        gradient_accumulation_steps=split[1],
        per_device_eval_batch_size=2,
        max_steps=6,
        max_seq_length=40,
        eval_strategy="steps",
        eval_steps=3,
        # Adam divides by tiny second moments, which would blow up the last bit of a gradient from the second step on.
        optim="sgd",
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        **form_args,
        **args,
    )
    trainer.train()
    return {
        "steps": [list(step) for step in steps_of(trainer)],
        "evaluations": evaluations_of(trainer),
        "counts": [trainer.num_tokens_seen, trainer.num_tokens_trained],
    }


def figures_on_a_rank(folder: Path) -> dict[str, Any]:
    return {form: figures(folder / form, form, split) for form, split in ON_TWO_RANKS.items()}


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory) -> dict[str, Any]:
    return run_on_ranks(figures_on_a_rank, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Callable[[str], dict[str, Any]]:
    """The run whose steps are one batch each."""
    return functools.cache(lambda form: figures(tmp_path_factory.mktemp("whole"), form, SPLITS[-1]))


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert len(ours["steps"]) == len(theirs["steps"])
    for our_step, their_step in zip(ours["steps"], theirs["steps"], strict=True):
        assert our_step == pytest.approx(their_step, rel=1e-6)
    assert ours["evaluations"] == pytest.approx(theirs["evaluations"], rel=1e-6)
    assert ours["counts"] == theirs["counts"]


@pytest.mark.parametrize(
    "form, split", [(form, split) for form in FORMS for split in (SPLITS[:-1] if "silent" in form else SPLITS[:1])]
)
def test_every_split_of_a_step(whole, form, split, tmp_path):
    expected = whole(form)
    assert len(expected["steps"]) == 6
    assert_same(figures(tmp_path, form, split), expected)


@pytest.mark.parametrize("form", ON_TWO_RANKS)
def test_two_ranks_equal_one(whole, on_two_ranks, form):
    assert_same(on_two_ranks[form], whole(form))


def make_four_bit_model(folder: Path) -> Any:
    pytest.importorskip("bitsandbytes")
    make_tiny_model(folder, hidden_size=64)
    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_type="nf4"
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=four_bits
    )
    for patch in rows_for(DictDefault(load_in_4bit=True)):
        if patch.name == "4-bit weights on a CPU":
            patch.apply(DictDefault(), model)
    return model


@pytest.mark.parametrize("packed, num_workers", [(False, 1), (True, 0)], ids=["unpacked", "packed"])
@pytest.mark.parametrize("adapter", ["full", "lora", "qlora"])
def test_the_same_seed_twice(adapter, packed, num_workers, tmp_path):
    runs = []
    for name in ("a", "b"):
        trainer = make_trainer(
            tmp_path / name,
            packed=packed,
            model=make_four_bit_model(tmp_path / name / "model") if adapter == "qlora" else None,
            model_config={"attention_dropout": 0.1},
            lora=None if adapter == "full" else {"lora_dropout": 0.2},
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=4,
            neftune_noise_alpha=5,
            dataloader_num_workers=num_workers,
            eval_strategy="steps",
            eval_steps=2,
        )
        trainer.train()
        runs.append(trainer)
        torch.rand(7)  # what the process draws in between must not matter
    ours, theirs = runs
    assert (steps_of(ours), evaluations_of(ours)) == (steps_of(theirs), evaluations_of(theirs))
    for (name, a), b in zip(weights_of(ours).items(), weights_of(theirs).values(), strict=True):
        assert torch.equal(a, b), name
