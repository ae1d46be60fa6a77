"""What the tests of adapters share: a tiny GPT-2 of transformers, ours of the same weights, and adapters of PEFT."""

import warnings

import peft
import torch
import transformers

from fastgpt import GPT

SHAPE = {"vocab_size": 96, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rsdora": {"use_rslora": True, "use_dora": True},
}


def write_base(folder, seed=0, **shape):
    """A transformers model whose every parameter is random, saved to `folder`."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(**SHAPE | NO_DROPOUT | {"bos_token_id": 0, "eos_token_id": 0} | shape)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    model.save_pretrained(folder)
    return folder


def ids(seed=1, batch=3):
    return torch.randint(SHAPE["vocab_size"], (batch, 24), generator=torch.Generator().manual_seed(seed))


def theirs(base):
    return transformers.GPT2LMHeadModel.from_pretrained(base)


def with_peft(base, **options):
    """PEFT on transformers, every number of its adapter random."""
    torch.manual_seed(2)
    options = {"r": 4, "lora_alpha": 12, "target_modules": ["c_attn", "c_proj", "c_fc"]} | options
    with warnings.catch_warnings():  # that fan_in_fan_out is set for us
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(theirs(base), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    randomize(model)
    return model


def randomize(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)


def logits(model, x=None):
    """Of a model of ours, of transformers or of PEFT, in eval mode."""
    model.eval()
    with torch.no_grad():
        y = model(ids() if x is None else x)
    return y if isinstance(model, GPT) else y.logits


def assert_close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)
