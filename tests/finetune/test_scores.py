import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.finetune.scores import draw_scores, score


def test_scores_by_hand():
    probabilities = torch.tensor([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.25, 0.75, 0.0], [0.05, 0.95, 0.0]])
    scores = score(probabilities, torch.tensor([0, 1, 1, 1]), ("a", "b", "c"))
    assert scores.confusion == [[1, 0, 0], [1, 2, 0], [0, 0, 0]]
    assert scores.accuracy == 0.75
    assert scores.f1 == pytest.approx([2 / 3, 0.8, 0.0])
    assert scores.macro_f1 == pytest.approx((2 / 3 + 0.8) / 3)
    assert scores.nll == pytest.approx(-sum(map(torch.log, torch.tensor([0.9, 0.4, 0.75, 0.95]))).item() / 4)
    # bins [0.6, 0.7): sure by 0.6, wrong; [0.7, 0.8): 0.75, right; [0.9, 1]: 0.925, both right
    assert [count for count, _, _ in scores.bins] == [1, 1, 2]
    assert scores.calibration_error == pytest.approx((0.6 + 0.25 + 2 * 0.075) / 4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(2, 6), st.integers(0, 99))
def test_scores_are_those_of_a_plain_loop(n, classes, seed):
    torch.manual_seed(seed)
    probabilities = torch.rand(n, classes).softmax(1)
    targets = torch.randint(classes, (n,))
    scores = score(probabilities, targets, tuple(map(str, range(classes))))
    pairs = list(zip(targets.tolist(), probabilities.argmax(1).tolist(), strict=True))
    for i in range(classes):
        for j in range(classes):
            assert scores.confusion[i][j] == pairs.count((i, j))
    for c in range(classes):
        right = pairs.count((c, c))
        precision = right / max(1, sum(guess == c for _, guess in pairs))
        recall = right / max(1, sum(target == c for target, _ in pairs))
        f1 = 2 * precision * recall / (precision + recall) if right else 0.0
        assert scores.f1[c] == pytest.approx(f1)
    assert sum(count for count, _, _ in scores.bins) == n
    assert 0 <= scores.calibration_error <= 1


@pytest.mark.parametrize("classes", [2, 30])
def test_the_picture_is_drawn_for_two_classes_and_for_many(tmp_path, classes):
    torch.manual_seed(0)
    scores = score(torch.rand(50, classes).softmax(1), torch.randint(classes, (50,)), tuple(map(str, range(classes))))
    draw_scores(scores, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
