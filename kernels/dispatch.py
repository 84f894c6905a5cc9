"""Which implementation of an op runs: the only file of the project that asks what the devices are."""

import contextlib
import contextvars
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax

__all__ = [
    "compute_capability",
    "default_platform",
    "interpret",
    "named",
    "on_gpu",
    "resolve",
    "sm_count",
    "tuning",
    "tuning_file",
    "unsupported",
    "using",
    "why_not_hopper",
]


Reason = str | Callable[[], str | None] | None  # why an implementation cannot do a call


@functools.cache
def default_platform() -> str:
    """Platform of the devices that jitted functions run on: "cpu" or "gpu". Starts the JAX backend."""
    return jax.default_backend()


def interpret() -> bool:
    """Whether Pallas kernels run in interpret mode: slow, on any device, for tests. True without a GPU."""
    return default_platform() != "gpu"


def compute_capability() -> str | None:
    """Of the first device: "9.0" for Hopper. None if it has none."""
    return getattr(jax.devices()[0], "compute_capability", None)


def why_not_hopper() -> str | None:
    """The reason why a kernel for Hopper's instructions cannot run here, or None if it can."""
    if default_platform() != "gpu":
        return f"it needs an NVIDIA GPU of the Hopper family, JAX runs on {default_platform()}"
    if (capability := compute_capability()) != "9.0":
        return f"it needs a GPU of the Hopper family (compute capability 9.0), this one has {capability}"
    return None


def sm_count() -> int:
    """Streaming multiprocessors of the device that is compiled for; those of an H100 where none is known."""
    target = jax.sharding.get_abstract_mesh().abstract_device
    cores = None if target is None else target.num_cores
    return cores or getattr(jax.devices()[0], "core_count", 132)


def on_gpu(*names: str) -> tuple[str, ...]:
    """A preference for `resolve`: these implementations and then XLA on a GPU, XLA alone elsewhere."""
    return (*names, "xla") if default_platform() == "gpu" else ("xla",)


def tuning_file() -> Path:
    """Where `lora_jax.tools.tune_kernels` keeps what it measured on this machine: $LORA_JAX_TUNING, or in ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("LORA_JAX_TUNING") or f"{cache}/lora-jax/tuning.json").expanduser()


@functools.cache
def tuning(op: str) -> tuple[dict[str, Any], ...]:
    """What was measured of an op on GPUs of this name: the user's own measurements, else those that come with us.

    Returns:
      One dict for each measured shape, as the op's module reads it; () if nothing was measured.

    Raises:
      ValueError: the user's file cannot be read as JSON of this form.
    """
    if default_platform() != "gpu":
        return ()
    gpu = jax.devices()[0].device_kind
    for path in (tuning_file(), Path(__file__).with_name("tuning.json")):
        if not path.is_file():
            continue
        try:
            shapes = json.loads(path.read_text()).get(gpu, {}).get(op)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not a table of tunings ({error}): delete it, or measure again") from error
        if shapes:
            return tuple(shapes)
    return ()


_USING: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar("implementations", default=None)


@contextlib.contextmanager
def using(**implementations: str) -> Iterator[None]:
    """Names the implementation of ops for calls that leave it open: `with using(flash_attention="triton"): ...`.

    It acts while a function is traced: compile inside the context, with a function that was not compiled before.
    """
    token = _USING.set({**(_USING.get() or {}), **implementations})
    try:
        yield
    finally:
        _USING.reset(token)


def named(op: str) -> str | None:
    """The implementation that `using` names for an op, if it does."""
    return (_USING.get() or {}).get(op)


def resolve(op: str, implementation: str | None, supported: Mapping[str, Reason], preference: tuple[str, ...]) -> str:
    """Chooses the implementation of an op.

    Args:
      op: name of the op, for messages.
      implementation: the name asked for, or None to choose (or to take the one that `using` names).
      supported: every known name, with None if it can do this call or the reason why it cannot, or with a function
        that returns the one or the other and is called only if the name comes into question.
      preference: names in the order they should be tried when `implementation` is None.

    Raises:
      ValueError: `implementation` is no known name.
      NotImplementedError: the named implementation cannot do this call; the message says why.
    """
    implementation = implementation or named(op)
    if implementation is not None:
        if implementation not in supported:
            raise ValueError(f"{op}: implementation={implementation!r} is unknown; known are {', '.join(supported)}")
        if (reason := _reason(supported[implementation])) is not None:
            unsupported(op, implementation, reason)
        return implementation
    return next(name for name in preference if _reason(supported[name]) is None)


def _reason(given: Reason) -> str | None:
    return given() if callable(given) else given


def unsupported(op: str, implementation: str, reason: str) -> NoReturn:
    """Raises the NotImplementedError that a named implementation owes to a call it cannot do."""
    raise NotImplementedError(f"{op}: implementation={implementation!r} cannot do this call: {reason}")
