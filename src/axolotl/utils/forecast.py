"""How much memory a training step needs on one GPU, from shapes alone.

The peak of a step is what stays (weights, adapters, gradients, optimizer states) plus what the forward pass keeps for the
backward pass, plus the largest thing that exists for a moment (the loss, or the backward of one layer). Every function
here is plain arithmetic in bytes on numbers of elements. Legend: T tokens of a micro-batch, H hidden size, I intermediate
size, A attention heads x head size, K key/value heads x head size, V vocabulary, c bytes of the compute dtype.

Following the accounting of Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models"
(https://arxiv.org/abs/2205.05198), extended to frozen weights, adapters and fused kernels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

GIB = 2**30

# Memory that a program can use, in GiB, by the name people call the card.
GPUS: dict[str, float] = {
    "b200": 179.0, "h200": 139.8, "h100": 79.2, "h100-nvl": 93.1, "gh200": 95.0, "h20": 95.6, "a100-80gb": 79.2,
    "a100": 39.4, "a100-40gb": 39.4, "a40": 44.4, "a30": 23.5, "a10": 22.1, "a10g": 22.1, "l40s": 44.4, "l40": 44.4,
    "l4": 22.0, "t4": 14.7, "v100": 15.8, "v100-32gb": 31.7, "rtx-pro-6000": 94.9, "rtx6000-ada": 47.4, "a6000": 47.4,
    "rtx5090": 31.4, "rtx5080": 15.5, "rtx4090": 23.5, "rtx4080": 15.7, "rtx4070": 11.7, "rtx3090": 23.6,
    "rtx3080": 9.8, "rtx3060": 11.8,
}  # fmt: skip

# Bytes of optimizer state per trained parameter, given the bytes of one parameter.
OPTIMIZER_BYTES: dict[str, Callable[[int], float]] = {
    "adamw": lambda p: 2 * p, "adamw_torch": lambda p: 2 * p, "adamw_torch_fused": lambda p: 2 * p,
    "adamw_hf": lambda p: 2 * p, "adamw_apex_fused": lambda p: 2 * p, "adamw_anyprecision": lambda p: 2 * p,
    "optimi_adamw": lambda p: 2 * p + 2, "schedule_free_adamw": lambda p: 2 * p, "ademamix": lambda p: 3 * p,
    "adamw_bnb_8bit": lambda p: 2.03, "adamw_8bit": lambda p: 2.03, "ademamix_8bit": lambda p: 3.05,
    "paged_adamw": lambda p: 2 * p, "paged_adamw_32bit": lambda p: 8.0, "paged_adamw_8bit": lambda p: 2.03,
    "adamw_torch_8bit": lambda p: 2.03, "ao_adamw_8bit": lambda p: 2.03, "ao_adamw_fp8": lambda p: 2.03,
    "adamw_torch_4bit": lambda p: 1.06, "ao_adamw_4bit": lambda p: 1.06,
    "lion": lambda p: p, "lion_32bit": lambda p: 4.0, "lion_pytorch": lambda p: p, "lion_8bit": lambda p: 1.02,
    "paged_lion_8bit": lambda p: 1.02, "paged_lion_32bit": lambda p: 4.0,
    "adafactor": lambda p: 0.02, "came_pytorch": lambda p: p + 0.04, "muon": lambda p: p, "dion": lambda p: p,
    "sgd": lambda p: 0.0, "adagrad": lambda p: p, "rmsprop": lambda p: p, "rmsprop_bnb_8bit": lambda p: 1.02,
    "rmsprop_bnb": lambda p: 4.0, "rmsprop_bnb_32bit": lambda p: 4.0, "paged_ademamix_32bit": lambda p: 12.0,
    "paged_ademamix_8bit": lambda p: 3.05, "schedule_free_radam": lambda p: 2 * p, "schedule_free_sgd": lambda p: p,
    "sinkgd": lambda p: 0.0, "lomo": lambda p: 0.0, "adalomo": lambda p: 0.02, "grokadamw": lambda p: 0.0,
    "flash_adamw": lambda p: 2.1 + (1 if p == 2 else 0), "flash_adam": lambda p: 2.1 + (1 if p == 2 else 0),
    "flash_lion": lambda p: 1.05 + (1 if p == 2 else 0), "flash_sgd": lambda p: 1 if p == 2 else 0.0,
    "flash_sgdw": lambda p: 1 if p == 2 else 0.0,
}  # fmt: skip

CONTEXT_BYTES = 0.6 * GIB  # CUDA context, cuBLAS and NCCL workspaces, loaded kernels
FRAGMENTATION = 0.03  # of what comes and goes; measured runs reserve 2 to 5 % above what they allocate
LOSS_CHUNK_ELEMENTS = 2**26  # logits that the chunked loss holds at once (axolotl.kernels.cross_entropy)


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer.

    Args:
        hidden: H. intermediate: I, of one expert where there are experts.
        attention: A. key_value: K.
        active_experts: experts that each token goes through; 1 for a dense MLP.
        gated: whether the MLP has a gate (SwiGLU, GeGLU) beside its up projection.
        num_norms: normalisations over H in the layer.
        linear_inputs: features per token of the inputs that the linear layers keep because their weight, or an adapter on
            it, is trained, without those counted elsewhere (`linear_input_features`).
    """

    hidden: int
    intermediate: int
    attention: int
    key_value: int
    active_experts: int = 1
    gated: bool = True
    num_norms: int = 2
    linear_inputs: int = 0


