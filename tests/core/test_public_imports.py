"""Every import that the documentation shows, or showed before a module moved, must keep working."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

import llama_te_convert
import llama_te_core
import llama_te_infer

IMPORTS = """
from llama_te_convert import convert_adapter, convert_llama_hf_to_te, convert_llama_te_to_hf
from llama_te_convert import export_te_checkpoint
from llama_te_core import DataCollatorWithFlattening, NVLlamaForCausalLM, linear_cross_entropy, next_token_labels
from llama_te_core import NVLlamaConfig, NVLlamaForCausalLM, calibrate
from llama_te_core import TokenPackingDataset
from llama_te_core.layers import is_transformer_engine, transformer_engine_problem
from llama_te_core.lora import WEIGHTS, on_weights
from llama_te_core.train.checkpoints import Checkpoints
from llama_te_core.train.context_parallel import shard_context
from llama_te_core.train.optimizers import make_optimizer
from llama_te_core.train.parallel import ParallelSizes, clip_gradients, make_mesh, parallelize
from llama_te_core.train.tensor_parallel import gather_halves
from llama_te_core.train.text_data import TextBatches, TextData, merge_states
from llama_te_infer import Engine, SamplingParams
from llama_te_infer import InferenceParams
from llama_te_infer import inference_params_for
"""


@pytest.mark.parametrize("statement", IMPORTS.strip().splitlines())
def test_the_import_works(statement: str) -> None:
    exec(statement, {})


@pytest.mark.parametrize("package", [llama_te_core, llama_te_convert, llama_te_infer], ids=lambda each: each.__name__)
def test_the_root_shows_its_public_names(package: ModuleType) -> None:
    names = [getattr(package, name) for name in package.__all__]  # loading them adds no other name
    assert dir(package) == sorted(package.__all__)
    assert all(each is not None for each in names)
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'missing'"):
        _ = package.missing


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    "code",
    [
        "import llama_te_core",
        "import llama_te_core.checkpoint_format",
        "from llama_te_core.train.command import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    ],
)
def test_light_imports_take_neither_torch_nor_transformers(code: str) -> None:
    shown = run(f"{code}\nimport sys; print(*({{'torch', 'transformers', 'numpy'}} & set(sys.modules)), sep='|')")
    assert shown.splitlines()[-1] == ""


def test_peft_is_told_where_our_own_module_imports_it_first() -> None:
    code = "from peft.tuners.tuners_utils import BaseTuner; print(hasattr(BaseTuner.inject_adapter, '__wrapped__'))"
    assert run(f"import llama_te_core.compat.peft; {code}") == "True\n"


@pytest.mark.parametrize(
    "imports",
    [
        "import llama_te_core; from transformers import AutoConfig, AutoModelForCausalLM",
        "from transformers import AutoConfig, AutoModelForCausalLM; import llama_te_core",
        "import transformers; import llama_te_core; from transformers import AutoConfig, AutoModelForCausalLM",
        "import llama_te_core.models.pretrained; from transformers import AutoConfig, AutoModelForCausalLM",
        "from llama_te_core import NVLlamaConfig; from transformers import AutoConfig, AutoModelForCausalLM",
        "import llama_te_core; from transformers import Trainer, AutoConfig, AutoModelForCausalLM",
    ],
)
def test_auto_classes_know_the_models_in_any_order_of_imports(imports: str) -> None:
    code = f"""
{imports}
sizes = dict(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
config = AutoConfig.for_model("nv_llama", layer_implementation="reference", **sizes)
print(type(AutoModelForCausalLM.from_config(config)).__name__)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names
print(names["nv_llama"])
"""
    assert run(code).split() == ["NVLlamaForCausalLM", "NVLlamaForCausalLM"]
