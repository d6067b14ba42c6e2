"""What is in a checkpoint, what its tensors are in the other layout, and what is wrong with it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..layout.mapping import LLAMA, Row, Same, Step, is_computed, plan
from ..sources.tensor_source import Checkpoint, CheckpointError, TensorInfo

# Fields that say how a checkpoint is stored or run, not what its model is.
_NOT_OF_THE_MODEL = frozenset(
    (
        "_attn_implementation",
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "auto_map",
        "chunk_size_feed_forward",
        "dtype",
        "gradient_checkpointing",
        "model_type",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "quantization_config",
        "return_dict",
        "source_model_type",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "use_cache",
        "use_return_dict",
    )
)
_LAYER = "layers.{layer}."
_NAME_IN_LAYER = re.compile(r"(?P<before>(?:model\.|transformer\.)?layers\.)(?P<layer>[0-9]{1,9})(?P<after>\..+)")
_HEADS = {
    "ForCausalLM": ("lm_head.weight",),
    "ForSequenceClassification": ("score.weight",),
    "ForTokenClassification": ("score.weight",),
    "ForQuestionAnswering": ("qa_outputs.weight", "qa_outputs.bias"),
}
_ALL_HEADS = frozenset(("score.bias", *(name for names in _HEADS.values() for name in names)))

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model as its configuration has them; `None` where that says nothing usable."""

    layers: int | None
    hidden_size: int | None
    intermediate_size: int | None
    heads: int | None
    key_value_heads: int | None
    head_dim: int | None
    vocabulary: int | None
    rope_type: str | None
    tied: bool | None


