"""How a pre-training run reads: ahead of the steps, with documents' boundaries, and what it says of the wait."""

import shutil
import threading
import time
from dataclasses import replace
from statistics import median

import pytest
import torch
from test_trainer import config, losses, stop_at, weights

from fastgpt import Tokenizer
from fastgpt.data import Document, Prefetched, prepare
from fastgpt.errors import UserError
from fastgpt.train import TrainConfig, Trainer, metrics, open_run, train, trainer
from fastgpt.train.pretrain import Pretraining

SMALL = {"max_steps": 6, "save_interval": 3, "eval_interval": 6, "eval_batches": 1, "batch_size": 2, "sample_tokens": 0}


def run_ahead(c):
    """As on a GPU, the batches come from a thread."""
    latest = open_run(c)
    task = Pretraining(c, latest)
    task.prefetched = Prefetched(task._read_batch, task.train_data)
    return Trainer(task.config, task, latest).run()


def test_reading_ahead_changes_no_loss_and_no_position(shards, tmp_path, monkeypatch):
    """A signal stops it after step 2, when the batches of the next steps have been made."""
    threads = threading.active_count()
    train(config(shards, tmp_path / "plain", **SMALL))
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert run_ahead(config(shards, tmp_path / "ahead", **SMALL)).step == 2
    assert threading.active_count() == threads
    run_ahead(config(shards, tmp_path / "ahead", resume=True, **SMALL))
    assert threading.active_count() == threads
    assert losses(tmp_path / "ahead") == losses(tmp_path / "plain")
    for a, b in zip(weights(tmp_path / "ahead"), weights(tmp_path / "plain"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_on_a_gpu_batches_come_pinned_from_a_thread(shards, tmp_path):
    task = Pretraining(config(shards, tmp_path / "run", document_masks=True, **{**SMALL, "device": "cuda"}), None)
    batch = task.next_batch()
    assert all(t.is_pinned() for t in (batch.ids, batch.targets, batch.cu_seqlens))
    assert threading.active_count() > 1
    task.close()
    assert task.loss(batch).isfinite()


def test_a_shard_that_is_cut_short_ends_the_run_in_one_line_and_no_thread_stays(shards, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    threads = threading.active_count()
    task = Pretraining(config(data, tmp_path / "run", **SMALL), None)
    task.prefetched = Prefetched(task._read_batch, task.train_data)
    run = Trainer(task.config, task, None)
    (data / "train_00000.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"train_00000.bin was cut short while it was in use"):
        run.run()
    assert threading.active_count() == threads


def test_the_wait_for_data_is_recorded_and_told(shards, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "WORTH_TELLING", 1.0)  # a busy machine can make any wait long
        train(config(shards, tmp_path / "quick", **SMALL))
    assert "waited for data" not in capsys.readouterr().out
    plain = Pretraining.next_batch

    def slow(self):
        time.sleep(0.3)
        return plain(self)

    monkeypatch.setattr(Pretraining, "next_batch", slow)
    train(config(shards, tmp_path / "slow", **SMALL))
    assert "waited for data" in capsys.readouterr().out
    quick, waits = (
        [r["data_wait"] for r in metrics.read_metrics(tmp_path / n / "metrics.jsonl") if "loss" in r]
        for n in ("quick", "slow")
    )
    assert len(quick) == len(waits) == 6
    assert median(quick) < median(waits) <= max(waits) <= 1


@pytest.fixture(scope="module")
def short_documents(corpus, tokenizer_dir, tmp_path_factory):
    lines = enumerate((corpus / "story_0.txt").read_text().splitlines())
    out = tmp_path_factory.mktemp("short") / "data"
    prepare((Document(str(i), line) for i, line in lines), Tokenizer.from_pretrained(tokenizer_dir), out)
    return out


def test_documents_are_kept_apart_in_training_and_evaluation(short_documents, tmp_path, cli):
    plain, masked, cut = (tmp_path / name for name in ("plain", "masked", "cut"))
    train(config(short_documents, plain, **SMALL))
    masks = {**SMALL, "document_masks": True}
    train(config(short_documents, masked, **masks))
    task = Pretraining(config(short_documents, tmp_path / "x", **masks), None)
    batch = task.next_batch()
    assert len(batch.cu_seqlens) > 1 + len(batch.ids)
    expected = task.model.loss(batch.ids, batch.targets, cu_seqlens=batch.cu_seqlens).item()
    first, without = losses(masked), losses(plain)
    assert first[1]["loss"] == pytest.approx(expected, abs=1e-6)
    assert first[1]["loss"] != without[1]["loss"]
    assert first[0]["val_loss"] != without[0]["val_loss"]
    shutil.copytree(masked, cut)
    shutil.rmtree(cut / "checkpoints" / "step_6")
    train(replace(TrainConfig.load(cut), resume=True))
    assert losses(cut) == first
    evaluate = ("eval", "--model", masked, "--data", short_documents)
    assert cli(*evaluate)[1] != cli(*evaluate, "--document-masks")[1]


@pytest.mark.slow
def test_compiled_losses_with_document_masks_are_the_eager_ones(short_documents, tmp_path):
    """As many boundaries as there may be go to the compiled loss, so that it is compiled once."""
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    given = {**SMALL, "document_masks": True}
    for name in ("eager", "compiled"):
        torch._dynamo.utils.counters.clear()
        train(config(short_documents, tmp_path / name, compile=name == "compiled", **given))
    for a, b in zip(losses(tmp_path / "compiled"), losses(tmp_path / "eager"), strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
