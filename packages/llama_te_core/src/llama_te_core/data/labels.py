"""Makes a language model's labels: for each token, the token that it is trained to predict.

Shapes: B sequences, S columns of a padded batch. Packed sequences are one row, B = 1.
"""

import torch
from torch.nn import functional as F

# The loss of torch and of transformers ignores this label.
IGNORED_LABEL = -100


def next_token_labels(
    labels: torch.Tensor, attention_mask: torch.Tensor | None = None, ignore_index: int = IGNORED_LABEL
) -> torch.Tensor:
    """Shift labels by one, so that each token stands beside the label that it predicts, the next token's.

    No token predicts the first token of a sequence, so its label is dropped. The mask shows the first token: it follows
    padding, or a token of another sample where values number the samples of a packed row. Without such a mask, the
    first token's label in packed sequences must be `ignore_index`, as collators make it. If it is a separator, the last
    token of the previous sequence is trained on it.

    Args:
        labels: int64 [B, S], the label of each token; for packed sequences [1, T].
        attention_mask: [B, S], 0 at padding on either side, and elsewhere 1 or the number of the token's sample; the
            last S columns of a wider mask count.
        ignore_index: The label of tokens that predict nothing.

    Returns:
        int64 [B, S], for `linear_cross_entropy`, or `NVLlamaForCausalLM` as `shift_labels`.
    """
    next_BS = F.pad(labels[:, 1:], (0, 1), value=ignore_index)
    if attention_mask is None:
        return next_BS
    mask_BS = attention_mask[:, -labels.shape[1] :].to(labels.device)
    dropped_BS = mask_BS == 0
    dropped_BS[:, :-1] |= (mask_BS[:, 1:] != mask_BS[:, :-1]) & (mask_BS[:, 1:] != 0)
    return next_BS.masked_fill(dropped_BS, ignore_index)
