"""Generation by transformers with any of its settings: what it makes of the logits, and the tokens.

IN.json: {"prompts": [[ids], ...], "cases": [{arguments of generate}, ...]}; each prompt is run alone, so that no
padding counts as a repetition. OUT.npz: "{case} {prompt} scores", float32 [n, V], logits after every processor, -inf
for what is left out; "{case} {prompt} tokens", int32 [n], new ones.
"""
# pyright: reportMissingImports=false

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from hf_model import load_causal_lm
from transformers import PreTrainedTokenizerFast


def main() -> None:
    """Read the arguments and write OUT.npz."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("inputs", type=Path, metavar="IN.json")
    parser.add_argument("outputs", type=Path, metavar="OUT.npz")
    args = parser.parse_args()
    request, found = json.loads(args.inputs.read_text()), {}
    model, tokenizer = load_causal_lm(args.model_dir), PreTrainedTokenizerFast.from_pretrained(args.model_dir)
    for number, case in enumerate(request["cases"]):
        for prompt, ids in enumerate(request["prompts"]):
            torch.manual_seed(0)
            out = model.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                tokenizer=tokenizer,
                output_scores=True,
                return_dict_in_generate=True,
                **{"top_k": 0, **case},
            )
            found[f"{number} {prompt} scores"] = torch.cat(out.scores).float().numpy()
            found[f"{number} {prompt} tokens"] = out.sequences[0, len(ids) :].numpy().astype(np.int32)
    np.savez(args.outputs, **found)


if __name__ == "__main__":
    main()
