"""Reading rows, what a row may be, truncation, batches, packing and resuming."""

import itertools
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_jax.batches import (
    BatchIterator,
    Example,
    bucket_lengths,
    eval_batches,
    pack,
    pack_batch,
    packing_efficiency,
    pad_batch,
)
from lora_jax.chat import IGNORE
from lora_jax.data import load_rows, tokenize_rows

ROWS = [{"prompt": f"question {i}?", "completion": f" answer {i} é\u2028"} for i in range(5)]


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte and an end token: lengths can be counted by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    made.chat_template = (
        "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    )
    return made


def tokens(rows, tokenizer, max_length=99, **options):
    return tokenize_rows(rows, tokenizer, max_length=max_length, progress=False, **options)


def labelled(example, tokenizer):
    return tokenizer.decode(example.labels[example.labels != IGNORE])


def random_examples(n, low=2, high=60, seed=0):
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(n):
        ids = rng.integers(1, 1000, rng.integers(low, high)).astype(np.int32)
        labels = np.where(rng.random(len(ids)) < 0.6, ids, IGNORE).astype(np.int32)
        labels[0] = IGNORE
        examples.append(Example(ids, labels))
    return examples


# ---- rows ----


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def test_every_source_gives_the_same_rows(tmp_path):
    jsonl = write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "b.json").write_text(json.dumps(ROWS), encoding="utf-8-sig")
    (tmp_path / "lines.json").write_bytes(jsonl.read_bytes().replace(b"\n", b"\r\n\r\n"))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "c.parquet")
    dataset = datasets.Dataset.from_list(ROWS)
    sources = [
        jsonl,
        str(jsonl),
        tmp_path / "b.json",
        tmp_path / "lines.json",
        tmp_path / "c.parquet",
        dataset,
        datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}),
        dataset.to_iterable_dataset(),
        ROWS,
        (row for row in ROWS),
    ]
    for source in sources:
        assert list(load_rows(source)) == ROWS
    assert load_rows([jsonl, tmp_path / "c.parquet"]) == ROWS + ROWS
    assert load_rows(sources[6], split="test")[0] == ROWS[0]
    for source in (jsonl, dataset, itertools.cycle(ROWS)):
        assert list(load_rows(source, limit=3)) == ROWS[:3]


def test_folder_and_its_splits(tmp_path):
    write_jsonl(tmp_path / "train-1.jsonl", ROWS[2:])
    write_jsonl(tmp_path / "train-0.jsonl", ROWS[:2])
    write_jsonl(tmp_path / "test.jsonl", ROWS[:1])
    assert load_rows(tmp_path) == ROWS
    assert load_rows(tmp_path, split="test") == ROWS[:1]
    with pytest.raises(FileNotFoundError, match=r"no validation\*\.jsonl.*holds test\.jsonl, train-0\.jsonl"):
        load_rows(tmp_path, split="validation")
    plain = tmp_path / "plain"
    plain.mkdir()
    with pytest.raises(FileNotFoundError, match="no .jsonl, .json or .parquet file in the folder.*holds nothing"):
        load_rows(plain)
    write_jsonl(plain / "data.jsonl")
    assert load_rows(plain) == ROWS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            b'{"prompt": "a", "completion": }',
            r"bad\.jsonl, line 4: not valid JSON .*column 31.*starts with '\{\"prompt",
        ),
        (b'["a", "b"]', r"bad\.jsonl, line 4: .*is not a JSON object; wanted one object per line"),
        (b'{"text": "\xff"}', r"bad\.jsonl, line 4: not UTF-8 text"),
        (b"{" + b"x" * 1000, r"line 4: .*starts with '\{x{59}\.\.\.'"),
    ],
)
def test_malformed_lines_are_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n{"text": "a\xe2\x80\xa8b"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=message):
        load_rows(path)


