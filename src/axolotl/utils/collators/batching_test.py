from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from axolotl.exceptions import TokenizerError
from axolotl.utils.collators.batching import (
    BatchSamplerDataCollatorForSeq2Seq,
    DataCollatorForSeq2Seq,
    PretrainingBatchSamplerDataCollatorForSeq2Seq,
    V2BatchSamplerDataCollatorForSeq2Seq,
)
from axolotl.utils.collators.build import build_collator
from axolotl.utils.collators.mamba import MambaDataCollator
from axolotl.utils.dict import DictDefault


def make_tokenizer():
    vocab = {"<pad>": 0, "a": 1}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, "a")), pad_token="<pad>")


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def row(*ids, masked=0):
    return {
        "input_ids": list(ids),
        "labels": [-100] * masked + list(ids[masked:]),
        "attention_mask": [1] * len(ids),
        "length": len(ids),
    }


def test_rows_are_padded(tokenizer):
    batch = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=4)([row(5, 6, 7, masked=1), row(8, 9)])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [8, 9, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100], [8, 9, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    assert all(value.dtype == torch.int64 for value in batch.values())


def test_padding_side_of_the_tokenizer(tokenizer):
    tokenizer.padding_side = "left"
    batch = DataCollatorForSeq2Seq(tokenizer)([row(5, 6, 7), row(8, 9)])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 8, 9]]
    assert batch["labels"].tolist() == [[5, 6, 7], [-100, 8, 9]]


def test_arrays_and_tensors_are_rows_too(tokenizer):
    as_lists = DataCollatorForSeq2Seq(tokenizer)([row(5, 6), row(8)])
    arrays = [{k: np.asarray(v) for k, v in r.items()} for r in (row(5, 6), row(8))]
    assert DataCollatorForSeq2Seq(tokenizer)(arrays)["input_ids"].tolist() == as_lists["input_ids"].tolist()


def test_no_pad_token_is_said(tokenizer):
    tokenizer.pad_token = None
    with pytest.raises(TokenizerError, match="no pad token"):
        DataCollatorForSeq2Seq(tokenizer)([row(5, 6), row(8)])


def test_padding_is_cut_into_documents_no_longer_than_the_others(tokenizer):
    rows = [[row(*range(1, 301)), row(*range(1, 11))], [row(5)]]
    batch = V2BatchSamplerDataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=1000, varlen=True)(rows)
    assert batch["cu_seq_lens_q"].diff().tolist() == [300, 10, 300, 300, 90, 1, 300, 300, 300, 99]
    assert batch["max_length_q"] == 300
    empty = V2BatchSamplerDataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=600, varlen=True)([[row(5)], []])
    assert empty["cu_seq_lens_q"].diff().tolist() == [1, 256, 256, 87, 256, 256, 88]


def test_bins_become_rows(tokenizer):
    batch = V2BatchSamplerDataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8, varlen=True)(
        [[row(1, 2, 3), row(4, 5)], [row(6, 7, 8, 9)]]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 0, 0, 0], [6, 7, 8, 9, 0, 0, 0, 0]]
    assert batch["labels"].tolist()[0] == [-100, 2, 3, -100, 5, -100, -100, -100]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 8, 12, 16]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == 4
    assert isinstance(batch["max_length_k"], int)
    assert "attention_mask" not in batch


def test_documents_are_numbered_in_the_mask(tokenizer):
    bins = [[row(1, 2), row(3)], [row(4)]]
    assert V2BatchSamplerDataCollatorForSeq2Seq(tokenizer)(bins)["attention_mask"].tolist() == [[1, 1, 2], [1, 0, 0]]
    assert BatchSamplerDataCollatorForSeq2Seq(tokenizer)(bins)["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    squashed = V2BatchSamplerDataCollatorForSeq2Seq(tokenizer, squash_position_ids=True)(bins)
    assert squashed["position_ids"].tolist()[0] == [0, 1, 2]


def test_flat_rows_are_one_bin(tokenizer):
    batch = BatchSamplerDataCollatorForSeq2Seq(tokenizer, padding=False)([row(1, 2), row(3, 4)])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[-100, 2, -100, 4]]


def test_an_empty_bin_is_all_padding(tokenizer):
    batch = V2BatchSamplerDataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=4, varlen=True)([[]])
    assert batch["labels"].tolist() == [[-100] * 4]
    assert batch["cu_seq_lens_q"].tolist() == [0, 4]


def test_given_positions_are_kept(tokenizer):
    posed = [{**row(1, 2, 3), "position_ids": [0, 50, 51]}, {**row(4, 5), "position_ids": [0, 9]}]
    batch = V2BatchSamplerDataCollatorForSeq2Seq(tokenizer, varlen=True)([posed])
    assert batch["position_ids"].tolist() == [[0, 50, 51, 0, 9]]
    assert batch["cu_seq_lens_k"].tolist() == [0, 3, 5]


