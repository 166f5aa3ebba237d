"""Matrix optimizers on matrices that two processes hold in parts: the update is that of the whole matrix."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from axolotl.utils.optimizers.dion import Dion
from axolotl.utils.optimizers.matrix import MatrixOptimizer
from axolotl.utils.optimizers.sinkgd import SinkGD
from tests.integration.training_runs import run_on_ranks

# torch's Muon computes in bfloat16, in another order on parts.
CASES = ((Dion, {"rank_fraction": 0.5}, 1e-6), (SinkGD, {}, 1e-6), (torch.optim.Muon, {}, 0.02))


def step_both_ways(_: Path) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(6, 4, generator=generator) for _ in range(4))

    def run(cls, kwargs, place):
        param = torch.nn.Parameter(place(start))
        group = {"params": [param], "lr": 0.1, "weight_decay": 0.1, "is_matrix": True}
        optimizer = MatrixOptimizer([group], cls, kwargs, {})
        for gradient in gradients:
            param.grad = place(gradient)
            optimizer.step()
        return param.detach()

    for cls, kwargs, tolerance in CASES:
        whole = run(cls, kwargs, torch.clone)
        for dim in (0, 1):
            parts = run(cls, kwargs, lambda tensor, dim=dim: distribute_tensor(tensor.clone(), mesh, [Shard(dim)]))
            torch.testing.assert_close(parts.full_tensor(), whole, rtol=tolerance, atol=tolerance)


def test_sharded_matrices(tmp_path):
    run_on_ranks(step_both_ways, tmp_path)