@dataclass(frozen=True)
class Run:
    """Everything that the forecast depends on.

    Args:
        tokens: T, tokens of one micro-batch on one GPU. row_length: length of the rows that attention sees.
        num_params, num_trained, num_quantized: elements of the model with adapters, of what is trained, and of the linear
            weights that `weight_bits` applies to.
        weight_bytes, trained_bytes: bytes of one frozen weight and of one trained weight; `full` training trains weights.
        weight_bits: 16 for unquantized linear weights, else 8 or 4.
        head_trained: whether the output head's weight gets a gradient.
        num_sequences_factor: forward passes whose activations are alive at once (2 for paired preference losses).
        reference_copy: a second, frozen model is in memory.
        checkpoint_every: every how many layers are checkpointed; the others keep all.
        keeps_attention: selective checkpointing keeps the results of attention; keeps_on_host: in host memory.
        mlp_tiles: pieces of the sequence that an MLP runs over.
        loss_chunks: pieces of the rows that head and loss run over, at least.
        layers_on_host: the frozen weights of the layers wait in host memory.
        shard_weights, shard_gradients, shard_optimizer: over how many GPUs each is split.
    """

    layer: LayerShape
    num_layers: int
    vocab: int
    tokens: int
    row_length: int
    num_params: int
    num_trained: int
    num_quantized: int = 0
    largest_linear: int = 0
    embedding_params: int = 0
    is_adapter: bool = False
    compute_bytes: int = 2
    weight_bytes: int = 2
    trained_bytes: int = 2
    weight_bits: int = 16
    double_quant: bool = True
    optimizer: str = "adamw_torch_fused"
    checkpointing: bool = False
    offload: bool = False
    checkpoint_every: int = 1
    keeps_attention: bool = False
    keeps_on_host: bool = False
    mlp_tiles: int = 1
    loss_chunks: int = 1
    layers_on_host: bool = False
    attention_kind: Literal["flash", "eager"] = "flash"
    num_heads: int = 1
    fused_norm: bool = False
    fused_glu: Literal["no", "glu", "mlp"] = "no"
    fused_loss: bool = True
    head_trained: bool = True
    num_sequences_factor: int = 1
    reference_copy: bool = False
    shard_weights: int = 1
    shard_gradients: int = 1
    shard_optimizer: int = 1


