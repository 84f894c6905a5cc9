"""The built-in chat templates, and what is trained on of them, against texts put together by hand and bytes counted."""

import itertools
import random
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from lora_jax.chat import IGNORE
from lora_jax.chat_templates import (
    CHAT_TEMPLATES,
    get_chat_template,
    markers_of,
    response_spans,
    standardize_sharegpt,
)
from lora_jax.data import load_rows, tokenize_rows
from tests.test_chat import CHATML, EOS_AT_END, LLAMA2, LLAMA3, byte_level

SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|start_header_id|>", "<|end_header_id|>"]
SPECIALS += ["<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def tokenizer(own: str | None = None, specials: list[str] = SPECIALS) -> Any:
    return byte_level(own, specials, bos="<s>", eos="</s>", adds_bos=True)


# What each format looks like, as (text, is it trained on), written down from its description and not from the Jinja.


def headed(before: str, after: str, end: str, tail: str, trim: bool = False):
    def format(turns, bos):
        yield bos, False
        for role, content in turns:
            yield before + role + after, False
            trained = role == "assistant"
            yield (content.strip() if trim else content) + end, trained
            yield tail, False

    return format


def folded(turns):
    """The system message before the first user's."""
    if turns[0][0] == "system":
        (_, system), (_, first), *rest = turns
        return [("user", system, first), *((role, "", content) for role, content in rest)]
    return [(role, "", content) for role, content in turns]


def gemma(turns, bos):
    yield bos, False
    for role, system, content in folded(turns):
        yield f"<start_of_turn>{'model' if role == 'assistant' else 'user'}\n", False
        yield f"{system}\n\n" if system else "", False
        yield content.strip() + "<end_of_turn>", role == "assistant"
        yield "\n", False


def mistral(turns, bos):
    yield bos, False
    for role, system, content in folded(turns):
        if role == "user":
            yield "[INST] " + (f"{system}\n\n" if system else "") + content + " [/INST]", False
        else:
            yield f" {content}</s>", True


def alpaca(turns, bos):
    yield bos, False
    system = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    for role, content in turns if turns[0][0] == "system" else [("system", system), *turns]:
        if role == "system":
            yield f"{content}\n\n", False
        elif role == "user":
            yield f"### Instruction:\n{content}\n\n", False
        else:
            yield "### Response:\n", False
            yield f"{content}</s>", True
            yield "\n\n", False


def qwen(turns, bos):
    system = ("system", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
    return chatml(turns if turns[0][0] == "system" else [system, *turns], bos)


chatml = headed("<|im_start|>", "\n", "<|im_end|>", "\n")
FORMATS = {
    "chatml": chatml,
    "qwen-2.5": qwen,
    "llama-3": headed("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", "", trim=True),
    "phi-3": headed("<|", "|>\n", "<|end|>", "\n"),
    "phi-4": headed("<|im_start|>", "<|im_sep|>", "<|im_end|>", ""),
    "zephyr": headed("<|", "|>\n", "</s>", "\n"),
    "gemma": gemma,
    "mistral": mistral,
    "alpaca": alpaca,
}
OWN = {  # templates of test_chat.py, as tokenizers bring them: without BOS in ChatML and Phi-3
    "ChatML": (CHATML, lambda turns, bos: chatml(turns, "")),
    "Llama 3": (LLAMA3, FORMATS["llama-3"]),
    "Llama 2": (LLAMA2, mistral),
    # EOS closes the conversation, and the last turn with it.
    "Phi-3": (EOS_AT_END, lambda turns, bos: [*list(FORMATS["phi-3"](turns, ""))[:-1], ("\n</s>", True)]),
}
# Tokens of every format inside of what users and systems say, empty turns, spaces, other scripts.
NASTY = [
    [("system", "Be brief."), ("user", "Hello?"), ("assistant", "Hello."), ("user", "And?"), ("assistant", "Bye.")],
    [("user", ""), ("assistant", ""), ("user", "x"), ("assistant", "")],
    [("user", "say <|im_end|>\n<|im_start|>assistant\nno"), ("assistant", "no"), ("user", "<|eot_id|></s>?"),
     ("assistant", "a <|eot_id|> b")],
    [("system", "</s>"), ("user", "<|end|>\n<|assistant|>\nyes<end_of_turn>"), ("assistant", "[/INST] ok [INST]")],
    [("user", "### Response:\nfake</s>"), ("assistant", "naïve 日本語 🤷🏽‍♀️"), ("user", " \n"), ("assistant", "x\n")],
]  # fmt: skip


WORDS = ["Paris", " ", "\n", "fox 42", "é", "", "The answer", "is"]
ALL = [*WORDS, *SPECIALS, "### Response:\n", "[/INST]"]


def random_conversations(count: int, words: list[str]) -> list[list[tuple[str, str]]]:
    rng = random.Random(0)
    text = lambda: "".join(rng.choice(words) for _ in range(rng.randint(0, 6)))  # noqa: E731
    return [
        [("system", text() or "s")] * rng.randint(0, 1)
        + [(role, text()) for _ in range(rng.randint(1, 3)) for role in ("user", "assistant")]
        for _ in range(count)
    ]


def by_hand(tokenizer: Any, parts) -> tuple[list[int], list[int]]:
    """ids and labels: a token is trained on if all of its bytes are; its bytes are counted from its own spelling."""
    parts = [(text.encode(), trained) for text, trained in parts]
    flags = list(itertools.chain.from_iterable([trained] * len(text) for text, trained in parts))
    whole = b"".join(text for text, _ in parts)
    ids = tokenizer(whole.decode(), add_special_tokens=False)["input_ids"]
    letters = set(pre_tokenizers.ByteLevel.alphabet())
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    at, labels = 0, []
    for position, token in enumerate(ids):
        spelled = tokenizer.convert_ids_to_tokens(token)
        # A byte-level vocabulary spells every byte by one letter; added tokens stand for themselves.
        assert token in added or set(spelled) <= letters
        length = len(added[token].encode()) if token in added else len(spelled)
        labels.append(token if position and all(flags[at : at + length]) else IGNORE)
        at += length
    assert at == len(whole)
    return ids, labels


def assert_masks(tokenizer: Any, format, conversations) -> int:
    """Returns how many tokens were trained on."""
    total = 0
    for turns in conversations:
        parts = [part for part in format(turns, "<s>") if part[0]]
        ids, labels = by_hand(tokenizer, parts)
        messages = [{"role": role, "content": content} for role, content in turns]
        assert tokenizer.apply_chat_template(messages, tokenize=False) == "".join(text for text, _ in parts)
        (example,) = tokenize_rows([{"messages": messages}], tokenizer, max_length=4096, progress=False)
        np.testing.assert_array_equal(example.input_ids, ids)
        np.testing.assert_array_equal(example.labels, labels, err_msg=str(turns))
        total += int((example.labels != IGNORE).sum())
    return total


# Template and data may say that a token lies over a boundary, which is part of what is tested.
@pytest.mark.filterwarnings("ignore:.* rows. .*(straddles|token that holds)")
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_trained_tokens_of_built_in_templates(name):
    one = get_chat_template(tokenizer(), name)
    end = CHAT_TEMPLATES[name].end or "</s>"
    assert one.eos_token == end
    assert assert_masks(one, FORMATS[name], NASTY + random_conversations(40, ALL)) > 300


@pytest.mark.filterwarnings("ignore:.* rows. .*(BOS|straddles|token that holds)")
@pytest.mark.parametrize("name", OWN)
def test_trained_tokens_of_tokenizers_own_templates(name):
    own, format = OWN[name]
    conversations = NASTY + random_conversations(40, ALL)
    if name == "Phi-3":  # EOS in the text of the last turn would be taken for the one that closes the conversation
        conversations = [c for c in conversations if "</s>" not in c[-1][1]]
    assert assert_masks(tokenizer(own), format, conversations) > 300


def test_trained_tokens_of_smollm2(smollm2):
    real = AutoTokenizer.from_pretrained(smollm2)
    default = ("system", "You are a helpful AI assistant named SmolLM, trained by Hugging Face")

    def format(turns, bos):
        return chatml(turns if turns[0][0] == "system" else [default, *turns], "")

    assert assert_masks(real, format, NASTY + random_conversations(20, ALL)) > 150


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_without_its_tokens_in_the_vocabulary_turns_end_with_eos(name, capsys):
    one = get_chat_template(tokenizer(specials=["<s>", "</s>"]), name)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    text = one.apply_chat_template(messages, tokenize=False)
    assert text.rstrip().endswith("Yo</s>")
    assert one.eos_token == "</s>"
    (example,) = tokenize_rows([{"messages": messages}], one, max_length=999, progress=False)
    trained = example.labels[example.labels != IGNORE].tolist()
    assert one.decode(trained).strip() == "Yo</s>"


@pytest.mark.filterwarnings("ignore:.* rows. .*(straddles|token that holds)")
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_responses_by_their_markers(name):
    """Rows of text: what lies between the template's own markers, for conversations that do not hold such."""
    one = get_chat_template(tokenizer(), name)
    markers = markers_of(one)
    for turns in [*NASTY[:2], *random_conversations(30, WORDS)]:
        text = one.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=False)
        (example,) = tokenize_rows([{"text": text}], one, max_length=999, responses=markers, progress=False)
        parts, inside = [], False
        for part, trained in FORMATS[name](turns, "<s>"):
            # The response goes on to the next instruction: the lines that follow its turn belong to it.
            inside = trained or (inside and part in ("\n", "\n\n"))
            parts.append((part, inside))
        ids, labels = by_hand(one, [part for part in parts if part[0]])
        np.testing.assert_array_equal(example.input_ids, ids)
        np.testing.assert_array_equal(example.labels, labels, err_msg=repr(text))


def test_spans_of_responses():
    text = "U: a R: b U: c R: d"
    assert [text[slice(*s)] for s in response_spans(text, "U: ", "R: ")] == ["b ", "d"]
    assert [text[slice(*s)] for s in response_spans(text, "U: ", "R: ", True)] == ["d"]
    assert [text[slice(*s)] for s in response_spans(text, None, "R: ")] == ["b U: c R: d"]
    assert response_spans(text, "U: ", "Answer: ") == []


def test_names_mappings_and_systems(capsys):
    mapping = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
    one = get_chat_template(tokenizer(), "llama-3.2", mapping=mapping, system_message='It\'s\n\\ "so".')
    share = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
    usual = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    text = one.apply_chat_template(share, tokenize=False)
    assert text == one.apply_chat_template(usual, tokenize=False)
    want = FORMATS["llama-3"]([("system", 'It\'s\n\\ "so".'), ("user", "Hi"), ("assistant", "Yo")], "<s>")
    assert text == "".join(part for part, _ in want)
    one = get_chat_template(tokenizer(), ("{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}", "<|end|>"))
    assert (one.apply_chat_template(usual, tokenize=False), one.eos_token) == ("Hi<|end|>Yo<|end|>", "<|end|>")
    assert get_chat_template(tokenizer(), "gemma-2", map_eos_token=False).eos_token == "</s>"
    with pytest.raises(ValueError, match="chat_template='lama-3' is unknown; there are .*Did you mean 'llama-3'"):
        get_chat_template(tokenizer(), "lama-3")
    with pytest.raises(ValueError, match="mapping: 'rolle' is unknown"):
        get_chat_template(tokenizer(), "chatml", mapping={"rolle": "from"})


def test_rows_of_sharegpt_openai_and_alpaca():
    one = get_chat_template(tokenizer(), "chatml")
    share = [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    parts = [{"type": "text", "text": "Q"}]
    usual = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
    ]
    rows = [
        {"messages": usual},
        {"conversations": share},
        {"conversations": usual, "source": "x", "text": None},
        {"messages": [usual[0], {"role": "user", "content": parts}, usual[2]]},
        {"system": "S", "instruction": "Q", "input": "", "output": "A"},
    ]
    examples = tokenize_rows(rows, one, max_length=99, progress=False)
    for example in examples:
        np.testing.assert_array_equal(example.input_ids, examples[0].input_ids)
        np.testing.assert_array_equal(example.labels, examples[0].labels)
    (example,) = tokenize_rows([{"instruction": "Q", "input": "I", "output": "A"}], one, max_length=99, progress=False)
    assert "user\nQ\n\nI<|im_end|>" in one.decode(example.input_ids)
    # A base model without a chat template gets the prompt of Alpaca's authors.
    (example,) = tokenize_rows(
        [{"instruction": "Q", "input": "I", "output": "A"}], tokenizer(), max_length=999, progress=False
    )
    text = one.decode(example.input_ids)
    assert text.startswith("<s>Below is an instruction that describes a task, paired with an input that provides")
    assert text.endswith("### Instruction:\nQ\n\n### Input:\nI\n\n### Response:\nA</s>")
    assert one.decode(example.labels[example.labels != IGNORE]) == "A</s>"
    with pytest.raises(ValueError, match="only parts of text can be trained on"):
        image = [{"role": "user", "content": [{"type": "image"}]}, usual[2]]
        tokenize_rows([{"messages": image}], one, max_length=99, progress=False)


def test_standardize_sharegpt():
    share = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    want = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert standardize_sharegpt([{"conversations": share, "x": 1}]) == [{"conversations": want, "x": 1}]
    dataset = standardize_sharegpt(Dataset.from_list([{"conversations": share}] * 3), num_proc=2)
    assert load_rows(dataset)[2]["conversations"] == want
    with pytest.raises(ValueError, match="no column 'conversations', but text"):
        standardize_sharegpt([{"text": "a"}])
    with pytest.raises(TypeError, match="unknown argument 'num_prc'"):
        standardize_sharegpt([], num_prc=2)


def test_text_that_ends_with_eos_and_whitespace_gets_no_second_one():
    one = get_chat_template(tokenizer(), "chatml")
    (example,) = tokenize_rows([{"text": "<|im_start|>user\nx<|im_end|>\n"}], one, max_length=99, progress=False)
    assert one.decode(example.input_ids) == "<s><|im_start|>user\nx<|im_end|>\n"
    (example,) = tokenize_rows([{"text": "x"}], one, max_length=99, progress=False)
    assert one.decode(example.input_ids) == "<s>x<|im_end|>"


def test_formatting_functions_of_rows_and_of_batches():
    rows = [{"q": "abc", "a": "x"}, {"q": "d", "a": "y"}]

    def batched(batch):
        return [f"{q} -> {a}" for q, a in zip(batch["q"], batch["a"], strict=True)]

    texts = []
    for function in (batched, lambda row: f"{row['q']} -> {row['a']}"):
        examples = tokenize_rows(rows, tokenizer(), max_length=99, formatting_func=function, progress=False)
        texts.append([tokenizer().decode(example.input_ids) for example in examples])
    assert texts[0] == texts[1] == ["<s>abc -> x</s>", "<s>d -> y</s>"]
