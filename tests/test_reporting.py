"""What a run leaves in its folder beside the numbers: report, curve, trackers."""

import json
import sys
import textwrap
from typing import Any

import numpy as np
import pytest

from lora_jax import reporting
from lora_jax.config import TRACKERS, SFTConfig
from lora_jax.lora import LoraConfig
from lora_jax.reporting import Trackers, describe_adapter, plot_loss, read_metrics, write_report, write_run
from tests.test_trainer import make_trainer, rows

# Fakes with the calls of the real packages; each writes what it was told to a file.
FAKES = {
    "tensorboardX": """
        class SummaryWriter:
            def __init__(self, logdir): told("open", logdir)
            def add_text(self, tag, text, step): told("text", tag, text, step)
            def add_scalar(self, tag, value, step): told("scalar", tag, value, step)
            def close(self): told("close")
    """,
    "wandb": """
        class Run:
            def log(self, numbers, step): told("log", numbers, step)
            def finish(self): told("close")
        def init(project, name, config, dir):
            told("open", project, name, config, dir)
            return Run()
    """,
    "trackio": """
        def init(project, name, config): told("open", project, name, config)
        def log(numbers, step):
            if step > 8: raise ConnectionError("no network")
            told("log", numbers, step)
        def finish(): told("close")
    """,
}


