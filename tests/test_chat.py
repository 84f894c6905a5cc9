"""Which tokens are trained on, for chat templates of every habit; all expectations are written out as text."""

import base64
import json
import random
import subprocess
import sys
import zipfile
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lora_jax.chat import IGNORE, ChatRenderer, Encoder, preview, preview_plain
from lora_jax.data import tokenize_rows
from lora_jax.tools.smollm2 import default_cache_dir

CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is the answer? The answer is Paris, of course.",
    "user assistant system Hello world! How are you today? I am fine, thanks.\n\nAnd you? 1 2 3 4 5 6 7 8 9 0",
    "def main():\n    return 42  # the answer\n\n\n",
] * 4

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# BOS in the template, contents trimmed, nothing after the end of a turn.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# No generation prompt at all; strict about roles; the system prompt goes into the first user turn.
LLAMA2 = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set ns.system = m['content'] + '\n\n' %}"
    "{% elif m['role'] == 'user' %}{{ '[INST] ' + ns.system + m['content'] + ' [/INST]' }}{% set ns.system = '' %}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user, system and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GENERATION = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Yi 1.5's: the system prompt stands bare, and the header of the answer belongs to the user's turn.
YI = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>\n<|im_start|>assistant\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + '<|im_end|>' }}{{ '\n' }}{% endif %}{% endfor %}"
)
# As Mistral Nemo's.
TEKKEN = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
_STRIP_EARLIER = (
    "{% set last = messages | length - 1 %}{% for m in messages %}{% set c = m['content'] %}"
    "{% if m['role'] == 'assistant' and not loop.last %}{% set c = c.split('</think>')[-1] %}{% endif %}"
)
# As Qwen3 does: only the last turn keeps its reasoning.
DROPS_EARLIER = (
    _STRIP_EARLIER + "{{ '<|im_start|>' + m['role'] + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DROPS_EARLIER_MARKED = (
    _STRIP_EARLIER + "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ c + '<|im_end|>' }}{% endgeneration %}{% else %}{{ c + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As DeepSeek-R1 does: the generation prompt opens a thought, which no rendering of a finished turn shows.
THINK_PROMPT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
    "{% else %}{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
# As Phi-3 does: EOS closes the conversation, <|end|> each turn.
EOS_AT_END = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# EOS closes the conversation, and nothing else closes a turn.
ONLY_EOS_AT_END = (
    "{% for m in messages %}{{ '\n' + m['role'] + ': ' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nassistant:' }}{% else %}{{ eos_token }}{% endif %}"
)
NO_EOS = (
    "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)


def byte_level(template: str | None, specials: list[str], *, bos: str | None, eos: str, adds_bos=False) -> Any:
    """A small byte-level BPE, trained here; its pad token is its end token, as SmolLM2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=specials, show_progress=False),
    )
    steps: list = [processors.ByteLevel(trim_offsets=True)]  # hides leading spaces from offsets, as GPT-2's does
    if adds_bos and bos:
        steps.append(processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]))
    tokenizer.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos, chat_template=template
    )


def chatml(template: str | None = CHATML) -> Any:
    return byte_level(template, ["<|im_start|>", "<|im_end|>"], bos="<|im_start|>", eos="<|im_end|>")


def llama3() -> Any:
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return byte_level(LLAMA3, specials, bos="<|begin_of_text|>", eos="<|end_of_text|>", adds_bos=True)


def sentencepiece(bytes_are_added=False) -> Any:
    """As Llama 2's: spaces become "▁", one is put before the text, bytes stand in for unknown characters."""
    specials = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=specials + [f"<0x{i:02X}>" for i in range(256)],
        initial_alphabet=[chr(c) for c in range(33, 127)] + ["▁"],
        show_progress=False,
    )
    # Trained on words, or without a pre-tokeniser whole sentences would become tokens.
    tokenizer.train_from_iterator([w for text in CORPUS for w in text.split()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    state = json.loads(tokenizer.to_str())
    if not bytes_are_added:  # in Llama 2's vocabulary they are not
        state["added_tokens"] = state["added_tokens"][: len(specials)]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=LLAMA2
    )


def chat(*turns: str) -> list[dict]:
    """Turns as messages: user and assistant by turns, a system prompt if it begins with "system: "."""
    messages = []
    if turns[0].startswith("system: "):
        messages, turns = [{"role": "system", "content": turns[0][8:]}], turns[1:]
    roles = ["user", "assistant"] * len(turns)
    return messages + [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]


def examples_of(tokenizer, messages, **options):
    return tokenize_rows([{"messages": messages}], tokenizer, max_length=4096, progress=False, **options)


def trained(example, tokenizer) -> list[Any]:
    """The trained runs as text."""
    runs, last = [], None
    for t in np.flatnonzero(example.labels != IGNORE):
        assert example.labels[t] == example.input_ids[t]
        if last is None or t != last + 1:
            runs.append([])
        runs[-1].append(int(example.labels[t]))
        last = t
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


CONVERSATION = chat("system: Be brief.", "Hello?", "I am fine, thanks.", "And you?", "The answer is 42.")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (chatml, ["I am fine, thanks.<|im_end|>", "The answer is 42.<|im_end|>"]),
        (lambda: chatml(GENERATION), ["I am fine, thanks.<|im_end|>", "The answer is 42.<|im_end|>"]),
        (llama3, ["I am fine, thanks.<|eot_id|>", "The answer is 42.<|eot_id|>"]),
        # The prompt ends at [/INST]; the space is written by the model (and left out by the decoder at the start).
        (sentencepiece, ["I am fine, thanks.</s>", "The answer is 42.</s>"]),
    ],
    ids=["chatml", "generation", "llama3", "sentencepiece"],
)
def test_trains_on_assistant_turns_with_their_end_token(make, expected):
    tokenizer = make()
    (example,) = examples_of(tokenizer, CONVERSATION)
    assert trained(example, tokenizer) == expected
    rendered = tokenizer.apply_chat_template(CONVERSATION, tokenize=True, return_dict=True)
    assert example.input_ids.tolist() == rendered["input_ids"]
    assert example.input_ids.dtype == example.labels.dtype == np.int32


