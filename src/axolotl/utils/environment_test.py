from __future__ import annotations

import pytest
import torch

from axolotl.utils import environment
from axolotl.utils.bench import check_cuda_device, get_gpu_memory_usage


class TestMachine:
    def test_capabilities(self):
        facts = environment.machine_capabilities()
        assert set(facts) == {"bf16", "fp8", "tf32", "n_gpu", "n_node", "compute_capability"}
        assert facts["n_gpu"] == torch.cuda.device_count()
        assert (facts["compute_capability"] is None) == (not torch.cuda.is_available())

    def test_torch_version_has_no_suffix(self):
        assert torch.__version__.startswith(environment.env_capabilities()["torch_version"])
        assert "+" not in environment.env_capabilities()["torch_version"]

    def test_the_cpu_can_be_forced(self, monkeypatch):
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        assert environment.find_device_type() == "cpu"
        assert environment.machine_capabilities()["n_gpu"] == 0

    @pytest.mark.parametrize(
        ("facts", "has"),
        [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx2": True, "amx_bf16": False}, False)],
    )
    def test_bf16_units_of_the_cpu(self, monkeypatch, facts, has):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: facts, raising=False)
        assert environment.cpu_computes_in_bf16() is has

    def test_free_host_memory_is_a_size_of_this_machine(self):
        assert 0 < environment.free_host_memory() < 2**50


class TestBench:
    @pytest.mark.parametrize("device", [None, "auto", "cpu", torch.device("cpu"), "meta"])
    def test_what_is_no_cuda_device_is_not_measured(self, device, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

        @check_cuda_device("default")
        def measure(device):
            return "measured"

        assert measure(device) == measure(device=device) == "default"
        assert measure("cuda:1") == measure(0) == measure(torch.device("cuda")) == "measured"

    def test_without_cuda_everything_is_the_default(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert check_cuda_device(7)(lambda device: 8)("cuda:0") == 7

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
    def test_memory_of_no_gpu(self):
        assert get_gpu_memory_usage() == (0.0, 0.0, 0.0)
