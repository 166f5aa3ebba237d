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
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from axolotl.utils.forecast_states import Weight, state_bytes
from axolotl.utils.schemas.validation.optimizer import UPDATES_IN_BACKWARD

GIB = 2**30

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
        sums: float32 numbers per token that the backward kernel of the MLP writes on its way to the gradients of adapters.
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
    sums: float = 0.0


@dataclass(frozen=True)
class Run:
    """Everything that the forecast depends on.

    Args:
        tokens: T, tokens of one micro-batch on one GPU. row_length: length of the rows that attention sees.
        num_params, num_trained, num_quantized: elements of the model with adapters, of what is trained, and of the linear
            weights that `weight_bits` applies to.
        embedding_params: elements of the input embedding.
        trained: the weights that are trained; where they are not known, one matrix is counted.
        optimizer, optimizer_options: its name and its arguments, as in `forecast_states.state_bytes`.
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
        recorded_shapes: shapes of a batch for which CUDA graphs of the layers are held.
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
    trained: tuple[Weight, ...] = ()
    is_adapter: bool = False
    compute_bytes: int = 2
    weight_bytes: int = 2
    trained_bytes: int = 2
    weight_bits: int = 16
    double_quant: bool = True
    optimizer: str = "adamw_torch_fused"
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    checkpointing: bool = False
    offload: bool = False
    offloads_by_default: bool = False
    checkpoint_every: int = 1
    keeps_attention: bool = False
    keeps_on_host: bool = False
    mlp_tiles: int = 1
    recorded_shapes: int = 0
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

    @property
    def alive_tokens(self) -> int:
        """Tokens whose activations are alive at once."""
        return self.tokens * self.num_sequences_factor


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
    input. A compiled layer gives the gradients of all its weights at once; without, each is added up as it comes. Gradients of
    adapters that are formed beside those of the activation are summed in float32, one sum for every block of tokens.
    """
    layer, c, tokens = run.layer, run.compute_bytes, run.alive_tokens
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
    return moment + 4 * layer.sums * tokens


def recomputed_bytes(run: Run) -> float:
    """Bytes per token of a layer that backward computes again, beyond those of a layer that kept its results.

    Computed again inside one graph, as in compiled layers, the inputs of both groups of projections (the normed states, cH
    each) are formed on the way and wait for the gradients of their adapters or weights; a layer that kept its results forms them
    when it is their turn. The layer's own input is counted with those that are kept.
    """
    return run.compute_bytes * run.layer.hidden if run.compiled else 0


def batch_bytes(run: Run) -> float:
    """Bytes per token of what all layers share: ids, labels, shifted labels and positions in int64, and the rotary embedding's cosine
    and sine of a head's size."""
    head_size = run.layer.attention / run.num_heads
    return 4 * 8 + 2 * run.compute_bytes * head_size


def cast_bytes(run: Run) -> float:
    """Bytes of the copies, in the compute dtype, of weights that are wider; backward reads those of the layers that it keeps."""
    wide = run.num_trained if run.is_adapter and run.trained_bytes > run.compute_bytes else 0
    if run.weight_bits == 16 and run.weight_bytes > run.compute_bytes:
        wide += run.num_quantized
    casts = run.compute_bytes * wide
    return casts / run.num_layers if run.checkpointing else casts


def graph_bytes(run: Run) -> float:
    """Bytes that CUDA graphs of the layers hold beside the activations: per shape cHT and a layer for the gradient of its input,
    and as much for the input itself, which for the shape that runs is an activation."""
    inputs = run.compute_bytes * run.layer.hidden * run.tokens * run.num_layers
    return inputs * max(0, 2 * run.recorded_shapes - 1)


def activation_bytes(run: Run) -> float:
    """Bytes that the forward pass keeps, and what the hardest moment of the backward pass adds beyond the loss.

    Without checkpointing every layer keeps what it needs. With checkpointing each layer keeps only its input, cH, and the
    moment is one layer, recomputed in full, with its backward. Offloading moves the kept inputs to the CPU, of which two are
    in flight. The input of the first layer stays as well where the embedding is frozen: it is made to ask for a gradient, and
    autograd holds what a gradient is accumulated for. Selective checkpointing also keeps what attention gave, cA and its logsumexp.
    The last norm, of which compiled only the input is kept, is with its output alive during the loss and over before the
    layers' backward begins. The loss is over then, too, so only the larger of the two moments counts.
    """
    layer, c = run.layer, run.compute_bytes
    tokens = run.alive_tokens
    one = layer_bytes(run)
    moment = moment_bytes(run)
    if run.checkpointing:
        recomputed = math.ceil(run.num_layers / run.checkpoint_every)
        on_gpu = min(2, recomputed) + (1 if run.is_adapter and recomputed > 2 else 0)
        kept = c * layer.hidden * (on_gpu if run.offload else recomputed)
        if run.keeps_attention:
            kept += (c * layer.attention + 4 * run.num_heads) * (2 if run.keeps_on_host else recomputed)
        kept += one * (run.num_layers - recomputed)
        moment += (one + recomputed_bytes(run)) * tokens
    else:
        kept = one * run.num_layers
    norm = c * layer.hidden + 4 if run.compiled else norm_bytes(run)
    final_norm = (norm + c * layer.hidden) * tokens
    later = max(0.0, moment - loss_bytes(run) - final_norm)
    kept += batch_bytes(run)
    return kept * tokens + cast_bytes(run) + graph_bytes(run) + final_norm + later


def loss_bytes(run: Run) -> float:
    """Bytes of the output head and the loss.

    Chunked: the logits of one chunk in the compute dtype, over which their gradient is written; the rows that carry loss and
    the gradient of the hidden states, cTH each; and for a trained head its gradient in float32, 4VH, which at the end stands
    beside its copy in the dtype of the weight.
    Whole: the logits in the compute dtype, float32, their log-softmax and the gradients of both, V(c + 4 + 4 + 4 + c).
    """
    layer, c = run.layer, run.compute_bytes
    tokens = run.alive_tokens
    if not run.fused_loss:
        return tokens * run.vocab * (2 * c + 12)
    chunk = c * run.vocab * min(run.loss_rows, tokens)
    head = run.vocab * layer.hidden if run.head_trained else 0
    return 2 * c * tokens * layer.hidden + 4 * head + max(chunk, run.trained_bytes * head)


def optimizer_bytes(run: Run) -> float:
    """Bytes of optimizer state."""
    return state_bytes(run.optimizer, _trained(run), run.optimizer_options) / run.shard_optimizer


def gradient_bytes(run: Run) -> float:
    """Bytes of gradients; where updates happen in the backward pass, each is gone before the next one comes."""
    size = run.num_trained * run.trained_bytes
    if run.optimizer in UPDATES_IN_BACKWARD:
        size = max((weight.numel * weight.item for weight in _trained(run)), default=0)
    return size / run.shard_gradients


def _trained(run: Run) -> tuple[Weight, ...]:
    """The weights that are trained."""
    if run.trained or not run.num_trained:
        return run.trained
    columns = math.gcd(run.num_trained, run.layer.hidden)
    return (Weight((run.num_trained // columns, columns), run.trained_bytes),)


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
        gradients=gradient_bytes(run),
        optimizer=optimizer_bytes(run),
        activations=activations,
        loss=loss,
        overhead=CONTEXT_BYTES + FRAGMENTATION * (activations + loss),
    )
