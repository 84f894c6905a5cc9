"""A Hugging Face tokenizer as the fields that llama.cpp reads from a GGUF file.

llama.cpp has its own tokenizers, chosen by two strings: `tokenizer.ggml.model` (the algorithm) and
`tokenizer.ggml.pre` (how the text is cut before byte-pair merging). A wrong choice loads without complaint and gives
other ids than those the model was trained on. So both are decided from the structure of the tokenizer that
transformers loads, and a structure that is not known to be the same in llama.cpp is refused.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from lora_jax.loading import load_tokenizer

# The regular expressions by which known tokenizers cut a text, one after the other, by llama.cpp's names for them.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPELLED_OUT = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"  # the same, as some files have it
_DIGITS = r"\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_WITH_SLASHES = _REST.replace(r"[\r\n]*", r"[\r\n/]*")
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_DEEPSEEK_WORDS = (  # letters of alphabets that have upper and lower case
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅ"
    r"ὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-"
    r"ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
CUTS: dict[str, tuple[str, ...]] = {
    "llama-bpe": (_LLAMA3,),
    "smaug-bpe": (_LLAMA3,),
    "qwen2": (_LLAMA3.replace("{1,3}", ""),),
    "tekken": (f"{_LOWER}|{_UPPER}|" + r"\p{N}" + _REST_WITH_SLASHES,),
    "gpt-4o": (f"{_LOWER}{_CONTRACTIONS}?|{_UPPER}{_CONTRACTIONS}?|" + r"\p{N}{1,3}" + _REST_WITH_SLASHES,),
    "seed-coder": (
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "deepseek-llm": (
        r"[\r\n]",
        _DEEPSEEK_WORDS,
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        r"\p{N}",
    ),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}
WHOLE_WORDS = ("llama-bpe", "tekken")  # that take a word which is a token without merging it
_KNOWN_PRE = f"gpt-2, smollm, {', '.join(CUTS)}, and SentencePiece BPE (Llama 1 and 2, Mistral, Gemma)"

# llama.cpp ends a generation at tokens of these texts whatever the metadata says.
_STOPS_BY_TEXT = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>",
    "<|end_of_text|>", "<|eom_id|>", "<EOT>", "_<EOT>",
}  # fmt: skip
# And takes these for special tokens, too, where they are ordinary ones.
_SPECIAL_BY_TEXT = _STOPS_BY_TEXT | {
    "</s>", "<eos>", "[EOS]", "[EOT]", "<|flush|>", "<|calls|>", "<|tool_response>", "<turn|>", "<end_of_utterance>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~[",
}  # fmt: skip

# Names of models whose special tokens swallow the white space after them, all but some, in llama.cpp: a GGUF file does
# not say it of the tokens.
_STRIPPING_NAME = re.compile("phi-?3", re.IGNORECASE)
_NOT_STRIPPING = {"<unk>", "<s>", "<|endoftext|>"}

_SPACE = "\u2581"  # SentencePiece writes a space as this character


@dataclass(frozen=True)
class GgufTokenizer:
    """What is written under `tokenizer.ggml.*`."""

    model: str  # "gpt2": byte-level BPE; "llama": SentencePiece BPE
    pre: str  # name of the pre-tokenizer in llama.cpp
    tokens: list[str]  # text by id; ids that the tokenizer lacks are "[PAD{id}]"
    types: list[TokenType]  # by id
    merges: list[str] | None  # "left right", best first; byte-level BPE only
    scores: list[float] | None  # by id, highest merges first; SentencePiece only
    special_ids: dict[str, int]  # keys among bos, eos, unk, pad, eot, eom
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    strips_after_special: bool  # special tokens swallow the white space after them, as Phi-3's do
    chat_template: str | list[dict[str, str]] | None
    notes: list[str]  # what llama.cpp will do differently, for the user

    def model_name(self, name: str) -> str:
        """The name to write into the file: llama.cpp strips after special tokens if it has "phi-3" in it."""
        if self.strips_after_special:
            return name if _STRIPPING_NAME.search(name) else f"{name} (phi-3)"
        return _STRIPPING_NAME.sub("phi 3", name)


def read_tokenizer(folder: Path, vocab_size: int) -> GgufTokenizer:
    """Read the tokenizer in `folder` as transformers loads it, padded to `vocab_size` ids.

    Raises FileNotFoundError if there is none, ValueError if llama.cpp has no tokenizer known to give the same ids.
    """
    tokenizer = load_tokenizer(folder)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"the tokenizer in {folder} is a {type(tokenizer).__name__} without tokenizer.json")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["id"]: token for token in spec["added_tokens"]}
    notes: list[str] = []

    if spec["model"]["type"] != "BPE":
        raise ValueError(_refusal(folder, f"its model is {spec['model']['type']}"))
    texts = {id: text for text, id in spec["model"]["vocab"].items()}
    texts |= {id: token["content"] for id, token in added.items()}
    if max(texts) >= vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has id {max(texts)} ({texts[max(texts)]!r}) but the model only {vocab_size} "
            "ids; resize the embedding or use the tokenizer that belongs to the model"
        )
    if spec["model"].get("continuing_subword_prefix") or spec["model"].get("end_of_word_suffix"):
        raise ValueError(_refusal(folder, "its pieces have a subword prefix or suffix"))

    whole: set[int] = set()
    if spec["model"].get("byte_fallback"):
        model, pre, merges = "llama", "default", None
        whole = _spm_whole(spec, notes)
        add_space_prefix = _spm_space_prefix(spec, folder, notes)
        scores = _spm_scores(spec, texts, set(added) | whole, vocab_size, folder)
    else:
        model, pre, scores = "gpt2", _bpe_pre(spec, folder, notes), None
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
        add_space_prefix = False
    strips = _strips_after_special(added.values())
    for token in added.values():
        if flags := [f for f in ("lstrip", "rstrip", "single_word") if token[f] and not (strips and f == "rstrip")]:
            notes.append(f"token {token['content']!r}: llama.cpp ignores {', '.join(flags)}")
    for id, text in texts.items():
        if text in _SPECIAL_BY_TEXT and id not in added:
            notes.append(f"llama.cpp takes {text!r} in a text for an end token, this tokenizer for ordinary characters")
    if tokenizer.chat_template is None:
        notes.append("the tokenizer has no chat template: llama.cpp will fall back to its own")
    add_bos, add_eos = _added_ends(tokenizer, folder)
    return GgufTokenizer(
        model=model,
        pre=pre,
        tokens=[texts.get(id, f"[PAD{id}]") for id in range(vocab_size)],
        types=[
            TokenType.USER_DEFINED if id in whole else _token_type(id, texts, added, spec) for id in range(vocab_size)
        ],
        merges=merges,
        scores=scores,
        special_ids=_special_ids(tokenizer, folder, texts, vocab_size, notes),
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=add_space_prefix,
        strips_after_special=strips,
        chat_template=_chat_template(tokenizer.chat_template),
        notes=notes,
    )


def _refusal(folder: Path, why: str) -> str:
    return (
        f"the tokenizer in {folder} is not one that is known to give the same ids in llama.cpp: {why}. "
        f"Known are {_KNOWN_PRE}"
    )


def _parts(node: Any, list_key: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the flat list of its steps."""
    if node is None:
        return []
    return [p for step in node[list_key] for p in _parts(step, list_key)] if node["type"] == "Sequence" else [node]


