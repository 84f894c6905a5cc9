"""PEFT adapter folders: written, read, refused."""

import errno
import json
import resource
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lora_jax
from lora_jax import LoraConfig, get_peft_model, load_adapter
from lora_jax.export.aside import folder_aside
from lora_jax.export.peft import adapter_tensors
from tests import tiny

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("tiny") / "model")


def make(base: Path, seed: int = 0, **options):
    return tiny.randomize_adapter(get_peft_model(tiny.open_model(base), verbose=False, **options), seed)


@pytest.fixture(scope="module")
def model(base):
    return make(base, r=4, lora_alpha=8, lora_dropout=0.25)


@pytest.fixture
def saved(model, tmp_path) -> Path:
    return model.save_pretrained(tmp_path / "adapter")


def assert_same_adapter(got, want) -> None:
    got, want = adapter_tensors(got), adapter_tensors(want)
    assert set(got) == set(want)
    for name, tensor in got.items():
        np.testing.assert_array_equal(tensor, want[name], err_msg=name)


OPTIONS = {
    "default": {},
    "rslora, names": {"use_rslora": True, "lora_alpha": 3, "target_modules": ["q_proj", "mlp.down_proj"]},
    "layers": {"layers_to_transform": 1, "target_modules": "all-linear"},
    "regex": {"target_modules": r"model\.layers\.1\..*_proj"},
    "regex and layers": {"target_modules": r".*\.up_proj", "layers_to_transform": [0]},
    "ends": {"target_modules": ["lm_head", "embed_tokens", "v_proj"]},
    "copies": {"modules_to_save": ["lm_head", "embed_tokens"], "target_modules": ["v_proj"]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_roundtrip_is_bitwise(base, tmp_path, options):
    model = make(base, r=4, **options)
    folder = model.save_pretrained(tmp_path / "adapter")
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", WEIGHTS]
    loaded = load_adapter(tiny.open_model(base), folder)
    assert_same_adapter(loaded, model)
    assert loaded.lora_config.scale == model.lora_config.scale
    again = loaded.save_pretrained(tmp_path / "again")
    assert (again / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    ids = tiny.ids(1, 8)
    np.testing.assert_array_equal(loaded.logits(ids), model.logits(ids))


def test_an_adapter_folder_opens_with_its_base(base, tmp_path):
    model, _ = lora_jax.from_pretrained(base, dtype="float32", progress=False)
    tiny.randomize_adapter(get_peft_model(model, r=4, verbose=False))
    folder = model.save_pretrained(tmp_path / "adapter")
    loaded, tokenizer = lora_jax.from_pretrained(folder, dtype="float32", progress=False)
    assert_same_adapter(loaded, model)
    assert loaded.source == base
    assert tokenizer.eos_token_id == 257
    ids = tiny.ids(1, 8)
    np.testing.assert_array_equal(loaded.logits(ids), model.logits(ids))


def test_what_is_written_is_what_peft_reads(saved, base):
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.25,
        "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    with safe_open(saved / WEIGHTS, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = load_file(saved / WEIGHTS)
    assert {t.dtype for t in tensors.values()} == {np.dtype(np.float32)}
    name = "base_model.model.model.layers.0.self_attn.k_proj"
    assert tensors[f"{name}.lora_A.weight"].shape == (4, 64)  # [R, K]
    assert tensors[f"{name}.lora_B.weight"].shape == (32, 4)  # [N, R]
    assert len(tensors) == 2 * 7 * 2


def test_fields_that_depend_on_the_target(base, tmp_path):
    def config(**options):
        folder = make(base, r=2, **options).save_pretrained(tmp_path / "adapter", overwrite=True)
        return json.loads((folder / "adapter_config.json").read_text())

    written = config(target_modules="all-linear", layers_to_transform=[1, 0])
    assert written["target_modules"] == sorted(lora_jax.lora.DEFAULT_TARGETS)
    assert (written["layers_to_transform"], written["layers_pattern"]) == ([0, 1], "layers")
    assert config(target_modules=r".*\.up_proj")["target_modules"] == r".*\.up_proj"
    # PEFT refuses a regex beside layers_to_transform.
    written = config(target_modules=r".*\.up_proj", layers_to_transform=1)
    assert written["target_modules"] == ["model.layers.1.mlp.up_proj"]
    assert config(modules_to_save=["lm_head"])["modules_to_save"] == ["lm_head"]


# What is refused; the model must come out as it was.


def edit_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


A = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
B = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
REFUSED = {
    "dora": (lambda f: edit_config(f, use_dora=True), ValueError, "it lacks .*lora_magnitude_vector"),
    "pissa": (lambda f: edit_config(f, init_lora_weights="pissa_niter_4"), ValueError, "path_initial_model_for_weight"),
    "bias": (lambda f: edit_config(f, bias="all"), ValueError, "bias='all'"),
    "ranks": (lambda f: edit_config(f, rank_pattern={"q_proj": 8}), ValueError, r"wants \[8, 64\]"),
    "lora bias": (lambda f: edit_config(f, lora_bias=True), ValueError, "lora_bias=True"),
    "replicated": (lambda f: edit_config(f, layer_replication=[[0, 1]]), ValueError, "layer_replication="),
    "tokens": (lambda f: edit_config(f, trainable_token_indices=[3]), ValueError, r"trainable_token_indices=\[3\]"),
    "method": (lambda f: edit_config(f, peft_type="IA3"), ValueError, "peft_type is 'IA3'; only 'LORA'"),
    "no rank": (lambda f: edit_config(f, r=...), ValueError, r"adapter_config\.json has no 'r'"),
    "no targets": (lambda f: edit_config(f, target_modules=None), ValueError, "has no 'target_modules'"),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), ValueError, "not valid JSON"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), FileNotFoundError, r"holds no adapter_config\.json"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, r"adapter_model\.bin must be converted"),
    "truncated": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]),
        ValueError,
        "truncated or corrupted .*copy it again",
    ),
    "width": (
        lambda f: edit_tensors(f, lambda t: t.update({A: np.ones((4, 80), np.float32)})),
        ValueError,
        r"made for another model: .*up_proj\.lora_A\.weight has shape \[4, 80\], .* wants \[4, 64\]",
    ),
    "height": (
        lambda f: edit_tensors(f, lambda t: t.update({B: np.ones((64, 4), np.float32)})),
        ValueError,
        r"lora_B\.weight has shape \[64, 4\], .* wants \[128, 4\]",
    ),
    "rank": (lambda f: edit_config(f, r=8), ValueError, r"lora_A\.weight has shape \[4, 128\], .* wants \[8, 128\]"),
    "extra layer": (
        lambda f: edit_tensors(f, lambda t: t.update({A.replace("s.1", "s.2"): np.ones((4, 64), np.float32)})),
        ValueError,
        r"has no place for base_model\.model\.model\.layers\.2\.mlp\.up_proj\.lora_A\.weight \(1 such",
    ),
    "lacks": (lambda f: edit_tensors(f, lambda t: t.pop(A)), ValueError, r"or is damaged: it lacks .*up_proj\.lora_A"),
    "target": (
        lambda f: edit_config(f, target_modules=["query_key_value"]),
        ValueError,
        "'query_key_value' matches no",
    ),
    "layers": (
        lambda f: edit_config(f, layers_to_transform=[5]),
        ValueError,
        r"names \[5\], the model has layers 0 to 1",
    ),
}


