"""The command `lora-jax`: train, chat, generate, export, plan, bench, doctor, data preview.

Mistakes of the user end in one message and exit code 2; anything else keeps its traceback. Heavy imports stand inside
the commands, so that `--help` is quick.
"""

import contextlib
import functools
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_jax.config import SFTConfig
from lora_jax.settings import (
    LORA,
    OWN,
    Settings,
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
  lora-jax doctor                                              is this machine ready?
  lora-jax plan ORG/MODEL --gpu 24GB --batch 2 --seq 2048      what would training take?
  lora-jax train ORG/MODEL --data train.jsonl --output-dir my-run
  lora-jax chat my-run
  lora-jax export my-run --to gguf:q8_0 --out my-model

A MODEL is a folder in Hugging Face's format or a name on the Hugging Face hub.

Compiled programs are kept in ~/.cache/lora-jax/jax, so that a second run starts sooner. The environment variable
JAX_COMPILATION_CACHE_DIR names another folder.
"""

# Plain help: a line for each option, so that every command's fits a screen. Tests hold it to 40 lines of 100 columns.
_PLAIN: Any = {
    "no_args_is_help": True,
    "rich_markup_mode": None,
    "context_settings": {"help_option_names": ["-h", "--help"], "max_content_width": 100},
}
app = typer.Typer(name="lora-jax", help=_HELP, add_completion=False, pretty_exceptions_enable=False, **_PLAIN)


def main() -> None:
    """Entry point of the console script."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it says that without torch it has no models
    try:
        app()
    except Exception as error:
        if "--traceback" in sys.argv[1:2] or not _is_for_user(error):
            raise
        print(f"lora-jax: {str(error) or type(error).__name__}", file=sys.stderr)
        from lora_jax import distributed

        if distributed.several():  # a normal exit would wait for the others
            distributed.end(2)
        sys.exit(2)


def _is_for_user(error: Exception) -> bool:
    """Whether an error is an explanation of lora_jax for its user: one of these types, raised in our own code.

    The same types out of a library mean that we called it wrongly, except for files, which only the user can mend.
    """
    if isinstance(error, OSError | UsageError):
        return True
    from lora_jax.checkpoint import CheckpointError
    from lora_jax.distributed import ProcessError

    if not isinstance(error, ValueError | MemoryError | FloatingPointError | CheckpointError | ProcessError):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("lora_jax.")


# ---- options ------------------------------------------------------------------------------------------------------

_DEFAULT = SFTConfig()


def _option(names: str, help: str, default: Any = None) -> Any:
    """An option that is None unless given, so that a YAML file can set it; the help says the default."""
    shown = help if default is None else f"{help} [default: {default}]"
    return typer.Option(*names.split(), help=shown, show_default=False)


_FourBit = Annotated[bool | None, _option("--4bit/--16bit", "Base in NF4, or in 16 bits.", "as trained, or 4bit")]
_Dtype = Annotated[str | None, _option("--dtype", "bfloat16 or float32: all but NF4 weights.", "as stored")]
_Limit = Annotated[str | None, _option("--memory-limit", "Take at most so much of the GPU, such as 12GB.")]
_Source = Annotated[
    str, typer.Argument(help="Output folder of `train`, PEFT adapter, model folder, or hub name.", metavar="SOURCE")
]
_System = Annotated[str | None, typer.Option("--system", help="System message of the chat.", show_default=False)]
_NewTokens = Annotated[int, typer.Option("--max-new-tokens", help="At most so many tokens are made.")]
_Temperature = Annotated[
    float, typer.Option("--temperature", help="0: always the likeliest token. Above: sample.", show_default=True)
]
_TopK = Annotated[int, typer.Option("--top-k", help="Sample among the k likeliest tokens; 0 for all.")]
_TopP = Annotated[float, typer.Option("--top-p", help="Sample among the likeliest that add up to p.")]
_MinP = Annotated[float, typer.Option("--min-p", help="Sample among those p times as likely as the likeliest.")]
_Penalty = Annotated[float, typer.Option("--repetition-penalty", help="Above 1: what was said becomes less likely.")]
_Seed = Annotated[int, typer.Option("--seed", help="Of sampling.")]


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
    model: Annotated[str | None, typer.Argument(hidden=True, metavar="MODEL")] = None,
    data: Annotated[list[Path] | None, _option("--data -d", "Rows: .jsonl, .json, .parquet; may be repeated.")] = None,
    eval_data: Annotated[list[Path] | None, _option("--eval-data", "Rows to evaluate on, every epoch.")] = None,
    config: Annotated[Path | None, _option("--config -c", "YAML file of settings; flags win over it.")] = None,
    output_dir: Annotated[str | None, _option("--output-dir -o", "Where everything goes.", _DEFAULT.output_dir)] = None,
    overwrite_output_dir: Annotated[
        bool | None, _option("--overwrite-output-dir", "Replace what an earlier run left there.")
    ] = None,
    resume: Annotated[bool | None, _option("--resume", "Continue from the newest checkpoint there.")] = None,
    max_length: Annotated[
        int | None, _option("--max-length", "Tokens that a row is cut to.", "the model's most")
    ] = None,
    packing: Annotated[
        bool | None, _option("--packing/--no-packing", "Several examples in one row.", _DEFAULT.packing)
    ] = None,
    learning_rate: Annotated[
        float | None, _option("--learning-rate --lr", "Peak learning rate of AdamW.", _DEFAULT.learning_rate)
    ] = None,
    num_train_epochs: Annotated[
        float | None, _option("--epochs", "Passes over the data.", _DEFAULT.num_train_epochs)
    ] = None,
    max_steps: Annotated[int | None, _option("--max-steps", "Optimizer steps, instead of epochs.")] = None,
    per_device_train_batch_size: Annotated[
        int | None, _option("--batch-size", "Rows at once.", _DEFAULT.per_device_train_batch_size)
    ] = None,
    gradient_accumulation_steps: Annotated[
        int | None, _option("--grad-accumulation", "Batches of a step.", _DEFAULT.gradient_accumulation_steps)
    ] = None,
    lr_scheduler_type: Annotated[
        str | None, _option("--scheduler", "linear, cosine, constant_with_warmup ...", _DEFAULT.lr_scheduler_type)
    ] = None,
    warmup_steps: Annotated[
        float | None, _option("--warmup-steps", "Steps; below 1 a share of all.", _DEFAULT.warmup_steps)
    ] = None,
    gradient_checkpointing: Annotated[
        str | None, _option("--gradient-checkpointing", "full, selective, none, offload or auto.", "full")
    ] = None,
    save_steps: Annotated[
        float | None, _option("--save-steps", "Steps between checkpoints.", int(_DEFAULT.save_steps))
    ] = None,
    seed: Annotated[int | None, _option("--seed", "Of data order and dropout.", _DEFAULT.seed)] = None,
    r: Annotated[int | None, _option("--r", "Rank of the adapter.", 16)] = None,
    lora_alpha: Annotated[float | None, _option("--alpha", "The adapter is scaled by alpha / r.", 16)] = None,
    lora_dropout: Annotated[float | None, _option("--dropout", "Probability; of the adapter's input.", 0.0)] = None,
    target_modules: Annotated[
        str | None, _option("--target-modules", "Names joined by commas, or a regex.", "all-linear")
    ] = None,
    use_rslora: Annotated[bool | None, _option("--use-rslora", "Scale by alpha / sqrt(r) instead.")] = None,
    load_in_4bit: _FourBit = None,
    offload_embedding: Annotated[
        bool | None, _option("--offload-embedding", "Keep the table in the host's memory; --offload-head: lm_head.")
    ] = None,
    offload_head: Annotated[bool | None, typer.Option("--offload-head", hidden=True)] = None,
    offload_layers: Annotated[
        bool | None, _option("--offload-layers", "Keep the layers' 4-bit weights in the host's memory.")
    ] = None,
    dtype: _Dtype = None,
    report_to: Annotated[str | None, _option("--report-to", "tensorboard, wandb or trackio.", "none")] = None,
    memory_limit: _Limit = None,
    mesh: Annotated[str | None, _option("--mesh", "Devices to share: auto, or data=2,fsdp=4.", "one")] = None,
    coordinator: Annotated[str | None, typer.Option(hidden=True)] = None,
    num_processes: Annotated[int | None, typer.Option(hidden=True)] = None,
    process_id: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Fine-tune an adapter of MODEL on rows of messages, prompt and completion, or text.

    \b
    lora-jax train ORG/MODEL --data train.jsonl --epochs 1 --output-dir my-run
    lora-jax train --config run.yaml --lr 1e-4   (names as below, SFTConfig's, LoraConfig's)
    srun lora-jax train --config run.yaml --mesh auto   (or mpirun, torchrun; by hand: docs/gpus.md)
    """
    # Repeatable options that were not given are empty, not None.
    flags = {k: v for k, v in context.params.items() if k != "config" and v not in (None, [], ())}
    if "target_modules" in flags:
        flags["target_modules"] = split_targets(flags["target_modules"])
    settings = read_settings(config) if config else Settings(Path(), {}, {})
    replaced = {"num_train_epochs": "max_steps", "max_length": "max_seq_length"}
    for name in flags:  # a flag replaces the other name in the file, too
        for old in {name, replaced.get(name, name)} & settings.keys():
            del settings[old], settings.lines[old]
    launch = {name: flags.pop(name, None) for name in ("coordinator", "num_processes", "process_id")}
    _train(settings | flags, settings, launch)


@contextlib.contextmanager
def _located(file: Settings) -> Iterator[None]:
    """Says in which lines of the YAML file the settings stand that an error inside is about."""
    try:
        yield
    except Exception as error:
        if not _is_for_user(error) or (where := file.where(str(error))) is None:
            raise
        raise UsageError(f"{where}: {error}") from None


def _limit(limit: str | None) -> None:
    """Limits what the process takes of the GPU; before JAX looks at it."""
    if limit is None:
        return
    from lora_jax.memory_limit import limit_memory

    try:
        limit_memory(limit)
    except (RuntimeError, ValueError) as error:
        text = str(error)
        raise UsageError(text if "memory_limit" in text else f"memory_limit={limit!r}: {text}") from None


def _train(settings: dict[str, Any], file: Settings, launch: dict[str, Any]) -> None:
    asked = {name: str(value) for name, value in settings.items()}
    own = {name: settings.pop(name, None) for name in OWN}
    lora_settings = {name: settings.pop(name) for name in LORA if settings.get(name) is not None}
    if own["model"] is None or not own["data"]:
        missing = "a MODEL" if own["model"] is None else "--data FILE"
        raise UsageError(f"train: {missing} is missing; give it on the command line or in --config (see --help)")
    if own["eval_data"]:
        settings.setdefault("eval_strategy", "epoch")
    with _located(file):
        args = sft_config(settings)
    folder = Path(args.output_dir)
    adapter = folder / "adapter_config.json"
    if adapter.exists() and not own["resume"] and not args.overwrite_output_dir:
        raise UsageError(
            f"{folder} holds the adapter of an earlier run; choose another --output-dir, continue with --resume, or "
            "replace it with --overwrite-output-dir"
        )
    with _located(file):
        _limit(own["memory_limit"])
    from lora_jax.distributed import agree, initialize, is_first, together

    several = initialize(**launch)  # before JAX looks at devices
    agree("settings", asked)
    if several and args.mesh is None:
        raise UsageError("train: there are several processes; give --mesh auto, or sizes such as data=2,fsdp=8")
    from lora_jax.step import use_compile_cache

    use_compile_cache()
    from lora_jax.data import load_rows
    from lora_jax.hf_checkpoint import read_json, resolve_folder
    from lora_jax.loading import from_pretrained
    from lora_jax.plan import refuse_what_cannot_fit
    from lora_jax.trainer import SFTTrainer

    with _located(file):
        peft_config = lora_config(lora_settings)
    with together("reading the data"):  # before the model, which takes longer
        rows = load_rows(files_of(own["data"]))
        eval_rows = load_rows(files_of(own["eval_data"])) if own["eval_data"] else None
    base: Any = {"load_in_4bit": own["load_in_4bit"] is not False, "dtype": own["dtype"]}
    base |= {name: bool(own[name]) for name in ("offload_embedding", "offload_head", "offload_layers")}
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
    if not is_first():
        return
    from lora_jax.reporting import write_report

    write_report(folder)  # once more, with the adapter
    print(f"Trained {output.global_step} steps, mean loss {output.training_loss:.4f}. The adapter is in {folder}")
    print(f"  see how it went:  {folder / 'report.md'}")
    print(f"  try it:           lora-jax chat {folder}")
    print(f"  export it:        lora-jax export {folder} --to gguf:q8_0 --out {folder}-export")


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


# ---- chat, generate -------------------------------------------------------------------------------------------------


@app.command(no_args_is_help=True)
def chat(
    source: _Source,
    system: _System = None,
    max_new_tokens: _NewTokens = 512,
    temperature: _Temperature = 0.0,
    top_k: _TopK = 0,
    top_p: _TopP = 1.0,
    min_p: _MinP = 0.0,
    repetition_penalty: _Penalty = 1.0,
    seed: _Seed = 0,
    load_in_4bit: _FourBit = None,
    dtype: _Dtype = None,
    memory_limit: _Limit = None,
) -> None:
    """Talk to a model; its answers appear word by word, and it remembers what was said.

    /new begins another conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer.

    \b
    Examples:
      lora-jax chat my-run
      lora-jax chat HuggingFaceTB/SmolLM2-135M-Instruct --system "Answer in one word."
    """
    sampling = _sampling("chat", temperature, top_k, top_p, min_p, repetition_penalty, seed)
    _limit(memory_limit)
    model, tokenizer = _load(source, load_in_4bit, dtype)
    if not tokenizer.chat_template:
        raise UsageError("chat: the tokenizer has no chat template; `lora-jax generate` continues plain text")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (lines can be edited, and earlier ones brought back)
    first = [{"role": "system", "content": system}] if system is not None else []
    messages = list(first)
    print("/new begins another conversation, /quit ends.")
    while (text := _ask()) not in ("/quit", "/exit", None):
        if text == "/new":
            messages = list(first)
        elif text:
            asked = [*messages, {"role": "user", "content": text}]
            ids = _prompt_ids(tokenizer, asked)
            if (room := model.config.max_position - len(ids)) < 1:
                print(f"The conversation has {len(ids)} tokens, and the model no position left: /new begins another.")
                continue
            answer = _stream(model, tokenizer, ids, max_new_tokens=min(max_new_tokens, room), **sampling)
            messages = [*asked, {"role": "assistant", "content": answer}]


def _ask() -> str | None:
    """A line of the user; None at the end."""
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None


@app.command(no_args_is_help=True)
def generate(
    source: _Source,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue; - reads standard input.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message: use the chat template.")
    ] = False,
    system: _System = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End after this text; may be repeated.")] = None,
    max_new_tokens: _NewTokens = 256,
    temperature: _Temperature = 0.0,
    top_k: _TopK = 0,
    top_p: _TopP = 1.0,
    min_p: _MinP = 0.0,
    repetition_penalty: _Penalty = 1.0,
    seed: _Seed = 0,
    load_in_4bit: _FourBit = None,
    dtype: _Dtype = None,
    memory_limit: _Limit = None,
) -> None:
    """Answer a prompt, word by word as it is made.

    \b
    Examples:
      lora-jax generate my-run --chat --prompt "Book a table for two"
      lora-jax generate my-run --chat --system "Answer in JSON." -p "Two coffees" --max-new-tokens 64
      lora-jax generate ./llama --prompt "Once upon a time" --temperature 0.8 --top-p 0.95
      cat letter.txt | lora-jax generate my-run --chat --prompt -
    """
    if system is not None and not chat:
        raise UsageError("generate: --system is part of a chat; add --chat")
    sampling = _sampling("generate", temperature, top_k, top_p, min_p, repetition_penalty, seed)
    text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
    _limit(memory_limit)
    model, tokenizer = _load(source, load_in_4bit, dtype)
    if chat and not tokenizer.chat_template:
        raise UsageError("generate: the tokenizer has no chat template; leave out --chat to continue plain text")
    messages = [{"role": "system", "content": system}] if system is not None else []
    asked = [*messages, {"role": "user", "content": text}] if chat else text
    ids = _prompt_ids(tokenizer, asked)
    _stream(model, tokenizer, ids, max_new_tokens=max_new_tokens, stop_strings=stop or None, **sampling)


def _sampling(
    command: str, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float, seed: int
) -> dict[str, Any]:
    """The arguments of `generate` that these options ask for."""
    options: dict[str, Any] = {"repetition_penalty": penalty}
    if temperature == 0:
        if top_k or top_p != 1 or min_p:
            raise UsageError(
                f"{command}: --top-k, --top-p and --min-p do nothing at temperature 0; add --temperature 0.8, say"
            )
        return options
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    return {**options, "do_sample": True, **sampling}


def _prompt_ids(tokenizer: Any, prompt: str | list[dict[str, Any]]) -> list[int]:
    from lora_jax.generation import prompt_ids

    return prompt_ids(tokenizer, prompt)


def _stream(model: "CausalLM", tokenizer: Any, ids: list[int], **options: Any) -> str:
    """Prints the answer as it is made, and returns it; Ctrl-C ends it early."""
    from transformers import TextStreamer

    from lora_jax.generation import stop_ids

    class Streamer(TextStreamer):
        shown = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.shown += text
            super().on_finalized_text(text, stream_end)

    streamer: Any = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    # What an adapter was trained to end with may be another token than that of the model's files.
    ends = [*stop_ids(model), *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
    options |= {"streamer": streamer, "tokenizer": tokenizer, "eos_token_id": list(dict.fromkeys(ends))}
    try:
        model.generate([ids], **options)
    except KeyboardInterrupt:
        streamer.end()
    return streamer.shown


# ---- export -------------------------------------------------------------------------------------------------------


@app.command(no_args_is_help=True)
def export(
    source: _Source,
    to: Annotated[list[str], typer.Option("--to", help="A target, see above; may be repeated.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder; every kind of target gets one in it.")],
    merge_base: Annotated[str, typer.Option(help="What is merged into: dequantized or original.")] = "dequantized",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace folders that exist.")] = False,
    answers: Annotated[
        bool,
        typer.Option("--answers/--no-answers", help="Compare answers to prompts, not tensors alone."),
    ] = True,
    push_to_hub: Annotated[
        str | None,
        typer.Option(help="ORGANISATION/NAME to upload to; -KIND is added to several.", show_default=False),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Repositories that are made are public.")] = False,
    imatrix: Annotated[
        Path | None,
        typer.Option(help="llama-imatrix' file, for GGUF types of fewer than 8 bits.", show_default=False),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Split GGUF files that are larger: 5GB.", show_default=False)
    ] = None,
    quantize_on: Annotated[
        str, typer.Option(help="Makes GGUF blocks: cpu (llama.cpp's bytes) or gpu (faster; few blocks differ).")
    ] = "cpu",
    load_in_4bit: _FourBit = None,
    dtype: _Dtype = None,
    memory_limit: _Limit = None,
) -> None:
    """Write a trained adapter for other programs, and check what was written.

    \b
    Targets:
      peft              the adapter alone, for PEFT, transformers and vLLM
      hf                base and adapter merged, a Hugging Face folder of 16-bit safetensors
      bnb-4bit          the same with linear layers in NF4, for transformers with bitsandbytes
      gguf:TYPE         base and adapter merged, one llama.cpp file: f32, f16, bf16, q8_0, q4_k_m ...
      gguf-lora[:TYPE]  the adapter alone for llama.cpp's --lora: f32 or f16
      ollama[:TYPE]     a folder for `ollama create`: GGUF file (q8_0 unless told), Modelfile
      ollama-lora       the same with base and adapter apart

    \b
    Examples:
      lora-jax export my-run --to gguf:q8_0 --out my-model
      lora-jax export my-run --to peft --to hf --to gguf:f16 --to gguf:q4_k_m --to ollama -o my-model
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
    if imatrix is not None and not imatrix.is_file():
        raise UsageError(f"export: --imatrix: {imatrix} is no file; make it with llama-imatrix")
    kinds = list(dict.fromkeys(target.kind for target in targets))
    for kind in kinds:
        if (out / kind).exists() and not overwrite:
            raise UsageError(f"export: {out / kind} exists; choose another --out, or replace it with --overwrite")
    _limit(memory_limit)
    device = _device(quantize_on)
    model, tokenizer = _load(source, load_in_4bit, dtype)
    options = {"imatrix": imatrix, "max_shard_size": max_shard_size, "device": device}
    write(model, tokenizer, targets, out, merge_base=merge_base, overwrite=overwrite, answers=answers, **options)
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


def _device(kind: str):
    """The device that makes GGUF blocks; None for the CPU."""
    if kind == "cpu":
        return None
    import jax

    if kind != "gpu" or jax.default_backend() != "gpu":
        raise UsageError(f"export: --quantize-on {kind}: wanted cpu, or gpu where JAX has one")
    return jax.devices()[0]


# ---- data ---------------------------------------------------------------------------------------------------------

data_app = typer.Typer(name="data", help="Look at training data.", **_PLAIN)
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
    gpu: Annotated[str | None, _option("--gpu", "A card (H100, RTX 4090 ...) or its memory (24GB).")] = None,
    gpus: Annotated[str | None, _option("--gpus", "Or several: 4x48GB, 8xH100, 2x8xH100 (two hosts).")] = None,
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
    offload_head: Annotated[bool, typer.Option("--offload-head", help="lm_head is kept there.")] = False,
    offload_layers: Annotated[
        bool, typer.Option("--offload-layers", help="The layers' 4-bit weights are kept there.")
    ] = False,
    quantized_activations: Annotated[
        bool, typer.Option("--quantized-activations", help="auto may keep tensors in 8 bits for backward.")
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
      lora-jax plan meta-llama/Llama-3.3-70B-Instruct --gpus 4x48GB --batch 1   (rows of each)

    Memory is an estimate, within 8 % of what the compiler needs where it was compared. Seconds are rougher.
    """
    from lora_jax.cards import card_of
    from lora_jax.hf_checkpoint import read_json, resolve_folder
    from lora_jax.plan import of_config

    settings: dict[str, Any] = {"r": rank}
    if target_modules is not None:
        settings["target_modules"] = split_targets(target_modules)
    if (gpu is None) == (gpus is None):
        raise UsageError("plan: give --gpu CARD for one GPU, or --gpus NxCARD for several")
    if quantized_activations and (gpus is not None or remat != "auto"):
        raise UsageError("plan: --quantized-activations is for --remat auto on one GPU")
    folder = resolve_folder(model, only_config=True)
    make = functools.partial(
        of_config,
        read_json(folder / "config.json"),
        lora_config(settings),
        batch,
        seq,
        accumulation=grad_accumulation,
        load_in_4bit=load_in_4bit,
        dtype=dtype,
        optim=optim,
        offload_embedding=offload_embedding,
        offload_head=offload_head,
        offload_layers=offload_layers,
    )
    what = f"{model} in {'NF4' if load_in_4bit else '16 bits'}, adapter of rank {rank}, {batch} x {seq} tokens"
    if gpu is not None:
        return _print_plan(what, make(), card_of(gpu), remat, quantized_activations)
    if remat != "auto":
        raise UsageError(f"plan: --remat {remat} is for one GPU; for several the fastest that fits is chosen")
    _print_meshes(what, lambda mesh: make(mesh=mesh), gpus or "")


def _print_meshes(what: str, make: "Callable[[Any], Workload]", gpus: str) -> None:
    """Raises MemoryError where no mesh fits, after the table of those there are."""
    from rich.console import Console
    from rich.table import Table

    from lora_jax.cards import GIB
    from lora_jax.scaling import NETWORK, NVLINK, PCIE, gpus_of, plan_meshes, step_seconds

    count, host, card = gpus_of(gpus)
    console = Console(highlight=False)
    plans = plan_meshes(make, card, count, host)
    table = Table(
        "mesh", "weights", "peak", "fits", "received", "alone", "NVLink", "PCIe", title="GiB, GB and ms a step"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for plan in plans:
        mesh = ",".join(f"{axis}={n}" for axis, n in plan.devices.items() if n > 1)
        sizes = (f"{plan.work.weights / GIB:.1f}", f"{plan.memory / GIB:.1f}", "yes" if plan.plan else "no")
        times = [
            f"{1e3 * a:,.0f}-{1e3 * b:,.0f}" for a, b in (step_seconds(plan, link, host) for link in (NVLINK, PCIE))
        ]
        table.add_row(mesh, *sizes, f"{plan.wire.total / 1e9:.2f}", f"{1e3 * plan.compute:,.0f}", *times)
    hosts = f", {-(-count // host)} hosts of {host}" if count > host else ""
    console.print(f"{what} each, on {count} x {card.name}{hosts}", markup=False)
    console.print(table)
    console.print(
        "received: by each GPU. alone: computing, nothing sent. Then with all sending hidden behind it, and with none: "
        f"{NVLINK.rate:g} GB/s over NVLink, {PCIE.rate:g} over PCIe, {NETWORK.rate:g} between hosts."
    )
    fitting = [plan for plan in plans if plan.plan is not None]
    if not fitting:
        least = min(plans, key=lambda plan: plan.memory)
        raise MemoryError(
            f"no mesh fits: the one that needs least takes {least.memory / GIB:.1f} GiB of each of {count} GPUs, of "
            f"{card.memory / GIB:.0f}. Take more GPUs, fewer or shorter rows, or --optim adamw_8bit"
        )
    for link in (NVLINK, PCIE):
        best = min(fitting, key=lambda plan, link=link: sum(step_seconds(plan, link, host)))
        mesh = ",".join(f"{axis}={n}" for axis, n in best.devices.items() if n > 1)
        slow, fast = (best.tokens / t for t in reversed(step_seconds(best, link, host)))
        console.print(
            f"Over {link.name}: --mesh {mesh}, {slow:,.0f} to {fast:,.0f} tokens/s, remat {best.plan}", markup=False
        )


def _print_plan(what: str, work: "Workload", card: "Card", remat: str, quantized_activations: bool) -> None:
    """Raises MemoryError where the plan does not fit, after the table of those that could be chosen."""
    from rich.console import Console

    from lora_jax.cards import GIB
    from lora_jax.plan import MEMORY_FRACTION, choose, explain, fits, largest, memory
    from lora_jax.remat import PRESETS, RematPlan

    console = Console(highlight=False)
    budget = int(MEMORY_FRACTION * card.memory)
    plans = dict(PRESETS)
    with contextlib.suppress(MemoryError):
        plans = {"auto": choose(work, card, budget, quantized_activations=quantized_activations), **plans}
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


# ---- bench, doctor ------------------------------------------------------------------------------------------------


@app.command(no_args_is_help=True)
def bench(
    model: Annotated[str, typer.Argument(help="Model folder, adapter or hub name.", metavar="MODEL")],
    batch: Annotated[int, typer.Option("--batch", help="Rows at once.", min=1)] = 2,
    seq: Annotated[int, typer.Option("--seq", help="Tokens of a row.", min=2)] = 2048,
    rank: Annotated[int, typer.Option("--rank", "--r", help="Of the adapter.", min=1)] = 16,
    remat: Annotated[str, typer.Option("--remat", help="full, selective, none, offload or auto.")] = "full",
    grad_accumulation: Annotated[int, typer.Option("--grad-accumulation", help="Batches of a step.", min=1)] = 1,
    optim: Annotated[str, typer.Option("--optim", help="As for train.")] = _DEFAULT.optim,
    steps: Annotated[int, typer.Option("--steps", help="Steps that are timed.", min=1)] = 10,
    load_in_4bit: _FourBit = None,
    offload_embedding: Annotated[
        bool, typer.Option("--offload-embedding", help="The embedding table is kept in the host's memory.")
    ] = False,
    offload_head: Annotated[bool, typer.Option("--offload-head", help="lm_head is kept there.")] = False,
    offload_layers: Annotated[
        bool, typer.Option("--offload-layers", help="The layers' 4-bit weights are kept there.")
    ] = False,
    dtype: _Dtype = None,
    memory_limit: _Limit = None,
) -> None:
    """Measure a training step of a model on this machine, on random tokens: time, tokens/s, memory.

    \b
    Examples:
      lora-jax bench meta-llama/Llama-3.1-8B --batch 2 --seq 2048
      lora-jax bench ./llama --batch 4 --seq 4096 --remat auto --memory-limit 24GB
    """
    _limit(memory_limit)
    from lora_jax.step import use_compile_cache

    use_compile_cache()
    import jax

    from lora_jax.bench import measure_step
    from lora_jax.cards import GIB
    from lora_jax.loading import from_pretrained
    from lora_jax.lora import get_peft_model

    base: Any = {"load_in_4bit": load_in_4bit is not False, "dtype": dtype}
    base |= {"offload_embedding": offload_embedding, "offload_head": offload_head, "offload_layers": offload_layers}
    loaded, _ = from_pretrained(_absolute(model), **base, max_seq_length=seq)
    if loaded.lora_config is None:
        get_peft_model(loaded, r=rank, verbose=False)
    shape: Any = {"batch": batch, "length": seq, "accumulation": grad_accumulation}
    times = measure_step(loaded, **shape, remat=remat, optim=optim, steps=steps)
    ms = sorted(1e3 * second for second in times.seconds)
    held = "NF4" if base["load_in_4bit"] else "16 bits"
    print(f"{model} in {held}, {grad_accumulation} x {batch} x {seq} tokens, on {jax.devices()[0].device_kind}")
    print(f"  step       {statistics.median(ms):,.1f} ms (median of {steps}; {ms[0]:,.1f} to {ms[-1]:,.1f})")
    print(f"  speed      {times.tokens_per_second:,.0f} tokens/s")
    print(f"  memory     {times.program_bytes / GIB:.2f} GiB by the compiler's count of the step")
    if times.peak_bytes is not None:
        print(f"             {times.peak_bytes / GIB:.2f} GiB at most, as the device saw it, loading included")
    print(f"  compiling  {times.compile_seconds:.1f} s")
    print(f"  backward   {remat}: {times.plan}")


@app.command()
def doctor(
    kernels: Annotated[
        bool, typer.Option("--kernels/--no-kernels", help="Run every kernel once and compare it with XLA.")
    ] = True,
) -> None:
    """Check GPU, driver, JAX, packages, memory and kernels, and say what to mend.

    The exit code is 1 if something is wrong. On a GPU the kernels take a minute to compile.
    """
    from rich.console import Console
    from rich.text import Text

    from lora_jax.doctor import check

    styles = {"ok": "green", "note": "yellow", "wrong": "bold red", "-": "dim"}
    console, counts = Console(highlight=False), dict.fromkeys(styles, 0)
    for finding in check(kernels=kernels):
        counts[finding.state] += 1
        state = Text(f"{finding.state:>5}", styles[finding.state])
        console.print(state, Text(f"{finding.what}: {finding.text}"), soft_wrap=True)
        if finding.fix:
            console.print(Text(f"      -> {finding.fix}", "bold"), soft_wrap=True)
    console.print(f"{counts['wrong']} wrong, {counts['note']} could be better, {counts['ok']} ok")
    if counts["wrong"]:
        raise typer.Exit(1)


# ---- shared ------------------------------------------------------------------------------------------------------


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
