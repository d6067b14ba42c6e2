"""Transformer Engine layers split over tensor ranks give the same results as whole layers.

The tests start processes once for each number of processes (`te_tensor_parallel_cases`), and check the findings. On
CPUs the tests cover the arguments to Transformer Engine, and our use of its results.
"""

import pytest

from distributed import te_tensor_parallel_cases
from distributed.processes import Processes
from distributed.te_tensor_parallel_cases import CASES, FP8_CASES, SIZES, TOKENS, Case
from llama_te_core.layers.reference import CACHE_OF_SPLIT_MODEL

# On a CPU sums are in another order. Measured in float64: 6e-16 and 4e-15.
TOLERANCE = 1e-12
# On a GPU the precision decides: the distance of split layers from the truth may be this multiple of the distance of
# whole layers, since each rank scales and rounds its own part.
FURTHER = 1.5


class CaseProcesses(Processes):
    """Processes with access to the findings of one case."""

    def found(self, case: Case) -> list[dict]:
        """Return each process's findings for a case."""
        every = self.of(case.world_size)
        for findings in every:
            assert str(case) in findings, findings.get("stopped by")
        return [findings[str(case)] for findings in every]


@pytest.fixture(scope="module")
def processes(tmp_path_factory, device):
    return CaseProcesses(te_tensor_parallel_cases.run, device, tmp_path_factory.mktemp("processes"))


def marked(cases, **options):
    return [pytest.param(case, id=str(case), marks=pytest.mark.processes(case.world_size, **options)) for case in cases]


ALL = marked(CASES) + marked(FP8_CASES, device="cuda")


@pytest.mark.parametrize("case", marked(CASES, device="cpu"))
def test_losses_and_gradients_are_those_of_whole_layers(processes, case):
    for found in processes.found(case):
        alone, mesh = found["alone"], found["mesh"]
        assert mesh["loss"] == pytest.approx(alone["loss"], rel=TOLERANCE if case.loss_alone else 1e-6)  # or float32
        assert mesh["gradients"].keys() == alone["gradients"].keys()
        errors = {name: distance(mesh, alone, name) for name in alone["gradients"]}
        assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}


@pytest.mark.parametrize("case", marked(CASES, device="cuda") + marked(FP8_CASES, device="cuda"))
def test_losses_and_gradients_are_as_precise_as_those_of_whole_layers(processes, measured, case):
    for rank, found in enumerate(processes.found(case)):
        truth, alone, mesh = found["truth"], found["alone"], found["mesh"]
        off = abs(alone["loss"] - truth["loss"])
        measured(f"loss, rank {rank}", abs(mesh["loss"] - truth["loss"]), FURTHER * off + 0.01)
        assert mesh["gradients"].keys() == alone["gradients"].keys()
        ratios = {
            name: distance(mesh, truth, name) / max(distance(alone, truth, name), 1e-3) for name in truth["gradients"]
        }
        worst = max(ratios, key=lambda name: ratios[name])
        measured(f"{worst}: distance from the truth over that of whole layers, rank {rank}", ratios[worst], FURTHER)


def distance(results: dict, others: dict, name: str) -> float:
    """Return the distance of one gradient from another, relative to the other's norm."""
    gradient, expected = results["gradients"][name], others["gradients"][name]
    assert gradient.shape == expected.shape
    return float((gradient - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", ALL)
def test_the_state_dict_is_that_of_the_whole_model(processes, case):
    weights = processes.found(case)[0]["weights"]
    assert len(weights) == 3 + 6 * SIZES["num_hidden_layers"]
    assert all(weights.values()), weights


@pytest.mark.parametrize("case", ALL)
def test_each_rank_has_its_part_of_the_tokens_between_the_layers(processes, case):
    expected = {"packed": [TOKENS // 2], "padded": None}[case.batch]
    if case.format == "bshd":
        expected = [3, 29]
    for found in processes.found(case):
        seen = [layer["tokens"] for layer in found["layers"]]
        if expected is None:  # the model packs the batch and pads it
            tokens = 29 + 14 + 6
            assert all(len(each) == 1 and tokens / 2 <= each[0] < tokens for each in seen)
        else:
            assert seen == [expected] * len(seen)


@pytest.mark.parametrize("case", marked([case for case in CASES if case.shard == 1]))
def test_each_rank_has_its_part_of_the_weights(processes, case):
    hidden, features = SIZES["hidden_size"], SIZES["intermediate_size"] // 2
    heads, groups = SIZES["num_attention_heads"] // 2, SIZES["num_key_value_heads"] // 2
    for found in processes.found(case):
        for layer in found["layers"]:
            assert layer["local"] == {
                "self_attention.layernorm_qkv.layer_norm_weight": [hidden],
                "self_attention.layernorm_qkv.weight": [(heads + 2 * groups) * SIZES["head_dim"], hidden],
                "self_attention.proj.weight": [hidden, heads * SIZES["head_dim"]],
                "layernorm_mlp.layer_norm_weight": [hidden],
                "layernorm_mlp.fc1_weight": [2 * features, hidden],
                "layernorm_mlp.fc2_weight": [hidden, features],
            }


@pytest.mark.parametrize("case", marked(CASES, device="cpu"))
def test_layers_are_built_for_their_group(processes, case):
    for rank, found in enumerate(processes.found(case)):
        group = [rank - rank % 2, rank - rank % 2 + 1]
        expected = {"set_parallel_mode": True, "sequence_parallel": case.format == "thd", "device": "meta"}
        assert found["built"] == [{**expected, "ranks": group}] * SIZES["num_hidden_layers"]


@pytest.mark.processes(2)
def test_what_split_layers_cannot_do_is_refused(processes):
    for findings in processes.of(2):
        assert "refusals" in findings, findings.get("stopped by")
        heard = findings["refusals"]
        assert heard["quantized"].startswith("tensor=2 with use_quantized_model_init=True")
        assert heard["cache"] == CACHE_OF_SPLIT_MODEL
        assert heard["tokens"].startswith(
            "5 tokens in this forward pass, but layers on 2 tensor ranks take multiples of 2: pad to 6 "
            "(DataCollatorWithFlattening(pad_to_multiple_of=2))"
        )
