"""What tests of tables in the host's memory share: an adapter that does something, and all that a model is used for."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax import SFTConfig, SFTTrainer, get_peft_model
from lora_jax.export.merge import merged_tensors
from tests import tiny


def adapted(model: Any, **lora: Any) -> None:
    """An adapter of rank 2, whose B is not zero."""
    get_peft_model(model, r=2, verbose=False, **lora)
    rng = np.random.default_rng(1)
    _, state, _ = model.split()
    model.update_lora(jax.tree.map(lambda x: jax.numpy.asarray(x + 0.1 * rng.normal(size=x.shape), x.dtype), state))


def used(model: Any, tokenizer: Any, output_dir: Path, table: str) -> tuple:
    """(training loss, evaluation loss, logits, generated ids, a merged tensor) after three steps."""
    rng = np.random.default_rng(3)
    rows = [{"input_ids": rng.integers(0, tiny.VOCAB, 12).tolist()} for _ in range(6)]
    args = SFTConfig(output_dir=output_dir, max_steps=3, max_length=16, save_strategy="no", report_to="none")
    trainer = SFTTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows[:3], processing_class=tokenizer)
    loss = trainer.train().training_loss
    ids = np.array([rows[0]["input_ids"]])
    found = (loss, trainer.evaluate()["eval_loss"], np.asarray(model.logits(ids)))
    return (*found, model.generate(ids, max_new_tokens=5), merged_tensors(model)[table].read())
