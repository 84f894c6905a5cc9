"""Training data: rows from files or data sets, then tokens and labels from rows.

    rows = load_rows("train.jsonl")
    examples = tokenize_rows(rows, tokenizer, max_length=2048)

`lora_jax.batches` makes batches of the examples.
"""

from __future__ import annotations

import itertools
import json
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from lora_jax.batches import Example
from lora_jax.chat import IGNORE, ChatRenderer, Encoder
from lora_jax.chat_templates import as_messages, response_spans
from lora_jax.distributed import agree, gather, gather_arrays, is_first, own_share, several, together

_ROW_KINDS = """  messages             a list of {"role": ..., "content": ...}; optionally `tools`
  conversations        the same, or ShareGPT's {"from": ..., "value": ...}
  instruction + output Alpaca's; optionally `input` and `system`
  prompt + completion  two strings, or two lists of messages
  {text}plain text
  input_ids            already tokenised; optionally `labels` of the same length
Name another column with dataset_text_field, or pass formatting_func=lambda row: "the text of the row"."""

_SUFFIXES = {".jsonl", ".json", ".parquet"}

# What a user should hear about a data set, by key. "n of N rows: " goes before it, the first such row after it.
NOTES = {
    "assistant_first": "conversations begin with an assistant message. It is context only, as no prompt leads to it",
    "drops_content": "conversations lose part of an assistant's content in the chat template (most likely reasoning), "
    "so it is not trained on. Pass a chat_template that keeps it if it should be",
    "no_bos": "conversations do not begin with the BOS token that the tokenizer puts before plain text, because the "
    "chat template does not write it. The template is followed, as at inference",
    "no_end_of_turn": "conversations have an assistant turn that is not trained to end: the chat template writes no "
    "end token inside what is trained on, so the model will not learn to stop. Pass a chat_template that ends "
    "assistant turns with the end-of-turn token (inside {% generation %} if it has that)",
    "no_eos": "texts do not end with an end token, because the tokenizer has no eos_token, so the model will not learn "
    "to stop. Set tokenizer.eos_token",
    "straddles": "texts have a token that holds the end of a prompt and the start of its response; that token is not "
    "trained on. Move a space at the end of a prompt to the start of its completion; remove whitespace that an "
    "assistant's content begins with",
    "split": "conversations become one example per assistant turn, because the chat template does not keep earlier "
    "turns as the model wrote them (it drops their reasoning, for example)",
    "no_response": "rows hold something with nothing to train on (no assistant turn, an empty text), which was dropped",
}


# ---- rows ---------------------------------------------------------------------------------------------------------


def load_rows(source: Any, *, split: str = "train", limit: int | None = None) -> Sequence[dict[str, Any]]:
    """Rows of a data set as dicts.

    Args:
      source: a `.jsonl`, `.json` (an array of objects, or lines) or `.parquet` file; a list of such files; a folder of
        them (those named after the split, `train*`, if there are any); a `datasets.Dataset`, `IterableDataset` or
        `DatasetDict`; or any iterable of dicts.
      split: which part to take of a folder or a `DatasetDict`.
      limit: at most so many rows; needed for iterables that do not end.

    Returns:
      A list of rows, or the `datasets.Dataset` itself (which reads from disk as it is indexed).

    Raises:
      FileNotFoundError: no such file, or no data file in the folder.
      ValueError: a malformed file (with its line), no rows, or rows that are not dicts.
    """
    if isinstance(source, Mapping):  # DatasetDict is a dict of splits
        if split not in source:
            raise ValueError(f"the data set has no split {split!r}; it has {sorted(map(str, source))}. Pass split=...")
        source = source[split]
    files = _files_of(source, split)
    if files is not None:
        rows: Any = list(itertools.islice(itertools.chain.from_iterable(map(_read_file, files)), limit))
        origin = ", ".join(str(f) for f in files[:3]) + (", ..." if len(files) > 3 else "")
    elif hasattr(source, "column_names") and hasattr(source, "select"):  # datasets.Dataset: stays on disk
        rows = source if limit is None else source.select(range(min(limit, len(source))))
        origin = "the data set"
    elif isinstance(source, Iterable):
        rows = list(itertools.islice(source, limit))
        origin = "the data set"
        for index, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise ValueError(
                    f"row {index} (the first is 0) is {_short(row)} of type {type(row).__name__}; wanted a dict "
                    'such as {"messages": [...]}. Plain strings can be given as [{"text": s} for s in strings].'
                )
    else:
        raise ValueError(
            f"cannot read rows from {type(source).__name__}; wanted a path, a data set or an iterable of dicts."
        )
    if not len(rows):
        raise ValueError(f"{origin} is empty: it has no rows, so there is nothing to train on.")
    return rows


