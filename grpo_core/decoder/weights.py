"""A decoder's weights in the form that decoding reads: fused matrices with adapters merged, at addresses that stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel


class FusedLinear:
    """Several linear layers that read the same input, side by side in one matrix `[in, sum of out]`.

    On a CPU the matrix is stored input-major: matrix products then give each row the same bits whatever the number of
    rows (for inputs of up to 768; above that, the same up to rounding).
    """

    def __init__(self, modules: Sequence[nn.Module]):
        self.modules = list(modules)
        bases = [_base(module) for module in self.modules]
        weight = bases[0].weight
        self.widths = [base.out_features for base in bases]
        shape = (bases[0].in_features, sum(self.widths))
        if weight.device.type == "cpu":
            self.weight = torch.empty(shape, dtype=weight.dtype)
        else:
            self.weight = torch.empty(shape[::-1], dtype=weight.dtype, device=weight.device).t()
        has_bias = any(base.bias is not None for base in bases)
        self.bias = torch.zeros(shape[1], dtype=weight.dtype, device=weight.device) if has_bias else None
        self._seen: list[tuple | None] = [None] * len(bases)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the layers' present weights, adapters merged. Frozen layers that have not changed are skipped."""
        biases = self.bias.split(self.widths) if self.bias is not None else [None] * len(self.modules)
        columns = self.weight.split(self.widths, dim=1)
        for i, (module, weight, bias) in enumerate(zip(self.modules, columns, biases, strict=True)):
            state = _frozen_state(module)
            if state is None or state != self._seen[i]:
                _write_merged(module, weight, bias)
                self._seen[i] = state

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`x @ weight + bias (+ residual)`, `[rows, in]` → `[rows, out]`."""
        if x.shape[0] == 1 and x.device.type == "cpu":
            # one row would take the matrix-vector kernel, whose bits differ from those of a batch
            twice = None if residual is None else residual.expand(2, -1)
            return self(x.expand(2, -1), twice)[:1]
        if residual is None:
            return x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)
        out = torch.addmm(residual, x, self.weight)
        return out if self.bias is None else out.add_(self.bias)


@dataclass
class FlatLayer:
    """One decoder layer."""

    input_norm: nn.Module
    qkv: FusedLinear
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    out: FusedLinear
    mlp_norm: nn.Module
    gate_up: FusedLinear
    down: FusedLinear


class FlatWeights:
    """The weights of a Qwen2, Qwen3, Llama or Mistral causal LM. Embeddings and norms are the model's own modules.

    Args:
        model: the LM; its linear layers may be wrapped by PEFT.
    """

    def __init__(self, model: PreTrainedModel):
        decoder = model.base_model
        self.embed = model.get_input_embeddings()
        self.layers = [
            FlatLayer(
                input_norm=layer.input_layernorm,
                qkv=FusedLinear([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
                q_norm=getattr(layer.self_attn, "q_norm", None),
                k_norm=getattr(layer.self_attn, "k_norm", None),
                out=FusedLinear([layer.self_attn.o_proj]),
                mlp_norm=layer.post_attention_layernorm,
                gate_up=FusedLinear([layer.mlp.gate_proj, layer.mlp.up_proj]),
                down=FusedLinear([layer.mlp.down_proj]),
            )
            for layer in decoder.layers
        ]
        self.norm = decoder.norm
        self.head = FusedLinear([model.get_output_embeddings()])

    def refresh(self) -> None:
        """Bring every fused matrix up to date with the model."""
        for linear in self._linears():
            linear.refresh()

    def _linears(self) -> Iterator[FusedLinear]:
        for layer in self.layers:
            yield from (layer.qkv, layer.out, layer.gate_up, layer.down)
        yield self.head


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
    if type(module) is not nn.Linear or module.weight.requires_grad:
        return None
    return module.weight.data_ptr(), module.weight._version


def _write_merged(module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Write what `module` computes into `weight` `[in, out]` and `bias` `[out]`."""
    if type(module) is nn.Linear:
        weight.copy_(module.weight.t())
        if bias is not None and module.bias is not None:
            bias.copy_(module.bias)
        return
    if type(module) is LoraLinear and type(module.base_layer) is nn.Linear and _is_plain_lora(module):
        _write_merged(module.base_layer, weight, bias)
        if not module.merged and not module.disable_adapters:
            for name in module.active_adapters:
                if name in module.lora_A:
                    a, b = module.lora_A[name].weight.float(), module.lora_B[name].weight.float()
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