def _bpe_pre(spec: Mapping[str, Any], folder: Path, notes: list[str]) -> str:
    """llama.cpp's name for how a byte-level BPE tokenizer cuts its text."""
    *cuts, last = _parts(spec["pre_tokenizer"], "pretokenizers") or [{"type": "none"}]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise ValueError(_refusal(folder, f"pre-tokenizer {json.dumps(spec['pre_tokenizer'])[:300]}"))
    regexes = tuple(map(_cut, cuts))
    ignore_merges = spec["model"].get("ignore_merges", False)
    if last["use_regex"]:  # the regular expression of GPT-2 stands inside ByteLevel
        names = [{(): "gpt-2", (_DIGITS,): "smollm"}.get(regexes)]
    else:
        names = [name for name, known in CUTS.items() if known == regexes]
    if "llama-bpe" in names:  # of the two, only llama-bpe takes a word that is a token without merging it
        names = ["llama-bpe" if ignore_merges else "smaug-bpe"]
    pre = names[0] if names else None
    if pre is None or (ignore_merges and pre not in WHOLE_WORDS):
        why = f"pre-tokenizer {json.dumps(spec['pre_tokenizer'])[:300]}, ignore_merges {ignore_merges}"
        raise ValueError(_refusal(folder, why))
    if pre in ("tekken", "gpt-4o"):
        notes.append(
            "llama.cpp cuts words at combining marks, as in Devanagari, where this tokenizer does not: such text "
            "gets other ids there, as in every GGUF file of it"
        )
    for step in _parts(spec["normalizer"], "normalizers"):
        if step["type"] != "NFC":
            raise ValueError(_refusal(folder, f"normalizer {step['type']}"))
        notes.append("llama.cpp does not normalise text to Unicode NFC as this tokenizer does; send it NFC text")
    return pre


