"""Whether what was exported is what was meant: tensors read back from the files, and answers to fixed prompts.

The answer is the distribution of the next token. Its distance to that of the trained model (base and adapter, as it
is in memory) is the mean of KL(trained || exported) over the prompts, in nats. Rounding makes it 0.001 with 16 bits to
0.1 with 4; a file whose rows are permuted, whose tokenizer is another, or that was merged twice is off by several.
"""

import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from rich.table import Table
from safetensors import SafetensorError, safe_open

from lora_jax.export.safetensors_writer import Contents, in_rows
from lora_jax.guards import is_out_of_memory

if TYPE_CHECKING:
    from lora_jax.model import CausalLM

__all__ = ["Answers", "Check", "answers_of", "check_folder", "check_gguf", "check_tensors", "limit_of", "table"]

_PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time, in a village between two rivers, there lived a",
    "1, 1, 2, 3, 5, 8, 13,",
)
_QUESTION = "Name three colours of the rainbow."
# Mean KL in nats that rounding to 32, 16 and 8 bits a weight may make; about five times what SmolLM2-135M shows, a
# small model, which rounding harms more than large ones.
_LIMITS = {"f32": 1e-4, "f16": 0.05, "bf16": 0.05, "q8_0": 0.1}
# With fewer bits it depends on the model: shares of the distance between answers to different prompts, by the bits.
_SHARES = {"6": 0.1, "5": 0.15, "4": 0.3, "3": 0.5, "2": 0.8}


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the table."""

    target: str
    what: str  # was compared
    found: str
    limit: str = ""
    passed: bool | None = True  # None: could not be done


@dataclasses.dataclass(frozen=True)
class Answers:
    """Prompts, and a model's log-probabilities of the token after each."""

    ids: list[list[int]]
    log_probs: np.ndarray  # float64 [prompts, V], normalised

    def distance(self, others: np.ndarray) -> float:
        """Mean of KL(these || others), of log-probabilities [prompts, V]."""
        others = _normalised(others)
        return float(np.mean(np.sum(np.exp(self.log_probs) * (self.log_probs - others), axis=-1)))

    @property
    def unrelated(self) -> float:
        """Mean distance of the answers to different prompts."""
        return float(np.mean([self.distance(np.roll(self.log_probs, i, axis=0)) for i in range(1, len(self.ids))]))


def answers_of(model: "CausalLM", tokenizer: Any) -> Answers:
    """What the model says after the fixed prompts, one of them in the chat template if there is one."""
    from lora_jax.generation import prompt_ids

    ids = [prompt_ids(tokenizer, text) for text in _PROMPTS]
    if tokenizer.chat_template:
        ids.append(prompt_ids(tokenizer, [{"role": "user", "content": _QUESTION}]))
    return Answers(ids, _log_probs(model, ids))


def _log_probs(model: "CausalLM", ids: Sequence[Sequence[int]]) -> np.ndarray:
    length = max(map(len, ids))
    padded = np.array([[*row, *[0] * (length - len(row))] for row in ids])
    mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in ids])
    logits = model.logits(padded, mask)
    return _normalised(np.stack([np.asarray(row[len(i) - 1]) for row, i in zip(logits, ids, strict=True)]))


