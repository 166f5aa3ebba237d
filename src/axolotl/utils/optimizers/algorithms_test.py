"""The algorithms of this package against float64 references, written here from the papers with numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from axolotl.utils.optimizers.adamc import AdamC
from axolotl.utils.optimizers.adopt import ADOPT
from axolotl.utils.optimizers.anyprecision import AnyPrecisionAdamW
from axolotl.utils.optimizers.dion import Dion, _first_basis
from axolotl.utils.optimizers.galore import PROJECTION_DEFAULTS, GaLore, quantize
from axolotl.utils.optimizers.matrix import MatrixOptimizer
from axolotl.utils.optimizers.sinkgd import SinkGD, sinkhorn_normalise

RATES = (0.0, 0.02, 0.05, 0.04, 0.01)
DECAY = 0.1
SHAPES = ((6, 4), (4, 6), (5, 5))


def make_problem(shape, seed=0):
    """A start and one gradient per step, in float64."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape), [rng.normal(size=shape) for _ in RATES]


def run(optimizer, param, gradients, rates=RATES):
    for rate, gradient in zip(rates, gradients, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        param.grad = torch.tensor(gradient, dtype=param.dtype)
        optimizer.step()
    return param.detach().double().numpy()


def parameter(start, dtype=torch.float32):
    return nn.Parameter(torch.tensor(start, dtype=dtype))


def adam_direction(gradients, beta1=0.9, beta2=0.999, eps=1e-8):
    first = second = 0.0
    for step, gradient in enumerate(gradients, start=1):
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        yield (first / (1 - beta1**step)) / (np.sqrt(second / (1 - beta2**step)) + eps)


@pytest.mark.parametrize("kahan", [False, True])
def test_anyprecision_is_adamw(kahan):
    start, gradients = make_problem((3, 2))
    found = run(
        AnyPrecisionAdamW([param := parameter(start)], weight_decay=DECAY, use_kahan_summation=kahan), param, gradients
    )
    expected = start
    for rate, direction in zip(RATES, adam_direction(gradients), strict=True):
        expected = expected - rate * direction - rate * DECAY * expected
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_kahan_summation_keeps_what_bfloat16_loses():
    lost = {}
    for kahan in (False, True):
        param = parameter([256.0], torch.bfloat16)
        optimizer = AnyPrecisionAdamW([param], use_kahan_summation=kahan, momentum_dtype=torch.bfloat16)
        run(optimizer, param, [[1.0]] * 500, rates=[0.01] * 500)
        lost[kahan] = param.item()
    assert lost[False] == 256.0  # each step of 0.01 is below half a unit in the last place
    assert lost[True] == pytest.approx(251.0, abs=1.0)


@pytest.mark.parametrize("normalized", [True, False])
def test_adamc(normalized):
    """theta -= lr * direction + (lr^2 / max_lr or lr) * decay * theta."""
    start, gradients = make_problem((3, 2))
    param, peak = parameter(start), 0.05
    optimizer = AdamC([{"params": [param], "normalized": normalized}], lr=peak, weight_decay=DECAY)
    found = run(optimizer, param, gradients)
    expected = start
    for rate, direction in zip(RATES, adam_direction(gradients), strict=True):
        decay = rate**2 / peak if normalized else rate
        expected = expected - decay * DECAY * expected - rate * direction
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert optimizer.param_groups[0]["weight_decay"] == DECAY


def test_adopt():
    """Algorithm 2: the gradient is divided by the second moment of the step before, clipped, then averaged."""
    start, gradients = make_problem((3, 2))
    param = parameter(start)
    found = run(ADOPT([param], betas=(0.9, 0.99), eps=1e-6, weight_decay=DECAY, decouple=True), param, gradients)
    expected, first, second = start, 0.0, gradients[0] ** 2
    for step, (rate, gradient) in enumerate(zip(RATES[1:], gradients[1:], strict=True), start=1):
        normed = np.clip(gradient / np.maximum(np.sqrt(second), 1e-6), -(step**0.25), step**0.25)
        first = 0.9 * first + 0.1 * normed
        expected = expected * (1 - rate * DECAY) - rate * first
        second = 0.99 * second + 0.01 * gradient**2
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def orthogonal_columns(matrix):
    """By modified Gram-Schmidt, which gives the same span as QR; signs cancel in the update."""
    columns = []
    for column in matrix.T:
        for other in columns:
            column = column - (other @ column) * other
        columns.append(column / np.linalg.norm(column))
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_dion(shape, fraction):
    start, gradients = make_problem(shape)
    param = parameter(start)
    optimizer = Dion([param], momentum=0.9, rank_fraction=fraction, weight_decay=DECAY)
    rank = math.ceil(fraction * min(shape))
    # The first basis is drawn by the optimizer, and is all that is taken from it.
    basis = _first_basis(param, optimizer.param_groups[0]).double().numpy()
    assert basis.shape == (shape[1], rank)
    found = run(optimizer, param, gradients)
    expected, momentum, scale = start, np.zeros(shape), math.sqrt(shape[0] / shape[1])
    for rate, gradient in zip(RATES, gradients, strict=True):
        momentum = momentum + gradient
        left = orthogonal_columns(momentum @ basis)
        right = momentum.T @ left
        momentum = momentum - 0.1 * left @ right.T
        basis = right / np.linalg.norm(right, axis=0)
        expected = expected * (1 - rate * DECAY) - rate * scale * left @ basis.T
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_dion_survives_a_gradient_of_zeros_and_rounds_its_rank_up():
    param = parameter(np.ones((6, 5)))
    optimizer = Dion([param], lr=0.1, rank_fraction=0.3, rank_multiple_of=4)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(param.detach(), torch.ones(6, 5))
    assert optimizer.state[param]["Q"].shape == (5, 4)
    for _ in range(3):
        param.grad = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
        optimizer.step()
    assert torch.isfinite(param).all() and not torch.equal(param.detach(), torch.ones(6, 5))


@pytest.mark.parametrize("shape", SHAPES)
def test_sinkgd(shape):
    start, gradients = make_problem(shape)
    param = parameter(start)
    found = run(SinkGD([param], sinkhorn_iters=3, sinkgd_lr_scale=0.5, weight_decay=DECAY), param, gradients)
    expected = start
    for rate, gradient in zip(RATES, gradients, strict=True):
        for _ in range(3):
            gradient = math.sqrt(shape[1]) * gradient / np.linalg.norm(gradient, axis=1, keepdims=True)
            gradient = math.sqrt(shape[0]) * gradient / np.linalg.norm(gradient, axis=0, keepdims=True)
        expected = expected * (1 - rate * DECAY) - rate * 0.5 * gradient
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_sinkgd_leaves_rows_of_zeros_alone():
    gradient = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    gradient[1] = 0
    normed = sinkhorn_normalise(gradient, 20)
    assert torch.equal(normed[1], torch.zeros(3))
    assert normed.square().mean().sqrt() == pytest.approx(1.0)
    assert normed.norm(dim=0).tolist() == pytest.approx([2.0] * 3)


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_beside_adamw(shape):
    """Nesterov momentum, five Newton-Schulz steps, updates of AdamW's size; the rest is AdamW. torch's steps are in bf16."""
    start, gradients = make_problem(shape)
    matrix, vector = parameter(start), parameter(start[0])
    groups = [
        {"params": [matrix], "lr": 0.0, "weight_decay": DECAY, "is_matrix": True},
        {"params": [vector], "lr": 0.0, "weight_decay": 0.0, "is_matrix": False},
    ]
    optimizer = MatrixOptimizer(groups, torch.optim.Muon, {"adjust_lr_fn": "match_rms_adamw"}, {"betas": (0.9, 0.999)})
    for rate, gradient in zip(RATES, gradients, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        matrix.grad = torch.tensor(gradient, dtype=torch.float32)
        vector.grad = matrix.grad[0].clone()
        optimizer.step()
    expected, average = start, 0.0
    for rate, gradient in zip(RATES, gradients, strict=True):
        average = 0.95 * average + 0.05 * gradient
        update = 0.95 * average + 0.05 * gradient
        update = update / np.linalg.norm(update)
        for _ in range(5):
            gram = update @ update.T
            update = 3.4445 * update + (-4.775 * gram + 2.0315 * gram @ gram) @ update
        expected = expected * (1 - rate * DECAY) - rate * 0.2 * math.sqrt(max(shape)) * update
    # The travelled way, within what five steps in bf16 leave of it.
    way = np.linalg.norm(expected - start)
    assert np.linalg.norm(matrix.detach().double().numpy() - expected) < 0.05 * way
    other = start[0]
    for rate, direction in zip(RATES, adam_direction([g[0] for g in gradients]), strict=True):
        other = other - rate * direction
    np.testing.assert_allclose(vector.detach().double().numpy(), other, rtol=1e-5, atol=1e-6)


def galore(param, **projection):
    group = {"params": [param], "lr": 0.0, "weight_decay": DECAY, **PROJECTION_DEFAULTS, **projection}
    return GaLore([group], torch.optim.AdamW, {})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
def test_galore(shape, proj_type):
    """Adam on U^T G or G V^T, projected back. (The signs of singular vectors are free, and cancel.)"""
    start, gradients = make_problem(shape)
    param = parameter(start)
    found = run(galore(param, rank=2, scale=0.5, proj_type=proj_type), param, gradients)
    tall = shape[0] >= shape[1]
    is_right = {"std": tall, "reverse_std": not tall, "left": False, "right": True}[proj_type]
    expected, first, second = start, 0.0, 0.0
    for step, (rate, gradient) in enumerate(zip(RATES, gradients, strict=True), start=1):
        if step == 1:
            u, _, v = np.linalg.svd(gradient)
            basis = v[:2].T if is_right else u[:, :2]
        low = gradient @ basis if is_right else basis.T @ gradient
        first, second = 0.9 * first + 0.1 * low, 0.999 * second + 0.001 * low**2
        direction = (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        back = direction @ basis.T if is_right else basis @ direction
        expected = expected * (1 - rate * DECAY) - rate * 0.5 * back
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_galore_renews_its_space():
    start, gradients = make_problem((6, 4))
    param = parameter(start)
    optimizer, spaces = galore(param, rank=2, update_proj_gap=2), []
    for gradient in gradients:
        run(optimizer, param, [gradient], [0.01])
        vectors = optimizer.state[param]["vectors"].double().numpy()
        spaces.append(vectors.T @ vectors)
    for step in range(len(gradients)):
        right = np.linalg.svd(gradients[step - step % 2])[2][:2]
        np.testing.assert_allclose(spaces[step], right.T @ right, atol=1e-5)


def test_q_galore_renews_its_space_less_often_when_it_hardly_turns():
    start, _ = make_problem((6, 4))
    param = parameter(start)
    options = {
        "rank": 2,
        "update_proj_gap": 1,
        "cos_threshold": 0.9,
        "queue_size": 2,
        "proj_bits": 8,
        "proj_group_size": 16,
    }
    optimizer = galore(param, **options)
    run(optimizer, param, [make_problem((6, 4), seed=3)[0]] * len(RATES))
    state = optimizer.state[param]
    assert state["gap"] > 1
    assert state["codes"].dtype == torch.uint8 and "vectors" not in state


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantized_values_are_within_half_a_level(bits):
    values = torch.randn(7, 13, generator=torch.Generator().manual_seed(0))
    codes, scales, zeros = quantize(values, bits, 16)
    again = ((codes.float() - zeros) * scales).flatten()[: values.numel()].view_as(values)
    level = scales.repeat_interleave(16, dim=1).flatten()[: values.numel()].view_as(values)
    assert ((again - values).abs() <= level * 1.001).all()
    assert int(codes.max()) == 2**bits - 1


@pytest.mark.parametrize("cls", [Dion, SinkGD])
def test_only_matrices(cls):
    with pytest.raises(ValueError, match="is no matrix"):
        cls([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="invalid"):
        cls([nn.Parameter(torch.ones(3, 3))], lr=-1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_loss_scale_skips_bad_steps_and_changes_no_good_one(dtype):
    """With `GradScaler`, on the CPU: gradients are unscaled, a step with an infinite gradient is left out."""
    start, gradients = make_problem((6, 4))
    results = []
    for scaled in (False, True):
        param = parameter(start)
        groups = [{"params": [param], "lr": 0.02, "weight_decay": 0.0, "is_matrix": True}]
        optimizer = MatrixOptimizer(groups, Dion, {}, {})
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for gradient in gradients:
            value = torch.tensor(gradient, dtype=torch.float32)
            if scaled:
                param.grad = torch.full_like(value, float("inf"))
                scaler.scale(torch.ones(()))
                scaler.step(optimizer)
                scaler.update()
            param.grad = value * (scaler.get_scale() if scaled else 1.0)
            scaler.step(optimizer)
            scaler.update()
        results.append(param.detach().to(dtype))
    assert torch.equal(*results)
