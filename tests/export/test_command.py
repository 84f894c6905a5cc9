"""`lora-jax export`: every target at once, what is wrong is found, and nothing half-made is left."""

import contextlib
import dataclasses
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lora_jax import get_peft_model
from lora_jax.export import command, hub, verify
from lora_jax.export import gguf as gguf_export
from lora_jax.export import hf as hf_export
from lora_jax.export.command import Target, export, parse_targets
from lora_jax.loading import load_tokenizer
from tests import tiny
from tests.export.test_gguf_families import VOCAB, write_model

EVERY = ["peft", "hf", "bnb-4bit", "gguf:f32", "gguf:q8_0", "gguf-lora", "ollama:f16", "ollama-lora:f32"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "model", "LlamaForCausalLM")


@pytest.fixture(scope="module")
def model(base):
    return tiny.randomize_adapter(get_peft_model(tiny.open_model(base, "nf4-double"), r=4, verbose=False))


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


def run(model, tokenizer, names, out, **options):
    return export(model, tokenizer, parse_targets(names), out, verbose=False, **options)


def test_every_target(model, tokenizer, tmp_path, capfd):
    checks = run(model, tokenizer, EVERY, tmp_path / "out")
    assert all(check.passed for check in checks)
    compared = {(check.target, check.what.split(",")[0]) for check in checks}
    whole = [str(t) for t in parse_targets(EVERY)]
    assert {target for target, what in compared if what == "tensors"} == set(whole)
    assert {target for target, what in compared if what == "answers"} == set(whole) - {"peft", "gguf-lora:f32"}
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*") if path.is_file()}
    assert {"peft/adapter_model.safetensors", "hf/model.safetensors", "gguf/model.F32.gguf"} <= files
    assert {"gguf/model.Q8_0.gguf", "gguf-lora/model-lora.F32.gguf", "ollama-lora/model.F32.gguf"} <= files
    assert not any(path.name.startswith(".") for path in (tmp_path / "out").iterdir())
    shown = capfd.readouterr().err
    assert all(target in shown for target in whole) and "nats" in shown and "WRONG" not in shown
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        run(model, tokenizer, ["peft"], tmp_path / "out")
    before = (tmp_path / "out" / "hf" / "model.safetensors").read_bytes()
    run(model, tokenizer, ["peft"], tmp_path / "out", overwrite=True, answers=False)  # leaves other kinds alone
    assert (tmp_path / "out" / "hf" / "model.safetensors").read_bytes() == before


def spoil_weight(folder: Path, **_) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(bytes(data))


def spoil_config(folder: Path, **_) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 50.0}))


def truncate(folder: Path, **_) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_weight, "the export of hf is not the trained model: tensors: 1 of 39 differ: model.layers"),
        (spoil_config, r"the export of hf is not the trained model: answers: [\d.]+ nats \(allowed: 0.05\)"),
        (truncate, "the export of hf is not the trained model: tensors: model.safetensors cannot be read"),
    ],
)
def test_what_is_not_the_model_fails_and_is_removed(spoil, message, model, tokenizer, tmp_path, monkeypatch, capfd):
    save = type(model).save_pretrained_merged

    def save_and_spoil(self, folder, *arguments, **options):
        save(self, folder, *arguments, **options)
        spoil(folder)

    monkeypatch.setattr(type(model), "save_pretrained_merged", save_and_spoil)
    with pytest.raises(ValueError, match=message):
        run(model, tokenizer, ["peft", "hf"], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    assert "WRONG" in capfd.readouterr().err


def test_a_gguf_file_without_the_adapter_is_noticed(model, tokenizer, tmp_path, monkeypatch):
    merged = hf_export.merged_tensors
    monkeypatch.setattr("lora_jax.export.gguf.merged_tensors", lambda *a: merged(*a, with_adapter=False))
    with pytest.raises(
        ValueError, match=r"export of gguf:f32 is not the trained model: answers, llama.cpp: [\d.]+ nats"
    ):
        run(model, tokenizer, ["gguf:f32"], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_what_cannot_be_checked_is_said(model, tokenizer, tmp_path, monkeypatch, capfd):
    def full(*_, **__):
        raise MemoryError("the weights do not fit")

    monkeypatch.setattr("lora_jax.loading.load", full)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    checks = run(model, tokenizer, ["hf", "gguf:f32"], tmp_path / "out")
    assert [check.passed for check in checks] == [True, None, True, None]
    shown = capfd.readouterr().err
    assert "fit beside" in " ".join(shown.split()) and "not checked" in " ".join(shown.split())


def test_distances_of_answers(model, tokenizer):
    trained = verify.answers_of(model, tokenizer)
    assert len(trained.ids) == 5 and trained.log_probs.shape == (5, VOCAB)
    assert trained.distance(trained.log_probs + 3.0) == pytest.approx(0, abs=1e-12)  # whatever the normaliser
    assert trained.unrelated > 0.1
    plain = dataclasses.replace(trained, ids=trained.ids[:1], log_probs=trained.log_probs[:1])
    assert verify.answers_of(model, tokenizer).distance(trained.log_probs) < 1e-9
    assert plain.distance(trained.log_probs[:1]) == pytest.approx(0, abs=1e-12)


# Mistakes, full disks, interruptions.


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["onnx"], "--to onnx is unknown; there are peft, hf, bnb-4bit, gguf-lora:f32.*gguf:q8_0"),
        (["guf:q8_0"], "Did you mean 'gguf'"),
        (["gguf:q4_km"], "Did you mean 'q4_k_m'"),
        (["gguf"], "--to gguf is unknown"),
        (["gguf:q9"], "(?i)q9"),
        (["gguf-lora:q8_0"], "--to gguf-lora:q8_0 is unknown"),
        (["hf:f16"], "--to hf:f16 is unknown"),
        (["ollama:f16", "ollama:q8_0"], "is for one type, got f16, q8_0"),
    ],
)
def test_unknown_targets(names, message):
    with pytest.raises(ValueError, match=message):
        parse_targets(names)