@pytest.fixture
def trackers(tmp_path, monkeypatch):
    """The fakes can be imported; returns what one of them was told."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for name, code in FAKES.items():
        monkeypatch.delitem(sys.modules, name, raising=False)
        log = folder / f"{name}.jsonl"
        head = f"""
            import json, pathlib
            told_to, lines = pathlib.Path({str(log)!r}), []
            def told(*words):
                lines.append(json.dumps(words) + chr(10))
                told_to.write_text("".join(lines))
        """
        (folder / f"{name}.py").write_text(textwrap.dedent(head) + textwrap.dedent(code))
    monkeypatch.syspath_prepend(folder)
    yield lambda name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    for name in FAKES:
        sys.modules.pop(name, None)


def test_trackers_get_every_log(trackers, tmp_path, capsys):
    out = str(tmp_path / "my-run")
    args = SFTConfig(output_dir=out, report_to=["tensorboard", "wandb", "trackio"], project="mine")
    running = Trackers(args, {"model": "m"})
    running.log({"loss": 1.5, "learning_rate": 1e-3, "note": "words", "step": 8}, 8)
    running.log({"eval_loss": 2.5, "epoch": 1.0}, 9)
    running.finish()
    assert trackers("tensorboardX") == [
        ["open", f"{out}/tensorboard"],
        ["text", "run", '```\n{\n "model": "m"\n}\n```', 0],
        ["scalar", "train/loss", 1.5, 8],
        ["scalar", "train/learning_rate", 1e-3, 8],
        ["scalar", "eval/loss", 2.5, 9],
        ["scalar", "train/epoch", 1.0, 9],
        ["close"],
    ]
    first, second = {"train/loss": 1.5, "train/learning_rate": 1e-3}, {"eval/loss": 2.5, "train/epoch": 1.0}
    assert trackers("wandb") == [
        ["open", "mine", "my-run", {"model": "m"}, out],
        ["log", first, 8],
        ["log", second, 9],
        ["close"],
    ]
    # One that fails is told of and left alone.
    assert trackers("trackio") == [["open", "mine", "my-run", {"model": "m"}], ["log", first, 8]]
    assert "trackio failed and gets no more numbers" in capsys.readouterr().err


def test_a_run_tells_its_trackers_and_leaves_a_report(trackers, tmp_path):
    out = tmp_path / "run"
    args: Any = dict(max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=4, save_strategy="no")
    trainer = make_trainer(out, report_to="wandb", eval_dataset=rows(4, seed=2), **args)
    trainer.train()
    steps = read_metrics(out / "metrics.jsonl")
    told = trackers("wandb")
    assert told[0][3]["batches"] == json.loads((out / "run.json").read_text())["batches"]
    logged = {step: numbers for what, numbers, step in told[1:-1] if "train/loss" in numbers}
    assert sorted(logged) == [2, 4]
    for step, numbers in logged.items():
        mean = np.mean([record["loss"] for record in steps if "loss" in record and step - 2 < record["step"] <= step])
        assert numbers["train/loss"] == pytest.approx(mean, rel=1e-6)
    evaluated = next(numbers for what, numbers, _ in told[1:-1] if "eval/loss" in numbers)
    assert evaluated["eval/loss"] == next(record["eval_loss"] for record in steps if "eval_loss" in record)
    assert told[-1] == ["close"]
    assert "finished |" in (out / "report.md").read_text()


def test_the_report_says_how_a_run_was_ended(tmp_path):
    class Stop:
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2:
                raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        make_trainer(tmp_path, max_steps=4, save_strategy="no", callbacks=[Stop()]).train()
    assert "after step 2 by RuntimeError: enough |" in (tmp_path / "report.md").read_text()


def test_names_of_runs(trackers, tmp_path):
    args = SFTConfig(output_dir=str(tmp_path / "a"), report_to="wandb", run_name="b")
    Trackers(args, {}).finish()
    assert trackers("wandb")[0][:3] == ["open", "lora-jax", "b"]
    args = SFTConfig(output_dir=str(tmp_path / "a"), report_to="tensorboard", logging_dir=tmp_path / "logs")
    Trackers(args, {}).finish()
    assert trackers("tensorboardX")[0] == ["open", str(tmp_path / "logs")]


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_is_refused(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None if module == TRACKERS[name][0] else "there")
    with pytest.raises(ValueError, match=f"report_to='{name}' needs the package .*, not installed: pip install "):
        SFTConfig(report_to=["jsonl", name])


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plot_loss([{"step": 1, "loss": 2.0}], tmp_path / "loss_curve.png")
    assert not (tmp_path / "loss_curve.png").exists()
    assert "loss_curve.png was not drawn: pip install matplotlib" in capsys.readouterr().err


def test_the_report_of_a_run(tmp_path):
    rng = np.random.default_rng(0)
    losses = rng.uniform(1, 2, 25)
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step, loss in enumerate(losses, 1):
            record = {"step": step, "epoch": step / 10, "loss": loss, "num_tokens": 10, "tokens_per_second": step}
            file.write(json.dumps(record) + "\n")
            if step % 10 == 0:
                file.write(json.dumps({"step": step, "eval_loss": 3 - step / 10}) + "\n")
    facts = {"model": "a|b", "settings": {"learning_rate": 1e-3}, "versions": {"jax": "1.2"}}
    write_run(tmp_path, of_an_earlier_run=1)
    write_run(tmp_path, anew=True, **facts, ended="now, by an error")
    assert "of_an_earlier_run" not in (tmp_path / "run.json").read_text()
    write_run(tmp_path, ended="now, finished", peak_bytes=3 * 2**29, seconds=12.0, compile_seconds=5.0)
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| model | a\\|b |" in text
    assert f"| loss | {losses[0]:.4f} at first, {losses[-2:].mean():.4f} in the last 2 steps |" in text
    assert "| tokens | 250 |" in text and "| tokens/s | 13 (median of the steps) |" in text
    assert "| evaluation loss | 1.0000, least 1.0000 at step 20 |" in text
    assert "| peak memory of the device | 1.50 GiB |" in text and "| ended | now, finished |" in text
    assert "12 s, 5 s of them compiling" in text and "learning_rate: 0.001\n" in text and "jax==1.2\n" in text
    assert "loss_curve.png" not in text


def test_words_for_an_adapter():
    config = LoraConfig(r=8, lora_alpha=32, use_rslora=True)
    assert describe_adapter(config, 10, 1000) == "r=8, lora_alpha=32, use_rslora=True; 10 of 1,000 parameters (1.00 %)"


def test_versions_and_settings():
    import jax

    assert reporting.versions()["jax"] == jax.__version__
    assert reporting.changed_settings(SFTConfig(seed=3, output_dir="x")) == {"output_dir": "x", "seed": 3}
