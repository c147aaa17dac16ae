"""How much memory serving and training a model with adapters takes, before either begins.

What is allocated as tensors of known sizes is counted: weights, keys and values, the adapter, its gradients and Adam's
states. Activations are approximated from how the trainer computes (:mod:`bascule.trainers.forward`): they are the most
that one micro-batch of ``max_nodes`` tokens can need. All figures are bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec

from bascule.schemas.errors import ConfigError
from bascule.trainers.shapes import Shape

GIB = 1 << 30
#: Bits of a weight in MXFP4: blocks of 32 values of 4 bits share a scale of 8 (OCP Microscaling Formats 1.0).
MXFP4_BITS = 4.25
#: An adapter, its gradients and Adam's states are float32 beside any base: PEFT makes the adapter so.
ADAPTER_BYTES = 4
#: What the backward pass keeps of a token, to what goes into and out of the linear layers: 1.08 on SmolLM2-135M, and
#: some room for the gradients of a layer.
KEPT = 1.25
#: Trees whose activations, by the trainer's own rule, take more are computed again in the backward pass.
KEEP_BYTES = 4 * GIB
#: Rows of logits that the trainer's head has at one time, and float32 copies of them: logits, log p and p.
HEAD_ROWS, HEAD_COPIES = 256, 3
#: Of a process with torch: interpreter, libraries, allocator; with CUDA its context and kernels are on the device.
PROCESS_BYTES = GIB // 2
CUDA_BYTES = GIB // 2
#: Of vLLM beside weights and cache: CUDA context, graphs, and activations of the largest prefill. An approximation.
VLLM_BYTES = 3 * GIB
#: Of vLLM asleep: CUDA context and graphs; weights are in the host's memory then, keys and values are gone.
VLLM_ASLEEP_BYTES = 2 * GIB
#: From this share of what is free, it is tight.
TIGHT = 0.9

Verdict = Literal["fits", "tight", "does not fit"]


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters of a model by part; a tied output embedding is not counted twice."""

    embeddings: int
    attention: int
    dense: int
    experts: int
    norms: int

    @property
    def total(self) -> int:
        return self.embeddings + self.attention + self.dense + self.experts + self.norms


class Linear(NamedTuple):
    """A linear layer by its last name, or the part of a stack of experts that one of them is."""

    name: str
    inputs: int
    outputs: int


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes by what they are for.

    Attributes:
        weights: of the base model.
        merged: copies of weights with adapters merged in (the embedded engine).
        cache: keys and values.
        adapter: trained, or held for serving.
        gradients: of the adapter.
        optimizer: Adam's two moments, and a step count of 4 bytes for each tensor.
        activations: approximated.
        process: approximated: the program itself, and CUDA's context.
    """

    weights: int = 0
    merged: int = 0
    cache: int = 0
    adapter: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    process: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, name) for name in self.__struct_fields__)


def attention_layers(shape: Shape) -> tuple[Linear, ...]:
    """The linear layers of one layer's attention."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return (
        Linear("q_proj", shape.hidden, queries),
        Linear("k_proj", shape.hidden, keys),
        Linear("v_proj", shape.hidden, keys),
        Linear("o_proj", queries, shape.hidden),
    )


def dense_layers(shape: Shape) -> tuple[Linear, ...]:
    """The linear layers of one layer's feed-forward part; none where experts are in its place."""
    if shape.experts:
        return ()
    return (
        Linear("gate_proj", shape.hidden, shape.intermediate),
        Linear("up_proj", shape.hidden, shape.intermediate),
        Linear("down_proj", shape.intermediate, shape.hidden),
    )


def expert_layers(shape: Shape) -> tuple[Linear, ...]:
    """What one expert of a layer computes with; the names are those of transformers' stacks of all of them."""
    if not shape.experts:
        return ()
    return (
        Linear("mlp.experts.gate_up_proj", shape.hidden, 2 * shape.intermediate),
        Linear("mlp.experts.down_proj", shape.intermediate, shape.hidden),
    )


