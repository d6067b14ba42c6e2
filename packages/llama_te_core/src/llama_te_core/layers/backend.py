"""The interface of the two implementations of the decoder layer.

A model asks its `LayerBackend` each question that the two answer differently. No other code looks at the class of a
layer.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement

from ..precision.plan import PrecisionPlan

CACHE_OF_SPLIT_MODEL = (
    "past_key_values is given, but the model is split over tensor or context ranks, where layers take no cache: pass "
    "use_cache=False, or run the model unsplit."
)


class LayerConfig(Protocol):
    """The fields of `NVLlamaConfig` that a layer is built from."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    attention_dropout: float
    initializer_range: float
    attn_input_format: str
    self_attn_mask_type: str
    use_quantized_model_init: bool


class LayerBackend(ABC):
    """One implementation of the decoder layer.

    Objects have no state. The defaults here are right for layers of ordinary PyTorch modules and dtypes.

    Attributes:
        name: The value of `NVLlamaConfig.layer_implementation` that asks for it.
        can_quantize_weights: Whether layers can hold their weights in a quantized format only, as
            `NVLlamaConfig.use_quantized_model_init` asks.
        takes_both_formats: Whether layers take padded batches and packed tokens, whatever
            `NVLlamaConfig.attn_input_format` says.
    """

    name: ClassVar[str]
    can_quantize_weights: ClassVar[bool] = False
    takes_both_formats: ClassVar[bool] = False

    def construction_context(self, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which a model with these layers is built: torch's own device and dtype, by default.

        Args:
            dtype: `config.dtype`.
        """
        return contextlib.nullcontext()

    @abstractmethod
    def build(self, config: LayerConfig, precision: PrecisionPlan, softmax_scale: float) -> nn.ModuleList:
        """Build all decoder layers of a model, in torch's default dtype and on its default device.

        Args:
            config: Sizes of the model.
            precision: The precision of each layer; a layer may be built in its format.
            softmax_scale: The factor on query·key in attention.
        """

    @abstractmethod
    def check_precision(self, precision: PrecisionPlan, device: torch.device) -> None:
        """Refuse a precision that the layers cannot compute in.

        Args:
            precision: The precision of each layer.
            device: The model's.

        Raises:
            RuntimeError: See `precision.recipes.check_recipe`.
        """

    # Weights

    def is_own_module(self, module: nn.Module) -> bool:
        """Tell whether a module is one of the layers' own classes, which `_init_weights` does not know."""
        return hasattr(module, "layer_norm_weight")

    def is_quantized(self, tensor: torch.Tensor) -> bool:
        """Tell whether a tensor is held in a quantized format only."""
        return False

    def initialize_quantized(self, module: nn.Module) -> bool:
        """Give a module on the meta device memory and random weights, if it holds quantized weights.

        Returns:
            Whether it does; any other module stays as it is.
        """
        return False

    def quantize_loaded_weights(self, model: nn.Module) -> None:
        """Quantize weights that a checkpoint's ordinary tensors have replaced.

        Raises:
            RuntimeError: The weights are not on a GPU.
        """
        return None

    def dense_state_dict(self, model: nn.Module) -> dict[str, torch.Tensor] | None:
        """Return the state dict with quantized weights in the model's dtype; `None` where there are none."""
        return None

    def quantized_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the parameters that exist in a quantized format only.

        All processes of a mesh get the same ones, or their parts of them.
        """
        return []

    def share_scale(self, parameter: nn.Parameter, group: Any) -> None:
        """Let the processes of a group quantize their parts of one weight with one scale."""
        raise ValueError(f"layers of {self.name} hold no quantized weights.")

    def fp8_parts(self, parameter: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the values, float8_e4m3fn, and the scale, float32 [1], of a weight in FP8; `None` for any other."""
        return None

    # Training

    def make_adamw(
        self,
        groups: list[dict[str, Any]],
        options: Mapping[str, Any],
        first_values: Mapping[torch.Tensor, torch.Tensor],
    ) -> torch.optim.Optimizer:
        """Make the AdamW that suits the weights; a quantized one gets a weight in FP32 in the optimizer's state.

        Args:
            groups: Parameter groups, with their weight decays.
            options: `lr`, `betas` and `eps`.
            first_values: The float32 values of quantized parameters; others begin with their rounded value.
        """
        on_gpu = groups[0]["params"][0].device.type == "cuda"
        return torch.optim.AdamW(groups, **options, fused=on_gpu)

    @abstractmethod
    def checkpoint(
        self,
        function: Callable[..., torch.Tensor],
        *args: Any,
        torch_checkpoint: Callable[..., torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Run a layer without keeping its activations; the backward pass computes them again.

        Args:
            function: The layer, or its forward function.
            args: Its arguments.
            torch_checkpoint: Called with a function and its positional arguments, by layers of plain PyTorch; torch's
                own without re-entrance by default.
            kwargs: Its arguments by name.
        """

    @abstractmethod
    def offload_activations(self, layers: Sequence[nn.Module], count: int) -> None:
        """Let the first layers keep their activations in the host's memory until the backward pass.

        Args:
            layers: All layers of a model; they are changed.
            count: The number of layers that offload.
        """

    # Many processes

    @abstractmethod
    def split_tensor(
        self, layer: nn.Module, config: LayerConfig, softmax_scale: float, mesh: DeviceMesh, placement: Placement
    ) -> None:
        """Share the heads and the features of the MLP out over tensor ranks.

        Args:
            layer: A layer whose weights of the QKV product and of the MLP are `DTensor`s on the mesh; it is changed.
            config: The layer was built with it.
            softmax_scale: The same.
            mesh: The tensor ranks, one dimension.
            placement: Of the tokens that come in and go out: `Replicate()` or `Shard(0)`.
        """

    @abstractmethod
    def split_context(self, layers: Sequence[nn.Module], mesh: DeviceMesh, kind: str, key_value_heads: int) -> None:
        """Share the tokens of each sequence out over context ranks.

        Args:
            layers: All layers of a model; from now on their input is a rank's part of each sequence, as
                `parallel.context.shard_context` cuts it.
            mesh: The context ranks, one dimension.
            kind: How ranks get each other's keys and values: "p2p", "all_gather" or "a2a" (TE's `cp_comm_type`).
            key_value_heads: Of one tensor rank.

        Raises:
            ValueError: The kind does not fit the number of heads.
        """

    @abstractmethod
    def context_ranks_of(self, layer: nn.Module) -> int:
        """Return the number of processes that share each sequence in a layer, 1 if it is not split."""

    def context_ranks(self, layers: Iterable[nn.Module]) -> int:
        """Return the number of processes that share each sequence.

        The layers know, whoever called their `set_context_parallel_group`.

        Raises:
            ValueError: Layers have different numbers.
        """
        numbers = {self.context_ranks_of(layer) for layer in layers}
        if len(numbers) > 1:
            raise ValueError(
                f"layers have context groups of {sorted(numbers)} processes: call set_context_parallel_group on all "
                "layers with the same group."
            )
        return next(iter(numbers), 1)

    def is_own_hook(self, hook: Callable[..., Any]) -> bool:
        """Tell whether a hook on a module is one that the layers themselves registered."""
        from .projections import is_projections_hook  # here, since that module imports this one

        return is_projections_hook(hook)
