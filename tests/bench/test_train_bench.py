import json

import pytest

from fastgpt.bench import train, train_process
from fastgpt.bench.train import Trained, _compare, _notes, job_of

QUICK = ["bench", "train", "--quick", "--device", "cpu", "--precision", "fp32"]
SIZES = {"n_layer": None, "n_head": None, "n_embd": None, "vocab_size": 512}


@pytest.fixture(scope="module")
def measured(measured_by):
    """What one contender's measurement wrote and printed."""
    out, text = measured_by(*QUICK, "--vs", "nanogpt")
    return out / "here", text


def test_contenders_train_alike_in_processes_of_their_own(measured):
    folder, text = measured
    result = json.loads((folder / "train_micro_fp32.json").read_text())
    ours, nanogpt = result["contenders"]
    assert (ours["name"], nanogpt["name"]) == ("fastgpt", "nanogpt")
    assert ours["failed"] is nanogpt["failed"] is None
    assert ours["losses"][:10] == pytest.approx(nanogpt["losses"][:10], abs=1e-3)  # the same work
    assert len(ours["losses"]) == len(nanogpt["losses"])
    assert len(ours["seconds"]) == len(nanogpt["seconds"]) == 2
    assert nanogpt["ratios"][0] <= nanogpt["ratio"] <= nanogpt["ratios"][1]
    assert ours["ratio"] == 1
    for trained in (ours, nanogpt):
        assert trained["tokens_per_s"] > 0 < trained["mfu"]
        assert trained["peak_bytes"] > 12 * result["parameters"]  # weights and two moments
    assert nanogpt["memory_ratio"] == pytest.approx(ours["peak_bytes"] / nanogpt["peak_bytes"])
    assert (folder / "train_micro_fp32.png").read_bytes().startswith(b"\x89PNG")
    assert f"{nanogpt['ratio']:.2f}x" in text
    assert max(len(line.rstrip()) for line in text.split("fastgpt: ")[0].splitlines()[2:]) <= 100


def test_the_shares_of_the_ops_are_all_of_the_step(measured):
    shares = json.loads((measured[0] / "train_micro_fp32.json").read_text())["shares"]
    assert sum(shares.values()) == pytest.approx(1)
    assert {"linear", "attention", "layer_norm", "bias_gelu", "linear_cross_entropy", "embedding"} < set(shares)
    assert {"adamw_step", "clip_grad_norm", "other"} < set(shares)
    assert all(0 <= share < 0.9 for share in shares.values())


def test_what_cannot_be_measured_is_one_line(refused, monkeypatch, tmp_path):
    assert "--vs fly is no contender: take one or more of nanogpt, " in refused(*QUICK, "--vs", "fly")
    assert "--nanogpt-checkout" in refused(*QUICK, "--vs", "nanogpt", "--nanogpt-checkout", tmp_path)
    assert "no preset 'huge'" in refused("bench", "train", "--preset", "huge", "--device", "cpu")
    assert "n_embd must be a multiple of n_head" in refused(*QUICK, "--n-head", 3, "--n-embd", 64)
    assert "--rounds 0" in refused("bench", "train", "--rounds", 0)
    monkeypatch.setattr(train_process, "CONTENDERS", tmp_path / "contenders")
    assert "run it from a clone" in refused(*QUICK, "--vs", "nanogpt")


def job(**options):
    return job_of("micro", SIZES, 2, 16, "cpu", "fp32", options.get("checkout"))


def test_a_contender_that_fails_is_named_and_the_others_go_on(tmp_path):
    (tmp_path / "model.py").write_text("raise ValueError('not today')\n")
    result = train.measure(job(checkout=tmp_path), ["nanogpt"], 2, "here", False, lambda _: None)
    ours, other = result.contenders
    assert other.failed == "ValueError: not today"
    assert ours.failed is None
    assert len(ours.seconds) == 2


def test_a_checkout_of_nanogpt_is_taken_for_its_model(tmp_path):
    (tmp_path / "model.py").write_text(
        "from dataclasses import dataclass\n"
        "from contenders.nanogpt import Model\n"
        "@dataclass\n"
        "class GPTConfig:\n"
        "    block_size: int\n    vocab_size: int\n    n_layer: int\n    n_head: int\n    n_embd: int\n"
        "    dropout: float\n    bias: bool\n"
        "class GPT(Model):\n"
        "    def __init__(self, c):\n"
        "        assert c.bias and not c.dropout\n"
        "        super().__init__(c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd)\n"
    )
    result = train.measure(job(checkout=tmp_path), ["nanogpt"], 1, "here", False, lambda _: None)
    assert result.contenders[1].about == "nanoGPT, its own model.py"
    assert not [note for note in result.notes if "not the same work" in note]


def test_ratios_are_taken_round_by_round():
    ours = Trained("fastgpt", seconds=[1.0, 2.0, 4.0], losses=[3.0], peak_bytes=50)
    other = Trained("nanogpt", seconds=[2.0, 3.0, 10.0], losses=[3.1], peak_bytes=100)
    _compare([ours, other], job(), 1e9)
    assert other.ratio == 2.0  # of 2, 1.5 and 2.5
    assert other.ratios == (1.5, 2.5)
    assert other.memory_ratio == 0.5
    assert ours.tokens_per_s == 2 * 16 / 2
    assert ours.mfu == ours.tokens_per_s * job().config.flops_per_token(16) / 1e9
    assert "nanogpt: its losses differ" in _notes([ours, other], "fp32", 0.0)[0]


@pytest.mark.slow
def test_growth_has_a_table_and_a_picture(cli, tmp_path):
    code, text, err = cli(*QUICK, "--grow", "--rounds", 1, "--out", tmp_path, "--machine", "here")
    assert code == 0, err
    found = json.loads((tmp_path / "here" / "train_micro_fp32_grow.json").read_text())
    assert set(found) == {"T", "width", "depth"}
    assert [r["block_size"] for r in found["T"]] == [8, 16, 32, 64, 128]
    assert (tmp_path / "here" / "train_micro_fp32_grow.png").read_bytes().startswith(b"\x89PNG")
    assert "width" in text