def test_malformed_files(tmp_path):
    broken = tmp_path / "x.json"
    broken.write_text('[{"text": "a"},\n {"text": }]')
    with pytest.raises(ValueError, match=r"x\.json, line 2, column 11: not valid JSON"):
        load_rows(broken)
    broken.write_text('[{"text": "a"}, 3]')
    with pytest.raises(ValueError, match=r"element 1 of the array is '3'"):
        load_rows(broken)
    parquet = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), parquet)
    parquet.write_bytes(parquet.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"x\.parquet: not a readable Parquet file"):
        load_rows(parquet)
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"cannot read \.csv; wanted \.jsonl, \.json or \.parquet"):
        load_rows(tmp_path / "x.csv")
    with pytest.raises(FileNotFoundError, match=r"no such data file or folder: .*y\.jsonl.*holds x\.csv, x\.json"):
        load_rows(tmp_path / "y.jsonl")
    with pytest.raises(FileNotFoundError, match=r'datasets\.load_dataset\("some/name", split="train"\)'):
        load_rows("some/name")


def test_empty_and_wrong_sources(tmp_path):
    (tmp_path / "none.jsonl").write_text("\n\n")
    for source in (tmp_path / "none.jsonl", [], datasets.Dataset.from_list([]), iter(())):
        with pytest.raises(ValueError, match="is empty: it has no rows"):
            load_rows(source)
    with pytest.raises(ValueError, match=r"row 1 .*is 'b' of type str; wanted a dict"):
        load_rows(iter([{"text": "a"}, "b"]))
    with pytest.raises(ValueError, match=r"no split 'train'; it has \['test'\]"):
        load_rows({"test": ROWS})
    with pytest.raises(ValueError, match="cannot read rows from int"):
        load_rows(3)


# ---- tokens ----


def test_kinds_of_rows(tokenizer):
    rows = [
        {"text": "abc"},
        {"prompt": "ab", "completion": "cd"},
        {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]},
        {"input_ids": [5, 6, 7], "labels": [-100, -100, 7], "text": "its source"},
        {"input_ids": [5, 6, 7]},
        {"prompt": "ab", "completion": "cd", "messages": None},  # as datasets fills rows of different kinds
    ]
    examples = tokens(rows, tokenizer)
    assert [tokenizer.decode(e.input_ids) for e in examples[:3]] == ["abc<e>", "abcd<e>", "u:ab<e>a:cd<e>"]
    # No BOS here, so the first token of a plain text has nothing to be predicted from.
    assert [labelled(e, tokenizer) for e in examples[:3]] == ["bc<e>", "cd<e>", "cd<e>"]
    assert examples[3].labels.tolist() == [-100, -100, 7] and examples[4].labels.tolist() == [-100, 6, 7]
    assert labelled(examples[5], tokenizer) == "cd<e>"
    assert all(e.input_ids.dtype == e.labels.dtype == np.int32 for e in examples)


