import pytest
import torch

from fastgpt import GPT, GPTConfig

IDS = torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(0))
CU_SEQLENS = torch.tensor([0, 20, 32, 50, 64], dtype=torch.int32)


def micro(recompute, dropout=0.2, **sizes):
    torch.manual_seed(0)
    pdrop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 3, "n_head": 2, **sizes}
    model = GPT(GPTConfig(**sizes, **pdrop)).train()
    model.transformer.recompute = recompute
    return model


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("cu_seqlens", [None, CU_SEQLENS], ids=["rows", "documents"])
def test_losses_gradients_and_random_state_are_the_same(cu_seqlens, precision):
    found = []
    for recompute in (False, True):
        model = micro(recompute)
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model.loss(IDS[:, :-1], IDS[:, 1:], cu_seqlens=cu_seqlens)
        after = torch.get_rng_state()
        loss.backward()
        assert torch.equal(torch.get_rng_state(), after)
        found.append([loss.detach(), after, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_keeps_two_residual_streams_a_block_and_no_more():
    """What autograd keeps for backward, in bytes, over two depths, so that what is kept once cancels out."""

    def kept(recompute, n_layer):
        tensors = {}

        def pack(t):
            tensors[t.data_ptr()] = t.untyped_storage().nbytes()
            return t

        model = micro(recompute, n_layer=n_layer, n_embd=64)
        weights = {p.data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model.loss(IDS[:, :-1], IDS[:, 1:])
        del loss
        return sum(size for at, size in tensors.items() if at not in weights)

    stream = IDS[:, :-1].numel() * 64 * 4
    assert kept(True, 6) - kept(True, 2) <= 4 * 2 * stream
    assert kept(False, 6) - kept(False, 2) > 4 * 12 * stream


def test_nothing_changes_where_no_gradient_is_asked_for():
    with torch.no_grad():
        whole, again = (micro(recompute).eval()(IDS[:, :-1]) for recompute in (False, True))
    assert torch.equal(whole, again)
    model = micro(True)
    assert model.generate(IDS[:, :4], 4).shape == (2, 8)
