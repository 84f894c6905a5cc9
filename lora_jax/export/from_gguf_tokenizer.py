"""The tokenizer of a GGUF file as tokenizer.json: what `gguf_tokenizer` does, turned round."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lora_jax.export.gguf_tokenizer import _SPACE, CUTS, WHOLE_WORDS

__all__ = ["write_tokenizer"]

_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def write_tokenizer(fields: Mapping[str, Any], folder: Path, length: int) -> dict[str, Any]:
    """Writes tokenizer.json and tokenizer_config.json; returns what belongs into generation_config.json.

    Args:
      fields: of the GGUF file.
      folder: existing folder.
      length: most tokens of a text.

    Raises:
      ValueError: the file has no tokenizer, or one that is not known.
    """
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    tokens, types = fields.get("tokenizer.ggml.tokens"), fields.get("tokenizer.ggml.token_type")
    if tokens is None or types is None:
        raise ValueError("the GGUF file holds no tokenizer")
    if kind == "gpt2" and pre in (*CUTS, "gpt-2", "smollm"):
        tokenizer = _bpe(fields, tokens, types, pre)
    elif kind == "llama":
        tokenizer = _spm(fields, tokens, types)
    else:
        known = ", ".join([*CUTS, "gpt-2", "smollm"])
        raise ValueError(
            f"the tokenizer {kind!r} with pre-tokenizer {pre!r} is not known; known are {known}, and llama"
        )
    for id, type in enumerate(types):
        if type in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN):
            special = type != TokenType.USER_DEFINED
            tokenizer.add_tokens([AddedToken(tokens[id], special=special, normalized=False)])
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in _IDS.items()}
    _add_ends(tokenizer, tokens, ids, fields)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": tokens[id] for name, id in ids.items() if id is not None},
    }
    if (template := fields.get("tokenizer.chat_template")) is not None:
        settings["chat_template"] = template
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    stops = [ids["eos"], *(fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom"))]
    stops = list(dict.fromkeys(id for id in stops if id is not None))
    return {"bos_token_id": ids["bos"], "eos_token_id": stops, "pad_token_id": ids["pad"]}


def _vocabulary(tokens: list[str], types: list[int]) -> dict[str, int]:
    return {token: id for id, token in enumerate(tokens) if types[id] != TokenType.UNUSED}


def _bpe(fields: Mapping[str, Any], tokens: list[str], types: list[int], pre: str) -> Tokenizer:
    """Byte-level BPE."""
    merges = [tuple(merge.split(" ")) for merge in fields.get("tokenizer.ggml.merges") or ()]
    tokenizer = Tokenizer(models.BPE(_vocabulary(tokens, types), merges, ignore_merges=pre in WHOLE_WORDS))
    cuts: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in CUTS)]
    if pre == "smollm":
        cuts.insert(0, pre_tokenizers.Digits(individual_digits=True))
    cuts[:0] = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in CUTS.get(pre, ())]
    if pre == "qwen2":  # a GGUF file does not say so, but every published one does
        tokenizer.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def _spm(fields: Mapping[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    """SentencePiece BPE: neighbours are joined whose joined text is the token of highest score."""
    vocab, scores = _vocabulary(tokens, types), fields["tokenizer.ggml.scores"]
    joined = [id for id, type in enumerate(types) if type == TokenType.NORMAL and len(tokens[id]) > 1]
    merges = [
        (text[:cut], text[cut:])
        for text in (tokens[id] for id in sorted(joined, key=lambda id: -scores[id]))
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    ]
    unknown = next((tokens[id] for id, type in enumerate(types) if type == TokenType.UNKNOWN), None)
    model = models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", _SPACE)
    both = normalizers.Sequence([normalizers.Prepend(_SPACE), replace])
    tokenizer.normalizer = both if prefix else replace  # pyright: ignore[reportAttributeAccessIssue]
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def _add_ends(tokenizer: Tokenizer, tokens: list[str], ids: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """BOS and EOS where the file says that they are added; a SentencePiece model has BOS unless it says otherwise."""
    by_default = {"bos": fields["tokenizer.ggml.model"] == "llama", "eos": False}
    added = [n for n in by_default if fields.get(f"tokenizer.ggml.add_{n}_token", by_default[n]) and ids[n] is not None]
    if not added:
        return
    before, after = (tokens[ids[n]] if n in added else "" for n in ("bos", "eos"))
    single = " ".join(part for part in (before, "$A", after) if part)
    pair = " ".join(part for part in (before, "$A", before, "$B", after) if part)
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=single, pair=pair, special_tokens=[(tokens[ids[n]], ids[n]) for n in added]
    )