def test_names_of_targets():
    got = parse_targets(["GGUF:F16", "gguf:f16", "ollama", "gguf-lora", "hf"])
    assert got == [Target("gguf", "f16"), Target("ollama", "q8_0"), Target("gguf-lora", "f32"), Target("hf")]


def test_no_adapter(base, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no adapter, which --to gguf-lora writes"):
        run(tiny.open_model(base), tokenizer, ["hf", "gguf-lora"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_little_room_is_said_before_anything_is_written(model, tokenizer, tmp_path, monkeypatch):
    class Usage:
        free = 500_000

    monkeypatch.setattr(command.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(OSError, match=r"needs 0\.001 GB for hf, gguf:f32, 0\.001 GB are free"):
        run(model, tokenizer, ["hf", "gguf:f32"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["^C", "full"])
def test_nothing_is_left_of_what_was_stopped(error, model, tokenizer, tmp_path, monkeypatch):
    """The first target is written when the second is stopped."""
    (tmp_path / "out" / "hf").mkdir(parents=True)
    (tmp_path / "out" / "hf" / "notes").write_text("mine")

    def stop(*_, **__):
        raise error

    monkeypatch.setattr("lora_jax.export.gguf._File.write", stop)
    with pytest.raises((KeyboardInterrupt, OSError)):
        run(model, tokenizer, ["hf", "gguf:f32"], tmp_path / "out", overwrite=True, answers=False)
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "out",
        "out/hf",
        "out/hf/notes",
    ]


FILLS = """
import collections, resource, shutil, subprocess, sys
from pathlib import Path
from lora_jax.export.command import export, parse_targets
from lora_jax.loading import load_tokenizer
from tests import tiny
from lora_jax import get_peft_model

folder, out, how, names, points = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4].split(), sys.argv[5].split()
model = tiny.randomize_adapter(get_peft_model(tiny.open_model(Path(folder)), r=4, verbose=False))
tokenizer = load_tokenizer(Path(folder))
# Room is looked for before anything is written. Here it vanishes while something is.
shutil.disk_usage = lambda _: collections.namedtuple("Usage", "total used free")(1 << 40, 0, 1 << 40)

def run(name):
    export(model, tokenizer, parse_targets([name]), out, answers=False, verbose=False)

def limited(name, size):
    if how == "disk":
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(out)], check=True)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        run(name)
        print(name, size, "whole")
    except OSError as error:
        print(name, size, error.errno, sorted(path.name for path in out.iterdir()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if how == "disk":
            subprocess.run(["umount", str(out)], check=True)

for name in names:
    run(name)
    sizes = [path.stat().st_size for path in out.rglob("*") if path.is_file()]
    shutil.rmtree(out)
    out.mkdir()
    for point in map(float, points):
        limited(name, int(point * (sum(sizes) if how == "disk" else max(sizes))) + 1)
"""
FILLED = ["peft", "hf", "bnb-4bit", "gguf:f16", "gguf:q4_k_m", "gguf-lora", "ollama:q8_0", "ollama-lora:f16"]


def expect_nothing_left(base, out, how, points, command):
    arguments = [str(base), str(out), how, " ".join(FILLED), " ".join(map(str, points))]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [*command, sys.executable, "-c", FILLS, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split(" ", 3) for line in done.stdout.splitlines() if line.split(" ")[0] in FILLED]
    assert [line[0] for line in lines] == [name for name in FILLED for _ in points]
    for name, size, *found in lines:
        assert found == [str(errno.ENOSPC if how == "disk" else errno.EFBIG), "[]"], (name, size, found)


def test_files_that_cannot_grow(base, tmp_path):
    """A limit on the size of files stands in for a disk that fills up at a random point, of any order of magnitude."""
    points = [0.95 * 10 ** np.random.default_rng().uniform(-3, 0)]
    print("points", points)
    expect_nothing_left(base, tmp_path / "out", "files", points, [])
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@pytest.mark.slow
def test_a_disk_that_fills_up_anywhere(base, tmp_path):
    """A file system in memory that is smaller than what is written, by random parts of it."""
    command = ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode != 0:
        pytest.skip("needs Linux' unshare with user namespaces")
    points = np.random.default_rng().uniform(0.02, 0.9, 6)
    print("points", list(points))
    expect_nothing_left(base, tmp_path / "out", "disk", points, command)


def test_what_a_kill_would_leave(model, tokenizer, tmp_path):
    """Looked at every few milliseconds: what stands under its final name is whole from the first moment on."""
    out, seen, done = tmp_path / "out", [], threading.Event()

    def look():
        while not done.is_set():
            for folder in out.glob("[!.]*"):
                with contextlib.suppress(FileNotFoundError):
                    seen.append((folder.name, sizes_of(folder)))
            time.sleep(0.002)

    def sizes_of(folder):
        return {path.name: path.stat().st_size for path in folder.iterdir()}

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        run(model, tokenizer, FILLED, out, answers=False)
    finally:
        done.set()
        watcher.join()
    whole = {folder.name: sizes_of(folder) for folder in out.iterdir()}
    assert set(whole) == {name.split(":")[0] for name in FILLED}
    assert all(sizes == whole[kind] for kind, sizes in seen)


def test_gguf_and_ollama_share_one_pass(model, tokenizer, tmp_path, monkeypatch):
    passes, write = [], gguf_export.write_ggufs
    monkeypatch.setattr(
        gguf_export, "write_ggufs", lambda paths, *a, **o: passes.append([*paths]) or write(paths, *a, **o)
    )
    run(model, tokenizer, ["ollama:q8_0", "gguf:f16", "gguf:q8_0"], tmp_path / "a", answers=False)
    run(model, tokenizer, ["gguf:f16", "ollama:q4_0"], tmp_path / "b", answers=False)
    assert passes == [["f16", "q8_0"], ["f16", "q4_0"]]
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {
        *("a/gguf/model.F16.gguf", "a/gguf/model.Q8_0.gguf", "a/ollama/model.Q8_0.gguf", "a/ollama/Modelfile"),
        *("b/gguf/model.F16.gguf", "b/ollama/model.Q4_0.gguf", "b/ollama/Modelfile"),
    }
    gguf, ollama = (tmp_path / "a" / kind / "model.Q8_0.gguf" for kind in ("gguf", "ollama"))
    assert gguf.samefile(ollama) and "FROM ./model.Q8_0.gguf" in (tmp_path / "a" / "ollama" / "Modelfile").read_text()
    with pytest.raises(ValueError, match="max_shard_size splits GGUF files, and Ollama takes whole ones"):
        run(model, tokenizer, ["gguf:f16", "ollama"], tmp_path / "c", max_shard_size="1MB")


def test_options_of_gguf_files(model, tokenizer, tmp_path):
    run(model, tokenizer, ["gguf:q4_0"], tmp_path / "out", answers=False, max_shard_size="100KB")
    files = sorted(path.name for path in (tmp_path / "out" / "gguf").iterdir())
    assert len(files) > 1 and files[0] == f"model.Q4_0-00001-of-{len(files):05d}.gguf"
    (tmp_path / "imatrix").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a whole importance matrix"):
        run(model, tokenizer, ["ollama:q4_0"], tmp_path / "more", answers=False, imatrix=tmp_path / "imatrix")
    assert not list((tmp_path / "more").iterdir())


class FakeHub:
    def __init__(self, error: Exception | None = None):
        self.calls, self.error = [], error

    def create_repo(self, repo_id, *, private, exist_ok):
        self.calls.append(("create", repo_id, private, exist_ok))

    def upload_folder(self, *, folder_path, repo_id, commit_message):
        if self.error is not None:
            raise self.error
        self.calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))


def test_push(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    api = FakeHub()
    assert hub.push(tmp_path, "me/model", api=api) == "https://huggingface.co/me/model"
    assert api.calls == [("create", "me/model", True, True), ("upload", "me/model", ["config.json"])]
    with pytest.raises(OSError, match="me/model could not be pushed .*no net.*it is whole in"):
        hub.push(tmp_path, "me/model", api=FakeHub(ConnectionError("no net")))
