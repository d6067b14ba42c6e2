"""The decoder layer on Transformer Engine (TE). TE itself is imported when a layer is built."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Shard

from ..compat.torch import chosen_device
from ..compat.transformer_engine import (
    context_ranks,
    dequantized,
    fp8_parts,
    fused_adam,
    holds_quantized_weights,
    is_module_of_transformer_engine,
    is_quantized,
    quantize_in_place,
    quantizes_new_weights,
    set_softmax_scale,
    share_scale,
    transformer_engine,
)
from ..precision.plan import PrecisionPlan
from .backend import CACHE_OF_SPLIT_MODEL, LayerBackend, LayerConfig
from .collectives import distribute, local, local_norm, local_part
from .te_cached_attention import CachedAttention

__all__ = ["TransformerEngineBackend", "fp8_parts"]


class TransformerEngineBackend(LayerBackend):
    """Layers are `te.TransformerLayer`s.

    Attributes:
        device: Where a model is built if nobody chose a device.
    """

    name = "transformer_engine"
    can_quantize_weights = True
    device: ClassVar[torch.device] = torch.device("cuda")

    @contextlib.contextmanager
    def construction_context(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Build on the current GPU and in the configuration's dtype, as Transformer Engine's modules are used.

        A device that `with torch.device(...)` or `torch.set_default_device` chose stays. So does a default dtype of
        torch other than float32. float32 counts as no choice, since torch does not tell the two apart.
        """
        default = torch.get_default_dtype()
        if default != torch.float32 or dtype is None or not dtype.is_floating_point:
            dtype = default
        torch.set_default_dtype(dtype)
        try:
            with self.device if chosen_device() is None else contextlib.nullcontext():
                yield
        finally:
            torch.set_default_dtype(default)

    def build(self, config: LayerConfig, precision: PrecisionPlan, softmax_scale: float) -> nn.ModuleList:  # noqa: D102
        layers = []
        for index in range(config.num_hidden_layers):
            with precision.init_context(index, config.use_quantized_model_init):
                layers.append(build_transformer_engine_layer(config, index + 1, softmax_scale))
        return nn.ModuleList(layers)

    def check_precision(self, precision: PrecisionPlan, device: torch.device) -> None:  # noqa: D102
        if precision.quantized:
            index = device if device.type == "cuda" else None
            precision.check(torch.cuda.get_device_capability(index), torch.cuda.get_device_name(index))

    def is_own_module(self, module: nn.Module) -> bool:  # noqa: D102
        return super().is_own_module(module) or is_module_of_transformer_engine(module)

    def is_quantized(self, tensor: torch.Tensor) -> bool:  # noqa: D102
        return is_quantized(tensor)

    def initialize_quantized(self, module: nn.Module) -> bool:  # noqa: D102
        if not holds_quantized_weights(module):
            return False
        own: Any = module
        own.reset_parameters()  # TE's own, which quantizes them
        return True

    def quantize_loaded_weights(self, model: nn.Module) -> None:  # noqa: D102
        for module in model.modules():
            parameters = dict(module.named_parameters(recurse=False))
            if not holds_quantized_weights(module) or any(map(is_quantized, parameters.values())):
                continue
            for name, parameter in parameters.items():
                if parameter.device.type != "cuda":
                    raise RuntimeError(
                        f"{name} is on {parameter.device}, but its module was built to hold quantized weights (by "
                        "use_quantized_model_init=True, or within te.quantized_model_init): weights are quantized on "
                        "a GPU, so load the model there (device_map='cuda')."
                    )
            quantize_in_place(module)

    def dense_state_dict(self, model: nn.Module) -> dict[str, torch.Tensor] | None:  # noqa: D102
        if not any(map(is_quantized, model.parameters())):
            return None
        return {name: dequantized(tensor) for name, tensor in model.state_dict().items()}

    def quantized_parameters(self, model: nn.Module) -> list[nn.Parameter]:  # noqa: D102
        with torch.no_grad():
            return [parameter for parameter in model.parameters() if is_quantized(local_part(parameter))]

    def share_scale(self, parameter: nn.Parameter, group: Any) -> None:  # noqa: D102
        share_scale(local_part(parameter), group)

    def fp8_parts(self, parameter: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:  # noqa: D102
        return fp8_parts(parameter)

    def make_adamw(  # noqa: D102
        self,
        groups: list[dict[str, Any]],
        options: Mapping[str, Any],
        first_values: Mapping[torch.Tensor, torch.Tensor],
    ) -> torch.optim.Optimizer:
        quantized = {each for group in groups for each in group["params"] if is_quantized(local_part(each))}
        if not quantized:
            return super().make_adamw(groups, options, first_values)
        # A float32 parameter is its own master weight.
        return fused_adam(groups, lambda each: each in quantized or each.dtype != torch.float32, first_values, options)

    def checkpoint(  # noqa: D102
        self,
        function: Callable[..., torch.Tensor],
        *args: Any,
        torch_checkpoint: Callable[..., torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        # TE's own version also restores the state of FP8 scaling.
        output: torch.Tensor = transformer_engine().checkpoint(function, *args, use_reentrant=False, **kwargs)
        return output

    def offload_activations(self, layers: Sequence[nn.Module], count: int) -> None:
        """See `LayerBackend`. TE copies large activations, and no weights, while other layers compute."""
        context, synchronize = transformer_engine().get_cpu_offload_context(
            enabled=True, num_layers=count, model_layers=len(layers)
        )
        layer: Any
        for layer in layers:  # every layer: the context counts layers, and copies continue while later layers compute
            layer.forward = functools.partial(_forward_with_context, layer.forward, context, synchronize)

    def split_tensor(
        self, layer: nn.Module, config: LayerConfig, softmax_scale: float, mesh: DeviceMesh, placement: Placement
    ) -> None:
        """See `LayerBackend`.

        TE fixes sizes and communication when it builds a layer; `set_tensor_parallel_group` sets the group alone. So
        this method builds a new layer for the group. Its modules replace the modules of `layer` and take over their
        weights.
        """
        whole: Any = layer
        distribute(whole.self_attention.proj, mesh, weight=Shard(1))
        with torch.device("meta"):
            part: Any = build_transformer_engine_layer(
                config, whole.self_attention.layer_number, softmax_scale, mesh.get_group(), placement.is_shard()
            )
        for name in ("self_attention.layernorm_qkv", "self_attention.proj", "layernorm_mlp"):
            module = part.get_submodule(name)
            for key, weight in layer.get_submodule(name).named_parameters(recurse=False):
                setattr(module, key, weight)
            _compute_with_local_weights(module, mesh, placement)
        part.train(layer.training)
        # The layer itself stays, since other code may have wrapped its forward pass or hooked it.
        whole.self_attention, whole.layernorm_mlp = part.self_attention, part.layernorm_mlp
        layer.register_forward_pre_hook(_refuse_cache, with_kwargs=True, prepend=True)

    def split_context(self, layers: Sequence[nn.Module], mesh: DeviceMesh, kind: str, key_value_heads: int) -> None:  # noqa: D102
        ranks = mesh.size()
        if kind == "a2a" and key_value_heads % ranks:
            raise ValueError(
                f"context_kind='a2a' with context={ranks}, which does not divide the key/value heads of a tensor rank="
                f"{key_value_heads}: choose a size that does."
            )

        group = mesh.get_group()
        stream = torch.cuda.Stream()  # attention's second stream; the layers use it in turn
        layer: Any
        for layer in layers:
            layer.set_context_parallel_group(group, dist.get_process_group_ranks(group), stream, kind)

    def context_ranks_of(self, layer: nn.Module) -> int:  # noqa: D102
        return context_ranks(layer)

    def is_own_hook(self, hook: Callable[..., Any]) -> bool:  # noqa: D102
        own = (__name__, CachedAttention.__module__)
        return getattr(hook, "__module__", None) in own or super().is_own_hook(hook)


def build_transformer_engine_layer(
    config: LayerConfig,
    layer_number: int,
    softmax_scale: float,
    tensor_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
) -> nn.Module:
    """Build a `te.TransformerLayer` with the sizes of `config`, in torch's default dtype and on its default device.

    Args:
        config: Sizes of the model.
        layer_number: Number of the layer, from 1, as TE counts.
        softmax_scale: The factor on query·key in attention.
        tensor_group: Processes that share heads and features; the layer has this process's part of the weights.
        sequence_parallel: Whether each process has a part of the tokens (the first dimension) outside the products.

    Raises:
        RuntimeError: Weights are to be quantized (`use_quantized_model_init`, or an active `te.quantized_model_init`)
            on a device that holds no quantized weights.
    """
    device = torch.get_default_device()
    # On the host, TE's kernel would read the weight by an address of the host: an illegal memory access, some calls
    # later.
    if device.type not in ("cuda", "meta") and (config.use_quantized_model_init or quantizes_new_weights()):
        what = "use_quantized_model_init=True" if config.use_quantized_model_init else "te.quantized_model_init"
        raise RuntimeError(
            f"{what} needs the model to be built on a GPU, but the default device is {device}: leave the device out, "
            "or build it under `with torch.device('cuda')`, or under 'meta' followed by init_empty_weights()."
        )

    def initialize(weight: torch.Tensor) -> torch.Tensor:
        return nn.init.normal_(weight, std=config.initializer_range)

    layer: nn.Module = transformer_engine().TransformerLayer(
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_gqa_groups=config.num_key_value_heads,
        kv_channels=config.head_dim,
        layernorm_epsilon=config.rms_norm_eps,
        hidden_dropout=0.0,
        attention_dropout=float(config.attention_dropout or 0.0),
        layer_number=layer_number,
        attn_input_format=config.attn_input_format,
        self_attn_mask_type=config.self_attn_mask_type,
        normalization="RMSNorm",
        activation="swiglu",
        bias=False,
        fuse_qkv_params=True,
        qkv_weight_interleaved=True,
        init_method=initialize,
        output_layer_init_method=initialize,
        params_dtype=torch.get_default_dtype(),
        device=str(device),  # TE knows "meta" by its name only
        tp_group=tensor_group,
        set_parallel_mode=tensor_group is not None,
        sequence_parallel=sequence_parallel,
    )
    set_softmax_scale(layer, softmax_scale)
    _hide_extra_state(layer)
    layer.register_forward_pre_hook(_refuse_weights_on_the_host)
    layer.register_forward_pre_hook(_refuse_adapted_norms)
    CachedAttention(layer, config, layer_number)
    return layer


def _refuse_weights_on_the_host(layer: nn.Module, args: Any) -> None:
    """Refuse weights on the host for an input on the GPU, since TE checks the input's device alone."""
    weight_device = next(layer.parameters()).device
    if args and weight_device.type == "cpu" and args[0].device.type != "cpu":
        raise RuntimeError(
            f"a decoder layer's weights are on {weight_device}, but its input is on {args[0].device}: move the model "
            "there with model.to(...)."
        )


def _refuse_adapted_norms(layer: nn.Module, args: Any) -> None:
    """Refuse an adapter that PEFT placed before a norm, since `lora.on_weights` did not see its configuration."""
    adaptable: Any = layer
    for module in (adaptable.self_attention.layernorm_qkv, adaptable.layernorm_mlp):
        if "base_layer" in dict(module.named_children()) and not hasattr(module, "parameter_name"):
            raise RuntimeError(
                f"a layer's {type(module.base_layer).__name__} has an adapter, {type(module).__name__}, of the input "
                "of its norm: it could not be merged or exported. Give PEFT its configuration through "
                "llama_te_core.lora.on_weights, for get_peft_model and, as config=, for PeftModel.from_pretrained."
            )


def _compute_with_local_weights(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    """Show a module of TE the local part of each weight during its forward pass; TE's kernels take no `DTensor`."""

    def show(module: nn.Module, args: Any) -> None:
        for name, weight in module.named_parameters(recurse=False):
            is_norm = name == "layer_norm_weight"
            # Python finds an attribute of the object before a parameter of the same name.
            module.__dict__[name] = local_norm(weight, mesh, placement) if is_norm else local(weight, mesh)

    def hide(module: nn.Module, args: Any, output: Any) -> None:
        for name, _ in module.named_parameters(recurse=False):
            module.__dict__.pop(name, None)

    module.register_forward_pre_hook(show)
    module.register_forward_hook(hide, always_call=True)


def _refuse_cache(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("inference_params") is not None:
        raise ValueError(CACHE_OF_SPLIT_MODEL)


def _hide_extra_state(layer: nn.Module) -> None:
    """Remove TE's `_extra_state` entries from the layer's state dict, and ignore them when loading.

    The entries hold the scales of FP8, which the first steps compute again. A checkpoint without them fits either
    implementation of the layer.
    """

    def drop(module: nn.Module, state_dict: dict[str, Any], prefix: str, *details: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix) and key.endswith("_extra_state")]:
            del state_dict[key]

    def do_not_miss(module: nn.Module, incompatible_keys: Any) -> None:
        missing = incompatible_keys.missing_keys
        missing[:] = [key for key in missing if not key.endswith("_extra_state")]

    layer.register_state_dict_post_hook(drop)
    layer.register_load_state_dict_pre_hook(drop)
    layer.register_load_state_dict_post_hook(do_not_miss)


class _Forward(Protocol):
    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor: ...


def _forward_with_context(
    forward: _Forward, context: AbstractContextManager[Any], synchronize: _Forward, *args: Any, **kwargs: Any
) -> torch.Tensor:
    if not torch.is_grad_enabled():  # nothing is kept, and `synchronize` refuses a tensor without a gradient
        return forward(*args, **kwargs)
    with context:
        output = forward(*args, **kwargs)
    return synchronize(output)
