"""The command `lora-jax`: train, generate, export, plan.

Mistakes of the user end in one message and exit code 2; anything else keeps its traceback. Heavy imports stand inside
the commands, so that `--help` is quick.
"""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_jax.config import SCHEDULERS, SFTConfig
from lora_jax.settings import (
    LORA,
    OWN,
    UsageError,
    files_of,
    lora_config,
    read_settings,
    sft_config,
    split_targets,
    write_settings,
)

if TYPE_CHECKING:
    from lora_jax.cards import Card
    from lora_jax.model import CausalLM
    from lora_jax.plan import Memory, Workload
    from lora_jax.remat import RematPlan

__all__ = ["app", "main"]

RUN_FILE = "train_config.yaml"  # the settings of a run in its output folder; `train --config` reads it again

_HELP = """Fine-tune language models with LoRA and QLoRA in JAX, try the result, and export it.

\b
Examples:
    lora-jax plan ORG/MODEL --gpu 24GB --batch 2 --seq 2048
    lora-jax train ORG/MODEL --data train.jsonl --output-dir my-run
    lora-jax generate my-run --chat --prompt "What can you do?"
    lora-jax export my-run --to gguf:q8_0 --out my-model

A MODEL is a folder in Hugging Face's format or a name on the Hugging Face hub.

Compiled programs are kept in ~/.cache/lora-jax/jax, so that a second run starts sooner. The environment variable
JAX_COMPILATION_CACHE_DIR names another folder.
"""

