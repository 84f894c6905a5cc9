"""Chat templates for tokenizers that have none, or another than the data wants, and training on responses alone.

    tokenizer = get_chat_template(tokenizer, chat_template="chatml")
    dataset = standardize_sharegpt(dataset)
    trainer = train_on_responses_only(trainer, instruction_part="<|im_start|>user\\n", response_part=...)

The names are Unsloth's. `SFTTrainer` finds responses of rows of messages by itself, from the structure of the template
(`lora_jax.chat`); `train_on_responses_only` is for rows of text that a template or a prompt was put into before.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_jax.config import Names, resolve_names, say_once

if TYPE_CHECKING:
    from lora_jax.trainer import SFTTrainer

__all__ = [
    "CHAT_TEMPLATES",
    "as_messages",
    "get_chat_template",
    "markers_of",
    "response_spans",
    "standardize_data_formats",
    "standardize_sharegpt",
    "train_on_responses_only",
]


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat format. Its Jinja text says END where a turn ends and, where it has one, SYSTEM for the default system."""

    jinja: str
    end: str | None = None  # the token that ends a turn; None for the tokenizer's EOS
    system: str = ""  # system message of conversations that have none


# Every conversation begins with BOS if the tokenizer has one, as plain text does. A system message comes first.
_BEGIN = (
    "{{ bos_token or '' }}"
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set system = SYSTEM -%}{%- set turns = messages -%}{%- endif -%}"
)
# For formats without a place for it: the system message opens the first user's.
_FOLDED = _BEGIN + (
    "{%- for m in turns -%}"
    "{%- if m['role'] not in ('user', 'assistant') -%}"
    "{{ raise_exception('this format has turns of user and assistant only, not of ' + m['role']) }}{%- endif -%}"
    "{%- set first = system + '\n\n' if system and loop.first and m['role'] == 'user' else '' -%}"
)
_CLOSE = "{%- endfor -%}"

_HEADED = _BEGIN + (  # every turn has a header with its role, the system's too
    "{%- if system -%}{{ HEAD('system') + system TRIM + END }}{%- endif -%}"
    "{%- for m in turns -%}{{ HEAD(m['role']) + m['content'] TRIM + END }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ HEAD('assistant') }}{%- endif -%}"
)


def _headed(before: str, after: str, end: str, trim: bool = False) -> str:
    """A format of headers; `end` is a Jinja expression."""
    text = re.sub(r"HEAD\(([^)]*)\)", lambda m: f"'{before}' + {m[1]} + '{after}'", _HEADED)
    return text.replace(" TRIM", " | trim" if trim else "").replace("END", end)


_CHATML = _headed("<|im_start|>", "\n", "'END\n'")
_ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
CHAT_TEMPLATES: dict[str, Template] = {
    "chatml": Template(_CHATML, "<|im_end|>"),
    "qwen-2.5": Template(
        _CHATML, "<|im_end|>", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    ),
    "llama-3": Template(
        _headed("<|start_header_id|>", "<|end_header_id|>\n\n", "'END'", trim=True), "<|eot_id|>"
    ),
    "phi-3": Template(_headed("<|", "|>\n", "'END\n'"), "<|end|>"),
    "phi-4": Template(_headed("<|im_start|>", "<|im_sep|>", "'END'"), "<|im_end|>"),
    "zephyr": Template(_headed("<|", "|>\n", "'END\n'"), None),
    "gemma": Template(
        _FOLDED + "{%- set role = 'model' if m['role'] == 'assistant' else 'user' -%}"
        "{{ '<start_of_turn>' + role + '\n' + first + m['content'] | trim + 'END\n' }}" + _CLOSE +
        "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}",
        "<end_of_turn>",
    ),
    "mistral": Template(
        _FOLDED + "{%- if m['role'] == 'user' -%}{{ '[INST] ' + first + m['content'] + ' [/INST]' }}"
        "{%- else -%}{{ ' ' + m['content'] + 'END' }}{%- endif -%}" + _CLOSE,
        None,
    ),
    "alpaca": Template(
        _BEGIN + "{%- if system -%}{{ system + '\n\n' }}{%- endif -%}"
        "{%- for m in turns -%}"
        "{%- if m['role'] == 'user' -%}{{ '### Instruction:\n' + m['content'] + '\n\n' }}"
        "{%- elif m['role'] == 'assistant' -%}{{ '### Response:\n' + m['content'] + 'END\n\n' }}"
        "{%- else -%}{{ raise_exception('this format has turns of user and assistant only, not of ' + m['role']) }}"
        "{%- endif -%}" + _CLOSE +
        "{%- if add_generation_prompt -%}{{ '### Response:\n' }}{%- endif -%}",
        None,
        _ALPACA_SYSTEM,
    ),
}  # fmt: skip
_OTHER_NAMES = {
    "im_chatml": "chatml", "qwen2.5": "qwen-2.5", "qwen25": "qwen-2.5", "llama3": "llama-3", "llama-3.1": "llama-3",
    "llama-31": "llama-3", "llama-3.2": "llama-3", "llama-3.3": "llama-3", "phi-3.5": "phi-3", "phi3": "phi-3",
    "phi-35": "phi-3", "phi4": "phi-4", "gemma2": "gemma", "gemma-2": "gemma", "gemma-3": "gemma", "gemma3": "gemma",
}  # fmt: skip


