"""The section `export` of a configuration."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ExportConfig:
    """The folders that a run writes after its last step.

    Attributes:
        te: Write `FOLDER/te`, which `NVLlamaForCausalLM.from_pretrained` loads.
        hf: Convert `FOLDER/te` to `FOLDER/hf`, which transformers loads (needs llama-te-convert).
    """

    te: bool = True
    hf: bool = False

    def __post_init__(self) -> None:
        if self.hf and not self.te:
            raise ValueError("export.hf=True, but export.te=False: hf is converted from te, so leave te True.")
