"""From conversations and prompts to tokens, with the trained tokens told from the template's own structure.

How an assistant turn is found. For turn i of a conversation, the template is rendered three times: the whole
conversation, the prompt of the turn (`messages[:i]` with the generation prompt, which is what the model is given at
inference) and the conversation up to and including the turn (`messages[:i+1]`). Where both shorter texts are prefixes
of the whole one, the turn is exactly what lies between them. Where they are not (a template that drops the reasoning of
earlier turns, say), the conversation is split into one training text per assistant turn, each being what the model sees
at inference for that turn. Where even that fails, the row is refused. Templates with `{% generation %}` blocks name the
trained characters themselves.

Characters become tokens by offsets, never by token id: many models pad with their end-of-turn token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.text import Text

IGNORE = -100  # label of a token that is not trained on (Hugging Face's convention)

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # sentencepiece's tokens for single bytes; some vocabularies list them as added
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class ChatText:
    """One training text rendered by a chat template.

    A conversation gives one, or one per assistant turn where the template does not keep earlier turns as they were.
    """

    text: str
    spans: tuple[tuple[int, int], ...]  # character ranges [start, end) that are trained on
    exact: bool = False  # the spans are the template's own {% generation %} blocks: nothing is trimmed from them
    notes: frozenset[str] = frozenset()  # keys of `data.NOTES`


@dataclass(frozen=True)
class Encoded:
    """Token ids and labels of one training text, and what a user should hear about them."""

    input_ids: np.ndarray  # int32 [n]
    labels: np.ndarray  # int32 [n]: the token itself where it is trained on, else -100
    notes: frozenset[str] = frozenset()  # keys of `data.NOTES`


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template and finds what the assistant said.

    Args:
      tokenizer: a transformers tokenizer.
      chat_template: a Jinja template used in place of the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None):
        if chat_template is None and not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"the tokenizer ({_name(tokenizer)}) has no chat template, so rows of messages cannot be turned into "
                "text. Pass the model's template as chat_template='...Jinja...' (instruct variants of a model have it "
                "in tokenizer_config.json or chat_template.jinja), or use rows of prompt + completion or of text."
            )
        self.tokenizer = tokenizer
        self.chat_template = chat_template

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        **template_kwargs: Any,
    ) -> str:
        """The conversation as text, as `tokenizer.apply_chat_template(..., tokenize=False)` writes it."""
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **template_kwargs,
            )
        except TemplateError as error:
            roles = ", ".join(str(m.get("role")) for m in messages)
            raise ValueError(
                f"the chat template refused the messages (roles: {roles}): {error}. Change the row to what the "
                "template accepts, or pass another chat_template."
            ) from error

    def training_texts(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        first_turn: int = 0,
        assistant_only: bool = True,
        **template_kwargs: Any,
    ) -> list[ChatText]:
        """The training texts of one conversation.

        Args:
          messages: dicts with `role` and `content` and whatever else the template reads (`tool_calls`, ...).
          tools: passed to the template.
          first_turn: assistant turns before this message index are context only.
          assistant_only: train on the assistant's turns; otherwise on every token.
          template_kwargs: further variables of the template (`enable_thinking`, ...).

        Returns:
          One `ChatText`, or one for each trained assistant turn where the template is not prefix-preserving; their
          spans are empty if no assistant turn is to be trained on.

        Raises:
          ValueError: the template refuses the messages, or no rendering lets the turns be found without doubt.
        """
        messages = [{k: v for k, v in message.items() if v is not None} for message in messages]
        options: dict[str, Any] = {"tools": tools, **template_kwargs}
        whole = self.render(messages, **options)
        if not assistant_only:
            return [ChatText(whole, ((0, len(whole)),), exact=True)]
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first_turn]
        notes = frozenset()
        if turns[:1] == [0]:  # a greeting: no prompt leads to it
            turns, notes = turns[1:], frozenset({"assistant_first"})
        if not turns:
            return [ChatText(whole, (), notes=notes)]
        upto = {i: self.render(messages[: i + 1], **options) for i in turns}
        if _GENERATION.search(self.tokenizer.get_chat_template(self.chat_template, tools)):
            chats = self._marked_texts(messages, turns, whole, upto, options)
        else:
            chats = self._derived_texts(messages, turns, whole, upto, options)
        if any(_drops(messages[i], upto[i]) for i in turns):
            notes |= {"drops_content"}
        return [replace(chat, notes=notes) for chat in chats]

    def _derived_texts(self, messages, turns, whole, upto, options) -> list[ChatText]:
        """Spans from prefixes, for templates that do not mark what is generated."""
        prompts = {i: self.render(messages[:i], add_generation_prompt=True, **options) for i in turns}
        ends = {i: self._turn_end(whole, upto[i], len(prompts[i])) for i in turns}
        if all(whole.startswith(prompts[i]) and ends[i] >= len(prompts[i]) for i in turns):
            spans = tuple((len(prompts[i]), ends[i]) for i in turns)
            return [ChatText(whole, spans)]
        for i in turns:
            if not upto[i].startswith(prompts[i]):
                at = _common_prefix(prompts[i], upto[i])
                raise ValueError(
                    f"the chat template's generation prompt is not the start of the turn it prompts (message {i}, "
                    f"assistant): at inference the model is given ...{prompts[i][max(0, at - 30) :]!r}, but the same "
                    f"conversation with its answer reads ...{upto[i][max(0, at - 30) : at + 30]!r}. Training on it "
                    "would teach a prompt that the model never sees. Pass a chat_template whose turns begin with its "
                    "generation prompt or that marks them with {% generation %}, use rows of prompt + completion "
                    "text, or set assistant_only_loss=False to train on every token."
                )
        return [ChatText(upto[i], ((len(prompts[i]), len(upto[i])),)) for i in turns]

    def _marked_texts(self, messages, turns, whole, upto, options) -> list[ChatText]:
        """Spans that the template itself marks with {% generation %}."""

        def marked(part: list[dict], text: str, turn: int) -> tuple[tuple[int, int], ...]:
            # Everything up to the turn is context. Its blocks end before the text leaves that of messages[:turn].
            context = _common_prefix(self.render(part[:turn], **options), text)
            return tuple(span for span in self._generation_spans(part, text, options) if span[1] > context)

        if all(self._turn_end(whole, upto[i], 0) >= 0 for i in turns):
            spans = marked(messages, whole, turns[0])
            return [ChatText(whole, spans, exact=True)]
        return [ChatText(upto[i], marked(messages[: i + 1], upto[i], i), exact=True) for i in turns]

    def _generation_spans(self, messages, text: str, options: dict[str, Any]) -> list[tuple[int, int]]:
        """Character ranges of the {% generation %} blocks, by transformers' own tracker."""
        # apply_chat_template offers them only as a token mask, in which a token that merely touches a block counts.
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, spans = render_jinja_template(
            conversations=[messages],
            chat_template=self.tokenizer.get_chat_template(self.chat_template, options["tools"]),
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **options},
        )
        if rendered[0] != text:
            raise ValueError("the chat template renders the same conversation differently each time; it must not.")
        return [(int(start), int(end)) for start, end in spans[0] if end > start]

    def _turn_end(self, whole: str, upto: str, start: int) -> int:
        """Where in `whole` the turn ends after which the conversation reads `upto`; -1 if `whole` reads otherwise."""
        if whole.startswith(upto):
            return len(upto)
        # Some templates (Phi-3) close every conversation with EOS. Taking it off is sound only if the turn has an end
        # token of its own; otherwise the EOS is the turn's end and must be learnt, in a training text of its own.
        eos = self.tokenizer.eos_token
        if eos and upto.rstrip().endswith(eos):
            body = upto.rstrip()[: -len(eos)]
            if whole.startswith(body) and body[start:].rstrip().endswith(tuple(_closers(self.tokenizer).values())):
                return len(body)
        return -1


