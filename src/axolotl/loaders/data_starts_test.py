"""Starts of LoRA from rows, against peft's own where it has them, and against their definitions."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import get_eva_state_dict

from axolotl.exceptions import ConfigError
from axolotl.loaders import data_starts
from axolotl.loaders.adapter_init import lora_layers, save_as_difference
from axolotl.loaders.data_starts import DataStart, draw_rows, share_ranks, start_from_data
from tests.tiny import make_tiny_model

TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in range(8, 40):
        ids = torch.randint(3, 384, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:], "attention_mask": [1] * length})
    return made


def adapt(model, config):
    return get_peft_model(model, config)


def started(base, rows, method, seed=42, **keys):
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **keys})
    model = adapt(copy.deepcopy(base), config)
    if method != "eva":
        save_as_difference(model)
    return start_from_data(model, DataStart(method, rows, seed), adapt)


def matrices(model):
    return {
        name.removeprefix(PREFIX): (module.lora_A.default.weight.detach(), module.lora_B.default.weight.detach())
        for name, module in lora_layers(model)
    }


@pytest.mark.parametrize("method", ["eva", "corda", "lora_ga"])
def test_a_start_leaves_the_function_of_the_model_alone(method, base, rows, monkeypatch):
    model = started(base, rows, method)
    ids = torch.arange(5, 29)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, base(ids).logits, rtol=1e-4, atol=1e-4)
    assert all(not p.requires_grad or "lora_" in name for name, p in model.named_parameters())
    # The same for the same seed, however many layers are looked at in one pass, and whatever was drawn before.
    monkeypatch.setattr(data_starts, "STATISTICS_BYTES", 1)
    torch.rand(3)
    again = matrices(started(base, rows, method))
    for name, pair in matrices(model).items():
        for ours, theirs in zip(pair, again[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exact_size", [1024, 0])
def test_eva_finds_the_principal_directions_of_supervised_inputs(exact_size, base, rows, monkeypatch):
    monkeypatch.setattr(data_starts, "EXACT_SIZE", exact_size)
    batches = draw_rows(DataStart("eva", rows))
    inputs: dict[str, list] = {}
    model = copy.deepcopy(base)
    for name, module in model.named_modules():
        if name.endswith(tuple(TARGETS)):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0][0]))
    with torch.no_grad():
        for batch in batches:
            model(batch["input_ids"])
    kept = torch.cat([batch["labels"][0] != -100 for batch in batches])
    # peft decomposes by random projections, so that its directions are near ours only.
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    padded = {
        key: torch.cat([torch.nn.functional.pad(b[key], (0, longest - b[key].shape[1]), value=v) for b in batches])
        for key, v in {"input_ids": 0, "labels": -100}.items()
    }
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    theirs = get_eva_state_dict(copy.deepcopy(base), [padded], config, show_progress_bar=False)
    for name, (matrix, zero) in matrices(started(base, rows, "eva")).items():
        x = torch.cat(inputs[name])[kept]
        _, _, directions = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)
        number = min(len(matrix), 4)
        for others, least in ((directions, 0.999), (theirs[name], 0.9)):
            assert torch.nn.functional.cosine_similarity(matrix[:number], others[:number]).abs().min() > least, name
        assert not zero.any()


def test_eva_deals_out_the_ranks_and_keeps_the_scale(base, rows):
    model = started(base, rows, "eva", rank_pattern={"down_proj": 2}, alpha_pattern={"v_proj": 3})
    ranks = {name: len(matrix) for name, (matrix, _) in matrices(model).items()}
    assert sum(ranks.values()) == 2 * (3 * 4 + 2)
    assert len(set(ranks.values())) > 1 and min(ranks.values()) >= 1
    for name, module in lora_layers(model):
        expected = 8 / 2 if "down" in name else 3 / 4 if "v_proj" in name else 8 / 4
        assert module.scaling["default"] == pytest.approx(expected)


def test_ranks_go_to_the_largest_shares_but_every_layer_keeps_one():
    shares = {"a": torch.tensor([0.5, 0.3, 0.1, 0.05]), "b": torch.tensor([0.02, 0.01, 0.01, 0.0])}
    assert share_ranks(shares, {"a": 2, "b": 2}) == {"a": 3, "b": 1}
    assert share_ranks({"a": torch.tensor([0.9, 0.05, 0.04]), "b": torch.tensor([0.5, 0.4])}, {"a": 1, "b": 1}) == {
        "a": 1,
        "b": 1,
    }


def test_corda_is_that_of_peft(base, rows, monkeypatch):
    # peft divides a row by its largest value, we by its largest magnitude.
    monkeypatch.setattr(data_starts, "_normed", lambda x_NI, batch: x_NI / x_NI.max().abs())
    batches = draw_rows(DataStart("corda", rows))
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights="corda", corda_config=CordaConfig()
    )
    model = copy.deepcopy(base)

    def run():
        for batch in batches:
            model(batch["input_ids"])

    preprocess_corda(model, config, run)
    theirs = get_peft_model(model, config)
    ours = started(base, rows, "corda")
    for (name, module), (_, other) in zip(lora_layers(ours), lora_layers(theirs), strict=True):
        products = [
            m.lora_B.default.weight.detach() @ m.lora_A.default.weight.detach() * m.scaling["default"]
            for m in (module, other)
        ]
        difference = (products[0] - products[1]).norm() / products[1].norm()
        assert difference < 1e-3, (name, difference)
        torch.testing.assert_close(
            module.base_layer.weight + products[0],
            base.get_submodule(name.removeprefix(PREFIX)).weight,
            rtol=1e-4,
            atol=1e-4,
        )


def test_lora_ga_starts_along_the_gradient_of_all_tokens(base, rows):
    batches = draw_rows(DataStart("lora_ga", rows))
    model = copy.deepcopy(base)
    num_tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    for batch in batches:
        share = (batch["labels"][:, 1:] != -100).sum() / num_tokens
        (model(**batch).loss * share).backward()
    for name, (a, b) in matrices(started(base, rows, "lora_ga")).items():
        gradient = model.get_submodule(name).weight.grad
        left, _, right = torch.linalg.svd(gradient)
        scale = gradient.shape[0] ** 0.25 / 4
        cosines = torch.nn.functional.cosine_similarity(a, right[:4]).abs()
        assert cosines.min() > 0.99, name
        assert torch.nn.functional.cosine_similarity(b.T, left.T[4:8]).abs().min() > 0.99, name
        torch.testing.assert_close(a.norm(dim=1), torch.full((4,), scale))
        torch.testing.assert_close(b.norm(dim=0), torch.full((4,), scale))


def test_rows_without_supervised_tokens_do_not_count(rows):
    masked = [{**row, "labels": [-100] * len(row["labels"])} for row in rows]
    assert len(draw_rows(DataStart("eva", [*masked, rows[0]]))) == 1
    with pytest.raises(ConfigError, match="no row has any"):
        draw_rows(DataStart("eva", masked))


@pytest.mark.parametrize(("method", "needed"), [("corda", 33), ("lora_ga", 34)])
def test_too_large_a_rank_is_named(method, needed, base, rows):
    with pytest.raises(ConfigError, match=f"its start needs {needed} directions"):
        started(base, rows, method, r=33 if method == "corda" else 17)