def _files_of(source: Any, split: str) -> list[Path] | None:
    """The data files that `source` names, in order; None if it is not a path or a list of paths."""
    if isinstance(source, (str, Path)):
        sources = [Path(source)]
    elif isinstance(source, (list, tuple)) and source and all(isinstance(s, (str, Path)) for s in source):
        sources = [Path(s) for s in source]
    else:
        return None
    files: list[Path] = []
    for path in sources:
        if path.is_dir():
            found = sorted(f for f in path.rglob("*") if f.suffix in _SUFFIXES and f.is_file())
            named = [f for f in found if f.name.startswith(split)]
            if not found or (split != "train" and not named):
                wanted = f"{split}*.jsonl, .json or .parquet" if found else ".jsonl, .json or .parquet"
                raise FileNotFoundError(f"no {wanted} file in the folder {path}; it holds {_listing(path)}.")
            files += named or found
        elif not path.exists():
            hint = ""
            if path.parent.is_dir() and path.parent != Path("."):
                hint = f" Its folder holds {_listing(path.parent)}."
            elif not path.suffix:
                hint = f' For a data set of the Hugging Face hub pass datasets.load_dataset("{path}", split="{split}").'
            raise FileNotFoundError(f"no such data file or folder: {path}.{hint}")
        elif path.suffix not in _SUFFIXES:
            raise ValueError(
                f"{path}: cannot read {path.suffix or 'files without a suffix'}; wanted .jsonl, .json or .parquet."
            )
        else:
            files.append(path)
    return files


def _read_file(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
    elif path.suffix == ".json" and _first_character(path) == "[":
        yield from _read_json_array(path)
    else:
        yield from _read_json_lines(path)


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from error


def _read_json_array(path: Path) -> Iterator[dict[str, Any]]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}.") from error
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}: element {index} of the array is {_short(row)}; wanted an object such as {_SAMPLE}."
            )
        yield row


_SAMPLE = '{"prompt": "...", "completion": "..."}'


def _read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Our own reader, because line numbers must be those of the file and only \\n ends a line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                row = json.loads(text)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not UTF-8 text ({error.reason} at byte {error.start})."
                ) from error
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not valid JSON ({error.msg}, column {error.colno}); the line starts with "
                    f"{_short(text.strip())}. Wanted one whole JSON object per line, such as {_SAMPLE}."
                ) from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}, line {number}: {_short(text.strip())} is not a JSON object; wanted one object per line, "
                    f"such as {_SAMPLE}."
                )
            yield row


