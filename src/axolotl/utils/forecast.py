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

# Optimizers of bitsandbytes in 8 bits keep the states of embeddings in 32 (axolotl.core.trainers.mixins.optimizer).
EMBEDDINGS_IN_32_BITS: dict[str, float] = {
    "adamw_bnb_8bit": 8.0, "adamw_8bit": 8.0, "paged_adamw_8bit": 8.0, "lion_8bit": 4.0, "paged_lion_8bit": 4.0,
    "ademamix_8bit": 12.0, "paged_ademamix_8bit": 12.0, "rmsprop_bnb_8bit": 4.0,
}  # fmt: skip

CONTEXT_BYTES = 0.6 * GIB  # CUDA context, cuBLAS and NCCL workspaces, loaded kernels
FRAGMENTATION = 0.03  # of what comes and goes; measured runs reserve 2 to 5 % above what they allocate


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
        ranks: of all adapters of the layer together: features per token that their A matrices put out.
    """

    hidden: int
    intermediate: int
    attention: int
    key_value: int
    active_experts: int = 1
    gated: bool = True
    num_norms: int = 2
    linear_inputs: int = 0
    ranks: int = 0


@dataclass(frozen=True)
class Run:
    """Everything that the forecast depends on.

    Args:
        tokens: T, tokens of one micro-batch on one GPU. row_length: length of the rows that attention sees.
        num_params, num_trained, num_quantized: elements of the model with adapters, of what is trained, and of the linear
            weights that `weight_bits` applies to.
        embedding_params, trained_embeddings: elements of the input embedding, and of embeddings that are trained.
        weight_bytes, trained_bytes: bytes of one frozen weight and of one trained weight; `full` training trains weights.
        weight_bits: 16 for unquantized linear weights, else 8 or 4.
        head_trained: whether the output head's weight gets a gradient.
        num_sequences_factor: forward passes whose activations are alive at once (2 for paired preference losses).
        reference_copy: a second, frozen model is in memory.
        compiled: each decoder layer is one compiled graph, which recomputes in backward what is cheap to recompute.
        lora_kernels: projections of one input run as one operator; its frozen weights are made dense together.
        loss_rows: rows that go through head and loss at once (`axolotl.kernels.cross_entropy`).
        offload: what is checkpointed waits in host memory; offloads_by_default: checkpointing alone brings that along.
        checkpoint_every: every how many layers are checkpointed; the others keep all.
        keeps_attention: selective checkpointing keeps the results of attention; keeps_on_host: in host memory.
        mlp_tiles: pieces of the sequence that an MLP runs over.
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
    trained_embeddings: int = 0
    is_adapter: bool = False
    compute_bytes: int = 2
    weight_bytes: int = 2
    trained_bytes: int = 2
    weight_bits: int = 16
    double_quant: bool = True
    optimizer: str = "adamw_torch_fused"
    checkpointing: bool = False
    offload: bool = False
    offloads_by_default: bool = False
    checkpoint_every: int = 1
    keeps_attention: bool = False
    keeps_on_host: bool = False
    mlp_tiles: int = 1
    loss_rows: int = 1024
    layers_on_host: bool = False
    attention_kind: Literal["flash", "eager"] = "flash"
    num_heads: int = 1
    compiled: bool = False
    lora_kernels: bool = False
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
    if run.compiled:
        return compiled_layer_bytes(run)
    # A tiled MLP keeps its input (counted with the linear layers that train) and is computed again in the backward pass.
    mlp = mlp_bytes(run) if run.mlp_tiles <= 1 else 0
    kept = run.layer.num_norms * norm_bytes(run) + attention_bytes(run) + mlp
    return kept + run.compute_bytes * run.layer.linear_inputs


def compiled_layer_bytes(run: Run) -> float:
    """Bytes per token that one compiled decoder layer keeps for its backward.

    The compiler keeps what only a matmul or an attention could make again, and makes the rest from it in backward: norms,
    the activation, casts, the inputs of adapters (`monkeypatch.compile_layers` allows that). So what remains is the input of
    the layer and the residual stream between attention and MLP, cH each; q, k, v, the output of attention and its
    logsumexp; the inputs of the activation (gate and up: 2cI), each adapter's low-rank product, and the reciprocal root of
    each norm, 4 bytes. The inputs of peft's own adapters, which are cast there and back, are kept as well.
    """
    layer, c = run.layer, run.compute_bytes
    mlp = c * layer.intermediate * (2 if layer.gated else 1) * layer.active_experts
    inputs = c * (layer.ranks + layer.linear_inputs)
    return 2 * c * layer.hidden + attention_bytes(run) + mlp + inputs + 4 * layer.num_norms


