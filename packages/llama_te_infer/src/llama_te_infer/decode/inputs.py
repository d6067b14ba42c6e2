"""The inputs of a decoding step: one token for each row of a batch.

Shapes: R rows, P pages per row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(eq=False)
class StepInputs:
    """The rows of a decoding step, in the device's memory.

    How lengths grow: a row's length is the number of its tokens in the cache, and so the position of its last token,
    which the next step stores. A step stores one token for each row and leaves `length_R` as it is
    (`DecodeBackend.__call__`); afterwards `count_step` adds one to the lengths on the device. Where each row takes its
    likeliest token, the step does both (`DecodeBackend.advance`): the kernel that finds the token adds the one. On the
    host lengths grow in one place for each owner of rows, before the step is launched: in `Scheduler.plan` for the
    engine, in `InferenceParams.pre_step` for `generate`. `lengths` is a copy of the owner's lengths.

    Attributes:
        token_R: int64, the last token of each row, which is not in the cache; `NO_TOKEN` of a row that could not choose
            one. The row takes part in steps until the host has read that, and its results are worth nothing.
        length_R: int32, tokens of each row in the cache. Rows behind the batch have 0: a step may compute more rows
            than the batch has, and neither stores nor counts tokens for them.
        page_table_RP: int32; `None` for a contiguous cache.
        lengths: The lengths of the batch's rows before the step, on the host. Only the layers need them.
    """

    token_R: torch.Tensor
    length_R: torch.Tensor
    page_table_RP: torch.Tensor | None
    lengths: list[int] = field(default_factory=list)

    def count_step(self, rows: int) -> None:
        """Add the token that a step has stored to the length of each of the first `rows` rows, on the device."""
        self.length_R[:rows] += 1
