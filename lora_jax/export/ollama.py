"""A folder for `ollama create`: a GGUF file and the Modelfile that says how to talk to it.

Ollama fills in templates of Go's text/template, models come with templates in Jinja. What surrounds the messages of a
chat is found by rendering a few of them, so that no list of known templates is needed; what is found is compared with
what the Jinja template makes of other chats before it is written.

Modelfile: https://docs.ollama.com/modelfile; variables and functions of templates: https://docs.ollama.com/template.
"""

import dataclasses
import datetime
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_jax.export.aside import folder_aside
from lora_jax.hf_checkpoint import read_json
from lora_jax.reporting import say

if TYPE_CHECKING:
    from lora_jax.model import CausalLM

__all__ = ["ChatFormat", "chat_format", "go_template", "modelfile", "save_ollama"]

# generation_config.json -> Modelfile
_PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
_LONGEST = 8192  # tokens of context that are asked for at most: Ollama allocates them all


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """What stands between the messages of a chat. BOS, which the program that runs the model adds, is left out."""

    start: str  # before the first message, if there is no system message
    system: tuple[str, str] | None  # before and after the text of the system message; None if there can be none
    user: tuple[str, str]
    assistant: tuple[str, str]
    opening: str  # before an answer, after the last message of the user
    system_in: str = ""  # "first" or "last": the message of the user that holds the system message; "" for none

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """What `go_template` makes of the messages: at most one of the system, first; then user and assistant."""
        system = "".join(m["content"] for m in messages if m["role"] == "system")
        within = f"{self.system[0]}{system}{self.system[1]}" if system and self.system is not None else ""
        out = self.start if not within or self.system_in else within
        turns = [m for m in messages if m["role"] != "system"]
        for i, message in enumerate(turns):
            is_last = i == len(turns) - 1
            if message["role"] == "user":
                holds = is_last if self.system_in == "last" else i == 0
                out += f"{self.user[0]}{within if self.system_in and holds else ''}{message['content']}{self.user[1]}"
                out += self.opening if is_last else ""
            else:
                out += f"{self.assistant[0]}{message['content']}{'' if is_last else self.assistant[1]}"
        return out


def chat_format(tokenizer: Any, *, adds_bos: bool) -> ChatFormat:
    """What the tokenizer's chat template puts between messages.

    Args:
      tokenizer: transformers' tokenizer, with a chat template.
      adds_bos: whether the program that runs the model puts BOS before every prompt.

    Raises:
      ValueError: there is no template, or it does more than put fixed texts between messages.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template")
    bos = tokenizer.bos_token if adds_bos else None

    def render(*roles: str) -> str:
        text = _render(tokenizer, _chat(*roles), roles[-1] == "user")
        return text.removeprefix(bos) if bos else text

    try:
        found = _fixed_texts(render, _added_tokens(tokenizer))
    except ValueError as error:
        raise ValueError(f"the chat template does more than put fixed texts between messages ({error})") from None
    with_system = [("system", "user"), ("system", "user", "assistant", "user")] if found.system is not None else []
    longer = ("user", "assistant", "user", "assistant", "user")
    for roles in [("user",), ("user", "assistant", "user"), longer, *with_system]:
        if found.render(_chat(*roles)) != render(*roles):
            raise ValueError(f"the chat template treats the messages of {', '.join(roles)} in a way of its own")
    return found


def _chat(*roles: str) -> list[dict[str, str]]:
    """Messages whose texts stand in no template, and have no spaces around them that one might remove."""
    return [{"role": role, "content": f"Xq{i}{role[::-1]}{i}qX"} for i, role in enumerate(roles)]


def _render(tokenizer: Any, messages: list[dict[str, str]], answer: bool) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    except (TemplateError, TypeError) as error:  # TypeError: it uses what only chats with tools have
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"it refuses messages of {roles}: {error}") from None


def _fixed_texts(render: Any, specials: Sequence[str]) -> ChatFormat:
    (first, end) = _between(render, "user")
    (_, to_answer, to_user, end_again) = _between(render, "user", "assistant", "user")
    if end != end_again:
        raise ValueError("it ends a chat of one message otherwise than one of three")
    cut = _end_of_answer(render, first, to_user, specials)
    after_answer, before_user = to_user[:cut], to_user[cut:]
    start = first.removesuffix(before_user)
    # Any cut would do where the text to an answer is also that to the end; this one is where turns end alike.
    cut = len(after_answer) if to_answer.startswith(after_answer) and end.startswith(after_answer) else 0
    cut = cut if to_answer == end else _common_prefix(to_answer, end)
    found = ChatFormat(
        start=start,
        system=None,
        user=(before_user, end[:cut]),
        assistant=(to_answer[cut:], after_answer),
        opening=end[cut:],
    )
    try:
        (before, after, _) = _between(render, "system", "user")
    except ValueError:  # refused, or left out
        return found
    if after.endswith(before_user):
        return dataclasses.replace(found, system=(before, after.removesuffix(before_user)))
    if not before.startswith(first):
        raise ValueError("the system message stands in no place of its own")
    try:
        _between(render, "system", "user", "assistant", "user")
    except ValueError:  # it is not before the first message of the user
        place = "last"
    else:
        place = "first"
    return dataclasses.replace(found, system=(before.removeprefix(first), after), system_in=place)


def _end_of_answer(render: Any, first: str, to_user: str, specials: Sequence[str]) -> int:
    """How much of the text from an answer to the next message belongs to the answer.

    What begins the first message too may be cut off anywhere; it is where the answer ends that closes a chat, or
    before a special token.
    """
    least = len(to_user) - len(_common_suffix(first, to_user))
    try:
        end = _between(render, "user", "assistant")[-1]
    except ValueError:
        return least
    most = _common_prefix(to_user, end)
    cuts = [i for i in range(least, most + 1) if i == len(end) or to_user[i:].startswith(tuple(specials))]
    return max(cuts, default=least)


def _between(render: Any, *roles: str) -> list[str]:
    """The texts before, between and after the messages' own."""
    text, parts = render(*roles), []
    for message in _chat(*roles):
        before, found, text = text.partition(message["content"])
        if not found:
            raise ValueError(f"it leaves out a message, or moves it, of {', '.join(roles)}")
        parts.append(before)
    return [*parts, text]