def test_labels_are_by_position_not_by_token_id():
    tokenizer = chatml()
    (example,) = examples_of(tokenizer, CONVERSATION)
    end = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == end
    at = np.flatnonzero(example.input_ids == end)
    # system, user, assistant, user, assistant
    assert (example.labels[at] == end).tolist() == [False, False, True, False, True]
    newline_after = example.labels[at + 1]
    assert (newline_after == IGNORE).all()


@pytest.mark.parametrize("make", [chatml, llama3, sentencepiece])
def test_exactly_one_bos(make):
    tokenizer = make()
    bos = tokenizer.bos_token_id
    (example,) = examples_of(tokenizer, chat("Hello?", "Hello world!"))
    assert example.input_ids[0] == bos and example.input_ids[1] != bos
    for text in ["Hello world!", tokenizer.bos_token + "Hello world!"]:
        (plain,) = tokenize_rows([{"text": text}], tokenizer, max_length=99, progress=False)
        adds = make is not chatml  # this one adds no BOS to plain text, as SmolLM2's
        assert (plain.input_ids == bos).sum() == (1 if adds or text.startswith("<") else 0)
        assert plain.input_ids[-1] == tokenizer.eos_token_id and plain.labels[0] == IGNORE


def test_content_with_whitespace_around_it():
    tokenizer = chatml()
    (example,) = examples_of(tokenizer, chat("  Hello?\n", " The answer \n\n", "?", " 42\n"))
    assert trained(example, tokenizer) == [" The answer \n\n<|im_end|>", " 42\n<|im_end|>"]
    # Here the header's newline and the answer's first are one token: at inference it is never asked for.
    assert "\n\n" in tokenizer.decode(tokenizer("\n\n")["input_ids"][:1])
    with pytest.warns(UserWarning, match="holds the end of a prompt and the start of its response"):
        (example,) = examples_of(tokenizer, chat("Hello?", "\n\nThe answer"))
    assert trained(example, tokenizer) == ["\nThe answer<|im_end|>"]


@pytest.mark.parametrize("bytes_are_added", [False, True])
def test_newlines_of_sentencepiece_are_bytes(bytes_are_added):
    tokenizer = sentencepiece(bytes_are_added)
    (example,) = examples_of(tokenizer, chat("\n", "\n\nb\n", "c\n\n", "\n日本\n"))
    assert preview_plain(example, tokenizer).replace("<s> ", "<s>") == (
        "<s>[INST] \n [/INST][[ \n\nb\n</s>]] [INST] c\n\n [/INST][[ \n日本\n</s>]]"
    )


