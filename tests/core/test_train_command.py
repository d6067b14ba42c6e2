"""The training command learns like transformers' own Llama, stops and resumes, and explains its errors.

Shapes: B sequences, S columns of a padded batch.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.training_runs import Command, docstrings, losses, metrics, options, train, write
from llama_te_convert import convert_llama_te_to_hf
from llama_te_convert.cli import main as convert
from llama_te_core import NVLlamaForCausalLM
from llama_te_core.train.command import main, read_config
from llama_te_core.train.config import (
    DataConfig,
    ModelConfig,
    PrecisionConfig,
    ScheduleConfig,
    ShapeConfig,
    TrainConfig,
)
from llama_te_core.train.data.batch_stream import BatchStream
from llama_te_core.train.data.byte_tokenizer import byte_tokenizer
from llama_te_core.train.interruption import Interruption
from llama_te_core.train.schedule import learning_rate
from llama_te_core.train.setup import build_model, random_weights

STEPS, RATE = 100, 3e-3
# AdamW divides by a gradient's size, which magnifies rounding errors of small gradients. A large epsilon prevents this.
BY_HEART = {
    "model__shape__num_hidden_layers": 2,
    "optimizer__epsilon": 1e-5,
    "optimizer__learning_rate": RATE,
    "data__tokens_per_batch": 760,
    "steps": STEPS,
    "checkpoint__interval": None,
}
SHORT = {"data__tokens_per_batch": 256, "data__sequence_length": 128, "steps": 8, "checkpoint__interval": 3}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("texts"), docstrings(150)[:2])


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """Return the folder of a run that has learned a few docstrings by heart."""
    folder = tmp_path_factory.mktemp("overfitted")
    train(folder, source, **BY_HEART, export__te=True, export__hf=True)
    return folder


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """Return the folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, source, **SHORT, checkpoint__keep=9, export__te=True)
    return folder


def one_process(source: Path) -> TrainConfig:
    """Return the configuration of `overfitted`."""
    words = options(source.parent, source, **BY_HEART)
    return read_config(words)


