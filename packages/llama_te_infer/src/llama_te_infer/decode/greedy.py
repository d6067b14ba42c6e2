"""The likeliest token of each row.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import torch

from ..ops import library
from ..ops.greedy import NO_TOKEN, greedy


class GreedyWorkspace:
    """Memory of the kernel `greedy`. Calls that may run at the same time need one each.

    Args:
        rows: Most rows of a call.
        device: Of the memory.
    """

    def __init__(self, rows: int, device: torch.device | str) -> None:
        self.best_R = torch.zeros(rows, dtype=torch.int64, device=device)
        self.ticket_R = torch.zeros(rows, dtype=torch.int32, device=device)


def take_likeliest(
    choice_BV: torch.Tensor, token_B: torch.Tensor, workspace: GreedyWorkspace, length_B: torch.Tensor | None = None
) -> None:
    """Write the token of each row's largest element, the first of equal ones, and count the token.

    A row with NaN, or whose largest element is infinite, gets `NO_TOKEN`. The host does not wait to find that out.

    Args:
        choice_BV: The rows' logits, or logits with noise.
        token_B: int64, the output.
        workspace: Of at least B rows.
        length_B: int32; 1 is added to each length that is not 0, as `StepInputs` says.
    """
    takes_kernel = choice_BV.is_cuda and choice_BV.dtype == torch.bfloat16 and choice_BV.shape[1] % 8 == 0
    if takes_kernel and choice_BV.is_contiguous() and library.available("cuda"):
        rows = len(choice_BV)
        greedy(choice_BV, token_B, length_B, workspace.best_R[:rows], workspace.ticket_R[:rows])
        return
    torch.argmax(choice_BV, dim=-1, out=token_B)  # the place of a NaN where a row has one
    token_B.masked_fill_(~choice_BV.gather(1, token_B[:, None])[:, 0].isfinite(), NO_TOKEN)
    if length_B is not None:
        length_B.add_(length_B > 0)