def test_pretraining_rows_as_one_text(tokenizer):
    collator = PretrainingBatchSamplerDataCollatorForSeq2Seq(tokenizer, multipack_attn=False)
    batch = collator([[row(1, 2), row(3, 4)]])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[-100, 2, 3, 4]]
    assert collator([[row(1, 2)], []])["labels"].tolist() == [[-100, 2], [-100, -100]]


def test_columns_are_rows_of_one_bin(tokenizer):
    rows = [row(1, 2), row(3, 4, 5)]
    columns = {name: [one[name] for one in rows] for name in rows[0]}
    collator = PretrainingBatchSamplerDataCollatorForSeq2Seq(tokenizer)
    for name, value in collator([rows]).items():
        assert torch.equal(collator(columns)[name], value)


def test_decoder_inputs_of_an_encoder_decoder(tokenizer):
    config = {"vocab_size": 16, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**config, decoder_start_token_id=0))
    batch = DataCollatorForSeq2Seq(tokenizer, model=model)([row(5, 6), row(7)])
    assert batch["decoder_input_ids"].tolist() == [[0, 5], [0, 7]]


numbers = st.integers(1, 63)
documents_ = st.lists(
    st.lists(numbers, min_size=1, max_size=12).flatmap(
        lambda ids: st.integers(0, len(ids)).map(lambda masked: row(*ids, masked=masked))
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(documents_, min_size=1, max_size=3), st.sampled_from([None, 16, 64]))
def test_borders_give_the_documents_back(bins, multiple):
    tokenizer = make_tokenizer()
    batch = V2BatchSamplerDataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=multiple, varlen=True)(bins)
    numbered = V2BatchSamplerDataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=multiple)(bins)
    borders = batch["cu_seq_lens_q"].tolist()
    assert (borders[0], borders[-1]) == (0, batch["input_ids"].numel())
    assert batch["max_length_q"] == max(np.diff(borders))
    wanted = iter([document for bin_ in bins for document in bin_])
    for start, stop in itertools.pairwise(borders):
        flat = {name: batch[name].flatten()[start:stop].tolist() for name in ("input_ids", "labels", "position_ids")}
        assert flat["position_ids"] == list(range(stop - start))
        (number,) = set(numbered["attention_mask"].flatten()[start:stop].tolist())
        if number == 0:  # padding
            assert set(flat["input_ids"]) == {0}
            assert set(flat["labels"]) == {-100}
            continue
        document = next(wanted)
        assert flat["input_ids"] == document["input_ids"]
        assert flat["labels"] == [-100, *document["labels"][1:]]
    assert next(wanted, None) is None


def test_mamba(tokenizer):
    batch = MambaDataCollator(tokenizer)([row(1, 2), row(3)])
    assert batch["labels"].tolist() == [[1, 2], [3, -100]]
    assert set(batch) == {"input_ids", "labels"}


@pytest.mark.parametrize(
    "cfg, width",
    [
        ({"pad_to_sequence_len": True, "attn_implementation": "sdpa"}, 128),
        ({"pad_to_sequence_len": True, "attn_implementation": "flash_attention_2"}, 256),
        ({"pad_to_sequence_len": None}, 64),
        ({"pad_to_sequence_len": False}, 5),
        ({"pad_to_multiple_of": 10}, 10),
    ],
)
def test_padding_rules(tokenizer, cfg, width):
    cfg = DictDefault(sequence_len=100, micro_batch_size=2, sample_packing=True, **cfg)
    features = [[row(1, 2, 3), row(4, 5)]]
    assert build_collator(cfg, tokenizer)(features)["input_ids"].shape == (1, width)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).double().eval()


def token_loss(model, batch):
    """Sum of token losses and number of trained tokens."""
    inputs = {name: value for name, value in batch.items() if name in ("input_ids", "position_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return loss.item(), int((labels != -100).sum())


@pytest.mark.parametrize("multiple", [None, 64])
def test_packed_loss_is_unpacked_loss(tokenizer, model, multiple):
    rng = np.random.default_rng(0)
    documents = [row(*rng.integers(1, 64, n).tolist(), masked=int(rng.integers(0, n))) for n in (7, 1, 12, 3, 20, 2)]
    loss, count = token_loss(model, DataCollatorForSeq2Seq(tokenizer)(copy.deepcopy(documents)))
    bins = [documents[:2], documents[2:5], documents[5:]]
    for collator in (
        V2BatchSamplerDataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=multiple, drop_attention_mask=True),
        BatchSamplerDataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=multiple, drop_attention_mask=True),
    ):
        packed = token_loss(model, collator(bins))
        assert packed[1] == count
        assert packed[0] == pytest.approx(loss, rel=1e-12)
    flat = BatchSamplerDataCollatorForSeq2Seq(tokenizer, padding=False, drop_attention_mask=True)(documents)
    assert token_loss(model, flat) == (pytest.approx(loss, rel=1e-12), count)