def get_chat_template(
    tokenizer: Any,
    chat_template: str | tuple[str, str] = "chatml",
    mapping: Mapping[str, str] | None = None,
    map_eos_token: bool = True,
    system_message: str | None = None,
) -> Any:
    """Gives a tokenizer a chat template, in place, and returns it; saved folders and GGUF files get it, too.

    The vocabulary stays as it is. Where the format's end-of-turn token is not in it, turns end with the EOS token.

    Args:
      tokenizer: transformers' tokenizer.
      chat_template: a key of CHAT_TEMPLATES, a Jinja template, or (Jinja template, token that ends a turn). The names
        "llama-3.1" to "llama-3.3" give the Llama 3 format, without the dates that Meta's own templates add.
      mapping: what messages call role, content, user and assistant, such as {"role": "from", "content": "value",
        "user": "human", "assistant": "gpt"}; those of the usual names are still understood.
      map_eos_token: make the end-of-turn token the tokenizer's EOS, so that generation stops at it.
      system_message: of conversations that have none; None for the format's own ("alpaca" and "qwen-2.5" have one).

    Raises:
      ValueError: an unknown template, mapping or end token.
    """
    template = _template(chat_template)
    jinja, end = template.jinja, template.end
    eos = tokenizer.eos_token
    if end is not None and end not in tokenizer.get_vocab():
        if eos is None:
            raise ValueError(
                f"chat_template={chat_template!r}: {end!r}, which ends its turns, is not in the vocabulary, and the "
                "tokenizer has no eos_token to take its place; set tokenizer.eos_token"
            )
        say_once(f"get_chat_template: {end} is not in the vocabulary, so turns end with {eos} instead.")
        end = None
    if end is not None and map_eos_token and end != eos:
        tokenizer.eos_token = end
    if end is None and "END" in jinja and eos is None:
        raise ValueError(f"chat_template={chat_template!r} ends turns with the tokenizer's eos_token, which is not set")
    system = template.system if system_message is None else system_message
    if not isinstance(chat_template, tuple) and template in CHAT_TEMPLATES.values():
        jinja = jinja.replace("\n", "\\n")  # inside of its strings: every Jinja reads that
    jinja = jinja.replace("SYSTEM", _quoted(system)).replace("END", (end or eos or "").replace("'", "\\'"))
    tokenizer.chat_template = _renaming(mapping) + jinja
    return tokenizer


