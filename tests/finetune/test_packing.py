import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt import GPT, GPTConfig, UserError
from fastgpt.finetune.packing import Example, PackedExamples, fit_example, pack


def example(prompt, response, seed=0):
    ids = torch.randint(100, (prompt + response,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Example(ids, [False] * prompt + [True] * response)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset("micro", vocab_size=100, n_positions=32)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def alone(model, one):
    """The loss of one example, summed, with nothing around it."""
    ids, trained = torch.tensor([one.ids]), torch.tensor([one.trained])
    logits = model(ids[:, :-1]).log_softmax(-1)
    losses = -logits.gather(-1, ids[:, 1:, None])[..., 0]
    return losses[trained[:, 1:]].sum()


def test_packing_changes_no_examples_loss(model):
    examples = [example(1 + i % 9, 1 + i % 7, seed=i) for i in range(20)]
    data = PackedExamples(examples, 32, seed=0, pad_id=3)
    batch = data.next_batch(data.rows())
    with torch.no_grad():
        losses = model.loss(batch.ids, batch.targets, "none", batch.cu_seqlens)
        want = [alone(model, one) for one in examples]
    starts = iter(batch.cu_seqlens[:-1].tolist())
    for r, row in enumerate(pack(data.lengths, 32, 0, 0)):
        start = next(starts)
        for i in row:
            torch.testing.assert_close(losses.flatten()[start : start + examples[i].length].sum(), want[i])
            start += examples[i].length
            if start % 32:
                assert next(starts) == start
        assert (batch.targets[r, start - r * 32 :] == -100).all()
    torch.testing.assert_close(losses.sum(), sum(want), rtol=1e-5, atol=0)
    assert batch.weight == sum(sum(one.trained) for one in examples)


def test_another_neighbour_changes_nothing(model):
    """No token's loss depends on what else is in its row."""
    one, data = example(4, 4), []
    for seed in (1, 2):
        batch = PackedExamples([one, example(6, 5, seed)], 32, seed=0).next_batch(1)
        with torch.no_grad():
            data.append((batch, model.loss(batch.ids, batch.targets, "none", batch.cu_seqlens)))
    (a, losses_a), (b, losses_b) = data
    same = a.ids == b.ids
    assert not same.all()
    start = 10  # the longer one is first
    assert a.ids[0, start : start + 7].tolist() == one.ids[:-1]
    assert torch.equal(losses_a[0, start:], losses_b[0, start:])
    assert not torch.equal(losses_a, losses_b)


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=200), st.integers(0, 3))
def test_every_example_stands_in_one_row(lengths, epoch):
    rows = pack(lengths, 40, seed=1, epoch=epoch)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= 40 for row in rows)
    assert rows == pack(lengths, 40, seed=1, epoch=epoch)
    # Two rows that are half full would have been one.
    assert sum(2 * sum(lengths[i] for i in row) <= 40 for row in rows) <= 1


def test_each_epoch_has_an_order_of_its_own_and_resumes():
    examples = [example(2, 3 + i % 5, seed=i) for i in range(50)]
    data = PackedExamples(examples, 16, seed=7)
    epochs = [data.next_batch(data.rows()) for _ in range(2)]
    assert not torch.equal(epochs[0].ids, epochs[1].ids)
    assert all(batch.weight == sum(3 + i % 5 for i in range(50)) for batch in epochs)
    data = PackedExamples(examples, 16, seed=7)
    data.next_batch(data.rows() + 3)
    again = PackedExamples(examples, 16, seed=7)
    again.load_state_dict(data.state_dict())
    for a, b in zip(data.next_batch(4), again.next_batch(4), strict=True):
        assert torch.equal(a, b)
    for other in (PackedExamples(examples[1:], 16, seed=7), PackedExamples(examples, 16, seed=8)):
        with pytest.raises(UserError, match="is of other data"):
            other.load_state_dict(data.state_dict())


def test_validation_sees_every_target_once():
    examples = [example(2, 3 + i % 5, seed=i) for i in range(50)]
    batches = list(PackedExamples(examples, 16, seed=7).sequential_batches(4))
    assert sum(batch.weight for batch in batches) == sum(3 + i % 5 for i in range(50))


@pytest.mark.parametrize(
    ("text", "want"),  # p a prompt's token, r a response's, . one of a response that is not trained
    [
        ("pppprrr", "pppprrr"),  # fits: 7 ids are 6 tokens
        ("ppprrrpp", "ppprrr"),  # what follows the response is not needed
        ("ppppppprr", "ppppprr"),  # from the left
        ("pppprrrrrr", "prrrrrr"),  # one token of the prompt is left
        ("pprrrrrrr", None),  # the response alone is too long
        ("prrprrrrprr", "....prr"),  # a response that lost its beginning
        ("pprrrpprrp", "...pprr"),  # a response that lost all of its prompt
    ],
)
def test_too_long_is_cut_from_the_left(text, want):
    got = fit_example(list(range(len(text))), [c == "r" for c in text], 6)
    if want is None:
        assert got is None
        return
    assert got.ids == list(range(got.ids[0], got.ids[0] + len(want)))
    kept = "".join("r" if t else text[i].replace("r", ".") for i, t in zip(got.ids, got.trained, strict=True))
    assert kept == want
