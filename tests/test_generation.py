"""Generation: the cache changes nothing, rows do not see each other, sampling follows the distribution."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import generate_text, get_peft_model
from lora_jax.generation import _draw, _penalised, _sifted, _tokens_of, stop_ids
from lora_jax.kernels import kept
from tests import tiny

NEW = 12
PROMPTS = [tiny.ids(1, n, seed=n)[0].tolist() for n in (9, 1, 5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def model(folder):
    return tiny.randomize_adapter(get_peft_model(tiny.open_model(folder), r=4, verbose=False))


def window_model(tmp_path_factory):
    hf = tiny.config(architectures=["MistralForCausalLM"], sliding_window=4, num_hidden_layers=3)
    return tiny.open_model(tiny.write_folder(tmp_path_factory.mktemp("tiny") / "window", hf, tokenizer=False), "nf4")


def full_forward(model, prompt: list[int], n: int) -> list[int]:
    """Greedy without a cache: the whole row anew for every token. One shape, so that it compiles once."""
    width = 24
    row, new = list(prompt), []
    for _ in range(n):
        ids, mask = np.zeros((1, width), np.int32), np.zeros((1, width), np.int32)
        ids[0, : len(row)], mask[0, : len(row)] = row, 1
        logits = np.asarray(model.logits(ids, mask))[0, len(row) - 1]
        best = np.sort(logits)[-2:]
        assert best[1] - best[0] > 1e-4  # no tie that rounding decides
        new.append(int(logits.argmax()))
        row.append(new[-1])
    return new


@pytest.fixture(scope="module")
def greedy(model) -> np.ndarray:
    """What the prompts continue with, each alone, [3, NEW]."""
    return np.concatenate([model.generate([p], max_new_tokens=NEW, eos_token_id=[])[:, len(p) :] for p in PROMPTS])


def test_greedy_equals_the_full_forward_at_every_step(model, greedy):
    for prompt, new in zip(PROMPTS, greedy, strict=True):
        assert new.tolist() == full_forward(model, prompt, NEW)
    assert len(np.unique(greedy)) > 5  # not one token over and over


def test_greedy_with_a_sliding_window_and_nf4(tmp_path_factory):
    model = window_model(tmp_path_factory)
    out = model.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[])
    for prompt, row in zip(PROMPTS, out, strict=True):
        assert row[-NEW:].tolist() == full_forward(model, prompt, NEW)


def test_a_batch_equals_its_rows_alone_in_every_form(model, greedy):
    width = max(map(len, PROMPTS))
    ids, mask = np.zeros((3, width), np.int64), np.zeros((3, width), np.int64)
    for i, prompt in enumerate(PROMPTS):
        ids[i, width - len(prompt) :], mask[i, width - len(prompt) :] = prompt, 1
    right_ids, right_mask = np.zeros_like(ids), np.zeros_like(mask)
    for i, prompt in enumerate(PROMPTS):
        right_ids[i, : len(prompt)], right_mask[i, : len(prompt)] = prompt, 1
    forms = [
        (PROMPTS, {}),
        ([np.array(p) for p in PROMPTS], {}),
        (ids, {"attention_mask": mask}),
        (ids + 7 * (1 - mask), {"attention_mask": mask.astype(bool)}),  # what pads means nothing
        ({"input_ids": ids, "attention_mask": mask}, {}),
        ({"input_ids": right_ids, "attention_mask": right_mask}, {}),
        (jnp.asarray(ids), {"attention_mask": jnp.asarray(mask)}),
    ]
    for prompts, options in forms:
        out = model.generate(prompts, max_new_tokens=NEW, eos_token_id=[], pad_token_id=99, **options)
        assert out.dtype == np.int32
        assert out.shape == (3, width + NEW)
        np.testing.assert_array_equal(out[:, width:], greedy)
        for row, prompt in zip(out, PROMPTS, strict=True):
            assert row[:width].tolist() == [99] * (width - len(prompt)) + prompt


def test_one_row_of_ids(model, greedy):
    for prompt in (PROMPTS[0], np.array(PROMPTS[0])):
        out = model.generate(prompt, max_new_tokens=3, eos_token_id=[])
        assert out.tolist() == [PROMPTS[0] + greedy[0, :3].tolist()]
    out = model.generate(np.array(PROMPTS[0]), attention_mask=np.ones(9), max_new_tokens=3, eos_token_id=[])
    assert out[0, 9:].tolist() == greedy[0, :3].tolist()


def test_a_cache_in_8_bits(model):
    """Half of the bytes, and logits that differ by what rounding keys and values to 8 bits makes of them."""
    prompt = jnp.asarray(tiny.ids(2, 30, seed=5))
    module = model.module
    logits, sizes = {}, {}
    for quantized in (False, True):
        cache = module.new_cache(2, 32, quantized=quantized)
        sizes[quantized] = sum(leaf.nbytes for leaf in jax.tree.leaves((cache.keys, cache.values)))
        _, cache = module(prompt[:, :29], cache=cache)
        x, cache = module(prompt[:, 29:], cache=cache)
        assert int(cache.length) == 30
        logits[quantized] = np.asarray(module.head().logits(x[:, -1]), np.float64)
    blocks = 2 / kept.block_of(model.config.head_dim)  # bytes of a scale for each element
    assert sizes[True] / sizes[False] == (1 + blocks) / module.dtype.itemsize
    error = np.linalg.norm(logits[True] - logits[False]) / np.linalg.norm(logits[False])
    # Elements are off by up to 0.4 % of their block's largest, 0.7 % of their norm, in each layer; scores are
    # exponents.
    assert 1e-5 < error < 0.03
    plain, rounded = (
        model.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[], cache_implementation=kind)
        for kind in ("static", "quantized")
    )
    assert (plain == rounded).mean() > 0.8  # from a near tie on a row goes another way
    with pytest.raises(ValueError, match="'offloaded' is not known; there are None and \"quantized\""):
        model.generate(PROMPTS, cache_implementation="offloaded")


def test_prompts_longer_than_a_multiple_of_64_and_caches_that_grow(model):
    prompt = tiny.ids(1, 70, seed=4)
    ahead = model.generate(prompt, max_new_tokens=70, eos_token_id=[])
    whole = np.asarray(model.logits(ahead))[0]
    # At every step the token is the likeliest after all before it.
    margin = whole[69:-1].max(-1) - np.take_along_axis(whole[69:-1], ahead[0, 70:, None], -1)[:, 0]
    assert margin.max() < 1e-4


def test_left_padding_of_logits(model):
    ids = tiny.ids(1, 10)
    alone = np.asarray(model.logits(ids))[0]
    padded = np.concatenate([np.full((1, 6), 3), ids], axis=1)
    mask = np.repeat([[0, 1]], [6, 10], axis=1)
    # Other shapes are other programs: sums in another order.
    np.testing.assert_allclose(np.asarray(model.logits(padded, mask))[0, 6:], alone, atol=2e-5)
    with pytest.raises(ValueError, match=r"of one shape \[B, T\], got \(1, 10\), \(1, 16\)"):
        model.logits(ids, mask)


# Stopping.


def test_stop_ids_of_both_configs(folder, model, tmp_path):
    assert stop_ids(model) == [257, 258]  # generation_config.json first, then config.json
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "generation_config.json").unlink()
    assert stop_ids(tiny.open_model(other)) == [257]
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    assert stop_ids(tiny.open_model(other)) == []


def test_rows_stop_at_any_stop_id_and_are_padded(model, greedy):
    stops = [int(greedy[0, 2]), int(greedy[1, 4])]
    out = model.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=stops, pad_token_id=77)[:, 9:]
    lengths = []
    for row, want in zip(out, greedy, strict=True):
        hits = np.flatnonzero(np.isin(want, stops))
        n = hits[0] + 1 if len(hits) else NEW  # the stop id itself is part of the answer
        n_out = min(n, out.shape[1])
        assert row[:n_out].tolist() == want[:n_out].tolist()
        assert set(row[n_out:].tolist()) <= {77}
        lengths.append(n)
    assert out.shape[1] == max(lengths)  # it ends with the last row
    assert min(lengths) < max(lengths)
    alone = model.generate([PROMPTS[0]], max_new_tokens=NEW, eos_token_id=int(greedy[0, 2]))
    assert alone.shape == (1, 9 + np.flatnonzero(greedy[0] == greedy[0, 2])[0] + 1)


def test_stop_ids_come_from_the_model_folder(folder, greedy, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [319, int(greedy[0, 3])]}))
    model = tiny.randomize_adapter(get_peft_model(tiny.open_model(other), r=4, verbose=False))
    out = model.generate([PROMPTS[0], PROMPTS[2]], max_new_tokens=NEW)
    first = np.flatnonzero(greedy[0] == greedy[0, 3])[0]
    assert out[0, 9 : 9 + first + 1].tolist() == greedy[0, : first + 1].tolist()
    assert set(out[0, 9 + first + 1 :].tolist()) <= {319}  # padded with the first stop id


def test_no_token_is_generated_where_it_would_rotate_the_cached_keys_anew(tmp_path):
    """Dynamic NTK scaling, up to its context a plain rotation; logits of longer rows are those of transformers."""
    scaling = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16}
    model = tiny.open_model(tiny.write_folder(tmp_path / "model", tiny.config(**scaling), tokenizer=False))
    with pytest.raises(ValueError, match="exceed the model's 16 positions .dynamic rope scaling rotates all keys anew"):
        model.generate([PROMPTS[0]], max_new_tokens=8)
    assert np.isfinite(np.asarray(model.logits(tiny.ids(1, 20)))).all()


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "a prompt is empty; give at least one token"),
        ([[]], {}, "a prompt is empty"),
        ([[5], []], {}, "a prompt is empty"),
        (np.ones((1, 3)), {"attention_mask": np.zeros((1, 3))}, "a prompt is empty"),
        ([[1] * 250], {"max_new_tokens": 7}, "prompt of 250 and max_new_tokens=7 exceed the model's 256 positions"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens >= 1"),
        ([[1]], {"temperature": 0.0}, r"temperature > 0, .* leave do_sample=False"),
        ([[1]], {"top_p": 0.0}, "0 < top_p <= 1"),
        ([[1]], {"top_p": 1.5}, "0 < top_p <= 1"),
        ([[1]], {"top_k": -1}, "top_k >= 0"),
        ([[1]], {"repetition_penalty": 0.0}, "repetition_penalty > 0"),
        ([[1]], {"min_new_tokens": 5, "max_new_tokens": 4}, r"min_new_tokens <= max_new_tokens; got 1.0, 5 \(of 4\)"),
        ([[1]], {"stop_strings": "x"}, "give tokenizer, too"),
        ([[1]], {"stop_strings": ["x", ""], "tokenizer": object()}, "texts that are not empty, got"),
        ([[1], [2]], {"streamer": object()}, "a streamer shows one row; got 2 prompts"),
    ],
)
def test_bad_input(model, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(prompt, **options)


# Sampling.


def test_sampling_with_one_choice_is_greedy(model, greedy):
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        out = model.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[], do_sample=True, seed=3, **options)
        np.testing.assert_array_equal(out[:, 9:], greedy, err_msg=str(options))


def test_sampling_follows_the_seed(model):
    def draw(seed):
        return model.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[], do_sample=True, seed=seed)[:, 9:].tolist()

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    same = model.generate([PROMPTS[0]] * 3, max_new_tokens=NEW, eos_token_id=[], do_sample=True, seed=1)
    assert len({tuple(row) for row in same.tolist()}) == 3  # rows draw for themselves


LOGITS = np.array([0.5, 2.0, -1.0, 1.0, 0.0, 1.9, -3.0, 0.7], np.float32)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (2.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.7), (0.7, 4, 0.8)],
)
def test_samples_are_distributed_as_they_should(temperature, top_k, top_p):
    n = 20_000
    rows = jnp.broadcast_to(jnp.asarray(LOGITS), (n, 8))
    settings = (jnp.float32(temperature), jnp.float32(top_p))
    tokens = np.asarray(_draw(rows, jax.random.key(0), *settings, top_k=top_k))
    scores = LOGITS.astype(np.float64) / temperature
    p = np.exp(scores) / np.exp(scores).sum()
    order = np.argsort(-p)
    # Nucleus: the smallest set of likeliest tokens that reaches top_p, of what top_k leaves.
    kept = order[: top_k or None]
    reached = np.cumsum(p[kept]) / p[kept].sum()
    kept = kept[: np.searchsorted(reached, top_p) + 1] if top_p < 1 else kept
    want = np.where(np.isin(np.arange(8), kept), p, 0)
    want /= want.sum()
    counts = np.bincount(tokens, minlength=8)
    assert counts[want == 0].sum() == 0
    seen = want > 0
    chi2 = ((counts - n * want)[seen] ** 2 / (n * want)[seen]).sum()
    assert chi2 < 30  # at most 7 degrees of freedom: exceeded with probability 1e-4


def test_rows_are_sampled_from_their_own_logits():
    rows = jnp.asarray(np.where(np.eye(5, 8) == 1, 50.0, 0.0))
    tokens = _draw(rows, jax.random.key(0), jnp.float32(1), jnp.float32(1), top_k=0)
    assert np.asarray(tokens).tolist() == [0, 1, 2, 3, 4]


def test_min_p(model):
    """Tokens at least so many times as likely as the likeliest, and no others."""
    n = 5_000
    rows = jnp.broadcast_to(jnp.asarray(LOGITS), (n, 8))
    tokens = np.asarray(_draw(rows, jax.random.key(1), jnp.float32(1), jnp.float32(1), jnp.float32(0.3), top_k=0))
    want = np.exp(LOGITS - LOGITS.max()) >= 0.3
    assert set(np.unique(tokens)) == set(np.flatnonzero(want))
    assert want.sum() == 3


def test_repetition_penalty(model):
    """Greedy with a penalty by the definition, from logits of the whole row at every step."""
    prompt, new = PROMPTS[0], []
    out = model.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[], repetition_penalty=1.7)[0, 9:].tolist()
    whole = np.asarray(model.logits([prompt + out]), np.float64)[0]
    for step in range(NEW):
        scores = whole[len(prompt) - 1 + step].copy()
        for token in {*prompt, *new}:
            scores[token] = scores[token] / 1.7 if scores[token] > 0 else scores[token] * 1.7
        assert scores[out[step]] >= scores.max() - 1e-4  # sums in another order
        new.append(out[step])
    assert len({*new}) == NEW  # strong enough that nothing comes twice
    assert len({*model.generate([prompt], max_new_tokens=NEW, eos_token_id=[])[0, 9:].tolist()}) < NEW


def test_min_new_tokens(model, greedy):
    stop = int(greedy[0, 2])
    out = model.generate([PROMPTS[0]], max_new_tokens=NEW, eos_token_id=[stop, 300], min_new_tokens=6)[0, 9:]
    assert not {stop, 300} & set(out[:6].tolist())
    assert out[:2].tolist() == greedy[0, :2].tolist()


def test_stop_strings(model, folder, greedy):
    """Each row ends with the step that completes a text, wherever that ends in a token."""
    from lora_jax.loading import load_tokenizer

    tokenizer = load_tokenizer(folder)
    texts = [tokenizer.decode(greedy[0, 2:5]), tokenizer.decode(greedy[2, 3:5])]
    ends = [
        next(n for n in range(1, NEW + 1) if any(t in tokenizer.decode(row[:n]) for t in texts) or n == NEW)
        for row in greedy
    ]
    assert ends[0] <= 5 < NEW and ends[2] <= 5
    options = {"max_new_tokens": NEW, "eos_token_id": [], "tokenizer": tokenizer, "pad_token_id": 77}
    out = model.generate(PROMPTS, stop_strings=texts, **options)[:, 9:]
    assert out.shape[1] == max(ends)
    for row, want, end in zip(out, greedy, ends, strict=True):
        assert row[:end].tolist() == want[:end].tolist()
        assert set(row[end:].tolist()) <= {77}
    options = {"max_new_tokens": NEW, "eos_token_id": []}
    row = model.generate([tokenizer("Hello")["input_ids"]], **options)[0, 5:]
    text = tokenizer.decode(row[3:5])
    end = next(n for n in range(1, NEW + 1) if text in tokenizer.decode(row[:n]))
    (answer,) = generate_text(model, tokenizer, ["Hello"], stop_strings=text, **options)
    assert answer == tokenizer.decode(row[:end], skip_special_tokens=True)


CASES = [
    {"do_sample": True, "temperature": 0.7, "top_k": 20},
    {"do_sample": True, "top_p": 0.6},
    {"do_sample": True, "temperature": 1.5, "top_k": 40, "top_p": 0.8},
    {"do_sample": True, "temperature": 0.8, "min_p": 0.2},
    {"do_sample": True, "temperature": 2.0, "top_k": 30, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.8, "min_new_tokens": 5},
    {"repetition_penalty": 1.2, "stop_strings": None},  # a text that is generated
]


@pytest.mark.oracle
def test_settings_are_those_of_transformers(model, folder, oracle, tmp_path):
    """What each setting leaves of the logits, and greedy rows under penalties and with stop strings."""
    from lora_jax.loading import load_tokenizer

    base, tokenizer = tiny.open_model(folder), load_tokenizer(folder)
    with_stop = CASES[-1]
    ahead = base.generate([PROMPTS[0]], max_new_tokens=NEW, eos_token_id=[], repetition_penalty=1.2)[0, 9:]
    cases = [*CASES[:-1], {**with_stop, "stop_strings": [tokenizer.decode(ahead[3:5]), "never so"]}]
    cases = [{"max_new_tokens": 1 if case.get("do_sample") else NEW, **case} for case in cases]
    (tmp_path / "in.json").write_text(json.dumps({"prompts": PROMPTS, "cases": cases}))
    oracle("hf_sampling.py", folder, tmp_path / "in.json", tmp_path / "out.npz")
    want = np.load(tmp_path / "out.npz")
    for number, case in enumerate(cases):
        for row, prompt in enumerate(PROMPTS):
            scores, tokens = want[f"{number} {row} scores"], want[f"{number} {row} tokens"]
            if case.get("do_sample"):
                last = base.logits([prompt])[:, -1]
                last = _penalised(last, _tokens_of([prompt], tiny.VOCAB), case.get("repetition_penalty", 1.0))
                settings = case.get("top_p", 1.0), case.get("min_p", 0.0), case.get("top_k", 0)
                ranked, order = map(np.asarray, _sifted(last / case.get("temperature", 1.0), *settings))
                got = np.zeros_like(ranked)
                np.put_along_axis(got, order, ranked, axis=1)
                assert 1 <= np.isfinite(got).sum() < tiny.VOCAB
                np.testing.assert_allclose(got, scores, atol=2e-4, err_msg=str(case))
            else:
                got = base.generate([prompt], tokenizer=tokenizer, **case)[0, len(prompt) :]
                assert got.tolist() == tokens.tolist(), case


# Streaming and text.


class Recorder:
    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        assert not self.ended
        self.values.append(np.asarray(value).tolist())

    def end(self):
        self.ended += 1


def test_streaming(model, greedy):
    streamer = Recorder()
    out = model.generate([PROMPTS[0]], max_new_tokens=4, eos_token_id=[], streamer=streamer)
    assert streamer.values == [PROMPTS[0], *([int(token)] for token in greedy[0, :4])]
    assert streamer.ended == 1
    assert out[0].tolist() == sum(streamer.values, [])


def test_streaming_through_transformers(model, folder, greedy, capsys):
    from transformers import AutoTokenizer, TextStreamer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    model.generate([PROMPTS[0]], max_new_tokens=4, eos_token_id=[], streamer=streamer)
    assert capsys.readouterr().out == tokenizer.decode(greedy[0, :4]) + "\n"


def test_generate_text(folder):
    model, tokenizer = lora_jax.from_pretrained(folder, progress=False, load_in_4bit=False)
    talk = [{"role": "user", "content": "Hi"}]
    ids = tokenizer("user: Hi<|eot|>assistant: ")["input_ids"]
    assert ids.count(258) == 1
    prompts = ["Hello", talk, "A longer prompt"]
    options = {"max_new_tokens": 6, "eos_token_id": []}
    answers = generate_text(model, tokenizer, prompts, batch_size=2, **options)
    for answer, row in zip(
        answers, [tokenizer("Hello")["input_ids"], ids, tokenizer("A longer prompt")["input_ids"]], strict=True
    ):
        new = model.generate([row], **options)[0, len(row) :]
        assert answer == tokenizer.decode(new, skip_special_tokens=True)
    assert generate_text(model, tokenizer, []) == []


def test_a_new_adapter_is_seen_by_compiled_functions(folder):
    """Functions compiled for the base model are not used for the adapted one, nor old values after an update."""
    model = tiny.open_model(folder)
    ids = tiny.ids(1, 8)
    base = np.asarray(model.logits(ids))
    get_peft_model(model, r=2, verbose=False)
    np.testing.assert_allclose(model.logits(ids), base, atol=1e-5)
    tiny.randomize_adapter(model)
    first = np.asarray(model.logits(ids))
    assert np.abs(first - base).max() > 0.1
    tiny.randomize_adapter(model, seed=1)
    assert np.abs(np.asarray(model.logits(ids)) - first).max() > 0.1


def test_a_step_copies_no_packed_weights(compile_for_gpus):
    """Programs compiled for GPUs that need not be there: the kernels read each layer where it lies in its stack."""
    *steps, cut = compile_for_gpus("generation_for_gpu.py")
    assert [step["case"] for step in steps] == ["mosaic 1", "triton_in_loop 1"]
    assert all(step["copies"] == [] for step in steps), steps
    assert "dynamic-slice u8[1,512,128]" in cut["copies"]  # so the copies would be seen
    assert steps[0]["temporary"] + 2 * 512 * 128 < cut["temporary"]  # two weights of [512, 256] less
