"""The command `lora-jax` on a tiny random Llama with SmolLM2's tokenizer: every command, its help, and mistakes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from lora_jax import cli
from lora_jax.config import SFTConfig
from lora_jax.settings import LORA, OWN, UsageError, read_settings, split_targets

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
ROWS = [
    {"messages": [{"role": "user", "content": u}, {"role": "assistant", "content": a}]}
    for u, a in [("Two coffees", '{"coffee": 2}'), ("Three teas, please", '{"tea": 3}'), ("One bun", '{"bun": 1}')]
]


def write_tiny_llama(folder: Path, tokenizer_of: Path) -> None:
    """A random Llama of 3 M parameters; nearly all of them embed the 49152 tokens of the real tokenizer."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copy(tokenizer_of / name, folder / name)
    config = json.loads((tokenizer_of / "config.json").read_text()) | SIZES
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)

    def matrix(n: int, k: int) -> np.ndarray:
        return (rng.standard_normal((n, k)) / np.sqrt(k)).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(64)).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(config["vocab_size"], 64), "model.norm.weight": norm()}
    for layer in range(2):
        at = f"model.layers.{layer}."
        tensors |= {
            f"{at}self_attn.{n}_proj.weight": matrix(r, 64) for n, r in {"q": 64, "k": 32, "v": 32, "o": 64}.items()
        }
        tensors |= {f"{at}mlp.{name}_proj.weight": matrix(128, 64) for name in ("gate", "up")}
        tensors |= {f"{at}mlp.down_proj.weight": matrix(64, 128)}
        tensors |= {f"{at}{name}_layernorm.weight": norm() for name in ("input", "post_attention")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    write_tiny_llama(folder, smollm2)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def run(*arguments: object) -> int:
    """The exit code of the command in this process; what is no mistake of the user is raised."""
    before, sys.argv = sys.argv, ["lora-jax", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as end:
        return 0 if end.code is None else int(end.code)
    finally:
        sys.argv = before
    return 0


@pytest.fixture(scope="module")
def finished(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    flags = ("--max-steps", 2, "--batch-size", 2, "--r", 4, "--alpha", 8, "--lr", "1e-2", "--dtype", "float32")
    assert run("train", model, "--data", data, "-o", folder, *flags) == 0
    return folder


def test_train_writes_a_whole_run(finished: Path, model: Path, data: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "metrics.jsonl"}
    assert names >= {"loss_curve.png", "train_config.yaml", "checkpoint-2", "run.json", "report.md"}
    assert not any(name.startswith(".") for name in names)
    adapter = json.loads((finished / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["base_model_name_or_path"]) == (4, 8, str(model))
    tensors = load_file(finished / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7
    assert all(np.abs(tensor).max() > 0 for tensor in tensors.values())  # B too: it was trained
    settings = read_settings(finished / "train_config.yaml")
    assert settings["data"] == [str(data)]
    assert (settings["load_in_4bit"], settings["dtype"], settings["max_steps"]) == (True, "float32", 2)
    report = (finished / "report.md").read_text()
    assert f"| model | {model} |" in report
    assert "r=4, lora_alpha=8" in report and "| steps | 2, " in report
    losses = [json.loads(line)["loss"] for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert f"{losses[0]:.4f} at first, {losses[1]:.4f} at last" in report
    assert "![loss](loss_curve.png)" in report and "- `adapter_model.safetensors`" in report
    assert "- `checkpoint-2`" in report and "learning_rate: 0.01\n" in report and "finished |" in report
    assert f"jax=={jax.__version__}\n" in report


def test_resume_from_the_settings_of_a_run(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    old = load_file(folder / "adapter_model.safetensors")
    assert run("train", "--config", folder / "train_config.yaml", "-o", folder, "--resume", "--max-steps", 3) == 0
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    new = load_file(folder / "adapter_model.safetensors")
    assert any(not np.array_equal(new[name], old[name]) for name in old)
    assert "resume" not in read_settings(folder / "train_config.yaml")


def test_a_second_run_does_not_overwrite_the_first(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "adapter_model.safetensors").read_bytes()
    assert run("train", "--config", finished / "train_config.yaml", "-o", finished) == 2
    assert "--overwrite-output-dir" in capsys.readouterr().err
    assert (finished / "adapter_model.safetensors").read_bytes() == before
    # The trainer's own refusals leave the settings alone, too: they are written when training begins.
    settings = (finished / "train_config.yaml").read_bytes()
    assert run("train", "--config", finished / "train_config.yaml", "-o", finished, "--resume", "--seed", 9) == 2
    assert "seed" in capsys.readouterr().err
    assert (finished / "train_config.yaml").read_bytes() == settings


def test_flags_win_over_the_file(model: Path, data: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    content = {"model": str(model), "data": str(data), "batch-size": 2, "lr": "1e-3", "r": 8, "epochs": 5, "seed": 7}
    content |= {"target_modules": "q_proj, v_proj", "save_strategy": "no", "load_in_4bit": False, "dtype": "float32"}
    config.write_text(yaml.safe_dump(content))
    assert run("train", "-c", config, "--max-steps", 1, "--r", 2, "-o", tmp_path / "run") == 0
    adapter = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (adapter["r"], sorted(adapter["target_modules"])) == (2, ["q_proj", "v_proj"])
    settings = read_settings(tmp_path / "run" / "train_config.yaml")
    assert (settings["learning_rate"], settings["seed"], settings["load_in_4bit"]) == ("1e-3", 7, False)
    assert not list((tmp_path / "run").glob("checkpoint-*"))  # a field of SFTConfig that has no flag


def test_generate_streams_what_the_model_says(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lora_jax import from_pretrained, generate_text

    arguments = ("generate", finished, "--prompt", "Two coffees", "--max-new-tokens", 6)
    assert run(*arguments) == 0
    shown = capsys.readouterr().out
    model, tokenizer = from_pretrained(finished, dtype="float32", progress=False)
    assert shown == generate_text(model, tokenizer, ["Two coffees"], max_new_tokens=6)[0] + "\n"
    assert shown.strip()
    penalised = {"max_new_tokens": 6, "repetition_penalty": 3.0}
    stop = generate_text(model, tokenizer, ["Two coffees"], **penalised)[0][1:3]
    assert run(*arguments, "--repetition-penalty", 3, "--stop", "never", "--stop", stop) == 0
    shorter = generate_text(model, tokenizer, ["Two coffees"], stop_strings=[stop], **penalised)[0]
    assert capsys.readouterr().out == shorter + "\n" != shown
    assert run(*arguments, "--temperature", 5, "--seed", 1) == 0
    sampled = capsys.readouterr().out
    assert sampled != shown
    assert run(*arguments, "--temperature", 5, "--seed", 1) == 0
    assert capsys.readouterr().out == sampled


def test_generate_puts_the_prompt_into_the_chat_template(smollm2: Path) -> None:
    from lora_jax.loading import load_tokenizer

    said = [{"role": "system", "content": "Answer in JSON."}, {"role": "user", "content": "Two coffees"}]
    ids = cli._prompt_ids(load_tokenizer(smollm2), said)
    assert load_tokenizer(smollm2).decode(ids) == (
        "<|im_start|>system\nAnswer in JSON.<|im_end|>\n"
        "<|im_start|>user\nTwo coffees<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chat_remembers_what_was_said(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_jax import from_pretrained, generate_text

    said = iter(["Two coffees", "", "Three teas", "/new", "Two coffees", "/quit", "never asked"])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    assert run("chat", finished, "--system", "Be short.", "--max-new-tokens", 5) == 0
    hint, *shown = capsys.readouterr().out.splitlines()
    assert "/new" in hint
    model, tokenizer = from_pretrained(finished, dtype="float32", progress=False)
    talk: list[dict[str, str]] = [{"role": "system", "content": "Be short."}]
    answers = []
    for text in ("Two coffees", "Three teas"):
        talk.append({"role": "user", "content": text})
        answers.append(generate_text(model, tokenizer, [talk], max_new_tokens=5)[0])
        talk.append({"role": "assistant", "content": answers[-1]})
    assert "\n".join(shown) == "\n".join([*answers, answers[0]])


def test_chat_ends_with_the_input_and_refuses_what_is_too_long(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = iter(["many words " * 150])

    def ask(_: str) -> str:
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    assert run("chat", finished, "--max-new-tokens", 5) == 0
    assert "and the model no position left: /new begins another" in capsys.readouterr().out


def test_ctrl_c_stops_an_answer_and_not_the_chat(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_jax.model import CausalLM

    def stopped(self, ids, *, streamer, **_):
        streamer.put(np.asarray(ids[0]))
        streamer.put(np.asarray(self.shown))
        raise KeyboardInterrupt

    said, prompts = iter(["One bun", "And tea", "/quit"]), []
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    monkeypatch.setattr(CausalLM, "generate", stopped)
    monkeypatch.setattr(CausalLM, "shown", [504], raising=False)  # a token of text
    ids = cli._prompt_ids
    monkeypatch.setattr(cli, "_prompt_ids", lambda tokenizer, asked: (prompts.append(asked), ids(tokenizer, asked))[1])
    assert run("chat", finished) == 0
    shown = capsys.readouterr().out.splitlines()[1]
    assert shown
    assert [message["content"] for message in prompts[1]] == ["One bun", shown, "And tea"]


def test_bench_measures_steps(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ("--batch", 3, "--seq", 24, "--grad-accumulation", 2, "--steps", 3)
    assert run("bench", model, *shape, "--r", 4, "--remat", "selective", "--dtype", "float32") == 0
    shown = capsys.readouterr().out
    assert "2 x 3 x 24 tokens" in shown and "median of 3" in shown and "backward   selective" in shown
    ms = float(re.search(r"step +([\d.,]+) ms", shown)[1].replace(",", ""))
    rate = float(re.search(r"speed +([\d,]+) tokens/s", shown)[1].replace(",", ""))
    assert rate == pytest.approx(1e3 * 2 * 3 * 24 / ms, rel=0.05)  # both are rounded for people
    assert run("bench", model, "--seq", 300) == 2
    assert "max_seq_length=300 exceeds the 256 positions" in capsys.readouterr().err


def test_memory_limit_comes_before_jax(
    model: Path, data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lora_jax.memory_limit
    import lora_jax.step

    class Limited(Exception):
        pass

    def limit(value: str) -> None:
        raise Limited(value)

    monkeypatch.setattr(lora_jax.memory_limit, "limit_memory", limit)
    monkeypatch.setattr(lora_jax.step, "use_compile_cache", lambda: pytest.fail("JAX was used before the limit"))
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {model}\ndata: {data}\nmemory_limit: 9GB\n")
    for limit_in_file, *arguments in (
        ("12GB", "train", model, "--data", data, "-o", tmp_path / "run", "--memory-limit", "12GB"),
        ("9GB", "train", "--config", config),
        ("12GB", "generate", finished, "--prompt", "x", "--memory-limit", "12GB"),
        ("12GB", "chat", finished, "--memory-limit", "12GB"),
        ("12GB", "export", finished, "--to", "peft", "--out", tmp_path / "out", "--memory-limit", "12GB"),
        ("12GB", "bench", model, "--memory-limit", "12GB"),
    ):
        with pytest.raises(Limited, match=limit_in_file):
            run(*arguments)


def test_doctor_says_what_to_mend(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import lora_jax.doctor
    from lora_jax.doctor import Finding

    findings = [Finding("GPU", "ok", "a card [x]"), Finding("CUDA", "wrong", "none", "pip install it")]
    monkeypatch.setattr(lora_jax.doctor, "check", lambda kernels: iter(findings[: 1 + kernels]))
    assert run("doctor", "--no-kernels") == 0
    assert "ok GPU: a card [x]" in capsys.readouterr().out
    assert run("doctor") == 1
    assert "-> pip install it" in capsys.readouterr().out


def test_export_in_every_format(
    finished: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    formats = [part for name in ("peft", "hf", "gguf:f16", "gguf:q8_0") for part in ("--to", name)]
    assert run("export", finished, *formats, "--out", out) == 0
    assert "model.safetensors" in capsys.readouterr().out
    before = load_file(finished / "adapter_model.safetensors")
    after = load_file(out / "peft" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert "model.layers.1.mlp.down_proj.weight" in load_file(out / "hf" / "model.safetensors")
    assert (out / "hf" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    files = sorted((out / "gguf").glob("*.gguf"))
    assert len(files) == 2
    for path in files:
        with path.open("rb") as file:  # magic and version, the number of tensors; a reader takes seconds for the rest
            assert int.from_bytes(file.read(16)[8:], "little") == 2 + 2 * 9
    assert run("export", finished, "--to", "peft", "--out", out) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_a_run_that_was_stopped_is_used_from_its_checkpoint(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished / "checkpoint-2", folder / "checkpoint-2")
    assert run("export", folder, "--to", "peft", "--out", tmp_path / "out") == 0
    assert "checkpoint-2" in capsys.readouterr().err
    before = load_file(finished / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "peft" / "adapter_model.safetensors")
    assert all(np.array_equal(before[name], after[name]) for name in before)


# ---- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "MODEL"), "--data FILE is missing"),
        (("train", "--data", "DATA"), "a MODEL is missing"),
        (("train", "MODEL", "--data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("train", "no/folder/here", "--data", "DATA"), "no/folder/here"),
        (("train", "MODEL", "--data", "BROKEN"), "broken.jsonl, line 2"),
        (("train", "MODEL", "--data", "DATA", "--r", "0"), "at least 1"),
        (("train", "MODEL", "--data", "DATA", "--lr", "-1"), "learning_rate"),
        (("train", "MODEL", "--data", "DATA", "--scheduler", "cosin"), "cosine"),
        (("train", "MODEL", "--data", "DATA", "--target-modules", "q_prj"), "q_prj"),
        (("train", "MODEL", "--data", "DATA", "--dtype", "int8"), "int8"),
        (("train", "MODEL", "--data", "DATA", "--resume"), "no intact checkpoint"),
        (("train", "MODEL", "--data", "DATA", "--epochs", "many"), "valid number"),
        (("generate", "MODEL", "--prompt", "x", "--system", "y"), "--chat"),
        (("generate", "MODEL", "--prompt", "x", "--top-p", "0.5"), "--temperature"),
        (("generate", "MODEL", "--prompt", "x", "--max-new-tokens", "0"), "max_new_tokens"),
        (("generate", "MODEL"), "--prompt"),
        (("export", "MODEL", "--to", "onnx", "--out", "OUT"), "gguf:q8_0"),
        (("export", "MODEL", "--to", "gguf", "--out", "OUT"), "gguf:q8_0"),
        (("export", "MODEL", "--to", "hf", "--out", "OUT", "--merge-base", "mine"), "original"),
        (("export", "MODEL", "--to", "peft", "--out", "OUT"), "no adapter"),
        (("tune",), "tune"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_end_in_one_message(
    arguments: tuple[str, ...],
    said: str,
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(ROWS[0]) + "\n{not json\n")
    names = {"MODEL": model, "DATA": data, "OUT": tmp_path / "out", "BROKEN": broken}
    assert run(*(names.get(argument, argument) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not (tmp_path / "trainer_output" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("learning_rte: 1e-4", r"run.yaml, line 1: unknown setting 'learning_rte'; did you mean 'learning_rate'"),
        ("r: 8\n# why\n\nlora_alhpa: 4", "run.yaml, line 4: .*did you mean 'lora_alpha'"),
        ("lr: 1e-4\nr: 8\nlearning_rate: 1e-3", "run.yaml, lines 1 and 3: .*set twice"),
        ("r: 8\nr: 16", "run.yaml, lines 1 and 2: .*set twice"),
        ("just words", "name: value"),
        ("r: 8\na: [1", "run.yaml, line 2: not valid YAML"),
        ("r: 8\n\tlr: 1", "run.yaml, line 2: not valid YAML"),
    ],
)
def test_mistakes_in_yaml(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=said):
        read_settings(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("packing: 3", "line 2: SFTConfig: packing=3"),
        ("r: x", "line 2: r is the rank"),
        ("lora_dropout: x", "line 2: the adapter's settings"),
        ("epochs: -1", "line 2: SFTConfig: got num_train_epochs=-1"),
        ("scheduler: cosin\nseed: 1", "line 2: SFTConfig: got lr_scheduler_type='cosin'"),
        ("warmup_steps: 5\nlr: 1\nwarmup_ratio: 0.1", "lines 2 and 4: SFTConfig: got warmup_steps=5"),
        ("memory_limit: 1 egg", "line 2: memory_limit='1 egg': memory: got '1 egg'"),
        (
            "report_to: wandb",
            "line 2: SFTConfig: report_to='wandb' needs the package wandb, not installed: pip install",
        ),
    ],
)
def test_wrong_values_in_yaml(
    content: str, said: str, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: {tmp_path / 'run'}\n{content}\n")
    assert run("train", model, "--data", data, "--config", path) == 2
    assert said in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import lora_jax.loading

    def broken(*_, **__):
        return np.ones(3).reshape(2, 2)  # a ValueError out of numpy

    monkeypatch.setattr(lora_jax.loading, "from_pretrained", broken)
    with pytest.raises(ValueError, match="reshape"):
        run("train", model, "--data", data, "-o", tmp_path / "run")


# ---- words --------------------------------------------------------------------------------------------------------


def test_names_do_not_clash() -> None:
    fields = set(SFTConfig.__dataclass_fields__)
    assert not fields & {*OWN, *LORA}
    from lora_jax.lora import LoraConfig

    assert set(LORA) == set(LoraConfig.__dataclass_fields__)


COMMANDS = ("train", "chat", "generate", "export", "plan", "bench", "doctor", "data", "data preview")


def test_there_is_no_other_command() -> None:
    import typer.main

    command: Any = typer.main.get_command(cli.app)
    found = [name if name != "data" else "data preview" for name in command.commands]
    assert {*found, "data"} == set(COMMANDS)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_screen(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert run(*command.split(), "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100


def test_help_teaches(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_jax.lora import LoraConfig

    monkeypatch.setenv("COLUMNS", "100")
    assert run("train", "--help") == 0
    text = capsys.readouterr().out
    defaults, lora = SFTConfig(), LoraConfig()
    for name, default in {
        "--learning-rate": defaults.learning_rate,
        "--epochs": defaults.num_train_epochs,
        "--batch-size": defaults.per_device_train_batch_size,
        "--grad-accumulation": defaults.gradient_accumulation_steps,
        "--warmup-steps": defaults.warmup_steps,
        "--seed": defaults.seed,
        "--r ": lora.r,
        "--alpha": lora.lora_alpha,
        "--dropout": lora.lora_dropout,
        "--output-dir": defaults.output_dir,
    }.items():
        line = next(line for line in text.splitlines() if name in line and "  " in line.strip())
        assert f"[default: {default}]" in line
    assert "lora-jax train --config run.yaml" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "--leaning-rate", "1"), "--learning-rate"),
        (("bench", "x", "--btach", "1"), "--batch"),
        (("genrate",), "Did you mean 'generate'"),
        (("data", "previw"), "Did you mean 'preview'"),
    ],
)
def test_a_typo_is_answered(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        ("o_proj", ["o_proj"]),
        ("all-linear", "all-linear"),
        (r".*layers\.(0|1)\..*_proj", r".*layers\.(0|1)\..*_proj"),
    ],
)
def test_split_targets(text: str, targets: str | list[str]) -> None:
    assert split_targets(text) == targets


def test_import_and_help_start_no_backend() -> None:
    script = "import sys, lora_jax.cli; print('jax' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_version_and_compile_cache(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    script = (
        "from lora_jax.step import use_compile_cache as u; u(); import jax; print(jax.config.jax_compilation_cache_dir)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == str(tmp_path / "lora-jax" / "jax")
    other = environment | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "mine")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=other)
    assert done.stdout.strip() == str(tmp_path / "mine")
    done = subprocess.run([sys.executable, "-m", "lora_jax.cli", "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("lora-jax ")