def test_options(tokenizer):
    (example,) = tokens([{"body": "abc<e>"}], tokenizer, dataset_text_field="body")
    assert tokenizer.decode(example.input_ids) == "abc<e>"  # no second end token
    (example,) = tokens([{"a": "x", "b": "y"}], tokenizer, formatting_func=lambda row: row["a"] + row["b"])
    assert tokenizer.decode(example.input_ids) == "xy<e>"
    (example,) = tokens([{"prompt": "ab", "completion": "cd"}], tokenizer, completion_only_loss=False)
    assert labelled(example, tokenizer) == "bcd<e>"
    (example,) = tokens([{"prompt": "", "completion": "cd"}], tokenizer)
    assert labelled(example, tokenizer) == "d<e>"
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    (example,) = tokens([{"messages": messages}], tokenizer, assistant_only_loss=False)
    assert labelled(example, tokenizer) == ":ab<e>a:cd<e>"
    (example,) = tokens(
        [{"messages": messages}], tokenizer, chat_template="{{ messages[0].content }}", assistant_only_loss=False
    )
    assert tokenizer.decode(example.input_ids) == "ab"


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {"question": "a", "answer": "b"},
            {},
            r"columns are \['answer', 'question'\]; wanted one of\n  messages (?s:.*)text  +plain",
        ),
        ({"question": "a"}, {"dataset_text_field": "body"}, r"\n  body  +plain text"),
        ({"conversations": [{"speaker": "human", "text": "a"}]}, {}, "message 0 of conversations is .*wanted .*from"),
        ({"prompt": "a"}, {}, r"columns are \['prompt'\]"),
        ({"text": "a", "messages": []}, {}, "has `messages` and `text`; which is to be trained on"),
        ({"text": 3}, {}, "column 'text' holds '3' of type int; wanted one string"),
        ({"a": 1}, {"formatting_func": lambda row: ["x", "y"]}, r"formatting_func returned .* of type list"),
        ({"messages": []}, {}, r"column 'messages' holds '\[\]' \(list\); wanted a list of at least one"),
        ({"messages": "hello"}, {}, "column 'messages' holds 'hello'"),
        ({"messages": [{"from": "user"}]}, {}, r'message 0 of \'messages\' is .*; wanted \{"role"'),
        ({"messages": [{"role": "user"}]}, {}, r"message 0 of 'messages' \(role 'user'\) has no content"),
        (
            {"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]},
            {},
            "prompt is str and completion is list",
        ),
        ({"input_ids": [1, 2], "labels": [1]}, {}, r"labels of shape \(1,\)"),
        ({"input_ids": [1.5, 2]}, {}, "wanted two lists of integers"),
        ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, {}, r"labels\[0\] is 2 where input_ids has 1.*not shifted"),
        ({"text": "abc"}, {"completion_only_loss": True}, "completion_only_loss=True is for rows of prompt"),
        ({"text": "abc"}, {"assistant_only_loss": True}, "assistant_only_loss=True is for rows of messages"),
    ],
)
def test_wrong_rows_are_named(tokenizer, row, options, message):
    good = {"input_ids": [1, 2]}
    rows = [row] if options else [good, good, row]
    with pytest.raises(ValueError, match=message) as error:
        tokens(rows, tokenizer, **options)
    assert str(error.value).startswith(f"row {len(rows) - 1} (the first is 0): ")


def test_truncation_is_counted(tokenizer):
    rows = [{"prompt": "p" * 3, "completion": "c" * 4}, {"prompt": "p" * 5, "completion": "c" * 9}]
    with pytest.warns(UserWarning, match=r"1 of 2 examples are longer than max_length=8 \(the longest has 15 tokens\)"):
        examples = tokens(rows, tokenizer, max_length=8)
    assert [len(e) for e in examples] == [8, 8]
    assert [labelled(e, tokenizer) for e in examples] == ["cccc<e>", "ccc"]


def test_rows_that_lose_their_response_are_dropped_and_counted(tokenizer):
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "p" * 20, "completion": "c"}]
    with pytest.warns(UserWarning, match="1 of 2 examples are longer.* 1 of them lost their whole response"):
        assert len(tokens(rows, tokenizer, max_length=8)) == 1
    with pytest.raises(
        ValueError, match=r"nothing to train on: of 1 examples from 1 rows, 1 lost their whole response"
    ):
        tokens(rows[1:], tokenizer, max_length=8)


def test_rows_without_response_are_dropped_and_counted(tokenizer):
    rows = [{"messages": [{"role": "user", "content": "a"}]}, {"text": ""}, {"text": "abc"}]
    with pytest.warns(UserWarning, match=r"2 of 3 rows: rows hold something with nothing to train on.*first: row 0"):
        assert len(tokens(rows, tokenizer)) == 1
    with pytest.raises(ValueError, match="nothing to train on: of 2 examples from 2 rows, 0 lost .* 2 have no token"):
        tokens(rows[:2], tokenizer)
    with pytest.raises(ValueError, match="the data set is empty"):
        tokens([], tokenizer)
    with pytest.raises(ValueError, match="max_length is 1; wanted at least 2"):
        tokens(rows, tokenizer, max_length=1)


