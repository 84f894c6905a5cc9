"""The training step as a pure function of arrays."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lora_jax.cards import this_card
from lora_jax.guards import is_out_of_memory
from lora_jax.kernels import parallel
from lora_jax.kernels.dispatch import compute_capability, default_platform, using
from lora_jax.kernels.loss.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy
from lora_jax.plan import Workload, budget_of, choose, memory, of_step, scans_layers
from lora_jax.remat import RematPlan
from lora_jax.sharding import hold_beside, on_all, over_devices, row_shards

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from lora_jax.model import CausalLM

__all__ = [
    "LossFunction",
    "ModelOutput",
    "PlannedStep",
    "bytes_held",
    "make_eval_step",
    "make_train_step",
    "sum_of_losses",
    "train_step",
]
__all__ += ["use_compile_cache"]

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class ModelOutput:
    """What a loss of one's own sees of the model."""

    logits: jax.Array  # float32 [B, T, V]

    def __getitem__(self, name: str) -> jax.Array:
        if name != "logits":
            raise KeyError(f"{name}: a model's output here has logits alone")
        return self.logits


class LossFunction(Protocol):
    """A loss in place of the cross-entropy, as transformers' `compute_loss_func`: differentiable, traced by `jax.jit`.

    It returns the share of one micro-batch in the loss of a step: those of all micro-batches, and of the rows on all
    devices, are added up. So a mean over label tokens is a sum over these divided by `num_items_in_batch`.
    """

    def __call__(self, outputs: ModelOutput, labels: jax.Array, *, num_items_in_batch: jax.Array) -> jax.Array:
        """The loss, float32 [].

        Args:
          outputs: of the model, with `logits` [B, T, V]: those at t are of the token at t + 1.
          labels: int32 [B, T], the token itself, or -100; not shifted.
          num_items_in_batch: float32 [], the number of labels that a token before them predicts, of the whole step.
        """
        ...


