import json
import sys
import types

import pytest

from fastgpt.train import TrainConfig, metrics, train, writers


def config(shards, out, **changes):
    values = {"preset": "micro", "batch_size": 4, "block_size": 32, "eval_interval": 4, "eval_batches": 1}
    values |= {"save_interval": 3, "max_steps": 4, "precision": "fp32", "device": "cpu", "sample_tokens": 4}
    return TrainConfig(data=shards, out=out, **{**values, **changes})


class FakeWandb(types.ModuleType):
    """Remembers what it is called with; a run that is resumed goes on under its id."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.inits, self.runs, self.finished = [], {}, 0
        self.Html = lambda text: ("html", text)

    def init(self, **options):
        if options["project"] == "refused":
            raise self.Error("not\nlogged in")
        self.inits.append(options)
        logged = self.runs.setdefault(options["id"], [])

        def finish():
            self.finished += 1

        return types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=finish)


@pytest.fixture
def wandb(monkeypatch):
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_what_metrics_has_and_a_resumed_run_goes_on_in_the_same_one(shards, tmp_path, wandb):
    out = tmp_path / "name"
    train(config(shards, out, wandb="project"))
    train(config(shards, out, wandb="project", max_steps=6, resume=True))
    first, second = wandb.inits
    assert first["project"] == "project"
    assert first["name"] == "name"
    assert first["resume"] == "allow"
    assert first["id"] == second["id"] == (out / "wandb_id").read_text().strip()
    assert first["config"] == {**json.loads((out / "config.json").read_text()), "max_steps": 4}
    assert wandb.finished == 2
    (logged,) = wandb.runs.values()
    records = metrics.read_metrics(out / "metrics.jsonl")
    assert [{"step": step, **values} for step, values in logged if "sample" not in values] == records
    assert [step for step, values in logged if "sample" in values] == [0, 4, 6]
    train(config(shards, tmp_path / "other", wandb="project", max_steps=1))
    assert len(wandb.runs) == 2


def test_wandb_refusals_are_one_line(shards, tmp_path, wandb, refused):
    args = ["train", "--data", shards, "--out", tmp_path / "run", "--preset", "micro", "--block-size", 32]
    assert "--wandb refused: not logged in" in refused(*args, "--wandb", "refused")


@pytest.mark.parametrize(("option", "package"), [("--tensorboard", "tensorboard"), ("--wandb=p", "wandb")])
def test_a_missing_package_is_named_before_anything_is_written(shards, tmp_path, monkeypatch, refused, option, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    line = refused("train", "--data", shards, "--out", tmp_path / "run", option)
    assert f"needs the package {package}: pip install 'fastgpt[{package}]'" in line
    assert not (tmp_path / "run").exists()


class FakeSummaryWriter:
    made = []

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars, self.texts, self.closed = folder, purge_step, [], [], False
        self.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def add_text(self, name, text, step):
        self.texts.append((name, text, step))

    def close(self):
        self.closed = True


def test_tensorboard_gets_what_metrics_has_and_drops_what_a_killed_run_wrote_later(shards, tmp_path, monkeypatch):
    fake = types.SimpleNamespace(SummaryWriter=FakeSummaryWriter)
    monkeypatch.setattr(writers, "_import_tensorboard", lambda: fake)
    out = tmp_path / "run"
    train(config(shards, out, tensorboard=True))
    train(config(shards, out, tensorboard=True, max_steps=6, resume=True))
    first, second = FakeSummaryWriter.made
    assert first.folder == second.folder == str(out / "tensorboard")
    assert (first.purge_step, second.purge_step) == (0, 5)
    assert first.closed
    assert second.closed
    records = metrics.read_metrics(out / "metrics.jsonl")
    scalars = [(name, value, r["step"]) for r in records for name, value in r.items() if name != "step"]
    assert first.scalars + second.scalars == scalars
    assert [step for _, _, step in first.texts + second.texts] == [0, 4, 6]


def test_tensorboard_itself_reads_the_run(shards, tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "run"
    train(config(shards, out, tensorboard=True))
    train(config(shards, out, tensorboard=True, max_steps=6, resume=True))
    events = loader.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    records = [r for r in metrics.read_metrics(out / "metrics.jsonl") if "loss" in r]
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("loss")] == [
        (r["step"], pytest.approx(r["loss"])) for r in records
    ]
