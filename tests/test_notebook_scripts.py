"""Scripts in the manner of Unsloth's and TRL's public notebooks, which say at each line what was changed.

They run in a process of their own, with the environment variables MODEL, a small model of the family, and DATA, a
folder of rows.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import tiny

SCRIPTS = Path(__file__).parent / "notebook_scripts"
PAGE = Path(__file__).parents[1] / "docs" / "coming-from-unsloth.md"
# Script -> config.json of its model.
FAMILIES = {
    "llama3_alpaca": {},
    "llama31_conversational": {},
    "mistral_chatml": {"architectures": ["MistralForCausalLM"], "sliding_window": 64},
    "gemma2_trl": {
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 64,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    "phi3_conversational": {"architectures": ["Phi3ForCausalLM"]},
    "qwen25_conversational": {"architectures": ["Qwen2ForCausalLM"]},
    "text_completion": {"architectures": ["MistralForCausalLM"], "sliding_window": None},
    "response_only": {},
    "resume": {},
    "gguf_export": {},
}


def write_data(folder: Path) -> Path:
    """24 rows of four kinds about sums."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows: dict[str, list[dict]] = {"alpaca": [], "sharegpt": [], "messages": [], "stories": []}
    for _ in range(24):
        a, b, c = map(int, rng.integers(1, 50, 3))
        sums = [(f"{a} and {b}?", str(a + b)), (f"And {c} more?", str(a + b + c))]
        rows["alpaca"].append({"instruction": "Add the numbers.", "input": f"{a}, {b}", "output": str(a + b)})
        turns = [(role, text) for pair in sums for role, text in zip(("human", "gpt"), pair, strict=True)]
        rows["sharegpt"].append({"conversations": [{"from": role, "value": text} for role, text in turns]})
        names = {"human": "user", "gpt": "assistant"}
        rows["messages"].append({"messages": [{"role": names[role], "content": text} for role, text in turns]})
        rows["stories"].append({"text": f"Once there were {a} birds. Then {b} came. So there were {a + b} birds. " * 3})
    for name, kind in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kind))
    return folder


@pytest.mark.turns("real models and whole programs")
@pytest.mark.rotate("notebook scripts")
@pytest.mark.parametrize("name", FAMILIES)
def test_script_runs(name, tmp_path):
    hf = tiny.config(max_position_embeddings=2048, **FAMILIES[name])
    model = tiny.write_random(tmp_path / "model", hf)
    tiny.write_tokenizer(model)
    data = write_data(tmp_path / "data")
    environment = {**os.environ, "MODEL": str(model), "DATA": str(data), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPTS.parents[1]), os.environ.get("PYTHONPATH", "")])
    work = tmp_path / "work"
    work.mkdir()
    script = SCRIPTS / f"{name}.py"
    done = subprocess.run(
        [sys.executable, str(script)], cwd=work, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    if name == "gguf_export":
        assert {"lora_model", "model", "model_lora", "gguf", "gguf16"} <= {path.name for path in work.iterdir()}
        assert list((work / "gguf").glob("*.gguf"))
        assert (work / "model_lora" / "adapter_config.json").exists()
    if name == "resume":
        assert [p.name for p in sorted((work / "outputs").glob("checkpoint-*"))] == ["checkpoint-2", "checkpoint-4"]


def changed_lines(script: Path) -> list[tuple[str, str]]:
    """(what the line was, what it is) for every changed line; "" for a line that was left out."""
    lines = script.read_text().splitlines()
    changed = []
    for number, line in enumerate(lines):
        now, found, was = line.partition("# was: ")
        if not found:
            continue
        now = now.strip()
        before = lines[number - 1].strip()
        if not now and (
            before.split("=")[0] == was.split("=")[0] or before == was[0] == ")"
        ):  # it stands under its successor
            now = before
        elif now == ")":  # the end of a call that stands on several lines
            indent = len(line) - len(line.lstrip())
            start = max(
                i for i in range(number) if len(lines[i]) - len(lines[i].lstrip()) == indent and lines[i].strip()
            )
            now = re.sub(r"\s+", " ", " ".join(lines[start:number]).strip() + now).replace("( ", "(").replace(" )", ")")
        changed.append((was.strip(), now))
    return changed


def test_every_script_is_run_and_every_changed_line_is_on_the_page():
    assert {path.stem for path in SCRIPTS.glob("*.py")} == set(FAMILIES)
    page = PAGE.read_text()
    for name in FAMILIES:
        _, found, section = page.partition(f"### {name}.py\n")
        assert found, f"{PAGE.name} has no section on {name}.py"
        section = section.partition("\n### ")[0]
        for was, now in changed_lines(SCRIPTS / f"{name}.py"):
            assert f"- {was}\n" in section and (not now or f"+ {now}\n" in section), (name, was, now)