def test_trimming_template():
    tokenizer = llama3()
    (example,) = examples_of(tokenizer, chat(" Hello? ", "  The answer.\n\n", "And?", "\n"))
    assert trained(example, tokenizer) == ["The answer.<|eot_id|>", "<|eot_id|>"]


@pytest.mark.parametrize("make", [chatml, llama3, sentencepiece])
def test_empty_assistant_content_trains_the_end_token(make):
    tokenizer = make()
    (example,) = examples_of(tokenizer, chat("Hello?", ""))
    assert [t.strip() for t in trained(example, tokenizer)] == [
        {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "sentencepiece": "</s>"}[make.__name__]
    ]


@pytest.mark.parametrize("make", [chatml, lambda: chatml(GENERATION), llama3, sentencepiece])
@pytest.mark.parametrize("answer", ["naïve café – 日本語 🤷🏽‍♀️", "👩‍👩‍👧‍👦", "مرحبا ½ ² \x00 end", "<|im_start|>fake"])
def test_unicode(make, answer):
    tokenizer = make()
    (example,) = examples_of(tokenizer, chat("Was? 🤷🏽‍♀️ é", answer, "és?", answer))
    # A sentencepiece decoder leaves out the leading space of what it is given.
    ends = ("<|im_end|>", "<|eot_id|>", "</s>")
    runs = trained(example, tokenizer)
    assert len(runs) == 2
    for run in runs:
        assert run.endswith(ends)
        for end in ends:
            run = run.removesuffix(end)
        # the byte-fallback tokenizer writes a space after a special token inside of text
        assert run.strip() == answer


def test_a_token_over_the_boundary_is_not_trained_and_said():
    tokenizer = byte_level(None, ["</s>"], bos=None, eos="</s>")
    row = {"prompt": "What is the answer? ", "completion": "Paris, of course."}
    with pytest.warns(UserWarning, match="1 of 1 rows: texts have a token that holds the end of a prompt"):
        (example,) = tokenize_rows([row], tokenizer, max_length=99, progress=False)
    # " P" is one token of the prompt's last space and the answer's first letter.
    text = trained(example, tokenizer)
    assert len(text) == 1 and "Paris, of course.</s>".endswith(text[0]) and text[0] != "Paris, of course.</s>"
    clean = {"prompt": "What is the answer?", "completion": " Paris, of course."}
    (example,) = tokenize_rows([clean], tokenizer, max_length=99, progress=False)
    assert trained(example, tokenizer) == [" Paris, of course.</s>"]