def _quoted(text: str) -> str:
    """A Jinja string."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def _template(given: str | tuple[str, str]) -> Template:
    if isinstance(given, tuple):
        return Template(given[0], given[1])
    if "{%" in given or "{{" in given:
        return Template(given)
    name = _OTHER_NAMES.get(given.lower(), given.lower())
    if name not in CHAT_TEMPLATES:
        near = difflib.get_close_matches(name, CHAT_TEMPLATES, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"chat_template={given!r} is unknown; there are {', '.join(CHAT_TEMPLATES)}, and any Jinja template.{hint}"
        )
    return CHAT_TEMPLATES[name]


def _renaming(mapping: Mapping[str, str] | None) -> str:
    """Jinja that gives messages of other names the usual ones."""
    if mapping is None:
        return ""
    names = {"role": "role", "content": "content", "user": "user", "assistant": "assistant", "system": "system"}
    if unknown := sorted(set(mapping) - set(names)):
        raise ValueError(f"mapping: {unknown[0]!r} is unknown; it maps {', '.join(names)} to the data's names")
    names |= mapping
    if names["role"] == "role" and names["content"] == "content" and names["user"] == "user":
        return ""
    roles = ", ".join(f"{_quoted(names[role])}: '{role}'" for role in ("user", "assistant", "system"))
    role, content = _quoted(names["role"]), _quoted(names["content"])
    return (
        "{%- set roles = {" + roles + "} -%}{%- set ns = namespace(all=[]) -%}{%- for m in messages -%}"
        f"{{%- set role = m[{role}] if {role} in m else m['role'] -%}}"
        f"{{%- set content = m[{content}] if {content} in m else m['content'] -%}}"
        "{%- set ns.all = ns.all + [{'role': roles.get(role, role), 'content': content}] -%}{%- endfor -%}"
        "{%- set messages = ns.all -%}"
    )


# ---- rows ---------------------------------------------------------------------------------------------------------

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant"}


def as_messages(turns: Any, where: str = "conversations") -> list[dict[str, Any]]:
    """Messages with `role` and `content`, from those or from ShareGPT's `from` and `value`.

    Raises:
      ValueError: something else.
    """
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise ValueError(f"{where} is {turns!r:.80}; wanted a list of at least one message")
    messages = []
    for number, turn in enumerate(turns):
        turn = dict(turn) if isinstance(turn, Mapping) else {}
        role, content = turn.pop("from", None) or turn.get("role"), turn.pop("value", turn.get("content"))
        if not isinstance(role, str):
            raise ValueError(
                f'message {number} of {where} is {turns[number]!r:.80}; wanted {{"role": ..., "content": ...}} or '
                '{"from": ..., "value": ...}'
            )
        turn.pop("weight", None)  # ShareGPT's, of no consequence here
        messages.append({**turn, "role": _ROLES.get(role.lower(), role), "content": content})
    return messages


def standardize_sharegpt(dataset: Any, *_: Any, **options: Any) -> Any:
    """Rewrites the column "conversations" of a data set from `from` and `value` to `role` and `content`.

    Args:
      dataset: a `datasets.Dataset`, `IterableDataset` or `DatasetDict`, or a list of rows; other columns stay.
      options: Unsloth's `num_proc` and the like have no effect.

    Raises:
      ValueError: there is no such column, or a conversation is in another form.
    """
    no_effect: dict[str, str] = {
        name: "rows are rewritten one by one" for name in ("num_proc", "batch_size", "tokenizer")
    }
    for name, usual in (("aliases_for_system", "system"), ("aliases_for_user", "user"), ("aliases_for_assistant", "")):
        no_effect[name] = f"the usual names of {usual or 'assistant'} are known"
    resolve_names("standardize_sharegpt", options, (), Names(no_effect=no_effect))

    def rewritten(row: Mapping[str, Any]) -> dict[str, Any]:
        if "conversations" not in row:
            raise ValueError(f"standardize_sharegpt: rows have no column 'conversations', but {', '.join(row)}")
        return {**row, "conversations": as_messages(row["conversations"])}

    if hasattr(dataset, "map"):
        return dataset.map(rewritten)
    return [rewritten(row) for row in dataset]


standardize_data_formats = standardize_sharegpt


# ---- responses ----------------------------------------------------------------------------------------------------


def response_spans(
    text: str, instruction_part: str | None, response_part: str, last_only: bool = False
) -> list[tuple[int, int]]:
    """Character ranges after each `response_part`, up to the next `instruction_part` or the end of the text."""
    spans, at = [], 0
    while (found := text.find(response_part, at)) >= 0:
        start = found + len(response_part)
        end = text.find(instruction_part, start) if instruction_part else -1
        end = len(text) if end < 0 else end
        spans.append((start, end))
        at = end
    return spans[-1:] if last_only else spans


def markers_of(tokenizer: Any) -> tuple[str, str]:
    """(instruction_part, response_part) of a tokenizer's chat template.

    They are what a conversation of two rounds has between its contents: before a user's, after the token that ended the
    turn before; and before an assistant's.

    Raises:
      ValueError: the tokenizer has no chat template, or one that does not render such a conversation as it is.
    """
    from lora_jax.chat import ChatRenderer, turn_enders

    contents = ["FIRST-QUESTION", "FIRST-ANSWER", "SECOND-QUESTION", "SECOND-ANSWER"]
    roles = ["user", "assistant"] * 2
    renderer = ChatRenderer(tokenizer)
    text = renderer.render([{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)])
    between = [re.search(f"{a}(.*?){b}", text, re.DOTALL) for a, b in zip(contents[:-1], contents[1:], strict=True)]
    if not all(between):
        raise ValueError(
            "the chat template does not write messages as they are, so its parts cannot be told; pass instruction_part "
            "and response_part"
        )
    enders = turn_enders(tokenizer)

    def after_end(gap: str) -> str:
        ends = [gap.find(token) + len(token) for token in enders if token in gap]
        rest = gap[min(ends) :] if ends else gap
        return (rest if rest.strip() else gap).lstrip("\n")

    to_response, to_instruction = (found[1] for found in between[:2] if found)
    question = [{"role": "user", "content": contents[0]}]
    plain, prompt = renderer.render(question), renderer.render(question, add_generation_prompt=True)
    header = prompt.removeprefix(plain)
    if header == prompt or not header.strip():  # there is none of its own, as in Mistral's format
        header = to_response.rstrip(" ")
    return after_end(to_instruction), header.lstrip("\n")


def train_on_responses_only(
    trainer: "SFTTrainer",
    instruction_part: str | None = None,
    response_part: str | None = None,
    last_response_only: bool = False,
    **options: Any,
) -> "SFTTrainer":
    """Makes a trainer learn only what follows `response_part`, up to the next `instruction_part`; returns it.

    The parts are looked for in the text of every row, and tokens that lie wholly between them are trained on, the one
    that ends a turn included. A user who writes `response_part` starts a response: rows of messages without this
    function, whose turns are known, are safer.

    Args:
      trainer: its train and evaluation data are tokenised again.
      instruction_part: what stands before a user's message, such as "<|im_start|>user\\n".
      response_part: what stands before a response, such as "<|im_start|>assistant\\n". Without both, those of the
        tokenizer's chat template.
      last_response_only: train on the last response of a row only.
      options: Unsloth's `num_proc`, `force_match` and `tokenizer` have no effect.

    Raises:
      ValueError: one part is given without the other, rows hold `input_ids`, or no row has the response part.
    """
    names = Names(
        no_effect={
            "num_proc": "rows are tokenized in this process",
            "force_match": "parts are found in the text, not among tokens",
            "tokenizer": "it is the trainer's",
        },
        refused={"return_function": ((False, None), "call tokenize_rows(..., responses=(instruction, response))")},
    )
    resolve_names("train_on_responses_only", options, (), names)
    if (instruction_part is None) != (response_part is None):
        raise ValueError("train_on_responses_only: give instruction_part and response_part, or neither")
    if response_part is None or instruction_part is None:
        instruction_part, response_part = markers_of(trainer.processing_class)
    trainer.train_on_responses(instruction_part, response_part, last_response_only)
    return trainer