@dataclass(frozen=True)
class Forecast:
    """Peak bytes of one GPU, by part."""

    weights: float
    adapters: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    overhead: float

    @property
    def parts(self) -> dict[str, float]:
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}

    @property
    def allocated(self) -> float:
        """What `torch.cuda.max_memory_allocated` would report."""
        return self.total - self.overhead

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def bytes_per_quantized_weight(bits: int, double_quant: bool = True) -> float:
    """Bytes of one weight with its scales.

    4 bits: half a byte, and for each block of 64 weights one absmax, 4 bytes, or with double quantization 1 byte and for
    each 256 blocks 4 bytes (Dettmers et al., https://arxiv.org/abs/2305.14314, section 3). 8 bits: one byte; the scale of
    a row is negligible.
    """
    if bits == 8:
        return 1.0
    return 0.5 + (1 / 64 + 4 / (64 * 256) if double_quant else 4 / 64)


def norm_bytes(run: Run) -> float:
    """Bytes per token that one RMSNorm keeps for its backward.

    Fused: its input, cH. Written out as transformers does: the input in float32, 4H, which for half types is a copy of
    its own, and, when the norm's weight is trained, the normalised values, cH. The reciprocal root adds 4 bytes.
    """
    layer = run.layer
    if run.fused_norm:
        return run.compute_bytes * layer.hidden + 4
    weight_trained = not run.is_adapter
    return 4 * layer.hidden + (run.compute_bytes * layer.hidden if weight_trained else 0) + 4


def attention_bytes(run: Run) -> float:
    """Bytes per token that attention keeps.

    A flash kernel keeps q, k, v, its output and one float32 logsumexp per head: c(2A + 2K) + 4 heads, whatever the
    length (Dao, https://arxiv.org/abs/2307.08691). Eager attention instead keeps repeated keys and values and, per
    head, a row of probabilities in float32, its cast and (with half types) the cast's source: about (4 + c) x length.
    """
    layer, c = run.layer, run.compute_bytes
    if run.attention_kind == "flash":
        return c * (2 * layer.attention + 2 * layer.key_value) + 4 * run.num_heads
    return c * 4 * layer.attention + run.num_heads * run.row_length * (4 + c)


def mlp_bytes(run: Run) -> float:
    """Bytes per token that the activation of the MLP keeps, without inputs of linear layers.

    Written out, `act(gate) * up` keeps gate, act(gate) and up: 3cI. A fused GLU recomputes act(gate): 2cI. Without a gate
    the activation keeps its input: cI. Each active expert does this on its own tokens.
    """
    layer, c = run.layer, run.compute_bytes
    tensors = (3 if run.fused_glu == "no" else 2) if layer.gated else 1
    return c * layer.intermediate * tensors * layer.active_experts


def layer_bytes(run: Run) -> float:
    """Bytes per token that one decoder layer keeps for its backward.

    Norms + attention + MLP + inputs of linear layers. A linear layer keeps its input only to compute the gradient of its
    own weight: frozen ones keep nothing, an adapter's A keeps its input, in a copy of its own when it was cast. Residual
    additions and rotary embeddings (whose factors need no gradient) keep nothing.
    """
    # A tiled MLP keeps its input (counted with the linear layers that train) and is computed again in the backward pass.
    mlp = mlp_bytes(run) if run.mlp_tiles <= 1 else 0
    kept = run.layer.num_norms * norm_bytes(run) + attention_bytes(run) + mlp
    return kept + run.compute_bytes * run.layer.linear_inputs


def activation_bytes(run: Run) -> float:
    """Bytes that the forward pass keeps, and what the hardest moment of the backward pass adds beyond the loss.

    Without checkpointing every layer keeps what it needs; the backward of one layer adds the gradients of its widest
    intermediates (3cI for a gated MLP). With checkpointing each layer keeps only its input, cH, and the moment is one
    layer, recomputed in full, with its backward. Offloading moves the kept inputs to the CPU, of which two are in flight.
    Selective checkpointing also keeps what attention gave, cA and its logsumexp.
    The loss is over when the layers' backward begins, so only the larger of the two moments counts.
    """
    layer, c = run.layer, run.compute_bytes
    tokens = run.tokens * run.num_sequences_factor
    one = layer_bytes(run)
    moment = c * layer.intermediate * layer.active_experts * (3 if layer.gated else 2)
    if run.mlp_tiles > 1:
        moment = (moment + mlp_bytes(run)) / run.mlp_tiles
    if run.checkpointing:
        recomputed = math.ceil(run.num_layers / run.checkpoint_every)
        kept = c * layer.hidden * (min(2, recomputed) if run.offload else recomputed)
        if run.keeps_attention:
            kept += (c * layer.attention + 4 * run.num_heads) * (2 if run.keeps_on_host else recomputed)
        kept += one * (run.num_layers - recomputed)
        moment += one
    else:
        kept = one * run.num_layers
    final_norm = norm_bytes(run) + c * layer.hidden
    dequantized = run.largest_linear * c if run.weight_bits < 16 else 0
    # Weights that are wider than the compute dtype are cast, and the casts kept for the backward pass.
    casts = c * run.num_quantized if run.weight_bits == 16 and run.weight_bytes > c else 0
    casts = casts / run.num_layers if run.checkpointing else casts
    return (kept + final_norm) * tokens + casts + max(0.0, moment * tokens + dequantized - loss_bytes(run))


