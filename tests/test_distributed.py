"""Several processes on this machine train as one does, read and write their share, agree, and end together.

What they run is tests/one_of_several.py.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax import LoraConfig, cli
from lora_jax.distributed import HEARTBEAT, Launch, _local_devices, _settle, detect, gather, initialize, together
from lora_jax.fused_experts import parts_of
from lora_jax.models.decoder import Decoder
from lora_jax.models.registry import config_from_hf
from lora_jax.plan import of_config
from lora_jax.scaling import NVLINK, PCIE, gpus_of, plan_meshes, step_seconds
from lora_jax.sharding import make_mesh
from lora_jax.tools.bench_step import hf_config
from lora_jax.tools.simulate_scaling import MODELS
from tests import one_of_several, tiny
from tests.sharding_on_eight import MIXTRAL
from tests.test_fp8 import QWEN, load_bytes, write_fp8

ROOT = Path(__file__).resolve().parents[1]
# Float32 sums in another order, through two layers of random weights; adapters come from 8-bit Adam.
TOLERANCE = 1e-5
ALONE = {"mesh": None, "rows": 4}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class Processes:
    """Processes of tests/one_of_several.py, each with some CPU devices."""

    def __init__(self, folder: Path, section: str, count: int, devices: int, launcher: Any = None, **how: Any) -> None:
        address = f"localhost:{free_port()}" if launcher is None else "launcher"
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"  # the last counts
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-W", "error", "-m", "tests.one_of_several", address, str(count)]
        self.began, self.logs = time.monotonic(), [folder / f"{section}-{number}.log" for number in range(count)]
        self.processes = []
        for number, log in enumerate(self.logs):
            more = [str(number), section, str(folder), json.dumps(how)]
            env = environment if launcher is None else environment | launcher(number)
            with log.open("w") as file:
                started = subprocess.Popen([*command, *more], env=env, stdout=file, stderr=subprocess.STDOUT)
            self.processes.append(started)

    def ended(self, timeout: float = 240) -> list[int]:
        """Exit codes, when all have ended."""
        until = time.monotonic() + timeout
        try:
            return [process.wait(max(0.1, until - time.monotonic())) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def text(self, number: int) -> str:
        return self.logs[number].read_text()

    def reports(self, number: int) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text(number).splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("distributed")
    tiny.write_random(where / "model", tiny.config(hidden_size=128))
    return where


@pytest.fixture(scope="module")
def alone(folder) -> Any:
    """The run on one device of this process."""
    return one_of_several.train(folder, out="alone", **ALONE)


@pytest.fixture(scope="module")
def two(folder) -> Processes:
    """Two processes with two devices each: agreements and refusals, then the run."""
    run = Processes(folder, "both", 2, 2, out="two", mesh={"fsdp": 4}, rows=1)
    assert run.ended() == [0, 0], run.text(0)[-3000:]
    return run


def assert_as_alone(folder: Path, out: str, alone: Any) -> None:
    np.testing.assert_allclose(
        one_of_several.losses(folder / out), one_of_several.losses(folder / "alone"), rtol=TOLERANCE
    )
    got, want = (load_file(folder / name / "adapter_model.safetensors") for name in (out, "alone"))
    for name, tensor in want.items():
        # Where a gradient is nearly zero, Adam divides it by its size, and 8 bits round to another step.
        assert np.linalg.norm(got[name] - tensor) < 1e-3 * np.linalg.norm(tensor), name


def test_two_processes_train_as_one(folder, two, alone):
    assert_as_alone(folder, "two", alone)
    for number in (0, 1):
        result = two.reports(number)[-1]
        assert result["steps"] == 4
        assert result["evaluation"] == pytest.approx(alone.evaluate()["eval_loss"], rel=TOLERANCE)
    assert "Trainable parameters" in two.text(0) and "Trainable parameters" not in two.text(1)
    records = (folder / "two" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in records] == [1, 2, 3, 4]
    assert [path.name for path in sorted((folder / "two").glob("checkpoint-*"))] == ["checkpoint-2", "checkpoint-4"]


def test_each_process_reads_its_share_of_the_weights(folder, two):
    stored = (folder / "model" / "model.safetensors").stat().st_size
    for number in (0, 1):
        result = two.reports(number)[0]
        assert stored / 2 < result["read"] < 0.55 * stored  # norms, and the headers of files, twice, are read by all


def test_each_process_tokenises_its_share_of_the_rows(two):
    examples, said = one_of_several.tokenised(one_of_several.ROWS)
    assert len(said) == 1 and "12 tokens" not in said[0] and "were cut" in said[0]
    results = [two.reports(number)[1] for number in (0, 1)]
    assert [result["own"] for result in results] == [list(range(20)), list(range(20, 40))]
    for result in results:
        assert result["examples"] == examples and result["said"] == said
    assert re.match(r"ProcessError: tokenising the data: process 1 could not: .*row 30 .*5 where", results[0]["bad"])
    assert re.match(r"ValueError: row 30 \(the first is 0\): labels\[0\] is 5 where", results[1]["bad"])


def write_gpt_oss(folder: Path) -> Path:
    """As it is published in 16 bits, but float32: experts in one tensor, axes exchanged, gate and up in turn."""
    e, d, f = 8, 128, 192
    hf = tiny.config(
        architectures=["GptOssForCausalLM"],
        model_type="gpt_oss",
        num_local_experts=e,
        num_experts_per_tok=2,
        hidden_size=d,
        intermediate_size=f,
        sliding_window=5,
        rope_scaling=None,
    )
    whole = {"gate_up_proj": (e, d, 2 * f), "gate_up_proj_bias": (e, 2 * f)}
    whole |= {"down_proj": (e, f, d), "down_proj_bias": (e, d)}
    whole = {f"model.layers.{i}.mlp.experts.{name}": shape for i in range(2) for name, shape in whole.items()}
    shapes = {name: slot.shape for name, slot in Decoder(config_from_hf(hf), np.float32).slots().items()}
    parts = parts_of(whole, whole.__getitem__, "GptOssForCausalLM")
    shapes = {name: shape for name, shape in shapes.items() if name not in parts} | whole
    rng = np.random.default_rng(0)
    return tiny.write_folder(
        folder, hf, {name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()}, tokenizer=False
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        ("mixture", {"expert": 4}),
        ("FP8", {"fsdp": 4}),
        ("FP8", {"expert": 4}),
        ("gpt-oss", {"fsdp": 4}),
        ("gpt-oss", {"expert": 4}),
    ],
)
def test_each_process_reads_its_share_of_experts_and_of_fp8(tmp_path, kind, mesh):
    if kind == "FP8":
        model, _ = write_fp8(tmp_path / "model", {**QWEN, "num_experts": 8, "vocab_size": 320})
    elif kind == "gpt-oss":
        model = write_gpt_oss(tmp_path / "model")
    else:
        model = tiny.write_random(tmp_path / "model", MIXTRAL | {"num_local_experts": 8, "hidden_size": 128})
    run = Processes(model, "reading", 2, 2, mesh=mesh)
    assert run.ended() == [0, 0], run.text(0)[-3000:]
    stored = (model / "model.safetensors").stat().st_size
    tensors = load_bytes(model)
    # With "expert" attention and vocabulary are read by all.
    whole = 0.0 if "fsdp" in mesh else sum(tensor.nbytes for name, tensor in tensors.items() if "experts" not in name)
    for number in (0, 1):
        result = run.reports(number)[0]
        want = [
            float(np.sum(np.float32(leaf))) for leaf in jax.tree.leaves(tiny.open_model(model, "nf4-double").split()[2])
        ]
        np.testing.assert_allclose(result["sums"], want, rtol=1e-3)  # in float32, of numbers of both signs
        assert result["read"] < 1.05 * (whole + (stored - whole) / 2), (result["read"], stored, whole)


def test_what_one_process_cannot_do_all_refuse(two):
    messages = [two.reports(number)[0] for number in (0, 1)]
    for number, result in enumerate(messages):
        assert result["gathered"] == [0, 3000]
        assert result["same"] == "no error"
        for name, pattern in {
            "settings": "ValueError: processes disagree about settings: lr is 0.001 in process 0 and 0.002 in 1",
            "folder": f"ValueError: .*only-{number} of process 0 is not that of process 1",
            "mesh": r"ValueError: mesh=\{'data': 3\} has places for 3 devices, and there are 4",
            "meshes": "ValueError: processes disagree about the model: mesh is .*'data': 4.* in process 0 and",
            "heads": "ValueError: .*its 2 key/value heads cannot be shared out evenly over 4 devices",
            "config": "ValueError: processes disagree about SFTConfig: learning_rate is 0.0001 in process 0 and 0.001",
            "data": "ValueError: processes disagree about data: rows is 40 in process 0 and 39 in 1",
        }.items():
            assert re.match(pattern, result[name]), (name, result[name])
    assert messages[1]["failing"] == "ValueError: the file is not there"
    assert messages[0]["failing"] == (
        "ProcessError: reading the data: process 1 could not: ValueError: the file is not there"
    )


def continue_from(folder: Path, out: str) -> None:
    """A copy of the run of two processes as it was after step 2."""
    shutil.copytree(folder / "two", folder / out, ignore=shutil.ignore_patterns("checkpoint-4"))


@pytest.mark.turns("what becomes of a run of two processes")
def test_a_run_goes_on_in_one_process(folder, two, alone):
    continue_from(folder, "resumed")
    one_of_several.train(folder, out="resumed", resume=True, **ALONE)
    assert_as_alone(folder, "resumed", alone)


@pytest.mark.turns("what becomes of a run of two processes")
def test_when_one_process_dies_the_other_says_so(folder, two):
    """On another mesh than the run began on."""
    continue_from(folder, "dying")
    run = Processes(folder, "training", 2, 1, out="dying", mesh={"data": 2}, rows=2, resume=True, act=[3, 1, "die"])
    codes = run.ended()
    assert codes[0] != 0 and codes[1] == -9
    assert "Continuing after step 2" in run.text(0)
    assert "ProcessError: process 0: another process of this run has ended" in run.text(0)
    got, want = one_of_several.losses(folder / "dying"), one_of_several.losses(folder / "two")
    assert len(got) in (2, 3)  # the numbers of a step are read while the next one runs
    np.testing.assert_allclose(got, want[: len(got)], rtol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"fsdp": 4}, {"data": 2, "tensor": 2}, {"context": 2, "fsdp": 2}], ids=str)
def test_four_processes_train_as_one(folder, alone, mesh):
    out, rows = "-".join(mesh), 4 // (mesh.get("data", 1) * mesh.get("fsdp", 1))
    run = Processes(folder, "training", 4, 1, out=out, mesh=mesh, rows=rows)
    assert run.ended() == [0] * 4, run.text(0)[-3000:]
    assert_as_alone(folder, out, alone)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 3])
def test_one_of_four_is_killed_and_the_run_is_continued_by_two(folder, alone, victim):
    out = f"killed-{victim}"
    run = Processes(folder, "training", 4, 1, out=out, mesh={"fsdp": 4}, rows=1, act=[3, victim, "die"])
    codes = run.ended(120)
    assert codes[victim] == -9 and all(code not in (0, None) for code in codes)
    for number in {0, 1, 2, 3} - {victim}:
        assert re.search("another (process of this run has ended|task died)", run.text(number)), run.text(number)
    again = Processes(folder, "training", 2, 1, out=out, mesh={"fsdp": 2}, rows=2, resume=True)
    assert again.ended() == [0, 0], again.text(0)[-3000:]
    assert_as_alone(folder, out, alone)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_waits_elsewhere_is_ended_too(folder, victim):
    run = Processes(folder, "waiting", 2, 1)
    while not all(run.reports(number) for number in (0, 1)):
        assert time.monotonic() - run.began < 60
        time.sleep(0.2)
    run.processes[victim].kill()
    killed = time.monotonic()
    assert all(code != 0 for code in run.ended(90))
    assert time.monotonic() - killed < HEARTBEAT + 15  # seconds
    assert "another task died" in run.text(1 - victim)


@pytest.mark.slow
def test_sigterm_to_one_saves_and_stops_all(folder, alone):
    run = Processes(folder, "training", 2, 1, out="stopped", mesh={"fsdp": 2}, rows=2, act=[1, 1, "term"])
    assert run.ended() == [143, 143]
    assert "Stopped by signal 15 after step 2 of 4; saved as checkpoint-2" in run.text(0)
    one_of_several.train(folder, out="stopped", resume=True, **ALONE)
    assert_as_alone(folder, "stopped", alone)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["Slurm", "Open MPI", "torchrun"])
def test_launchers_variables_are_enough(folder, launcher):
    """As the launchers set them for two processes on this host."""
    port = str(free_port())

    def environment(number: int) -> dict[str, str]:
        slurm = {"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
        slurm |= {"SLURM_JOB_ID": port, "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number), "SLURM_NODEID": "0"}
        mpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": str(number), "PMIX_NAMESPACE": f"job-{port}"}
        mpi |= {"OMPI_COMM_WORLD_LOCAL_RANK": str(number), "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
        torchrun = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": str(number)}
        return {"Slurm": slurm, "Open MPI": mpi, "torchrun": torchrun}[launcher]

    run = Processes(folder, "hello", 2, 1, launcher=environment)
    assert run.ended(90) == [0, 0], run.text(0)
    for number in (0, 1):
        assert run.reports(number) == [{"gathered": [0, 1], "devices": 2}]


@pytest.mark.slow
def test_a_missing_coordinator():
    """Of two processes the one that is there says what it waited for, first as the coordinator."""
    for number, pattern in ((0, "not all processes met at localhost"), (1, "ProcessError.*not all processes met at")):
        script = f"from lora_jax.distributed import *; initialize('localhost:1{number}987', 2, {number}, timeout=3)"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert done.returncode != 0 and re.search(pattern, done.stderr), done.stderr


# ---- without other processes ---------------------------------------------------------------------------------------

SLURM = {"SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "node[07-08]", "SLURM_NTASKS": "3", "SLURM_PROCID": "2"}
SLURM |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2,1"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
TORCHRUN = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "WORLD_SIZE": "4", "RANK": "3"}


def test_launchers():
    assert detect({}) is None
    assert detect({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}) is None  # within sbatch, not srun
    assert detect(SLURM) == Launch("Slurm", None, 3, 2, 0, 1)
    assert detect({**SLURM, "SLURM_NODEID": "0", "SLURM_LOCALID": "1", "SLURM_PROCID": "1"}).local_count == 2
    assert detect({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}).local_count == 8
    assert detect({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}) == Launch("Open MPI", None, 4, 3, 1, 2)
    one_host = detect({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "job-1"})
    assert re.fullmatch(r"localhost:6\d{4}", one_host.coordinator)
    assert detect(TORCHRUN) == Launch("torchrun", "10.0.0.1:29500", 4, 3)
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert detect({**TORCHRUN, **agent}) == Launch("torchrun", "10.0.0.1:29501", 4, 3, 1, 2)
    with pytest.raises(ValueError, match="RANK='third' should be a number"):
        detect({**TORCHRUN, "RANK": "third"})


def test_devices_of_a_process(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _local_devices(Launch("Slurm", None, 4, 3, 1, 2)) == [1]
    assert _local_devices(Launch("Slurm", None, 2, 1, 0, 1)) == []  # one for each host takes all
    assert _local_devices(Launch("the caller", "a:1", 2, 1)) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert _local_devices(Launch("Slurm", None, 4, 3, 1, 2)) == []


def test_arguments_complete_what_the_launcher_says():
    mpi = detect(OPEN_MPI)
    assert _settle(mpi, "node0:1234", None, None).coordinator == "node0:1234"
    assert _settle(None, None, None, None) is None
    assert _settle(None, "a:1", 2, 1) == Launch("the caller", "a:1", 2, 1)
    for given, message in [
        (("a:1", None, None), "missing: num_processes, process_id"),
        ((None, 2, 1), "missing: coordinator"),
        (("a", 2, 1), "wanted HOST:PORT"),
        (("a:1", 2, 2), "process_id=2 of num_processes=2"),
        (("a:1", 0, 0), "ids count from 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            _settle(None, *given)


def test_one_process_is_alone(monkeypatch):
    for name in (*SLURM, *OPEN_MPI, *TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    assert initialize() is False and gather({"a": 1}) == [{"a": 1}]
    with pytest.raises(KeyError), together("nothing"):
        raise KeyError("as it is")


def test_a_mesh_by_text():
    assert make_mesh("data=2,fsdp=-1").shape["fsdp"] == 2
    with pytest.raises(ValueError, match='neither "auto" nor sizes'):
        make_mesh("data=two")


# ---- planning -------------------------------------------------------------------------------------------------------


def planned(model: str, gpus: str, batch: int = 1, length: int = 2048) -> dict[Any, Any]:
    """Plans by (data, fsdp), or (data, fsdp, other axis, its devices)."""
    count, host, card = gpus_of(gpus)
    config = hf_config(MODELS.get(model, MIXTURE))
    plans = plan_meshes(lambda mesh: of_config(config, LoraConfig(), batch, length, mesh=mesh), card, count, host)
    rows = ("data", "fsdp")
    others = [[(axis, n) for axis, n in plan.devices.items() if axis not in rows] for plan in plans]
    return {
        (*(plan.devices.get(axis, 1) for axis in rows), *(word for pair in other for word in pair)): plan
        for plan, other in zip(plans, others, strict=True)
    }


MIXTURE = {**MODELS["8B"], "architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2}
MIXTURE["num_hidden_layers"] = 2


@pytest.mark.turns("plans for several GPUs")
def test_other_axes_where_rows_and_weights_are_not_enough():
    """A row of 131,072 tokens of 8B on eight GPUs of 24 GB; a mixture that no mesh of rows fits."""
    long = planned("8B", "8x24GB", length=131072)
    assert long[1, 8].plan is None and (1, 1, "context", 8) in long
    best = long[1, 1, "context", 8]
    assert best.plan is not None and best.work.tokens == 131072 // 8 and best.tokens == 131072
    # All-to-alls of q, k, v and what attention gives, three times (forward, backward, and made again), 7 of 8 parts.
    a2a = 3 * 32 * (4096 + 1024 + 1024 + 4096) * 2 * 16384 * 7 // 8
    assert best.wire.between == pytest.approx(a2a, rel=1e-4) and best.wire.weights == 0
    # Attention over the whole row by an eighth of the heads, and less to make again than where nothing fits.
    assert 0.08 < best.compute / long[8, 1].compute < 0.13
    tensor = long[1, 4, "tensor", 2]
    assert tensor.work.config.num_heads == 16 and tensor.tokens == 4 * 131072
    sums = 32 * 5 + 2  # of a layer: two forward, two backward, one that is made again; embedding and loss
    assert tensor.wire.between == sums * 131072 * 4096 * 2
    assert not any("expert" in mesh for mesh in long)  # the model has none
    small = planned("mixture", "4x3GB", length=8192)
    assert small[1, 4].plan is None
    mixture = small[1, 2, "expert", 2]
    assert mixture.work.config.moe.num_experts == 4 and mixture.tokens == 4 * 8192
    # Of each of two layers: tokens forward, backward and once more, their sums forward and backward.
    assert mixture.wire.between == 2 * (5 * 8192 * 4096 * 2 + 5 * 4 * 8192 * 2)


@pytest.mark.turns("plans for several GPUs")
def test_models_that_one_gpu_cannot_hold():
    """Bytes of weights: 4.127 bits a weight of the layers, 16 of the two tables, which are shared out as well."""
    for model, gpus, weights in (("34B", "2x24GB", 34.4e9), ("70B", "4x48GB", 70.6e9), ("405B", "8x80GB", 405.9e9)):
        plans = planned(model, gpus)
        whole = plans[1, max(f for _, f in plans)]
        assert whole.plan is not None and whole.memory < 0.92 * gpus_of(gpus)[2].memory
        config = whole.work.config
        tables = 2 * config.vocab_size * config.hidden_size
        wanted = (4.127 / 8 * (weights - tables) + 2 * tables) / whole.devices["fsdp"]
        assert whole.work.weights == pytest.approx(wanted, rel=0.01)  # norms are on every device
        assert whole.wire.weights == pytest.approx(
            2 * (1 - 1 / whole.devices["fsdp"]) * 4.127 / 8 * (weights - tables), rel=0.01
        )
    assert plans[4, 2].plan is None  # 100 GiB of weights on each


@pytest.mark.turns("plans for several GPUs")
def test_estimated_seconds():
    eight = planned("8B", "8xH100", batch=2)
    for plan in eight.values():
        (fast, slow), (fast_pcie, slow_pcie) = (step_seconds(plan, link, 8) for link in (NVLINK, PCIE))
        assert plan.compute <= fast <= slow <= plan.compute + fast and fast_pcie >= fast and slow_pcie > slow
    # What crosses hosts is slower: gradients alone with "fsdp" within each, layers too where it spans both.
    two = planned("8B", "2x8xH100", batch=2)
    assert step_seconds(two[2, 8], NVLINK, 8)[1] - step_seconds(eight[1, 8], NVLINK, 8)[1] < 2e-3
    assert step_seconds(two[1, 16], NVLINK, 8)[1] - step_seconds(two[2, 8], NVLINK, 8)[1] > 10e-3


def test_gpus():
    assert gpus_of("4x48GB")[:2] == (4, 4) and gpus_of("4x48GB")[2].memory == 48 * 2**30
    assert gpus_of("16xH100")[:2] == (16, 8) and gpus_of("2 x 4 x RTX 4090")[:2] == (8, 4)
    for text in ("48GB", "0x24GB", "x24GB"):
        with pytest.raises(ValueError, match="wanted such as 4x48GB"):
            gpus_of(text)


def test_the_command_that_plans(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text(json.dumps(hf_config(MODELS["34B"])))

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["lora-jax", "plan", str(tmp_path), *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0)

    assert run("--gpus", "2x24GB", "--batch", "1") == 0
    assert re.search(r"Over PCIe: --mesh \w+=2, ", capsys.readouterr().out)
    assert run("--gpus", "2x8GB") == 2
    assert "no mesh fits: the one that needs least takes" in capsys.readouterr().err
    assert run() == 2 and "give --gpu CARD for one GPU, or --gpus" in capsys.readouterr().err
