"""Names and shapes of a model's tensors: IN.json {name: config.json} -> OUT.json {name: {tensor: shape}}; no memory."""
# pyright: reportMissingImports=false

import argparse
import json
from pathlib import Path

import hf_model  # noqa: F401  (sets threads, offline mode)
import torch
import transformers


def main() -> None:
    """Read the arguments and write OUT.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", type=Path, metavar="IN.json")
    parser.add_argument("outputs", type=Path, metavar="OUT.json")
    args = parser.parse_args()
    names = {}
    for name, config in json.loads(args.configs.read_text()).items():
        config.pop("quantization_config", None)
        model_class = getattr(transformers, config["architectures"][0])
        with torch.device("meta"):
            model = model_class(model_class.config_class.from_dict(config))
        names[name] = {tensor: list(value.shape) for tensor, value in model.state_dict().items()}
    args.outputs.write_text(json.dumps(names))


if __name__ == "__main__":
    main()
