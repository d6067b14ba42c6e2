"""Tests each layer's precision, the refused precisions, and the contexts that Transformer Engine gets."""

import warnings

import pytest
import torch
from safetensors.torch import load_file

from conftest import TINY
from core.fake_transformer_engine import (
    DelayedScaling,
    DType,
    FakeTransformerEngine,
    Float8BlockScaling,
    Float8CurrentScaling,
    Float8Tensor,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    QuantizedTensor,
)
from llama_te_core import NVLlamaConfig, NVLlamaForCausalLM, NVLlamaModel
from llama_te_core.precision.plan import PrecisionPlan
from llama_te_core.precision.recipes import check_recipe, recipe_name
from llama_te_core.precision.scaling_state import calibrate

RECIPES = [DelayedScaling, Float8CurrentScaling, Float8BlockScaling, MXFP8BlockScaling, NVFP4BlockScaling]
# The recipes that each GPU runs. A refusal of any other recipe names the last one, or none, as the nearest.
RUNS = {
    (8, 0): [],
    (8, 6): [],
    (8, 9): [DelayedScaling, Float8CurrentScaling],
    (9, 0): [DelayedScaling, Float8CurrentScaling, Float8BlockScaling],
    (10, 0): RECIPES,
    (12, 0): RECIPES,
}


@pytest.fixture
def te(monkeypatch):
    """Install a fake Transformer Engine on a fake Hopper GPU."""
    return FakeTransformerEngine().install(monkeypatch)


def config_of(**fields):
    return NVLlamaConfig(**{**TINY, **fields})


