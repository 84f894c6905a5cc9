"""The demo: its task is what it says, its scorer is strict, and the whole of it runs."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_jax.tools import demo, demo_task
from lora_jax.tools.demo_task import KEYS, Row, is_exact, make_task, score
from tests.test_cli import write_tiny_llama

# ---- the task -----------------------------------------------------------------------------------------------------


def _words(rows: list[Row]) -> dict[str, set[Any]]:
    found: dict[str, set[Any]] = {key: {row.answer[key] for row in rows} for key in KEYS}
    found["words of items"] = {word for item in found["item"] for word in item.split()}
    return found


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_test_rows_share_no_values_with_training(seed: int) -> None:
    task = make_task(360, 40, seed=seed)
    train, seen, unseen = map(_words, (task.train, task.test_seen, task.test_unseen))
    for key in ("customer", "item", "quantity", "time", "words of items"):
        assert not train[key] & (seen[key] | unseen[key]), key
    assert len({row.text for row in task.train}) == 360


def _template(row: Row) -> str:
    """The sentence with its values blanked out."""
    text = row.text
    for value in (r"\d+(:\d\d)? [ap]m", *(re.escape(str(row.answer[key])) for key in KEYS[:-1])):
        text, changes = re.subn(rf"\b{value}\b", "_", text, count=1, flags=re.IGNORECASE)
        assert changes == 1, (value, row.text)
    return text


def test_templates() -> None:
    task = make_task(64, 32)
    train, seen, unseen = ({_template(row) for row in rows} for rows in (task.train, task.test_seen, task.test_unseen))
    assert (len(train), len(seen), len(unseen)) == (16, 16, 8)
    assert seen == train
    assert not unseen & train


def test_the_answer_follows_from_the_sentence() -> None:
    task = make_task(200, 50, seed=3)
    for row in task.train + task.test_seen + task.test_unseen:
        found = re.search(r"\b(\d+)(?::(\d\d))? ([ap])m\b", row.text)
        assert found
        hour, minute, half = int(found[1]) % 12, int(found[2] or 0), found[3]
        assert row.answer["time"] == f"{hour + 12 * (half == 'p'):02d}:{minute:02d}"
        assert list(row.answer) == list(KEYS)
        assert isinstance(row.answer["quantity"], int)
        assert row.training["messages"][:2] == row.prompt
        assert is_exact(row.training["messages"][2]["content"], row.answer)


def test_rows_are_reproducible() -> None:
    assert make_task(50, 5, seed=1) == make_task(50, 5, seed=1)
    assert make_task(50, 5, seed=1).train != make_task(50, 5, seed=2).train
    # The same in every process: nothing depends on the hash of a string.
    script = "from lora_jax.tools.demo_task import make_task; print(repr(make_task(20, 5, seed=1)), end='')"
    runs = [subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True) for _ in "ab"]
    assert runs[0].stdout == runs[1].stdout == repr(make_task(20, 5, seed=1))


def test_no_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="rows=0"):
        make_task(0)


# ---- the scorer ---------------------------------------------------------------------------------------------------

WANTED = {"customer": "Marta", "item": "red mats", "quantity": 14, "day": "Friday", "time": "15:30"}


def test_scorer_accepts_the_same_json() -> None:
    assert is_exact(json.dumps(WANTED), WANTED)
    assert is_exact(" " + json.dumps(WANTED, indent=2) + "\n", WANTED)
    assert is_exact(json.dumps(dict(reversed(WANTED.items()))), WANTED)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "null",
        "14",
        "[]",
        "{}",
        json.dumps([WANTED]),
        json.dumps(list(WANTED.items())),
        json.dumps(WANTED | {"quantity": "14"}),
        json.dumps(WANTED | {"quantity": 14.0}),
        json.dumps(WANTED | {"quantity": 15}),
        json.dumps(WANTED | {"customer": "marta"}),
        json.dumps(WANTED | {"time": "3:30 pm"}),
        json.dumps(WANTED | {"note": ""}),
        json.dumps({key: WANTED[key] for key in KEYS[:-1]}),
        json.dumps(WANTED)[:-1],
        json.dumps(WANTED) + " Done.",
        f"```json\n{json.dumps(WANTED)}\n```",
        json.dumps(WANTED)[:-1] + ', "quantity": 14}',  # a key twice
        json.dumps(WANTED)[:-1] + ', "quantity": 99, "quantity": 14}',
        json.dumps(WANTED | {"customer": {"name": "Marta"}}),
    ],
)
def test_scorer_refuses_anything_else(answer: str) -> None:
    assert not is_exact(answer, WANTED)


def test_scorer_tells_true_from_one() -> None:
    assert not is_exact('{"a": true}', {"a": 1})
    assert not is_exact('{"a": 1}', {"a": True})


def test_score_counts() -> None:
    rows = make_task(3, 1).train
    answers = [json.dumps(rows[0].answer), "?", json.dumps(rows[2].answer)]
    assert score(answers, rows) == 2
    with pytest.raises(ValueError, match="longer"):
        score(answers[:2], rows)


# ---- the whole ----------------------------------------------------------------------------------------------------


def test_out_folder_that_exists_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").touch()
    with pytest.raises(FileExistsError, match="--out"):
        demo.run_demo(demo.Settings(out=tmp_path / "old"))
    monkeypatch.chdir(tmp_path)
    assert demo._new_folder(None) == Path("outputs/demo-1")
    assert demo._new_folder(None) == Path("outputs/demo-2")


@pytest.mark.turns("real models and whole programs")
def test_the_demo_runs_on_a_local_model(
    smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its parts on a random model that learns nothing: files, table, honest zeros."""
    monkeypatch.setenv("COLUMNS", "160")
    write_tiny_llama(tmp_path / "model", smollm2)
    settings = demo.Settings(
        model=tmp_path / "model", out=tmp_path / "out", rows=4, test_rows=1, batch_size=2, dtype="float32", llama_rows=2
    )
    result = demo.run_demo(settings)
    assert result == json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["exact_before"] == result["exact_after"] == {"seen_templates": 0, "unseen_templates": 0}
    assert result["training"]["steps"] == 2
    assert result["peak_memory_bytes"] > 100e6
    assert {"adapter/adapter_model.safetensors", "merged/model.safetensors", "metrics.jsonl"} <= result["files"].keys()
    assert sum(name.endswith(".gguf") for name in result["files"]) == 2
    assert {name: part["exact"] for name, part in result["llama_cpp"].items()} == {"q8_0": 0, "f16": 0}
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("0 of 1", "tokens/s", "GiB", "merged/model.safetensors", "q8_0"))


