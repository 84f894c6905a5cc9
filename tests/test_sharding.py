"""Many devices compute what one does, hold only their share, and send what was meant to be sent.

What needs 8 devices runs in programs of its own, tests/sharding_on_eight.py, each of a few meshes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from lora_jax import LoraConfig, SFTConfig, get_peft_model
from lora_jax.kernels import parallel
from lora_jax.models.registry import config_from_hf
from lora_jax.sharding import check, make_mesh, parameter_specs
from lora_jax.step import make_train_step
from lora_jax.tools.collectives import Collective, collectives, wire_bytes
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
# Float32 sums in another order. Gradients pass through two layers of random weights and a softmax.
TOLERANCE = 1e-5


def on_eight(section: str, where: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-W", "error", "-m", "tests.sharding_on_eight", section, str(where)]
    # No programs from the compilation cache: on CPUs the devices of one that was read back can run its collectives in
    # different orders, and wait for each other for ever.
    alone = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "PYTHONPATH": str(ROOT)}
    environment = {**os.environ, **alone}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def assert_equal_to_one_device(result: dict[str, Any]) -> None:
    for what in ("loss", "gradients", "adapters"):
        assert result[what] < TOLERANCE, (what, result)


# ---- equal to one device, the memory of a share, the collectives that were meant -----------------------------------

TOKENS, WIDTH, LAYERS, VOCAB = 8 * 64, 576, 2, 320
# Of a layer's seven weights: (output features, input features), and which of them "tensor" divides by the output.
WEIGHTS = [(128, 576), (64, 576), (64, 576), (576, 128), (128, 576), (128, 576), (576, 128)]
PACKED = sum(n * k // 2 + n * k // 64 for n, k in WEIGHTS)  # bytes of a layer: codes, and codes of scales
# Forward and backward, codes and scales of every weight of a layer; on a GPU the compiler makes one of a layer's.
GATHERS = 2 * LAYERS * 2 * len(WEIGHTS)


def of_weights(found: list[list]) -> list[list]:
    """The gathers of packed bytes."""
    return [one for one in found if one[1] == "u8"]


def kinds(found: list[list]) -> set[tuple[str, str, int]]:
    return {(kind, dtype, devices) for kind, dtype, devices, *_ in found}


@pytest.mark.rotate
@pytest.mark.parametrize("axis", ["fsdp", "tensor", "context"])
def test_every_kind_of_mesh_is_equal_to_one_device_over_twenty_steps(tmp_path, axis):
    check_meshes(on_eight(axis, tmp_path))


def check_meshes(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert_equal_to_one_device(result)
        mesh, found = result["mesh"], result["collectives"]
        shares = mesh.get("fsdp", 1) * mesh.get("tensor", 1)
        # Norms, second-level scales and their tables are on every device; of a real model they are 1 % (see below).
        assert result["weights"] / shares <= result["weights_here"] <= 1.1 * result["weights"] / shares
        # Adapters twice, for momentum, and the batch beside the weights: nothing else comes in.
        batch = 4 * 4 * TOKENS // np.prod([n for axis, n in mesh.items() if axis not in ("tensor",)])
        assert abs(result["arguments"] / (result["weights_here"] + 2 * result["adapters_here"] + batch) - 1) < 0.05
        assert result["planned"]["weights"] == result["weights_here"]
        # Of the losses' counts it knows nothing, nor of a few numbers of each token and row that are added up.
        assert result["planned"]["received"] == pytest.approx(result["received"], rel=0.002)
        tensor = mesh.get("tensor", 1)
        if "fsdp" in mesh:
            assert of_weights(found) == [["all-gather", "u8", mesh["fsdp"], GATHERS, 2 * LAYERS * PACKED // tensor]]
        else:
            assert not of_weights(found)
        rows = [("all-reduce", "s32", 8 // tensor), ("all-reduce", "f32", 8)]  # numbers of labels; gradients and loss
        if "fsdp" in mesh:  # tokens to the vocabulary, and their gradients back; embeddings back
            rows += [("all-gather", kind, mesh["fsdp"]) for kind in ("f32", "s32", "u8")]
            rows += [("reduce-scatter", "f32", mesh["fsdp"]), ("all-reduce", "f32", mesh["fsdp"])]
        if tensor > 1:  # two sums a layer forward and two backward; the vocabulary's
            rows += [("all-reduce", "f32", tensor)]
        if "context" in mesh:  # q, k, v, out and their gradients; where documents start; the next device's first label
            rows += [("all-to-all", "f32", 4), ("all-gather", "s32", 4), ("collective-permute", "s32", 2)]
            assert ["all-to-all", "f32", 4, 12 * LAYERS] in [one[:4] for one in found]
        assert kinds(found) <= set(rows)
        assert max(count for kind, dtype, _, count, _ in found if dtype != "u8" and kind != "all-to-all") < 20


def check_equal(results: list[dict[str, Any]]) -> None:
    for result in results:
        if "expert" in result.get("mesh", ""):  # and of the sums that balance the load
            assert result["planned"]["weights"] == result["weights_here"]
            assert result["planned"]["received"] == pytest.approx(result["received"], rel=0.01)
        if result.get("how") == "evaluation":
            assert result["loss"] < TOLERANCE
            continue
        assert_equal_to_one_device(result)
        if result.get("how") == "adapters shared out":
            total, here = result["bytes"]
            assert here < 0.4 * total  # "fsdp" is 4; matrices with an odd side are shared out by their other one


def check_resumed(results: list[dict[str, Any]]) -> None:
    for result in results:
        (got, want), (eval_got, eval_want) = result["losses"], result["evaluation"]
        assert len(got) == len(want) == 6
        np.testing.assert_allclose(got, want, rtol=TOLERANCE)
        assert abs(eval_got / eval_want - 1) < TOLERANCE
        assert result["adapters"] < 1e-4  # Adam divides small gradients by their size


def check_real(results: list[dict[str, Any]]) -> None:
    (result,) = results
    assert result["loss"] < TOLERANCE
    assert result["weights_here"] == pytest.approx(result["weights"] / 4, rel=0.05)


def check_loaded(results: list[dict[str, Any]]) -> None:
    assert len(results) == 6
    for result in results:
        assert result["same"] == result["leaves"] > 10, result
        assert result["here"] < 0.8 * result["weights"]


CHECKS = {
    "rows": check_meshes,  # meshes of rows alone
    "biases": check_equal,  # Qwen 2, on three axes at once
    "mixture": check_equal,  # experts shared out, with the loss of their load
    "vocabulary": check_equal,  # an adapter on the head, a trained embedding table
    "padded": check_equal,  # and other settings of a step; evaluation
    "resume": check_resumed,  # a run goes on on another mesh
    "real": check_real,  # SmolLM2
    "loading": check_loaded,  # mixtures and FP8, straight into their shares
}


@pytest.mark.turns("sharding")
@pytest.mark.rotate
@pytest.mark.parametrize("section", CHECKS)
def test_models_settings_and_runs_are_equal_to_one_device(section, tmp_path, request):
    where = request.getfixturevalue("smollm2") if section == "real" else tmp_path
    CHECKS[section](on_eight(section, where))


@pytest.mark.turns("sharding")
def test_a_step_sends_a_quarter_of_the_bytes_and_keeps_nothing_whole(tmp_path):
    two, four, wide, two_written_out, four_written_out = on_eight("large", tmp_path)
    layer = sum(n * k // 2 + n * k // 64 for n, k in LLAMA)
    assert four["dtypes"] == ["u8"] and four["weights"] == pytest.approx(2 * 4 * layer * 7 / 8, rel=1e-6)
    # The same step with weights of 16 bits. The CPU's compiler sends bfloat16 as float32, so the rest, which is the
    # same in both, is counted double.
    sixteen_bits = wide["weights"] // 2 if wide["dtypes"] == ["f32"] else wide["weights"]
    assert sixteen_bits == pytest.approx(2 * 4 * 2 * sum(n * k for n, k in LLAMA) * 7 / 8, rel=1e-6)
    assert four["weights"] + four["others"] <= 0.30 * (sixteen_bits + wide["others"])
    # Two more layers take the room of their inputs: nothing that was gathered is kept.
    assert four["temp"] - two["temp"] < layer / 4
    assert four_written_out["temp"] - two_written_out["temp"] < layer / 4
    assert not four["whole"] and not four["logits"]


LLAMA = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]


# ---- without a mesh, and what is refused ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny.write_random(tmp_path_factory.mktemp("sharding") / "model", tiny.config())
    return get_peft_model(tiny.open_model(folder, "nf4-double"), r=4, verbose=False)


def lowered(model) -> str:
    optimizer = optax.sgd(1.0)
    _, lora, frozen = model.split()
    ids = np.zeros((1, 4, 16), np.int32)
    batch = {"input_ids": ids, "labels": ids}
    return make_train_step(model, optimizer).lower(lora, optimizer.init(lora), frozen, batch).as_text()


@pytest.mark.turns("whole steps compiled for GPUs")
@pytest.mark.rotate
@pytest.mark.parametrize("remat", ["selective", "none", "offload"])
def test_weights_of_a_layer_travel_in_one_gather_while_the_layer_before_is_at_work(compile_for_gpus, remat):
    """Compiled for four H100s: gathered into place, neither laid together before nor cut apart afterwards."""
    (result,) = compile_for_gpus("sharding_for_gpu.py", remat)
    layers, arrays = result["layers"], 2 * len(WEIGHTS)
    # Forward, and backward all but the last layer's, which are still there.
    assert [gather["arrays"] for gather in result["gathers"]] == [arrays] * (2 * layers - 1)
    # The first has nothing to hide behind. All others begin when the layer before does, and so before its attention.
    assert all(gather["attention_beside"] and gather["matmuls_beside"] >= 4 for gather in result["gathers"][1:]), result
    assert not result["copies"], result


def test_one_device_runs_no_collective_code(model):
    assert parallel.size("data") == 1 and parallel.sharing(*parallel.AXES) == ()
    text = lowered(model)
    assert not any(word in text for word in ("all_gather", "all_reduce", "collective", "sdy.", "sharding"))


def test_mesh_sizes():
    devices = len(jax.devices())
    assert dict(make_mesh("auto").shape) == dict.fromkeys(parallel.AXES, 1) | {"fsdp": devices}
    assert make_mesh({"data": 2, "fsdp": -1}).shape["fsdp"] == devices // 2
    one = jax.make_mesh((devices,), ("tensor",))
    assert make_mesh(one).shape["tensor"] == devices
    for sizes, message in [
        ({"data": 3}, "has places for 3 devices, and there are"),
        ({"rows": 2}, "rows is no axis; the axes are data, fsdp, expert, context, tensor"),
        ({"data": 0}, "whole numbers of at least 1"),
        ({"data": -1, "fsdp": -1}, "one may be -1"),
        ("all", 'neither "auto" nor sizes'),
    ]:
        with pytest.raises(ValueError, match=message):
            make_mesh(sizes)


def test_a_model_that_a_mesh_does_not_divide_says_so(model):
    mesh = make_mesh({"tensor": len(jax.devices())})
    with pytest.raises(ValueError, match="2 key/value heads cannot be shared out evenly over 4 devices"):
        model.shard(mesh)
    assert model.mesh is None
    with pytest.raises(ValueError, match="it has no experts to share out"):
        model.shard({"expert": 2, "data": -1})
    with pytest.raises(ValueError, match="cut within a block of 64 weights"):
        model.shard({"tensor": 2, "data": -1})  # o_proj has 64 inputs
    phi = tiny.config(architectures=["Phi3ForCausalLM"], model_type="phi3", pad_token_id=0)
    with pytest.raises(NotImplementedError, match="q, k and v are one matrix"):
        check(config_from_hf(phi), make_mesh({"tensor": 2, "data": -1}))


def test_batches_that_a_mesh_does_not_divide(tmp_path):
    folder = tiny.write_random(tmp_path / "model", tiny.config())
    model = get_peft_model(tiny.open_model(folder, "nf4-double"), r=4, verbose=False).shard({"data": 2, "fsdp": 2})
    step = make_train_step(model, optax.sgd(1.0))
    _, lora, frozen = model.split()
    ids = np.zeros((1, 6, 16), np.int32)
    with pytest.raises(ValueError, match=r"6 rows cannot be shared out evenly over 4 devices"):
        step(lora, optax.sgd(1.0).init(lora), frozen, {"input_ids": ids, "labels": ids})


def test_the_setting_is_checked():
    assert SFTConfig(mesh={"fsdp": 4}).mesh == {"fsdp": 4}
    with pytest.raises(TypeError, match="mesh=8 is of type int"):
        SFTConfig(mesh=8)


def test_places_of_parameters(tmp_path):
    """The rule table, written out for one weight of each kind."""
    folder = tiny.write_random(tmp_path / "model", tiny.config(hidden_size=128))
    model = get_peft_model(tiny.open_model(folder, "nf4-double"), LoraConfig(r=4), verbose=False)
    mesh = make_mesh({"tensor": 2, "fsdp": 2})
    lora, frozen = (parameter_specs(state, mesh) for state in model.split()[1:])
    layer, trained = frozen["layers"][0], lora["layers"][0]
    P = jax.sharding.PartitionSpec
    up, down = layer["mlp"]["up_proj"]["weight"].get_value(), layer["mlp"]["down_proj"]["weight"].get_value()
    assert up.packed == up.absmax == P(None, ("tensor", "fsdp"), None)
    assert down.packed == down.absmax == P(None, "fsdp", "tensor")
    assert up.nested_absmax == P(None, None)
    assert frozen["embed_tokens"]["weight"].get_value() == P(("tensor", "fsdp"), None)
    assert trained["mlp"]["up_proj"]["lora_a"].get_value() == P(None, None, None)
    assert trained["mlp"]["up_proj"]["lora_b"].get_value() == P(None, None, "tensor")
    assert trained["mlp"]["down_proj"]["lora_a"].get_value() == P(None, "tensor", None)


def test_collectives_are_counted_from_the_program():
    program = """
%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}
%body (p: (s32[], u8[8,4])) -> (s32[], u8[8,4]) {
  %g = u8[8,4]{1,0} all-gather(%slice), channel_id=1, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}
}
ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[], u8[8,4]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %r = (f32[4]{0}, f32[]) all-reduce(%a, %b), replica_groups=[1,8]<=[8], to_apply=%add
}
"""
    found = collectives(program)
    assert found == [Collective("all-gather", "u8", 32, 4, 3), Collective("all-reduce", "f32", 20, 8, 1)]
    assert wire_bytes(found) == 3 * 32 * 3 // 4 + 2 * 20 * 7 // 8
    with pytest.raises(ValueError, match="does not say how often"):
        collectives(program.replace("known_trip_count", "unknown"))