def _cut(step: Mapping[str, Any]) -> str | None:
    """The regular expression at whose matches a step of a pre-tokenizer cuts, in the form of `CUTS`."""
    if step == {"type": "Digits", "individual_digits": True}:
        return _DIGITS
    if step["type"] != "Split" or "Regex" not in step["pattern"]:
        return None
    regex = step["pattern"]["Regex"].replace("\r", r"\r").replace("\n", r"\n")
    regex = regex.replace(_SPELLED_OUT, _CONTRACTIONS)
    # To remove what does not match is the same where every character matches, as by those that stand alone in `CUTS`.
    removes = step["behavior"] == "Removed" and step["invert"] and (regex,) in CUTS.values()
    return regex if removes or (step["behavior"] == "Isolated" and not step["invert"]) else None


def _spm_whole(spec: Mapping[str, Any], notes: list[str]) -> set[int]:
    """Ids of the tokens that a SentencePiece-like tokenizer cuts out of the text before it merges anything."""
    vocab = spec["model"]["vocab"]
    whole = [text for step in _parts(spec["pre_tokenizer"], "pretokenizers") for text in _literals(step)]
    if any(text not in vocab for text in whole):
        return set()  # then `_spm_space_prefix` refuses the step
    if whole:
        notes.append(f"llama.cpp also puts a space before text that follows {min(whole)} and {len(whole) - 1} more")
    return {vocab[text] for text in whole}


def _literals(step: Mapping[str, Any]) -> list[str]:
    """The texts at which a pre-tokenizer's step cuts, if it is of that kind: one of them, or one of another."""
    if step["type"] != "Split" or step["behavior"] != "Isolated" or step["invert"] or "Regex" not in step["pattern"]:
        return []
    escaped = step["pattern"]["Regex"].split("|")
    texts = [re.sub(r"\\(.)", r"\1", text) for text in escaped]
    return texts if all(re.fullmatch(r"(\\\W|[^\\.^$*+?{}\[\]()])+", text) for text in escaped) else []


def _spm_space_prefix(spec: Mapping[str, Any], folder: Path, notes: list[str]) -> bool:
    """Whether a SentencePiece-like tokenizer puts a space before the text."""
    scheme, replaced = "never", False
    for step in _parts(spec["normalizer"], "normalizers"):
        if step == {"type": "Prepend", "prepend": _SPACE}:
            scheme = "always"
        elif step == {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}:
            replaced = True
        elif replaced and step == {"type": "Replace", "pattern": {"Regex": rf"\A{_SPACE}"}, "content": 2 * _SPACE}:
            pass  # so that Metaspace's rule "always" holds for text that begins with a space, too
        else:
            raise ValueError(_refusal(folder, f"normalizer {json.dumps(step)}"))
    for step in _parts(spec["pre_tokenizer"], "pretokenizers"):
        if replaced and step["type"] == "Split" and step["pattern"] == {"String": " "}:
            continue  # Gemma cuts at spaces, of which the normalizer has left none
        if (texts := _literals(step)) and all(text in spec["model"]["vocab"] for text in texts):
            continue
        if step["type"] != "Metaspace" or step["replacement"] != _SPACE or step.get("split", True):
            raise ValueError(_refusal(folder, f"pre-tokenizer {json.dumps(step)}"))
        scheme = step["prepend_scheme"]
    if scheme == "first":
        notes.append(
            "llama.cpp also puts a space before text that follows a special token or begins with a space; "
            "this tokenizer does not"
        )
    return scheme != "never"


def _spm_scores(
    spec: Mapping[str, Any], texts: Mapping[int, str], added: set[int], vocab_size: int, folder: Path
) -> list[float]:
    """Scores that order llama.cpp's merges as the tokenizer's merge list does.

    llama.cpp joins the neighbours whose joined text is the token of highest score, whichever way the text is split.
    That is the merge list's result if the list holds every split of every token, those of one token in a row: so it
    is for lists made from SentencePiece models, and so it is checked here.
    """
    vocab = spec["model"]["vocab"]
    if missing := [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocab]:
        raise ValueError(_refusal(folder, f"{len(missing)} of the 256 byte tokens are missing"))
    merges = _runs_in_a_row([tuple(m.split(" ") if isinstance(m, str) else m) for m in spec["model"]["merges"]])
    scores = [-1e6] * vocab_size  # tokens that no merge makes are never looked up by score
    order: dict[str, int] = {}
    last = None
    for left, right in merges:
        if left + right != last and left + right in order:
            raise ValueError(_refusal(folder, f"its merges that make {left + right!r} do not stand in a row"))
        last = left + right
        scores[vocab[last]] = -float(order.setdefault(last, len(order)))
    known = set(merges)
    for id, text in texts.items():
        if id in added or re.fullmatch("<0x[0-9A-F]{2}>", text):
            continue
        for cut in range(1, len(text)):
            split = (text[:cut], text[cut:])
            if split[0] in vocab and split[1] in vocab and split not in known:
                raise ValueError(
                    _refusal(folder, f"it does not merge {split[0]!r} and {split[1]!r} to its token {text!r}")
                )
    return scores


