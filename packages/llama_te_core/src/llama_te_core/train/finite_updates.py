"""Updates of weights that stop at the first loss or gradient that is infinite or NaN."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..compat.torch import step_unless


class FiniteUpdates:
    """The updates of an optimizer, up to the first step whose loss or gradients are not finite.

    That step and all later ones change neither weights nor the optimizer's state, in no process. The decision stays on
    the device, so that the host can run ahead; `Metrics.report` reads the losses later, and ends the run.

    Args:
        optimizer: The optimizer.
        device: The device of the losses.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.optimizer = optimizer
        self._failed = torch.zeros((), device=device)

    @torch.no_grad()
    def step(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Update the weights, unless this step or an earlier one is not finite. All processes call this together.

        Args:
            loss: This process's loss, [].
            norm: The norm of all gradients, [], the same in all processes.
        """
        finite = loss.isfinite() & norm.isfinite()
        self._failed.copy_(torch.maximum(self._failed, (~finite).float()))
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._failed, dist.ReduceOp.MAX)  # each process knows its own loss only
        step_unless(self.optimizer, self._failed)
