"""Packed and padded batches give the loss and the gradients of each document alone, on every backend that runs here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, masking_utils

from axolotl.exceptions import ModelError
from axolotl.monkeypatch.attention import varlen
from axolotl.monkeypatch.attention.documents import HOOK_MARK, add_document_hook, find_documents_once, register_masks
from axolotl.monkeypatch.attention.layouts import Layout, key_of, read_batch, told_layouts
from tests.tiny import ARCHITECTURES, make_tiny_model

EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
# Learnt positions, experts, attention sinks.
MORE = {
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256,
                            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "mixtral": ("MixtralConfig", {**EXPERTS, "sliding_window": 8}),
    "qwen3_moe": ("Qwen3MoeConfig", {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOssConfig", {**EXPERTS, "head_dim": 8, "sliding_window": 8}),
}  # fmt: skip
WITHOUT_SDPA = {"gemma2", "gpt_oss"}
"""transformers refuses it for models that cap or extend what is summed in the softmax."""
LENGTHS = (21, 3, 17, 1, 9, 13)
FORMS = ("one row", "two rows", "with a mask of ones", "borders", "padding between", "right padding", "left padding")


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 384, (length,), generator=generator) for length in LENGTHS]


def row(docs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """One packed row; the first token of a document is nobody's target."""
    labels = [torch.cat([torch.tensor([-100]), doc[1:]]) for doc in docs]
    positions = [torch.arange(len(doc)) for doc in docs]
    return {
        name: torch.cat(parts)[None]
        for name, parts in (("input_ids", docs), ("labels", labels), ("position_ids", positions))
    }


def padded(batch: dict[str, torch.Tensor], length: int, *, left: bool = False) -> dict[str, torch.Tensor]:
    """`batch` of one row padded to `length`; positions of padding are 1, as transformers' generation makes them."""
    size = length - batch["input_ids"].shape[1]
    fill = {"input_ids": 0, "labels": -100, "position_ids": 1, "attention_mask": 0}
    batch = {"attention_mask": torch.ones_like(batch["input_ids"]), **batch}
    ends = (size, 0) if left else (0, size)
    return {name: torch.nn.functional.pad(value, ends, value=fill[name]) for name, value in batch.items()}


def stacked(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([one[name] for one in rows]) for name in rows[0]}


def batch_of(form: str) -> dict[str, torch.Tensor | int]:
    docs = documents()
    if form == "one row":
        return row(docs)
    if form == "two rows":
        batch = stacked([padded(row(docs[:3]), 41), padded(row(docs[3:]), 41)])
        batch.pop("attention_mask")
        return batch
    if form == "with a mask of ones":
        return {**row(docs), "attention_mask": torch.ones(1, sum(LENGTHS), dtype=torch.int64)}
    if form == "borders":
        borders = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
        lengths = {"max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS)}
        return {**row(docs), "cu_seq_lens_q": borders, "cu_seq_lens_k": borders, **lengths}
    if form == "padding between":
        rows = [padded(row([doc]), 24) for doc in docs]
        return {name: torch.cat([one[name] for one in rows], dim=1) for name in rows[0]}
    return stacked([padded(row([doc]), 24, left=form == "left padding") for doc in docs])


def loss_and_grads(model, batch: dict[str, torch.Tensor | int]) -> tuple[float, dict[str, torch.Tensor]]:
    """Sum of the token losses and its gradients."""
    model.zero_grad()
    labels = batch["labels"]
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def masked_attentions(architecture: str) -> list[str]:
    """The attentions that take masks and that transformers has for an architecture."""
    return ["eager"] if architecture in WITHOUT_SDPA else ["eager", "sdpa"]


def load(folder: Path, implementation: str, **hook):
    varlen.register()
    register_masks()
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=implementation, dtype=torch.float32
    ).train()
    add_document_hook(model, varlen=implementation == varlen.NAME, **hook)
    return model


