"""Loading under transformers' names: `AutoModelForCausalLM`, and a class for each architecture.

The classes of architectures are made of `models.registry.ARCHITECTURES` when they are asked for. They only load: what
they return is a `CausalLM` in every case, as from `lora_jax.from_pretrained`, since one decoder runs all architectures.
"""

from pathlib import Path
from typing import Any, ClassVar, NoReturn

from lora_jax.loading import from_pretrained, load
from lora_jax.model import CausalLM
from lora_jax.models.registry import ARCHITECTURES

__all__ = ["AutoModelForCausalLM"]


class AutoModelForCausalLM:
    """Loads a causal language model of any architecture that is implemented, and no tokenizer."""

    architecture: ClassVar[str | None] = None
    """`architectures[0]` of the config.json of all models that this class loads; None for any."""

    def __init__(self) -> NoReturn:
        name = type(self).__name__
        raise TypeError(f"{name} has no instances: {name}.from_pretrained(folder) returns a lora_jax.CausalLM")

    @classmethod
    def from_pretrained(cls, model_name: str | Path, **options: Any) -> CausalLM:
        """The model that `lora_jax.from_pretrained` returns, without its tokenizer, which need not be there.

        Args:
          model_name: local folder, hub id, or a folder with a PEFT adapter (whose base model is loaded too).
          options: those of `lora_jax.from_pretrained`, with the same defaults (`load_in_4bit=True` among them).

        Raises:
          ValueError: the model is of another architecture than this class's.
          As `lora_jax.from_pretrained` besides.
        """
        if unknown := sorted(set(options) - set(_DEFAULTS)):
            raise TypeError(
                f"{cls.__name__}.from_pretrained has no option {unknown[0]!r}; it has those of "
                f"lora_jax.from_pretrained: {', '.join(_DEFAULTS)}"
            )
        options = {**_DEFAULTS, **options}
        return load(model_name, architecture=cls.architecture, with_tokenizer=False, **options)[0]


_DEFAULTS: dict[str, Any] = from_pretrained.__kwdefaults__ or {}


def __getattr__(name: str) -> type[AutoModelForCausalLM]:
    if name not in ARCHITECTURES:
        raise AttributeError(f"module 'lora_jax.auto' has no attribute {name!r}")
    doc = f"Loads a `{name}`, refusing every other architecture, and no tokenizer."
    made = type(name, (AutoModelForCausalLM,), {"__doc__": doc, "__module__": __name__, "architecture": name})
    globals()[name] = made  # the next access finds the same class
    return made