def _normalised(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def limit_of(kind: str, trained: Answers, *, exact: bool, same_base: bool) -> float:
    """Nats that an export may differ by.

    Args:
      kind: a type of GGUF file, or "4" for NF4.
      trained: the model's own answers.
      exact: they were computed in float32.
      same_base: the adapter was merged into the weights that it was trained on, which differ from the original ones by
        the error of NF4.
    """
    limit = _LIMITS.get(kind) or _SHARES[next(c for c in kind if c.isdigit())] * trained.unrelated
    if not exact:
        limit = max(limit, _LIMITS["bf16"])
    return limit if same_base else limit + _SHARES["4"] * trained.unrelated


def check_tensors(target: str, folder: Path, contents: Contents) -> Check:
    """Every tensor of a folder's safetensors against the values that were to be written, bit for bit."""
    wrong, seen = [], set()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy", backend="pread") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    seen.add(name)
                    if name not in contents.shapes or not _same(in_rows(opened, name), contents, name):
                        wrong.append(name)
        except SafetensorError as error:
            return Check(target, "tensors", f"{file.name} cannot be read: {error}", "", False)
    wrong += sorted(set(contents.shapes) - seen)
    found = f"{len(seen)} equal" if not wrong else f"{len(wrong)} of {len(seen)} differ: {', '.join(wrong[:3])}"
    return Check(target, "tensors", found, "bit for bit", not wrong)


def _same(got: Iterator[np.ndarray], contents: Contents, name: str) -> bool:
    """Whether two streams of rows, cut in different places, hold the same bytes."""
    rest = np.empty(0, np.uint8)
    for block in contents.blocks(name):
        if block.dtype != contents.dtypes[name]:
            return False
        want = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
        while rest.size < want.size:
            more = next(got, None)
            if more is None or more.dtype != contents.dtypes[name]:
                return False
            more = np.ascontiguousarray(more).reshape(-1).view(np.uint8)
            rest = np.concatenate([rest, more]) if rest.size else more
        if not np.array_equal(rest[: want.size], want):
            return False
        rest = rest[want.size :]
    return rest.size == 0 and next(got, None) is None


def check_folder(target: str, folder: Path, trained: Answers, dtype: str, *, nf4: bool, limit: float) -> Check:
    """The answers of a Hugging Face folder, loaded again."""
    from lora_jax.loading import load

    options: Any = dict.fromkeys(("max_seq_length", "mesh", "revision", "token"))
    options |= {"offload_embedding": False, "offload_head": False, "offload_layers": False}
    try:
        model, _ = load(
            folder,
            with_tokenizer=False,
            load_in_4bit=nf4,
            double_quantize=True,
            dtype=dtype,
            progress=False,
            **options,
        )
        distance = trained.distance(_log_probs(model, trained.ids))
    except MemoryError:
        return Check(target, "answers", "it does not fit beside the trained model", "", None)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return Check(target, "answers", "it does not fit beside the trained model", "", None)
    return _distance(target, "answers", distance, limit)


def check_gguf(target: str, path: Path, trained: Answers, *, lora: Path | None = None, limit: float) -> Check:
    """The answers of llama.cpp with a GGUF file."""
    from lora_jax.export.llamacpp import LlamaCpp

    what = "answers, llama.cpp"
    if importlib.util.find_spec("xllamacpp") is None:
        return Check(target, what, "not asked: pip install 'lora-jax[demo]'", "", None)
    try:
        with LlamaCpp(path, trained.log_probs.shape[1], lora=lora) as server:
            theirs = np.stack([server.logprobs(ids) for ids in trained.ids])
    except RuntimeError as error:
        return Check(target, what, str(error).strip().splitlines()[-1], "", False)
    return _distance(target, what, trained.distance(theirs), limit)


def _distance(target: str, what: str, distance: float, limit: float) -> Check:
    passed = bool(abs(distance) <= limit)  # NaN is not
    return Check(target, what, f"{distance:.2g} nats", f"{limit:.2g}", passed)


def table(checks: Sequence[Check], sizes: Mapping[str, int]) -> Table:
    """What was compared, for the user.

    Args:
      checks: the lines.
      sizes: bytes of each target.
    """
    out = Table("export", "MB", "compared", "found", "allowed", "", title="Exports against the trained model")
    out.columns[1].justify = "right"
    said = set()
    for check in checks:
        mark = {True: "[green]ok[/]", False: "[red]WRONG[/]", None: "[yellow]not checked[/]"}[check.passed]
        size = "" if check.target in said else f"{sizes.get(check.target, 0) / 1e6:,.1f}"
        target = "" if check.target in said else check.target
        said.add(check.target)
        out.add_row(target, size, check.what, check.found, check.limit, mark)
    return out
