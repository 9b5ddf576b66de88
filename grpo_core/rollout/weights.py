"""A model's weights as the fused decoders read them: fused matrices with adapters merged, at addresses that stay.

Parameters that FSDP2 has sharded are gathered as they are copied, one matrix at a time: all ranks refresh together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import cast

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from grpo_core.families import get_family
from grpo_core.rollout.cache import CacheShape


class FusedLinear:
    """Several linear layers that read the same input, side by side in one matrix `[in, sum of out]`.

    Args:
        modules: the layers, plain or wrapped by PEFT.
        packed: keep the matrix in the form that oneDNN's kernels read (see `can_pack`) instead of as `weight`. MKL
            switches to other kernels for few rows; these are slow where no cache holds the matrix, and round otherwise
            than those for a batch. oneDNN's give a row the same bits whatever rows are beside it (under AVX2; not
            measured elsewhere).

    Attributes:
        weight: the matrix, output-major in memory like the layers' own, at an address that stays; None if packed.
        bias: `[sum of out]`, or None.
    """

    def __init__(self, modules: Sequence[nn.Module], packed: bool = False):
        self.modules = list(modules)
        layers = [_base_layer(module) for module in self.modules]
        self.widths = [layer.out_features for layer in layers]
        # one matrix, one GEMM: for the few rows of a decode step a GEMM costs its launch and the read of its weights.
        # [out, in] in memory, as nn.Linear has it, so that copies are contiguous
        self._shape = (sum(self.widths), layers[0].in_features)
        self._dtype, self._device = layers[0].weight.dtype, layers[0].weight.device
        self.weight = None if packed else torch.empty(self._shape, dtype=self._dtype, device=self._device).t()
        self._packed: Tensor | None = None
        has_bias = any(layer.bias is not None for layer in layers)
        # zeros: where only some of the layers have a bias (q, k and v may differ), the others' columns add nothing
        self.bias = torch.zeros(self._shape[0], dtype=self._dtype, device=self._device) if has_bias else None
        # by layer, the state (see refresh) that was copied last
        self._copied: list[tuple[int, int] | None] = [None] * len(layers)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the layers' present weights, adapters merged. Frozen layers that have not changed are skipped."""
        # a frozen plain layer's weight is known again by its address and version (every in-place write counts the
        # version up); None for any other layer, which is always copied
        states: list[tuple[int, int] | None] = []
        for module in self.modules:
            weight = cast(Tensor, module.weight) if _is_plain(module) else None
            if weight is None or weight.requires_grad:
                states.append(None)
            else:
                local = weight.to_local() if isinstance(weight, DTensor) else weight
                states.append((local.data_ptr(), local._version))
        stale = [state is None or state != copied for state, copied in zip(states, self._copied, strict=True)]
        if not any(stale):
            return
        fused = self.weight
        if fused is None:  # a packed matrix cannot be changed in part: fill a plain one, pack it, drop it
            fused = torch.empty(self._shape, dtype=self._dtype, device=self._device).t()
            stale = [True] * len(stale)
        biases = self.bias.split(self.widths) if self.bias is not None else [None] * len(self.modules)
        for module, columns, bias, write in zip(
            self.modules, fused.split(self.widths, dim=1), biases, stale, strict=True
        ):
            if write:
                _write_merged(module, columns, bias)
        if self.weight is None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(fused.t())
        self._copied = states

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`x @ weight + bias (+ residual)`, `[rows, in]` → `[rows, sum of out]`."""
        if self.weight is None:
            # the bias, and the residual by the binary form, are added within oneDNN's kernel: no pass over the output
            linear = torch.ops.mkldnn._linear_pointwise
            if residual is None:
                return linear(x, self._packed, self.bias, "none", [], "")
            return linear.binary(x, residual, self._packed, self.bias, "add")
        if residual is None:
            return x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)
        # addmm adds one of the two within the GEMM; few models have both (a bias in o or down)
        out = torch.addmm(residual, x, self.weight)
        return out if self.bias is None else out.add_(self.bias)


def can_pack(weight: Tensor) -> bool:
    """Whether matrices like `weight` can be packed for oneDNN: float32 on a CPU, in a torch that was built with it."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        # operators of torch.compile's CPU backend; not a public API, so their absence only means slower products
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@dataclass
class FusedLayer:
    """The weights of one decoder layer. A norm is the copy of its weight, `[width]`."""

    input_norm: Tensor
    qkv: FusedLinear
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: FusedLinear
    mlp_norm: Tensor
    gate_up: FusedLinear
    down: FusedLinear


