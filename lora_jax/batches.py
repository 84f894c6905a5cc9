"""Batches of static shape from tokenised examples, padded or packed, in an order that can be entered at any step.

    batches = BatchIterator(examples, batch_size=2, accumulation=4, packing=True, max_length=2048, seed=0)
    batches.batch(step)  # the arrays of one optimizer step, [A, B, T]; a pure function of the global step

The arrays are those of the train step, all int32: `input_ids`, `labels` (labels[t] is the token at t or -100; the model
shifts), `positions` (restart in every packed segment) and `segment_start` (the first position of the row that a token
may attend to).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass

import numpy as np

from lora_jax.chat import IGNORE


@dataclass(frozen=True, eq=False)
class Example:
    """One training text as tokens."""

    input_ids: np.ndarray  # int32 [n]
    labels: np.ndarray  # int32 [n]: input_ids where the token is trained on, else -100; labels[0] is always -100

    def __len__(self) -> int:
        return len(self.input_ids)


def bucket_lengths(
    examples: Sequence[Sized], max_length: int, n_buckets: int = 3, multiple: int = 64, rows: int = 1
) -> tuple[int, ...]:
    """The few static lengths that batches are padded to, ascending; the last holds the longest example.

    Args:
      examples: anything with a length.
      max_length: no bucket is longer.
      n_buckets: at most so many (each compiles the train step once).
      multiple: bucket lengths are multiples of this, which suits the hardware, except for `max_length` itself.
      rows: how many rows share a length (batch x accumulation): buckets split the distribution of the longest of so
        many rows evenly, which is quantile p**(1/rows) of the lengths.
    """
    lengths = np.sort([len(e) for e in examples])
    if lengths[-1] > max_length:
        raise ValueError(
            f"an example has {lengths[-1]} tokens, more than max_length={max_length}; tokenize_rows cuts them."
        )
    quantiles = (np.arange(1, n_buckets + 1) / n_buckets) ** (1 / rows)
    at = np.ceil(quantiles * len(lengths)).astype(int).clip(1, len(lengths)) - 1
    rounded = -(-lengths[at] // multiple) * multiple
    return tuple(sorted({min(int(n), max_length) for n in rounded}))


def pad_batch(examples: Sequence[Example | None], length: int, pad_id: int) -> dict[str, np.ndarray]:
    """One example per row, padded on the right; int32 [B, length] each. `None` is an empty row with nothing to learn.

    Pads have label -100 and come after every real token, so none attends to them. "positions" and "segment_start" are
    left out: they are what a model takes without them, and attention is faster when it knows that.
    """
    batch = _blank(len(examples), length, pad_id)
    for row, example in enumerate(examples):
        if example is not None:
            _put(batch, row, 0, example, length)
    return batch


def pack(examples: Sequence[Sized], max_length: int) -> list[list[int]]:
    """Which examples share a row: first-fit decreasing, so that each row's tokens fit in `max_length`.

    Deterministic. Indices within a row ascend, and rows are ordered by their first index.
    """
    lengths = [len(e) for e in examples]
    if max(lengths, default=0) > max_length:
        raise ValueError(
            f"an example has {max(lengths)} tokens, more than max_length={max_length}; tokenize_rows cuts them."
        )
    # A tree of maxima over the free space of every row finds the first row that fits in log time.
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    free = [max_length] * (2 * leaves)
    packed: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        node = 1
        while node < leaves:
            node = 2 * node + (free[2 * node] < lengths[index])
        packed.setdefault(node - leaves, []).append(index)
        free[node] -= lengths[index]
        while node > 1:
            node //= 2
            free[node] = max(free[2 * node], free[2 * node + 1])
    return sorted(sorted(group) for group in packed.values())


def packing_efficiency(examples: Sequence[Sized], groups: Sequence[Sequence[int]], length: int) -> float:
    """Real tokens over tokens computed, when each group fills a row of `length`."""
    return sum(len(examples[i]) for group in groups for i in group) / (len(groups) * length)


def pack_batch(
    examples: Sequence[Example], groups: Sequence[Sequence[int]], length: int, pad_id: int
) -> dict[str, np.ndarray]:
    """One group of examples per row, end to end; int32 [B, length] each. An empty group is an empty row.

    Every example is a segment: its positions begin at 0, its first label is -100 and `segment_start` is its first
    position. The pads at the end are a segment of their own.
    """
    batch = _blank(len(groups), length, pad_id)
    batch["positions"], batch["segment_start"] = (np.zeros((len(groups), length), np.int32) for _ in range(2))
    for row, group in enumerate(groups):
        at = 0
        for index in group:
            start, at = at, _put(batch, row, at, examples[index], length)
            batch["positions"][row, start:at] = np.arange(at - start)
            batch["segment_start"][row, start:at] = start
        batch["positions"][row, at:] = np.arange(length - at)
        batch["segment_start"][row, at:] = at
    return batch


def _blank(rows: int, length: int, pad_id: int) -> dict[str, np.ndarray]:
    return {
        "input_ids": np.full((rows, length), pad_id, np.int32),
        "labels": np.full((rows, length), IGNORE, np.int32),
    }


def _put(batch: dict[str, np.ndarray], row: int, at: int, example: Example, length: int) -> int:
    end = at + len(example)
    if end > length:
        raise ValueError(f"{end} tokens do not fit in a row of {length}.")
    batch["input_ids"][row, at:end] = example.input_ids
    batch["labels"][row, at + 1 : end] = example.labels[1:]
    return end


class BatchIterator:
    """The batches of every optimizer step, in a seeded order that can be entered at any step.

    The global step is the only state: `batch(step)` depends on nothing else, so a run resumed at step k sees what an
    uninterrupted one would have seen. Epoch e is ordered by `np.random.default_rng((seed, e)).permutation`. As in
    Hugging Face's trainer the last, partial batch of an epoch is kept (unless `drop_last`) and never filled from the
    next epoch; empty rows without labels keep its shape. With `packing`, examples are packed once and whole rows are
    shuffled.

    Args:
      examples: what `tokenize_rows` gives.
      batch_size: rows per micro-batch (B).
      accumulation: micro-batches per optimizer step (A).
      max_length: longest row; also what `packing` fills. Default: the longest example.
      packing: several examples per row.
      buckets: row lengths; default `bucket_lengths(...)` (one with packing). A step uses the shortest that holds it.
      shuffle: False keeps the order of the examples in every epoch.
      seed: of the order.
      drop_last: leave out the examples that do not fill a micro-batch.
      attention_mask: add "attention_mask", 1 for tokens and 0 for pads.
      pad_id: token id of pads; any id will do.
      step: the step to start at.

    Attributes:
      steps_per_epoch: optimizer steps in an epoch.
      buckets: the lengths in use, ascending.
      efficiency: real tokens over computed tokens if rows are packed (1.0 is perfect), else None.
      step: the global step whose batch comes next; may be set.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        accumulation: int = 1,
        max_length: int | None = None,
        packing: bool = False,
        buckets: Sequence[int] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        attention_mask: bool = False,
        pad_id: int = 0,
        step: int = 0,
    ):
        if not len(examples):
            raise ValueError("no examples: there is nothing to train on.")
        if batch_size < 1 or accumulation < 1:
            raise ValueError(f"batch_size is {batch_size} and accumulation is {accumulation}; both must be at least 1.")
        self._examples, self._pad_id, self._packing = examples, pad_id, packing
        self._shuffle, self._seed, self._attention_mask = shuffle, seed, attention_mask
        self._shape = (accumulation, batch_size)
        max_length = max_length or max(len(e) for e in examples)
        self._groups = pack(examples, max_length) if packing else [[i] for i in range(len(examples))]
        sizes = np.array([sum(len(examples[i]) for i in group) for group in self._groups])
        self._sizes = sizes
        if buckets is None:
            rows = [range(n) for n in sizes]
            buckets = bucket_lengths(rows, max_length, 1 if packing else 3, rows=accumulation * batch_size)
        self.buckets = tuple(sorted(buckets))
        if self.buckets[-1] < sizes.max():
            raise ValueError(
                f"the longest row has {sizes.max()} tokens, more than the longest bucket of {self.buckets}."
            )
        self.efficiency = packing_efficiency(examples, self._groups, self.buckets[-1]) if packing else None
        self._rows = len(sizes) // batch_size * batch_size if drop_last else len(sizes)
        if not self._rows:
            raise ValueError(
                f"drop_last leaves nothing of {len(sizes)} rows with batch_size={batch_size}; lower either."
            )
        self.steps_per_epoch = -(-self._rows // (accumulation * batch_size))
        self.step = step
        self._order: tuple[int, np.ndarray] = (-1, np.arange(len(sizes)))

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """The arrays of one optimizer step; int32 [A, B, T] each, T one of `buckets`."""
        epoch, within = divmod(step, self.steps_per_epoch)
        rows = self._shape[0] * self._shape[1]
        chosen = self._epoch_order(epoch)[: self._rows][within * rows : (within + 1) * rows]
        length = next(n for n in self.buckets if n >= self._sizes[chosen].max())
        groups = [self._groups[i] for i in chosen] + [[]] * (rows - len(chosen))
        if self._packing:
            batch = pack_batch(self._examples, groups, length, self._pad_id)
        else:
            batch = pad_batch([self._examples[g[0]] if g else None for g in groups], length, self._pad_id)
        if self._attention_mask:
            tokens = np.pad(self._sizes[chosen], (0, rows - len(chosen)))
            batch["attention_mask"] = (np.arange(length) < tokens[:, None]).astype(np.int32)
        return {name: array.reshape(*self._shape, length) for name, array in batch.items()}

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Batches from `step` on, without end."""
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = self.batch(self.step)
        self.step += 1
        return batch

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._shuffle and self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self._seed, epoch)).permutation(len(self._groups)))
        return self._order[1]


def eval_batches(
    examples: Sequence[Example],
    batch_size: int,
    *,
    max_length: int | None = None,
    buckets: Sequence[int] | None = None,
    pad_id: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, in order, unpacked; int32 [B, T] each. Empty rows fill the last batch."""
    source = BatchIterator(
        examples, batch_size=batch_size, max_length=max_length, buckets=buckets, shuffle=False, pad_id=pad_id
    )
    for step in range(source.steps_per_epoch):
        yield {name: array[0] for name, array in source.batch(step).items()}