class Encoder:
    """Turns text into token ids with exact character offsets.

    Args:
      tokenizer: a "fast" transformers tokenizer (one backed by the `tokenizers` library).

    Raises:
      ValueError: the tokenizer gives no character offsets.
    """

    def __init__(self, tokenizer: Any):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not getattr(tokenizer, "is_fast", False) or backend is None:
            raise ValueError(
                f"{_name(tokenizer)} is a slow tokenizer: it does not say which characters a token stands for, which "
                "the loss mask needs. Load the model's fast tokenizer, AutoTokenizer.from_pretrained(folder) with a "
                "tokenizer.json in the folder (transformers writes one when a fast tokenizer is saved)."
            )
        from tokenizers import Tokenizer

        self.tokenizer = tokenizer
        self.eos_id: int | None = tokenizer.eos_token_id
        # Byte-level post-processors trim the leading space off a token's offsets, which hides that " Yes" straddles the
        # end of a prompt "A: ". A copy without post-processor has the same ids and the true offsets.
        self._raw = Tokenizer.from_str(backend.to_str())
        self._raw.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
        self._raw.no_truncation()
        self._raw.no_padding()
        self._raw.encode_special_tokens = backend.encode_special_tokens
        self._unproved = 8  # so many texts are checked against the tokenizer's own ids, then the copy is trusted
        self._closers = np.array(sorted(_closers(tokenizer)), np.int32)
        probe = "x"
        plain = tokenizer(probe, add_special_tokens=False)["input_ids"]
        full = tokenizer(probe)["input_ids"]
        starts = [i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain]
        self.bos_ids: list[int] = full[: starts[0]] if starts else []  # what the tokenizer puts before plain text

    def offsets(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids, starts, ends), int32 [n] each; token t stands for text[starts[t]:ends[t]]. No special tokens added.

        An added token that takes in the whitespace beside it (Phi-3's do) counts without that whitespace.
        """
        encoding = self._raw.encode(text, add_special_tokens=False)
        if self._unproved:
            self._unproved -= 1
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if ids != encoding.ids:
                raise ValueError(
                    f"{_name(self.tokenizer)} does not give the ids of its own tokenizer.json (for {text[:60]!r}), so "
                    "its tokens cannot be placed in the text. Load it with AutoTokenizer.from_pretrained and no "
                    "options."
                )
        ids, offsets = np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int32).reshape(-1, 2)
        for t in np.flatnonzero(np.isin(ids, self._closers)):
            start, end = offsets[t]
            offsets[t] = end - len(text[start:end].lstrip()), start + len(text[start:end].rstrip())
        return ids, offsets[:, 0], offsets[:, 1]

    def encode_chat(self, chat: ChatText) -> Encoded:
        """A rendered conversation. The template is the authority on special tokens: none is added."""
        ids, starts, ends = self.offsets(chat.text)
        trained = np.zeros(len(ids), bool)
        notes = set(chat.notes)
        if self.bos_ids and ids[: len(self.bos_ids)].tolist() != self.bos_ids:
            notes.add("no_bos")
        for span in chat.spans:
            inside = np.flatnonzero(_inside(starts, ends, span))
            if _straddles(starts, ends, span[0]):
                notes.add("straddles")
            closed, kept = self._up_to_end_of_turn(chat.text, ids, starts, ends, inside)
            trained[inside if chat.exact else kept] = True
            if not closed and span != (0, len(chat.text)):
                notes.add("no_end_of_turn")
        return Encoded(ids, _labels(ids, trained), frozenset(notes))

    def encode_text(self, text: str, spans: Sequence[tuple[int, int]] | None = None) -> Encoded:
        """Plain text, trained on in character ranges; BOS if the tokenizer adds one, and EOS at the end.

        Args:
          text: EOS is not added to one that ends with it, whatever whitespace follows.
          spans: [start, end) each; None for everything. EOS is trained on where the last one ends with the text.
        """
        ids, starts, ends = self.offsets(text)
        trained, notes = np.ones(len(ids), bool), set()
        if spans is not None:
            trained[:] = False
            for span in spans:
                trained |= _inside(starts, ends, span)
                if span[0] and _straddles(starts, ends, span[0]):
                    notes.add("straddles")
        to_the_end = spans is None or any(end == len(text) for _, end in spans)
        if ids[: len(self.bos_ids)].tolist() != self.bos_ids:
            ids = np.concatenate([np.array(self.bos_ids, np.int32), ids])
            trained = np.concatenate([np.zeros(len(self.bos_ids), bool), trained])
        if self.eos_id is None:
            notes.add("no_eos")
        elif not self._ends_with_eos(text, ids, starts, ends):
            ids, trained = np.append(ids, np.int32(self.eos_id)), np.append(trained, to_the_end)
        return Encoded(ids, _labels(ids, trained), frozenset(notes))

    def _ends_with_eos(self, text, ids, starts, ends) -> bool:
        n = len(starts)  # BOS may stand before, which no part of the text does
        for t in range(n - 1, -1, -1):
            if ids[len(ids) - n + t] == self.eos_id:
                return True
            if text[starts[t] : ends[t]].strip():
                return False
        return False

    def _up_to_end_of_turn(self, text, ids, starts, ends, inside) -> tuple[bool, np.ndarray]:
        """(the turn ends with an end token, its token indices without the whitespace after that token)."""
        for n in range(len(inside), 0, -1):
            t = inside[n - 1]
            if ids[t] in self._closers:
                return True, inside[:n]
            if text[starts[t] : ends[t]].strip():
                break
        return False, inside


def preview(example: Any, tokenizer: Any) -> Text:
    """The decoded example for a terminal: trained tokens bold green, the rest dim.

    Args:
      example: anything with `input_ids` and `labels` (an `Example`).
      tokenizer: the tokenizer that made it.
    """
    text = Text()
    for piece, trained in _pieces(example, tokenizer):
        text.append(piece, style="bold green" if trained else "dim")
    return text


def preview_plain(example: Any, tokenizer: Any) -> str:
    """The decoded example for a log: trained tokens stand in [[double brackets]]."""
    return "".join(f"[[{piece}]]" if trained else piece for piece, trained in _pieces(example, tokenizer))


def _pieces(example: Any, tokenizer: Any) -> list[tuple[str, bool]]:
    trained = np.asarray(example.labels) != IGNORE
    cuts = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(trained)]
    pieces, done = [], ""
    for start, end in zip(cuts[:-1], cuts[1:], strict=True):
        if end > start:
            # Decoding from the beginning each time: sentencepiece decoders drop a leading space of what they are given.
            text = tokenizer.decode(
                example.input_ids[:end].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            pieces.append((text[len(done) :], bool(trained[start])))
            done = text
    return pieces


def _inside(starts: np.ndarray, ends: np.ndarray, span: tuple[int, int]) -> np.ndarray:
    """Which tokens lie wholly in the span."""
    return (starts >= span[0]) & (ends <= span[1])


def _straddles(starts: np.ndarray, ends: np.ndarray, at: int) -> bool:
    return bool(((starts < at) & (ends > at)).any())


def _labels(ids: np.ndarray, trained: np.ndarray) -> np.ndarray:
    labels = np.where(trained, ids, IGNORE).astype(np.int32)
    labels[:1] = IGNORE  # nothing comes before the first token, so nothing can predict it
    return labels


def _closers(tokenizer: Any) -> dict[int, str]:
    """Tokens that can end a turn, by id: all added tokens, as some models' end-of-turn token is not "special"."""
    tokens = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    tokens |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return {i: token for i, token in tokens.items() if token.strip() and not _BYTE.fullmatch(token)}


def turn_enders(tokenizer: Any) -> list[str]:
    """Tokens that can end a turn."""
    return list(_closers(tokenizer).values())


def _drops(message: Mapping[str, Any], text: str) -> bool:
    """Whether the template left out part of the message; it may lay out whitespace as it likes."""
    content = message.get("content")
    return isinstance(content, str) and "".join(content.split()) not in "".join(text.split())


def _common_prefix(a: str, b: str) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _name(tokenizer: Any) -> str:
    path = getattr(tokenizer, "name_or_path", "")
    return f"{type(tokenizer).__name__} of {path}" if path else type(tokenizer).__name__