class FusedModel:
    """The weights and sizes of a causal LM of a registered family.

    Args:
        model: the causal LM without its outer PEFT wrapper; adapters inside are merged at `refresh`.
        packed: see `FusedLinear`.

    Attributes:
        layers, norm, head: copies of the model's weights, at addresses that stay, filled by `refresh`.
        embed: looks up token embeddings `[B, H]` of int64 `[B]`.
        cache_shape: what the caches hold of each token.
        token_bytes: bytes that they take for it.

    Raises:
        InputError: the model's family is not registered; see `grpo_core.families`.
    """

    def __init__(self, model: PreTrainedModel, packed: bool = False):
        config, decoder, family = model.config, model.base_model, get_family(model.config.model_type)

        def linear(layer: nn.Module, *names: str) -> FusedLinear:
            self._linears.append(FusedLinear([attrgetter(name)(layer) for name in names], packed))
            return self._linears[-1]

        def norm(parent: nn.Module, name: str) -> Tensor:
            module = attrgetter(name)(parent)
            copy = torch.empty(module.weight.shape, dtype=module.weight.dtype, device=module.weight.device)
            self._norms.append((module, copy))
            return copy

        self._linears: list[FusedLinear] = []
        self._norms: list[tuple[nn.Module, Tensor]] = []
        self.layers = [
            FusedLayer(
                input_norm=norm(layer, family.input_norm),
                # in this order: queries and keys are rotated as one block, keys and values cached as one
                qkv=linear(layer, family.q, family.k, family.v),
                q_norm=None if family.q_norm is None else norm(layer, family.q_norm),
                k_norm=None if family.k_norm is None else norm(layer, family.k_norm),
                out=linear(layer, family.o),
                mlp_norm=norm(layer, family.mlp_norm),
                gate_up=linear(layer, family.gate, family.up),
                down=linear(layer, family.down),
            )
            for layer in attrgetter(family.layers)(decoder)
        ]
        self.norm = norm(decoder, family.final_norm)
        self.head = FusedLinear([cast(nn.Module, model.get_output_embeddings())], packed)
        self._linears.append(self.head)
        # the module itself and not its weight: it may be wrapped (PEFT's modules_to_save), or scale what it looks up
        self._embedding = cast(nn.Embedding, model.get_input_embeddings())
        self._gathered_embedding: Tensor | None = None
        self.embed: Callable[[Tensor], Tensor] = self._embedding
        self._rotary = attrgetter(family.rotary)(decoder)

        self.dtype, self.device = self.norm.dtype, self.norm.device
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        # configs older than head_dim leave it out, some set it to None; both mean an even split of the hidden size
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.eps = config.rms_norm_eps
        self.vocabulary = config.vocab_size  # for memory estimates
        self.cache_shape = CacheShape(len(self.layers), self.num_kv_heads, self.head_dim, self.dtype)
        # 2: keys and values
        self.token_bytes = 2 * len(self.layers) * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring every copy up to date with the model."""
        # under FSDP2 each of these gathers, a collective: every rank goes through the same list in the same order
        for linear in self._linears:
            linear.refresh()
        for module, copy in self._norms:
            copy.copy_(_gathered(cast(Tensor, module.weight)))
        # the embedding is the largest tensor and is only looked up, so it is read where it is unless sharded
        weight = self._embedding.weight
        if isinstance(weight, DTensor) and self._gathered_embedding is None:
            self._gathered_embedding = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            self.embed = partial(F.embedding, weight=self._gathered_embedding)
        if self._gathered_embedding is not None:
            self._gathered_embedding.copy_(_gathered(weight))

    @property
    def embedding_address(self) -> int:
        """Address of the embedding table, the one tensor here that the model may move (a captured graph must know)."""
        table = self._embedding.weight if self._gathered_embedding is None else self._gathered_embedding
        return table.data_ptr()

    def rotary_tables(self, positions: int) -> tuple[Tensor, Tensor]:
        """Compute cosines and sines `[positions, D / 2]` of the model's own rotary module for positions from 0 on."""
        # through the model's module: scaled rotations need no code here, and values are rounded to the weights' dtype
        # as in the model's forward. Its first argument only tells dtype and device
        cos, sin = self._rotary(self.norm, torch.arange(positions, device=self.device)[None])
        # transformers repeats the angles for both halves of a head; one half is enough
        half = self.head_dim // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


