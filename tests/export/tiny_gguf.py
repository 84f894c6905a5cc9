"""Random models and trained small tokenizers of the families that GGUF export knows, and their forward in float64."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.export.gguf_tokenizer import CUTS

TRICKY = [
    "Hello world",
    " leading space",
    "trailing space ",
    "many     spaces   inside",
    "tabs\tand\t\tmore",
    "line\nbreak\n\n\ntwo",
    "CRLF\r\nline\r\n\r\nend",
    "I've told you, she'll say 'tis WE'RE HE'S done",
    "12345678 3.14159 1,000,000",
    "١٢٣ ½ ² Ⅷ",
    "مرحبا بالعالم",
    "שלום עולם",
    "你好，世界。日本語テキスト",
    "한국어 텍스트",
    "Ünïcödé naïve café",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽",
    "नमस्ते दुनिया",
    "def f(x):\n    return x**2  # comment\n\n\tpass",
    '{"key": [1, 2.5, null], "b": "\\n"}',
    "http://example.com/a?b=c&d=%20",
    "a\x00b",
    "!!!???...---===",
    "\u00a0nbsp\u2003emspace\u200bzero",
    "camelCaseWord HTTPServer snake_case",
    "",
    " ",
    "   ",
    "\n",
    "a",
    " a",
    "  a  ",
    "\t\n \r\n",
    "<s>",
    "</s> after",
    "[INST] What? [/INST] That.</s>[INST] Why?[/INST]",
    "[INST]",
    "[ INST ]",
    "<unk>",
    "▁ underline ▁▁",
    "<0x41>",
    "naïve façade — “quotes” ‘single’…",
    "x = [1, 2, 3]; y = {'a': 'b'}",
    "    def indented():\n        pass\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] << 2; }",
    "SELECT * FROM t WHERE a='b' AND c<>1;",
    "C:\\Users\\name\\file.txt",
    "user@example.org +49 (0)30 1234-5678",
    "αβγ Привет ไทย ქართული",
    "e\u0301 é \u1e69 s\u0323\u0307",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𠜎𠜱",
    "\ufeffBOM \u200d\u200c\u202e",
    "\x01\x02\x7f",
    "AAAAAAAAAAAAAAAAAAAAAAAA",
    "the the the  the   the",
    "don't DON'T y'all'd've",
    "1st 2nd 3rd 1e-10 0xFF 1_000",
    "$100 €50 £20 ¥1000 ₹5",
    "∑∫√∞ ≠ ≤ ½⅓",
    "Mr. Smith's co-worker (née O'Neil)",
    "¿Qué? ¡No! Straße ßẞ İı",
]


@dataclass(frozen=True)
class ArraySource:
    """A tensor held in memory."""

    values: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def read(self) -> np.ndarray:
        return self.values


def hf_config(**changes: Any) -> dict[str, Any]:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "vocab_size": 640,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    return config | changes


def random_weights(config: dict[str, Any], seed: int = 0, *, biases: bool = False) -> dict[str, np.ndarray]:
    """Weights that keep activations near one and attention far from uniform, so that a wrong rotation shows."""
    rng = np.random.default_rng(seed)
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim

    def matrix(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * gain / np.sqrt(columns)).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + 0.2 * rng.standard_normal(hidden)).astype(np.float32)

    weights = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden, 3.0), "model.norm.weight": norm()}
    for i in range(config["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj": matrix(q, hidden, 2.0),
            "self_attn.k_proj": matrix(kv, hidden, 2.0),
            "self_attn.v_proj": matrix(kv, hidden),
            "self_attn.o_proj": matrix(hidden, q),
            "mlp.gate_proj": matrix(ffn, hidden),
            "mlp.up_proj": matrix(ffn, hidden),
            "mlp.down_proj": matrix(hidden, ffn),
        }
        for module, weight in layer.items():
            weights[f"model.layers.{i}.{module}.weight"] = weight
            if biases:
                bias = 0.5 * rng.standard_normal(weight.shape[0])
                weights[f"model.layers.{i}.{module}.bias"] = bias.astype(np.float32)
        weights[f"model.layers.{i}.input_layernorm.weight"] = norm()
        weights[f"model.layers.{i}.post_attention_layernorm.weight"] = norm()
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(config["vocab_size"], hidden, 2.0)
    return weights


def sources(weights: dict[str, np.ndarray]) -> dict[str, ArraySource]:
    return {name: ArraySource(values) for name, values in weights.items()}


def reference_logprobs(config: dict[str, Any], weights: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """Log-probabilities after the last of `ids`, float64, as transformers' modeling_llama.py computes them."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    frequencies, magnitude = _rotation(config, head_dim)
    angles = np.arange(len(ids))[:, None] * frequencies
    cos, sin = (magnitude * np.tile(f(angles), 2) for f in (np.cos, np.sin))

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weights[f"{name}.weight"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].astype(np.float64).T + weights.get(f"{name}.bias", 0.0)

    def split(x: np.ndarray, n: int) -> np.ndarray:
        return x.reshape(len(ids), n, head_dim).swapaxes(0, 1)

    def rotate(x: np.ndarray) -> np.ndarray:
        first, second = np.split(x, 2, axis=-1)
        return x * cos + np.concatenate([-second, first], -1) * sin

    x = weights["model.embed_tokens.weight"][ids].astype(np.float64)
    mask = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        h = norm(x, f"{layer}.input_layernorm")
        q = rotate(split(linear(h, f"{layer}.self_attn.q_proj"), heads))
        k = rotate(split(linear(h, f"{layer}.self_attn.k_proj"), kv_heads))
        v = split(linear(h, f"{layer}.self_attn.v_proj"), kv_heads)
        k, v = (np.repeat(a, heads // kv_heads, axis=0) for a in (k, v))
        scores = q @ k.swapaxes(1, 2) / np.sqrt(head_dim) + mask
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out = (p / p.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(len(ids), -1)
        x = x + linear(out, f"{layer}.self_attn.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate = linear(h, f"{layer}.mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj")
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).astype(np.float64)
    logits = head @ norm(x, "model.norm")[-1]
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def _rotation(config: dict[str, Any], dim: int) -> tuple[np.ndarray, float]:
    """Frequencies [dim / 2] and the factor on cos and sin, as transformers' modeling_rope_utils.py computes them."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = rope.get("rope_theta") or config.get("rope_theta", 10000.0)
    frequencies = base ** (-np.arange(0, dim, 2) / dim)
    kind, factor = rope.get("rope_type", rope.get("type", "default")), float(rope.get("factor", 1))
    if kind == "linear":
        return frequencies / factor, 1.0
    if kind == "llama3":
        context, low, high = (
            rope[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        )
        out = []
        for f in frequencies:
            wavelength = 2 * np.pi / f
            if wavelength < context / high:
                out.append(f)
            elif wavelength > context / low:
                out.append(f / factor)
            else:
                smooth = (context / wavelength - low) / (high - low)
                out.append((1 - smooth) * f / factor + smooth * f)
        return np.array(out), 1.0
    if kind == "yarn":
        context = rope["original_max_position_embeddings"]

        def turning(rotations: float) -> float:
            return dim * np.log(context / (rotations * 2 * np.pi)) / (2 * np.log(base))

        low = max(np.floor(turning(rope.get("beta_fast", 32))), 0)
        high = min(np.ceil(turning(rope.get("beta_slow", 1))), dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
        magnitude = rope.get("attention_factor") or 0.1 * np.log(factor) + 1
        return frequencies / factor * ramp + frequencies * (1 - ramp), magnitude
    return frequencies, 1.0


# Tokenizers.

_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REGEX = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,
    "smaug-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|eot|>' }}{% endfor %}"
_CORPUS = [*TRICKY, Path(__file__).read_text(encoding="utf-8")] * 2  # twice: pairs that occur once are not merged


def bpe_folder(folder: Path, pre: str, **config: Any) -> Path:
    """Train a byte-level BPE tokenizer of 600 ids that cuts text as llama.cpp's `pre` does; BOS first if llama-bpe."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    whole_words = pre in ("llama-bpe", "tekken")
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    cut: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in (*_REGEX, *CUTS))]
    if pre in ("smollm", "deepseek-llm"):
        cut.insert(0, pre_tokenizers.Digits(individual_digits=True))
    if pre in _REGEX:
        cut.insert(0, pre_tokenizers.Split(Regex(_REGEX[pre]), "isolated"))
    elif pre == "gpt-4o":  # as many who convert from tiktoken write it
        cut.insert(0, pre_tokenizers.Split(Regex(CUTS[pre][0]), "removed", invert=True))
    else:
        cut[:0] = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in CUTS.get(pre, ()) if regex != r"\p{N}"]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|begin|>", "<|end_of_text|>", "<|eot|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens(["<user>"])
    if pre == "llama-bpe":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", 0)]
        )
    settings = {"bos_token": specials[0], "eos_token": specials[1], "pad_token": specials[1]}
    return _save(folder, tokenizer, settings | config, eos=[1, 2])