@pytest.fixture(scope="module")
def target(base):
    return tiny.open_model(base)


@pytest.mark.parametrize("case", REFUSED)
def test_foreign_adapters_are_refused_and_the_model_unchanged(case, saved, target):
    edit, error, message = REFUSED[case]
    edit(saved)
    with pytest.raises(error, match=message):
        load_adapter(target, saved)
    assert target.lora_config is None
    assert len(target.module.layers) == 1
    assert not jax.tree.leaves(target.split()[1])


def test_adapter_of_another_size_of_model(saved, tmp_path):
    other = tiny.open_model(tiny.write_folder(tmp_path / "other", tiny.config(hidden_size=128), tokenizer=False))
    with pytest.raises(ValueError, match=r"made for another model: .* has shape \[\d+, \d+\], .*other wants"):
        load_adapter(other, saved)


def test_a_second_adapter_is_refused(saved, model):
    with pytest.raises(ValueError, match="has an adapter already; load the base model again"):
        load_adapter(model, saved)


def test_base_that_is_gone_or_not_named(saved):
    edit_config(saved, base_model_name_or_path="/gone/model")
    with pytest.raises(FileNotFoundError, match="no folder /gone/model"):
        lora_jax.from_pretrained(saved)
    edit_config(saved, base_model_name_or_path=None)
    with pytest.raises(ValueError, match="names no base_model_name_or_path; load the base model, then load_adapter"):
        lora_jax.from_pretrained(saved)


# Saving.