def test_template_that_drops_earlier_reasoning_gives_one_example_per_turn():
    tokenizer = chatml(DROPS_EARLIER)
    messages = chat("Hello?", "<think>hm</think>I am fine.", "And you?", "<think>so</think>The answer.")
    with pytest.warns(UserWarning, match="1 of 1 rows: conversations become one example per assistant turn"):
        examples = examples_of(tokenizer, messages)
    assert [trained(e, tokenizer) for e in examples] == [
        ["<think>hm</think>I am fine.<|im_end|>"],
        ["<think>so</think>The answer.<|im_end|>"],
    ]
    for example, turn in zip(examples, (1, 3), strict=True):
        prompt = tokenizer.apply_chat_template(
            messages[:turn], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        assert example.input_ids[: len(prompt)].tolist() == prompt  # what the model is given at inference
        assert (example.labels[: len(prompt)] == IGNORE).all() and example.labels[len(prompt)] != IGNORE
    assert "<think>hm" not in tokenizer.decode(examples[1].input_ids)


def test_template_that_drops_reasoning_keeps_one_example_where_nothing_is_dropped():
    tokenizer = chatml(DROPS_EARLIER)
    (example,) = examples_of(tokenizer, CONVERSATION)
    assert trained(example, tokenizer) == ["I am fine, thanks.<|im_end|>", "The answer is 42.<|im_end|>"]


def test_marked_template_that_drops_earlier_reasoning():
    tokenizer = chatml(DROPS_EARLIER_MARKED)
    messages = chat("Hello?", "<think>hm</think>I am fine.", "And you?", "<think>so</think>The answer.")
    with pytest.warns(UserWarning, match="one example per assistant turn"):
        examples = examples_of(tokenizer, messages)
    assert [trained(e, tokenizer) for e in examples] == [
        ["<think>hm</think>I am fine.<|im_end|>"],
        ["<think>so</think>The answer.<|im_end|>"],
    ]


def test_generation_prompt_that_no_turn_begins_with_is_refused():
    tokenizer = byte_level(
        THINK_PROMPT, ["<s>", "</s>", "<|User|>", "<|Assistant|>"], bos="<s>", eos="</s>", adds_bos=True
    )
    rows = [{"messages": chat("Hello?", "<think>\nhm\n</think>\n\nI am fine.")}]
    with pytest.raises(ValueError, match=r"row 0 .*generation prompt is not the start.*message 1, assistant.*think"):
        tokenize_rows(rows, tokenizer, max_length=99, progress=False)
    (example,) = tokenize_rows(rows, tokenizer, max_length=99, progress=False, assistant_only_loss=False)
    assert (example.labels[1:] == example.input_ids[1:]).all()


def test_template_that_drops_content_of_the_trained_turn_says_so():
    template = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    with pytest.warns(UserWarning, match="lose part of an assistant's content"):
        (example,) = examples_of(chatml(template), chat("Hello?", "<think>hm</think>I am fine."))
    assert trained(example, chatml()) == ["I am fine.<|im_end|>"]


def test_eos_that_closes_the_conversation_does_not_split_it():
    specials = ["<s>", "</s>", "<|end|>", "<|user|>", "<|assistant|>"]
    tokenizer = byte_level(EOS_AT_END, specials, bos="<s>", eos="</s>")
    (example,) = examples_of(tokenizer, chat("Hello?", "I am fine.", "And you?", "Thanks."))
    assert trained(example, tokenizer) == ["I am fine.<|end|>", "Thanks.<|end|>\n</s>"]


def test_eos_at_the_end_does_not_hide_that_reasoning_was_dropped():
    specials = ["<s>", "</s>", "<|end|>", "<|user|>", "<|assistant|>"]
    drops = EOS_AT_END.replace("m['content']", "(m['content'] if loop.last else m['content'].split('</think>')[-1])")
    tokenizer = byte_level(drops, specials, bos="<s>", eos="</s>")
    with pytest.warns(UserWarning, match="one example per assistant turn"):
        examples = examples_of(tokenizer, chat("Hello?", "<think>hm</think>I am fine.", "And you?", "Thanks."))
    assert [trained(e, tokenizer) for e in examples] == [
        ["<think>hm</think>I am fine.<|end|>\n</s>"],
        ["Thanks.<|end|>\n</s>"],
    ]


def test_eos_that_alone_closes_a_turn_is_learnt_for_every_turn():
    tokenizer = byte_level(ONLY_EOS_AT_END, ["</s>"], bos=None, eos="</s>")
    with pytest.warns(UserWarning, match="one example per assistant turn"):
        examples = examples_of(tokenizer, chat("Hello?", "I am fine.", "And you?", "Thanks."))
    assert [trained(e, tokenizer) for e in examples] == [[" I am fine.</s>"], [" Thanks.</s>"]]


def test_template_without_end_token_is_said_once():
    tokenizer = byte_level(NO_EOS, ["</s>"], bos=None, eos="</s>")
    rows = [{"messages": chat("Hello?", "I am fine.")}] * 3
    with pytest.warns(UserWarning) as caught:
        examples = tokenize_rows(rows, tokenizer, max_length=99, progress=False)
    (warning,) = caught
    assert "3 of 3 rows: conversations have an assistant turn that is not trained to end" in str(warning.message)
    assert trained(examples[0], tokenizer) == ["I am fine.\n\n"]


def test_generation_block_that_leaves_out_the_end_token_is_followed_and_said():
    marked, bare = "+ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}", "}}{% endgeneration %}{{ '<|im_end|>\n' }}"
    template = GENERATION.replace(marked, bare)
    assert template != GENERATION
    tokenizer = chatml(template)
    with pytest.warns(UserWarning, match="inside {% generation %}"):
        (example,) = examples_of(tokenizer, chat("Hello?", "I am fine."))
    assert trained(example, tokenizer) == ["I am fine."]


def test_generation_blocks_agree_with_transformers_own_mask():
    tokenizer = chatml(GENERATION)
    (example,) = examples_of(tokenizer, CONVERSATION)
    theirs = tokenizer.apply_chat_template(CONVERSATION, return_assistant_tokens_mask=True, return_dict=True)
    assert (example.labels != IGNORE).astype(int).tolist() == theirs["assistant_masks"]


def yi(make) -> Any:
    """A small tokenizer of either kind; Yi's own is sentencepiece with ChatML's tokens added, and adds no BOS."""
    tokenizer = make()
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = YI
    return tokenizer


def assert_tokens_and_mask_are_transformers(example, tokenizer, messages, answer: str) -> None:
    """Against the template with {% generation %} put around `answer`, an expression in it."""
    assert tokenizer.chat_template.count("{{ " + answer + " }}") == 1
    marked = tokenizer.chat_template.replace(
        "{{ " + answer + " }}", "{% generation %}{{ " + answer + " }}{% endgeneration %}"
    )
    theirs = tokenizer.apply_chat_template(
        messages, chat_template=marked, return_assistant_tokens_mask=True, return_dict=True
    )
    assert example.input_ids.tolist() == theirs["input_ids"]
    assert (example.labels != IGNORE).astype(int).tolist() == theirs["assistant_masks"]


@pytest.mark.parametrize("make", [chatml, sentencepiece])
def test_yi_equals_transformers(make):
    tokenizer = yi(make)
    messages = chat("system: Be brief.", " Über 日本?\n", "It's naïve 🙂.", "And you?", "The answer is 42.\n")
    (example,) = examples_of(tokenizer, messages)
    assert_tokens_and_mask_are_transformers(example, tokenizer, messages, "m['content'] + '<|im_end|>'")
    assert [text.strip() for text in trained(example, tokenizer)] == [
        "It's naïve 🙂.<|im_end|>",
        "The answer is 42.\n<|im_end|>",
    ]


@pytest.fixture(scope="module")
def tekken() -> Any:
    """Mistral's tokenizer of 131072 ids, from the file in their package; its merges are all splits of its tokens."""
    config, vocab = read_tekken("tekken_240911.json")
    specials = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    specials += [f"<SPECIAL_{i}>" for i in range(len(specials), config["default_num_special_tokens"])]
    vocab = vocab[: config["default_vocab_size"] - len(specials)]
    # As tokenizers writes bytes: 256 letters, in the order of the bytes they stand for.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {b: chr(b) for b in printable}
    letters |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in letters)}
    words = ["".join(letters[b] for b in base64.b64decode(token["token_bytes"])) for token in vocab]
    rank = {word: i for i, word in enumerate(words)}
    merges = []
    for word in words:
        splits = [(word[:i], word[i:]) for i in range(1, len(word)) if word[:i] in rank and word[i:] in rank]
        merges += sorted(splits, key=lambda pair: (rank[pair[0]], rank[pair[1]]))
    ids = {word: i for i, word in enumerate([*specials, *words])}
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(config["pattern"]), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEKKEN
    )


