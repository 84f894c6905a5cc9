"""Checkpoints: complete or absent whatever happens, exact, and clear about what does not fit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax.checkpoint import (
    Checkpointer,
    CheckpointError,
    find_damage,
    latest_checkpoint,
    list_checkpoints,
    read_state,
    restore,
)


def _state(seed: int, rank: int = 4) -> tuple[Any, Any]:
    """A LoRA-like tree of two dtypes and the state of an optimizer that has made one step on it."""
    rng = np.random.default_rng(seed)
    lora = {
        "layers": [
            {
                "lora_a": jnp.asarray(rng.normal(size=(2, 8, rank)), jnp.float32),
                "lora_b": jnp.asarray(rng.normal(size=(2, rank, 8)), jnp.float32),
            }
        ],
        "head": jnp.asarray(rng.normal(size=(8,)), jnp.bfloat16),
    }
    optimizer = optax.adam(1e-3)
    updates, opt_state = optimizer.update(jax.tree.map(jnp.ones_like, lora), optimizer.init(lora), lora)
    return optax.apply_updates(lora, updates), opt_state


def _assert_equal(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path):
    lora, opt_state = _state(0)
    checkpointer = Checkpointer(tmp_path)
    path = checkpointer.save(7, lora, opt_state, {"step": 7, "log_history": [{"loss": 0.1}]}, wait=True)
    assert path == tmp_path.resolve() / "checkpoint-7" == latest_checkpoint(tmp_path.resolve())
    got = restore(path, *_state(1))  # only structure and shapes of what is passed count
    _assert_equal(got.lora, lora)
    _assert_equal(got.opt_state, opt_state)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(got.lora))
    assert got.state == read_state(path) == {"step": 7, "log_history": [{"loss": 0.1}]}


def test_saved_values_are_those_at_the_call_though_buffers_are_donated(tmp_path: Path):
    lora, opt_state = _state(0)
    before = jax.tree.map(np.array, lora)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 + 5, tree), donate_argnums=0)
    checkpointer = Checkpointer(tmp_path)
    path = checkpointer.save(1, lora, opt_state, {})
    jax.block_until_ready(overwrite(lora))
    checkpointer.wait()
    _assert_equal(jax.tree.map(np.array, restore(path, *_state(1)).lora), before)


def test_sharded_arrays_come_back_with_their_sharding(tmp_path: Path):
    devices = jax.devices()
    mesh = jax.make_mesh((len(devices),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    lora = {"w": jax.device_put(jnp.arange(8.0 * len(devices)), sharding)}
    checkpointer = Checkpointer(tmp_path)
    path = checkpointer.save(1, lora, {}, {}, wait=True)
    got = restore(path, jax.tree.map(jnp.zeros_like, lora), {}).lora["w"]
    assert got.sharding.is_equivalent_to(sharding, 1)
    np.testing.assert_array_equal(got, lora["w"])


def test_the_newest_n_are_kept(tmp_path: Path):
    checkpointer = Checkpointer(tmp_path, keep=2)
    for step in (2, 9, 10, 11):  # 9 before 10: by number, not by name
        checkpointer.save(step, *_state(step), {})
    checkpointer.wait()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-11"]


@pytest.mark.parametrize("again", [False, True])
def test_killed_while_one_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool):
    """A checkpoint that makes room, or is saved again, is never there by half, and the next run clears what is left."""
    checkpointer = Checkpointer(tmp_path, keep=2)
    for step in (1, 2):
        checkpointer.save(step, *_state(step), {})
    checkpointer.wait()

    class Killed(BaseException):
        pass

    def half(path: Path, **_: object) -> None:
        if path.exists():
            next(p for p in path.rglob("*") if p.is_file()).unlink()
            raise Killed

    last = 2 if again else 3
    with monkeypatch.context() as patch:
        patch.setattr("lora_jax.checkpoint.shutil.rmtree", half)
        checkpointer.save(last, *_state(3), {})
        assert checkpointer._thread is not None
        checkpointer._thread.join()
    assert isinstance(checkpointer._error, Killed)
    found = list_checkpoints(tmp_path)
    assert [p.name for p in found] == (["checkpoint-1", "checkpoint-2"] if again else ["checkpoint-2", "checkpoint-3"])
    assert [find_damage(p) for p in found] == [None, None]
    lora, opt_state = _state(3)
    _assert_equal(restore(found[-1], lora, opt_state).lora, lora)
    Checkpointer(tmp_path)  # the next run clears what was left
    assert sorted(tmp_path.iterdir()) == found


def test_saving_a_step_again_replaces_it(tmp_path: Path):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(3, *_state(0), {})
    lora, opt_state = _state(1)
    path = checkpointer.save(3, lora, opt_state, {}, wait=True)
    _assert_equal(restore(path, lora, opt_state).lora, lora)


def test_extra_files_belong_to_the_checkpoint(tmp_path: Path):
    checkpointer = Checkpointer(tmp_path)

    def write_extra(folder: Path) -> None:
        (folder / "adapter_config.json").write_text("{}")

    path = checkpointer.save(1, *_state(0), {}, write_extra=write_extra, wait=True)
    assert (path / "adapter_config.json").read_text() == "{}"
    (path / "adapter_config.json").write_text("[]")
    assert "adapter_config.json has other content" in (find_damage(path) or "")


def _truncate(path: Path) -> None:
    victim = max((p for p in (path / "arrays").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(victim, victim.stat().st_size // 2)


def _flip_a_bit(path: Path) -> None:
    victim = max((p for p in (path / "arrays").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)


def _delete_a_file(path: Path) -> None:
    next(p for p in sorted((path / "arrays").rglob("*")) if p.is_file()).unlink()


def _delete_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def _garble_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('["not a manifest"')


@pytest.mark.parametrize("damage", [_truncate, _flip_a_bit, _delete_a_file, _delete_manifest, _garble_manifest])
def test_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path: Path, capsys: pytest.CaptureFixture, damage):
    checkpointer = Checkpointer(tmp_path)
    good = checkpointer.save(1, *_state(1), {}, wait=True)
    bad = checkpointer.save(2, *_state(2), {}, wait=True)
    damage(bad)
    assert latest_checkpoint(tmp_path) == tmp_path / good.name
    assert "checkpoint-2 is damaged" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="checkpoint-2 is damaged.*newest intact one"):
        restore(bad, *_state(0))
    damage(good)
    assert latest_checkpoint(tmp_path) is None


def test_nothing_there_is_said(tmp_path: Path):
    assert latest_checkpoint(tmp_path / "absent") is None
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        restore(tmp_path / "checkpoint-1", *_state(0))


def test_checkpoint_of_another_adapter_is_refused(tmp_path: Path):
    path = Checkpointer(tmp_path).save(1, *_state(0), {}, wait=True)
    with pytest.raises(CheckpointError, match=r"another model, adapter or optimizer: .*\[2, 8, 4\].*\[2, 8, 16\] here"):
        restore(path, *_state(0, rank=16))
    lora, opt_state = _state(0)
    lora["layers"].append(lora["layers"][0])
    with pytest.raises(CheckpointError, match="is not in the checkpoint"):
        restore(path, lora, opt_state)
    del lora["layers"]
    with pytest.raises(CheckpointError, match="is only in the checkpoint"):
        restore(path, lora, opt_state)


def test_output_dir_that_cannot_be_written_is_said_at_once(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Cannot write to output_dir .*file.*Choose an output_dir"):
        Checkpointer(tmp_path / "file")


_FILE_LIMIT = """
import resource, signal, sys
import numpy as np
from lora_jax.checkpoint import Checkpointer, CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
out = Checkpointer(sys.argv[1])
noise = np.random.default_rng(0).normal(size=200_000).astype(np.float32)  # 800 kB that do not compress
out.save(1, {"w": noise}, {}, {"step": 1}, wait=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
try:
    out.save(2, {"w": noise}, {}, {"step": 2}, wait=True)
except CheckpointError as error:
    print(error)
"""


def test_failed_write_is_explained_and_older_checkpoints_stay(tmp_path: Path):
    # A limit on file size fails the write system call in the middle of the file, as a full disk does.
    done = subprocess.run([sys.executable, "-c", _FILE_LIMIT, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Could not save checkpoint-2" in done.stdout and "Complete checkpoints there: checkpoint-1" in done.stdout
    assert "File too large" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1"]
    assert find_damage(tmp_path / "checkpoint-1") is None


def test_error_in_the_background_is_raised_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, *_state(0), {}, wait=True)

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lora_jax.checkpoint._write_manifest", full)
        checkpointer.save(2, *_state(0), {})
        with pytest.raises(CheckpointError, match="No space left on device.*MiB are free.*checkpoint-1"):
            checkpointer.save(3, *_state(0), {})
    checkpointer.save(4, *_state(0), {}, wait=True)  # reported once; space may be there again
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-4"]


_SAVE_FOREVER = """
import sys
import numpy as np
from lora_jax.checkpoint import Checkpointer
out = Checkpointer(sys.argv[1], keep=2)
w = np.random.default_rng(0).normal(size=1_500_000).astype(np.float32)
for step in range(1, 10_000):
    out.save(step, {"w": w + np.float32(step)}, {}, {"step": step})
    print(step, flush=True)
"""


def test_killed_in_the_middle_of_a_save(tmp_path: Path):
    """SIGKILL at several moments: there is always an intact newest checkpoint, and its content is right."""
    w = np.random.default_rng(0).normal(size=1_500_000).astype(np.float32)
    interrupted = 0
    for delay in (0.0, 0.02, 0.05, 0.09):
        process = subprocess.Popen([sys.executable, "-c", _SAVE_FOREVER, tmp_path], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 4:  # 3 is complete and 4 is being written
                break
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        interrupted += any(p.name.startswith(".") for p in tmp_path.iterdir())

        latest = latest_checkpoint(tmp_path)
        assert latest is not None and find_damage(latest) is None
        # None is damaged, though older ones were deleted and, from the second time on, saved again.
        assert not any(find_damage(p) for p in list_checkpoints(tmp_path))
        step = json.loads((latest / "trainer_state.json").read_text())["step"]
        assert latest.name == f"checkpoint-{step}" and step >= 3
        got = restore(latest, {"w": w}, {})
        np.testing.assert_array_equal(got.lora["w"], w + np.float32(step))
        Checkpointer(tmp_path)  # the next run clears what was left
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert interrupted, "no kill hit a save in progress; the delays test nothing"
