"""The contract of `llama_te_core.compat`: other libraries' private names exist, and behave as we assume."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from llama_te_core.compat import torch as compat_torch
from llama_te_core.compat import transformer_engine as compat_te
from llama_te_core.compat import transformers as compat_transformers
from llama_te_core.models.generation import CachedGenerationMixin


def moved(library: str, name: str) -> str:
    version = importlib.import_module(library).__version__
    return f"{library} {version} has moved or changed {name}: adapt llama_te_core/compat/{library}.py"


class TestTransformers:
    def test_the_cache_has_one_of_two_names(self) -> None:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        field = compat_transformers.cache_field()
        assert field in inspect.signature(BaseModelOutputWithPast).parameters, moved(
            "transformers", "the cache's field"
        )

    def test_generate_reads_the_mark_of_a_given_cache(self) -> None:
        from transformers.generation import utils

        cache = types.SimpleNamespace()
        compat_transformers.mark_as_given(cache)
        assert set(vars(cache)) == {"_is_user_defined"}
        assert "_is_user_defined" in inspect.getsource(utils), moved("transformers", "_is_user_defined")

    @pytest.mark.parametrize("name", ["_prepare_cache_for_generation", "_prefill"])
    def test_generate_calls_the_methods_that_we_override(self, name: str) -> None:
        from transformers import GenerationMixin

        theirs = list(inspect.signature(getattr(GenerationMixin, name)).parameters)
        ours = inspect.signature(getattr(CachedGenerationMixin, name)).parameters.values()
        positional = [each.name for each in ours if each.kind is each.POSITIONAL_OR_KEYWORD]
        assert theirs[: len(positional)] == positional, moved("transformers", f"GenerationMixin.{name}")

    def test_tokenizers_need_no_torch(self) -> None:
        program = """