@pytest.fixture(scope="module", params=[*sorted(ARCHITECTURES), *MORE])
def alone(request, tmp_path_factory):
    """A model folder, and the loss and gradients of its documents one by one."""
    folder = tmp_path_factory.mktemp(request.param)
    class_name, config = MORE.get(request.param, (request.param, {}))
    make_tiny_model(folder, class_name, **config)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).train()
    total, grads = 0.0, {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for doc in documents():
        if len(doc) > 1:
            loss, parts = loss_and_grads(model, row([doc]))
            total += loss
            for name, part in parts.items():
                grads[name] += part
    return request.param, folder, total, grads


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_batch_equals_each_document_alone(alone, form: str) -> None:
    architecture, folder, total, grads = alone
    for implementation in (varlen.NAME, *masked_attentions(architecture)):
        loss, ours = loss_and_grads(load(folder, implementation), batch_of(form))
        assert loss == pytest.approx(total, rel=1e-5), implementation
        for name, grad in grads.items():
            torch.testing.assert_close(
                ours[name],
                grad,
                rtol=1e-4,
                atol=1e-5 * float(grad.abs().max()),
                msg=lambda m, n=name, i=implementation: f"{i}, {n}: {m}",
            )


@pytest.mark.slow
def test_flex_attention_keeps_documents_apart(tmp_path: Path) -> None:
    """On a CPU flex attention has no backward pass; its loss must be right all the same."""
    make_tiny_model(tmp_path, "mistral")
    exact, flex = load(tmp_path, "eager"), load(tmp_path, "flex_attention")
    for form in ("with a mask of ones", "right padding"):
        batch = {name: value for name, value in batch_of(form).items() if name != "labels"}
        real = batch["attention_mask"] == 1  # a padded token that sees nothing is zero there, and the mean here
        with torch.no_grad():
            ours, expected = (model(**batch).logits[real] for model in (flex, exact))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", [varlen.NAME, "sdpa", "eager"])
def test_skipped_positions_stay_in_their_document(tmp_path: Path, implementation: str) -> None:
    """PoSE: positions jump forward inside a document. transformers alone would cut the document there."""
    make_tiny_model(tmp_path, "llama")
    doc = documents()[0]
    positions = torch.cat([torch.arange(10), torch.arange(60, 71)])[None]
    alone = {"input_ids": doc[None], "labels": doc[None], "position_ids": positions}
    exact, _ = loss_and_grads(load(tmp_path, "eager"), {**alone, "attention_mask": torch.ones_like(positions)})
    model = load(tmp_path, implementation)
    assert loss_and_grads(model, alone)[0] == pytest.approx(exact, rel=1e-5)
    labels = torch.cat([doc, torch.tensor([-100]), doc[1:]])[None]
    twice = {"input_ids": doc.repeat(2)[None], "labels": labels, "position_ids": positions.repeat(1, 2)}
    assert loss_and_grads(model, twice)[0] == pytest.approx(2 * exact, rel=1e-5)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    make_tiny_model(tmp_path, "llama")
    model = load(tmp_path, varlen.NAME)
    loss, grads = loss_and_grads(model, batch_of("two rows"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, grads_again = loss_and_grads(model, batch_of("two rows"))
    assert again == loss
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)


def test_a_cache_does_not_hide_packed_documents(tmp_path: Path) -> None:
    """`use_cache: true` in the model's config makes transformers forget packed positions."""
    make_tiny_model(tmp_path, "llama")
    exact = load(tmp_path, "sdpa")
    batch = batch_of("one row")
    expected, _ = loss_and_grads(exact, batch)
    exact.config.use_cache = True
    assert loss_and_grads(exact, batch)[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("implementation", [varlen.NAME, "sdpa"])
def test_generation_with_a_cache_equals_generation_without(tmp_path: Path, implementation: str) -> None:
    make_tiny_model(tmp_path, "mistral")
    model = load(tmp_path, implementation).eval()
    prompts = stacked([padded(row([doc]), 24, left=True) for doc in documents()[:3]])
    inputs = {"input_ids": prompts["input_ids"], "attention_mask": prompts["attention_mask"]}
    keywords = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    exact = load(tmp_path, "eager").eval().generate(**inputs, use_cache=False, **keywords)
    assert torch.equal(model.generate(**inputs, use_cache=True, **keywords), exact)


def test_a_model_that_builds_its_own_masks_is_refused(tmp_path: Path) -> None:
    """Packed documents would leak: the mistake must be loud."""
    model = make_tiny_model(tmp_path, "llama")

    class OwnAttention(torch.nn.Module):
        def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
            return input_ids.float()

    model.model = OwnAttention()
    add_document_hook(model, varlen=False)
    packed = row(documents())
    with pytest.raises(ModelError, match="sample_packing: false"):
        model.model(input_ids=packed["input_ids"], position_ids=packed["position_ids"])
    alone = row(documents()[:1])
    assert model.model(input_ids=alone["input_ids"], position_ids=alone["position_ids"]) is not None


def test_hooks_are_added_once(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path, "llama")
    for _ in range(2):
        add_document_hook(model, varlen=True)
    assert len(model.model._forward_pre_hooks) == 1


# --- batches that have been read before they were sent -----------------------------------------------------------------


def sent(batch: dict[str, Any], layout: Layout | None, device: str) -> tuple[dict[str, Any], dict]:
    """A batch on another device, and what is told of it."""
    there = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
    if layout is None:
        return there, {}
    starts, borders = layout.starts, layout.borders
    moved = replace(
        layout,
        starts=None if starts is None else starts.to(device),
        borders=None if borders is None else (borders[0].to(device), borders[1]),
    )
    return there, {key_of(there.get("position_ids"), there.get("attention_mask")): moved}


def collated(form: str) -> dict[str, Any]:
    """A batch as collators make it: padded rows have no positions."""
    batch = {name: value for name, value in batch_of(form).items() if name != "labels"}
    if form.endswith("padding"):
        batch.pop("position_ids")
    return batch


COLLATED = ("one row", "two rows", "right padding", "left padding")


@pytest.fixture
def documents_found_once(monkeypatch):
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", masking_utils.find_packed_sequence_indices)
    find_documents_once()


@pytest.mark.parametrize(
    ("architecture", "implementation"),
    [(name, kind) for name in sorted(ARCHITECTURES) for kind in masked_attentions(name)],
)
@pytest.mark.usefixtures("documents_found_once")
def test_nothing_of_a_told_batch_is_read(tmp_path: Path, architecture: str, implementation: str) -> None:
    """Tensors on the meta device have no values: whatever asks for one, and would wait for a GPU, raises `NotImplementedError`."""
    make_tiny_model(tmp_path, architecture)
    model = load(tmp_path, implementation).to("meta")
    for form in COLLATED:
        batch = collated(form)
        there, told = sent(batch, read_batch(batch), "meta")
        with told_layouts(told):
            model(**there)
        with pytest.raises(NotImplementedError):  # of PyTorch: a batch of which nothing was told is read
            model(**there)


def test_nothing_of_a_told_batch_is_read_for_borders(tmp_path: Path) -> None:
    make_tiny_model(tmp_path, "llama")
    model = load(tmp_path, varlen.NAME)
    hook = getattr(model, HOOK_MARK)
    for form in COLLATED:
        batch = collated(form)
        _, expected = hook.before(model, (), batch)
        hook.after(model, (), None)
        there, told = sent(batch, read_batch(batch), "meta")
        with told_layouts(told):
            _, kwargs = hook.before(model, (), there)
        hook.after(model, (), None)
        assert kwargs["max_length_q"] == expected["max_length_q"]
        assert kwargs["cu_seq_lens_q"].shape == expected["cu_seq_lens_q"].shape
        assert kwargs["attention_mask"] is None
        with told_layouts(sent(batch, read_batch(batch), "cpu")[1]):
            _, kwargs = hook.before(model, (), batch)
        hook.after(model, (), None)
        assert torch.equal(kwargs["cu_seq_lens_q"], expected["cu_seq_lens_q"])


def with_padding(form: str) -> dict[str, Any]:
    batch = collated(form if form.endswith("padding") else "right padding")
    if form == "rows of padding":
        batch["attention_mask"][-1] = 0
    if form == "padding inside":
        batch["attention_mask"][0, 3:5] = 0
    return batch


PADDED = ("right padding", "left padding", "rows of padding", "padding inside")


@pytest.mark.parametrize("form", PADDED)
@pytest.mark.usefixtures("documents_found_once")
def test_padded_rows_are_computed_as_transformers_computes_them(alone, form: str) -> None:
    architecture, folder, _, _ = alone
    batch = with_padding(form)
    told = sent(batch, read_batch(batch), "cpu")[1]
    for implementation in masked_attentions(architecture):
        plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation, dtype=torch.float32)
        expected = plain.train()(**batch).logits
        model = load(folder, implementation)
        assert torch.equal(model(**batch).logits, expected), implementation
        with told_layouts(told):
            assert torch.equal(model(**batch).logits, expected), implementation
            model.config.use_cache = True
            assert torch.equal(model(**batch).logits, expected), implementation


@pytest.mark.parametrize("form", PADDED)
@pytest.mark.usefixtures("documents_found_once")
def test_padded_rows_with_borders_are_computed_as_with_masks(alone, form: str) -> None:
    _, folder, _, _ = alone
    batch = with_padding(form)
    real = batch["attention_mask"] != 0
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    expected = plain.train()(**batch).logits[real]
    model = load(folder, varlen.NAME)
    torch.testing.assert_close(model(**batch).logits[real], expected, rtol=1e-4, atol=1e-5)
    with told_layouts(sent(batch, read_batch(batch), "cpu")[1]):
        torch.testing.assert_close(model(**batch).logits[real], expected, rtol=1e-4, atol=1e-5)


def test_a_mask_of_the_models_own_is_taken_as_it_is(tmp_path: Path) -> None:
    """Where the batch is padded and the model asks for a mask without padding, the mask is written out and right."""
    make_tiny_model(tmp_path, "mistral", sliding_window=8)
    model = load(tmp_path, "sdpa")
    batch = collated("right padding")
    whole = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    expected = model(**whole).logits
    model.model.register_forward_pre_hook(lambda _, args, kwargs: (args, {**kwargs, **whole}), with_kwargs=True)
    torch.testing.assert_close(model(**batch).logits, expected)