def _first_character(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(4096).decode("utf-8-sig", "ignore").lstrip()[:1]


def _listing(folder: Path) -> str:
    names = sorted(f.name for f in folder.iterdir())
    return (", ".join(names[:8]) + (", ..." if len(names) > 8 else "")) or "nothing"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return repr(text[:60] + ("..." if len(text) > 60 else ""))


# ---- tokens -------------------------------------------------------------------------------------------------------


def tokenize_rows(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_length: int,
    dataset_text_field: str = "text",
    formatting_func: Callable[[Mapping[str, Any]], str] | None = None,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool | None = None,
    chat_template: str | None = None,
    responses: tuple[str, str] | None = None,
    last_response_only: bool = False,
    share_out: bool = False,
    progress: bool = True,
) -> list[Example]:
    """Tokens and labels of every row.

    What a row is, is seen from its columns: `input_ids` (+ `labels`), `messages` (+ `tools`, `chat_template_kwargs`),
    `prompt` + `completion`, or `dataset_text_field`; where there is none of these, ShareGPT's `conversations`, or
    Alpaca's `instruction` (+ `input`, `system`) and `output`, which become messages. Conversations follow the
    tokenizer's chat template, special tokens included; other texts get the BOS that the tokenizer adds, and end with
    EOS.

    Args:
      rows: what `load_rows` gives.
      tokenizer: a fast transformers tokenizer.
      max_length: examples are cut to so many tokens on the right.
      dataset_text_field: the column of plain text.
      formatting_func: makes the text of a row; the row's columns then do not matter. One that takes a batch of rows
        and returns a list of texts, as older scripts have it, is called with batches of one.
      completion_only_loss: train on the completions of prompt + completion rows only. None: yes.
      assistant_only_loss: train on the assistant's turns of conversations only. None: yes for `messages`.
      chat_template: a Jinja template in place of the tokenizer's. Set it as tokenizer.chat_template too, so that
        inference and exports use the same.
      responses: (instruction_part, response_part): train on what follows the second, up to the next of the first, in
        the text of every row; see `lora_jax.chat_templates.train_on_responses_only`.
      last_response_only: with `responses`, train on the last one of a row only.
      share_out: where there are several processes (`lora_jax.distributed`), each tokenises its share of the rows and
        has the other examples from the others. All must call this, with the same rows in a sequence.
      progress: show a progress bar.

    Returns:
      At least one example; a conversation whose template drops earlier reasoning gives one for each assistant turn.
      Rows with nothing (left) to train on are dropped, with a warning that counts them.

    Raises:
      ValueError: a row that cannot be used (it is named), or no example is left; or processes have other rows.
      ProcessError: with `share_out`, another process has found a row that cannot be used.
    """
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}; wanted at least 2 (a token is predicted from those before it).")
    tokenize = _RowTokenizer(
        tokenizer, dataset_text_field, formatting_func, completion_only_loss, assistant_only_loss, chat_template
    )
    if responses is not None:
        tokenize.responses = (*responses, last_response_only)
    if share_out and several():
        assert isinstance(rows, Sequence) or hasattr(rows, "__getitem__")
        examples, report = _tokenize_together(rows, tokenize, max_length, progress)  # pyright: ignore[reportArgumentType]
    else:
        count = len(rows) if isinstance(rows, Sized) else None
        examples, report = _tokenize(enumerate(rows), count, tokenize, max_length, progress)
    report.finish(len(examples))
    return examples


def _tokenize(
    rows: Iterable[tuple[int, Mapping[str, Any]]],
    count: int | None,
    tokenize: _RowTokenizer,
    max_length: int,
    progress: bool,
) -> tuple[list[Example], _Report]:
    """Examples of so many numbered rows, and what is to be said of them."""
    examples: list[Example] = []
    report = _Report(max_length)
    shown: Any = dict(console=Console(stderr=True), transient=True, disable=not progress)
    for index, row in track(rows, "Tokenising", count, **shown):
        try:
            encoded = tokenize(row)
        except ValueError as error:
            raise ValueError(f"row {index} (the first is 0): {error}") from error
        examples += report.keep(index, encoded)
    return examples, report


def _tokenize_together(
    rows: Sequence[Mapping[str, Any]], tokenize: _RowTokenizer, max_length: int, progress: bool
) -> tuple[list[Example], _Report]:
    """The same of all processes' shares of the rows, in the order of the rows."""
    some = [dict(rows[int(i)]) for i in np.linspace(0, len(rows) - 1, min(len(rows), 64))]  # all would take long
    text = json.dumps(some, skipkeys=True, default=lambda value: type(value).__name__)
    agree("data", {"rows": len(rows), "crc32 of some rows": zlib.crc32(text.encode())})
    with together("tokenising the data"):
        share = own_share(len(rows))
        numbered = ((i, rows[i]) for i in share)
        mine, report = _tokenize(numbered, len(share), tokenize, max_length, progress and is_first())
    # What was exchanged are arrays: lengths, then tokens of all, then which of them are trained on.
    lengths = gather_arrays(np.array([len(example) for example in mine], np.int32))
    ids = gather_arrays(_joined([example.input_ids for example in mine]))
    labels = gather_arrays(_joined([example.labels for example in mine]))
    examples = []
    for each, *arrays in zip(lengths, ids, labels, strict=True):
        split = (np.split(array, np.cumsum(each)[:-1]) if len(each) else [] for array in arrays)
        examples += [Example(*pair) for pair in zip(*split, strict=True)]
    return examples, _Report.of(max_length, gather(report.numbers()))


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int32), *arrays])


