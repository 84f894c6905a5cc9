"""`lora-jax bench`: how fast a model trains on this machine, and what it takes of the device."""

import dataclasses
import statistics
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_jax.model import CausalLM

__all__ = ["StepTimes", "measure_step"]


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """What steps of one shape took."""

    tokens: int  # of a step, all of them real
    seconds: tuple[float, ...]  # of each measured step
    compile_seconds: float
    plan: str  # what backward recomputes
    program_bytes: int  # peak of the compiled program, by the compiler's count
    peak_bytes: int | None  # peak that the device's allocator saw, loading included; None if it does not say
    losses: tuple[float, ...]  # of the same batch, step by step

    @property
    def tokens_per_second(self) -> float:
        """By the median step."""
        return self.tokens / statistics.median(self.seconds)


def measure_step(
    model: "CausalLM",
    *,
    batch: int,
    length: int,
    accumulation: int = 1,
    remat: str = "full",
    optim: str = "adamw_torch",
    memory_budget: str | int | None = None,
    steps: int = 10,
    warmup: int = 2,
) -> StepTimes:
    """Trains a model on one batch of random tokens and times every step, waiting for each.

    The adapter is changed by that. In training a step is sent before the last one has ended, so the numbers here are
    on the careful side where steps are short.

    Args:
      model: with an adapter.
      batch, length: rows of a micro-batch, tokens of a row.
      accumulation: micro-batches of a step.
      remat: what backward recomputes, as `gradient_checkpointing` of SFTConfig.
      optim: as in SFTConfig.
      memory_budget: for remat="auto", as in SFTConfig.
      steps: steps that are timed.
      warmup: steps before them.

    Raises:
      ValueError: a setting out of range.
      MemoryError: "auto" finds no plan that fits.
    """
    import jax
    import numpy as np

    from lora_jax.config import SFTConfig
    from lora_jax.optim import keep_on_host, make_optimizer
    from lora_jax.remat import RematPlan
    from lora_jax.reporting import device_memory
    from lora_jax.step import PlannedStep, bytes_held, make_train_step

    if min(batch, accumulation, steps) < 1 or length < 2 or warmup < 0:
        raise ValueError(
            "measure_step wants batch, accumulation and steps of at least 1, length of at least 2 and warmup of at "
            f"least 0; got {batch}, {accumulation}, {steps}, {length}, {warmup}"
        )
    if length > model.config.max_position:
        raise ValueError(f"length={length} exceeds the model's {model.config.max_position} positions")
    # A millionth of the usual rate: the loss of repeated random tokens stays where it is.
    args = SFTConfig(learning_rate=2e-10, optim=optim)
    optimizer, _ = make_optimizer(args, warmup + steps)
    optimizer = keep_on_host(optimizer) if args.optim_is_paged else optimizer
    step: Any = make_train_step(model, optimizer, remat=remat, memory_budget=memory_budget)
    _, lora, frozen = model.split()
    opt_state = optimizer.init(lora)
    shape = (accumulation, batch, length)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, shape, dtype=np.int32)
    data = model.with_embeddings({"input_ids": ids, "labels": ids, "seed": np.uint32(0)})
    began = time.perf_counter()
    arguments = (lora, opt_state, frozen, data)
    planned = isinstance(step, PlannedStep)
    compiled = step.compile(*arguments) if planned else step.lower(*arguments).compile()
    compile_seconds = time.perf_counter() - began
    seconds, losses = [], []
    for _ in range(warmup + steps):
        began = time.perf_counter()
        lora, opt_state, metrics = compiled(lora, opt_state, frozen, data)
        losses.append(float(jax.device_get(metrics["loss"])))
        seconds.append(time.perf_counter() - began)
    model.update_lora(lora)  # what it held was donated
    memory = device_memory()
    return StepTimes(
        tokens=ids.size,
        seconds=tuple(seconds[warmup:]),
        compile_seconds=compile_seconds,
        plan=str(step.plans[shape] if planned else RematPlan.of(remat)),
        program_bytes=bytes_held(compiled),
        peak_bytes=None if memory is None else memory["peak_bytes_in_use"],
        losses=tuple(losses[warmup:]),
    )