import sys
import llama_te_core
from llama_te_core.compat.transformers import import_for_tokenizers
import_for_tokenizers()
from transformers import PreTrainedTokenizerFast
from tokenizers import Tokenizer, models
letters = Tokenizer(models.BPE({"a": 0}, []))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, chat_template="{{ messages }}")
assert tokenizer("aa")["input_ids"] == [0, 0] and tokenizer.decode([0]) == "a"
assert "'b'" in tokenizer.apply_chat_template([{"role": "b", "content": "c"}], tokenize=False)
assert "torch" not in sys.modules
"""
        ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert (ran.returncode, ran.stderr) == (0, ""), moved(
            "transformers", f"tokenizers without torch ({ran.stderr})"
        )

    def test_lists_of_tokens_are_decoded_as_by_decode(self) -> None:
        from tokenizers import AddedToken, Tokenizer, decoders, models
        from transformers import PreTrainedTokenizerFast

        class Own(PreTrainedTokenizerFast):
            def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> Any:
                return "own"

        words = Tokenizer(models.WordPiece({"[UNK]": 0, "do": 1, "n": 2, "'": 3, "t": 4, ".": 5}, unk_token="[UNK]"))
        words.decoder = decoders.WordPiece(cleanup=False)
        for clean_up in (False, True):
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=words,
                eos_token=AddedToken("<end>", special=True),
                clean_up_tokenization_spaces=clean_up,
            )
            decode = compat_transformers.list_decoder(tokenizer)
            assert decode != tokenizer.decode, moved("transformers", "PreTrainedTokenizerBase._decode")
            for tokens in ([], [1], [1, 2, 3, 4, 5, 6], [0, 5], [6, 6], [99]):
                for skip in (False, True):
                    expected = tokenizer.decode(tokens, skip_special_tokens=skip)
                    assert decode(tokens, skip_special_tokens=skip) == expected, moved("transformers", "_decode")
        assert compat_transformers.list_decoder(Own(tokenizer_object=words))([1]) == "own"
        tokenizer.decode = lambda *_, **__: "replaced"
        assert compat_transformers.list_decoder(tokenizer)([1]) == "replaced"

    def test_gradient_checkpointing_sets_a_function(self) -> None:
        from transformers import LlamaConfig, LlamaModel

        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 8}
        model = LlamaModel(LlamaConfig(num_hidden_layers=1, **sizes))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        decoder = model.layers[0]  # transformers' own layers hold this; our models may have no layers of that class
        holder = model if hasattr(model, "_gradient_checkpointing_func") else decoder
        function: Any = compat_transformers.gradient_checkpointing_function(holder)
        assert function.keywords["use_reentrant"], moved("transformers", "_gradient_checkpointing_func")

    def test_a_configuration_says_its_attention(self) -> None:
        from transformers import LlamaConfig

        config = LlamaConfig(attn_implementation="eager")
        assert compat_transformers.attention_implementation(config) == "eager", moved(
            "transformers", "_attn_implementation"
        )

    def test_rope_types_and_their_parameters(self) -> None:
        functions = compat_transformers.rope_functions()
        assert {"linear", "dynamic", "yarn", "longrope", "llama3"} <= set(functions), moved(
            "transformers", "rope types"
        )
        names = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"}
        assert names <= compat_transformers.rope_parameter_names(), moved("transformers", "RopeParameters")

    def test_trainer_knows_causal_models_by_name(self) -> None:
        from transformers import trainer

        assert "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES" in inspect.getsource(trainer), moved(
            "transformers", "label smoothing"
        )
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["nv_llama"] == "NVLlamaForCausalLM"

    def test_an_action_runs_after_an_import_and_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "imported_later.py").write_text("value = 3\n")
        monkeypatch.syspath_prepend(tmp_path)
        seen: list[int] = []
        compat_transformers.when_imported("imported_later", lambda: seen.append(sys.modules["imported_later"].value))
        assert seen == []
        module = importlib.import_module("imported_later")
        assert seen == [3] and inspect.getsource(module) == "value = 3\n"
        importlib.reload(module)
        compat_transformers.when_imported("imported_later", lambda: seen.append(4))
        assert seen == [3, 4]
        del sys.modules["imported_later"]


class TestTorch:
    def test_a_chosen_device_is_told_from_none(self) -> None:
        assert compat_torch.chosen_device() is None
        for device in ("cpu", "meta"):
            with torch.device(device), torch.no_grad():
                assert compat_torch.chosen_device() == torch.device(device), moved("torch", "DeviceContext")
            torch.set_default_device(device)
            try:
                assert compat_torch.chosen_device() == torch.device(device), moved("torch", "DeviceContext")
            finally:
                torch.set_default_device(None)
        assert compat_torch.chosen_device() is None

    def test_a_device_stops_where_a_condition_is_false(self) -> None:
        compat_torch.assert_on_device(torch.tensor(True), "not seen")
        with pytest.raises(RuntimeError, match="lengths must fit"):  # on the host it raises
            compat_torch.assert_on_device(torch.tensor(False), "lengths must fit")

    @pytest.mark.parametrize(("rows", "columns"), [(5, 16), (1, 1)])
    def test_fp8_products_have_scales_of_rows_and_columns_or_one_each(self, rows: int, columns: int) -> None:
        generator = torch.Generator().manual_seed(0)
        value_BK, weight_NK = (torch.randn(n, 32, generator=generator).to(torch.float8_e4m3fn) for n in (5, 16))
        scale_B1, scale_1N = torch.rand(rows, 1, generator=generator), torch.rand(1, columns, generator=generator)
        expected_BN = (value_BK.double() * scale_B1) @ weight_NK.double().T * scale_1N
        output_BN = torch.empty(5, 16, dtype=torch.bfloat16)
        arguments = (value_BK, weight_NK.T, scale_B1, scale_1N, torch.bfloat16)
        for found in (compat_torch.fp8_product(*arguments), compat_torch.fp8_product(*arguments, output_BN)):
            distance_BN = (found.double() - expected_BN).abs()
            assert bool((distance_BN <= 2**-8 * expected_BN.abs() + 1e-5).all()), moved("torch", "_scaled_mm")
        assert torch.equal(output_BN, compat_torch.fp8_product(*arguments))

    def test_each_process_holds_its_share_of_two_halves(self) -> None:
        placement = compat_torch.placement_of_two_halves()
        assert placement.is_shard() or type(placement).__name__ == "_StridedShard", moved("torch", "_StridedShard")
        assert placement == compat_torch.placement_of_two_halves() and placement != Shard(0)

    def test_the_local_range_of_a_tensor(self) -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        try:
            mesh = init_device_mesh("cpu", (1,))
            tensor = distribute_tensor(torch.empty(10, 3), mesh, [Shard(0)])
            assert isinstance(tensor, DTensor)
            found = compat_torch.local_range(tensor, tensor)
            assert found == ((10, 3), (0, 0)), moved("torch", "compute_local_shape_and_global_offset")
            assert compat_torch.local_range(torch.empty(4, 2), tensor, [Replicate()]) == ((4, 2), (0, 0))
        finally:
            dist.destroy_process_group()

    def test_trees_are_mapped_together(self) -> None:
        tree = {"a": [1, 2], "b": 3}
        other = {"a": [10, 20], "b": 30}
        mapped = compat_torch.tree_map(lambda one, two: one + two, tree, other)
        assert mapped == {"a": [11, 22], "b": 33}, moved("torch", "_pytree.tree_map")

    def test_a_compiled_module_shows_its_own(self) -> None:
        module = nn.Linear(2, 2)
        assert compat_torch.uncompiled(torch.compile(module)) is module, moved("torch", "_orig_mod")
        assert compat_torch.uncompiled(module) is module

    def test_hooks_on_a_forward_pass_are_found(self) -> None:
        module = nn.Linear(2, 2)

        def before(*args: Any) -> None: ...

        def after(*args: Any) -> None: ...

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
        assert set(compat_torch.forward_hooks(module)) == {before, after}, moved("torch", "_forward_hooks")

    def test_hooks_have_numbers_that_are_never_given_again(self) -> None:
        module = nn.Linear(2, 2)
        handle = module.register_forward_hook(lambda *args: None)
        numbers = compat_torch.hook_numbers(module)
        handle.remove()
        module.register_forward_pre_hook(lambda *args: None)
        assert len(numbers) == 1 and compat_torch.hook_numbers(module) > numbers, moved("torch", "_forward_hooks")

    def test_a_module_s_own_tensors_and_children(self) -> None:
        module = nn.BatchNorm1d(2)
        found = {id(tensor) for tensor in compat_torch.own_tensors(module)}
        expected = {id(tensor) for tensor in [*module.parameters(), *module.buffers()]}
        assert found == expected, moved("torch", "_parameters or _buffers")
        outer = nn.Sequential(module, nn.Sequential(nn.Linear(2, 2)))
        assert compat_torch.children_of(outer) == list(outer.children()), moved("torch", "_modules")

    def test_writes_and_replacements_change_a_tensor_s_state(self) -> None:
        tensor = torch.zeros(3)
        first, reference = compat_torch.tensor_state(tensor), compat_torch.storage_reference(tensor)
        tensor.add_(1)
        second = compat_torch.tensor_state(tensor)
        assert first[:2] == second[:2] and first[2] != second[2], moved("torch", "_version")
        tensor.data = torch.zeros(3)
        assert compat_torch.tensor_state(tensor)[0] != second[0], moved("torch", "UntypedStorage._cdata")
        assert compat_torch.storage_reference(tensor) != reference, moved("torch", "StorageWeakRef")
        with torch.inference_mode():
            assert compat_torch.tensor_state(torch.zeros(3))[2] == -1

    def test_a_tensor_that_wraps_others_has_one_state(self) -> None:
        """As Transformer Engine's quantized tensors, it makes an empty storage for each call."""

        class Wrapper(torch.Tensor):
            made: ClassVar[list[torch.UntypedStorage]] = []

            def untyped_storage(self) -> torch.UntypedStorage:
                self.made.append(torch.UntypedStorage(0))
                return self.made[-1]

            @classmethod
            def __torch_dispatch__(cls, *arguments: Any) -> None:
                raise AssertionError("the state is read without an operation")

        tensor = torch.Tensor._make_wrapper_subclass(Wrapper, (3,))
        assert compat_torch.tensor_state(tensor) == compat_torch.tensor_state(tensor) == (0, 0, 0)

    def test_steps_of_all_optimizers_are_seen(self) -> None:
        seen: list[torch.optim.Optimizer] = []
        compat_torch.after_each_optimizer_step(seen.append)
        parameter = nn.Parameter(torch.zeros(2))
        parameter.grad = torch.ones(2)
        optimizer = torch.optim.AdamW([parameter], fused=True)
        optimizer.step()
        assert seen == [optimizer], moved("torch", "register_optimizer_step_post_hook")

    @pytest.mark.parametrize("fused", [True, False])
    def test_a_flag_keeps_an_optimizer_from_its_step(self, fused: bool) -> None:
        weight = torch.nn.Parameter(torch.ones(4))
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
        for failed, grad, steps in ((0, 1.0, 1), (1, float("nan"), 1), (0, 1.0, 2)):
            before = weight.detach().clone()
            weight.grad = torch.full((4,), grad)
            compat_torch.step_unless(optimizer, torch.tensor(float(failed)))
            assert torch.equal(weight, before) == bool(failed), "found_inf of torch's fused AdamW has moved"
            assert optimizer.state[weight]["step"] == steps and optimizer.state[weight]["exp_avg"].isfinite().all()
        assert getattr(optimizer, "_step_supports_amp_scaling", False) == fused, "a fused optimizer tells it otherwise"

    def test_a_replica_of_data_parallel_is_known(self) -> None:
        module = nn.Linear(2, 2)
        assert not compat_torch.is_data_parallel_replica(module)
        replica = module._replicate_for_data_parallel()
        assert compat_torch.is_data_parallel_replica(replica), moved("torch", "_is_replica")

    def test_memory_is_recorded_by_these_functions(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[tuple[Any, ...]] = []
        memory = torch.cuda.memory
        assert "enabled" in inspect.signature(memory._record_memory_history).parameters
        assert hasattr(memory, "_dump_snapshot"), moved("torch", "_dump_snapshot")
        monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **how: calls.append(("record", how)))
        monkeypatch.setattr(memory, "_dump_snapshot", lambda file: calls.append(("dump", file)))
        compat_torch.start_memory_recording()
        compat_torch.stop_memory_recording("file")
        assert calls == [("record", {}), ("dump", "file"), ("record", {"enabled": None})]

    def test_fully_shard_names_its_classes(self) -> None:
        from torch.distributed.fsdp._fully_shard import _fully_shard

        assert f'"{compat_torch.FSDP_CLASS_PREFIX}"' in inspect.getsource(_fully_shard) or (
            f'f"{compat_torch.FSDP_CLASS_PREFIX}' in inspect.getsource(_fully_shard)
        ), moved("torch", "the class that fully_shard makes")


