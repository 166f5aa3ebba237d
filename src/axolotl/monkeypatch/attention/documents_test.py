"""Packed and padded batches give the loss and the gradients of each document alone, on every backend that runs here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from axolotl.exceptions import ModelError
from axolotl.monkeypatch.attention import varlen
from axolotl.monkeypatch.attention.documents import add_document_hook, cu_seq_lens, document_starts, register_masks
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


@pytest.mark.parametrize("implementation", [varlen.NAME, "sdpa", "eager"])
def test_every_form_of_batch_equals_each_document_alone(alone, implementation: str) -> None:
    architecture, folder, total, grads = alone
    if architecture in ("gemma2", "gpt_oss") and implementation == "sdpa":
        pytest.skip(f"transformers has no sdpa for {architecture}")
    model = load(folder, implementation)
    for form in FORMS:
        loss, ours = loss_and_grads(model, batch_of(form))
        assert loss == pytest.approx(total, rel=1e-5), form
        for name, grad in grads.items():
            torch.testing.assert_close(
                ours[name],
                grad,
                rtol=1e-4,
                atol=1e-5 * float(grad.abs().max()),
                msg=lambda m, n=name, f=form: f"{f}, {n}: {m}",
            )


@pytest.mark.slow
def test_flex_attention_keeps_documents_apart(tmp_path: Path) -> None:
    """On a CPU flex attention has no backward pass; its loss must be right all the same."""
    make_tiny_model(tmp_path, "mistral")
    exact, flex = load(tmp_path, "eager"), load(tmp_path, "flex_attention")
    batch = {name: value for name, value in batch_of("with a mask of ones").items() if name != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(flex(**batch).logits, exact(**batch).logits, rtol=1e-4, atol=1e-4)


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


def test_starts_and_borders() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    starts, packed = document_starts(positions, None)
    assert packed
    assert starts.tolist() == [[True, False, False, True, False], [True, True, False, False, False]]
    borders, longest = cu_seq_lens(starts)
    assert borders.tolist() == [0, 3, 5, 6, 10]
    assert borders.dtype == torch.int32
    assert longest == 4


@pytest.mark.parametrize(
    ("positions", "mask", "expected"),
    [
        ([[0, 1, 2, 3]], None, None),
        ([[0, 1, 5, 6]], None, None),
        (None, [[1, 1, 1, 1]], None),
        (None, [[1, 1, 0, 0]], [[True, False, True, False]]),
        (None, [[0, 0, 1, 1]], [[True, False, True, False]]),
        (None, [[1, 0, 1, 1]], None),
        ([[0, 1, 0, 1]], [[1, 1, 1, 0]], [[True, False, True, True]]),
    ],
)
def test_starts_of_padded_rows(positions, mask, expected) -> None:
    starts, _ = document_starts(*(None if value is None else torch.tensor(value) for value in (positions, mask)))
    assert (None if starts is None else starts.tolist()) == expected


def test_packed_documents_with_holes_are_refused() -> None:
    with pytest.raises(ModelError, match="padding inside"):
        document_starts(torch.tensor([[0, 1, 2, 0, 1]]), torch.tensor([[1, 0, 1, 1, 1]]))