class TestPlan:
    def test_no_recipe_and_no_list_is_full_precision(self):
        plan = PrecisionPlan(None, None, None, 3)
        assert plan.layers == [None, None, None]
        assert not plan.quantized
        assert plan.token_multiple() == 1
        plan.check_tokens(7, grad=True)
        plan.check(None, "the reference implementation")

    def test_fp8_recipe_alone_is_every_layer_with_a_warning(self):
        with pytest.warns(UserWarning, match=r"every layer runs in FP8.*layer_precision=\['fp8'\] \* 3"):
            plan = PrecisionPlan(None, DelayedScaling(), None, 3)
        assert plan.layers == ["fp8", "fp8", "fp8"]

    @pytest.mark.parametrize(
        ("layer_precision", "fp8_recipe", "fp4_recipe", "message"),
        [
            (
                None,
                DelayedScaling(),
                NVFP4BlockScaling(),
                "fp8_recipe and fp4_recipe are given without layer_precision",
            ),
            (None, None, NVFP4BlockScaling(), "fp4_recipe is given without layer_precision"),
            (["fp8", None, "fp4"], DelayedScaling(), None, r"layer_precision\[2\]='fp4' needs fp4_recipe"),
            (["fp4", "fp4", "fp4"], None, None, r"layer_precision\[0\]='fp4' needs fp4_recipe"),
        ],
    )
    def test_what_does_not_fit_together(self, layer_precision, fp8_recipe, fp4_recipe, message):
        with pytest.raises(RuntimeError, match=message):
            PrecisionPlan(layer_precision, fp8_recipe, fp4_recipe, 3)

    def test_a_mixed_list_warns_of_nothing(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plan = PrecisionPlan(["fp8", None, "fp4"], DelayedScaling(), NVFP4BlockScaling(), 3)
        assert plan.layers == ["fp8", None, "fp4"]
        assert plan.quantized


class TestRecipes:
    @pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
    @pytest.mark.parametrize("capability", RUNS, ids=str)
    def test_a_gpu_runs_it_or_the_message_says_what_it_runs(self, capability, recipe):
        if recipe in RUNS[capability]:
            assert check_recipe(recipe(), capability, "NVIDIA X") is None
            return
        with pytest.raises(RuntimeError) as caught:
            check_recipe(recipe(), capability, "NVIDIA X")
        text = str(caught.value)
        assert text.startswith(f"{recipe.__name__} needs compute capability ")
        assert f"NVIDIA X has {capability[0]}.{capability[1]}" in text
        nearest = text.partition("The nearest that works there: ")[2]
        assert nearest.startswith(RUNS[capability][-1].__name__ if RUNS[capability] else "no recipe at all: bfloat16")

    def test_a_derived_recipe_is_known_by_its_base(self):
        class MyScaling(MXFP8BlockScaling):
            pass

        assert recipe_name(MyScaling()) == "MXFP8BlockScaling"
        with pytest.raises(RuntimeError, match=r"MXFP8BlockScaling needs compute capability 10\.0"):
            check_recipe(MyScaling(), (9, 0), "NVIDIA H200")

    def test_a_recipe_of_a_newer_transformer_engine_is_left_to_it(self):
        class CustomRecipe:
            pass

        assert recipe_name(CustomRecipe()) == "CustomRecipe"
        assert check_recipe(CustomRecipe(), (9, 0), "NVIDIA H200") is None
        with pytest.raises(RuntimeError, match="CustomRecipe needs Transformer Engine layers"):
            check_recipe(CustomRecipe(), None, "the CPU")

    @pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
    def test_the_reference_layer_refuses_every_recipe(self, recipe):
        config = config_of(layer_implementation="reference", layer_precision=["fp8", None, None])
        fp8, fp4 = (recipe(), None)
        if recipe is NVFP4BlockScaling:
            config.layer_precision, fp8, fp4 = ["fp4", None, None], None, recipe()
        with pytest.raises(
            RuntimeError, match=f"{recipe.__name__} needs Transformer Engine.*the reference impl.*nearest"
        ):
            NVLlamaForCausalLM(config, fp8_recipe=fp8, fp4_recipe=fp4)

    def test_the_reference_layer_refuses_a_list_without_a_recipe_before_it_runs(self):
        """Any machine can load and convert such a checkpoint's weights. The layers only refuse to run them."""
        model = NVLlamaForCausalLM(config_of(layer_implementation="reference", layer_precision=[None, "fp8", None]))
        with pytest.raises(RuntimeError, match=r"FP8 needs Transformer Engine layers on an NVIDIA GPU"):
            model(torch.ones(1, 16, dtype=torch.long))

    @pytest.mark.parametrize(
        ("recipe", "nearest"), [(MXFP8BlockScaling, "Float8BlockScaling"), (NVFP4BlockScaling, "Float8BlockScaling")]
    )
    def test_hopper_refuses_blackwells_recipes_at_construction(self, te, recipe, nearest):
        entry = "fp4" if recipe is NVFP4BlockScaling else "fp8"
        with pytest.raises(RuntimeError, match=rf"{recipe.__name__} needs.*10\.0.*Fake GPU has 9\.0.*{nearest}"):
            NVLlamaModel(config_of(layer_precision=[entry] * 3), **{f"{entry}_recipe": recipe()})

    def test_an_old_gpu_refuses_the_default_recipe_before_any_layer_runs(self, monkeypatch):
        te = FakeTransformerEngine().install(monkeypatch, capability=(8, 0))
        model = NVLlamaModel(config_of(layer_precision=["fp8", None, None]))
        with pytest.raises(RuntimeError, match=r"DelayedScaling needs.*8\.9.*Fake GPU has 8\.0.*no recipe at all"):
            model(torch.ones(1, 16, dtype=torch.long))
        assert not any(layer.calls for layer in te.layers)


class TestTokens:
    @pytest.mark.parametrize(
        ("layer_precision", "fp8", "fp4", "grad", "multiple"),
        [
            (["fp8", None], DelayedScaling, None, True, 16),
            (["fp8", None], DelayedScaling, None, False, 8),
            (["fp8", None], None, None, True, 16),
            (["fp8", None], Float8BlockScaling, None, True, 16),
            (["fp8", None], MXFP8BlockScaling, None, True, 32),
            (["fp8", None], MXFP8BlockScaling, None, False, 32),
            (["fp8", "fp4"], DelayedScaling, NVFP4BlockScaling, True, 128),
            ([None, "fp4"], None, NVFP4BlockScaling, False, 128),
        ],
    )
    def test_the_message_says_what_to_pad_to(self, layer_precision, fp8, fp4, grad, multiple):
        plan = PrecisionPlan(layer_precision, fp8 and fp8(), fp4 and fp4(), 2)
        plan.check_tokens(3 * multiple, grad)
        for tokens in (1, multiple - 1, multiple + 1):
            padded = multiple if tokens < multiple else 2 * multiple
            with pytest.raises(ValueError, match=f"^{tokens} tokens.*multiples of {multiple}: pad to {padded} "):
                plan.check_tokens(tokens, grad)

    def test_each_tensor_rank_has_a_multiple(self):
        plan = PrecisionPlan(["fp8", None], DelayedScaling(), None, 2)
        plan.check_tokens(32, grad=True, ranks=2)
        with pytest.raises(
            ValueError, match="^16 tokens.*fp8 layers on 2 tensor ranks take multiples of 32: pad to 32 "
        ):
            plan.check_tokens(16, grad=True, ranks=2)

    def test_the_recipe_of_no_layer_does_not_count(self):
        plan = PrecisionPlan(["fp8", None], DelayedScaling(), NVFP4BlockScaling(), 2)
        assert plan.token_multiple() == 16

    def test_packed_tokens_are_the_callers_to_pad(self, te):
        model = NVLlamaModel(config_of(layer_precision=["fp8"] * 3), fp8_recipe=DelayedScaling())
        starts = torch.tensor([0, 5, 9], dtype=torch.int32)
        with pytest.raises(ValueError, match=r"9 tokens.*fp8 layers take multiples of 16: pad to 16 "):
            model(torch.ones(1, 9, dtype=torch.long), cu_seq_lens_q=starts, max_length_q=5)
        assert not any(layer.calls for layer in te.layers)

    @pytest.mark.parametrize("grad", [True, False])
    def test_padded_batches_are_padded_by_the_model(self, te, grad):
        model = NVLlamaModel(config_of(layer_precision=["fp8"] * 3), fp8_recipe=DelayedScaling())
        mask_BS = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
        ids_BS = torch.arange(3, 13).view(2, 5)
        with torch.set_grad_enabled(grad):
            hidden_BSE = model(ids_BS, attention_mask=mask_BS).last_hidden_state
        starts = te.layers[0].calls[0]["cu_seqlens_q"]
        assert int(starts[-1]) == 16
        plain = NVLlamaModel(config_of())
        plain.load_state_dict(model.state_dict())
        expected_BSE = plain(ids_BS, attention_mask=mask_BS).last_hidden_state
        torch.testing.assert_close(hidden_BSE[mask_BS.bool()], expected_BSE[mask_BS.bool()])

    def test_a_bshd_batch_is_the_callers_to_pad(self, te):
        config = config_of(layer_precision=["fp8"] * 3, attn_input_format="bshd")
        model = NVLlamaModel(config, fp8_recipe=DelayedScaling())
        with pytest.raises(ValueError, match=r"10 tokens.*pad to 16"):
            model(torch.ones(2, 5, dtype=torch.long))


class TestContexts:
    """Tests the contexts that a fake Transformer Engine records."""

    mixed = ("fp8", None, "fp4")

    def mixed_model(self, monkeypatch, **fields):
        te = FakeTransformerEngine().install(monkeypatch, capability=(10, 0))
        fp8, fp4 = Float8CurrentScaling(), NVFP4BlockScaling()
        config = config_of(layer_precision=list(self.mixed), **fields)
        model = NVLlamaForCausalLM(config, fp8_recipe=fp8, fp4_recipe=fp4)
        return te, model, {"fp8": (True, fp8), "fp4": (True, fp4), None: (False, None)}

    def test_each_layer_runs_in_its_own_context(self, monkeypatch):
        te, model, contexts = self.mixed_model(monkeypatch)
        head = []
        model.lm_head.register_forward_pre_hook(lambda *_: head.append(list(te.autocasts)))
        model(torch.ones(1, 128, dtype=torch.long))
        for layer, precision in zip(te.layers, self.mixed, strict=True):
            (call,) = layer.calls
            # One outer context, so that scales are updated once a pass, and the layer's own within.
            assert call["autocast"] == [contexts["fp8"], contexts[precision]]
        assert head == [[]]  # the language-model head always runs outside
        assert te.events == [
            ("enter autocast", *contexts["fp8"]),
            ("enter autocast", *contexts["fp8"]),
            ("layer", 1),
            ("exit autocast", *contexts["fp8"]),
            ("enter autocast", *contexts[None]),
            ("layer", 2),
            ("exit autocast", *contexts[None]),
            ("enter autocast", *contexts["fp4"]),
            ("layer", 3),
            ("exit autocast", *contexts["fp4"]),
            ("exit autocast", *contexts["fp8"]),
        ]

    def test_a_list_without_a_recipe_takes_transformer_engines_default(self, te):
        model = NVLlamaForCausalLM(config_of(layer_precision=["fp8", None, None]))
        model(torch.ones(1, 16, dtype=torch.long))
        recipes = [layer.calls[0]["autocast"][-1][1] for layer in te.layers]
        assert isinstance(recipes[0], DelayedScaling)
        assert recipes[1:] == [None, None]

    @pytest.mark.parametrize("recipe", [DelayedScaling(), None])
    def test_calibration_runs_all_batches_where_transformer_engine_looks_at_them(self, te, recipe):
        model = NVLlamaForCausalLM(config_of(layer_precision=["fp8"] * 3), fp8_recipe=recipe).eval()
        seen = []
        model.model.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
        with torch.no_grad():
            calibrate(model, ({"input_ids": torch.ones(1, 16, dtype=torch.long)} for _ in range(4)))
        assert seen == [True] * 4
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_calibration_of_nothing_is_refused(self, te):
        batch = {"input_ids": torch.ones(1, 16, dtype=torch.long)}
        for model in (
            NVLlamaForCausalLM(config_of()),
            NVLlamaForCausalLM(config_of(layer_precision=["fp8", None, None]), fp8_recipe=Float8CurrentScaling()),
            torch.nn.Linear(3, 4),
        ):
            with pytest.raises(ValueError, match="no layer of the model has delayed scaling"):
                calibrate(model, [batch])
        with pytest.raises(ValueError, match="batches is empty"):
            calibrate(NVLlamaForCausalLM(config_of(layer_precision=["fp8"] * 3), fp8_recipe=DelayedScaling()), [])

    def test_without_quantized_layers_there_is_no_context(self, te):
        NVLlamaForCausalLM(config_of())(torch.ones(1, 5, dtype=torch.long))
        assert te.events == [("layer", 1), ("layer", 2), ("layer", 3)]

    def test_quantized_weights_are_made_in_their_layers_context(self, monkeypatch):
        with torch.device("meta"):
            te, model, contexts = self.mixed_model(monkeypatch, use_quantized_model_init=True)
        assert [layer.init_context for layer in te.layers] == [contexts["fp8"], None, contexts["fp4"]]
        quantized = {name for name, weight in model.named_parameters() if isinstance(weight, QuantizedTensor)}
        assert quantized == {
            f"model.layers.{layer}.{name}"
            for layer in (0, 2)
            for name in (
                "self_attention.layernorm_qkv.weight",
                "self_attention.proj.weight",
                "layernorm_mlp.fc1_weight",
                "layernorm_mlp.fc2_weight",
            )
        }

    def test_weights_are_not_quantized_unless_asked_for(self, monkeypatch):
        te, model, _ = self.mixed_model(monkeypatch)
        assert [layer.init_context for layer in te.layers] == [None] * 3
        assert not any(isinstance(weight, QuantizedTensor) for weight in model.parameters())

    def test_quantized_weights_on_the_cpu_are_refused(self, te):
        config = config_of(layer_precision=["fp8"] * 3, use_quantized_model_init=True)
        with pytest.raises(RuntimeError, match=r"use_quantized_model_init=True needs.*default device is cpu"):
            NVLlamaModel(config)

    def test_parts_of_a_weight_in_fp8(self, te):
        from llama_te_core.layers.te import fp8_parts

        values = torch.arange(256, dtype=torch.uint8).view(16, 16)
        scale = torch.tensor([0.5])
        found, found_scale = fp8_parts(Float8Tensor(values, scale))
        assert found.dtype == torch.float8_e4m3fn and found.data_ptr() == values.data_ptr()
        assert torch.equal(found_scale, scale)
        assert fp8_parts(Float8Tensor(values, scale, DType.kFloat8E5M2)) is None
        assert fp8_parts(Float8Tensor(values, torch.ones(16))) is None
        assert fp8_parts(QuantizedTensor(torch.ones(2, 2))) is None

    def test_quantized_weights_are_saved_in_an_ordinary_dtype(self, te, tmp_path, monkeypatch):
        monkeypatch.setattr(QuantizedTensor, "dequantize", lambda self: 2 * self.detach().as_subclass(torch.Tensor))
        model = NVLlamaForCausalLM(config_of(layer_precision=["fp8"] * 3))
        model.config.use_quantized_model_init = True
        projection = model.model.layers[1].self_attention.proj
        values = projection.weight.detach().clone()
        projection.weight = torch.nn.Parameter(QuantizedTensor(values / 2, requires_grad=True))
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "model.safetensors")
        assert torch.equal(saved["model.layers.1.self_attention.proj.weight"], values)
        assert torch.equal(saved["model.layers.0.self_attention.proj.weight"], te.layers[0].self_attention.proj.weight)
        assert isinstance(projection.weight, QuantizedTensor)  # the model itself stays as it is

    def test_loaded_weights_are_quantized_on_a_gpu_only(self, te, tmp_path):
        NVLlamaForCausalLM(config_of()).save_pretrained(tmp_path)
        model = NVLlamaForCausalLM.from_pretrained(tmp_path, layer_precision=["fp8"] * 3)
        model.quantize_loaded_weights()  # this configuration does not ask for quantized weights
        model.config.use_quantized_model_init = True
        model.model.layers[0].self_attention.proj.primary_weights_in_fp8 = True
        with pytest.raises(
            RuntimeError, match=r"weight is on cpu, but.*use_quantized_model_init=True.*load the model there"
        ):
            model.quantize_loaded_weights()

    def test_transformers_initialisation_leaves_quantized_weights_alone(self, te):
        """Transformer Engine initialises these weights before it quantizes them."""
        model = NVLlamaModel(config_of())
        weight = torch.nn.Parameter(QuantizedTensor(torch.full((256, 64), 7.0), requires_grad=True))
        for module, name in (
            (model.layers[0].self_attention.layernorm_qkv, "weight"),
            (model.layers[0].self_attention.proj, "weight"),
            (model.layers[0].layernorm_mlp, "fc1_weight"),
        ):
            setattr(module, name, weight)
            model._init_weights(module)
            assert (weight.detach().as_subclass(torch.Tensor) == 7.0).all(), (module, name)

    def test_other_weights_are_initialised(self, te):
        model = NVLlamaModel(config_of(initializer_range=0.03, hidden_size=128))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(9.0)
        for module in model.modules():
            model._init_weights(module)
        for name, parameter in model.named_parameters():
            if "norm" in name.rpartition(".")[2] or name == "norm.weight":
                assert (parameter == 1).all(), name
            else:
                assert 0.025 < parameter.std() < 0.035, name

    def test_gradient_checkpointing_is_transformer_engines(self, te):
        model = NVLlamaForCausalLM(config_of()).train()
        model.gradient_checkpointing_enable()
        ids_BS = torch.ones(1, 5, dtype=torch.long)
        model(ids_BS, labels=ids_BS).loss.backward()
        assert te.events.count(("checkpoint", False)) == 3
        assert all(parameter.grad is not None for parameter in model.parameters())