def _common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _common_suffix(a: str, b: str) -> str:
    n = _common_prefix(a[::-1], b[::-1])
    return a[len(a) - n :]


def go_template(chat: ChatFormat) -> str:
    """The chat format as a template of Go's text/template with Ollama's variables."""

    def text(literal: str) -> str:
        # JSON's escapes are Go's, too. A quoted text keeps its spaces and line ends, whatever stands beside it.
        return f"{{{{ {json.dumps(literal, ensure_ascii=False)} }}}}" if literal else ""

    before, after = chat.system or ("", "")
    within = f"{text(before)}{{{{ $.System }}}}{text(after)}"
    if chat.system_in:
        holds = "$last" if chat.system_in == "last" else "(le $i 1)"
        begin, in_user = text(chat.start), f"{{{{ if and $.System {holds} }}}}{within}{{{{ end }}}}"
    elif chat.system is not None:
        begin, in_user = f"{{{{ if .System }}}}{within}{{{{ else }}}}{text(chat.start)}{{{{ end }}}}", ""
    else:
        begin, in_user = text(chat.start), ""
    return "\n".join(
        [
            begin,
            "{{- range $i, $_ := .Messages }}",
            "{{- $last := eq (len (slice $.Messages $i)) 1 }}",
            f'{{{{- if eq .Role "user" }}}}{text(chat.user[0])}{in_user}{{{{ .Content }}}}{text(chat.user[1])}'
            f"{{{{ if $last }}}}{text(chat.opening)}{{{{ end }}}}",
            f'{{{{- else if eq .Role "assistant" }}}}{text(chat.assistant[0])}{{{{ .Content }}}}'
            f"{{{{ if not $last }}}}{text(chat.assistant[1])}{{{{ end }}}}",
            "{{- end }}",
            "{{- end }}",
        ]
    ).lstrip("\n")


def modelfile(
    source: str, tokenizer: Any, generation: Mapping[str, Any], context: int, *, adapter: str | None = None
) -> str:
    """The text of a Modelfile; what could not be expressed is printed (to stderr).

    Args:
      source: a GGUF file's path from the folder ("./x.gguf"), or a model's name in Ollama.
      tokenizer: transformers' tokenizer.
      generation: generation_config.json.
      context: most tokens of a chat.
      adapter: path of a GGUF file with an adapter.
    """
    lines = [f"FROM {source}"] + ([] if adapter is None else [f"ADAPTER {adapter}"])
    stops = _stops(tokenizer, generation)
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    try:
        chat = chat_format(tokenizer, adds_bos=adds_bos)
    except ValueError as error:
        say(f"Ollama: no TEMPLATE in the Modelfile, since {error}; Ollama looks for one that resembles the file's own")
    else:
        template = go_template(chat)
        lines.append(f'TEMPLATE """{template}"""')
        if chat.system is None:
            say("Ollama: the chat template takes no system message, so one given to Ollama is left out")
        today = datetime.date.today()
        if any(today.strftime(form) in template for form in ("%d %b %Y", "%Y-%m-%d", "%d %B %Y", "%B %d, %Y")):
            say("Ollama: the chat template states today's date, which will not change in the Modelfile")
        ends = [token for token in _added_tokens(tokenizer) if chat.assistant[1].strip() == token]
        stops = list(dict.fromkeys([*stops, *ends]))
    for name, parameter in _PARAMETERS.items():
        if generation.get("do_sample") and isinstance(value := generation.get(name), int | float):
            lines.append(f"PARAMETER {parameter} {value}")
    lines.append(f"PARAMETER num_ctx {min(context, _LONGEST)}")
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    return "\n".join(lines) + "\n"