def moment_bytes(run: Run) -> float:
    """Bytes that the backward of one layer's MLP, its hardest moment, adds to what is kept.

    The gradients of the widest intermediates: of the activation's output, gate and up, 3cI, the first of which becomes the
    output itself in a compiled or fused MLP, beside the gradient of the layer's output, cH. Quantized weights are dense
    for one matmul: the largest one, or with the LoRA kernels gate and up together, beside the gradients of both and of their
    input. A compiled layer gives the gradients of all its weights at once; without, each is added up as it comes.
    """
    layer, c, tokens = run.layer, run.compute_bytes, run.tokens * run.num_sequences_factor
    wide = c * layer.intermediate * layer.active_experts
    moment = (3 if layer.gated else 2) * wide * tokens
    if run.mlp_tiles > 1:
        moment = (moment + mlp_bytes(run) * tokens) / run.mlp_tiles
    stream = c * layer.hidden * tokens if run.compiled or run.lora_kernels else 0
    dense = run.largest_linear * c if run.weight_bits < 16 else 0
    if run.lora_kernels:
        both = 2 * wide * tokens + 2 * stream + 2 * dense
        moment = max(moment + stream, both if dense else 0)
    else:
        moment += stream + dense
    if run.compiled and not run.is_adapter:
        moment += c * run.num_quantized / max(run.num_layers, 1)
    return moment


def cast_bytes(run: Run) -> float:
    """Bytes of the copies, in the compute dtype, of weights that are wider; backward reads those of the layers that it keeps."""
    wide = run.num_trained if run.is_adapter and run.trained_bytes > run.compute_bytes else 0
    if run.weight_bits == 16 and run.weight_bytes > run.compute_bytes:
        wide += run.num_quantized
    casts = run.compute_bytes * wide
    return casts / run.num_layers if run.checkpointing else casts


def activation_bytes(run: Run) -> float:
    """Bytes that the forward pass keeps, and what the hardest moment of the backward pass adds beyond the loss.

    Without checkpointing every layer keeps what it needs. With checkpointing each layer keeps only its input, cH, and the
    moment is one layer, recomputed in full, with its backward. Offloading moves the kept inputs to the CPU, of which two are
    in flight. Selective checkpointing also keeps what attention gave, cA and its logsumexp.
    The last norm is not compiled with the layers; with its output it is alive during the loss and over before the layers'
    backward begins. The loss is over then, too, so only the larger of the two moments counts.
    """
    layer, c = run.layer, run.compute_bytes
    tokens = run.tokens * run.num_sequences_factor
    one = layer_bytes(run)
    moment = moment_bytes(run)
    if run.checkpointing:
        recomputed = math.ceil(run.num_layers / run.checkpoint_every)
        kept = c * layer.hidden * (min(2, recomputed) if run.offload else recomputed)
        if run.keeps_attention:
            kept += (c * layer.attention + 4 * run.num_heads) * (2 if run.keeps_on_host else recomputed)
        kept += one * (run.num_layers - recomputed)
        moment += one * tokens
    else:
        kept = one * run.num_layers
    final_norm = (norm_bytes(run) + c * layer.hidden) * tokens
    return kept * tokens + cast_bytes(run) + final_norm + max(0.0, moment - loss_bytes(run) - final_norm)


