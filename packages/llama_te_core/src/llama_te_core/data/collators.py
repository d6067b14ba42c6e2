"""Turns the padded batch of a Hugging Face collator into one packed (THD) batch.

Shape suffixes: B rows of the padded batch, S its padded length, R real tokens, N packed sequences (the rows that have
a real token, then the dummy sequence if there is one), T tokens of the packed buffer. A token is "real" if the
attention mask keeps it.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DataCollatorForTokenClassification

from .labels import IGNORED_LABEL


@dataclass
class DataCollatorWithFlattening:
    """Packs the batch of another collator into one row without padding, for THD attention.

    The wrapped collator does its own work first (masking, label making, padding). This class then lays the tokens that
    the attention mask keeps end to end, for padding on either side.

    **Loss boundaries.** A causal language model shifts labels itself: token ``t`` is trained on label ``t + 1``. In a
    packed row this would train the last token of a sequence on the first token of the next one. Therefore the label
    at the first token of every sequence becomes ``separator_id``, by default -100, which the loss ignores. This loses
    no training signal: no token of its own sequence comes before the first token and could predict it. A model that
    does not shift (token classification) needs ``separator_id=None``, which keeps every label. ``shift_labels`` from
    the wrapped collator are aligned with the tokens already, so their values stay.

    **Padding.** Both options may be combined. ``pad_sequences_to_be_divisible_by`` pads each sequence first. Then
    ``pad_to_multiple_of`` appends one dummy sequence, if the total needs it. The dummy's length respects both options,
    so the total is then a multiple of the least common multiple of the two. Padding has the pad token in
    ``input_ids``, -100 in ``labels`` and ``shift_labels``, and 0 in any other per-token field. Attention treats the
    dummy sequence like any other (``cu_seq_lens_*`` counts its tokens), so every position has a defined output. Under
    context parallelism each rank holds ``T / cp_size`` tokens: to give each rank a multiple of 16, ask for
    ``pad_to_multiple_of=16 * cp_size``.

    Attributes:
        collator: Any callable from a list of features to a mapping of padded tensors: ``input_ids`` [B, S] and
            optionally ``attention_mask`` [B, S] (nonzero for real tokens; without a mask every token is real),
            ``labels`` and others.
        return_position_ids: Also return ``position_ids``, which restart at 0 in each sequence.
        pad_to_multiple_of: Make the total T a multiple of this: 16 for FP8, 32 for MXFP8, 128 for NVFP4.
        pad_sequences_to_be_divisible_by: Make the length of each sequence in the buffer a multiple of this: twice the
            number of ranks for context parallelism.
        separator_id: Label of the first token of each sequence; None leaves labels alone. An id other than -100
            trains the last token of each sequence on that id. With padding within sequences this would train a pad
            token, so the two options cannot be combined.
        pad_token_id: Token id of all padding. Default: the pad token of ``collator.tokenizer``.

    Raises:
        ValueError: An argument is out of its range, padding is requested without a pad token, or a ``separator_id``
            other than -100 is combined with ``pad_sequences_to_be_divisible_by``.
    """

    collator: Callable[[list[Any]], Mapping[str, Any]]
    return_position_ids: bool = False
    pad_to_multiple_of: int | None = None
    pad_sequences_to_be_divisible_by: int | None = None
    separator_id: int | None = IGNORED_LABEL
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        _check_multiple("pad_to_multiple_of", self.pad_to_multiple_of, "16 for FP8, 32 for MXFP8, 128 for NVFP4")
        _check_multiple(
            "pad_sequences_to_be_divisible_by",
            self.pad_sequences_to_be_divisible_by,
            "twice the number of context-parallel ranks",
        )
        self._check_separator()
        if self.pad_token_id is None:
            self.pad_token_id = getattr(getattr(self.collator, "tokenizer", None), "pad_token_id", None)
        self._check_pad_token()

    def __call__(self, features: Sequence[Any], return_tensors: str | None = None) -> dict[str, Any]:
        """Collate and pack one batch.

        Args:
            features: The samples, in the form that the wrapped collator takes.
            return_tensors: None or "pt"; transformers passes this argument to collators.

        Returns:
            A dict with
            ``input_ids`` [1, T]; ``labels`` and any other per-token field of the padded batch [1, T, ...], each in its
            own dtype;
            ``cu_seq_lens_q``, ``cu_seq_lens_k`` int32 [N + 1]: running count of tokens;
            ``max_length_q``, ``max_length_k`` int: the length of the longest sequence, padding included;
            with ``pad_sequences_to_be_divisible_by`` also ``cu_seq_lens_q_padded``, ``cu_seq_lens_k_padded`` int32
            [N + 1] (the offsets of the sequences in the buffer; ``cu_seq_lens_*`` then leaves out the padding within
            sequences) and ``pad_between_seqs`` True;
            with ``return_position_ids`` also ``position_ids`` int64 [1, T].
            The lengths replace ``attention_mask``. Fields with one entry per row ([B] or a list) keep their form. For
            the dummy sequence, integer ``labels`` [B] get -100, and the other fields get no entry. All fields drop the
            rows without a real token.

        Raises:
            ValueError: The features are whole batches, the wrapped collator's output cannot be packed (the message
                names the field and the reason), or no row has a real token.
        """
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors is {return_tensors!r}; only None or 'pt' (PyTorch tensors) is supported.")
        features = list(features)
        _check_features(features)
        padded = dict(self.collator(features))
        mask_BS = _real_tokens(padded, features)
        layout = _Layout.of(mask_BS.sum(dim=1), self.pad_sequences_to_be_divisible_by, self.pad_to_multiple_of)
        packed = {
            name: self._pack(name, value, mask_BS, layout) for name, value in padded.items() if name != "attention_mask"
        }
        if self.separator_id is not None and _is_per_token("labels", padded.get("labels"), mask_BS):
            packed["labels"][:, layout.first_token_of_real_sequences] = self.separator_id
        packed |= self._sequence_fields(layout)
        return packed

    def _pack(self, name: str, value: Any, mask_BS: torch.Tensor, layout: "_Layout") -> Any:
        if not _is_per_token(name, value, mask_BS):
            return self._keep_per_sequence(name, value, mask_BS, layout)
        # Without a pad token the buffer starts as 0. The constructor allows that only where no position is padding.
        padding = {"input_ids": self.pad_token_id or 0, "labels": IGNORED_LABEL, "shift_labels": IGNORED_LABEL}
        packed_T = value.new_full((layout.total, *value.shape[2:]), padding.get(name, 0))
        packed_T[layout.position_R] = value[mask_BS]
        return packed_T.unsqueeze(0)

    def _keep_per_sequence(self, name: str, value: Any, mask_BS: torch.Tensor, layout: "_Layout") -> Any:
        kept_B = mask_BS.any(dim=1)
        rows = len(kept_B)
        if isinstance(value, list) and len(value) == rows:
            return [entry for entry, kept in zip(value, kept_B.tolist(), strict=True) if kept]
        if not isinstance(value, torch.Tensor) or value.dim() == 0 or value.shape[0] != rows:
            return value
        kept = value[kept_B]
        if name != "labels" or self.pad_to_multiple_of is None:
            return kept
        if kept.is_floating_point():
            # Refuse this even where this batch needs no dummy: otherwise a run would fail at a random step.
            raise ValueError(
                f"labels are {kept.dtype} with shape {tuple(value.shape)}, one entry for each sequence, and "
                f"pad_to_multiple_of is {self.pad_to_multiple_of}: its dummy sequence has no floating-point label that "
                "a loss would ignore. Use pad_to_multiple_of=None, or integer labels."
            )
        dummies = len(layout.slots_N) - layout.real_sequences
        return torch.cat([kept, kept.new_full((dummies, *kept.shape[1:]), IGNORED_LABEL)])

    def _sequence_fields(self, layout: "_Layout") -> dict[str, Any]:
        cu_seq_lens = _running_count(layout.lengths_N)
        longest = int(layout.slots_N.max())
        fields: dict[str, Any] = {
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": longest,
            "max_length_k": longest,
        }
        if self.pad_sequences_to_be_divisible_by is not None:
            cu_seq_lens_padded = _running_count(layout.slots_N)
            fields["cu_seq_lens_q_padded"] = cu_seq_lens_padded
            fields["cu_seq_lens_k_padded"] = cu_seq_lens_padded
            fields["pad_between_seqs"] = True
        if self.return_position_ids:
            fields["position_ids"] = _count_within(layout.slots_N).unsqueeze(0)
        return fields

    def _check_separator(self) -> None:
        if self.separator_id is None:
            return
        if self.separator_id != IGNORED_LABEL and self.pad_sequences_to_be_divisible_by is not None:
            raise ValueError(
                f"separator_id is {self.separator_id} and pad_sequences_to_be_divisible_by is "
                f"{self.pad_sequences_to_be_divisible_by}: pad tokens would be trained to predict the separator. "
                "Use separator_id=-100, or end each sample with that token when tokenising."
            )
        labels_are_unshifted = isinstance(self.collator, DataCollatorForTokenClassification)
        if labels_are_unshifted or getattr(self.collator, "mlm", False):
            warnings.warn(
                f"separator_id is {self.separator_id}, which replaces the first label of each sequence, but "
                f"{type(self.collator).__name__} makes labels for the tokens themselves, not for the next ones. "
                "Pass separator_id=None to keep all labels.",
                stacklevel=4,
            )

    def _check_pad_token(self) -> None:
        options = {
            "pad_to_multiple_of": self.pad_to_multiple_of,
            "pad_sequences_to_be_divisible_by": self.pad_sequences_to_be_divisible_by,
        }
        asked = [f"{name}={value}" for name, value in options.items() if value is not None]
        if asked and not _is_integer_of_at_least(0, self.pad_token_id):
            raise ValueError(
                f"pad_token_id is {self.pad_token_id!r} and {' and '.join(asked)} needs one to pad with; it must be a "
                "token id of at least 0. Pass pad_token_id, or set pad_token on the wrapped collator's tokenizer."
            )


@dataclass
class _Layout:
    """The place of each real token in the packed buffer."""

    # The length of each sequence, without and with its padding.
    lengths_N: torch.Tensor
    slots_N: torch.Tensor
    position_R: torch.Tensor
    real_sequences: int
    total: int

    @classmethod
    def of(cls, lengths_B: torch.Tensor, sequence_multiple: int | None, total_multiple: int | None) -> "_Layout":
        lengths_N = lengths_B[lengths_B > 0]
        multiple = sequence_multiple or 1
        slots_N = (lengths_N + multiple - 1) // multiple * multiple
        starts_N = slots_N.cumsum(0) - slots_N
        position_R = torch.repeat_interleave(starts_N, lengths_N) + _count_within(lengths_N)
        real_sequences, total = len(lengths_N), int(slots_N.sum())
        dummy = -total % math.lcm(multiple, total_multiple) if total_multiple else 0
        if dummy:
            lengths_N = torch.cat([lengths_N, lengths_N.new_tensor([dummy])])
            slots_N = torch.cat([slots_N, slots_N.new_tensor([dummy])])
        return cls(lengths_N, slots_N, position_R, real_sequences, total + dummy)

    @property
    def first_token_of_real_sequences(self) -> torch.Tensor:
        return (self.slots_N.cumsum(0) - self.slots_N)[: self.real_sequences]


def _running_count(lengths_N: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths_N.cumsum(0), (1, 0)).to(torch.int32)


def _count_within(lengths_N: torch.Tensor) -> torch.Tensor:
    """Count 0, 1, 2, ... from the beginning of each sequence: int64 [sum of lengths]."""
    starts_N = lengths_N.cumsum(0) - lengths_N
    starts_T = torch.repeat_interleave(starts_N, lengths_N)
    return torch.arange(len(starts_T), device=lengths_N.device) - starts_T


def _is_per_token(name: str, value: Any, mask_BS: torch.Tensor) -> bool:
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return False
    if name == "labels" and value.is_floating_point():
        # These are a multi-label classifier's labels [B, num_labels], even where num_labels happens to be S.
        return False
    if value.shape[:2] == mask_BS.shape:
        return True
    if name in ("labels", "shift_labels"):
        raise ValueError(
            f"{name} from the wrapped collator has shape {tuple(value.shape)}; integer {name} with two dimensions must "
            f"have the shape of input_ids, {tuple(mask_BS.shape)}. Pad both to the same length in the collator."
        )
    return False


def _real_tokens(padded: Mapping[str, Any], features: list[Any]) -> torch.Tensor:
    input_ids_BS = padded.get("input_ids")
    if not isinstance(input_ids_BS, torch.Tensor) or input_ids_BS.dim() != 2:
        got = tuple(input_ids_BS.shape) if isinstance(input_ids_BS, torch.Tensor) else type(input_ids_BS).__name__
        raise ValueError(
            f"input_ids from the wrapped collator is {got}; it must be a torch tensor [batch, sequence]. "
            "Wrap a collator that pads and returns PyTorch tensors (return_tensors='pt')."
        )
    mask_BS = padded.get("attention_mask")
    if mask_BS is None:
        _check_unpadded(features, input_ids_BS)
        mask_BS = torch.ones_like(input_ids_BS)
    if not isinstance(mask_BS, torch.Tensor) or mask_BS.shape != input_ids_BS.shape:
        got = tuple(mask_BS.shape) if isinstance(mask_BS, torch.Tensor) else type(mask_BS).__name__
        raise ValueError(
            f"attention_mask from the wrapped collator is {got}; it must be a torch tensor of input_ids' shape "
            f"{tuple(input_ids_BS.shape)}, nonzero where a token is real."
        )
    real_BS = mask_BS != 0
    if not real_BS.any():
        raise ValueError(
            f"attention_mask keeps none of the {real_BS.numel()} tokens of the batch, shape {tuple(real_BS.shape)}; at "
            "least one is needed. Remove empty samples from the data set."
        )
    return real_BS


def _check_unpadded(features: list[Any], input_ids_BS: torch.Tensor) -> None:
    """Refuse visible padding that no mask marks, since training would take it for text."""
    token_lists = [feature.get("input_ids") if isinstance(feature, Mapping) else feature for feature in features]
    lengths = {len(tokens) for tokens in token_lists if isinstance(tokens, (list, tuple, torch.Tensor))}
    if lengths - {input_ids_BS.shape[1]}:
        raise ValueError(
            f"attention_mask is missing from the wrapped collator's batch, which pads sequences of lengths "
            f"{sorted(lengths)} to {input_ids_BS.shape[1]}: padding and text cannot be told apart. Give it features "
            "that are dicts, with a tokenizer whose model_input_names has 'attention_mask'."
        )


def _check_features(features: list[Any]) -> None:
    if not features:
        raise ValueError("features is empty; a batch needs at least one sample. Skip empty batches.")
    first = features[0]
    if isinstance(first, list) and first and isinstance(first[0], Mapping):
        raise ValueError(
            "features is a list of whole batches; it must be one list of samples. TokenPackingDataset yields batches "
            "already, so give the DataLoader batch_size=None."
        )


def _check_multiple(name: str, value: int | None, use: str) -> None:
    if value is not None and not _is_integer_of_at_least(1, value):
        raise ValueError(f"{name} is {value!r}; it must be None or an integer of at least 1. Use {use}.")


def _is_integer_of_at_least(least: int, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
