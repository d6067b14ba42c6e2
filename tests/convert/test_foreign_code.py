"""What a conversion or an export writes names no code of the source."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llama_te_convert import convert_llama_hf_to_te
from llama_te_convert.errors import CheckpointError, CheckpointWarning
from llama_te_convert.on_disk import convert_checkpoint
from llama_te_convert.targets.standalone import export_te_checkpoint
from llama_te_core.checkpoint_format import LOADER
from llama_te_core.files.foreign_code import drop_foreign_code
from llama_te_core.train.export import export_te

EVIL: dict[str, Any] = {"auto_map": {"AutoTokenizer": ["someone/else--evil.Tokenizer", None]}}
SIDE_FILES: dict[str, dict[str, Any]] = {
    "tokenizer_config.json": {"model_max_length": 3, **EVIL},
    "generation_config.json": {"do_sample": True, **EVIL},
    "preprocessor_config.json": EVIL,
    "processor_config.json": {"image_processor": {"size": 3, **EVIL}, "list": [EVIL]},
    "other_config.json": {"ümlaut": "ü", **EVIL},
    "pipelines_config.json": {"custom_pipelines": {"a": {"impl": "evil.Pipeline"}}},
}


def add_side_files(folder: Path) -> None:
    for name, content in SIDE_FILES.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "evil.py").write_text("raise SystemExit('was run')")
    config = json.loads((folder / "config.json").read_text())
    own = config.get("auto_map", {})
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {**own, "AutoTokenizer": ["evil.A", None]}}))


def assert_no_foreign_code(folder: Path, own: str | None) -> None:
    for path in folder.rglob("*.json"):
        if path.name not in ("conversion.json", "checksums.json"):
            assert not re.search("evil", path.read_text()), path
    auto_map = json.loads((folder / "config.json").read_text()).get("auto_map", {})
    assert {reference.split(".")[0] for reference in auto_map.values()} == ({own} if own else set())
    assert not (folder / "evil.py").exists()
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 3
    assert json.loads((folder / "processor_config.json").read_text()) == {"image_processor": {"size": 3}, "list": [{}]}
    assert json.loads((folder / "other_config.json").read_text(encoding="utf-8")) == {"ümlaut": "ü"}


def test_conversion(tiny_llama: Any, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "hf")
    add_side_files(tmp_path / "hf")
    with pytest.warns(CheckpointWarning, match="the entry auto_map of .generation_config.json. .it names code") as w:
        convert_checkpoint(str(tmp_path / "hf"), tmp_path / "te", to_te=True)
    assert len([each for each in w if "names code" in str(each.message)]) == 1
    assert_no_foreign_code(tmp_path / "te", LOADER)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_checkpoint(str(tmp_path / "te"), tmp_path / "again", to_te=False)
    assert_no_foreign_code(tmp_path / "again", None)


def test_standalone_export(tiny_llama: Any, tmp_path: Path) -> None:
    convert_llama_hf_to_te(tiny_llama()).save_pretrained(tmp_path / "te")
    add_side_files(tmp_path / "te")
    (tmp_path / "te" / "checksums.json").unlink(missing_ok=True)
    with pytest.warns(CheckpointWarning, match="it names code"):
        export_te_checkpoint(tmp_path / "te", tmp_path / "alone")
    assert_no_foreign_code(tmp_path / "alone", "modeling_nvllama")


def test_export_of_a_run(tiny_llama: Any, tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **EVIL}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer", trust_remote_code=False)
    with pytest.warns(UserWarning, match=r"tokenizer_config.json of the tokenizer named code \(auto_map\)"):
        export_te(convert_llama_hf_to_te(tiny_llama()), tokenizer, tmp_path / "te")
    assert "auto_map" not in (tmp_path / "te" / "tokenizer_config.json").read_text()
    assert "auto_map" in (tmp_path / "te" / "config.json").read_text()


def test_names_that_are_written_with_escapes(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"auto\\u005fmap": {"AutoTokenizer": "evil.A"}, "a": 1}')
    assert drop_foreign_code(tmp_path) == ["tokenizer_config.json"]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"a": 1}


def test_a_side_file_that_nobody_can_check(tiny_llama: Any, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(CheckpointError, match="tokenizer_config.json cannot be used: it has the key 'a' twice"):
        convert_checkpoint(str(tmp_path / "hf"), tmp_path / "te", to_te=True)
