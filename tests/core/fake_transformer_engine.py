"""A stand-in for `transformer_engine.pytorch`: reference layers that record how they were made and called."""

from __future__ import annotations

import contextlib
import enum
import sys
import types

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from llama_te_core.layers import reference as reference_layer
from llama_te_core.layers import selection as layers
from llama_te_core.layers.reference import ReferenceLayer
from llama_te_core.layers.te import TransformerEngineBackend


class DelayedScaling:
    def __init__(self, amax_history_len=1024):
        self.amax_history_len = amax_history_len


class Float8CurrentScaling:
    pass


class Float8BlockScaling:
    pass


class MXFP8BlockScaling:
    pass


class NVFP4BlockScaling:
    pass


class QuantizedTensor(torch.Tensor):
    """A weight of a layer made within `quantized_model_init`."""

    __module__ = "transformer_engine.pytorch.quantized_tensor"

    def __new__(cls, values, requires_grad=False):
        return torch.Tensor._make_subclass(cls, values, requires_grad)

    def dequantize(self):
        return self.detach().as_subclass(torch.Tensor).clone()


class DType(enum.IntEnum):
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8


class Float8Tensor(QuantizedTensor):
    """With one scale: see TE's class."""

    def __new__(cls, values, scale, fp8_dtype=DType.kFloat8E4M3):
        tensor = torch.Tensor._make_subclass(cls, torch.empty(values.shape))
        tensor._data, tensor._scale_inv, tensor._fp8_dtype = values.view(torch.uint8), scale, fp8_dtype
        return tensor


class TensorGroup:
    """The exchange of TE's products with the other processes of a tensor group. Without a group it does nothing."""

    def __init__(self, group, sequence_parallel):
        self.group, self.sequence_parallel = group, sequence_parallel
        self.size = 1 if group is None else dist.get_world_size(group)

    def enter(self, x):
        """Gather all tokens before a product with sharded output features, if each process has a part of them."""
        if self.group is None:
            return x
        return Exchange.apply(x, *((self.gather, self.scatter) if self.sequence_parallel else (Keep(), self.add)))

    def leave(self, x):
        """Sum the result of a product with sharded input features; return this process's part if tokens are shared."""
        if self.group is None:
            return x
        return Exchange.apply(x, *((self.scatter, self.gather) if self.sequence_parallel else (self.add, Keep())))

    def add(self, x):
        total = x.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def gather(self, x):
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts)

    def scatter(self, x):
        return self.add(x).chunk(self.size)[dist.get_rank(self.group)].clone()


class Keep:
    def __call__(self, x):
        return x.view_as(x)


class Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, there, back):
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.back(grad), None, None


class LayerNormLinear(reference_layer.LayerNormLinear):
    __module__ = "transformer_engine.pytorch.module.layernorm_linear"

    def forward(self, hidden_bE):
        normed_bE = nn.functional.rms_norm(hidden_bE, hidden_bE.shape[-1:], self.layer_norm_weight, self.eps)
        return nn.functional.linear(self.tensor_group.enter(normed_bE), self.weight)


class LayerNormMLP(reference_layer.LayerNormMLP):
    __module__ = "transformer_engine.pytorch.module.layernorm_mlp"

    def forward(self, hidden_bE):
        normed_bE = nn.functional.rms_norm(hidden_bE, hidden_bE.shape[-1:], self.layer_norm_weight, self.eps)
        features_bF = nn.functional.linear(self.tensor_group.enter(normed_bE), self.fc1_weight)
        gate_bF, up_bF = features_bF.chunk(2, dim=-1)
        features_bF = nn.functional.silu(gate_bF) * up_bF
        return self.tensor_group.leave(nn.functional.linear(features_bF, self.fc2_weight))


class Linear(nn.Module):
    __module__ = "transformer_engine.pytorch.module.linear"

    def forward(self, input_bE):
        return self.tensor_group.leave(nn.functional.linear(input_bE, self.weight))


class OffloadContext:
    """Checks the rules of TE's context for offloading: layers come one after the other, each in its own context.

    It offloads nothing. `events` records its calls.
    """

    def __init__(self, events, layers, model_layers):
        if layers > model_layers - 1:
            raise ValueError(f"Cannot offload all layers: num_layers={layers}, model_layers={model_layers}.")
        self.events, self.model_layers = events, model_layers
        self.layer, self.inside, self.synchronized = -1, False, True

    def __enter__(self):
        assert not self.inside and self.synchronized
        self.layer = (self.layer + 1) % self.model_layers
        self.inside, self.synchronized = True, False
        self.events.append(("enter offload", self.layer))
        return self

    def __exit__(self, *error):
        self.inside = False
        self.events.append(("exit offload", self.layer))

    def synchronize(self, tensor):
        assert not self.inside and tensor.requires_grad
        self.synchronized = True
        layer = self.layer
        tensor.grad_fn.register_prehook(lambda gradients: self.events.append(("backward", layer)))
        return tensor