def _runs_in_a_row(merges: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The same merges; of those that begin the list and make runs of one character, all that make a run stand in a row.

    Gemma's list begins so, with (30 + 1, 29 + 2, 29 + 1, 28 + 3, ...) line breaks, spaces and tabs in turn. Where a
    run that has begun grows by one (k + 1) before another begins (1 + 1), the list's order has no other effect: every
    run of a text is made from its left, and the longest token of it first. Scores that rise with length do the same.
    What joins a run and another character comes later in the list.
    """
    count = next((i for i, merge in enumerate(merges) if len(set("".join(merge))) > 1), len(merges))
    rank = {merge: i for i, merge in enumerate(merges[:count])}
    for character in {left[0] for left, _ in rank}:
        longest = max(len(left + right) for left, right in rank if left[0] == character)
        begins, *grows = [rank.get((character * k, character), count) for k in range(1, longest)]
        if any(grow >= begins for grow in grows):
            return merges
    return sorted(rank, key=lambda merge: (merge[0][0], -len("".join(merge)))) + merges[count:]


def _token_type(
    id: int, texts: Mapping[int, str], added: Mapping[int, Mapping[str, Any]], spec: Mapping[str, Any]
) -> TokenType:
    if id not in texts:
        return TokenType.UNUSED
    if spec["model"].get("byte_fallback"):
        if texts[id] == spec["model"].get("unk_token"):
            return TokenType.UNKNOWN
        if re.fullmatch("<0x[0-9A-F]{2}>", texts[id]):
            return TokenType.BYTE
    if id not in added:
        return TokenType.NORMAL
    return TokenType.CONTROL if added[id]["special"] else TokenType.USER_DEFINED


def _strips_after_special(added: Iterable[Mapping[str, Any]]) -> bool:
    """Whether just those added tokens swallow white space that do so in llama.cpp in a model named Phi-3."""
    strips = {token["content"]: token["rstrip"] for token in added}
    return "</s>" in strips and strips == {text: text not in _NOT_STRIPPING for text in {*strips, *_NOT_STRIPPING}}


def _added_ends(tokenizer: Any, folder: Path) -> tuple[bool, bool]:
    """(adds BOS, adds EOS), from what the tokenizer does rather than from its settings, which contradict each other."""
    whole, text = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(whole) - len(text) + 1):
        if whole[start : start + len(text)] == text:
            before, after = whole[:start], whole[start + len(text) :]
            if before in ([], [tokenizer.bos_token_id]) and after in ([], [tokenizer.eos_token_id]):
                return bool(before), bool(after)
    raise ValueError(_refusal(folder, f"it encodes 'a' ({text}) as {whole}, not as [BOS] text [EOS]"))


def _special_ids(
    tokenizer: Any, folder: Path, texts: Mapping[int, str], vocab_size: int, notes: list[str]
) -> dict[str, int]:
    ids = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "unk", "pad")}
    ids = {kind: id for kind, id in ids.items() if id is not None}
    stops: Any = []
    if (path := folder / "generation_config.json").is_file():
        stops = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") or []
    stops = [stops] if isinstance(stops, int) else list(stops)
    if wrong := [id for id in stops if not 0 <= id < vocab_size]:
        raise ValueError(f"{path} names eos_token_id {wrong}, but the model has only {vocab_size} ids")
    # A file holds one EOS; llama.cpp also stops at the "end of turn" and "end of message" tokens.
    more = [id for id in stops if id != ids.get("eos") and texts.get(id) not in _STOPS_BY_TEXT]
    if "eos" not in ids and more:
        ids["eos"] = more.pop(0)
    ids |= dict(zip(("eot", "eom"), more, strict=False))
    if lost := more[2:]:
        notes.append(f"llama.cpp will not stop at {[texts.get(id) for id in lost]}: a GGUF file has room for three")
    return ids


def _chat_template(template: Any) -> str | list[dict[str, str]] | None:
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template
