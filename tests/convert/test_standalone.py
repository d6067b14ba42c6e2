"""Checkpoints with their own source code, loaded by processes that cannot import these packages."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForSequenceClassification
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

import llama_te_core
from llama_te_convert import convert_llama_hf_to_te, export_te_checkpoint
from llama_te_convert.errors import CheckpointError
from llama_te_core import NVLlamaForCausalLM, NVLlamaForSequenceClassification

IDS_BS = torch.arange(3, 13).view(2, 5)
# The beginning of every script. It hides our packages, whether installed or on PYTHONPATH.
HIDE = """
import sys, warnings
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("llama_te_core", "llama_te_convert", "llama_te_infer"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
import importlib.metadata
found = importlib.metadata.entry_points
def entry_points(**which):
    points = found(**which)
    points = getattr(points, "_all", points)  # up to Python 3.11 all of them are a dict of groups
    return importlib.metadata.EntryPoints(each for each in points if "llama_te" not in each.value)
importlib.metadata.entry_points = entry_points
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
for name in ("llama_te_core", "llama_te_convert", "llama_te_infer"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} is not hidden")
ids = torch.arange(3, 13).view(2, 5)
"""


def run(code, tmp_path, *arguments):
    """Run code in a process without these packages and without a network, and parse the JSON that it prints last."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment.pop("PYTHONPATH", None)
    # Other folders of PYTHONPATH stay, such as one with another version of transformers.
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in others if not any(Path(path).glob("llama_te_*")))
    done = subprocess.run(
        [sys.executable, "-c", HIDE + code, *map(str, arguments)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def modules(folder):
    return sorted(path.name for path in folder.glob("*.py"))


def test_a_language_model_loads_generates_and_saves_itself_again(tiny_llama, tmp_path):
    model = convert_llama_hf_to_te(tiny_llama())
    export_te_checkpoint(model, tmp_path / "out")
    code = """
import json
folder, again = sys.argv[1:]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    texts = [model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0).tolist() for _ in range(2)]
warned = [str(each.message) for each in caught if "key/value cache" in str(each.message)]
with torch.no_grad():
    logits = model(ids).logits
torch.save(logits, "logits.pt")
model.save_pretrained(again)
loaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(loaded(ids).logits, logits)
same = type(model.config) is type(AutoConfig.from_pretrained(folder, trust_remote_code=True)) is model.config_class
print(json.dumps([type(model).__name__, texts, warned, same]))
"""
    name, texts, warned, one_class = run(code, tmp_path, tmp_path / "out", tmp_path / "again")
    assert name == "NVLlamaForCausalLM"
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(IDS_BS).logits)
    expected = model.generate(IDS_BS, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=False).tolist()
    assert texts == [expected, expected]
    assert len(expected[0]) > IDS_BS.shape[1]
    assert len(warned) == 1
    assert "pip install llama-te-infer" in warned[0]
    assert one_class
    assert modules(tmp_path / "again") == modules(tmp_path / "out")


def test_a_classifiers_folder_is_copied_with_all_that_is_in_it(tiny_llama, tmp_path):
    model = convert_llama_hf_to_te(tiny_llama(LlamaForSequenceClassification, num_labels=3))
    model.save_pretrained(tmp_path / "te", max_shard_size="60KB")
    (tmp_path / "te" / "tokenizer.json").write_text("{}")
    export_te_checkpoint(tmp_path / "te", str(tmp_path / "out"))
    before = {path.name for path in (tmp_path / "te").iterdir()}
    after = {path.name for path in (tmp_path / "out").iterdir()}
    assert "llama_te.py" in before
    assert before - {"llama_te.py"} | {"checksums.json"} == {name for name in after if not name.endswith(".py")}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    code = """
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    torch.save(model(ids).logits, "logits.pt")
print(f'"{type(model).__name__}"')
"""
    assert run(code, tmp_path, tmp_path / "out") == "NVLlamaForSequenceClassification"
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(IDS_BS).logits)


def test_the_modules_are_copies_and_all_that_transformers_takes_along(tiny_llama, tmp_path):
    export_te_checkpoint(convert_llama_hf_to_te(tiny_llama()), tmp_path / "out")
    source = Path(llama_te_core.__file__).parent
    entry = tmp_path / "out" / "modeling_nvllama.py"
    assert {str(entry), *get_relative_import_files(entry)} == {str(path) for path in (tmp_path / "out").glob("*.py")}
    originals = {"_".join(path.relative_to(source).with_suffix("").parts): path for path in source.rglob("*.py")}
    imported = set()
    for path in (tmp_path / "out").glob("*.py"):
        original = originals.get(path.stem) or originals[f"models_{path.stem}"]
        ours, theirs = path.read_text().splitlines(), original.read_text().splitlines()
        relative = [(one, other) for one, other in zip(ours, theirs, strict=True) if one != other]
        assert all(re.match(r" *from \.\w+ import", one) and re.match(r" *from \.", other) for one, other in relative)
        # transformers refuses a module from the hub if it imports a package that is not installed.
        imported |= set(get_imports(path))
    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {reference.split(".")[0] for reference in config["auto_map"].values()} == {"modeling_nvllama"}


def test_it_loads_as_ever_where_the_packages_are(tiny_llama, tmp_path):
    model = convert_llama_hf_to_te(tiny_llama(LlamaForSequenceClassification, num_labels=3))
    export_te_checkpoint(model, tmp_path / "out")
    loaded = NVLlamaForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(IDS_BS).logits, model(IDS_BS).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert modules(tmp_path / "again") == ["llama_te.py"]


class TestErrors:
    def test_another_model(self, tiny_llama, tmp_path):
        with pytest.raises(TypeError, match=r"model_or_folder is a LlamaForCausalLM: .* convert_llama_hf_to_te first"):
            export_te_checkpoint(tiny_llama(), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_folder_of_another_layout(self, tiny_llama, tmp_path):
        tiny_llama().save_pretrained(tmp_path / "hf")
        with pytest.raises(
            CheckpointError, match=r"config.json has model_type='llama', but .*'nv_llama'.*: convert it"
        ):
            export_te_checkpoint(tmp_path / "hf", tmp_path / "out")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, r"te is not the folder of a checkpoint"),
            ("{", r"is not valid JSON"),
            ("[1]", r"does not hold a JSON object"),
        ],
    )
    def test_no_checkpoint(self, tmp_path, content, message):
        (tmp_path / "te").mkdir()
        if content is not None:
            (tmp_path / "te" / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=message):
            export_te_checkpoint(tmp_path / "te", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_target_with_something_in_it(self, tiny_llama, tmp_path):
        model = convert_llama_hf_to_te(tiny_llama())
        (tmp_path / "out").mkdir()
        export_te_checkpoint(model, tmp_path / "out")
        with pytest.raises(CheckpointError, match=r"out exists already: name a new folder, or an empty one"):
            export_te_checkpoint(model, tmp_path / "out")
        with pytest.raises(CheckpointError, match=r"config.json is a file: name a new folder"):
            export_te_checkpoint(model, tmp_path / "out" / "config.json")
        assert type(NVLlamaForCausalLM.from_pretrained(tmp_path / "out")) is NVLlamaForCausalLM

    def test_a_target_that_cannot_be_written(self, tiny_llama, tmp_path):
        convert_llama_hf_to_te(tiny_llama()).save_pretrained(tmp_path / "te")
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match=r"out cannot be (made|used): .*(is a file|Not a directory)"):
            export_te_checkpoint(tmp_path / "te", tmp_path / "file" / "out")
