"""A decoder's weights in the form that decoding reads: fused matrices with adapters merged, at addresses that stay.

Parameters that FSDP2 has sharded are gathered as they are copied, one matrix at a time: all ranks refresh together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


class FusedLinear:
    """Several linear layers that read the same input, side by side in one matrix `[in, sum of out]`.

    Args:
        modules: the layers, plain or wrapped by PEFT.
        packed: keep the matrix as oneDNN's kernels read it (see `can_pack`) and not as `weight`. MKL has kernels of
            their own for few rows, which are slow where no cache holds the matrix and give other bits than those for a
            batch; here a row's product does not depend on the rows beside it (under AVX2; not measured elsewhere).

    Attributes:
        weight: the matrix, in memory as the layers' own (output-major), at an address that stays; None if packed.
        bias: `[sum of out]`, or None.
    """

    def __init__(self, modules: Sequence[nn.Module], packed: bool = False):
        self.modules = list(modules)
        bases = [_base(module) for module in self.modules]
        self.widths = [base.out_features for base in bases]
        self._shape = (sum(self.widths), bases[0].in_features)
        self._kind = {"dtype": bases[0].weight.dtype, "device": bases[0].weight.device}
        self.weight = None if packed else self._empty()
        self._packed: Tensor | None = None
        has_bias = any(base.bias is not None for base in bases)
        self.bias = torch.zeros(self._shape[0], **self._kind) if has_bias else None
        self._seen: list[tuple | None] = [None] * len(bases)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the layers' present weights, adapters merged. Frozen layers that have not changed are skipped."""
        states = [_frozen_state(module) for module in self.modules]
        stale = [state is None or state != seen for state, seen in zip(states, self._seen, strict=True)]
        if not any(stale):
            return
        weight = self.weight
        if weight is None:
            weight, stale = self._empty(), [True] * len(stale)
        biases = self.bias.split(self.widths) if self.bias is not None else [None] * len(self.modules)
        columns = weight.split(self.widths, dim=1)
        for module, column, bias, write in zip(self.modules, columns, biases, stale, strict=True):
            if write:
                _write_merged(module, column, bias)
        if self.weight is None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.t())
        self._seen = states

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`x @ weight + bias (+ residual)`, `[rows, in]` → `[rows, out]`."""
        if self.weight is None:
            linear = torch.ops.mkldnn._linear_pointwise
            if residual is None:
                return linear(x, self._packed, self.bias, "none", [], "")
            return linear.binary(x, residual, self._packed, self.bias, "add")
        if residual is None:
            return x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)
        out = torch.addmm(residual, x, self.weight)
        return out if self.bias is None else out.add_(self.bias)

    def _empty(self) -> Tensor:
        return torch.empty(self._shape, **self._kind).t()


def can_pack(weight: Tensor) -> bool:
    """Whether matrices like `weight` can be packed for oneDNN: float32 on a CPU, in a torch that was built with it."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class CopiedVector:
    """A norm's weight, `[width]`."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.weight = torch.empty(module.weight.shape, dtype=module.weight.dtype, device=module.weight.device)

    @torch.no_grad()
    def refresh(self) -> None:
        self.weight.copy_(_gathered(self.module.weight))


@dataclass
class FlatLayer:
    """One decoder layer."""

    input_norm: CopiedVector
    qkv: FusedLinear
    q_norm: CopiedVector | None
    k_norm: CopiedVector | None
    out: FusedLinear
    mlp_norm: CopiedVector
    gate_up: FusedLinear
    down: FusedLinear


class FlatWeights:
    """The weights of a Qwen2, Qwen3, Llama or Mistral causal LM. Embeddings are the model's own unless sharded.

    Args:
        model: the LM; its linear layers may be wrapped by PEFT.
        packed: see `FusedLinear`.
    """

    def __init__(self, model: PreTrainedModel, packed: bool = False):
        def linear(*modules: nn.Module) -> FusedLinear:
            return FusedLinear(modules, packed)

        def head_norm(attention: nn.Module, name: str) -> CopiedVector | None:
            return CopiedVector(getattr(attention, name)) if hasattr(attention, name) else None

        decoder = model.base_model
        self._embedding = model.get_input_embeddings()
        self._table: Tensor | None = None
        self.layers = [
            FlatLayer(
                input_norm=CopiedVector(layer.input_layernorm),
                qkv=linear(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                q_norm=head_norm(layer.self_attn, "q_norm"),
                k_norm=head_norm(layer.self_attn, "k_norm"),
                out=linear(layer.self_attn.o_proj),
                mlp_norm=CopiedVector(layer.post_attention_layernorm),
                gate_up=linear(layer.mlp.gate_proj, layer.mlp.up_proj),
                down=linear(layer.mlp.down_proj),
            )
            for layer in decoder.layers
        ]
        self.norm = CopiedVector(decoder.norm)
        self.head = linear(model.get_output_embeddings())

    def refresh(self) -> None:
        """Bring every copy up to date with the model."""
        for part in self._parts():
            part.refresh()
        weight = self._embedding.weight
        if isinstance(weight, DTensor) and self._table is None:
            self._table = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        if self._table is not None:
            with torch.no_grad():
                self._table.copy_(_gathered(weight))

    def embed(self, tokens: Tensor) -> Tensor:
        """Token embeddings `[B, H]` of int64 `[B]`."""
        return self._embedding(tokens) if self._table is None else F.embedding(tokens, self._table)

    @property
    def embedding_address(self) -> int:
        """Where the table of embeddings lies: the one part that a model may move."""
        return (self._embedding.weight if self._table is None else self._table).data_ptr()

    def _parts(self) -> Iterator[FusedLinear | CopiedVector]:
        for layer in self.layers:
            yield from (layer.input_norm, layer.qkv, layer.out, layer.mlp_norm, layer.gate_up, layer.down)
            if layer.q_norm is not None:
                yield from (layer.q_norm, layer.k_norm)
        yield from (self.norm, self.head)


def _gathered(parameter: Tensor) -> Tensor:
    """A parameter whole, on every rank of those that share it."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _is_plain(module: nn.Module) -> bool:
    """A linear layer that computes what `nn.Linear` does; FSDP2 gives those it wraps a class of their own."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _base(module: nn.Module) -> nn.Module:
    """The plain layer inside PEFT's wrappers, for its shape."""
    while True:
        if hasattr(module, "modules_to_save"):
            module = module.original_module
        elif hasattr(module, "get_base_layer"):
            module = module.get_base_layer()
        else:
            return module