class TestPeft:
    def test_a_factory_makes_the_wrapper_of_a_parameter(self) -> None:
        pytest.importorskip("peft")
        from peft import LoraConfig, get_peft_model

        from llama_te_core.compat import peft as compat_peft

        asked: list[str | None] = []

        def factory(module: nn.Module, adapter_name: str, *, parameter_name: str | None = None, **options: Any) -> Any:
            asked.append(parameter_name)
            return compat_peft.ParamWrapper(module, adapter_name, parameter_name=parameter_name, **options)

        config = LoraConfig(target_parameters=["0.weight"], r=1)
        compat_peft.set_wrapper_factory(config, factory)
        model = get_peft_model(nn.Sequential(nn.Linear(3, 3)), config)
        assert asked == ["weight"], moved("peft", "_register_custom_module")
        wrappers = [each for each in model.modules() if isinstance(each, compat_peft.ParamWrapper)]
        assert len(wrappers) == 1 and wrappers[0].parameter_name == "weight", moved("peft", "ParamWrapper")

    def test_every_injection_enters_our_context(self) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraModel, variants
        from peft.tuners.tuners_utils import BaseTuner

        from llama_te_core.compat import peft as compat_peft

        assert compat_peft.default_targets("llama") == {"q_proj", "v_proj"}
        assert hasattr(BaseTuner.inject_adapter, "__wrapped__"), "llama_te_core registers when PEFT is imported"
        assert LoraModel.inject_adapter is BaseTuner.inject_adapter, moved("peft", "BaseTuner.inject_adapter")
        config = LoraConfig(r=2, target_modules=["0"], use_dora=True)
        adapted = inject_adapter_in_model(config, nn.Sequential(nn.Linear(4, 3, bias=False)))[0]
        assert isinstance(adapted, compat_peft.LoraLinear), moved("peft", "lora.Linear")
        assert compat_peft.unknown_variant(adapted, "default") is None, moved("peft", "lora_variant")
        adapted.lora_variant["default"] = variants.ALoraLinearVariant()
        assert compat_peft.unknown_variant(adapted, "default") == "ALoraLinearVariant", moved("peft", "lora_variant")
        assert adapted.use_dora == {"default": True}, moved("peft", "use_dora")
        assert adapted.get_delta_weight("default").shape == (3, 4), moved("peft", "get_delta_weight")
        assert adapted.lora_magnitude_vector["default"].weight.shape == (3,), moved("peft", "lora_magnitude_vector")


