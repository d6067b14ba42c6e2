"""Each token gets the label of the next token in its sequence. The last token gets none."""

import pytest
import torch

from llama_te_core import next_token_labels


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, [[12, 13, 14, -100], [22, 23, 24, -100]]),
        ([[1, 1, 1, 1], [1, 1, 1, 1]], [[12, 13, 14, -100], [22, 23, 24, -100]]),
        ([[0, 1, 1, 1], [0, 0, 0, 1]], [[-100, 13, 14, -100], [-100, -100, -100, -100]]),
        # A label at right padding stays: a collator has set it to -100 already.
        ([[1, 1, 1, 0], [1, 0, 0, 0]], [[12, 13, 14, -100], [22, -100, -100, -100]]),
        ([[1, 1, 0, 1, 1, 1], [1, 1, 0, 0, 1, 1]], [[-100, 13, 14, -100], [-100, -100, 24, -100]]),
    ],
    ids=["no mask", "no padding", "left", "right", "wider mask"],
)
def test_labels_move_to_the_token_before(mask, expected):
    labels_BS = torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24]])
    before_BS = labels_BS.clone()
    shifted_BS = next_token_labels(labels_BS, None if mask is None else torch.tensor(mask))
    assert shifted_BS.tolist() == expected
    assert torch.equal(labels_BS, before_BS)


def test_what_is_packed_keeps_the_labels_between_sequences():
    packed_1T = torch.tensor([[-100, 2, 3, -100, 5, 7, 8]])  # the third begins with a separator
    assert next_token_labels(packed_1T).tolist() == [[2, 3, -100, 5, 7, 8, -100]]


def test_no_label_crosses_from_one_sample_of_a_row_to_the_next():
    labels_BS = torch.tensor([[11, 12, 13, 14, 15], [21, 22, 23, 24, -100]])
    mask_BS = torch.tensor([[1, 1, 2, 2, 3], [0, 1, 2, 2, 0]])
    assert next_token_labels(labels_BS, mask_BS).tolist() == [
        [12, -100, 14, -100, -100],
        [-100, -100, 24, -100, -100],
    ]


def test_another_ignored_label():
    labels_BS = torch.tensor([[1, 2, 3]])
    assert next_token_labels(labels_BS, torch.tensor([[0, 1, 1]]), ignore_index=0).tolist() == [[0, 3, 0]]