def parameters(shape: Shape) -> Counts:
    """The parameters of a model."""

    def weights(layers: Sequence[Linear], biased: Sequence[bool]) -> int:
        return sum(x.inputs * x.outputs + x.outputs * b for x, b in zip(layers, biased, strict=True))

    qkv = shape.qkv_bias
    attention = weights(attention_layers(shape), (qkv, qkv, qkv, shape.o_bias)) + shape.sinks * shape.heads
    dense = weights(dense_layers(shape), [shape.mlp_bias] * len(dense_layers(shape)))
    if shape.experts:
        dense += shape.experts * (shape.hidden + shape.router_bias)
    experts = shape.experts * weights(expert_layers(shape), [shape.mlp_bias] * len(expert_layers(shape)))
    norms = 2 * shape.hidden + 2 * shape.head_dim * shape.qk_norm
    return Counts(
        embeddings=shape.vocab * shape.hidden * (1 if shape.tied else 2),
        attention=attention * shape.layers,
        dense=dense * shape.layers,
        experts=experts * shape.layers,
        norms=norms * shape.layers + shape.hidden,
    )


def weight_bytes(shape: Shape, element: int, *, quantized: bool = False) -> int:
    """Bytes of a model's weights.

    Args:
        element: bytes of one weight: 2 for bfloat16, 4 for float32.
        quantized: the experts stay in MXFP4 where the model is published so; their biases do not.
    """
    counts = parameters(shape)
    if not (quantized and shape.mxfp4):
        return counts.total * element
    biases = shape.mlp_bias * shape.layers * shape.experts * sum(x.outputs for x in expert_layers(shape))
    packed = counts.experts - biases
    return (counts.total - packed) * element + round(packed * MXFP4_BITS / 8)


def cache_bytes(shape: Shape, rows: int, length: int, element: int) -> int:
    """Bytes of keys and values of ``rows`` sequences of ``length`` tokens; a layer with a window keeps that much."""
    tokens = (shape.layers - shape.windowed) * length + shape.windowed * min(length, shape.window or length)
    return rows * tokens * 2 * shape.kv_heads * shape.head_dim * element


class Adapter(NamedTuple):
    """The trained parameters of a LoRA adapter, and how many tensors they are."""

    parameters: int
    tensors: int


def adapter_size(shape: Shape, rank: int, modules: Sequence[str] | None = None, stacks: Sequence[str] = ()) -> Adapter:
    """The size of an adapter: A [rank, inputs] and B [outputs, rank] for each target, of each expert for a stack.

    Args:
        modules: last names of linear layers; None for all, as in ``lora_target_modules``.
        stacks: names of stacks of experts, as in ``lora_target_parameters``.

    Raises:
        ConfigError: the model has no such target.
    """
    plain, stacked = (*attention_layers(shape), *dense_layers(shape)), expert_layers(shape)
    for names, there in ((modules or (), plain), (stacks, stacked)):
        unknown = sorted(set(names) - {x.name for x in there})
        if unknown:
            raise ConfigError(
                f"The base model has no {unknown[0]!r} that an adapter could target.",
                next_step=f"It has {', '.join(x.name for x in there) or 'none of this kind'}.",
            )
    chosen = [x for x in plain if modules is None or x.name in modules]
    in_stacks = [x for x in stacked if x.name in stacks]
    each = sum(x.inputs + x.outputs for x in chosen) + shape.experts * sum(x.inputs + x.outputs for x in in_stacks)
    return Adapter(rank * each * shape.layers, 2 * shape.layers * (len(chosen) + len(in_stacks)))


