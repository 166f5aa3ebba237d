"""The loss of a causal language model over a global batch, as plain functions.

In: batches of token ids and labels, a model. Out: label masks and counts that do not depend on how rows were packed or
split, and a way to run a model whose output head and cross-entropy are one memory-bounded operation.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from axolotl.core.trainers.utils import evaluation_mode
from axolotl.kernels.cross_entropy import (
    CHUNK_ELEMENTS,
    TokenLoss,
    entropy_weights,
    find_kept_rows,
    linear_cross_entropy,
)

IGNORE_INDEX = -100


def mask_document_starts(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with the labels of first tokens of packed documents masked.

    The first token of a document has no predecessor in it. In an unpacked row it never counts, because labels are
    shifted; in a packed row it would be predicted from the end of the document before.

    Args:
        batch: `labels` (B, T) int64 and, when packed, `position_ids` (B, T) that restart at 0 per document.
    """
    labels, positions = batch.get("labels"), batch.get("position_ids")
    if labels is None or positions is None or positions.shape != labels.shape:
        return batch
    return {**batch, "labels": labels.masked_fill(positions == 0, IGNORE_INDEX)}


def shift_labels(batch: Mapping[str, Any]) -> torch.Tensor:
    """Labels moved so that position t holds the token to predict at t: (B, T) int64, the last one masked."""
    if batch.get("shift_labels") is not None:
        return batch["shift_labels"]
    return F.pad(batch["labels"][..., 1:], (0, 1), value=IGNORE_INDEX)


def count_supervised_tokens(batch: Mapping[str, Any]) -> torch.Tensor:
    """Number of tokens that carry loss, a scalar int64 on the device of the labels."""
    return (shift_labels(batch) != IGNORE_INDEX).sum()


def count_tokens(batch: Mapping[str, Any], pad_token_id: int | None = None) -> torch.Tensor:
    """Number of tokens of the batch without padding, a scalar int64.

    Padding is what an attention mask says; without a mask, the pad tokens without a label at the end of each row.
    """
    ids = batch.get("input_ids")
    if ids is None:
        return torch.zeros((), dtype=torch.int64)
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape == ids.shape:
        return (mask != 0).sum()
    if pad_token_id is None or batch.get("labels") is None:
        return torch.tensor(ids.numel(), device=ids.device)
    is_pad = (ids == pad_token_id) & (batch["labels"] == IGNORE_INDEX)
    return ids.numel() - is_pad.flip(-1).long().cumprod(-1).sum()


def perplexity(loss: float) -> float:
    """exp(loss); infinite when it overflows."""
    return math.exp(loss) if loss < 700 else math.inf


@dataclass(frozen=True)
class OutputHead:
    """An output head that may be computed together with its cross-entropy.

    Args:
        model: the model that calls `head` and then `self.loss_function`.
        head: a plain `nn.Linear`.
        softcap: `softcap * tanh(x / softcap)` follows the head, or None.
        logit_scale: factor that the model puts on the logits before the softcap.
    """

    model: nn.Module
    head: nn.Linear
    softcap: float | None = None
    logit_scale: float = 1.0


def is_causal_lm(model: nn.Module) -> bool:
    """Whether the loss of an unwrapped model is that of the next token.

    transformers reads the loss from the name of the class and takes that of the next token for a name that says nothing
    (`GPT2LMHeadModel`). A model that gives no logits over the vocabulary, such as a classifier, has no output head.
    """
    if getattr(model.config, "is_encoder_decoder", False) or not hasattr(model, "get_output_embeddings"):
        return False
    loss_type = getattr(model, "loss_type", None)
    return LOSS_MAPPING.get(loss_type, ForCausalLMLoss) is ForCausalLMLoss and model.get_output_embeddings() is not None


def find_output_head(model: nn.Module) -> nn.Linear | str:
    """The output head of an unwrapped causal LM if it can be fused with the loss, else the reason why it cannot."""
    if not isinstance(getattr(type(model), "loss_function", None), property):
        return f"{type(model).__name__} has no replaceable `loss_function`"
    forward = inspect.unwrap(type(model).forward)
    if "loss_function" not in forward.__code__.co_names:
        return f"{type(model).__name__}.forward computes its loss itself"
    head = model.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper) and len(head.active_adapters) == 1:
        head = head.modules_to_save[head.active_adapters[0]]  # the copy that `lora_modules_to_save` trains
    if type(head) is not nn.Linear:
        return f"the output head is a {type(head).__name__}, not a plain nn.Linear"
    if "forward" in vars(head):
        return "the forward of the output head is already replaced"
    return head


