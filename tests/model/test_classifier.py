import json

import pytest
import torch

from fastgpt import GPT, GPTConfig
from fastgpt.errors import UserError
from fastgpt.model.classifier import Classes, GPTClassifier

LABELS = ("bad", "good", "so so")


def classifier(pooling="last"):
    torch.manual_seed(0)
    return GPTClassifier(GPTConfig.preset("micro", vocab_size=70), Classes(LABELS, 69, pooling)).eval()


def texts(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(69, (n,), generator=generator).tolist() for n in (5, 1, 64, 17, 2, 40)]


def test_the_folder_opens_in_transformers_with_the_same_probabilities(tmp_path):
    from transformers import AutoModelForSequenceClassification

    ours = classifier()
    ours.save_pretrained(tmp_path, eos_token_id=69)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert theirs.config.id2label == dict(enumerate(LABELS))
    ids, _ = ours.pad(texts())
    with torch.no_grad():
        torch.testing.assert_close(ours.probabilities(texts()), theirs(ids).logits.softmax(-1), rtol=0, atol=1e-5)


def test_what_transformers_wrote_is_read(tmp_path):
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(
        vocab_size=70, n_positions=64, n_embd=64, n_layer=2, n_head=2, pad_token_id=69, eos_token_id=69, num_labels=4
    )
    torch.manual_seed(0)
    theirs = GPT2ForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = GPTClassifier.from_pretrained(tmp_path)
    assert ours.classes == Classes(("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"), 69)
    ids, _ = ours.pad(texts())
    with torch.no_grad():
        torch.testing.assert_close(ours.probabilities(texts()), theirs(ids).logits.softmax(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_batches_and_padding_change_nothing(tmp_path, pooling):
    model = classifier(pooling)
    model.save_pretrained(tmp_path)
    model = GPTClassifier.from_pretrained(tmp_path)
    assert model.classes.pooling == pooling
    alone = []
    with torch.no_grad():
        for ids in texts():
            hidden = model.transformer(torch.tensor([ids]))[0]
            pooled = hidden[-1] if pooling == "last" else hidden.mean(0)
            alone.append(model.score(pooled).softmax(-1))
    torch.testing.assert_close(model.probabilities(texts(), batch_size=4), torch.stack(alone), rtol=0, atol=1e-5)


def test_a_language_models_transformer_is_taken_over():
    gpt = GPT(GPTConfig.preset("micro", vocab_size=70))
    model = GPTClassifier(gpt.config, Classes(LABELS, 69), gpt.transformer)
    assert model.transformer.wte.weight is gpt.transformer.wte.weight


def test_folders_of_another_kind_are_named(tmp_path):
    classifier().save_pretrained(tmp_path / "c")
    GPT(GPTConfig.preset("micro", vocab_size=70)).save_pretrained(tmp_path / "g")
    with pytest.raises(UserError, match="g is no classifier: make one of it with `fastgpt finetune classify`"):
        GPTClassifier.from_pretrained(tmp_path / "g")
    with pytest.raises(UserError, match="c is a classifier, which continues no text: ask it with `fastgpt classify`"):
        GPT.from_pretrained(tmp_path / "c")
    config = json.loads((tmp_path / "c/config.json").read_text())
    for field, value, words in (
        ("id2label", {"1": "x"}, "id2label names no classes"),
        ("pad_token_id", None, "pad_token_id is None"),
        ("classifier_pooling", "max", "classifier_pooling is 'max'"),
        ("id2label", {"0": "x", "1": "y"}, r"score.weight has shape \(3, 64\), but its config.json asks for \(2, 64\)"),
    ):
        (tmp_path / "c/config.json").write_text(json.dumps({**config, field: value}))
        with pytest.raises(UserError, match=words):
            GPTClassifier.from_pretrained(tmp_path / "c")