class FakeTransformerEngine:
    """The fake and its records for tests: `events` in order, and the stacks of active contexts."""

    def __init__(self):
        self.events = []
        self.autocasts = []
        self.inits = []
        self.layers = []

    @contextlib.contextmanager
    def _active(self, kind, stack, enabled, recipe):
        entry = (enabled, recipe)
        stack.append(entry)
        self.events.append((f"enter {kind}", *entry))
        try:
            yield
        finally:
            self.events.append((f"exit {kind}", *entry))
            assert stack.pop() is entry

    def autocast(self, enabled=True, calibrating=False, recipe=None):
        return self._active("autocast", self.autocasts, enabled, recipe)

    def quantized_model_init(self, enabled=True, recipe=None):
        return self._active("init", self.inits, enabled, recipe)

    def checkpoint(self, function, *args, use_reentrant=True, **kwargs):
        self.events.append(("checkpoint", use_reentrant))
        return torch_checkpoint(function, *args, use_reentrant=use_reentrant, **kwargs)

    def get_cpu_offload_context(self, enabled=False, num_layers=1, model_layers=1):
        assert enabled
        self.events.append(("offload", num_layers, model_layers))
        context = OffloadContext(self.events, num_layers, model_layers)
        return context, context.synchronize

    @staticmethod
    def get_default_recipe():
        return DelayedScaling()

    def install(self, monkeypatch, capability=(9, 0)):
        """Replace Transformer Engine by this fake, and pretend that the machine has a GPU."""
        fake, package = self, types.ModuleType("transformer_engine")
        pytorch = types.ModuleType("transformer_engine.pytorch")

        class TransformerLayer(nn.Module):
            def __init__(self, **arguments):
                super().__init__()
                self.arguments = arguments
                self.layer_number = arguments["layer_number"]
                self.init_context = fake.inits[-1] if fake.inits else None
                self.calls = []
                self.fp8_meta = {}  # TE's modules with matrix products have this attribute
                group = TensorGroup(arguments["tp_group"], arguments["sequence_parallel"])
                ranks = group.size if arguments["set_parallel_mode"] else 1
                sizes = types.SimpleNamespace(
                    hidden_size=arguments["hidden_size"],
                    intermediate_size=arguments["ffn_hidden_size"] // ranks,
                    num_attention_heads=arguments["num_attention_heads"] // ranks,
                    num_key_value_heads=arguments["num_gqa_groups"] // ranks,
                    head_dim=arguments["kv_channels"],
                    rms_norm_eps=arguments["layernorm_epsilon"],
                    attention_dropout=arguments["attention_dropout"],
                )
                inside = ReferenceLayer(sizes, arguments["layer_number"], arguments["kv_channels"] ** -0.5)
                self.self_attention, self.layernorm_mlp = inside.self_attention, inside.layernorm_mlp
                self.self_attention.cp_size = 1  # `set_context_parallel_group` sets it
                self.self_attention.layernorm_qkv.__class__ = LayerNormLinear
                self.self_attention.proj.__class__ = Linear
                self.layernorm_mlp.__class__ = LayerNormMLP
                for module in (self.self_attention.layernorm_qkv, self.self_attention.proj, self.layernorm_mlp):
                    module.tensor_group, module.name = group, None
                self.self_attention.core_attention = CoreAttention(arguments["kv_channels"] ** -0.5)
                for module in self.modules():
                    for name, parameter in module.named_parameters(recurse=False):
                        if name.endswith("weight") and "layer_norm" not in name:
                            arguments["init_method"](parameter.data)
                            if self.init_context is not None:
                                quantized = QuantizedTensor(parameter.data, requires_grad=True)
                                setattr(module, name, nn.Parameter(quantized))
                fake.layers.append(self)

            def forward(self, hidden_bE, **arguments):
                self.calls.append({"autocast": list(fake.autocasts), **arguments})
                fake.events.append(("layer", self.arguments["layer_number"]))
                self.self_attention.softmax_scale = self.self_attention.core_attention.softmax_scale
                projections = (self.self_attention.layernorm_qkv, self.self_attention.proj)
                projections[0].output_quantizer_role = projections[1].name or "dpa"
                projections[1].grad_input_quantizer_role = projections[0].name or "dpa"
                return ReferenceLayer.forward(self, hidden_bE, **arguments)

            def init_fp8_meta_tensors(self, recipe):
                for direction, tensors in (("fwd", 3), ("bwd", 2)):
                    number = self.fp8_meta["num_gemms"] * tensors
                    self.fp8_meta[f"scaling_{direction}"] = types.SimpleNamespace(
                        scale=torch.ones(number), amax_history=torch.zeros(recipe.amax_history_len, number)
                    )

            def get_extra_state(self):
                return torch.zeros(3)

            def set_extra_state(self, state):
                raise RuntimeError("Refusing to load pickled Transformer Engine extra state.")

        class CoreAttention(nn.Module):
            def __init__(self, softmax_scale):
                super().__init__()
                self.softmax_scale = softmax_scale

            def get_extra_state(self):
                return torch.zeros(3)

            def set_extra_state(self, state):
                raise RuntimeError("Refusing to load pickled Transformer Engine extra state.")

        pytorch.TransformerLayer = TransformerLayer
        names = ("autocast", "quantized_model_init", "checkpoint", "get_cpu_offload_context", "get_default_recipe")
        for name in names:
            setattr(pytorch, name, getattr(self, name))
        pytorch.QuantizedTensor = QuantizedTensor
        pytorch.Float8Tensor = Float8Tensor
        package.pytorch = pytorch
        monkeypatch.setitem(sys.modules, "transformer_engine", package)
        quantization = types.ModuleType("transformer_engine.pytorch.quantization")
        quantization.FP8GlobalStateManager = types.SimpleNamespace(
            with_fp8_parameters=lambda: bool(fake.inits) and fake.inits[-1][0]
        )
        monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", pytorch)
        monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.quantization", quantization)
        monkeypatch.setattr(TransformerEngineBackend, "device", torch.device("cpu"))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Fake GPU")
        layers.transformer_engine_problem.cache_clear()
        return self
