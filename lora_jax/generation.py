"""Text generation with a key/value cache: greedy or sampled, in batches, optionally streamed."""

import inspect
import json
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax.config import Names, resolve_names
from lora_jax.models.streamed import on_device

if TYPE_CHECKING:
    from lora_jax.model import CausalLM

__all__ = ["Streamer", "generate", "generate_text", "logits", "prompt_ids", "stop_ids"]

# Prompts and caches are padded to a multiple of this, so that few shapes are compiled; on the left, and masked.
_MULTIPLE = 64


class Streamer(Protocol):
    """What `generate` tells about tokens as they come; transformers' TextStreamer is one."""

    def put(self, value: np.ndarray) -> None:
        """Receives the prompt [T], then each new token [1]."""
        ...

    def end(self) -> None:
        """Is called once, after the last token."""
        ...


def logits(model: "CausalLM", input_ids, attention_mask=None) -> jax.Array:
    """See `CausalLM.logits`."""
    ids = jnp.asarray(input_ids, jnp.int32)
    mask = jnp.ones_like(ids) if attention_mask is None else jnp.asarray(attention_mask, jnp.int32)
    if ids.ndim != 2 or mask.shape != ids.shape:
        raise ValueError(
            f"logits: want input_ids and attention_mask of one shape [B, T], got {ids.shape}, {mask.shape}"
        )
    graph, lora, frozen = _at_hand(model)

    def run(lora, frozen, ids, mask):
        module = nnx.merge(graph, lora, frozen)
        start = jnp.argmax(mask, axis=1)  # first real token
        positions = jnp.maximum(jnp.arange(ids.shape[1]) - start[:, None], 0)
        x, _ = module(ids, positions, jnp.broadcast_to(start[:, None], ids.shape))
        return module.head().logits(x)

    return _jitted(model, "logits", graph, run)(lora, frozen, ids, mask)