def loss_bytes(run: Run) -> float:
    """Bytes of the output head and the loss.

    Chunked: one chunk of logits in float32 with its softmax and gradient (3 x 4 bytes), the gradient of the hidden
    states, cTH, and of a trained head, 4VH. Whole: the logits in the compute dtype, float32, their log-softmax and the
    gradients of both, per token V(c + 4 + 4 + 4 + c).
    """
    layer, c = run.layer, run.compute_bytes
    tokens = run.tokens * run.num_sequences_factor
    if run.fused_loss:
        chunk = min(LOSS_CHUNK_ELEMENTS, math.ceil(tokens / run.loss_chunks) * run.vocab)
        head = 4 * run.vocab * layer.hidden if run.head_trained else 0
        return 12 * chunk + c * tokens * layer.hidden + head
    return tokens * run.vocab * (2 * c + 12)


def optimizer_bytes(run: Run) -> float:
    """Bytes of optimizer state; an optimizer that the table lacks is counted as Adam."""
    per_parameter = OPTIMIZER_BYTES.get(run.optimizer, OPTIMIZER_BYTES["adamw"])
    return run.num_trained * per_parameter(run.trained_bytes) / run.shard_optimizer


def weight_bytes(run: Run) -> tuple[float, float]:
    """Bytes of the model's weights and of its adapters.

    Sharded weights are gathered one layer at a time, two layers being in flight.
    """
    adapters = run.num_trained * run.trained_bytes if run.is_adapter else 0
    base = run.num_params - (run.num_trained if run.is_adapter else 0)
    plain = base - run.num_quantized
    per_weight = run.weight_bytes if run.is_adapter or run.num_trained < base else run.trained_bytes
    size = plain * per_weight
    if run.num_quantized:
        bits = run.weight_bits
        linears = run.num_quantized * (bytes_per_quantized_weight(bits, run.double_quant) if bits < 16 else per_weight)
        if run.layers_on_host:
            linears *= min(1.0, 2 / max(run.num_layers, 1))  # one layer that runs, and the next one
        size += linears
    if run.reference_copy:
        size *= 2
    if run.shard_weights > 1:
        gathered = 2 * (base - run.embedding_params) / max(run.num_layers, 1) * run.compute_bytes
        size = size / run.shard_weights + gathered
        adapters /= run.shard_weights
    return size, adapters


def forecast(run: Run) -> Forecast:
    """Peak memory of one GPU during a training step."""
    weights, adapters = weight_bytes(run)
    activations, loss = activation_bytes(run), loss_bytes(run)
    return Forecast(
        weights=weights,
        adapters=adapters,
        gradients=run.num_trained * run.trained_bytes / run.shard_gradients,
        optimizer=optimizer_bytes(run),
        activations=activations,
        loss=loss,
        overhead=CONTEXT_BYTES + FRAGMENTATION * (activations + loss),
    )


@dataclass(frozen=True)
class Remedy:
    """A change of the config, and what it would need then."""

    change: str
    effect: str
    forecast: Forecast