def test_a_missing_llama_cpp_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    found = demo._llama_cpp({"f16": Path("x.gguf")}, make_task(1, 1), ["", ""], 2)
    assert "not installed" in found["not run"]


@pytest.fixture(scope="module")
def finished(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole demo, or that which LORA_JAX_DEMO names."""
    if "LORA_JAX_DEMO" in os.environ:
        return Path(os.environ["LORA_JAX_DEMO"])
    # In a process of its own, as `make demo` runs it: with the devices and caches of a plain start.
    out = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-m", "lora_jax.tools.demo", "--model", str(smollm2), "--out", str(out)]
    plain = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_the_demo_teaches_smollm2_the_task(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert result["test_rows"] == {"seen_templates": 40, "unseen_templates": 40}
    assert max(result["exact_before"].values()) <= 2  # near 0
    assert result["exact_after"]["seen_templates"] >= 36  # 90 %
    assert result["exact_after"]["unseen_templates"] >= 30  # 75 %
    for part in result["llama_cpp"].values():
        assert part["rows"] == 20
        assert part["exact"] >= 15  # 75 %: both sets mixed, and other roundings


@pytest.mark.slow
@pytest.mark.oracle
def test_every_form_of_the_trained_adapter_answers_alike(
    finished: Path, smollm2: Path, oracle: Callable[..., str], tmp_path: Path
) -> None:
    """Ours, PEFT on the base that was trained on, the merged folder in transformers, GGUF F16 and Q8_0 in llama.cpp:
    as many right answers, within 2 of 20, and the same text letter by letter, but for the quantised file's."""
    from safetensors.numpy import save_file

    from lora_jax import from_pretrained
    from lora_jax.export.merge import merged_tensors
    from lora_jax.generation import prompt_ids

    result = json.loads((finished / "result.json").read_text())
    settings = result["settings"]
    task = make_task(settings["rows"], settings["test_rows"], seed=settings["seed"])
    half = settings["llama_rows"] // 2
    rows = task.test_seen[:half] + task.test_unseen[:half]  # those that llama.cpp has answered
    ours = {answer["order"]: answer for answer in result["answers"]}
    after, before = ([ours[row.text][when] for row in rows] for when in ("after", "before"))

    model, tokenizer = from_pretrained(smollm2, load_in_4bit=True, dtype="float32", progress=False)
    base = {name: tensor.read() for name, tensor in merged_tensors(model).items() if name.endswith("proj.weight")}
    save_file(base, tmp_path / "base.safetensors")
    prompts = [prompt_ids(tokenizer, row.prompt) for row in rows]
    request = {"prompts": prompts, "max_new_tokens": demo._MAX_NEW_TOKENS, "batched": True}
    (tmp_path / "in.json").write_text(json.dumps(request))
    answers = {}
    for name, arguments in {
        "peft": (smollm2, "--adapter", finished / "adapter", "--base-weights", tmp_path / "base.safetensors"),
        "merged": (finished / "merged",),
    }.items():
        oracle(
            "hf_generate.py", arguments[0], tmp_path / "in.json", tmp_path / "out.json", *arguments[1:], timeout=3600
        )
        found = json.loads((tmp_path / "out.json").read_text())["tokens"]
        answers[name] = [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]
    want = score(after, rows)
    exact = {name: score(texts, rows) for name, texts in answers.items()}
    same = {
        name: sum(a.strip() == b.strip() for a, b in zip(texts, after, strict=True)) for name, texts in answers.items()
    }
    for name, part in result["llama_cpp"].items():
        assert part["rows"] == len(rows)
        exact[name], same[name] = part["exact"], part["same_as_jax"]
    print(f"right of {len(rows)}: ours {want}, before training {score(before, rows)}, {exact}; same text: {same}")
    assert all(abs(count - want) <= 2 for count in exact.values())
    assert want >= score(before, rows) + 10
    assert all(count == len(rows) for name, count in same.items() if name != "q8_0")


def test_values_are_words_of_one_kind() -> None:
    for train, test in (demo_task._CUSTOMERS, demo_task._ADJECTIVES, demo_task._NOUNS):
        words = [*train.split(), *test.split()]
        assert len(words) == len(set(words))