def padded(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Turn a packed batch into a padded batch of the same sequences."""
    offsets = batch["cu_seq_lens_q"].tolist()
    rows = [batch["input_ids"][0, start:end] for start, end in itertools.pairwise(offsets)]
    ids_BS = pad_sequence(rows, batch_first=True)
    mask_BS = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids_BS, "attention_mask": mask_BS, "labels": ids_BS.masked_fill(mask_BS == 0, -100)}


def test_it_learns_real_text_by_heart(overfitted: Path) -> None:
    curve = losses(overfitted)
    assert curve[0] > 5
    assert max(curve[-3:]) < 0.5


def test_its_losses_are_those_of_transformers_on_padded_batches(overfitted: Path, source: Path) -> None:
    config = one_process(source)
    model_config = config.model_config()
    model, _ = build_model(config, model_config, random_weights(config.seed, model_config), None, torch.device("cpu"))
    reference = convert_llama_te_to_hf(model)
    matrices = [parameter for parameter in reference.parameters() if parameter.dim() > 1]
    norms = [parameter for parameter in reference.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-5,
    )
    data = config.data.text_data(byte_tokenizer(), config.seed, 1, 1)
    stream = BatchStream(data, None, torch.device("cpu"), workers=0)
    worst = 0.0
    for step, expected in enumerate(losses(overfitted), 1):
        loss = reference(**padded(stream.next().arguments)).loss
        worst = max(worst, abs(loss.item() - expected))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, RATE, ScheduleConfig())
        optimizer.step()
        optimizer.zero_grad()
    assert worst < 1e-3  # measured: 1.1e-4


def test_packed_and_padded_batches_have_the_same_loss(overfitted: Path, source: Path) -> None:
    config = one_process(source)
    model_config = config.model_config()
    model, _ = build_model(config, model_config, random_weights(7, model_config), None, torch.device("cpu"))
    stream = BatchStream(config.data.text_data(byte_tokenizer(), 0, 1, 1), None, torch.device("cpu"), workers=0)
    for _ in range(3):
        packed = stream.next().arguments
        batch = padded(packed)
        labels_BS = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
        loss = model(**batch, shift_labels=labels_BS, num_items_in_batch=packed["num_items_in_batch"])
        assert model(**packed).item() == pytest.approx(loss.item(), abs=1e-6)  # measured: 5e-7


def test_what_it_exports_is_the_model_that_it_trained(overfitted: Path, source: Path) -> None:
    text = json.loads(source.read_text().splitlines()[0])["text"]
    for folder in ("te", "hf"):
        tokenizer = AutoTokenizer.from_pretrained(overfitted / folder)
        model = AutoModelForCausalLM.from_pretrained(overfitted / folder)
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text[:40])]])
        learned = model.generate(ids, max_new_tokens=60, do_sample=False, use_cache=folder == "hf")[0]
        assert tokenizer.decode(learned, skip_special_tokens=True) == text[:100]


def test_it_goes_on_bit_for_bit(whole_run: Path, tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "resumed"
    shutil.copytree(whole_run, folder)
    shutil.rmtree(folder / "te")
    for step in (6, 8):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:08d}")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # the end of a process can cut a line
    assert train(folder, source, **SHORT, export__te=True) == losses(whole_run)
    assert metrics(folder)[4]["gradient_norm"] == metrics(whole_run)[4]["gradient_norm"]
    weights, expected = (load_file(each / "te" / "model.safetensors") for each in (folder, whole_run))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_workers_and_accumulation_go_on_too(tmp_path: Path, source: Path) -> None:
    settings = SHORT | {"data__workers": 2, "data__batches_per_step": 2, "steps": 5}
    whole = train(tmp_path / "whole", source, **settings)
    folder = tmp_path / "whole"
    shutil.rmtree(folder / "checkpoints" / "step-00000005")
    assert train(folder, source, **settings) == whole


def test_sigterm_saves_and_the_run_goes_on(whole_run: Path, tmp_path: Path, source: Path) -> None:
    # The run has many steps, so that the signal stops it early; their number matters only to the schedule.
    endless = {"steps": 100_000, "schedule__kind": "constant", "checkpoint__interval": 100_000}
    settings = SHORT | endless | {"data__workers": 2}
    with Command(tmp_path, options(tmp_path, source, **settings)) as command:
        command.wait_for_step(2)
        os.killpg(command.process.pid, signal.SIGTERM)  # the workers get the signal too, as at the end of a job
        _, said = command.process.communicate(timeout=120)
        assert command.process.returncode == 0, said
    stopped = len(losses(tmp_path))
    assert f"stopped by SIGTERM: step {stopped} is saved" in said
    assert [each.name for each in (tmp_path / "checkpoints").iterdir()] == [f"step-{stopped:08d}"]
    assert not (tmp_path / "te").exists()
    more = train(tmp_path, source, **settings | {"steps": stopped + 2})
    assert more == train(tmp_path / "whole", source, **settings | {"steps": stopped + 2})


def test_a_finished_run_has_nothing_to_do(whole_run: Path, source: Path) -> None:
    before = (whole_run / "metrics.jsonl").read_bytes()
    train(whole_run, source, **SHORT)
    assert (whole_run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("layout", ["te", "hf"])
def test_training_goes_on_from_a_checkpoint_of_either_layout(
    overfitted: Path, tmp_path: Path, source: Path, layout: str
) -> None:
    changes = {"model__shape": None, "model__checkpoint": overfitted / layout, "steps": 1}
    (loss,) = train(tmp_path, source, data__tokens_per_batch=760, checkpoint__interval=None, **changes)
    assert loss < 0.5
    assert (tmp_path / "start").exists() == (layout == "hf")


@pytest.mark.parametrize("activations", ["selective", "full"])
def test_activations_computed_anew_change_nothing(
    whole_run: Path, tmp_path: Path, source: Path, activations: str
) -> None:
    assert train(tmp_path, source, **SHORT, activation_checkpointing=activations) == losses(whole_run)


@pytest.mark.parametrize(("activations", "twice"), [("none", 0), ("selective", 1), ("full", 2)])
def test_activations_are_computed_twice_where_asked_for(source: Path, activations: Any, twice: int) -> None:
    config = dataclasses.replace(one_process(source), activation_checkpointing=activations)
    model_config = config.model_config()
    model, _ = build_model(config, model_config, random_weights(0, model_config), None, torch.device("cpu"))
    calls = []
    for layer in model.model.layers:
        layer.layernorm_mlp.register_forward_pre_hook(lambda *arguments: calls.append(1))
    ids_BS = torch.arange(16)[None]
    model(input_ids=ids_BS, shift_labels=ids_BS, num_items_in_batch=torch.tensor(16)).backward()
    assert len(calls) == len(model.model.layers) + twice


def test_activations_kept_on_the_host_change_nothing(whole_run: Path, tmp_path: Path, source: Path) -> None:
    assert train(tmp_path, source, **SHORT, activation_offload_layers=3) == losses(whole_run)


def test_first_layers_keep_their_activations_on_the_host(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(one_process(source), activation_offload_layers=1)
    model_config = config.model_config()
    model, _ = build_model(config, model_config, random_weights(0, model_config), None, torch.device("cpu"))
    saved = {0: 0, 1: 0}  # bytes that each layer leaves on the device
    for number, layer in enumerate(model.model.layers):

        def pack(tensor: torch.Tensor, number: int = number) -> torch.Tensor:
            saved[number] += tensor.nbytes
            return tensor

        forward = layer.forward

        def counting(*args: Any, forward: Any = forward, pack: Any = pack, **kwargs: Any) -> torch.Tensor:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return forward(*args, **kwargs)

        layer.forward = counting
    ids_BS = torch.arange(16)[None]
    model(input_ids=ids_BS, shift_labels=ids_BS, num_items_in_batch=torch.tensor(16)).backward()
    assert saved[0] == 0 < saved[1]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_accumulated_gradients_are_those_of_one_batch(tmp_path: Path) -> None:
    # Each document fills a batch, or half a batch, so both runs see the same sequences in each step.
    source = write(tmp_path, docstrings(126)[:8])
    settings = {"steps": 4, "checkpoint__interval": None, "data__sequence_length": 128}
    once = train(tmp_path / "once", source, data__tokens_per_batch=256, **settings)
    twice = train(tmp_path / "twice", source, data__tokens_per_batch=128, data__batches_per_step=2, **settings)
    assert twice == pytest.approx(once, abs=1e-5)  # measured: 1e-6


def test_bfloat16_follows_float32(tmp_path: Path, source: Path) -> None:
    settings = SHORT | {"checkpoint__interval": None}
    precise = train(tmp_path / "fp32", source, **settings)
    cast = train(tmp_path / "cast", source, **settings, precision__compute="bf16")
    alone = train(tmp_path / "bf16", source, **settings, precision__compute="bf16", precision__weights="bf16")
    assert cast == pytest.approx(precise, abs=0.03)
    assert alone == pytest.approx(precise, abs=0.1)
    assert cast != precise != alone


def test_a_loss_that_is_no_number_ends_the_run_and_is_not_saved(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = SHORT | {"optimizer__learning_rate": 1e30, "log__interval": 100}
    assert main(options(tmp_path, source, **changes)) == 1
    # The first step makes weights of 1e30, whose squares overflow float32.
    assert re.search(r"llama-te-train: step 2 has loss \S+ and a norm of gradients of nan", capsys.readouterr().err)
    assert not (tmp_path / "checkpoints").exists()
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2]


def test_profiles_are_written(tmp_path: Path, source: Path) -> None:
    train(tmp_path, source, **SHORT | {"steps": 3}, profile__trace_at=2, profile__trace_steps=5)
    trace = json.loads((tmp_path / "profile" / "trace-rank-0.json").read_text())
    assert any("linear" in str(event.get("name")) for event in trace["traceEvents"])


def test_a_run_can_be_repeated_from_its_own_configuration(whole_run: Path, tmp_path: Path) -> None:
    assert main(["--config", str(whole_run / "config.yaml"), "--folder", str(tmp_path)]) == 0
    assert losses(tmp_path) == losses(whole_run)


def test_documents_of_tokens_need_no_tokenizer(tmp_path: Path) -> None:
    source = tmp_path / "tokens.jsonl"
    source.write_text(json.dumps({"input_ids": list(range(100))}) + "\n")
    assert len(train(tmp_path, source, **SHORT | {"steps": 2}, data__tokenizer=None)) == 2


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"steps": 0}, 2, "steps=0: it must be an integer of at least 1"),
        ({"optimizer__beta1": 1}, 2, "optimizer.beta1=1.0: it must be at least 0 and below 1"),
        ({"optimizer__max_norm": 0}, 2, "optimizer.max_norm=0.0: it must be above 0"),
        ({"optimizer__learning_rate": -1}, 2, "optimizer.learning_rate=-1.0: it must be a finite number"),
        ({"schedule__kind": "step"}, 2, "schedule.kind"),
        ({"schedule__final_fraction": 2}, 2, "schedule.final_fraction=2.0: it must be from 0 to 1"),
        ({"profile__trace_at": 9}, 2, "profile.trace_at=9 is after the last step, steps=8: nothing would be recorded"),
        ({"profile__memory_at": 9}, 2, "profile.memory_at=9 is after the last step, steps=8"),
        ({"model__shape": None}, 2, "neither is given"),
        ({"model__checkpoint": "x/y"}, 2, "both are given"),
        ({"model__shape__hidden_size": 97}, 2, "hidden_size=97 is no multiple of num_attention_heads=4"),
        (
            {"model__shape__rope_parameters": "{rope_typ: x}"},
            2,
            "model.shape.rope_parameters has rope_typ: it may have",
        ),
        (
            {"model__shape__rope_parameters": "{rope_type: x}"},
            2,
            "has rope_type='x': it must be one of default, linear",
        ),
        ({"model__shape__num_key_value_heads": 3}, 2, "num_key_value_heads=3 must divide num_attention_heads=4"),
        ({"data__sequence_length": 600, "data__tokens_per_batch": 600}, 2, "max_position_embeddings=512"),
        ({"data__sequence_length": 0, "data__tokens_per_batch": 600}, 2, "sequence_length is 0; it must be an integer"),
        ({"data__sequence_length": 300}, 2, "sequence_length is 300, more than tokens_per_batch=256"),
        ({"parallel__context": 3}, 2, "data.tokens_per_batch=256 is no multiple of 2 x parallel.context=6"),
        ({"parallel__tensor": 0}, 2, "tensor=0: it must be an integer of at least 1"),
        ({"precision__weights": "bf16"}, 2, "precision.compute='fp32', but precision.weights='bf16'"),
        ({"precision__quantized_weights": True}, 2, "it needs compute='fp8' with one scale for each weight"),
        ({"precision__compute": "fp8", "precision__bf16_first_layers": 4}, 2, "leave none of 4 layers for fp8"),
        (
            {"precision__compute": "fp8", "precision__weights": "bf16", "precision__quantized_weights": True},
            2,
            "fp8_recipe='current' and weights='bf16': it needs",
        ),
        ({"activation_offload_layers": -1}, 2, "activation_offload_layers=-1: it must be an integer of at least 0"),
        (
            {"activation_offload_layers": 4},
            2,
            "the model has 4 layers, the last of which needs its activations at once",
        ),
        (
            {"activation_offload_layers": 1, "activation_checkpointing": "selective"},
            2,
            "activation_offload_layers=1 and activation_checkpointing='selective': layers that compute",
        ),
        ({"log__inspect": "x.yaml"}, 2, "log.inspect='x.yaml' is about the tensors of FP8 and FP4 layers, but"),
        (
            {
                "log__inspect": "x.yaml",
                "precision__compute": "fp8",
                "precision__quantized_weights": True,
            },
            2,
            "log.inspect='x.yaml' and precision.quantized_weights=True: the loss of",
        ),
        (
            {"log__inspect": "x.yaml", "precision__compute": "fp8", "activation_offload_layers": 1},
            2,
            "log.inspect='x.yaml' and activation_offload_layers=1: Transformer Engine does not offload",
        ),
        ({"export__hf": True}, 2, "export.hf=True, but export.te=False"),
        ({"nonsense": 1}, 2, "nonsense"),
        (
            {"config": "tinyy"},
            2,
            "--config tinyy: there is no such file, and presets are llama-3.1-70b, llama-3.1-8b, ",
        ),
        ({"config": "./no.yaml"}, 2, "--config ./no.yaml: there is no such file"),
        ({"parallel__shard": 2}, 1, "shard=2, context=1, tensor=1 need 2 processes, but there are 1"),
        ({"precision__compute": "fp8"}, 1, "needs Transformer Engine layers on an NVIDIA GPU, but"),
        ({"precision__compute": "nvfp4"}, 1, "needs Transformer Engine layers on an NVIDIA GPU, but"),
        ({"profile__memory_at": 1}, 1, "records a GPU's memory, and torch finds no GPU"),
        ({"log__wandb_project": "x"}, 1, "needs the package wandb: pip install wandb"),
        ({"data__source": "./nowhere"}, 1, "source='./nowhere' is no file or folder"),
        ({"data__text_field": "body"}, 1, "has no field 'body'; its fields are ['text']. Change text_field"),
        ({"model__shape__vocab_size": 200}, 1, "data.tokenizer has 258 tokens, but the model has vocab_size=200"),
        ({"model__shape": None, "model__checkpoint": "./nowhere"}, 1, "'./nowhere' is no path that exists"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_before_anything_is_built(
    tmp_path: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    status: int,
    message: str,
) -> None:
    if "wandb" in str(changes):
        monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("llama_te_core.train.loop.build_model", None)
    folder = tmp_path / "run"
    try:
        found = main(options(folder, source, **SHORT | changes))
    except SystemExit as error:
        found = error.code
    assert found == status
    assert message in capsys.readouterr().err
    assert not folder.exists()


def test_a_checkpoint_of_another_model_is_refused(
    overfitted: Path, tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(overfitted / "te", tmp_path / "te")
    (tmp_path / "te" / "checksums.json").unlink()  # the configuration changes on purpose
    config = tmp_path / "te" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    changes = SHORT | {"model__shape": None, "model__checkpoint": tmp_path / "te"}
    assert main(options(tmp_path, source, **changes)) == 1
    assert "has no model.layers.2." in capsys.readouterr().err
    config.write_text(config.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 2'))
    config.write_text(config.read_text().replace('"intermediate_size": 256', '"intermediate_size": 128'))
    assert main(options(tmp_path, source, **changes)) == 1
    assert "fc1_weight of [512, 96], but its config.json asks for [256, 96]" in capsys.readouterr().err
    config.unlink()
    (tmp_path / "te" / "model.safetensors").unlink()


def test_a_runs_own_checkpoint_is_to_be_converted(
    whole_run: Path, tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, start = whole_run / "checkpoints" / "step-00000006", tmp_path / "start"
    changes = SHORT | {"model__shape": None, "steps": 1}
    assert main(options(tmp_path / "run", source, **changes, model__checkpoint=checkpoint)) == 1
    assert f"convert it (llama-te-convert to-hf {checkpoint} ./start) and give ./start" in capsys.readouterr().err
    assert convert(["to-hf", str(checkpoint), str(start)]) == 0
    (loss,) = train(tmp_path / "run", source, **changes, model__checkpoint=start)
    assert loss < losses(whole_run)[0] - 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {},
            r"source='\S+' \(in a configuration `data.source`\) has other documents than the saved run has read: 1",
        ),
        ({"seed": 3}, r"seed is 3 \(in a configuration `seed`\), but the saved run had 0: .* Use 0, or start anew"),
        (
            {"data__shuffle_buffer": 5},
            r"shuffle_buffer is 5 \(in a configuration `data.shuffle_buffer`\), but .* 10000",
        ),
    ],
)
def test_a_run_does_not_go_on_with_other_data(
    changes: dict[str, Any],
    message: str,
    whole_run: Path,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(whole_run / "checkpoints", tmp_path / "checkpoints")
    data = source if changes else write(tmp_path, docstrings(150)[2:4])
    assert main(options(tmp_path, data, **SHORT | {"steps": 9} | changes)) == 1
    said = capsys.readouterr().err
    assert re.search(message, said) and "load_state_dict" not in said and "Traceback" not in said


def test_a_run_shorter_than_its_warm_up_shortens_it_and_says_so(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = SHORT | {"schedule__warmup_steps": 10, "optimizer__learning_rate": 3e-3, "schedule__kind": "constant"}
    train(tmp_path, source, **settings | {"steps": 3})
    said = capsys.readouterr().err
    assert "schedule.warmup_steps=10 is more than steps=3: the warm-up takes 3 steps\n" in said
    train(tmp_path, source, **settings | {"steps": 12})  # a longer run goes on with its own warm-up
    assert "the warm-up takes" not in capsys.readouterr().err
    rates = [row["learning_rate"] for row in metrics(tmp_path)]
    assert rates == pytest.approx([1e-3, 2e-3, 3e-3, *(3e-4 * step for step in range(4, 11)), 3e-3, 3e-3])


@pytest.fixture
def in_a_terminal() -> Iterator[None]:
    """Ctrl-C as in a terminal, also where pytest itself is a background job of a script, for which it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("in_a_terminal")
@pytest.mark.parametrize("signals", [1, 2])
def test_ctrl_c_saves_and_a_second_one_ends_at_once(
    signals: int, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = SHORT | {"schedule__kind": "constant", "checkpoint__interval": 100}
    following, count = BatchStream.next, 0

    def interrupting(stream: BatchStream) -> Any:
        nonlocal count
        count += 1
        for _ in range(signals if count == 2 else 0):
            signal.raise_signal(signal.SIGINT)
        return following(stream)

    with monkeypatch.context() as patch:
        patch.setattr(BatchStream, "next", interrupting)
        status = main(options(tmp_path / "run", source, **settings))
    said = capsys.readouterr().err
    assert "Ctrl-C: the run ends after this step. A second one ends it at once.\n" in said and "Traceback" not in said
    if signals == 2:
        assert status == 130 and "llama-te-train: ended by Ctrl-C, without saving\n" in said
        assert not (tmp_path / "run" / "checkpoints").exists()
        return
    command = f"llama-te-train --config {tmp_path}/run/config.yaml\n"
    assert status == 0 and "stopped by Ctrl-C: step 2 is saved. To go on, give the same command" in said
    assert said.endswith(command)
    assert main(command.split()[1:]) == 0
    assert losses(tmp_path / "run") == train(tmp_path / "whole", source, **settings)


def test_ctrl_c_in_a_terminal_ends_no_worker(source: Path) -> None:
    """A terminal sends the signal to all processes of a command."""
    data = one_process(source).data.text_data(byte_tokenizer(), 0, 1, 1)
    stream = BatchStream(data, None, torch.device("cpu"), workers=1)
    stream.next()
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGINT)
    for _ in range(6):  # more than a worker prepares ahead
        stream.next()
    assert worker.is_alive()
    stream.close()


def test_ctrl_c_is_ignored_where_it_was_ignored_before() -> None:
    """A script's shell starts background jobs so."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGINT)
            assert interruption.agreed() is None
            signal.raise_signal(signal.SIGTERM)
            assert interruption.agreed() == "SIGTERM"
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("in_a_terminal")
def test_ctrl_c_before_the_first_step_ends_in_one_line(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build_model(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("llama_te_core.train.loop.build_model", build_model)
    assert main(options(tmp_path, source, **SHORT)) == 130
    assert "llama-te-train: ended by Ctrl-C" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("a bug"), ValueError("a bug"), KeyError("a bug")],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("place", ["build_model", "train_step", "Checkpoints.load", "collate"])
def test_what_is_no_error_of_the_input_keeps_its_traceback(
    place: str, error: Exception, whole_run: Path, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    name = "llama_te_core.data.collators.DataCollatorWithFlattening.__call__"
    monkeypatch.setattr(name if place == "collate" else f"llama_te_core.train.loop.{place}", fail)
    if place == "Checkpoints.load":
        shutil.copytree(whole_run / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(type(error)) as raised:
        main(options(tmp_path, source, **SHORT | {"steps": 9}))
    assert raised.value is error


def test_an_error_that_torch_raises_in_our_own_lines_is_no_error_of_the_input(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_te_core.train.loop.random_weights", lambda *given: lambda name, like: torch.zeros(7))
    with pytest.raises(RuntimeError, match="must match"):
        main(options(tmp_path, source, **SHORT))


def test_help_and_the_printed_configuration_are_complete(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llama_te_core.train"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    for option in ("--precision.fp8_recipe", "--data.batches_per_step", "--parallel.shard", "--checkpoint.keep"):
        assert option in shown
    assert "llama-3.1-70b" in shown
    printed = subprocess.run(
        [*command, "--config", "llama-3.2-1b", "--data.source", "x", "--steps", "700", "--print_config"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    file = tmp_path / "config.yaml"
    file.write_text(printed)
    read = read_config(["--config", str(file)])
    assert read == read_config(["--config=llama-3.2-1b", "--data.source", "x", "--steps", "700"])
    assert read.steps == 700


def test_the_data_can_know_the_vocabulary() -> None:
    assert DataConfig("x").text_data(None, 0, 1, 1).vocab_size is None
    assert DataConfig("x").text_data(None, 0, 1, 1, vocab_size=5).vocab_size == 5


def test_options_may_be_written_with_hyphens(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "tiny", "--data.source", "a-b", "--data.tokens-per-batch", "512", "--folder=c-d"]
    config = read_config(words)
    assert (config.data.source, config.data.tokens_per_batch, config.folder) == ("a-b", 512, "c-d")
    printed = []
    for option in ("--print-config", "--print_config"):
        with pytest.raises(SystemExit, match="0"):
            read_config([*words, option])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "tokens_per_batch: 512" in printed[0]


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-3.2-1b", 1.24), ("llama-3.1-8b", 8.03), ("llama-3.1-70b", 70.6)]
)
def test_presets_have_the_sizes_of_the_released_models(name: str, billions: float) -> None:
    config = read_config(["--config", name, "--data.source", "x"])
    with torch.device("meta"):
        model = NVLlamaForCausalLM(config.model_config())
    model.tie_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, rel=5e-3)


@pytest.mark.parametrize("package", ["jsonargparse", "torchdata.stateful_dataloader"])
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    for module in ("loop", "data.batch_stream"):
        monkeypatch.delitem(sys.modules, f"llama_te_core.train.{module}")
    monkeypatch.setitem(sys.modules, package, None)
    assert main(options(tmp_path, tmp_path)) == 1
    said = capsys.readouterr().err
    assert package in said and "pip install 'llama-te-core[train]'" in said


def test_importing_the_package_imports_none_of_what_training_needs() -> None:
    code = (
        "import sys, llama_te_core; print({'jsonargparse', 'torchdata', 'datasets', 'tensorboard'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert shown.stdout.strip() == "set()"


def test_precision_says_what_each_layer_computes_in() -> None:
    shape = ShapeConfig(num_hidden_layers=4)
    for compute, layers in (("fp8", "fp8"), ("mxfp8", "fp8"), ("nvfp4", "fp4")):
        precision = PrecisionConfig(compute=compute, bf16_first_layers=1, bf16_last_layers=1)
        config = TrainConfig(DataConfig("x", sequence_length=64), ModelConfig(shape=shape), precision=precision)
        assert config.model_config().layer_precision == [None, layers, layers, None]
    assert (
        TrainConfig(DataConfig("x", sequence_length=64), ModelConfig(shape=shape)).model_config().dtype == torch.float32
    )


def test_the_documented_configuration_is_valid(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "guides" / "train.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    file = tmp_path / "config.yaml"
    file.write_text(block, encoding="utf-8")
    config = read_config(["--config", str(file)])
    assert config.precision.layer_precision(3) == ["fp8", "fp8", None]
    assert config.optimizer.learning_rate == 1e-5