def sum_of_losses(
    graph: nnx.GraphDef,
    lora: nnx.State,
    frozen: nnx.State,
    batch: Batch,
    *,
    remat: str | RematPlan = "none",
    scan_layers: bool = True,
    dropout_key: jax.Array | None = None,
    router_aux_loss_coef: float | None = None,
    compute_loss_func: LossFunction | None = None,
    num_items_in_batch: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sum of the cross-entropies of a batch, in nats, and the number of its label tokens.

    With `router_aux_loss_coef` every label token's loss is its cross-entropy plus coefficient times `balancing_loss` of
    the batch, whose means are over the tokens that "attention_mask" counts (prompts too, pads not), of all rows and
    layers: packed or not, that is the same. So the mean over the label tokens of one batch is what transformers
    computes with `output_router_logits`; over several micro-batches each has its own `balancing_loss`, and the step
    takes the mean of these, weighted by their label tokens.

    Args:
      graph, lora, frozen: from `CausalLM.split`.
      batch: int32 [B, T] each: "input_ids"; "labels" (the token itself, or -100 for no loss; shifted in here);
        optional "positions" and "segment_start" for packed rows, see lora_jax.data; "inputs_embeds" [B, T, D] where
        the embedding table is offloaded, see `CausalLM.with_embeddings`; "attention_mask" (1, or 0 for pads), which is
        for `router_aux_loss_coef` alone: without it every token counts.
      remat: what backward recomputes: a preset or a plan, see `lora_jax.remat`.
      scan_layers: False to write all layers out: faster, and longer to compile.
      dropout_key: None for no dropout.
      router_aux_loss_coef: coefficient of the loss that keeps experts evenly loaded; None to leave it out.
      compute_loss_func: the sum is then this function's result times `num_items_in_batch`, so that what is made of it
        by dividing by the number of label tokens is the function's.
      num_items_in_batch: label tokens of the whole step, for that function; None for those of this batch.

    Raises:
      TypeError: `compute_loss_func` returns something else than a scalar.
      ValueError: the embedding table is offloaded and the batch has no "inputs_embeds", or `router_aux_loss_coef` is
        given for a model without experts.
      NotImplementedError: `router_aux_loss_coef` is given for experts that are chosen by sigmoids (DeepSeek V3).
    """
    model = nnx.merge(graph, lora, frozen)
    ids, labels, embeds = batch["input_ids"], batch["labels"], batch.get("inputs_embeds")
    embedding = model.embed_tokens
    if embedding.offloaded and embedding.trained is None and embeds is None:
        raise ValueError(
            "the embedding table is in the host's memory, and the batch has no inputs_embeds: pass "
            "model.with_embeddings(batch) to the step"
        )
    plan = RematPlan.of(remat)
    groups = plan.wrappers(model.config.num_layers)
    how: Any = dict(checkpoint=groups, scan=scan_layers, mlp_rows=plan.mlp_rows, dropout_key=dropout_key)
    how["inputs_embeds"] = embeds
    if router_aux_loss_coef is not None:
        how["counted"] = batch.get("attention_mask", jnp.ones_like(ids))
    named = {} if plan.flash_attention is None else {"flash_attention": plan.flash_attention}
    with using(**named):
        x, load = model(ids, batch.get("positions"), batch.get("segment_start"), **how)
    # The state at t predicts the token at t + 1; the first token of a packed document carries no label.
    targets = parallel.shifted(labels, IGNORE_INDEX)
    if compute_loss_func is None:
        loss, count = linear_cross_entropy(x.reshape(-1, x.shape[-1]), model.head(), targets.reshape(-1))
    else:
        count = jnp.sum(targets != IGNORE_INDEX, dtype=jnp.int32)
        items = _items(parallel.total(count)) if num_items_in_batch is None else num_items_in_batch
        outputs = ModelOutput(model.head().logits(x))
        loss = jnp.asarray(compute_loss_func(outputs, labels, num_items_in_batch=items), jnp.float32)
        if loss.shape != ():
            raise TypeError(f"compute_loss_func returned an array of shape {loss.shape}; wanted a scalar, of shape ()")
        loss *= items
    if router_aux_loss_coef is not None:
        loss += router_aux_loss_coef * parallel.total(load).balancing_loss() * count
    return loss, count


def _items(count: jax.Array) -> jax.Array:
    """The number of label tokens that losses are divided by."""
    return jnp.maximum(count, 1).astype(jnp.float32)


def train_step(
    lora: nnx.State,
    opt_state: optax.OptState,
    frozen: nnx.State,
    batch: Batch,
    *,
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    remat: str | RematPlan = "none",
    scan_layers: bool = True,
    dropout: bool = False,
    router_aux_loss_coef: float | None = None,
    compute_loss_func: LossFunction | None = None,
    mesh: "Mesh | None" = None,
) -> tuple[nnx.State, optax.OptState, dict[str, Any]]:
    """One optimizer step over A micro-batches; pure, so it can be jitted, differentiated or sharded.

    The loss is the mean over all label tokens of the step, so it and its gradient do not depend on how the rows are
    split into micro-batches.

    Args:
      lora, opt_state: trained leaves and the optimizer's state (donate them).
      frozen: the base model.
      batch: as in `sum_of_losses` with a leading axis, [A, B, T]; with dropout also "seed", uint32 [].
      graph: from `CausalLM.split`.
      optimizer: any optax transformation.
      remat: what backward recomputes: a preset or a plan, see `lora_jax.remat`.
      scan_layers: False to write all layers out: faster, and longer to compile.
      dropout: whether the adapters' dropout is on.
      router_aux_loss_coef: see `sum_of_losses`; None to leave that loss out.
      compute_loss_func: a loss in place of the cross-entropy, see `LossFunction`.
      mesh: of the devices that share the work, see `lora_jax.sharding`; None for one device.

    Returns:
      (lora, opt_state, metrics) with metrics "loss" (mean, nats), "grad_norm" (global, before any clipping),
      "num_label_tokens" and "leaf_grad_norms" (by path; one norm a layer for stacked leaves).
    """
    how: Any = dict(remat=remat, scan_layers=scan_layers, dropout=dropout, router_aux_loss_coef=router_aux_loss_coef)
    how["compute_loss_func"] = compute_loss_func
    gradients = functools.partial(_sum_of_gradients, graph, **how)
    if mesh is not None:
        gradients = over_devices(gradients, mesh, gradients=True)
    loss, count, grads = gradients(lora, frozen, batch)
    scale = 1 / _items(count)
    grads = jax.tree.map(lambda g: g * scale, grads)
    norms = _leaf_norms(grads)
    metrics = {
        "loss": loss * scale,
        "grad_norm": jnp.sqrt(sum(jnp.sum(n * n) for n in norms.values())),
        "num_label_tokens": count,
        "leaf_grad_norms": norms,
    }
    updates, opt_state = optimizer.update(grads, opt_state, lora)
    lora = optax.apply_updates(lora, updates)  # pyright: ignore[reportAssignmentType]
    if mesh is not None:
        lora, opt_state = hold_beside(lora, lora, mesh), hold_beside(opt_state, lora, mesh)
        metrics = on_all(metrics, mesh)
    return lora, opt_state, metrics


def _sum_of_gradients(
    graph: nnx.GraphDef,
    lora: nnx.State,
    frozen: nnx.State,
    batch: Batch,
    *,
    dropout: bool,
    remat: str | RematPlan,
    scan_layers: bool,
    router_aux_loss_coef: float | None,
    compute_loss_func: LossFunction | None,
) -> tuple[jax.Array, jax.Array, nnx.State]:
    """Sums over micro-batches [A, B, T]: (loss, number of label tokens, gradient by lora)."""
    key = parallel.place_key(jax.random.key(batch["seed"])) if dropout else None
    batch = {name: array for name, array in batch.items() if name != "seed"}
    own: dict[str, Any] = {}
    if compute_loss_func is not None:
        labels = batch["labels"].reshape(-1, batch["labels"].shape[-1])
        count = jnp.sum(parallel.shifted(labels, IGNORE_INDEX) != IGNORE_INDEX, dtype=jnp.int32)
        own = dict(compute_loss_func=compute_loss_func, num_items_in_batch=_items(parallel.total(count)))

    def micro_step(carry, micro):
        index, micro = micro
        micro_key = None if key is None else jax.random.fold_in(key, index)

        def loss_of(lora):
            how: Any = dict(remat=remat, scan_layers=scan_layers, dropout_key=micro_key, **own)
            return sum_of_losses(graph, lora, frozen, micro, router_aux_loss_coef=router_aux_loss_coef, **how)

        (loss, count), grads = jax.value_and_grad(loss_of, has_aux=True)(lora)
        return jax.tree.map(jnp.add, carry, (loss, count, grads)), None

    n_micro = batch["input_ids"].shape[0]
    start = (jnp.float32(0), jnp.int32(0), jax.tree.map(jnp.zeros_like, lora))
    if n_micro == 1:  # no loop: one micro-batch needs no second copy of the gradients
        (loss, count, grads), _ = micro_step(start, (jnp.int32(0), jax.tree.map(lambda x: x[0], batch)))
    else:
        (loss, count, grads), _ = jax.lax.scan(micro_step, start, (jnp.arange(n_micro), batch))
    return loss, count, grads


def make_train_step(
    model: "CausalLM",
    optimizer: optax.GradientTransformation,
    *,
    remat: str | RematPlan | Sequence[Mapping[str, Any]] = "full",
    memory_budget: str | int | None = None,
    quantized_activations: bool = False,
    scan_layers: bool | None = None,
    router_aux_loss_coef: float | None = None,
    compute_loss_func: LossFunction | None = None,
) -> Callable:
    """`train_step` jitted for one model: step(lora, opt_state, frozen, batch) -> (lora, opt_state, metrics).

    lora and opt_state are donated: use what is returned, not what was passed.

    Args:
      model: with an adapter.
      optimizer: any optax transformation; `opt_state = optimizer.init(lora)`.
      remat: what backward recomputes: a preset or a plan, see `lora_jax.remat`; "auto" chooses the fastest plan that
        fits, for each shape of batch (see `PlannedStep`).
      memory_budget: for "auto", what the step may take of the device: bytes, or text such as "20GB"; None for all that
        JAX may take.
      quantized_activations: for "auto", whether tensors may be kept for backward in 8 bits where that makes the step
        faster. The loss stays as it is, gradients are a little off.
      scan_layers: True for a loop over the layers in the compiled program, False to write them all out, which spares
        the copies into and out of the loop's arrays (5 to 7 % of an 8B step on an H100) and takes twice as long to
        compile; None to write them out on a GPU unless there are many layers, or parts of feed-forward
        layers (`mlp_rows`). Layers whose weights are in the host's memory are always written out.
      router_aux_loss_coef: coefficient of the loss that keeps experts evenly loaded, see `sum_of_losses`; None to leave
        it out.
      compute_loss_func: a loss in place of the cross-entropy, see `LossFunction`; it needs the logits of all tokens of
        a micro-batch.

    Raises:
      ValueError: no such preset, a plan for another number of layers, or "auto" on a device that does not say how much
        memory it has, without a budget.
    """
    if remat == "auto":
        how = scan_layers, quantized_activations, router_aux_loss_coef, compute_loss_func
        return PlannedStep(model, optimizer, budget_of(memory_budget), *how)
    if memory_budget is not None:
        raise ValueError(f'memory_budget={memory_budget!r} is for remat="auto", got remat={remat!r}')
    if quantized_activations:
        raise ValueError(f'quantized_activations is for remat="auto"; got remat={remat!r}, which says what to quantise')
    plan = RematPlan.of(remat)
    plan.resolve(model.config.num_layers)
    return _jitted(model, optimizer, plan, scan_layers, router_aux_loss_coef, compute_loss_func)


def _jitted(
    model: "CausalLM",
    optimizer: optax.GradientTransformation,
    plan: RematPlan,
    scan_layers: bool | None,
    router_aux_loss_coef: float | None,
    compute_loss_func: LossFunction | None,
) -> Any:
    _check_rows_alone(model, compute_loss_func)
    graph, _, _ = model.split()
    dropout = model.lora_config is not None and model.lora_config.lora_dropout > 0
    scans = scans_layers(plan, model.config.num_layers, model.streams_layers) if scan_layers is None else scan_layers

    def step(lora, opt_state, frozen, batch):
        how: Any = dict(remat=plan, scan_layers=scans, dropout=dropout, router_aux_loss_coef=router_aux_loss_coef)
        how |= {"compute_loss_func": compute_loss_func, "mesh": model.mesh}
        return train_step(lora, opt_state, frozen, batch, graph=graph, optimizer=optimizer, **how)

    return jax.jit(step, donate_argnums=(0, 1), compiler_options=_compiler_options(plan, model))


def _compiler_options(plan: RematPlan, model: "CausalLM") -> dict[str, Any] | None:
    if default_platform() != "gpu":
        return None
    # Matmuls by cuBLAS alone: a step of 8B is 1.2 % faster than with those that XLA would write in Triton, and compiles
    # in less time.
    options: dict[str, Any] = {"xla_gpu_enable_triton_gemm": False}
    copies = max(list(dict(actions).values()).count("offload") for _, actions in plan.groups)
    copies += model.streams_layers
    if copies > 2:  # which is how many XLA has under way at a time if nobody says; the step would wait for the others
        options["xla_gpu_experimental_parallel_async_compute_limit"] = 4
    if model.mesh is not None and model.mesh.shape["fsdp"] > 1:  # one gather a layer, where 30 MB make several
        options["xla_gpu_all_gather_combine_threshold_bytes"] = 2**30
        # A gather begins when it may, a whole layer ahead. XLA would begin it one matmul ahead: it takes NVLink for
        # faster than it is, and a gather's kernel only begins when a matmul that fills the GPU has ended. With a limit
        # of one collective at a time it would not begin early.
        options["xla_gpu_experimental_collective_start_as_early_as_possible"] = True
        options["xla_gpu_experimental_parallel_collective_overlap_limit"] = 2
        if compute_capability() == "9.0":  # where it was measured: 273.6 -> 268.2 ms for a step of four H100s
            options["xla_gpu_experimental_enable_nccl_symmetric_buffers"] = True
    return options


class PlannedStep:
    """`train_step` with the fastest rematerialisation that fits, chosen and compiled for each shape of batch.

    The choice is made by `lora_jax.plan` and checked against what the compiler counts; where that is more than the
    budget, a plan that needs less is compiled.

    Attributes:
      plans: by shape of batch [A, B, T], the plan that was chosen.
    """

    def __init__(
        self,
        model: "CausalLM",
        optimizer: optax.GradientTransformation,
        budget: int,
        scan_layers: bool | None = None,
        quantized_activations: bool = False,
        router_aux_loss_coef: float | None = None,
        compute_loss_func: LossFunction | None = None,
    ):
        self.plans: dict[tuple[int, ...], RematPlan] = {}
        self._losses = router_aux_loss_coef, compute_loss_func
        self._scan_layers, self._quantized_activations = scan_layers, quantized_activations
        # Half a percent is for what lives beside the step: the next batch, metrics.
        self._model, self._optimizer, self._budget, self._compiled = model, optimizer, int(0.995 * budget), {}

    def __call__(self, lora, opt_state, frozen, batch):
        """Takes a step; see `make_train_step`."""
        return self.compile(lora, opt_state, frozen, batch)(lora, opt_state, frozen, batch)

    def compile(self, lora, opt_state, frozen, batch) -> Any:
        """The compiled program for such arguments.

        Raises:
          MemoryError: no plan fits; says what would.
        """
        shapes = tuple((name, array.shape) for name, array in sorted(batch.items()))
        if shapes not in self._compiled:
            work = of_step(self._model, lora, opt_state, frozen, batch)
            work = dataclasses.replace(
                work, scan_layers=bool(self._scan_layers), whole_logits=self._losses[1] is not None
            )
            if (mesh := self._model.mesh) is not None:  # what one device has of it
                *_, rows, length = batch["input_ids"].shape
                work = dataclasses.replace(work, batch=rows // row_shards(mesh), length=length // mesh.shape["context"])
            plan, self._compiled[shapes] = self._fit(work, (lora, opt_state, frozen, batch))
            self.plans[batch["input_ids"].shape] = plan
        return self._compiled[shapes]

    def _fit(self, work: Workload, arguments: tuple) -> tuple[RematPlan, Any]:
        card, target, more = this_card(), self._budget, ""
        while True:
            try:
                plan = choose(work, card, target, quantized_activations=self._quantized_activations)
            except MemoryError as error:
                raise MemoryError(f"{error}{more}") from None
            step = _jitted(self._model, self._optimizer, plan, self._scan_layers, *self._losses)
            compiled = step.lower(*arguments).compile()
            temporary = compiled.memory_analysis().temp_size_in_bytes
            if (excess := bytes_held(compiled) - self._budget) > 0:
                more = f" (The compiler counted {excess / 2**30:.2f} GiB too much for remat={str(plan)!r}.)"
            elif (excess := temporary - largest_piece(arguments, temporary)) > 0:
                more = (
                    f" (What is free of the device lies in pieces that are {excess / 2**30:.2f} GiB too small for "
                    f"remat={str(plan)!r}: delete other arrays, or offload when loading and not afterwards.)"
                )
            else:
                return plan, compiled
            target = memory(work, plan, card).total - excess  # below it, so the next plan is another


def use_compile_cache() -> None:
    """Keeps compiled programs on disk: where JAX is told to, else in the user's cache folder.

    Call it before anything is compiled.
    """
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        parent = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(parent / "lora-jax" / "jax"))


def largest_piece(arguments: Any, wanted: int) -> int:
    """Bytes, up to `wanted`, that a GPU has free in one piece beside these arguments.

    A program takes its temporary arrays as one piece; what others have left may lie between arrays that are still
    there. JAX does not say how memory is cut up, so that this tries. `wanted` where that is not known: for arguments
    that are on no GPU or not there yet, and with several processes, which must not come to different results.
    """
    leaves = jax.tree.leaves(arguments)
    platforms = {device.platform for leaf in leaves if isinstance(leaf, jax.Array) for device in leaf.devices()}
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    if "gpu" not in platforms or abstract or jax.process_count() > 1 or _is_free(wanted):
        return wanted
    low, high = 0, wanted
    while high - low > wanted // 64:
        middle = (low + high) // 2
        low, high = (middle, high) if _is_free(middle) else (low, middle)
    return low


def _is_free(size: int) -> bool:
    """Whether the first device has about so many bytes in one piece."""
    try:
        jax.block_until_ready(jnp.zeros((size >> 20, 1 << 20), jnp.uint8))
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def bytes_held(compiled: Any) -> int:
    """Peak of a compiled program on one device by the compiler's count: arguments, results and temporary arrays."""
    stats = compiled.memory_analysis()
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return held + stats.temp_size_in_bytes


def _check_rows_alone(model: "CausalLM", compute_loss_func: LossFunction | None) -> None:
    """A loss of one's own sees whole rows and the whole vocabulary."""
    sizes = {} if compute_loss_func is None or model.mesh is None else dict(model.mesh.shape)
    if shared := [axis for axis, size in sizes.items() if size > 1 and axis != "data"]:
        raise NotImplementedError(
            f"compute_loss_func is not implemented for a mesh with {shared[0]}={sizes[shared[0]]}: it would see a part "
            "of the logits. Use the data axis alone."
        )


def make_eval_step(model: "CausalLM", compute_loss_func: LossFunction | None = None) -> Callable:
    """Jitted eval_step(lora, frozen, batch [B, T]) -> {"loss_sum": float32 [], "num_label_tokens": int32 []}."""
    _check_rows_alone(model, compute_loss_func)
    graph, _, _ = model.split()

    losses = functools.partial(sum_of_losses, graph, compute_loss_func=compute_loss_func)
    if model.mesh is not None:
        losses = over_devices(losses, model.mesh, gradients=False)

    def step(lora, frozen, batch):
        loss, count = losses(lora, frozen, batch)
        return {"loss_sum": loss, "num_label_tokens": count}

    return jax.jit(step)


def _leaf_norms(tree: nnx.State) -> dict[str, jax.Array]:
    """Norm of every leaf: one number, or one for each layer of a stacked leaf ("layers" in its path)."""
    norms = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [str(getattr(part, "key", getattr(part, "idx", part))) for part in path if str(part) != ".value"]
        axes = tuple(range(1 if names[0] == "layers" else 0, leaf.ndim))
        norms[".".join(names)] = jnp.sqrt(jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=axes))
    return norms