def _frozen_state(module: nn.Module) -> tuple | None:
    """Identifies the weights of a plain layer that nothing trains; None for any other, which is always copied."""
    if not _is_plain(module) or module.weight.requires_grad:
        return None
    weight = module.weight.to_local() if isinstance(module.weight, DTensor) else module.weight
    return weight.data_ptr(), weight._version


def _write_merged(module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Write what `module` computes into `weight` `[in, out]` and `bias` `[out]`."""
    if _is_plain(module):
        weight.copy_(_gathered(module.weight).t())
        if bias is not None and module.bias is not None:
            bias.copy_(_gathered(module.bias))
        return
    if type(module) is LoraLinear and _is_plain(module.base_layer) and _is_plain_lora(module):
        _write_merged(module.base_layer, weight, bias)
        if not module.merged and not module.disable_adapters:
            for name in module.active_adapters:
                if name in module.lora_A:
                    a, b = (_gathered(part[name].weight).float() for part in (module.lora_A, module.lora_B))
                    if weight.dtype == torch.float32:
                        weight.addmm_(a.t(), b.t(), alpha=module.scaling[name])
                    else:
                        weight.add_((a.t() @ b.t() * module.scaling[name]).to(weight.dtype))
        return
    _write_probed(module, weight, bias)


def _is_plain_lora(module: LoraLinear) -> bool:
    """No DoRA-like variant and no adapter bias: the layer is W + scaling · B A."""
    return not module.lora_variant and all(b.bias is None for b in module.lora_B.values())


def _write_probed(module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Read any affine layer (another adapter type, a quantised base) off its answers to 0 and to unit vectors."""
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        raise NotImplementedError(
            f"{type(module).__name__} is sharded by FSDP2 and cannot be merged for sampling: use plain linear layers "
            "or plain LoRA adapters, or leave this layer unsharded"
        )
    was_training = module.training
    module.eval()
    zero = torch.zeros(1, weight.shape[0], dtype=weight.dtype, device=weight.device)
    offset = module(zero)
    for start in range(0, weight.shape[0], 1024):
        rows = slice(start, min(start + 1024, weight.shape[0]))
        unit = torch.zeros(rows.stop - start, weight.shape[0], dtype=weight.dtype, device=weight.device)
        unit[:, rows].fill_diagonal_(1.0)
        weight[rows] = module(unit) - offset
    if bias is not None:
        bias.copy_(offset[0])
    elif offset.any():
        raise NotImplementedError(f"{type(module).__name__} adds a bias to a layer that has none")
    module.train(was_training)