class _RowTokenizer:
    def __init__(self, tokenizer, text_field, formatting_func, completion_only, assistant_only, chat_template):
        self._tokenizer, self._text_field, self._format = tokenizer, text_field, formatting_func
        self._completion_only, self._assistant_only = completion_only, assistant_only
        self._chat_template = chat_template
        self._has_template = bool(chat_template or getattr(tokenizer, "chat_template", None))
        self.responses: tuple[str, str, bool] | None = None  # of `response_spans`
        self._encoder: Encoder | None = None
        self._renderer: ChatRenderer | None = None

    def __call__(self, row: Mapping[str, Any]) -> list[tuple[Example, frozenset[str]]]:
        row = row if self._format else _with_messages(row, self._text_field, self._has_template)
        kind = "text" if self._format else self._kind(row)
        if self._completion_only and kind != "prompt":
            raise ValueError(
                "completion_only_loss=True is for rows of prompt + completion, and this row has no completion."
            )
        if self._assistant_only and not (
            kind == "messages" or (kind == "prompt" and not isinstance(row["prompt"], str))
        ):
            raise ValueError("assistant_only_loss=True is for rows of messages, and this row is not a conversation.")
        if kind == "input_ids":
            if self.responses is not None:
                raise ValueError("rows of input_ids have labels of their own, and no text to find responses in.")
            return [(_tokenised(row), frozenset())]
        if kind == "messages":
            return self._chat(row, _messages(row["messages"], "messages"), 0, self._assistant_only is not False)
        if kind == "prompt":
            return self._prompt_completion(row)
        text = self._formatted(row) if self._format else row[self._text_field]
        if not isinstance(text, str):
            of = "formatting_func returned" if self._format else f"the column {self._text_field!r} holds"
            raise ValueError(f"{of} {_short(text)} of type {type(text).__name__}; wanted one string.")
        return self._text(text)

    def _formatted(self, row: Mapping[str, Any]) -> Any:
        """The text that formatting_func makes of a row; one that wants a batch gets a batch of one."""
        failed = None
        try:
            text = self._format(row)
        except Exception as error:
            text, failed = [], error
        if not isinstance(text, list):
            return text
        try:
            texts = self._format({name: [value] for name, value in row.items()})
        except Exception:
            texts = text
        if isinstance(texts, list) and len(texts) == 1 and isinstance(texts[0], str):
            return texts[0]
        if failed is not None:
            raise failed
        return text

    def _kind(self, row: Mapping[str, Any]) -> str:
        have = {name for name, value in row.items() if value is not None}
        if "input_ids" in have:
            return "input_ids"
        kinds = ["messages"] * ("messages" in have) + ["prompt"] * ({"prompt", "completion"} <= have)
        kinds += ["text"] * (self._text_field in have)
        if len(kinds) == 1:
            return kinds[0]
        if kinds:
            names = {"messages": "`messages`", "prompt": "`prompt` + `completion`", "text": f"`{self._text_field}`"}
            raise ValueError(
                f"it has {' and '.join(names[k] for k in kinds)}; which is to be trained on? Remove the other columns."
            )
        accepted = _ROW_KINDS.replace("{text}", f"{self._text_field:<21}")
        raise ValueError(f"its columns are {sorted(map(str, have)) or 'all empty'}; wanted one of\n{accepted}")

    def _prompt_completion(self, row: Mapping[str, Any]) -> list[tuple[Example, frozenset[str]]]:
        prompt, completion = row["prompt"], row["completion"]
        only = self._completion_only is not False
        if isinstance(prompt, str) and isinstance(completion, str):
            text = prompt + completion
            return self._text(text, [(len(prompt), len(text))] if only and prompt else None)
        if isinstance(prompt, str) or isinstance(completion, str):
            raise ValueError(
                f"prompt is {type(prompt).__name__} and completion is {type(completion).__name__}; wanted two strings "
                "or two lists of messages."
            )
        messages = _messages(prompt, "prompt")
        first_turn = len(messages) if only else 0
        return self._chat(
            row, messages + _messages(completion, "completion"), first_turn, only or bool(self._assistant_only)
        )

    def _text(self, text: str, spans: list[tuple[int, int]] | None = None):
        if self.responses is not None:
            spans = response_spans(text, *self.responses)
        encoded = self._encode().encode_text(text, spans)
        return [(Example(encoded.input_ids, encoded.labels), encoded.notes)]

    def _chat(self, row: Mapping[str, Any], messages: list[dict], first_turn: int, assistant_only: bool):
        if self._renderer is None:
            self._renderer = ChatRenderer(self._tokenizer, self._chat_template)
        tools = row.get("tools")
        if isinstance(tools, str):
            tools = json.loads(tools)
        chats = self._renderer.training_texts(
            messages,
            tools=tools or None,
            first_turn=first_turn,
            assistant_only=assistant_only and self.responses is None,
            **(row.get("chat_template_kwargs") or {}),
        )
        if self.responses is not None:
            found = tuple(response_spans(chats[0].text, *self.responses))
            chats = [replace(chats[0], spans=found, exact=True)]
        encoded = [self._encode().encode_chat(chat) for chat in chats]
        split = {"split"} if len(encoded) > 1 else set()
        return [(Example(e.input_ids, e.labels), e.notes | split) for e in encoded]

    def _encode(self) -> Encoder:
        if self._encoder is None:
            self._encoder = Encoder(self._tokenizer)
        return self._encoder