def test_tokenizer_without_end_token_is_said(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.warns(UserWarning, match="the tokenizer has no eos_token"):
        (example,) = tokens([{"text": "abc"}], bare)
    assert len(example) == 3


def test_progress_bar_leaves_stdout_alone(tokenizer, capsys):
    tokenize_rows([{"text": "abc"}] * 3, tokenizer, max_length=9)
    assert capsys.readouterr().out == ""


# ---- batches ----


def test_bucket_lengths():
    examples = [range(n) for n in [10] * 60 + [100] * 30 + [300] * 10]
    assert bucket_lengths(examples, 512) == (64, 128, 320)
    assert bucket_lengths(examples, 310) == (64, 128, 310)
    assert bucket_lengths(examples, 512, n_buckets=1) == (320,)
    # The longest of 8 rows is nearly always at least 100.
    assert bucket_lengths(examples, 512, rows=8) == (128, 320)
    with pytest.raises(ValueError, match="an example has 300 tokens, more than max_length=256"):
        bucket_lengths(examples, 256)


def test_pad_batch():
    one, two = random_examples(2, 5, 9)
    batch = pad_batch([one, None, two], 12, pad_id=7)
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == dict.fromkeys(
        ["input_ids", "labels"], ((3, 12), np.dtype(np.int32))
    )
    for row, example in ((0, one), (2, two)):
        n = len(example)
        np.testing.assert_array_equal(batch["input_ids"][row, :n], example.input_ids)
        np.testing.assert_array_equal(batch["labels"][row, :n], example.labels)
        assert (batch["input_ids"][row, n:] == 7).all() and (batch["labels"][row, n:] == IGNORE).all()
    assert (batch["labels"][1] == IGNORE).all() and (batch["input_ids"][1] == 7).all()
    with pytest.raises(ValueError, match="do not fit in a row of 4"):
        pad_batch([one], 4, 0)


@pytest.mark.parametrize("seed", range(8))
def test_packing_keeps_every_token_once(seed):
    examples = random_examples(np.random.default_rng(seed).integers(1, 70), seed=seed)
    length = 64
    groups = pack(examples, length)
    assert sorted(i for g in groups for i in g) == list(range(len(examples)))
    assert groups == pack(examples, length) == sorted(sorted(g) for g in groups)
    batch = pack_batch(examples, groups, length, pad_id=3)
    for row, group in enumerate(groups):
        at = 0
        for i in group:
            here = slice(at, at + len(examples[i]))
            np.testing.assert_array_equal(batch["input_ids"][row, here], examples[i].input_ids)
            np.testing.assert_array_equal(batch["labels"][row, here], examples[i].labels)
            assert batch["labels"][row, at] == IGNORE
            np.testing.assert_array_equal(batch["positions"][row, here], np.arange(len(examples[i])))
            assert (batch["segment_start"][row, here] == at).all()
            at += len(examples[i])
        assert (batch["labels"][row, at:] == IGNORE).all() and (batch["input_ids"][row, at:] == 3).all()
        assert (batch["segment_start"][row, at:] == at).all()
        np.testing.assert_array_equal(batch["positions"][row, at:], np.arange(length - at))


def test_packing_is_first_fit_decreasing():
    examples = [range(n) for n in (5, 9, 1, 6, 4, 2, 9)]
    # By length: 9 | 9 | 6 | 5 | 4 joins 6 | 2 joins 5 | 1 joins the first 9.
    assert pack(examples, 10) == [[0, 5], [1, 2], [3, 4], [6]]
    assert packing_efficiency(examples, pack(examples, 10), 10) == 36 / 40
    assert pack([], 10) == [] and pack([range(10)], 10) == [[0]]
    with pytest.raises(ValueError, match="11 tokens, more than max_length=10"):
        pack([range(11)], 10)


def test_packing_never_uses_more_rows_than_plain_first_fit():
    examples = random_examples(300, 2, 100, seed=3)
    bins: list[int] = []
    for n in sorted((len(e) for e in examples), reverse=True):
        fit = next((b for b, used in enumerate(bins) if used + n <= 128), None)
        if fit is None:
            bins.append(n)
        else:
            bins[fit] += n
    groups = pack(examples, 128)
    assert sorted(sum(len(examples[i]) for i in g) for g in groups) == sorted(bins)
    assert packing_efficiency(examples, groups, 128) > 0.95


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("packing", [False, True])
def test_resuming_at_any_step_gives_the_same_batches(packing):
    examples = random_examples(53)

    def make(step=0):
        return BatchIterator(
            examples, batch_size=2, accumulation=3, packing=packing, max_length=96, seed=11, pad_id=5, step=step
        )

    whole = list(itertools.islice(make(), 25))
    assert make().steps_per_epoch < 12
    for k in (0, 1, 7, 13, 24):
        resumed = make(k)
        tail = list(itertools.islice(resumed, 25 - k))
        assert all(equal(a, b) for a, b in zip(whole[k:], tail, strict=True))
        assert resumed.step == 25
    jumping = make()
    assert all(equal(jumping.batch(k), whole[k]) for k in (20, 3, 11, 3))


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_holds_every_example_once_in_seeded_order(packing):
    examples = [Example(np.full(2 + i % 40, i + 1, np.int32), np.full(2 + i % 40, i + 1, np.int32)) for i in range(53)]
    batches = BatchIterator(examples, batch_size=2, accumulation=4, packing=packing, max_length=64, seed=1)
    orders = []
    for epoch in range(2):
        seen = []
        for step in range(batches.steps_per_epoch):
            batch = batches.batch(epoch * batches.steps_per_epoch + step)
            assert batch["input_ids"].shape[:2] == (4, 2) and batch["input_ids"].shape[2] in batches.buckets
            # Every token of an example is its number: a new number begins an example.
            ids = batch["input_ids"]
            starts = (ids > 0) & (ids != np.pad(ids, ((0, 0), (0, 0), (1, 0)))[..., :-1])
            seen += batch["input_ids"][starts].tolist()
            n = (batch["labels"] != IGNORE).sum()
            assert n == sum(len(examples[i - 1]) - 1 for i in batch["input_ids"][starts])
        assert sorted(seen) == list(range(1, 54))
        orders.append(seen)
    assert orders[0] != orders[1]
    if not packing:
        assert orders == [(np.random.default_rng((1, e)).permutation(53) + 1).tolist() for e in range(2)]
    other = BatchIterator(examples, batch_size=2, accumulation=4, packing=packing, max_length=64, seed=2)
    assert not equal(other.batch(0), batches.batch(0))
    if packing:
        assert batches.efficiency is not None and 0.9 < batches.efficiency <= 1


def test_partial_batches():
    examples = random_examples(11)
    kept = BatchIterator(examples, batch_size=2, accumulation=2, shuffle=False)
    assert kept.steps_per_epoch == 3
    last = kept.batch(2)
    assert [(row != IGNORE).any() for row in last["labels"].reshape(4, -1)] == [True, True, True, False]
    dropped = BatchIterator(examples, batch_size=2, accumulation=2, shuffle=False, drop_last=True)
    last = dropped.batch(dropped.steps_per_epoch - 1)
    assert [(row != IGNORE).any() for row in last["labels"].reshape(4, -1)] == [True, True, False, False]
    with pytest.raises(ValueError, match="drop_last leaves nothing of 11 rows with batch_size=12"):
        BatchIterator(examples, batch_size=12, drop_last=True)
    with pytest.raises(ValueError, match="no examples"):
        BatchIterator([], batch_size=2)
    with pytest.raises(ValueError, match="batch_size is 0"):
        BatchIterator(examples, batch_size=0)
    with pytest.raises(ValueError, match="more than the longest bucket"):
        BatchIterator(examples, batch_size=1, buckets=[8])


def test_a_step_uses_the_shortest_bucket_that_holds_it():
    examples = random_examples(40, 2, 200)
    batches = BatchIterator(examples, batch_size=1, accumulation=2, buckets=[200, 64, 128], shuffle=False)
    assert batches.buckets == (64, 128, 200)
    for step in range(20):
        longest = max(len(e) for e in examples[2 * step : 2 * step + 2])
        assert batches.batch(step)["input_ids"].shape == (2, 1, min(b for b in batches.buckets if b >= longest))


def test_eval_batches():
    examples = random_examples(7)
    batches = list(eval_batches(examples, 3, pad_id=9))
    assert len(batches) == 3
    rows = [(ids, labels) for b in batches for ids, labels in zip(b["input_ids"], b["labels"], strict=True)]
    for (ids, labels), example in zip(rows[:7], examples, strict=True):
        np.testing.assert_array_equal(ids[: len(example)], example.input_ids)
        np.testing.assert_array_equal(labels[: len(example)], example.labels)
        assert (ids[len(example) :] == 9).all() and (labels[len(example) :] == IGNORE).all()
    assert all((labels == IGNORE).all() for _, labels in rows[7:])