def test_nothing_to_save_and_values_that_are_not_finite(base, tmp_path):
    with pytest.raises(ValueError, match="no adapter to save; make one with get_peft_model"):
        tiny.open_model(base).save_pretrained(tmp_path / "adapter")
    model = make(base, r=2, target_modules=["v_proj"])
    model.module.layers[0].self_attn.v_proj.lora_b.set_value(np.full((2, 2, 32), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"not finite in .*v_proj\.lora_B\.weight \(2 tensors\); nothing was written"):
        model.save_pretrained(tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_overwriting(model, base, tmp_path, monkeypatch):
    folder = tmp_path / "deep" / "adapter"
    model.save_pretrained(folder)
    (folder / "notes.txt").write_text("kept until overwritten")
    before = content(tmp_path)
    with pytest.raises(FileExistsError, match="exists and is not empty; choose another folder or pass overwrite=True"):
        model.save_pretrained(folder)
    assert content(tmp_path) == before
    model.save_pretrained(folder, overwrite=True)
    assert sorted(content(tmp_path)) == [f"deep/adapter/{name}" for name in ("adapter_config.json", WEIGHTS)]
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")  # an empty folder is no loss
    assert len(content(tmp_path / "empty")) == 2
    # Neither the base model nor the working directory goes with it.
    for path in (base, base.parent):
        with pytest.raises(FileExistsError, match="which overwriting it would remove; choose another folder"):
            model.save_pretrained(path, overwrite=True)
    assert (base / "model.safetensors").exists()
    (tmp_path / "work" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "here")
    with pytest.raises(FileExistsError, match="would remove"):
        model.save_pretrained("..", overwrite=True)


def test_a_file_in_the_way(model, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file; give the name of a folder"):
        model.save_pretrained(tmp_path / "file", overwrite=True)
    with pytest.raises(OSError, match=r"file/adapter cannot be written \(.*\); choose another place"):
        model.save_pretrained(tmp_path / "file" / "adapter")
    assert content(tmp_path) == {"file": b"mine"}


def test_a_place_that_may_not_be_written(model, tmp_path, monkeypatch):
    def mkdtemp(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", mkdtemp)  # root, as tests may run, is allowed everything
    with pytest.raises(PermissionError, match=r"adapter cannot be written \(Permission denied\); choose another place"):
        model.save_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_old_folder(model, saved, monkeypatch, number):
    def write_file(path, *_):
        path.write_bytes(b"the first half")
        raise OSError(number, "No space left on device")

    before = content(saved.parent)
    monkeypatch.setattr("lora_jax.export.peft.write_file", write_file)
    with pytest.raises(OSError, match="the disk is full while writing .*adapter; nothing was changed there") as caught:
        model.save_pretrained(saved, overwrite=True)
    assert caught.value.errno == number
    assert content(saved.parent) == before


def test_a_write_that_the_system_refuses_leaves_the_old_folder(model, saved):
    """The kernel itself stops the file at 4 KB, as a full disk would."""
    before = content(saved.parent)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            model.save_pretrained(saved, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content(saved.parent) == before


def test_a_file_that_does_not_read_back_is_not_kept(model, saved, monkeypatch):
    from lora_jax.export import safetensors_writer

    verify = safetensors_writer._verify

    def corrupt(path, checksums):
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
        verify(path, checksums)

    before = content(saved.parent)
    monkeypatch.setattr(safetensors_writer, "_verify", corrupt)
    with pytest.raises(OSError, match="does not read back as it was written; the disk may be failing"):
        model.save_pretrained(saved, overwrite=True)
    assert content(saved.parent) == before


def test_folder_aside_when_renaming_fails(tmp_path, monkeypatch):
    """The old folder is put back."""
    import os

    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").write_text("old")
    rename, calls = os.rename, []

    def fail_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_second)
    with pytest.raises(OSError, match="Input/output error"), folder_aside(folder, overwrite=True) as aside:
        (aside / "new").write_text("new")
    assert content(tmp_path) == {"folder/old": b"old"}
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_an_error_of_the_caller_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), folder_aside(tmp_path / "folder", overwrite=False) as aside:
        (aside / "half").write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_written_folders_have_the_usual_permissions(saved):
    usual = saved.parent / "usual"
    usual.mkdir()
    assert saved.stat().st_mode == usual.stat().st_mode
    shutil.rmtree(usual)


def test_settings_survive(saved, base):
    loaded = load_adapter(tiny.open_model(base), saved)
    want = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.25, target_modules=tuple(sorted(lora_jax.lora.DEFAULT_TARGETS)))
    assert loaded.lora_config == want