class TestTransformerEngineLayer:
    def test_constructor_arguments(self, te):
        config = config_of(head_dim=80, attention_dropout=0.25, rms_norm_eps=3e-5, attn_input_format="bshd")
        NVLlamaModel(config)
        assert len(te.layers) == 3
        for number, layer in enumerate(te.layers, start=1):
            arguments = dict(layer.arguments)
            for name in ("init_method", "output_layer_init_method"):
                assert 0.1 < arguments.pop(name)(torch.empty(64, 64)).std() < 0.2
            assert arguments == {
                "hidden_size": 64,
                "ffn_hidden_size": 96,
                "num_attention_heads": 4,
                "num_gqa_groups": 2,
                "kv_channels": 80,
                "layernorm_epsilon": 3e-5,
                "hidden_dropout": 0.0,
                "attention_dropout": 0.25,
                "layer_number": number,
                "attn_input_format": "bshd",
                "self_attn_mask_type": "padding_causal",
                "normalization": "RMSNorm",
                "activation": "swiglu",
                "bias": False,
                "fuse_qkv_params": True,
                "qkv_weight_interleaved": True,
                "params_dtype": torch.float32,
                "device": "cpu",
                "tp_group": None,
                "set_parallel_mode": False,
                "sequence_parallel": False,
            }

    def test_it_knows_the_meta_device_by_name(self, te):
        with torch.device("meta"):
            NVLlamaModel(config_of())
        assert {layer.arguments["device"] for layer in te.layers} == {"meta"}

    def test_dtype_is_the_default_one(self, te, tmp_path):
        NVLlamaModel(config_of()).to(torch.bfloat16).save_pretrained(tmp_path)
        te.layers.clear()
        NVLlamaModel.from_pretrained(tmp_path)
        assert {layer.arguments["params_dtype"] for layer in te.layers} == {torch.bfloat16}

    @pytest.mark.parametrize("rope_type", ["default", "yarn", "longrope"])
    def test_softmax_scale(self, te, rope_type):
        """Yarn and longrope scale queries and keys; both factors are in the softmax scale."""
        parameters = {"rope_type": rope_type, "rope_theta": 1e4}
        if rope_type != "default":
            parameters |= {"factor": 4.0, "original_max_position_embeddings": 16}
        if rope_type == "longrope":
            parameters |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
        model = NVLlamaModel(config_of(rope_parameters=parameters))
        expected = 16**-0.5 * model.rotary_angles._scaling**2
        assert (expected > 16**-0.5) == (rope_type != "default")
        for layer in te.layers:
            assert layer.self_attention.core_attention.softmax_scale == pytest.approx(expected)

    def test_extra_state_stays_out_of_checkpoints(self, te, tmp_path):
        model = NVLlamaForCausalLM(config_of())
        assert te.layers[0].get_extra_state() is not None
        names = set(model.state_dict())
        assert not any("_extra_state" in name for name in names)
        assert names == set(NVLlamaForCausalLM(config_of(layer_implementation="reference")).state_dict())
        assert model.load_state_dict(model.state_dict(), strict=True).missing_keys == []
        with_extra = model.state_dict() | {"model.layers.0._extra_state": b"which TE refuses to load"}
        assert model.load_state_dict(with_extra, strict=True).unexpected_keys == []
        model.save_pretrained(tmp_path)
        loaded, info = NVLlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert loaded.state_dict().keys() == names

    def test_a_checkpoint_fits_either_implementation(self, te, tmp_path):
        model = NVLlamaForCausalLM(config_of()).eval()
        model.save_pretrained(tmp_path)
        loaded = NVLlamaForCausalLM.from_pretrained(tmp_path, layer_implementation="reference")
        ids_BS = torch.arange(3, 13).view(2, 5)
        torch.testing.assert_close(loaded(ids_BS).logits, model(ids_BS).logits)

    @pytest.mark.parametrize("format", ["thd", "bshd"])
    def test_forward_arguments(self, te, format):
        model = NVLlamaModel(config_of(attn_input_format=format))
        model(torch.ones(2, 5, dtype=torch.long), attention_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]))
        (call,) = te.layers[0].calls
        assert call["cu_seqlens_q"].tolist() == [0, 5, 7]
        assert call["cu_seqlens_q"].dtype == torch.int32
        assert call["cu_seqlens_kv"] is call["cu_seqlens_q"]
        assert call["max_seqlen_q"] == call["max_seqlen_kv"] == 5
        assert call["self_attn_mask_type"] == "padding_causal"
        assert call["rotary_pos_emb"].shape[1:] == (1, 1, 16)
        assert call["rotary_pos_emb"].dtype == torch.float32
        assert call["attention_mask"] is None
        assert call["inference_params"] is None
        assert call["pad_between_seqs"] is (False if format == "thd" else None)

    def test_forward_arguments_with_padding_between_sequences(self, te):
        model = NVLlamaModel(config_of())
        real, padded = torch.tensor([0, 3, 4], dtype=torch.int32), torch.tensor([0, 4, 8], dtype=torch.int32)
        model(torch.ones(1, 8, dtype=torch.long), cu_seq_lens_q=real, cu_seq_lens_q_padded=padded, max_length_q=4)
        (call,) = te.layers[0].calls
        assert call["cu_seqlens_q"].tolist() == call["cu_seqlens_kv"].tolist() == [0, 3, 4]
        assert call["cu_seqlens_q_padded"].tolist() == call["cu_seqlens_kv_padded"].tolist() == [0, 4, 8]
        assert call["pad_between_seqs"] is True
