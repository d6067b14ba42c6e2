"""The section `optimizer` of a configuration."""

from dataclasses import dataclass

from .bounds import at_least, finite


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; its states have the dtype of the weights.

    Attributes:
        learning_rate: The largest learning rate of the run; see `schedule`.
        beta1: Decay of the mean of gradients.
        beta2: Decay of the mean of their squares.
        epsilon: Added to the root of that mean.
        weight_decay: Decay of matrices; the norms' weights do not decay.
        max_norm: Gradients with a larger norm are scaled down to it.
        z_loss: Adds this times the mean of logsumexp² of the logits to the loss, which keeps them from drifting.
        loss_chunk_tokens: The number of tokens whose logits exist at one time.
    """

    learning_rate: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    max_norm: float = 1.0
    z_loss: float = 0.0
    loss_chunk_tokens: int = 2048

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epsilon", "weight_decay", "z_loss"):
            finite(f"optimizer.{name}", getattr(self, name))
        if not self.max_norm > 0:
            raise ValueError(f"optimizer.max_norm={self.max_norm!r}: it must be above 0; .inf scales nothing down.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name}={getattr(self, name)!r}: it must be at least 0 and below 1.")
        at_least("optimizer.loss_chunk_tokens", self.loss_chunk_tokens, 1)