@dataclass(frozen=True)
class DtypeUse:
    """What is held in one dtype."""

    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of the checkpoint.

    Attributes:
        name: Its name.
        dtype: Its dtype, as in "bfloat16".
        shape: Its shape.
        others: What it is in the other layout: one tensor, or several that it is made of. Empty without a rule.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    others: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """What `inspect` finds.

    Attributes:
        path: Where the checkpoint is.
        layout: "Hugging Face" or "Transformer Engine".
        architecture: The class that the configuration names.
        sizes: Sizes of the model, from the configuration.
        dtypes: What is held in each dtype.
        parameters: Number of elements of all tensors; what is tied and not stored counts once.
        bytes: Bytes of all tensors.
        tensors: All tensors, in the checkpoint's order.
        mapping: For each tensor of the Transformer Engine layout the Hugging Face ones that it is made of.
        problems: What is wrong, a sentence each; empty if nothing is.
    """

    path: str
    layout: str
    architecture: str | None
    sizes: ModelSizes
    dtypes: dict[str, DtypeUse]
    parameters: int
    bytes: int
    tensors: tuple[TensorEntry, ...]
    mapping: dict[str, tuple[str, ...]]
    problems: tuple[str, ...]

    def lines(self) -> list[str]:
        """A text for people; layers with the same tensors are one line."""
        other = "Hugging Face" if self.layout == "Transformer Engine" else "Transformer Engine"
        return [
            f"{self.path}: {self.architecture or 'no architecture named'}, {self.layout} layout",
            _sizes_line(self.sizes),
            f"{len(self.tensors)} tensors, {self.parameters:,} parameters, {size_text(self.bytes)}",
            *(
                f"  {dtype}: {use.tensors} tensors, {use.parameters:,} parameters, {size_text(use.bytes)}"
                for dtype, use in self.dtypes.items()
            ),
            f"tensors -> in the {other} layout:",
            *_tensor_lines(self.tensors),
            *([f"{len(self.problems)} wrong:"] if self.problems else ["nothing wrong found"]),
            *(f"  {problem}" for problem in self.problems),
        ]

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON types."""
        return {
            **dataclasses.asdict(self),
            "tensors": [
                {"name": each.name, "dtype": each.dtype, "shape": list(each.shape), "others": list(each.others)}
                for each in self.tensors
            ],
            "mapping": {te: list(hf) for te, hf in self.mapping.items()},
            "problems": list(self.problems),
        }


def inspect(checkpoint: Checkpoint) -> Inspection:
    """Look into a checkpoint: its configuration and the names, shapes and dtypes of its tensors, not their values.

    What is broken is told in `Inspection.problems`, and never raised.

    Args:
        checkpoint: An open checkpoint, of either layout.
    """
    fields, problems = _fields(checkpoint)
    sizes = _sizes(fields)
    infos = checkpoint.source.tensors
    table = _table(checkpoint)
    steps = steps_of(infos, table, is_te=checkpoint.is_te)
    mapping = {step.te: step.hf for step in steps.values()}
    problems += _config_problems(checkpoint)
    problems += tensor_problems(checkpoint, fields)
    return Inspection(
        path=checkpoint.path,
        layout="Transformer Engine" if checkpoint.is_te else "Hugging Face",
        architecture=_architecture(checkpoint.config),
        sizes=sizes,
        dtypes=_dtypes(infos.values()),
        parameters=sum(math.prod(info.shape) for info in infos.values()),
        bytes=sum(info.nbytes for info in infos.values()),
        tensors=tuple(
            TensorEntry(name, info.dtype, info.shape, _others(steps.get(name), checkpoint.is_te))
            for name, info in infos.items()
        ),
        mapping=mapping,
        problems=tuple(problems),
    )


def tensor_problems(checkpoint: Checkpoint, fields: Mapping[str, Any]) -> list[str]:
    """What is wrong with a checkpoint's tensors, a sentence each: their names, shapes and dtypes.

    Args:
        checkpoint: An open checkpoint, of either layout.
        fields: What its configuration says, with all fields of the model.
    """
    table = _table(checkpoint)
    steps = steps_of(checkpoint.source.tensors, table, is_te=checkpoint.is_te)
    return [
        *_name_problems(checkpoint, steps, table),
        *_Expectation(checkpoint, fields, _sizes(fields), table).problems(),
        *_dtype_problems(checkpoint.source.tensors, {step.te: step.hf for step in steps.values()}.values()),
    ]


# --- what verification needs as well ----------------------------------------------------------------------------------


def model_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields of a configuration that describe the model, with transformers' defaults for those that are missing.

    They are those of the Hugging Face layout, without what says how the checkpoint is stored or run. Old names, such as
    `rope_theta` and `rope_scaling`, become what transformers makes of them.

    Raises:
        CheckpointError: It is no configuration of an architecture that can be converted.
    """
    import transformers

    from ..configs.architectures import architecture_of, hf_config

    given = copy.deepcopy(checkpoint.config)
    given.pop("quantization_config", None)  # speaks of the file
    try:
        architecture = architecture_of(given)
        if checkpoint.is_te:
            fields = hf_config(given).to_dict()
        else:
            # Not what the layers cannot run: two checkpoints of the Hugging Face layout can be compared all the same.
            fields = getattr(transformers, architecture.config_class).from_dict(given).to_dict()
    # Which exceptions transformers' checks raise differs between its versions.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"the configuration of {checkpoint.path} cannot be used: {reason} Correct its config.json."
        ) from error
    rope = fields.get("rope_parameters")
    if isinstance(rope, dict) and "rope_type" in rope:
        rope.pop("type", None)  # its old name, which transformers keeps besides
    described = {name: value for name, value in fields.items() if name not in _NOT_OF_THE_MODEL}
    return {"model_type": architecture.model_type, **described}


def steps_of(names: Iterable[str], table: Sequence[Row], *, is_te: bool) -> dict[str, Step]:
    """The step of a conversion that each tensor takes part in, of those that there is a rule for.

    Unlike `plan` it takes a checkpoint with tensors that are missing or have no rule.
    """
    # Each Hugging Face name by itself: a name has a rule even where the others of its row are missing.
    single = [dataclasses.replace(row, hf=(part,), layout=Same()) for row in table for part in row.hf]
    source_table = table if is_te else single
    known = [name for name in names if _has_rule(name, source_table, is_te)]
    steps = plan(known, to_te=not is_te, table=source_table)
    if is_te:
        return {step.te: step for step in steps}
    steps = plan([step.te for step in steps], to_te=False, table=table)
    by_name = {name: step for step in steps for name in step.hf}
    return {name: by_name[name] for name in known}


def _has_rule(name: str, table: Sequence[Row], is_te: bool) -> bool:
    if not name or "\n" in name:  # what the mapping does not take for a name
        return False
    try:
        plan([name], to_te=not is_te, table=table)
    except ValueError:
        return False
    return True


def size_text(count: int) -> str:
    """A number of bytes for people."""
    for factor, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "KB")):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} bytes"


# --- the configuration ------------------------------------------------------------------------------------------------


