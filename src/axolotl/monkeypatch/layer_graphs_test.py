"""What can be asked without a GPU: which runs are recorded, and how borders are rounded. The rest is in tests/gpu."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from axolotl.exceptions import ConfigError
from axolotl.monkeypatch.layer_graphs import MIN_DOCUMENTS, apply_cuda_graphs, round_up_borders, why_no_graphs
from axolotl.utils.dict import DictDefault
from tests.tiny import make_tiny_model

GPU = {"has_gpu": True, "num_processes": 1}
LORA = {"adapter": "lora", "lora_mlp_kernel": True, "lora_qkv_kernel": True, "lora_o_kernel": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    base = make_tiny_model(tmp_path_factory.mktemp("model"))
    return get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))


def test_empty_documents_fill_up_the_borders():
    borders = torch.tensor([0, 300, 900], dtype=torch.int32)
    given = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 600, "max_length_k": 600, "other": "x"}
    rounded = round_up_borders(given)
    assert rounded["cu_seq_lens_q"] is rounded["cu_seq_lens_k"]
    assert rounded["cu_seq_lens_q"].tolist() == [0, 300] + [900] * (MIN_DOCUMENTS - 1)
    assert rounded["cu_seq_lens_q"].dtype == torch.int32
    assert rounded["max_length_q"] == rounded["max_length_k"] == 1024
    assert rounded["other"] == "x"
    assert given["cu_seq_lens_q"] is borders and given["max_length_q"] == 600


@pytest.mark.parametrize("documents, wanted", [(1, 64), (64, 64), (65, 128), (129, 256), (300, 512)])
def test_few_numbers_of_documents(documents, wanted):
    borders = torch.arange(documents + 1, dtype=torch.int32)
    assert round_up_borders({"cu_seq_lens_q": borders})["cu_seq_lens_q"].numel() == wanted + 1


def test_adapters_of_small_models_are_recorded(model):
    assert why_no_graphs(DictDefault(LORA), model, **GPU) is None


@pytest.mark.parametrize(
    "keys, machine, reason",
    [
        ({}, {"has_gpu": False}, "no GPU"),
        ({}, {"num_processes": 2}, "several processes"),
        ({"torch_compile": False}, {}, "not compiled"),
        ({"torch_compile_mode": "reduce-overhead"}, {}, "a way of their own"),
        ({"activation_offloading": True}, {}, "copies"),
        ({"selective_checkpointing": {"save": ["attention"]}}, {}, "checkpointing"),
        ({"adapter": None}, {}, "gradients of all weights"),
    ],
)
def test_what_is_not_recorded(keys, machine, reason, model):
    found = why_no_graphs(DictDefault({**LORA, **keys}), model, **{**GPU, **machine})
    assert found is not None and reason in found


def test_dropout_is_not_recorded(tmp_path):
    model = get_peft_model(make_tiny_model(tmp_path), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1))
    assert why_no_graphs(DictDefault(LORA), model, **GPU) == "dropout"


def test_what_is_asked_for_and_cannot_be(model):
    with pytest.raises(ConfigError, match=r"cuda_graphs: true.*no GPU"):
        apply_cuda_graphs(DictDefault({**LORA, "cuda_graphs": True}), model, has_gpu=False, num_processes=1)
    apply_cuda_graphs(DictDefault(LORA), model, has_gpu=False, num_processes=1)  # not asked for: nothing happens