def spm_folder(folder: Path, *, prefix: str = "always", tokenizer_class: str = "PreTrainedTokenizerFast") -> Path:
    """A SentencePiece-like BPE tokenizer with byte fallback; its merges are all splits of its pieces, best first."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    latin = [chr(c) for c in range(33, 127)] + ["\u2581"]
    trainer = trainers.BpeTrainer(vocab_size=330, limit_alphabet=100, initial_alphabet=latin, show_progress=False)
    trained.train_from_iterator(_CORPUS, trainer)
    pieces = [piece for piece, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    pieces = [p for p in pieces if len(p) > 1] + ["\u2581" * 2, "\u2581" * 4] + [p for p in pieces if len(p) == 1]
    vocab = {p: i for i, p in enumerate(["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)] + pieces)}
    merges = [(p[:i], p[i:]) for p in pieces for i in range(1, len(p)) if p[:i] in vocab and p[i:] in vocab]

    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "\u2581")
    if prefix == "always":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace])
    elif prefix == "gemma":
        tokenizer.normalizer, tokenizer.pre_tokenizer = replace, pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": tokenizer_class}
    return _save(folder, tokenizer, settings, eos=2)


def _save(folder: Path, tokenizer: Any, settings: dict[str, Any], eos: int | list[int]) -> Path:
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return folder
