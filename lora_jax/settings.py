"""The settings of a run as the command line has them: from flags and YAML files, kept in the run's folder."""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_jax.config import _ALIASES, _NO_EFFECT, _REFUSED, SFTConfig

if TYPE_CHECKING:
    from lora_jax.lora import LoraConfig

__all__ = ["LORA", "OWN", "Settings", "UsageError", "files_of", "lora_config", "read_settings", "sft_config"]
__all__ += ["split_targets", "write_settings"]

# Short names of settings, for flags and YAML files alike.
_SHORT = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "grad_accumulation": "gradient_accumulation_steps",
    "scheduler": "lr_scheduler_type",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
}
# Settings that are neither SFTConfig's nor LoraConfig's, and LoraConfig's.
OWN = (
    "model",
    "data",
    "eval_data",
    "load_in_4bit",
    "offload_embedding",
    "offload_head",
    "offload_layers",
    "dtype",
    "resume",
    "memory_limit",
)
LORA = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")
LORA += ("layers_to_transform", "modules_to_save", "random_state", "use_dora", "init_lora_weights")
LORA += ("rank_pattern", "alpha_pattern", "layers_pattern", "loftq_config")
_FIELDS = tuple(field.name for field in dataclasses.fields(SFTConfig))


class UsageError(ValueError):
    """Something the user asked for that cannot be done."""


class Settings(dict[str, Any]):
    """Settings by their full names, which know where they stand in a file."""

    def __init__(self, path: Path, values: Mapping[str, Any], lines: Mapping[str, int]):
        super().__init__(values)
        self.path, self.lines = path, dict(lines)

    def where(self, message: str) -> str | None:
        """File and lines of the settings that a message is about; None if it names none of them."""
        found = sorted(line for name, line in self.lines.items() if re.search(rf"(?<!\w){name}(?!\w)", message))
        return _at(self.path, found) if found else None


def _at(path: Path, lines: list[int]) -> str:
    return f"{path}, line{'s' * (len(lines) > 1)} {' and '.join(map(str, lines))}"


def read_settings(path: Path) -> Settings:
    """The settings of a YAML file under their full names. Raises UsageError, with the line, for what is not one."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        content, tree = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise UsageError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, Mapping) or not isinstance(tree, yaml.MappingNode):
        raise UsageError(f"{path} holds {type(content).__name__}; wanted lines of `name: value`")
    known = {*OWN, *LORA, *_FIELDS, *_ALIASES, *_SHORT}
    settings: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for node, _ in tree.value:
        key, line = str(node.value), node.start_mark.line + 1
        name = key.replace("-", "_")
        if name not in known | set(_NO_EFFECT) | set(_REFUSED):
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"valid names: {', '.join(sorted(known))}"
            raise UsageError(f"{_at(path, [line])}: unknown setting {key!r}; {hint}")
        name = _SHORT.get(name, name)
        if name in settings:
            raise UsageError(f"{_at(path, [lines[name], line])}: {name} is set twice (once as {key!r}); give it once")
        settings[name], lines[name] = content[key], line
    if isinstance(settings.get("target_modules"), str):
        settings["target_modules"] = split_targets(settings["target_modules"])
    return Settings(path, settings, lines)


def write_settings(path: Path, settings: dict[str, Any]) -> None:
    """Writes the settings that were made, with full paths, so that `read_settings` gives the same run again."""
    import yaml

    from lora_jax.reporting import write_aside

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    once = ("resume", "overwrite_output_dir")  # asked for one run, not for the next
    kept = {k: plain(v) for k, v in settings.items() if v not in (None, [], ()) and k not in once}
    kept |= {k: [str(f.absolute()) for f in files_of(kept[k])] for k in ("data", "eval_data") if k in kept}
    write_aside(path, yaml.safe_dump(kept, sort_keys=False, allow_unicode=True).encode())


def sft_config(settings: dict[str, Any]) -> SFTConfig:
    """SFTConfig of settings; a value of a wrong type is a UsageError too."""
    try:
        return SFTConfig.from_dict(settings)
    except TypeError as error:
        raise UsageError(str(error)) from None


def lora_config(settings: dict[str, Any]) -> "LoraConfig":
    """LoraConfig of settings; a value of a wrong type is a UsageError too."""
    from lora_jax.lora import LoraConfig

    values: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    try:
        return LoraConfig(**values)
    except TypeError as error:
        raise UsageError(f"the adapter's settings {settings} hold a value of a wrong type: {error}") from None


def split_targets(text: str) -> str | list[str]:
    """Names joined by commas as a list; "all-linear" and regular expressions as they are."""
    names = [name.strip() for name in text.split(",")]
    return names if all(re.fullmatch(r"[\w.]+", name) for name in names) else text


def files_of(value: Any) -> list[Path]:
    """One file name or several as paths."""
    return [Path(v).expanduser() for v in (value if isinstance(value, list | tuple) else [value])]
