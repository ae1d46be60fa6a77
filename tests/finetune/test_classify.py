import json
import random
import signal

import pytest
import torch

from fastgpt import GPT
from fastgpt.finetune.classify import Classification, ClassifyConfig, classify
from fastgpt.model.classifier import GPTClassifier
from fastgpt.tokenizer import Tokenizer
from fastgpt.train import TrainConfig, Trainer, checkpoint, metrics, train


@pytest.fixture(scope="module")
def base(shards, tmp_path_factory):
    """A model that has just begun to learn the made-up text."""
    out = tmp_path_factory.mktemp("base") / "run"
    return train(
        TrainConfig(out, data=shards, preset="micro", batch_size=4, max_steps=10, precision="fp32", device="cpu")
    ).checkpoint


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Sentences of three classes, which their verbs tell."""
    rng = random.Random(0)
    rows = []
    for verb, label in (("sees", "look"), ("likes", "feel"), ("hides", "act")):
        for _ in range(50):
            name, thing = rng.choice(["Ada", "Bo", "Cy", "Dee"]), rng.choice(["a cat", "the sea", "two hats"])
            rows.append(f"{name} {verb} {thing} {rng.randrange(1000)}.\t{label}\n")
    rng.shuffle(rows)
    path = tmp_path_factory.mktemp("table") / "verbs.tsv"
    path.write_text("".join(rows))
    return path


SMALL = {"batch_size": 8, "precision": "fp32", "device": "cpu", "dropout": 0.0, "lr": 3e-3, "seed": 1}


def config(base, table, out, **changes):
    return ClassifyConfig(**{"model": base, "data": table, "out": out, **SMALL, **changes})


@pytest.mark.parametrize("how", ["all", "last-block", "lora"])
def test_learns_and_the_folder_is_transformers(base, table, tmp_path, how):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    result = classify(config(base, table, tmp_path / "run", train=how, epochs=8))
    assert result.scores.accuracy > 0.9, result.scores
    assert result.scores.count == 30
    folder = tmp_path / "run/model"
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ours, text = GPTClassifier.from_pretrained(tmp_path / "run"), "Ada hides the sea 12."
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert ids == Tokenizer.from_pretrained(folder).encode(text)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits.softmax(-1)
    torch.testing.assert_close(ours.probabilities([ids]), expected, rtol=0, atol=1e-5)
    assert ours.classes.labels[int(expected.argmax())] == "act"

    before = dict(GPT.from_pretrained(base).transformer.named_parameters())
    same = {n for n, p in ours.transformer.named_parameters() if torch.equal(p, before[n])}
    if how == "last-block":
        assert same == {n for n in before if not n.startswith(("h.1.", "ln_f."))}
    elif how == "lora":
        assert same == {n for n in before if not n.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))}
    else:
        assert "h.0.attn.c_attn.weight" not in same

    written = json.loads((tmp_path / "run/test.json").read_text())
    assert written["accuracy"] == result.scores.accuracy
    lines = [json.loads(line) for line in (tmp_path / "run/test_predictions.jsonl").read_text().splitlines()]
    assert sum(line["label"] == line["guess"] for line in lines) / len(lines) == pytest.approx(written["accuracy"])
    assert (tmp_path / "run/confusion.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("how", ["all", "lora"])
def test_a_signal_saves_and_resuming_gives_the_same_bit_for_bit(base, table, tmp_path, monkeypatch, how):
    changes = {"train": how, "dropout": 0.1, "max_steps": 21, "eval_interval": 7, "patience": None}
    classify(config(base, table, tmp_path / "whole", **changes))
    plain = Trainer.train_step

    def step_and_signal(self):
        if self.step == 15:  # in the second epoch
            signal.raise_signal(signal.SIGTERM)
        return plain(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_and_signal)
        first = classify(config(base, table, tmp_path / "cut", **changes))
    assert (first.run.step, first.scores) == (16, None)
    assert not (tmp_path / "cut/model").exists()
    saved = ClassifyConfig.load(tmp_path / "cut")
    saved.resume = True
    classify(saved)
    keys = ("step", "tokens", "loss", "val_loss", "accuracy", "lr", "grad_norm")
    runs = [
        [{k: r[k] for k in keys if k in r} for r in metrics.read_metrics(tmp_path / run / "metrics.jsonl")]
        for run in ("whole", "cut")
    ]
    assert runs[0] == runs[1]
    weights = [(tmp_path / run / "model/model.safetensors").read_bytes() for run in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_the_best_on_validation_is_kept_and_patience_stops(base, table, tmp_path):
    classify(config(base, table, tmp_path / "run", epochs=30, eval_interval=5, patience=2))
    records = [r for r in metrics.read_metrics(tmp_path / "run/metrics.jsonl") if "accuracy" in r]
    assert records[-1]["step"] < 30 * 13
    first = max(records[1:], key=lambda r: r["accuracy"])["step"]
    assert [r["step"] for r in records].index(first) == len(records) - 3
    best = max(records[1:], key=lambda r: (r["accuracy"], -r["val_loss"]))["step"]
    assert best in checkpoint.steps(tmp_path / "run")
    assert f"the best is that of step {best}" in (tmp_path / "run/log.txt").read_text()


def test_every_example_is_seen_once_an_epoch(base, table, tmp_path):
    task = Classification(config(base, table, tmp_path / "run", balance=True), None)
    n = len(task.ids["train"])
    seen = []
    while len(seen) < 2 * n:
        ids, lengths, _ = task.next_batch()
        seen += [tuple(row[:length]) for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)]
    wanted = sorted(map(tuple, task.ids["train"]))
    assert sorted(seen[:n]) == sorted(seen[n:]) == wanted
    assert seen[:n] != seen[n:]


def test_by_the_command_line(base, table, tmp_path, cli, refused):
    out = tmp_path / "run"
    options = [part for k, v in SMALL.items() for part in ("--" + k.replace("_", "-"), v)]
    args = ["finetune", "classify", "--data", table, *options]
    code, text, err = cli(*args, "--model", base, "--out", out, "--epochs", 5)
    assert code == 0, err
    for words in ("test: 30 texts, accuracy", "is \\ taken for", "calibration", "ask it with: fastgpt classify"):
        assert words in text
    code, text, _ = cli("classify", "--model", out, "Cy likes two hats 3.", "Bo sees a cat 9.")
    assert code == 0
    assert [line.split("│")[2].strip() for line in text.splitlines() if line.startswith("│")] == ["feel", "look"]
    (tmp_path / "lines.txt").write_text("Cy likes a cat 5.\nAda sees the sea 7.\nDee hides a cat 1.\n")
    code, text, _ = cli("classify", "--model", out, "--input", tmp_path / "lines.txt", "--batch-size", 2)
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["label"] for line in lines] == ["feel", "look", "act"]
    assert all(sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-4) for line in lines)
    assert cli("finetune", "classify", "--out", out, "--resume")[0] == 0  # again, when it has finished

    assert "is a classifier" in refused("generate", "--model", out)
    assert "is no classifier" in refused("classify", "--model", base, "text")
    assert "text, line 2: the text is empty" in refused("classify", "--model", out, "one", " ")
    assert "give texts or --input" in refused("classify", "--model", out, "one", "--input", "x.txt")
    assert "is a run of `fastgpt finetune classify`" in refused("train", "--out", out, "--resume")


def test_bad_input_gives_one_line(base, table, tmp_path, refused):
    out = tmp_path / "run"

    def line(data=table, **options):
        given = [part for k, v in options.items() for part in ("--" + k.replace("_", "-"), v)]
        return refused("finetune", "classify", "--model", base, "--data", data, "--out", out, *given)

    def data(content, name="a.csv"):
        path = tmp_path / name
        path.write_text("text,label\n" + content)
        return path

    assert "--data is missing" in refused("finetune", "classify", "--model", base, "--out", out)
    assert "--model is missing" in refused("finetune", "classify", "--data", table, "--out", out)
    one = data("".join(f"text {i},same\n" for i in range(9)))
    assert "all 9 labels are 'same': give at least two classes" in line(one)
    few = data("".join(f"text {i},{'a' if i else 'b'}\n" for i in range(30)))
    assert "the class 'b' has 1 examples, too few" in line(few, val_fraction=0.4, test_fraction=0.4)
    assert "too few examples for a val part" in line(data("x,a\ny,b\n"), val_fraction=0.01)
    other = data("some text,new\n", "test.csv")
    two = data("".join(f"text {i},{'ab'[i % 2]}\n" for i in range(30)))
    assert "test.csv, line 2: the label 'new' is not in" in line(two, test_data=other)
    assert "something must be left" in line(val_fraction=0.5, test_fraction=0.5)
    assert "--epochs must be above 0" in line(epochs=0)
    assert "--lora-rank must be at least 1" in line(train="lora", lora_rank=0)
    assert "--quantize is of adapters: train them with --train lora, or leave it out" in line(quantize="nf4")
    assert not out.exists()
