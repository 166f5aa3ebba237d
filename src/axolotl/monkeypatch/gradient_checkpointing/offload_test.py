"""The two documented checkpoints, and the disk behind one of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from axolotl.monkeypatch.gradient_checkpointing import CPU_Offloaded_Gradient_Checkpointer, Disco, DiskOffloadManager


class Layer(nn.Module):
    def __init__(self, returns_tuple: bool = False):
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.returns_tuple = returns_tuple

    def forward(self, x, scale=1.0, bias=None):
        x = F.dropout(torch.tanh(self.linear(x)) * scale, 0.5, self.training)
        x = x if bias is None else x + bias
        return (x, None) if self.returns_tuple else x


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("returns_tuple", [False, True])
@pytest.mark.parametrize("checkpoint", [CPU_Offloaded_Gradient_Checkpointer, Disco])
def test_gradients_are_those_of_a_plain_layer(checkpoint, returns_tuple, autocast):
    torch.manual_seed(0)
    layers = [Layer(returns_tuple) for _ in range(3)]
    x = torch.randn(4, 16, requires_grad=True)
    bias = torch.randn(16, requires_grad=True)

    def run(call):
        torch.manual_seed(1)
        for tensor in (x, bias, *(p for layer in layers for p in layer.parameters())):
            tensor.grad = None
        hidden = x
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for layer in layers:
                out = call(layer, hidden)
                hidden = out[0] if returns_tuple else out
        hidden.float().square().sum().backward()
        grads = [x.grad, bias.grad, *(p.grad for layer in layers for p in layer.parameters())]
        return [hidden.detach(), *(grad.clone() for grad in grads)]

    expected = run(lambda layer, hidden: layer(hidden, 0.5, bias))
    got = run(lambda layer, hidden: checkpoint.apply(layer, hidden, 0.5, bias))
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 5),
        torch.randn(3, 5).to(torch.bfloat16),
        torch.randn(4, 6).t(),
        torch.randn(8)[::2],
        torch.tensor(2.5),
        torch.randn(0, 4),
        torch.arange(7, dtype=torch.int64),
    ],
)
def test_tensors_come_back_from_disk_as_they_were(tensor, tmp_path):
    manager = DiskOffloadManager(directory=str(tmp_path))
    name = manager.save_tensor(tensor)
    manager.wait_for_save(name)
    back = manager.load_tensor(name)
    assert back.dtype == tensor.dtype and torch.equal(back, tensor)
    manager.cleanup_tensor(name)
    manager.cleanup_tensor(name)
    manager.cleanup()


def test_what_was_saved_is_what_the_tensor_was_then(tmp_path):
    manager = DiskOffloadManager(directory=str(tmp_path))
    tensor = torch.ones(1000)
    names = []
    for number in range(20):
        tensor.fill_(number)
        names.append(manager.save_tensor(tensor))
    for number, name in reversed(list(enumerate(names))):
        assert torch.equal(manager.load_tensor(name), torch.full((1000,), float(number)))
        manager.cleanup_tensor(name)
    again = manager.save_tensor(tensor)
    manager.wait_for_save(again)
    assert manager.num_bytes <= 20 * 4000, "freed pieces are used again"
    manager.cleanup()


def run_script(body: str, directory) -> subprocess.CompletedProcess[str]:
    script = "import os, signal, resource, torch\n"
    script += "from axolotl.monkeypatch.gradient_checkpointing import DiskOffloadManager\n" + textwrap.dedent(body)
    environment = {**os.environ, "TMPDIR": str(directory)}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)


def test_a_killed_process_leaves_nothing_on_the_disk(tmp_path):
    done = run_script(
        """
        manager = DiskOffloadManager()
        for name in [manager.save_tensor(torch.ones(10_000)) for _ in range(5)]:
            manager.wait_for_save(name)
        assert manager.num_bytes == 200_000
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        tmp_path,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path for path in tmp_path.iterdir() if path.name.startswith("axolotl")] == []


def test_a_full_disk_is_said_with_its_place(tmp_path):
    done = run_script(
        """
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        manager = DiskOffloadManager()
        manager.load_tensor(manager.save_tensor(torch.ones(10_000)))  # in memory until it is written
        for _ in range(100):
            manager.save_tensor(torch.ones(10_000))
        """,
        tmp_path,
    )
    assert "OutputError" in done.stderr and str(tmp_path) in done.stderr and "TMPDIR" in done.stderr