def _with_messages(row: Mapping[str, Any], text_field: str, has_template: bool) -> Mapping[str, Any]:
    """The row with `messages`, if it has none of the usual columns but those of ShareGPT or Alpaca.

    Without a chat template Alpaca's become `prompt` and `completion` in the format of its paper's code.
    """
    have = {name for name, value in row.items() if value is not None}
    if have & {"input_ids", "messages", text_field} or {"prompt", "completion"} <= have:
        return row
    if column := next((name for name in ("conversations", "conversation") if name in have), None):
        return {**row, "messages": as_messages(row[column], column)}
    if {"instruction", "output"} <= have:
        system, question = row.get("system"), row["instruction"]
        if not has_template:
            return {**row, "prompt": _alpaca_prompt(question, row.get("input")), "completion": row["output"]}
        if row.get("input"):
            question = f"{question}\n\n{row['input']}"
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
        return {**row, "messages": messages}
    return row


def _alpaca_prompt(instruction: str, context: str | None) -> str:
    beside = ", paired with an input that provides further context" if context else ""
    parts = {"Instruction": instruction, "Input": context, "Response": ""}
    return (
        f"Below is an instruction that describes a task{beside}. Write a response that appropriately completes the "
        "request.\n\n" + "\n\n".join(f"### {name}:\n{text}" for name, text in parts.items() if text is not None and
                                       (text or name == "Response"))
    )  # fmt: skip


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(
            f"the column {column!r} holds {_short(value)} ({type(value).__name__}); wanted a list of at least one "
            '{"role": "user", "content": "..."}.'
        )
    for index, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f'message {index} of {column!r} is {_short(message)}; wanted {{"role": "...", "content": "..."}}.'
            )
        if message.get("content") is None and not message.get("tool_calls"):
            raise ValueError(f"message {index} of {column!r} (role {message['role']!r}) has no content.")
    return [_with_text(message) for message in value]


