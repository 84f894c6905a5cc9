"""`lora-jax data preview`: what is trained on, and how long it is."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lora_jax.cli import app
from lora_jax.settings import UsageError
from tests import tiny

ROWS = [
    {"messages": [{"role": "user", "content": "Hi [b]"}, {"role": "assistant", "content": "Yo"}]},
    {"conversations": [{"from": "human", "value": "Bye"}, {"from": "gpt", "value": "See you"}]},
    {"prompt": "a: ", "completion": "b"},
]


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    model = tmp_path / "model"
    model.mkdir()
    tiny.write_tokenizer(model)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return model, data


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["data", "preview", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.filterwarnings("ignore:.* rows. conversations do not begin with the BOS")
def test_preview(files):
    model, data = files
    out = run(model, "--data", data)
    assert "example 0: 27 tokens, 3 trained on" in out
    assert "user: Hi [b]<|eot|>assistant: [[Yo<|eot|>]]" in out
    assert "user: Bye<|eot|>assistant: [[See you<|eot|>]]" in out
    assert "a: [[b<|end|>]]" in out
    assert "3 rows, 3 examples, 61 tokens, 13 of them trained on (21.3 %)" in out
    assert "% packed into rows of 64" in out
    out = run(model, "--data", data, "--rows", 1, "--chat-template", "zephyr", "--everything")
    assert "[[<|user|>\nHi [b]<|end|>\n<|assistant|>\nYo<|end|>\n]]" in out
    assert "example 1" not in out


def test_a_wrong_template_or_file_is_said(files):
    model, data = files
    with pytest.raises(ValueError, match="chat_template='chatm' is unknown.*Did you mean 'chatml'"):
        run(model, "--data", data, "--chat-template", "chatm")
    with pytest.raises(FileNotFoundError, match="no such data file"):
        run(model, "--data", data.with_name("none.jsonl"))
    assert issubclass(UsageError, ValueError)