def _added_tokens(tokenizer: Any) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values()]


def _stops(tokenizer: Any, generation: Mapping[str, Any]) -> list[str]:
    """Texts of the tokens that end an answer."""
    ids = generation.get("eos_token_id")
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    ids = list(dict.fromkeys([*ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]))
    return tokenizer.convert_ids_to_tokens(ids)


def save_ollama(
    model: "CausalLM",
    folder: Path,
    tokenizer: Any = None,
    file_type: str = "q8_0",
    *,
    as_adapter: bool = False,
    base: str | None = None,
    merge_base: str = "dequantized",
    overwrite: bool = False,
    verbose: bool = True,
    gguf: Path | None = None,
    imatrix: Path | None = None,
    device: Any = None,
) -> Path:
    """Writes a folder for `ollama create NAME -f FOLDER/Modelfile`; returns the folder.

    Args:
      model: it is not changed.
      folder: appears when everything is written.
      tokenizer: the model's; loaded from its source if None.
      file_type: of the GGUF file, see `lora_jax.export.gguf`.
      as_adapter: write base and adapter apart (FROM and ADAPTER) instead of merged.
      base: name of the base model in Ollama, instead of writing it; it has to be the very model that was trained on.
      merge_base: "dequantized" or "original", see `lora_jax.export.merge`.
      overwrite: replace an existing folder.
      verbose: show progress.
      gguf: a file of the merged model that is there already; it is linked to, or copied where that is not possible.
      imatrix, device: of the file that is written instead, as `lora_jax.export.gguf.write_ggufs`.

    Raises:
      ValueError: unknown type; `base` without `as_adapter`; as `save_gguf` and `save_gguf_lora`.
      FileExistsError, OSError: the folder exists, cannot be written, or the disk is full.
    """
    from lora_jax.export.gguf_lora import save_gguf_lora
    from lora_jax.loading import load_tokenizer

    if base is not None and not as_adapter:
        raise ValueError("base names a model of Ollama that the adapter is put on; pass as_adapter=True")
    if as_adapter and model.lora_config is None:
        raise ValueError("the model has no adapter to save; make one with get_peft_model")
    tokenizer = load_tokenizer(model.source) if tokenizer is None else tokenizer
    settings = model.source / "generation_config.json"
    generation = read_json(settings) if settings.exists() else {}
    with folder_aside(folder, overwrite, kept=[model.source]) as aside:
        adapter = f"./{save_gguf_lora(model, aside).name}" if as_adapter else None
        if base is None and as_adapter:
            options: dict[str, Any] = {"progress": verbose, "imatrix": imatrix, "device": device}
            base = f"./{_base_gguf(model, aside, tokenizer, file_type, options).name}"
        elif base is None and gguf is not None:
            base = f"./{_linked(gguf, aside).name}"
        elif base is None:
            options = {"merge_base": merge_base, "verbose": verbose, "imatrix": imatrix, "device": device}
            (path,) = model.save_pretrained_gguf(aside, tokenizer, file_type, **options)
            base = f"./{path.name}"
        text = modelfile(base, tokenizer, generation, model.max_seq_length, adapter=adapter)
        (aside / "Modelfile").write_text(text, encoding="utf-8")
    return folder


def _linked(file: Path, folder: Path) -> Path:
    path = folder / file.name
    try:
        os.link(file, path)
    except OSError:  # another file system, or one without links
        shutil.copyfile(file, path)
    return path


def _base_gguf(model: "CausalLM", folder: Path, tokenizer: Any, file_type: str, options: dict[str, Any]) -> Path:
    """The model without its adapter as a GGUF file."""
    from lora_jax.export.gguf import write_gguf
    from lora_jax.export.gguf_mixtures import file_types
    from lora_jax.export.hf import copy_small_files
    from lora_jax.export.merge import merged_tensors

    (file_type,) = file_types(file_type)
    name = Path(model.name_or_path).name
    tensors = merged_tensors(model, with_adapter=False)
    with tempfile.TemporaryDirectory() as small:
        copy_small_files(model.source, Path(small), tokenizer)
        (Path(small) / "config.json").write_text(json.dumps(model.hf_config), encoding="utf-8")
        path = folder / f"{name}.{file_type.upper()}.gguf"
        return write_gguf(path, tensors, model.hf_config, small, file_type, name=name, **options)