def _gathered(parameter: Tensor) -> Tensor:
    """Gather a sharded parameter on every rank of those that share it; any other is returned as it is."""
    # a collective: ranks must refresh the same parameters in the same order
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _is_plain(module: nn.Module) -> bool:
    """Whether a layer computes what `nn.Linear` does. By its forward: FSDP2 gives the modules it wraps new classes."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _base_layer(module: nn.Module) -> nn.Linear:
    """Unwrap PEFT's wrappers, to read a layer's shape."""
    while True:
        if hasattr(module, "modules_to_save"):
            module = cast(nn.Module, module.original_module)
        elif hasattr(module, "get_base_layer"):
            module = cast(LoraLinear, module).get_base_layer()
        else:
            return cast(nn.Linear, module)


def _write_merged(module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Write the affine map that `module` computes into `weight` `[in, out]` and `bias` `[out]`."""
    if _is_plain(module):
        linear = cast(nn.Linear, module)
        weight.copy_(_gathered(linear.weight).t())  # a view: writes into its columns of the fused matrix
        if bias is not None and linear.bias is not None:
            bias.copy_(_gathered(linear.bias))
        return
    # by exact type: subclasses compute something else. Variants (DoRA) and adapter biases are not W + scaling · B A
    if (
        type(module) is LoraLinear
        and _is_plain(module.base_layer)
        and not module.lora_variant
        and all(b.bias is None for b in module.lora_B.values())
    ):
        _write_merged(module.base_layer, weight, bias)
        if not module.merged and not module.disable_adapters:
            for name in module.active_adapters:
                if name in module.lora_A:
                    # in float32 whatever the dtype: the product of two half-precision factors loses most of a delta
                    a = _gathered(cast(Tensor, module.lora_A[name].weight)).float()
                    b = _gathered(cast(Tensor, module.lora_B[name].weight)).float()
                    if weight.dtype == torch.float32:
                        weight.addmm_(a.t(), b.t(), alpha=module.scaling[name])
                    else:
                        weight.add_((a.t() @ b.t() * module.scaling[name]).to(weight.dtype))
        return
    _write_probed(module, weight, bias)


def _write_probed(module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Read any affine layer (another adapter type, a quantised base) off its outputs for 0 and for unit vectors."""
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        raise NotImplementedError(
            f"{type(module).__name__} is sharded by FSDP2 and cannot be merged for sampling: use plain linear layers "
            "or plain LoRA adapters, or leave this layer unsharded"
        )
    was_training = module.training
    module.eval()  # adapters have dropout
    in_features = weight.shape[0]
    offset = module(torch.zeros(1, in_features, dtype=weight.dtype, device=weight.device))
    # 1024 unit vectors at a time: the identity of a wide layer would be as large as the layer
    for start in range(0, in_features, 1024):
        rows = slice(start, min(start + 1024, in_features))
        unit = torch.zeros(rows.stop - start, in_features, dtype=weight.dtype, device=weight.device)
        unit[:, rows].fill_diagonal_(1.0)
        weight[rows] = module(unit) - offset
    if bias is not None:
        bias.copy_(offset[0])
    elif offset.any():
        raise NotImplementedError(f"{type(module).__name__} adds a bias to a layer that has none")
    module.train(was_training)