app = typer.Typer(
    name="lora-jax",
    help=_HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def main() -> None:
    """Entry point of the console script."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it says that without torch it has no models
    try:
        app()
    except Exception as error:
        if "--traceback" in sys.argv[1:2] or not _is_for_user(error):
            raise
        print(f"lora-jax: {str(error) or type(error).__name__}", file=sys.stderr)
        sys.exit(2)


def _is_for_user(error: Exception) -> bool:
    """Whether an error is an explanation of lora_jax for its user: one of these types, raised in our own code.

    The same types out of a library mean that we called it wrongly, except for files, which only the user can mend.
    """
    if isinstance(error, OSError | UsageError):
        return True
    from lora_jax.checkpoint import CheckpointError

    if not isinstance(error, ValueError | MemoryError | FloatingPointError | CheckpointError):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("lora_jax.")


# ---- options ------------------------------------------------------------------------------------------------------

_DEFAULT = SFTConfig()


def _options(panel: str) -> Callable[..., Any]:
    """A maker of options that are None unless given, so that a YAML file can set them; the help says the default."""

    def option(names: str, help: str, default: Any = None) -> Any:
        shown = help if default is None else f"{help} \\[default: {default}]"  # a bare bracket would be rich's markup
        return typer.Option(*names.split(), help=shown, rich_help_panel=panel, show_default=False)

    return option


_data, _run, _lora, _base = map(_options, ("Data", "Training", "Adapter", "Base model"))
_AS_TRAINED = "as the run was trained, else"

_FourBit = Annotated[bool | None, _base("--4bit/--16bit", "Hold the base in NF4 or in 16 bits.", f"{_AS_TRAINED} 4bit")]
_Dtype = Annotated[
    str | None, _base("--dtype", "bfloat16 or float32: all but NF4 weights.", f"{_AS_TRAINED} the checkpoint's")
]
_Source = Annotated[str, typer.Argument(help="Output folder of `train`, PEFT adapter, model folder, or hub name.")]


def _print_version(value: bool) -> None:
    if value:
        import lora_jax

        print(f"lora-jax {lora_jax.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the code an error arose.")] = False,
) -> None:
    pass


# ---- train --------------------------------------------------------------------------------------------------------


@app.command(no_args_is_help=True)
def train(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="Model folder or hub name; or a PEFT adapter, to train it further.")
    ] = None,
    data: Annotated[list[Path] | None, _data("--data -d", "Rows: .jsonl, .json, .parquet; may be repeated.")] = None,
    eval_data: Annotated[list[Path] | None, _data("--eval-data", "Rows to evaluate the loss on, every epoch.")] = None,
    config: Annotated[
        Path | None,
        _data("--config -c", "YAML file: names below (a_b for --a-b), fields of SFTConfig and LoraConfig. Flags win."),
    ] = None,
    output_dir: Annotated[
        str | None, _data("--output-dir -o", "Where adapter, metrics and checkpoints go.", _DEFAULT.output_dir)
    ] = None,
    overwrite_output_dir: Annotated[
        bool | None, _data("--overwrite-output-dir", "Replace what an earlier run left there.")
    ] = None,
    resume: Annotated[bool | None, _data("--resume", "Continue from the newest checkpoint there.")] = None,
    max_length: Annotated[
        int | None, _data("--max-length", "Tokens that a row is cut to.", "as many as the model takes")
    ] = None,
    packing: Annotated[
        bool | None, _data("--packing/--no-packing", "Several examples in one row.", _DEFAULT.packing)
    ] = None,
    learning_rate: Annotated[
        float | None, _run("--learning-rate --lr", "Peak learning rate of AdamW.", _DEFAULT.learning_rate)
    ] = None,
    num_train_epochs: Annotated[
        float | None, _run("--epochs", "Passes over the data (num_train_epochs).", _DEFAULT.num_train_epochs)
    ] = None,
    max_steps: Annotated[int | None, _run("--max-steps", "Optimizer steps, instead of epochs.")] = None,
    per_device_train_batch_size: Annotated[
        int | None,
        _run("--batch-size", "Rows at once (per_device_train_batch_size).", _DEFAULT.per_device_train_batch_size),
    ] = None,
    gradient_accumulation_steps: Annotated[
        int | None,
        _run("--grad-accumulation", "Batches of a step (gradient_accumulation_steps).", 1),
    ] = None,
    lr_scheduler_type: Annotated[
        str | None, _run("--scheduler", f"{', '.join(SCHEDULERS)} (lr_scheduler_type).", _DEFAULT.lr_scheduler_type)
    ] = None,
    warmup_steps: Annotated[float | None, _run("--warmup-steps", "Steps; below 1 a share of all.", 0)] = None,
    gradient_checkpointing: Annotated[
        str | None,
        _run("--gradient-checkpointing", "What backward recomputes: full, selective, none, offload, auto.", "full"),
    ] = None,
    save_steps: Annotated[
        float | None, _run("--save-steps", "Steps between checkpoints.", int(_DEFAULT.save_steps))
    ] = None,
    seed: Annotated[int | None, _run("--seed", "Of data order and dropout.", _DEFAULT.seed)] = None,
    r: Annotated[int | None, _lora("--r", "Rank.", 16)] = None,
    lora_alpha: Annotated[float | None, _lora("--alpha", "The adapter is scaled by alpha / r.", 16)] = None,
    lora_dropout: Annotated[float | None, _lora("--dropout", "Probability; of the adapter's input.", 0.0)] = None,
    target_modules: Annotated[
        str | None,
        _lora("--target-modules", "Names joined by commas, all-linear, or a regular expression.", "the 7 of a block"),
    ] = None,
    use_rslora: Annotated[bool | None, _lora("--use-rslora", "Scale by alpha / sqrt(r) instead.")] = None,
    load_in_4bit: _FourBit = None,
    offload_embedding: Annotated[
        bool | None, _run("--offload-embedding", "Keep the embedding table in the host's memory.", False)
    ] = None,
    dtype: _Dtype = None,
) -> None:
    """Fine-tune an adapter on rows of data.

    \b
    Examples:
      lora-jax train HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl --epochs 1 --output-dir my-run
      lora-jax train ./llama --data a.jsonl --data b.parquet --packing --batch-size 2 --grad-accumulation 8
      lora-jax train --config run.yaml --lr 1e-4
      lora-jax train --config my-run/train_config.yaml --resume

    \b
    A row is one JSON object:
      {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
      {"prompt": "...", "completion": "..."}
      {"text": "..."}
    The loss is taken on answers and completions only; of plain text, on everything.

    \b
    A run.yaml:
      model: ./llama
      data: train.jsonl
      output_dir: my-run
      learning_rate: 2e-4
      r: 32
      target_modules: q_proj, v_proj

    The output folder holds the adapter in PEFT's format, the tokenizer, train_config.yaml (all settings; --config reads
    it), metrics.jsonl, loss_curve.png, and checkpoints from which --resume continues exactly.
    """
    # Repeatable options that were not given are empty, not None.
    flags = {k: v for k, v in context.params.items() if k != "config" and v not in (None, [], ())}
    if "target_modules" in flags:
        flags["target_modules"] = split_targets(flags["target_modules"])
    settings = read_settings(config) if config else {}
    for flag in {"num_train_epochs", "max_length"} & flags.keys():  # a flag replaces the other name in the file, too
        settings.pop({"num_train_epochs": "max_steps", "max_length": "max_seq_length"}[flag], None)
    _train(settings | flags)


def _train(settings: dict[str, Any]) -> None:
    own = {name: settings.pop(name, None) for name in OWN}
    lora_settings = {name: settings.pop(name) for name in LORA if settings.get(name) is not None}
    if own["model"] is None or not own["data"]:
        missing = "a MODEL" if own["model"] is None else "--data FILE"
        raise UsageError(f"train: {missing} is missing; give it on the command line or in --config (see --help)")
    if own["eval_data"]:
        settings.setdefault("eval_strategy", "epoch")
    args = sft_config(settings)
    folder = Path(args.output_dir)
    adapter = folder / "adapter_config.json"
    if adapter.exists() and not own["resume"] and not args.overwrite_output_dir:
        raise UsageError(
            f"{folder} holds the adapter of an earlier run; choose another --output-dir, continue with --resume, or "
            "replace it with --overwrite-output-dir"
        )
    from lora_jax.step import use_compile_cache

    use_compile_cache()
    from lora_jax.data import load_rows
    from lora_jax.hf_checkpoint import read_json, resolve_folder
    from lora_jax.loading import from_pretrained
    from lora_jax.plan import refuse_what_cannot_fit
    from lora_jax.trainer import SFTTrainer

    rows = load_rows(files_of(own["data"]))  # before the model, which takes longer
    eval_rows = load_rows(files_of(own["eval_data"])) if own["eval_data"] else None
    peft_config = lora_config(lora_settings)
    base: Any = {"load_in_4bit": own["load_in_4bit"] is not False, "dtype": own["dtype"]}
    base["offload_embedding"] = bool(own["offload_embedding"])
    name = _absolute(own["model"])
    config = resolve_folder(name, only_config=True) / "config.json"
    if config.exists() and args.mesh is None:  # not so for an adapter; the account is of one device
        refuse_what_cannot_fit(read_json(config), peft_config, args, **base)
    model, tokenizer = from_pretrained(name, **base, mesh=args.mesh, max_seq_length=args.max_length)
    if model.lora_config is not None:
        if lora_settings:
            raise UsageError(f"{name} is an adapter already, so {', '.join(lora_settings)} cannot be set anew")
        peft_config = None
    with_base = {"model": name, "load_in_4bit": base["load_in_4bit"], "dtype": model.module.dtype.name}
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[_KeepSettings({**own, **with_base, **lora_settings, **settings})],
    )
    output = trainer.train(resume_from_checkpoint=own["resume"])
    trainer.save_model()
    print(f"Trained {output.global_step} steps, mean loss {output.training_loss:.4f}. The adapter is in {folder}")
    print(f'  try it:     lora-jax generate {folder} --chat --prompt "..."')
    print(f"  export it:  lora-jax export {folder} --to gguf:q8_0 --out {folder}-export")


class _KeepSettings:
    """Writes the settings when training begins: a run that is refused leaves those of the run before it."""

    def __init__(self, settings: dict[str, Any]):
        self._settings = settings

    def on_train_begin(self, args: SFTConfig, *_: Any, **__: Any) -> None:
        write_settings(Path(args.output_dir) / RUN_FILE, self._settings)


def _absolute(model: str) -> str:
    """A local folder by its full path, so that the adapter finds its base from anywhere; a hub name as it is."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.exists() else str(model)


# ---- generate -----------------------------------------------------------------------------------------------------


@app.command(no_args_is_help=True)
def generate(
    source: _Source,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue; - reads it from standard input.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message: put it into the model's chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message of the chat.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens are made.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token. Above: sample.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens that add up to p.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    load_in_4bit: _FourBit = None,
    dtype: _Dtype = None,
) -> None:
    """Answer a prompt, word by word as it is made.

    \b
    Examples:
      lora-jax generate my-run --chat --prompt "Book a table for two"
      lora-jax generate my-run --chat --system "Answer in JSON." --prompt "Two coffees" --max-new-tokens 64
      lora-jax generate ./llama --prompt "Once upon a time" --temperature 0.8 --top-p 0.95
      cat letter.txt | lora-jax generate my-run --chat --prompt -
    """
    if system is not None and not chat:
        raise UsageError("generate: --system is part of a chat; add --chat")
    if temperature == 0 and (top_k or top_p != 1):
        raise UsageError("generate: --top-k and --top-p do nothing at temperature 0; add --temperature 0.8, say")
    text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
    model, tokenizer = _load(source, load_in_4bit, dtype)
    from transformers import TextStreamer

    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    model.generate(
        [_prompt_ids(tokenizer, text, chat, system)],
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **(sampling if temperature != 0 else {}),
    )


def _prompt_ids(tokenizer: Any, text: str, chat: bool, system: str | None) -> list[int]:
    from lora_jax.generation import prompt_ids

    if not chat:
        return prompt_ids(tokenizer, text)
    if not tokenizer.chat_template:
        raise UsageError("generate: the tokenizer has no chat template; leave out --chat to continue plain text")
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": text})
    return prompt_ids(tokenizer, messages)


# ---- export -------------------------------------------------------------------------------------------------------

_TARGETS = "peft, hf, bnb-4bit, gguf:TYPE, gguf-lora, ollama:TYPE, ollama-lora:TYPE"


@app.command(no_args_is_help=True)
def export(
    source: _Source,
    to: Annotated[list[str], typer.Option("--to", help=f"One of {_TARGETS}; may be repeated.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder; every kind of target gets a folder in it.")],
    merge_base: Annotated[
        str,
        typer.Option(
            help="What the adapter is merged into: `dequantized`, the very weights it was trained on, or `original`, "
            "the unquantised weights of the source."
        ),
    ] = "dequantized",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace folders that exist.")] = False,
    answers: Annotated[
        bool,
        typer.Option("--answers/--no-answers", help="Compare answers to fixed prompts, too, not tensors alone."),
    ] = True,
    push_to_hub: Annotated[
        str | None,
        typer.Option(help="ORGANISATION/NAME to upload to; -KIND is added if there are several kinds of target."),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Repositories that are made are not private.")] = False,
    load_in_4bit: _FourBit = None,
    dtype: _Dtype = None,
) -> None:
    """Write a trained adapter for other programs, and check what was written.

    \b
    Targets:
      peft              the adapter alone, for PEFT, transformers and vLLM
      hf                base and adapter merged, a Hugging Face folder of 16-bit safetensors
      bnb-4bit          the same with linear layers in NF4, for transformers with bitsandbytes
      gguf:TYPE         base and adapter merged, one file for llama.cpp: f32, f16, bf16, q8_0, q4_k_m ...
      gguf-lora[:TYPE]  the adapter alone for llama.cpp's --lora: f32 or f16
      ollama[:TYPE]     a folder for `ollama create`: the GGUF file (q8_0 unless told) and its Modelfile
      ollama-lora       the same with base and adapter apart

    \b
    Examples:
      lora-jax export my-run --to gguf:q8_0 --out my-model
      lora-jax export my-run --to peft --to hf --to gguf:f16 --to gguf:q4_k_m --to ollama --out my-model
      lora-jax export my-run --to hf --merge-base original --out my-model

    Every file is read back. With xllamacpp installed, GGUF files are run in llama.cpp. What is not the trained model
    ends the command, and nothing of it is left.
    """
    from lora_jax.export.command import export as write
    from lora_jax.export.command import parse_targets

    try:
        targets = parse_targets(to)
    except ValueError as error:
        raise UsageError(f"export: {error}") from None
    if merge_base not in ("dequantized", "original"):
        raise UsageError(f"export: --merge-base is {merge_base!r}; there are 'dequantized' and 'original'")
    kinds = list(dict.fromkeys(target.kind for target in targets))
    for kind in kinds:
        if (out / kind).exists() and not overwrite:
            raise UsageError(f"export: {out / kind} exists; choose another --out, or replace it with --overwrite")
    model, tokenizer = _load(source, load_in_4bit, dtype)
    write(model, tokenizer, targets, out, merge_base=merge_base, overwrite=overwrite, answers=answers)
    for kind in kinds:
        for path in sorted((out / kind).iterdir()):
            print(f"{path}  {path.stat().st_size / 1e6:,.1f} MB")
    if push_to_hub is not None:
        from lora_jax.export.hub import push

        for kind in kinds:
            name = push_to_hub if len(kinds) == 1 else f"{push_to_hub}-{kind}"
            print(f"{out / kind} is at {push(out / kind, name, private=not public)}")
    if "ollama" in kinds:
        print(f"  try it:  ollama create my-model -f {out / 'ollama' / 'Modelfile'}")


# ---- data ---------------------------------------------------------------------------------------------------------

data_app = typer.Typer(
    name="data",
    help="Look at training data.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
app.add_typer(data_app)


@data_app.command(no_args_is_help=True)
def preview(
    model: Annotated[str, typer.Argument(help="Model folder, adapter or hub name; only its tokenizer is read.")],
    data: Annotated[list[Path], typer.Option("--data", "-d", help="Rows: .jsonl, .json, .parquet; may be repeated.")],
    rows: Annotated[int, typer.Option("--rows", "-n", help="So many examples are shown.", min=0)] = 3,
    max_length: Annotated[int, typer.Option("--max-length", help="Tokens that an example is cut to.", min=2)] = 2048,
    chat_template: Annotated[
        str | None, typer.Option(help="A built-in template in place of the tokenizer's: chatml, llama-3, gemma ...")
    ] = None,
    assistant_only: Annotated[
        bool, typer.Option("--assistant-only/--everything", help="Of conversations, train on the assistant's turns.")
    ] = True,
) -> None:
    """Show what a run would train on: bold green, or in double brackets where the output is no terminal.

    \b
    Examples:
      lora-jax data preview HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl
      lora-jax data preview ./llama --data a.jsonl --rows 10 --chat-template chatml

    Below it stands how many tokens there are and are trained on, and how many are padding, with and without --packing.
    """
    from rich.console import Console
    from rich.rule import Rule
    from transformers import AutoTokenizer

    from lora_jax.chat import preview as coloured
    from lora_jax.chat import preview_plain
    from lora_jax.chat_templates import get_chat_template
    from lora_jax.data import load_rows, tokenize_rows
    from lora_jax.loading import load_tokenizer

    name = _absolute(model)
    found = load_rows(files_of(data))
    tokenizer: Any = load_tokenizer(Path(name)) if Path(name).is_dir() else AutoTokenizer.from_pretrained(name)
    if chat_template is not None:
        tokenizer = get_chat_template(tokenizer, chat_template)
    only = None if assistant_only else False
    how: Any = {"assistant_only_loss": only, "completion_only_loss": only}
    examples = tokenize_rows(found, tokenizer, max_length=max_length, **how)
    console = Console(highlight=False)
    for number, example in enumerate(examples[:rows]):
        trained = int((example.labels != -100).sum())
        console.print(Rule(f"example {number}: {len(example)} tokens, {trained} trained on", align="left"))
        if console.is_terminal:
            console.print(coloured(example, tokenizer), soft_wrap=True)
        else:
            console.print(preview_plain(example, tokenizer), markup=False, soft_wrap=True)
    console.print(Rule())
    for line in _lengths(examples, len(found), max_length):
        console.print(line, markup=False, soft_wrap=True)


def _lengths(examples: list[Any], rows: int, max_length: int) -> list[str]:
    """What is to be known of the lengths of examples."""
    import numpy as np

    from lora_jax.batches import BatchIterator

    lengths = np.array([len(example) for example in examples])
    trained = sum(int((example.labels != -100).sum()) for example in examples)
    packed = BatchIterator(examples, batch_size=1, max_length=max_length, packing=True)
    padded = BatchIterator(examples, batch_size=1, max_length=max_length)
    computed = sum(next(n for n in padded.buckets if n >= length) for length in lengths)
    return [
        f"{rows:,} rows, {len(examples):,} examples, {lengths.sum():,} tokens, {trained:,} of them trained on "
        f"({100 * trained / lengths.sum():.1f} %)",
        f"tokens of an example: {lengths.min():,} at least, {int(np.median(lengths)):,} in the middle, "
        f"{lengths.max():,} at most",
        f"computed tokens that are real: {100 * lengths.sum() / computed:.1f} % padded to "
        f"{', '.join(map(str, padded.buckets))}; {100 * (packed.efficiency or 0):.1f} % packed into rows of "
        f"{packed.buckets[-1]}",
    ]


# ---- plan ---------------------------------------------------------------------------------------------------------


@app.command(no_args_is_help=True)
def plan(
    model: Annotated[str, typer.Argument(help="Model folder or hub name; only its config.json is read.")],
    gpu: Annotated[str, typer.Option("--gpu", help="A card (H100, RTX 4090 ...) or its memory (24GB).")],
    batch: Annotated[int, typer.Option("--batch", help="Rows at once.", min=1)] = 2,
    seq: Annotated[int, typer.Option("--seq", help="Tokens of a row.", min=2)] = 2048,
    rank: Annotated[int, typer.Option("--rank", "--r", help="Of the adapter.")] = 16,
    remat: Annotated[
        str, typer.Option("--remat", help="What backward recomputes: auto, full, selective, offload or none.")
    ] = "auto",
    target_modules: Annotated[
        str | None, typer.Option("--target-modules", help="As for train; the 7 linear layers of a block unless given.")
    ] = None,
    grad_accumulation: Annotated[int, typer.Option("--grad-accumulation", help="Batches of a step.", min=1)] = 1,
    optim: Annotated[str, typer.Option("--optim", help="As for train.")] = _DEFAULT.optim,
    load_in_4bit: Annotated[bool, typer.Option("--4bit/--16bit", help="Base in NF4 or in 16 bits.")] = True,
    offload_embedding: Annotated[
        bool, typer.Option("--offload-embedding", help="The embedding table is kept in the host's memory.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="bfloat16 or float32; the checkpoint's if left out.")
    ] = None,
) -> None:
    """Say what training would take of a GPU, before anything is loaded.

    \b
    Examples:
      lora-jax plan meta-llama/Llama-3.1-8B --gpu 24GB --batch 2 --seq 2048
      lora-jax plan ./llama --gpu H100 --batch 4 --seq 8192 --rank 64 --remat selective

    Memory is an estimate, within 8 % of what the compiler needs where it was compared. Seconds are rougher.
    """
    from lora_jax.cards import card_of
    from lora_jax.hf_checkpoint import read_json, resolve_folder
    from lora_jax.plan import of_config

    settings: dict[str, Any] = {"r": rank}
    if target_modules is not None:
        settings["target_modules"] = split_targets(target_modules)
    folder = resolve_folder(model, only_config=True)
    work = of_config(
        read_json(folder / "config.json"),
        lora_config(settings),
        batch,
        seq,
        accumulation=grad_accumulation,
        load_in_4bit=load_in_4bit,
        dtype=dtype,
        optim=optim,
        offload_embedding=offload_embedding,
    )
    what = f"{model} in {'NF4' if load_in_4bit else '16 bits'}, adapter of rank {rank}, {batch} x {seq} tokens"
    _print_plan(what, work, card_of(gpu), remat)


def _print_plan(what: str, work: "Workload", card: "Card", remat: str) -> None:
    """Raises MemoryError where the plan does not fit, after the table of those that could be chosen."""
    from rich.console import Console

    from lora_jax.cards import GIB
    from lora_jax.plan import MEMORY_FRACTION, choose, explain, fits, largest, memory
    from lora_jax.remat import PRESETS, RematPlan

    console = Console(highlight=False)
    budget = int(MEMORY_FRACTION * card.memory)
    plans = dict(PRESETS)
    with contextlib.suppress(MemoryError):
        plans = {"auto": choose(work, card, budget), **plans}
    console.print(f"{what}, on {card.name}", markup=False)
    console.print(_choices(work, card, budget, plans))
    if remat != "auto":
        plans[remat] = RematPlan.of(remat)
    if remat not in plans or not fits(memory(work, plans[remat], card), budget, card):
        raise MemoryError(explain(work, card, budget, plans.get(remat)))
    need = memory(work, plans[remat], card)
    console.print(f"remat={remat}: {plans[remat]}", markup=False)
    console.print(_parts(need))
    some = None if remat == "auto" else plans[remat]
    length = min(largest(work, card, budget, some, "length", 64), work.config.max_position)
    rows = largest(work, card, budget, some, "batch")
    console.print(f"At most {rows} rows of {work.length} tokens fit, or {work.batch} of {length} tokens.")
    console.print(
        f"{budget / GIB:.1f} GiB of the card can be used with XLA_CLIENT_MEM_FRACTION={MEMORY_FRACTION} in the "
        "environment; unless told so, JAX takes 0.75 of a card."
    )


def _choices(work: "Workload", card: "Card", budget: int, plans: "dict[str, RematPlan]") -> Any:
    from rich.table import Table

    from lora_jax.cards import GIB
    from lora_jax.plan import fits, memory, seconds

    table = Table("backward keeps", "peak GiB", "host GiB", "ms a step", "tokens/s", "of it again, ms", "fits")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, plan in plans.items():
        need, parts = memory(work, plan, card), seconds(work, plan, card)
        total = sum(parts.values())
        numbers = (need.total / GIB, need.host / GIB, 1e3 * total)
        rate = work.accumulation * work.tokens / total
        yes = "yes" if fits(need, budget, card) else "no"
        table.add_row(name, *(f"{n:.1f}" for n in numbers), f"{rate:,.0f}", f"{1e3 * parts['recomputation']:.1f}", yes)
    return table


def _parts(need: "Memory") -> Any:
    from rich.table import Table

    from lora_jax.cards import GIB

    rows = {"weights": need.weights, "adapters": need.adapters, "optimizer's state": need.optimizer}
    rows |= {"embeddings of the tokens": need.inputs} if need.inputs else {}
    rows |= {f"kept by the layers: {name}": size for name, size in need.kept.items()}
    which = "gradients, and work on one layer" if need.backward >= need.loss else "head and loss"
    rows |= {which: max(need.loss, need.backward), "peak": need.total}
    table = Table("memory", "GiB", show_footer=False)
    table.columns[1].justify = "right"
    for name, size in rows.items():
        table.add_row(name, f"{size / GIB:.2f}", end_section=name == which)
    return table


# ---- shared by generate and export --------------------------------------------------------------------------------


def _load(source: str, load_in_4bit: bool | None, dtype: str | None) -> "tuple[CausalLM, Any]":
    """The model of a run, an adapter or a base, held as it was trained unless told otherwise."""
    from lora_jax.step import use_compile_cache

    use_compile_cache()
    from lora_jax.loading import from_pretrained

    name, trained = _absolute(source), {}
    if Path(name).is_dir():
        if (Path(name) / RUN_FILE).exists():
            trained = read_settings(Path(name) / RUN_FILE)
        name = _adapter_folder(Path(name))
    four_bit: bool = trained.get("load_in_4bit", True) if load_in_4bit is None else load_in_4bit
    progress = sys.stdout.isatty()  # where the answer goes
    return from_pretrained(name, load_in_4bit=four_bit, dtype=dtype or trained.get("dtype"), progress=progress)


def _adapter_folder(folder: Path) -> str:
    """The folder itself, or the newest checkpoint in it if training did not come to its end."""
    if not any((folder / name).exists() for name in ("adapter_config.json", "config.json")):
        from lora_jax.checkpoint import latest_checkpoint

        newest = latest_checkpoint(folder)
        if newest is not None:
            print(f"lora-jax: {folder} was not trained to the end; taking {newest.name}", file=sys.stderr)
            return str(newest)
    return str(folder)


if __name__ == "__main__":
    main()