def _with_text(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message, its content in OpenAI's parts put together. Raises ValueError if one is no text."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    if other := [part for part in content if not isinstance(part, Mapping) or part.get("type") != "text"]:
        raise ValueError(f"a message holds {_short(other[0])}; only parts of text can be trained on.")
    return {**message, "content": "".join(part["text"] for part in content)}


def _tokenised(row: Mapping[str, Any]) -> Example:
    ids = np.asarray(row["input_ids"])
    labels = ids if row.get("labels") is None else np.asarray(row["labels"])
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or labels.shape != ids.shape:
        raise ValueError(
            f"input_ids of shape {ids.shape} ({ids.dtype}) and labels of shape {labels.shape}; wanted two lists of "
            "integers of the same length."
        )
    wrong = np.flatnonzero((labels != IGNORE) & (labels != ids))
    if len(wrong):
        raise ValueError(
            f"labels[{wrong[0]}] is {labels[wrong[0]]} where input_ids has {ids[wrong[0]]}; wanted the same token or "
            "-100. Labels are not shifted: the model does that."
        )
    labels = labels.astype(np.int32)
    labels[:1] = IGNORE
    return Example(ids.astype(np.int32), labels)


class _Report:
    """Cuts examples to length, drops those with nothing to train on, and says so."""

    def __init__(self, max_length: int):
        self.max_length = max_length
        self.rows = self.examples = self.longest = self.cut = self.lost = 0
        self.notes: Counter[str] = Counter()
        self.first: dict[str, int] = {}

    def keep(self, index: int, encoded: list[tuple[Example, frozenset[str]]]) -> list[Example]:
        self.rows += 1
        self.examples += len(encoded)
        kept, notes = [], set()
        for example, its_notes in encoded:
            notes |= its_notes
            long = len(example) > self.max_length
            self.longest = max(self.longest, len(example))
            self.cut += long
            if not (example.labels != IGNORE).any():
                notes.add("no_response")
                continue
            if long:
                example = Example(example.input_ids[: self.max_length], example.labels[: self.max_length])
                if not (example.labels != IGNORE).any():
                    self.lost += 1
                    continue
            kept.append(example)
        self.notes.update(notes)
        for note in notes:
            self.first.setdefault(note, index)
        return kept

    def numbers(self) -> dict[str, Any]:
        """What it has counted, as JSON can hold it."""
        return {**vars(self), "notes": dict(self.notes)}

    @classmethod
    def of(cls, max_length: int, parts: Sequence[Mapping[str, Any]]) -> _Report:
        """The report of all rows from those of their parts."""
        whole = cls(max_length)
        for part in parts:
            for name in ("rows", "examples", "cut", "lost"):
                setattr(whole, name, getattr(whole, name) + part[name])
            whole.longest = max(whole.longest, part["longest"])
            whole.notes.update(part["notes"])
            for note, index in part["first"].items():
                whole.first.setdefault(note, index)  # parts are in the order of the rows
        return whole

    def finish(self, kept: int) -> None:
        """Raises if nothing is left, else warns of what was done."""
        if not self.rows:
            raise ValueError("the data set is empty: it has no rows, so there is nothing to train on.")
        if not kept:
            raise ValueError(
                f"nothing to train on: of {self.examples} examples from {self.rows} rows, {self.lost} lost their "
                f"whole response when cut to max_length={self.max_length} (the longest has {self.longest} tokens), "
                f"and {self.examples - self.lost} have no token with a label. Raise max_length or shorten the prompts "
                "in the first case; in the second, check that rows have an assistant turn or a completion."
            )
        if self.cut:
            lost = f" {self.lost} of them lost their whole response and were dropped." if self.lost else ""
            warnings.warn(
                f"{self.cut} of {self.examples} examples are longer than max_length={self.max_length} (the longest has "
                f"{self.longest} tokens) and were cut on the right.{lost} Raise max_length, or shorten the rows.",
                stacklevel=3,
            )
        for note, n in sorted(self.notes.items()):
            warnings.warn(f"{n} of {self.rows} rows: {NOTES[note]} (first: row {self.first[note]}).", stacklevel=3)