def _fields(checkpoint: Checkpoint) -> tuple[dict[str, Any], list[str]]:
    """The model's fields, and what is wrong with them."""
    try:
        return model_fields(checkpoint), []
    except CheckpointError as error:
        # What is there still tells the shapes that it can tell.
        return dict(checkpoint.config), [str(error)]


def _sizes(fields: Mapping[str, Any]) -> ModelSizes:
    def number(name: str) -> int | None:
        value = fields.get(name)
        return value if type(value) is int and value > 0 else None

    rope = fields.get("rope_parameters") or fields.get("rope_scaling")
    rope_type = (rope.get("rope_type") or rope.get("type")) if isinstance(rope, dict) else None
    tied = fields.get("tie_word_embeddings")
    hidden_size, heads, head_dim = number("hidden_size"), number("num_attention_heads"), number("head_dim")
    if head_dim is None and hidden_size is not None and heads is not None:
        head_dim = hidden_size // heads
    return ModelSizes(
        layers=number("num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=number("intermediate_size"),
        heads=heads,
        key_value_heads=number("num_key_value_heads"),
        head_dim=head_dim,
        vocabulary=number("vocab_size"),
        rope_type=rope_type if isinstance(rope_type, str) else None,
        tied=tied if isinstance(tied, bool) else None,
    )


def _architecture(config: Mapping[str, Any]) -> str | None:
    named = config.get("architectures")
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None


def _table(checkpoint: Checkpoint) -> tuple[Row, ...]:
    """The rules for the checkpoint; those of a Llama if its architecture is not known."""
    from ..configs.architectures import architecture_of

    try:
        return architecture_of(checkpoint.config).table
    except CheckpointError:
        return LLAMA


def _config_problems(checkpoint: Checkpoint) -> list[str]:
    problems = []
    quantization = checkpoint.config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if quantization is not None and method != "gguf":
        problems.append(f"the checkpoint is quantized by {method!r}: convert one with ordinary weights.")
    problem = _cannot_run(checkpoint)
    return [*problems, problem] if problem else problems


def _cannot_run(checkpoint: Checkpoint) -> str | None:
    """Why the layers cannot run a model whose configuration is valid otherwise."""
    from ..configs.architectures import te_config

    if checkpoint.is_te:
        return None
    try:
        model_fields(checkpoint)
    except CheckpointError:
        return None  # told already
    config = copy.deepcopy(checkpoint.config)
    config.pop("quantization_config", None)  # told already
    try:
        te_config(config)
    except Exception as error:  # whatever it is: an inspection tells it
        return f"Transformer Engine layers cannot run it: {' '.join(str(error).split())}"
    return None


# --- names, shapes and dtypes -----------------------------------------------------------------------------------------


def _name_problems(checkpoint: Checkpoint, steps: Mapping[str, Step], table: Sequence[Row]) -> list[str]:
    unknown = [name for name in checkpoint.source.tensors if name not in steps and not is_computed(name)]
    problems = []
    swapped = len(steps_of(unknown, table, is_te=not checkpoint.is_te))
    if swapped:
        layouts = ("Hugging Face", "Transformer Engine")
        problems.append(
            f"{swapped} tensors have names of the {layouts[not checkpoint.is_te]} layout, but model_type is "
            f"{checkpoint.config.get('model_type')!r}, which has the {layouts[checkpoint.is_te]} one: "
            "correct model_type in config.json."
        )
    return problems + [f"there is no rule for {name}." for name in _fold_names(unknown)]


class _Expectation:
    """The tensors that a configuration asks for.

    A configuration may ask for absurdly many layers, so tensors are looked at layer by layer as they are there.
    """

    def __init__(
        self, checkpoint: Checkpoint, fields: Mapping[str, Any], sizes: ModelSizes, table: Sequence[Row]
    ) -> None:
        self.infos = {name: info for name, info in checkpoint.source.tensors.items() if not is_computed(name)}
        self.layers = sizes.layers
        self.prefix = _prefix(self.infos)
        self.found = sorted({layer for name in self.infos if (layer := _layer(name)) is not None})
        hf_shapes = _hf_shapes(sizes, fields)
        self.shapes = _te_shapes(hf_shapes, table) if checkpoint.is_te else hf_shapes
        generic = [name for row in table for name in ((row.te,) if checkpoint.is_te else row.hf)]
        self.per_layer = [name for name in generic if name.startswith(_LAYER)]
        self.once = [self.prefix + name for name in generic if not name.startswith(_LAYER) and name not in _ALL_HEADS]
        architecture = _architecture(checkpoint.config) or ""
        self.heads = next((names for end, names in _HEADS.items() if architecture.endswith(end)), ())
        if sizes.tied:
            self.heads = tuple(name for name in self.heads if name != "lm_head.weight")

    def problems(self) -> list[str]:
        """Tensors and layers that are missing or too many, and shapes that are not those of the configuration."""
        return [*self._missing(), *self._layers(), *self._wrong_shapes()]

    def _full(self, generic: str, layer: int | None) -> str:
        return generic if generic in _ALL_HEADS else self.prefix + generic.replace("{layer}", str(layer))

    def _missing(self) -> list[str]:
        needed = [*self.once, *self.heads]
        needed += [self._full(name, layer) for layer in self.found if self._in_range(layer) for name in self.per_layer]
        return [f"{name} is needed, but not there." for name in _fold_names(n for n in needed if n not in self.infos)]

    def _in_range(self, layer: int) -> bool:
        return self.layers is None or layer < self.layers

    def _layers(self) -> list[str]:
        if self.layers is None:
            return []
        problems = []
        there = [layer for layer in self.found if self._in_range(layer)]
        edges = [-1, *there, self.layers]
        gaps = [(low + 1, high - 1) for low, high in itertools.pairwise(edges) if high - low > 1]
        if gaps:
            missing = ",".join(_range_text(first, last) for first, last in gaps)
            problems.append(f"the configuration has {self.layers} layers, but layers {missing} are not there.")
        beyond = [layer for layer in self.found if not self._in_range(layer)]
        if beyond:
            problems.append(f"layers {_ranges(beyond)} are there, but the configuration has {self.layers} layers.")
        return problems

    def _wrong_shapes(self) -> list[str]:
        wrong = []
        for generic, shape in self.shapes.items():
            for layer in self.found if generic.startswith(_LAYER) else [None]:
                info = self.infos.get(self._full(generic, layer))
                if info is not None and info.shape != shape:
                    wrong.append((self._full(generic, layer), (info.shape, shape)))
        return [
            f"{name} is {list(shape)}, but the configuration asks for {list(wanted)}."
            for name, (shape, wanted) in _fold(wrong)
        ]


def _layer(name: str) -> int | None:
    match = _NAME_IN_LAYER.fullmatch(name)
    return None if match is None else int(match["layer"])


def _prefix(names: Iterable[str]) -> str:
    """What stands before the decoder's names."""
    for name in names:
        match = re.match(r"((?:model\.|transformer\.)?)(?:layers\.|embed_tokens\.|norm\.)", name)
        if match is not None:
            return match[1]
    return "model."


def _hf_shapes(sizes: ModelSizes, fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes by the table's Hugging Face names, of those that the configuration says enough about."""
    hidden, mlp, vocabulary, head_dim = sizes.hidden_size, sizes.intermediate_size, sizes.vocabulary, sizes.head_dim
    queries = None if sizes.heads is None or head_dim is None else sizes.heads * head_dim
    keys = None if sizes.key_value_heads is None or head_dim is None else sizes.key_value_heads * head_dim
    names = fields.get("id2label")
    labels = len(names) if isinstance(names, dict) else None
    shapes: dict[str, tuple[int | None, ...]] = {
        "embed_tokens.weight": (vocabulary, hidden),
        _LAYER + "input_layernorm.weight": (hidden,),
        _LAYER + "self_attn.q_proj.weight": (queries, hidden),
        _LAYER + "self_attn.k_proj.weight": (keys, hidden),
        _LAYER + "self_attn.v_proj.weight": (keys, hidden),
        _LAYER + "self_attn.o_proj.weight": (hidden, queries),
        _LAYER + "post_attention_layernorm.weight": (hidden,),
        _LAYER + "mlp.gate_proj.weight": (mlp, hidden),
        _LAYER + "mlp.up_proj.weight": (mlp, hidden),
        _LAYER + "mlp.down_proj.weight": (hidden, mlp),
        "norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
        "score.weight": (labels, hidden),
        "score.bias": (labels,),
        "qa_outputs.weight": (2, hidden),
        "qa_outputs.bias": (2,),
    }
    known: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        numbers = tuple(number for number in shape if number is not None)
        if len(numbers) == len(shape):
            known[name] = numbers
    return known


def _te_shapes(hf_shapes: Mapping[str, tuple[int, ...]], table: Sequence[Row]) -> dict[str, tuple[int, ...]]:
    """Shapes by the table's Transformer Engine names: the rows of the tensors that make one add up."""
    return {
        row.te: (sum(hf_shapes[name][0] for name in row.hf), *hf_shapes[row.hf[0]][1:])
        for row in table
        if all(name in hf_shapes for name in row.hf)
    }


def _dtype_problems(infos: Mapping[str, TensorInfo], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Tensors that make one tensor of the other layout must have one dtype."""
    mixed = []
    for names in rows:
        dtypes = [infos[name].dtype for name in names if name in infos]
        if len(set(dtypes)) > 1:
            mixed.append((names[0], (len(names), tuple(dtypes))))
    return [
        f"{name} and the {count - 1} that become one tensor with it must have one dtype, but have {', '.join(dtypes)}."
        for name, (count, dtypes) in _fold(mixed)
    ]


def _dtypes(infos: Iterable[TensorInfo]) -> dict[str, DtypeUse]:
    uses: dict[str, DtypeUse] = {}
    for info in infos:
        use = uses.get(info.dtype, DtypeUse(0, 0, 0))
        uses[info.dtype] = DtypeUse(use.tensors + 1, use.parameters + math.prod(info.shape), use.bytes + info.nbytes)
    return uses


def _others(step: Step | None, is_te: bool) -> tuple[str, ...]:
    if step is None:
        return ()
    return step.hf if is_te else (step.te,)


# --- text -------------------------------------------------------------------------------------------------------------


def _sizes_line(sizes: ModelSizes) -> str:
    def text(value: int | None) -> str:
        return "unknown" if value is None else str(value)

    tied = {None: "not said whether embeddings are tied", True: "tied embeddings", False: "untied embeddings"}
    return (
        f"layers {text(sizes.layers)}, hidden size {text(sizes.hidden_size)}, MLP {text(sizes.intermediate_size)}, "
        f"heads {text(sizes.heads)}, key/value heads {text(sizes.key_value_heads)}, head size {text(sizes.head_dim)}, "
        f"vocabulary {text(sizes.vocabulary)}, rope {sizes.rope_type or 'unknown'}, {tied[sizes.tied]}"
    )


def _tensor_lines(tensors: Sequence[TensorEntry]) -> list[str]:
    folded = _fold((each.name, (each.dtype, each.shape, _others_text(each))) for each in tensors)
    width = max((len(name) for name, _ in folded), default=0)
    return [f"  {name:<{width}}  {dtype} {list(shape)} -> {others}" for name, (dtype, shape, others) in folded]


def _others_text(entry: TensorEntry) -> str:
    """The names in the other layout, in a layer without what they share with the tensor's own."""
    if not entry.others:
        return "computed from the configuration" if is_computed(entry.name) else "no rule"
    if entry.others == (entry.name,):
        return "the same"
    match = _NAME_IN_LAYER.fullmatch(entry.name)
    shared = "" if match is None else f"{match['before']}{match['layer']}."
    return ", ".join(name.removeprefix(shared) for name in entry.others)


def _fold_names(names: Iterable[str]) -> list[str]:
    return [name for name, _ in _fold((name, None) for name in names)]


def _fold(pairs: Iterable[tuple[str, Key]]) -> list[tuple[str, Key]]:
    """Names that differ in their layer alone and have the same key as one name: `layers.{0..3,5}.weight`."""
    layers: dict[tuple[str, str, Key], list[int]] = {}
    for name, key in pairs:
        match = _NAME_IN_LAYER.fullmatch(name)
        # The zeros of "layers.007" must not get lost.
        if match is None or str(int(match["layer"])) != match["layer"]:
            layers[name, "", key] = []
        else:
            layers.setdefault((match["before"], match["after"], key), []).append(int(match["layer"]))
    return [(before + _braced(found) + after, key) for (before, after, key), found in layers.items()]


def _braced(layers: Sequence[int]) -> str:
    return "" if not layers else str(layers[0]) if len(layers) == 1 else "{" + _ranges(layers) + "}"


def _ranges(layers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(_range_text(first, last) for first, last in runs)


def _range_text(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}..{last}"