def read_logit_formula(config: Any) -> list[tuple[float | None, float]]:
    """Candidates (softcap, scale) for what a model does to the output of its head, read from its config.

    The names mean different things in different architectures, so these are only proposals: `probe_logit_formula`
    asks the model.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    fields = text.to_dict()
    cap = fields.get("final_logit_softcapping")
    caps = [None, cap] if cap else [None]
    scales = [1.0]
    for key in ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier"):
        value = fields.get(key)
        if isinstance(value, int | float) and value:
            scales += [float(value), 1.0 / float(value)]
    return [(cap, scale) for cap in caps for scale in scales]


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context, calling `module` runs `forward`. Hooks of the module run as usual."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def probe_logit_formula(run: Callable[..., Any], model: nn.Module, head: nn.Linear) -> OutputHead | str:
    """Learn what the model does to the output of its head, by giving it outputs that we know.

    One forward pass over two tokens, in eval mode and without gradients. Nothing of the random state is used.

    Args:
        run: the callable to run, the wrapped model during training.
        model: the unwrapped model, whose config proposes formulas.
        head: its output head.
    """
    device = head.weight.device
    given: list[torch.Tensor] = []

    def known_logits(hidden: torch.Tensor) -> torch.Tensor:
        ramp = torch.linspace(-60.0, 60.0, head.out_features, device=hidden.device, dtype=torch.float32)
        given.append(ramp.expand(*hidden.shape[:-1], -1).to(hidden.dtype))
        return given[-1].clone()

    with evaluation_mode(model), replaced_forward(head, known_logits):
        ids = torch.zeros((1, 2), dtype=torch.int64, device=device)
        seen = run(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    if len(given) != 1 or given[0].shape != seen.shape:
        return "the model does not return the output of its head as logits"
    known = given[0].float()
    tolerance = 1e-5 if given[0].dtype == torch.float32 else 2e-2
    for cap, scale in read_logit_formula(model.config):
        expected = known * scale
        if cap is not None:
            expected = cap * torch.tanh(expected / cap)
        if torch.allclose(seen.float(), expected, rtol=tolerance, atol=tolerance):
            return OutputHead(model, head, cap, scale)
    return "the model changes its logits in a way that is not known here"


def chunk_limit(num_rows: int, num_columns: int, num_chunks: int | None) -> int | None:
    """Logits that may exist at once where `num_chunks` pieces of the rows are asked for; None leaves it to the loss."""
    if num_chunks is None:
        return None
    return min(CHUNK_ELEMENTS, math.ceil(num_rows / num_chunks) * num_columns)


@contextlib.contextmanager
def fused_loss(
    output_head: OutputHead,
    labels_BT: torch.Tensor,
    num_items: torch.Tensor | int,
    num_chunks: int | None = None,
    kind: TokenLoss | None = None,
    kept_S: torch.Tensor | None = None,
) -> Iterator[None]:
    """Within the context, the model's own loss is the fused one, and its `logits` are an empty placeholder.

    Two reversible attributes: the head's `forward` computes the loss where the logits would have been made, and the
    model's `loss_function` hands it over. All of it happens inside the model's forward, so that wrappers (DDP, FSDP,
    autocast, peft) see an ordinary output that carries the gradient.

    Args:
        output_head: from `probe_logit_formula`.
        labels_BT: shifted labels, int64.
        num_items: the token losses are summed and divided by this.
        num_chunks: pieces that the rows go through the head in, at least; None for as many as memory asks for.
        kind: what the loss of a token is; what the model does to its logits is filled in.
        kept_S: `find_kept_rows` of the labels, if the caller has it.
    """
    kind = replace(kind or TokenLoss(), softcap=output_head.softcap, logit_scale=output_head.logit_scale)
    sums: list[torch.Tensor] = []
    head, model = output_head.head, output_head.model
    # Asked before the model runs: a GPU that has to answer in between waits for its next kernels.
    kept_S = find_kept_rows(labels_BT) if kept_S is None else kept_S

    def head_and_loss(hidden_BTH: torch.Tensor) -> torch.Tensor:
        limit = chunk_limit(labels_BT.numel(), head.out_features, num_chunks)
        loss = linear_cross_entropy(
            hidden_BTH, head.weight, labels_BT, bias_V=head.bias, chunk_elements=limit, kept_S=kept_S, **vars(kind)
        )
        sums.append(loss)
        return hidden_BTH.detach()[..., :1]

    own_loss_function = vars(model).get("_loss_function")
    model.loss_function = lambda *args, **kwargs: sums.pop() / num_items
    try:
        with replaced_forward(head, head_and_loss):
            yield
    finally:
        if own_loss_function is None:
            del model._loss_function
        else:
            model.loss_function = own_loss_function


def cross_entropy_of_logits(
    logits_BTV: torch.Tensor, labels_BT: torch.Tensor, kind: TokenLoss | None = None
) -> torch.Tensor:
    """Sum of the token losses from logits and shifted labels. Only supervised rows are brought to fp32.

    Args:
        kind: what the loss of a token is. The logits are those that the model returns: it has scaled and capped them.
    """
    kind = kind or TokenLoss()
    labels_BT = labels_BT.to(logits_BTV.device)
    kept = labels_BT != IGNORE_INDEX
    logits, labels = logits_BTV[kept].float(), labels_BT[kept]
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=kind.label_smoothing)
    if kind.token_scaling:
        losses = losses * torch.exp(-F.cross_entropy(logits.detach(), labels, reduction="none"))
    if kind.entropy_top_k:
        losses = losses * entropy_weights(logits, kind)[:, 0]
    return losses.sum()
