"""models/SUPPORT.md says what the tests hold every architecture to; `python -m tests.test_support` writes it."""

import re
from pathlib import Path

from lora_jax.export.gguf_metadata import ARCHITECTURES as IN_GGUF
from lora_jax.models.registry import ARCHITECTURES
from tests.export.test_gguf_families import CONVERTER_TYPES, INEXACT, MODELS
from tests.models.test_families import FAMILIES

ROOT = Path(__file__).parents[1]
SUPPORT = ROOT / "models" / "SUPPORT.md"
HEAD = """# What is tested of each architecture

Written by `python -m tests.test_support`; a test holds it to what the tests run.

* load: logits of random models equal transformers'
* train: gradients of LoRA on every linear layer equal PEFT's, packed rows their documents
* PEFT: adapters have PEFT's names and are read from its folders
* Hugging Face: a saved folder holds the tensors of the source
* GGUF: every tensor, byte for byte, and every field equal those of llama.cpp's own converter, in each of the types
* llama.cpp: it runs the file, with the same logits

What llama.cpp lacks of a model is refused by the export, or announced where the file is of use all the same: windows
that it does not have, and what the last column names.

| architecture | load | train | PEFT | Hugging Face | GGUF | llama.cpp |
| --- | --- | --- | --- | --- | --- | --- |
"""


def table() -> str:
    files = (ROOT / "tests" / "oracles" / name for name in ("families.py", "moe_families.py"))
    classes = dict(
        re.findall(r'^    "([\w-]+)": \("(\w+)", ', "".join(file.read_text() for file in files), re.MULTILINE)
    )
    compared = {classes[family] for family in FAMILIES}
    runs = {architecture for architecture, _ in MODELS.values()}
    notes: dict[str, list[str]] = {}
    for name, (architecture, _, note) in INEXACT.items():
        notes.setdefault(architecture, []).append(f"but {name.split(', ')[1]}: {note}")
    rows = []
    for architecture in ARCHITECTURES:
        cells = ["yes" if architecture in compared else "no"] * 4
        cells.append(", ".join(CONVERTER_TYPES).upper() if architecture in IN_GGUF and architecture in runs else "no")
        cells.append(", ".join(["yes" if architecture in runs else "no", *notes.get(architecture, [])]))
        rows.append(f"| `{architecture}` | {' | '.join(cells)} |\n")
    return HEAD + "".join(rows)


def test_the_support_table_is_up_to_date():
    assert SUPPORT.read_text(encoding="utf-8") == table(), "run `python -m tests.test_support`"


if __name__ == "__main__":
    SUPPORT.write_text(table(), encoding="utf-8")
