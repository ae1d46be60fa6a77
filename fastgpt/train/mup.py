"""muP (Yang et al. 2022, arXiv:2203.03466): initial weights and learning rates by width, so that the best rate of a
small model is the best of a wide one.

In the paper's table 8, at m = n_embd / base width, for Adam:

    matrices inside of blocks      initial deviation by 1/sqrt(m), learning rate by 1/m
    embeddings, vectors            as they are
    logits                         by 1/m, the classifier as it is, tied to the embedding or not
    attention's scores             by 8/D for head size D, not by 1/sqrt(D); the same at GPT-2's own D = 64

A GPT-2 folder knows no factor on logits or scores. But Adam's update does not depend on how large a gradient is, so a
factor on a parameter is the same as that parameter started, and learning, by the factor (the paper's lemma J.1). So:

    logits * 1/m      ln_f's weight and bias carry the 1/m
    scores * s        with s = 8/sqrt(D): ln_1's weight and bias and c_attn's bias carry t = sqrt(s), which q and k then
                      have, and v too, which is undone by 1/t on the attention's c_proj

and transformers computes from the folder what we do. Muon's update does not depend on the gradient's size either; its
matrices' learning rate goes by 1/sqrt(m), which keeps the update's spectral norm: at our scale that of an orthogonal
matrix grows by sqrt(m), where Adam's, of low rank, grows by m (Yang, Simon, Bernstein 2023, arXiv:2310.17813).
"""

import math

import torch

from fastgpt.model.config import GPTConfig
from fastgpt.model.gpt import GPT
from fastgpt.train.optimizer import OptimizerName


def factors(name: str, config: GPTConfig, base_width: int, optimizer: OptimizerName = "adamw") -> tuple[float, float]:
    """Of a parameter of `GPT` by its name: the factors on its initial value and on its learning rate."""
    m = config.n_embd / base_width
    t = math.sqrt(8 / math.sqrt(config.n_embd / config.n_head))
    if ".ln_1." in name or name.endswith("c_attn.bias"):
        return t, t
    if ".ln_f." in name:
        return 1 / m, 1 / m
    if ".h." in name and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        undone = 1 / t if name.endswith("attn.c_proj.weight") else 1.0
        return undone / math.sqrt(m), undone * (m**-0.5 if optimizer == "muon" else 1 / m)
    return 1.0, 1.0


@torch.no_grad()
def scale_weights(model: GPT, base_width: int) -> None:
    """Makes a model's usual initial weights muP's."""
    for name, p in model.named_parameters():
        p.mul_(factors(name, model.config, base_width)[0])


def lr_scales(model: GPT, base_width: int, optimizer: OptimizerName) -> dict[str, float]:
    """The factors on the learning rate for `build_optimizer`, by parameter name."""
    return {name: factors(name, model.config, base_width, optimizer)[1] for name, _ in model.named_parameters()}