def loss_bytes(run: Run) -> float:
    """Bytes of the output head and the loss.

    Chunked: the logits of two chunks in the compute dtype, over which their gradient is written, because a chunk is let go
    when the next one is there; the rows that carry loss and the gradient of the hidden states, cTH each; and for a trained
    head its gradient in float32, 4VH, which at the end stands beside the last chunk and its copy in the dtype of the weight.
    Whole: the logits in the compute dtype, float32, their log-softmax and the gradients of both, V(c + 4 + 4 + 4 + c).
    """
    layer, c = run.layer, run.compute_bytes
    tokens = run.tokens * run.num_sequences_factor
    if not run.fused_loss:
        return tokens * run.vocab * (2 * c + 12)
    chunk = c * run.vocab * min(run.loss_rows, tokens)
    second = c * run.vocab * min(run.loss_rows, max(tokens - run.loss_rows, 0))
    head = run.vocab * layer.hidden if run.head_trained else 0
    return 2 * c * tokens * layer.hidden + 4 * head + chunk + max(second, run.trained_bytes * head)


def optimizer_bytes(run: Run) -> float:
    """Bytes of optimizer state; an optimizer that the table lacks is counted as Adam."""
    each = OPTIMIZER_BYTES.get(run.optimizer, OPTIMIZER_BYTES["adamw"])(run.trained_bytes)
    embeddings = min(run.trained_embeddings, run.num_trained)
    wider = EMBEDDINGS_IN_32_BITS.get(run.optimizer, each) - each
    return (run.num_trained * each + embeddings * wider) / run.shard_optimizer


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


# What a change costs, as a share of the time of a step. Rough: only the order is used.
HALVED_BATCH = 0.03  # kernels on fewer rows, as long as there are enough
FEW_TOKENS = 2048  # of a micro-batch; below, a GPU is not full
OFFLOADED_INPUTS = 0.02  # copies beside the computation
OFFLOADED_WEIGHTS = 0.5  # copies of all frozen weights, which take longer than the computation of short batches
TILED_MLP = 0.15  # the MLP's forward once more
FOUR_BITS = 0.05  # dense copies of weights


@dataclass(frozen=True)
class Remedy:
    """A change of the config, what it would need then, and how much longer a step would take, as a share."""

    change: str
    effect: str
    forecast: Forecast
    slowdown: float = 0.0


def recomputation(run: Run) -> float:
    """Share of a step that the second forward of gradient checkpointing adds.

    A forward pass is one part of two where the weights are frozen and backward multiplies by them once, of three where it
    also makes their gradients.
    """
    return 1 / (2 if run.is_adapter else 3)


def checkpointing_remedies(run: Run, limit_bytes: float) -> list[tuple[str, str, float, Run]]:
    """Gradient checkpointing of all layers, and the smallest part of it that fits `limit_bytes`."""
    if run.checkpointing:
        return []
    whole, change, exact = recomputation(run), "gradient_checkpointing: true", "same result"
    checkpointed = _checkpointed(run)
    options = [(change, exact, whole, checkpointed)]
    for every in (8, 4, 3, 2):
        part = dataclasses.replace(checkpointed, checkpoint_every=every)
        if every < run.num_layers and forecast(part).total <= limit_bytes:
            text = f"{change}, gradient_checkpointing_kwargs: {{every_n_layers: {every}}}"
            options.append((text, exact, whole / every, part))
            break
    if not run.compiled and run.attention_kind == "flash":
        # Inside a compiled layer the results of single operators are not seen.
        kept = dataclasses.replace(checkpointed, keeps_attention=True)
        options.append((f"{change}, selective_checkpointing: true", exact, whole * 0.9, kept))
    return options