class TestAccelerate:
    def test_a_hook_names_the_device_of_offloaded_weights(self) -> None:
        accelerate = pytest.importorskip("accelerate")
        from llama_te_core.compat.accelerate import execution_devices

        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert {weight.device.type for weight in model.parameters()} == {"meta"}
        assert execution_devices(model) == {torch.device("cpu")}, moved("accelerate", "execution_device")

    def test_weights_without_a_hook_are_where_they_compute(self) -> None:
        from llama_te_core.compat.accelerate import execution_devices

        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta"))
        assert execution_devices(model) == {torch.device("cpu"), torch.device("meta")}


class TestTorchdata:
    def test_workers_end_and_states_have_an_age(self) -> None:
        pytest.importorskip("torchdata")
        from torchdata.stateful_dataloader import StatefulDataLoader

        from llama_te_core.compat import torchdata as compat_torchdata

        loader = StatefulDataLoader(list(range(8)), batch_size=1, num_workers=1, snapshot_every_n_steps=4)
        iterator = iter(loader)
        next(iterator)
        assert compat_torchdata.batches_since_snapshot(loader.state_dict()) == 1, moved("torchdata", "the state's age")
        compat_torchdata.shut_down_workers(iterator)
        assert not any(worker.is_alive() for worker in iterator._workers), moved("torchdata", "_shutdown_workers")


class TestTransformerEngineWithoutIt:
    """Tests the functions without TE; tests/gpu/test_compat.py tests them against TE itself."""

    def test_nothing_is_quantized(self) -> None:
        assert not compat_te.is_quantized(torch.ones(1)) and compat_te.fp8_parts(torch.ones(1)) is None
        assert not compat_te.is_module_of_transformer_engine(nn.Linear(1, 1))
        assert compat_te.held_tensors(torch.ones(1)) == []
        assert not compat_te.holds_quantized_weights(nn.Linear(1, 1))
        assert compat_te.delayed_scaling_state(nn.Linear(1, 1)) == {}


def test_a_transformer_engine_without_its_compiled_parts_holds_no_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", types.ModuleType("transformer_engine.pytorch"))
    assert not compat_te.is_quantized(torch.ones(1))
    assert compat_te.fp8_parts(torch.ones(1)) is None