def read_tekken(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`config` and `vocab` of a tekken file; the package that holds it is downloaded once and not installed."""
    folder = default_cache_dir() / "mistral-common"
    wheel = folder / "mistral_common-1.13.1-py3-none-any.whl"
    if not wheel.exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
        done = subprocess.run([*command, "-d", folder, "mistral-common==1.13.1"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(wheel) as archive:
        file = json.loads(archive.read(f"mistral_common/data/{name}"))
    return file["config"], file["vocab"]


# Questions, answers and their ids by mistral-common 1.13.1 (InstructTokenizerV3.encode_instruct).
MISTRAL = ["What is 12345 + 1?", "It is 12346 — naïve, isn't it? 🙂", "Über 日本?\n", "Yes.\n\nTwo LINES, camelCase."]
BY_MISTRAL = [
    [1, 3, 7493, 1395, 1032, 1049, 1050, 1051, 1052, 1053, 1867, 1032, 1049, 1063, 4],
    [2757, 1395, 1032, 1049, 1050, 1051, 1052, 1054, 2251, 98355, 1044, 10045, 2405, 1494, 1063, 119685, 1153, 1130, 2],
    [3, 79904, 30367, 9551, 4],
    [16860, 1338, 16489, 78532, 5548, 1044, 98537, 11139, 1046, 2],
]


def test_tekken_equals_mistral_and_transformers(tekken):
    messages = chat(*MISTRAL)
    (example,) = examples_of(tekken, messages)
    assert example.input_ids.tolist() == sum(BY_MISTRAL, [])
    want = [[IGNORE] * len(ids) if i % 2 == 0 else ids for i, ids in enumerate(BY_MISTRAL)]
    assert example.labels.tolist() == sum(want, [])
    assert_tokens_and_mask_are_transformers(example, tekken, messages, "m['content'] + eos_token")
    assert trained(example, tekken) == [f"{text}</s>" for text in MISTRAL[1::2]]
    (text,) = tokenize_rows([{"text": MISTRAL[1]}], tekken, max_length=99, progress=False)
    assert text.input_ids.tolist() == [1, *BY_MISTRAL[1]]


def test_chat_template_without_the_bos_that_plain_text_gets_is_said():
    tokenizer = llama3()
    with pytest.warns(UserWarning, match="do not begin with the BOS token"):
        (example,) = examples_of(tokenizer, chat("Hello?", "Hi"), chat_template=LLAMA3.replace("{{ bos_token }}", ""))
    assert tokenizer.bos_token_id not in example.input_ids


def test_consecutive_turns_tools_and_template_variables_reach_the_template():
    template = (
        "{% if tools %}{{ 'tools: ' + tools | tojson + ' ' + mode + '\n' }}{% endif %}{% for m in messages %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] or '')"
        " + (m['tool_calls'] | tojson if m['tool_calls'] else '')"
        " + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = chatml(template)
    row = {
        "messages": [
            {"role": "user", "content": "The answer?"},
            {"role": "assistant", "content": None, "tool_calls": [{"name": "find"}]},
            {"role": "tool", "content": "42"},
            {"role": "assistant", "content": "It is"},
            {"role": "assistant", "content": "42."},
        ],
        "tools": '[{"name": "find"}]',
        "chat_template_kwargs": {"mode": "fast"},
    }
    (example,) = tokenize_rows([row], tokenizer, max_length=999, progress=False)
    assert trained(example, tokenizer) == ['[{"name": "find"}]<|im_end|>', "It is<|im_end|>", "42.<|im_end|>"]
    assert tokenizer.decode(example.input_ids).startswith('tools: [{"name": "find"}] fast\n<|im_start|>user')


def test_greeting_is_context_only():
    tokenizer = chatml()
    messages = [{"role": "assistant", "content": "Hello!"}, *chat("Hi", "How are you?")]
    with pytest.warns(UserWarning, match="begin with an assistant message"):
        (example,) = examples_of(tokenizer, messages)
    assert trained(example, tokenizer) == ["How are you?<|im_end|>"]


def test_prompt_and_completion_as_messages():
    tokenizer = chatml()
    row = {"prompt": CONVERSATION[:4], "completion": CONVERSATION[4:]}

    def tokens(**options):
        (example,) = tokenize_rows([row], tokenizer, max_length=999, progress=False, **options)
        return trained(example, tokenizer)

    assert tokens() == ["The answer is 42.<|im_end|>"]
    both = ["I am fine, thanks.<|im_end|>", "The answer is 42.<|im_end|>"]
    assert tokens(completion_only_loss=False, assistant_only_loss=True) == both
    assert len(tokens(completion_only_loss=False)[0]) > 100


@pytest.mark.parametrize("template", [CHATML, GENERATION])
def test_random_conversations_train_on_exactly_the_answers(template):
    tokenizer = chatml(template)
    rng = random.Random(5)
    straddling = 0
    pieces = [" ", "\n", "\n\n", "é", "🤷🏽", "the", "The answer", "42", ".", "  ", "\t", "日本", "<|im", "_end|", "a"]
    for _ in range(60):
        texts = ["".join(rng.choices(pieces, k=rng.randint(1, 8))) for _ in range(2 * rng.randint(1, 4))]
        messages = chat(*texts)
        renderer = ChatRenderer(tokenizer)
        (text,) = renderer.training_texts(messages)
        assert [text.text[a:b].removesuffix("\n") for a, b in text.spans] == [t + "<|im_end|>" for t in texts[1::2]]
        encoder = Encoder(tokenizer)
        ids, starts, ends = encoder.offsets(text.text)
        encoded = encoder.encode_chat(text)
        # Each labelled token stands for characters of an answer, and each token of an answer is labelled.
        allowed = [set(range(a, a + len(text.text[a:b].removesuffix("\n")))) for a, b in text.spans]
        for t, (start, end) in enumerate(zip(starts, ends, strict=True)):
            inside = any(set(range(start, end)) <= answer for answer in allowed)
            assert (encoded.labels[t] != IGNORE) == inside, (text.text, t, text.text[start:end])
        over = any(start < a < end for start, end in zip(starts, ends, strict=True) for a, _ in text.spans)
        assert ("straddles" in encoded.notes) == over
        straddling += over
        assert ids.tolist() == tokenizer(text.text, add_special_tokens=False)["input_ids"]
        assert starts[0] == 0 and ends[-1] == len(text.text)
    assert 0 < straddling < 60


def test_preview_marks_what_is_trained():
    tokenizer = chatml()
    (example,) = examples_of(tokenizer, chat("Hello?", "é 🤷🏽", "And?", " 42"))
    assert preview_plain(example, tokenizer) == (
        "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n[[é 🤷🏽<|im_end|>]]\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n[[ 42<|im_end|>]]\n"
    )
    text = preview(example, tokenizer)
    assert text.plain == tokenizer.decode(example.input_ids)
    assert [text.plain[s.start : s.end] for s in text.spans if s.style == "bold green"] == [
        "é 🤷🏽<|im_end|>",
        " 42<|im_end|>",
    ]


def test_preview_keeps_the_space_of_sentencepiece():
    tokenizer = sentencepiece()
    (example,) = examples_of(tokenizer, chat("Hello?", "I am"))
    assert preview_plain(example, tokenizer).endswith("[/INST][[ I am</s>]]")


def test_end_token_that_is_not_special_ends_a_turn():
    tokenizer = byte_level(CHATML, ["<|im_start|>", "</s>"], bos=None, eos="</s>")
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=False, normalized=False)])
    (example,) = examples_of(tokenizer, chat("Hello?", "Hi"))
    assert trained(example, tokenizer) == ["Hi<|im_end|>"]


def test_end_token_that_takes_in_whitespace_is_trained():
    # Each user turn begins with the newline that the end token of the assistant's turn swallows.
    template = CHATML.replace("{{ '<|im_start|>'", "{{ '\n<|im_start|>'").replace("'<|im_end|>' + '\n'", "'<|im_end|>'")
    template = template.replace("{{ '<|im_start|>assistant", "{{ '\n<|im_start|>assistant")
    tokenizer = byte_level(template, ["</s>"], bos=None, eos="</s>")
    marks = [AddedToken(t, special=True, rstrip=True) for t in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    (example,) = examples_of(tokenizer, chat("Hello?", "Hi", "And?", "Ho"))
    assert trained(example, tokenizer) == ["Hi<|im_end|>", "Ho<|im_end|>"]


def test_no_chat_template():
    with pytest.raises(ValueError, match=r"row 0 .*\(\w+\) has no chat template.*chat_template="):
        examples_of(chatml(None), chat("Hello?", "Hi"))


def test_slow_tokenizer_is_refused_by_name():
    class SlowTokenizer:
        is_fast = False

    with pytest.raises(ValueError, match="SlowTokenizer is a slow tokenizer.*AutoTokenizer"):
        tokenize_rows([{"text": "Hello"}], SlowTokenizer(), max_length=9, progress=False)


def test_template_that_refuses_the_messages():
    messages = [{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}]
    with pytest.raises(ValueError, match=r"row 0 .*refused the messages \(roles: user, robot\): Only user"):
        examples_of(sentencepiece(), messages)


def test_real_smollm2(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    messages = chat(
        "system: Be brief.", "Order 2 teas  ", ' {"item": "tea"}\n', "١٢٣ ½ ² 🤷🏽‍♀️", "naïve 日本語\n\n1234"
    )
    (example,) = examples_of(tokenizer, messages)
    assert trained(example, tokenizer) == [' {"item": "tea"}\n<|im_end|>', "naïve 日本語\n\n1234<|im_end|>"]
    assert example.input_ids.tolist() == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert example.input_ids[: len(prompt)].tolist() == prompt
    assert (example.labels[len(prompt) : -1] != IGNORE).all() and example.labels[-1] == IGNORE  # the last newline
    (text,) = tokenize_rows([{"text": "Once upon a time"}], tokenizer, max_length=99, progress=False)
    assert tokenizer.decode(text.input_ids) == "Once upon a time<|im_end|>"
    (row,) = tokenize_rows([{"prompt": "2+2=", "completion": "4"}], tokenizer, max_length=99, progress=False)
    assert trained(row, tokenizer) == ["4<|im_end|>"]
