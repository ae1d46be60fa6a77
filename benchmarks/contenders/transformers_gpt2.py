"""transformers' GPT2LMHeadModel with its own loss, and AdamW as its Trainer has it by default (torch's, fused)."""

from pathlib import Path

import torch
import transformers
from torch import Tensor

from contenders import BETAS, LR, Contender, decayed
from fastgpt import GPTConfig
from fastgpt.model.hub import TRANSPOSED


def eager(config: GPTConfig, weights: dict[str, Tensor], device: torch.device, checkout: Path | None) -> Contender:
    transformers.logging.set_verbosity_error()
    options = {**config.to_hf(), "use_cache": False, "bos_token_id": None, "eos_token_id": None}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**options))
    own = {}
    for name, value in weights.items():
        value = value[: config.vocab_size] if name == "transformer.wte.weight" else value
        own[name] = value.t() if name.endswith(TRANSPOSED) else value
    missing, unexpected = model.load_state_dict(own, strict=False)
    assert missing in ([], ["lm_head.weight"]), missing
    assert not unexpected, unexpected
    model.to(device).train()
    optimizer = torch.optim.AdamW(decayed(model), lr=LR, betas=BETAS, fused=True)

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        return model(input_ids=ids, labels=targets, shift_labels=targets).loss  # our targets are shifted already

    about = f"transformers {transformers.__version__}, {model.config._attn_implementation} attention"
    return Contender(about, model, loss, optimizer)