def generate(
    model: "CausalLM",
    input_ids,
    *,
    attention_mask=None,
    max_new_tokens: int | None = None,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    min_new_tokens: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    seed: int = 0,
    streamer: Streamer | None = None,
    cache_implementation: str | None = None,
    **more: Any,
) -> np.ndarray:
    """Continues prompts token by token until each has stopped or `max_new_tokens` are made.

    Args:
      model: with or without an adapter.
      input_ids: token ids: [B, T], or B lists of any lengths, or a tokenizer's BatchEncoding.
      attention_mask: [B, T], 0 for padding (on the left) of `input_ids`; taken from a BatchEncoding if that has one.
      max_new_tokens: at most so many new tokens a row; 128 unless given.
      do_sample: draw from the distribution; otherwise the likeliest token is taken. None: draw if any of the next four
        is given.
      temperature: divides the logits before sampling; above 0.
      top_k: sample among the k likeliest tokens; 0 for all, which is the default (transformers' is 50).
      top_p: sample among the likeliest of these, so many that their probabilities add up to p; 1 for all.
      min_p: sample among tokens at least p times as likely as the likeliest; 0 for all.
      repetition_penalty: logits of the tokens that a row holds so far, those of its prompt included, are divided by it
        where they are positive, else multiplied (Keskar et al., arXiv 1909.05858, section 4.1, as transformers reads
        it); 1 for none.
      min_new_tokens: a row gets no stop id before it has so many new tokens.
      stop_strings: a row ends when one of these texts stands in what was generated; it is part of the result.
      tokenizer: for `stop_strings`, which are looked for in the decoded text.
      eos_token_id: ids that end a row; None for all those of generation_config.json and config.json.
      pad_token_id: fills rows that have ended; None for the first stop id.
      seed: of sampling.
      streamer: receives prompt and tokens as they come; for one row only.
      cache_implementation: "quantized" keeps keys and values in 8 bits, in 53 % of the memory of 16, which changes
        logits a little; None (or "static", "dynamic") keeps them as they are.
      more: transformers' other arguments: max_length counts the prompt's tokens, too; use_cache has no effect.

    Returns:
      int32 [B, T + new]: prompts (padded on the left to the longest) and what follows them.

    Raises:
      ValueError: an empty prompt, a setting out of range, more positions than the model has, or something that is not
        implemented.
      TypeError: an unknown argument.
    """
    rows = _rows(input_ids, attention_mask)
    longest = max(map(len, rows))
    more = resolve_names("generate", more, ["max_length", *(set(_ARGUMENTS) - {"more"})], _NAMES)
    if (whole := more.get("max_length")) is not None and max_new_tokens is None:
        max_new_tokens = whole - longest
    max_new_tokens = 128 if max_new_tokens is None else max_new_tokens
    do_sample = any(v is not None for v in (temperature, top_k, top_p, min_p)) if do_sample is None else do_sample
    temperature, top_p = 1.0 if temperature is None else temperature, 1.0 if top_p is None else top_p
    top_k, min_p, least = top_k or 0, min_p or 0.0, min_new_tokens or 0
    penalty = 1.0 if repetition_penalty is None else repetition_penalty
    if not 0 < penalty < math.inf or not 0 <= least <= max_new_tokens:
        raise ValueError(
            "generate wants repetition_penalty > 0 and 0 <= min_new_tokens <= max_new_tokens; "
            f"got {penalty}, {least} (of {max_new_tokens})"
        )
    if stop_strings is not None and tokenizer is None:
        raise ValueError("generate: stop_strings are looked for in decoded text; give tokenizer, too")
    if max_new_tokens < 1 or temperature <= 0 or not 0 < top_p <= 1 or top_k < 0 or not 0 <= min_p <= 1:
        raise ValueError(
            "generate wants max_new_tokens >= 1, temperature > 0, 0 < top_p <= 1, top_k >= 0 and 0 <= min_p <= 1; "
            f"got {max_new_tokens}, {temperature}, {top_p}, {top_k}, {min_p} "
            "(for greedy decoding leave do_sample=False)"
        )
    if longest + max_new_tokens > model.config.max_position:
        why = " (dynamic rope scaling rotates all keys anew for each token beyond, which no cache of them can do)"
        raise ValueError(
            f"a prompt of {longest} and max_new_tokens={max_new_tokens} exceed the model's {model.config.max_position} "
            f"positions{why if model.config.rope.kind == 'dynamic' else ''}; shorten either"
        )
    if cache_implementation not in (None, "static", "dynamic", "quantized"):
        raise ValueError(f'cache_implementation={cache_implementation!r} is not known; there are None and "quantized"')
    if streamer is not None and len(rows) > 1:
        raise ValueError(f"a streamer shows one row; got {len(rows)} prompts")
    stops = stop_ids(model) if eos_token_id is None else np.atleast_1d(np.asarray(eos_token_id, np.int32)).tolist()
    pad = pad_token_id if pad_token_id is not None else (stops[0] if stops else 0)

    graph, lora, frozen = _at_hand(model)
    forward = _jitted(model, "forward", graph, _forward(graph), donate_argnums=4)
    choose = _sample if do_sample else _greedy
    key, settings = jax.random.key(seed), (jnp.float32(temperature), jnp.float32(top_p), jnp.float32(min_p))
    seen = None if penalty == 1 else _tokens_of(rows, model.config.vocab_size)
    texts = None if stop_strings is None else _StopStrings(tokenizer, stop_strings)

    def begin(rows: list[list[int]], room: int):
        """Runs the rows through the model: (their ids, left padding, logits of their last tokens, cache)."""
        width = -(-max(map(len, rows)) // _MULTIPLE) * _MULTIPLE
        ids = np.array([[pad] * (width - len(row)) + row for row in rows], np.int32)
        start = jnp.asarray([width - len(row) for row in rows], jnp.int32)
        length = width + -(-room // _MULTIPLE) * _MULTIPLE
        cache = model.module.new_cache(len(rows), length, quantized=cache_implementation == "quantized")
        return ids, start, *forward(lora, frozen, jnp.asarray(ids), start, cache)

    ids, start, last, cache = begin(rows, max_new_tokens)
    switch = model.config.rope.switches_at
    if streamer is not None:
        streamer.put(np.asarray(rows[0], np.int32))
    made, done = [], np.zeros(len(rows), bool)
    for step in range(max_new_tokens):
        if seen is not None:
            last = _penalised(last, seen, jnp.float32(penalty))
        if step < least and stops:
            last = last.at[:, jnp.asarray(stops)].set(-jnp.inf)
        tokens = np.array(choose(last, jax.random.fold_in(key, step), settings, top_k), np.int32)
        tokens[done] = pad
        made.append(tokens)
        if streamer is not None:
            streamer.put(tokens)
        if seen is not None:
            seen = seen.at[np.arange(len(rows)), tokens].set(True)
        done |= np.isin(tokens, stops)
        if texts is not None:
            done |= texts.found(made)
        if done.all() or step + 1 == max_new_tokens:
            break
        if switch is not None and any(len(row) + len(made) == switch + 1 for row in rows):
            so_far = [[*row, *(int(t[i]) for t in made)] for i, row in enumerate(rows)]
            _, start, last, cache = begin(so_far, max_new_tokens - step - 1)
        else:
            last, cache = forward(lora, frozen, jnp.asarray(tokens[:, None]), start, cache)
    if streamer is not None:
        streamer.end()
    return np.concatenate([ids[:, ids.shape[1] - longest :], np.stack(made, axis=1)], axis=1)


_ARGUMENTS = inspect.signature(generate).parameters
_NAMES = Names(
    no_effect={
        "use_cache": "generation always has a key/value cache",
        "token_type_ids": "no implemented architecture reads them",
        "return_dict_in_generate": "the tokens are returned",
        "synced_gpus": "every process generates the same",
        "disable_compile": "generation is always compiled",
    },
    refused={
        "no_repeat_ngram_size": ((None, 0), "it is not implemented"),
        "num_beams": ((None, 1), "beam search is not implemented"),
        "num_return_sequences": ((None, 1), "give the prompt several times"),
        "penalty_alpha": ((None, 0), "contrastive search is not implemented"),
        "typical_p": ((None, 1, 1.0), "it is not implemented"),
        "stopping_criteria": ((None,), "give eos_token_id or stop_strings"),
        "logits_processor": ((None,), "it is not implemented"),
        "generation_config": ((None,), "give its settings as arguments"),
        "assistant_model": ((None,), "speculative decoding is not implemented"),
        "output_scores": ((None, False), "call model.logits"),
        "output_logits": ((None, False), "call model.logits"),
        "output_hidden_states": ((None, False), "call model.module"),
        "output_attentions": ((None, False), "attention weights are never formed"),
    },
)


def generate_text(
    model: "CausalLM", tokenizer, prompts: Sequence[str | list[dict[str, Any]]], *, batch_size: int = 32, **options
) -> list[str]:
    """Answers to prompts, decoded and without special tokens.

    Args:
      model: with or without an adapter.
      tokenizer: of the model.
      prompts: texts, or conversations (lists of messages) that the chat template turns into prompts.
      batch_size: prompts that run at once.
      options: of `generate`.
    """
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    if options.get("eos_token_id") is None and tokenizer.eos_token_id is not None:
        # What the model was trained to end with may be another one than that of the folder's files.
        options["eos_token_id"] = list(dict.fromkeys([*stop_ids(model), tokenizer.eos_token_id]))
    options.setdefault("tokenizer", tokenizer)
    answers = []
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        out = generate(model, batch, **options)
        answers += tokenizer.batch_decode(out[:, max(map(len, batch)) :], skip_special_tokens=True)
    return answers


def prompt_ids(tokenizer, prompt: str | list[dict[str, Any]]) -> list[int]:
    """Token ids of a text, or of a conversation in the chat template, which holds the special tokens itself."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def stop_ids(model: "CausalLM") -> list[int]:
    """Every id that ends generation according to generation_config.json and config.json of the source."""
    found: list[int] = []
    path = model.source / "generation_config.json"
    for config in (json.loads(path.read_text()) if path.exists() else {}, model.hf_config):
        ids = config.get("eos_token_id")
        found += [] if ids is None else np.atleast_1d(ids).tolist()
    return list(dict.fromkeys(found))


def _rows(input_ids, attention_mask) -> list[list[int]]:
    """The prompts as lists of ids without padding."""
    if hasattr(input_ids, "keys"):
        attention_mask = input_ids.get("attention_mask") if attention_mask is None else attention_mask
        input_ids = input_ids["input_ids"]
    rows = [np.asarray(row, np.int32).tolist() for row in input_ids]
    if rows and not isinstance(rows[0], list):
        rows, attention_mask = [rows], None if attention_mask is None else [attention_mask]
    if attention_mask is not None:
        rows = [[i for i, m in zip(r, mask, strict=True) if m] for r, mask in zip(rows, attention_mask, strict=True)]
    if not rows or not all(rows):
        raise ValueError("generate: a prompt is empty; give at least one token (for example the tokenizer's BOS)")
    return rows


def _at_hand(model: "CausalLM") -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """`model.split()`; embedding table and head are on the device, where every token would wait for them."""
    graph, lora, frozen = model.split()
    if model.mesh is not None:
        return graph, lora, frozen
    device, tables = jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), ("embed_tokens", "lm_head")

    def there(path, x):
        return jax.device_put(x, device) if path[0].key in tables and not on_device(x) else x

    return graph, lora, jax.tree_util.tree_map_with_path(there, frozen)


def _forward(graph: nnx.GraphDef) -> Callable:
    def forward(lora, frozen, ids, start, cache):
        """Logits [B, V] of the last token of ids [B, T], and the cache with these tokens; start [B]: left padding."""
        module = nnx.merge(graph, lora, frozen)
        positions = jnp.maximum(cache.length + jnp.arange(ids.shape[1]) - start[:, None], 0)
        first = jnp.broadcast_to(start[:, None], ids.shape)
        x, cache = module(ids, positions, first, cache=cache)
        return module.head().logits(x[:, -1]), cache

    return forward


@jax.jit
def _argmax(x):
    return jnp.argmax(x, axis=-1)


def _greedy(last, key, settings, top_k):
    return _argmax(last)


def _sample(last, key, settings, top_k):
    return _draw(last, key, *settings, top_k=top_k)


@jax.jit(static_argnames="top_k")
def _draw(last, key, temperature, top_p, min_p=0.0, *, top_k):
    """Draws one token a row from logits [B, V]."""
    picked, order = _sifted(last / temperature, top_p, min_p, top_k)
    chosen = jax.random.categorical(key, picked)
    return jnp.take_along_axis(order, chosen[:, None], axis=-1)[:, 0]


def _sifted(scaled, top_p, min_p, top_k):
    """Logits [B, V] in falling order, -inf where a token may not be drawn, and the tokens in this order.

    Each rule sees the probabilities that those before it have left, in the order of transformers: k, p, least p.
    """
    order = jnp.argsort(-scaled, axis=-1)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    if top_k:
        ranked = jnp.where(jnp.arange(ranked.shape[-1]) < top_k, ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    keep = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p  # the first is always kept
    keep &= probabilities >= min_p * probabilities[:, :1]
    return jnp.where(keep, ranked, -jnp.inf), order


@jax.jit
def _penalised(last, seen, penalty):
    """Logits [B, V] after `repetition_penalty`; seen bool [B, V]: tokens that are there already."""
    return jnp.where(seen, jnp.where(last < 0, last * penalty, last / penalty), last)


def _tokens_of(rows: list[list[int]], vocabulary: int) -> jax.Array:
    """Which tokens each row holds, bool [B, V]."""
    seen = np.zeros((len(rows), vocabulary), bool)
    for mine, row in zip(seen, rows, strict=True):
        mine[row] = True
    return jnp.asarray(seen)


class _StopStrings:
    """Looks for texts in what is generated."""

    def __init__(self, tokenizer: Any, texts: str | Sequence[str]):
        self._tokenizer = tokenizer
        self._texts = [texts] if isinstance(texts, str) else list(texts)
        if not all(isinstance(text, str) and text for text in self._texts):
            raise ValueError(f"generate: stop_strings wants texts that are not empty, got {texts!r}")
        # A token is a byte at least; a few more, since decoding from the middle spoils the first character.
        self._window = 4 + max(len(text.encode()) for text in self._texts)

    def found(self, made: list[np.ndarray]) -> np.ndarray:
        """For each row of new tokens, one array [B] a step, whether one of the texts has come in the last step."""
        tails = np.stack(made[-self._window :], axis=1)
        return np.array([any(text in tail for text in self._texts) for tail in self._tokenizer.batch_decode(tails)])


def _jitted(model: "CausalLM", name: str, graph: nnx.GraphDef, function: Callable, **options) -> Callable:
    """The jitted function, kept with the model so that it is traced once; a new adapter gives a new graph."""
    compiled = model._compiled
    if compiled.get(f"{name} graph") != graph:
        compiled[f"{name} graph"], compiled[name] = graph, jax.jit(function, **options)
    return compiled[name]
