"""Which implementation of an op runs: the only file of the project that asks what the devices are."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import NoReturn

import jax

__all__ = ["default_platform", "interpret", "resolve", "unsupported", "using"]


@functools.cache
def default_platform() -> str:
    """Platform of the devices that jitted functions run on: "cpu" or "gpu". Starts the JAX backend."""
    return jax.default_backend()


def interpret() -> bool:
    """Whether Pallas kernels run in interpret mode: slow, on any device, for tests. True without a GPU."""
    return default_platform() != "gpu"


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


def resolve(op: str, implementation: str | None, supported: dict[str, str | None], preference: tuple[str, ...]) -> str:
    """Chooses the implementation of an op.

    Args:
      op: name of the op, for messages.
      implementation: the name asked for, or None to choose (or to take the one that `using` names).
      supported: every known name, with None if it can do this call or the reason why it cannot.
      preference: names in the order they should be tried when `implementation` is None.

    Raises:
      ValueError: `implementation` is no known name.
      NotImplementedError: the named implementation cannot do this call; the message says why.
    """
    implementation = implementation or (_USING.get() or {}).get(op)
    if implementation is not None:
        if implementation not in supported:
            raise ValueError(f"{op}: implementation={implementation!r} is unknown; known are {', '.join(supported)}")
        if (reason := supported[implementation]) is not None:
            unsupported(op, implementation, reason)
        return implementation
    return next(name for name in preference if supported[name] is None)


def unsupported(op: str, implementation: str, reason: str) -> NoReturn:
    """Raises the NotImplementedError that a named implementation owes to a call it cannot do."""
    raise NotImplementedError(f"{op}: implementation={implementation!r} cannot do this call: {reason}")