def remedies(run: Run, limit_bytes: float, *, micro_batch_size: int, can_quantize: bool) -> list[Remedy]:
    """Changes that make a run smaller: first those that fit, then those that keep what is learnt, then by size.

    Args:
        limit_bytes: memory of the GPU.
        micro_batch_size: rows of a micro-batch; halving it doubles the accumulation steps and leaves the loss as it is.
        can_quantize: whether the base weights are frozen and not yet quantized.
    """
    exact, other = "same result", "another result"
    options: list[tuple[str, str, Run]] = []
    if not run.checkpointing:
        options.append(("gradient_checkpointing: true", exact, dataclasses.replace(run, checkpointing=True)))
    if not run.offload:
        both = dataclasses.replace(run, checkpointing=True, offload=True)
        options.append(("gradient_checkpointing: true, activation_offloading: true", exact, both))
    if run.is_adapter and not run.layers_on_host and run.weight_bits != 8:
        on_host = dataclasses.replace(run, layers_on_host=True, checkpointing=True, offload=True)
        text = "gradient_checkpointing: true, activation_offloading: true, layer_offloading: true"
        options.append((text, exact, on_host))
    if run.mlp_tiles <= 1 and run.layer.active_experts == 1 and run.row_length > run.layer.hidden:
        tiles = math.ceil(run.row_length / run.layer.hidden)
        tiled = dataclasses.replace(run, checkpointing=True, mlp_tiles=tiles)
        options.append(("gradient_checkpointing: true, tiled_mlp: true", exact, tiled))
    if run.attention_kind == "eager":
        options.append(("flash_attention: true", exact, dataclasses.replace(run, attention_kind="flash")))
    size = micro_batch_size
    while size > 1:
        size = math.ceil(size / 2)
        smaller = dataclasses.replace(run, tokens=run.tokens * size // micro_batch_size)
        change = f"micro_batch_size: {size}, gradient_accumulation_steps x {micro_batch_size // size}"
        options.append((change, exact, smaller))
        options.append(
            (f"gradient_checkpointing: true, {change}", exact, dataclasses.replace(smaller, checkpointing=True))
        )
    if OPTIMIZER_BYTES.get(run.optimizer, OPTIMIZER_BYTES["adamw"])(run.trained_bytes) > 2.1:
        small = dataclasses.replace(run, optimizer="adamw_8bit")
        options.append(("optimizer: adamw_8bit", other, small))
        if not run.checkpointing:
            small = dataclasses.replace(small, checkpointing=True)
            options.append(("gradient_checkpointing: true, optimizer: adamw_8bit", other, small))
    if can_quantize:
        small = dataclasses.replace(run, weight_bits=4)
        options.append(("adapter: qlora, load_in_4bit: true", other, small))
        small = dataclasses.replace(small, checkpointing=True)
        options.append(("adapter: qlora, load_in_4bit: true, gradient_checkpointing: true", other, small))
    if not run.is_adapter:
        for text, bits in (("adapter: lora", 16), ("adapter: qlora, load_in_4bit: true", 4)):
            options.append((f"{text}, gradient_checkpointing: true", other, _as_adapter(run, bits)))
    if run.row_length > 1024:
        half = dataclasses.replace(run, tokens=run.tokens // 2, row_length=run.row_length // 2)
        options.append((f"sequence_len: {run.row_length // 2}", other, half))
    now = forecast(run).total
    found = [Remedy(change, effect, forecast(option)) for change, effect, option in options]
    found = [remedy for remedy in found if remedy.forecast.total < now * 0.99]
    return sorted(
        found,
        key=lambda remedy: (
            remedy.forecast.total > limit_bytes,
            remedy.effect != exact,
            remedy.change.count(","),
            remedy.forecast.total,
        ),
    )


def _as_adapter(run: Run, bits: int) -> Run:
    """The same model with rank-16 adapters on all linear layers."""
    layer = run.layer
    widths = 4 * layer.hidden + 2 * (layer.attention + layer.key_value) + 3 * (layer.hidden + layer.intermediate)
    trained = 16 * widths * run.num_layers
    return dataclasses.replace(
        run,
        is_adapter=True,
        num_params=run.num_params + trained,
        num_trained=trained,
        trained_bytes=4,
        weight_bits=bits,
        head_trained=False,
        checkpointing=True,
    )