def activation_bytes(shape: Shape, nodes: int, element: int) -> int:
    """The most that a micro-batch of ``nodes`` tokens takes beside weights: an approximation.

    Kept for the backward pass is ``KEPT`` times what goes into and out of the linear layers. Where twice that is over
    ``KEEP_BYTES``, it is the input of each layer, and one layer's worth of it and of its gradients. Scores of attention
    are there in full only beside sinks. The head has a few rows of logits, and two float32 vectors a token.
    """
    linear = element * sum(x.inputs + x.outputs for x in (*attention_layers(shape), *dense_layers(shape)))
    chosen = element * shape.experts_per_token * sum(x.inputs + x.outputs for x in expert_layers(shape))
    scores = 2 * element * shape.heads * nodes**2 if shape.sinks else 0
    layer = round(KEPT * nodes * (linear + chosen)) + scores
    if 2 * nodes * linear * shape.layers > KEEP_BYTES:
        kept = shape.layers * nodes * shape.hidden * element + 2 * layer
    else:
        kept = shape.layers * layer
    masks = (2 if 0 < shape.windowed < shape.layers else 1) * element * nodes**2
    head = min(nodes, HEAD_ROWS) * shape.vocab * 4 * HEAD_COPIES + 2 * nodes * shape.hidden * 4
    return kept + masks + head


def training_memory(shape: Shape, adapter: Adapter, nodes: int, element: int, *, cuda: bool) -> Memory:
    """What a training job takes: the base at ``element`` bytes a weight, experts included, and the adapter with AdamW.

    Args:
        nodes: most tokens of a micro-batch, ``max_nodes``.
        cuda: on a GPU; the interpreter then is not in the same memory.
    """
    held = adapter.parameters * ADAPTER_BYTES
    return Memory(
        weights=weight_bytes(shape, element),
        adapter=held,
        gradients=held,
        optimizer=2 * held + 4 * adapter.tensors,
        activations=activation_bytes(shape, nodes, element),
        process=CUDA_BYTES if cuda else PROCESS_BYTES,
    )


def embedded_memory(
    shape: Shape, *, rows: int, tokens: int, kv_mib: int, prefix_tokens: int, merged: int, element: int, cuda: bool
) -> Memory:
    """What the embedded engine takes at most.

    Args:
        rows, tokens, kv_mib, prefix_tokens: the engine's limits.
        merged: adapters whose merged weights are kept; each is a copy of the linear layers' weights.
    """
    plain = (*attention_layers(shape), *dense_layers(shape))
    copies = merged * element * shape.layers * sum(x.inputs * x.outputs for x in plain)
    widest = max(x.inputs + x.outputs for x in (*plain, *expert_layers(shape)))
    return Memory(
        weights=weight_bytes(shape, element),
        merged=copies,
        cache=kv_mib * 2**20 + cache_bytes(shape, 1, prefix_tokens, element),
        activations=4 * tokens * widest * element + HEAD_COPIES * rows * shape.vocab * 4,
        process=CUDA_BYTES if cuda else PROCESS_BYTES,
    )


def vllm_memory(shape: Shape, *, rows: int, length: int, adapter: Adapter, adapters: int) -> Memory:
    """The least that vLLM takes to have ``rows`` sequences of ``length`` tokens under way, in bfloat16.

    Experts that are published in MXFP4 stay so. Its own default is to take nine tenths of the GPU whatever it needs.

    Args:
        adapters: that are loaded at one time.
    """
    return Memory(
        weights=weight_bytes(shape, 2, quantized=True),
        cache=cache_bytes(shape, rows, length, 2),
        adapter=adapters * adapter.parameters * 2,
        process=VLLM_BYTES,
    )


def in_one_process(engine: Memory, training: Memory) -> int:
    """Bytes where the embedded engine and the trainer share a process: both, but one set of weights and one process."""
    return engine.total + training.total - min(engine.weights, training.weights) - training.process


def on_one_gpu(serving: Memory, training: Memory) -> int:
    """Bytes where vLLM sleeps while the trainer works: the larger of the two, and what the other leaves there."""
    return max(serving.total + training.process, training.total + VLLM_ASLEEP_BYTES)


def verdict(need: int, free: int) -> Verdict:
    """Whether ``need`` bytes fit into ``free``."""
    return "does not fit" if need > free else "tight" if need > TIGHT * free else "fits"