def remedies(run: Run, limit_bytes: float, *, micro_batch_size: int, can_quantize: bool) -> list[Remedy]:
    """Changes that make a run smaller: first those that fit, then those that keep what is learnt, then the least slowdown.

    Args:
        limit_bytes: memory of the GPU.
        micro_batch_size: rows of a micro-batch; halving it doubles the accumulation steps and leaves the loss as it is.
        can_quantize: whether the base weights are frozen and not yet quantized.
    """
    exact, other = "same result", "another result"
    options = checkpointing_remedies(run, limit_bytes)
    recomputed = 0.0 if run.checkpointing else recomputation(run)
    if not run.offload and not run.offloads_by_default:
        both = dataclasses.replace(run, checkpointing=True, offload=True)
        text = "gradient_checkpointing: true, activation_offloading: true"
        options.append((text, exact, recomputed + OFFLOADED_INPUTS, both))
    loaded_whole = weight_bytes(run)[0] + CONTEXT_BYTES <= limit_bytes  # before its layers leave
    if run.is_adapter and not run.layers_on_host and run.weight_bits != 8 and loaded_whole:
        on_host = dataclasses.replace(_not_compiled(run), layers_on_host=True, checkpointing=True, offload=True)
        text = "gradient_checkpointing: true, activation_offloading: true, layer_offloading: true"
        options.append((text, exact, recomputed + OFFLOADED_INPUTS + OFFLOADED_WEIGHTS, on_host))
    if run.mlp_tiles <= 1 and run.layer.active_experts == 1 and run.row_length > run.layer.hidden:
        tiles = math.ceil(run.row_length / run.layer.hidden)
        tiled = dataclasses.replace(_not_compiled(run), checkpointing=True, mlp_tiles=tiles)
        options.append(("gradient_checkpointing: true, tiled_mlp: true", exact, recomputed + TILED_MLP, tiled))
    if run.attention_kind == "eager":
        options.append(("flash_attention: true", exact, 0.0, dataclasses.replace(run, attention_kind="flash")))
    size, cost = micro_batch_size, 0.0
    while size > 1:
        size = math.ceil(size / 2)
        smaller = dataclasses.replace(run, tokens=run.tokens * size // micro_batch_size)
        cost += HALVED_BATCH if smaller.tokens >= FEW_TOKENS else 10 * HALVED_BATCH
        change = f"micro_batch_size: {size}, gradient_accumulation_steps x {micro_batch_size // size}"
        options.append((change, exact, cost, smaller))
        if not run.checkpointing:
            both = _checkpointed(smaller)
            options.append((f"gradient_checkpointing: true, {change}", exact, recomputed + cost, both))
    small = dataclasses.replace(run, optimizer="adamw_8bit")
    if optimizer_bytes(run) - optimizer_bytes(small) > 0.01 * forecast(run).total:
        options.append(("optimizer: adamw_8bit", other, 0.0, small))
        if not run.checkpointing:
            small = _checkpointed(small)
            options.append(("gradient_checkpointing: true, optimizer: adamw_8bit", other, recomputed, small))
    if can_quantize:
        small = dataclasses.replace(run, weight_bits=4)
        options.append(("adapter: qlora, load_in_4bit: true", other, FOUR_BITS, small))
        if not run.checkpointing:
            small = _checkpointed(small)
            text = "adapter: qlora, load_in_4bit: true, gradient_checkpointing: true"
            options.append((text, other, FOUR_BITS + recomputed, small))
    if not run.is_adapter:
        for text, bits, cost in (("adapter: lora", 16, 0.0), ("adapter: qlora, load_in_4bit: true", 4, FOUR_BITS)):
            options.append((f"{text}, gradient_checkpointing: true", other, cost, _as_adapter(run, bits)))
    if run.row_length > 1024:
        half = dataclasses.replace(run, tokens=run.tokens // 2, row_length=run.row_length // 2)
        options.append((f"sequence_len: {run.row_length // 2}", other, 0.0, half))
    now = forecast(run).total
    found = [Remedy(change, effect, forecast(option), slowdown) for change, effect, slowdown, option in options]
    found = [remedy for remedy in found if remedy.forecast.total < now * 0.99]
    return sorted(
        found,
        key=lambda remedy: (
            remedy.forecast.total > limit_bytes,
            remedy.effect != exact,
            remedy.slowdown if remedy.forecast.total <= limit_bytes else remedy.forecast.total,
            remedy.forecast.total,
        ),
    )


def _checkpointed(run: Run) -> Run:
    """The same run with gradient checkpointing, and what that brings along."""
    return dataclasses.replace(run, checkpointing=True, offload=run.offload or run.offloads_by_default)


def _not_compiled(run: Run) -> Run:
    """The same run with a key that leaves layers uncompiled: what follows a norm keeps its input."""
    if not run.compiled:
        return run
    layer = run.layer
    inputs = max(layer.linear_inputs, layer.num_norms * layer.hidden) + layer.ranks
    layer = dataclasses.replace(layer, linear_inputs=inputs)
    return dataclasses.replace(run, compiled=False, offloads_by_default=False, layer=layer)


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
        trained_embeddings=0,
        checkpointing=True,
        offload=run.offload or run.offloads_by_default,
    )
