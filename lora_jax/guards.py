"""What stops a training run: numbers that are not finite, parameters that do not train, signals, full memory."""

import signal
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_finite(step: int, metrics: Mapping[str, Any], hint: Callable[[], str] = str) -> None:
    """Raise FloatingPointError naming step and cause if a step's loss or gradient is not finite.

    Args:
        step: number of the step, from 1.
        metrics: what `train_step` returned, on the host.
        hint: gives what to say about state and remedy; called only if needed.
    """
    loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
    if np.isfinite(loss) and np.isfinite(norm):
        return
    causes = [] if np.isfinite(loss) else [f"the loss is {loss}"]
    bad = [where for where, value in _norms(metrics) if not np.isfinite(value)]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        causes.append(f"the gradient is not finite in {', '.join(bad[:3])}{more}")
    elif not np.isfinite(norm):
        causes.append(f"the norm of the gradient is {norm}, though that of each parameter is finite")
    raise FloatingPointError(f"Step {step}: {'; '.join(causes)}. {hint()}")


def _norms(metrics: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(readable place, gradient norm) of every leaf and layer."""
    found = []
    for name, value in metrics["leaf_grad_norms"].items():
        value = np.asarray(value)
        if value.ndim == 0:
            found.append((name, float(value)))
        else:
            found += [(f"{name} (layer {layer} of its stack)", float(norm)) for layer, norm in enumerate(value)]
    return found


class TrainableCheck:
    """Every trainable leaf must have a non-zero gradient as soon as it mathematically should.

    With y = x W + s (x A) B the gradient of A has B as a factor, and B starts at zero: A is due once B is not zero,
    which is from the second step on, or later if the learning rate starts at zero (warmup), or at once with an adapter
    that was trained before. Everything else is due at the first step.
    """

    def __init__(self) -> None:
        self._pending: set[str] | None = None  # places not yet seen to train

    @property
    def done(self) -> bool:
        """Whether every place has been seen to train."""
        return self._pending is not None and not self._pending

    def factors_live(self, lora: Any) -> jax.Array:
        """bool []: whether all B are non-zero, in the parameters that the step about to run starts from."""
        return _all_b_nonzero(lora)

    def check(self, step: int, metrics: Mapping[str, Any], factors_live: bool) -> None:
        """Raise RuntimeError naming the parameters that should have had a gradient in this step and had none."""
        norms = dict(_norms(metrics))
        if self._pending is None:
            self._pending = set(norms)
        due = {where for where in self._pending if "lora_a" not in where or factors_live}
        dead = sorted(where for where in due if norms[where] == 0.0)
        if dead:
            more = f" and {len(dead) - 5} more" if len(dead) > 5 else ""
            raise RuntimeError(
                f"Step {step}: {', '.join(dead[:5])}{more} got a gradient of exactly zero, of {len(norms)} trainable "
                "parameters. They would never train. Wanted: a gradient in every trainable parameter. Is the target "
                "module used by this model's forward pass, and is its input not all zero?"
            )
        self._pending -= due


@jax.jit
def _all_b_nonzero(lora: Any) -> jax.Array:
    leaves = jax.tree_util.tree_leaves_with_path(lora)
    factors = [leaf for path, leaf in leaves if "lora_b" in jax.tree_util.keystr(path)]
    return jnp.all(jnp.stack([jnp.any(b != 0) for b in factors])) if factors else jnp.asarray(True)


class StopSignals:
    """Within `with`, SIGTERM and the first SIGINT are only noted, so that the step can finish and be saved.

    Only the main thread can have signal handlers; elsewhere this does nothing. A second SIGINT interrupts at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    def leave(self) -> None:
        """End the program as the signal asks: KeyboardInterrupt for SIGINT, exit status 128 + 15 for SIGTERM."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise SystemExit(128 + self.received)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether JAX says that device memory did not suffice."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def explain_out_of_memory(
    shape: tuple[int, int, int], memory_needed: Callable[[int, int], int | None], limit: int | None
) -> str:
    """What did not fit, and the largest batch that would.

    Args:
        shape: [A, B, T] of the batch that did not fit.
        memory_needed: (A, B) -> bytes that the compiler says the step needs, None if it does not say.
        limit: bytes the device has for programs; None if unknown.
    """
    accumulation, rows, length = shape
    text = f"Out of device memory in a step with {rows} rows of {length} tokens per micro-batch."
    if limit is not None:
        text += f" The device has {limit / 2**30:.1f} GiB."
    advice = "a smaller max_length, gradient_checkpointing=True, or a 4-bit base (load_in_4bit=True)"
    smaller = rows // 2
    while smaller and limit is not None:
        micro = -(-accumulation * rows // smaller)
        needed = memory_needed(micro, smaller)
        if needed is None:
            break
        if needed <= limit:
            return (
                f"{text} per_device_train_batch_size={smaller} with gradient_accumulation_steps={micro} gives the same "
                f"result and needs about {needed / 2**30:.1f} GiB by the compiler's count. Otherwise: {advice}."
            )
        smaller //= 2
    if limit is not None and not smaller:
        return f"{text} Not even one row fits. Use {advice}."
    if rows > 1:
        halved = f"per_device_train_batch_size={rows // 2} with gradient_accumulation_steps={accumulation * 2}"
        return f"{text} Try {halved} (the same result), {advice}."
    return f"{text} Use {advice}."
