import io
import json
import shutil
import signal

import pytest
import torch
import transformers

from fastgpt import GPT, GPTConfig, Tokenizer, UserError, ops
from fastgpt.finetune.dialogues import read_dialogues
from fastgpt.finetune.instruct import InstructConfig, InstructionTuning, finetune_instruct, prepare
from fastgpt.model.adapter import save_adapter
from fastgpt.model.lora import adapted_layers, apply_lora
from fastgpt.template import ALPACA, CHATML, encode_dialogue, encode_prompt
from fastgpt.train.metrics import read_metrics

ANSWERS = {"Who sees the cat?": "Ada does.", "Who hides?": "It is Bo.", "What is red?": "The old hat."}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small gain nothing from a second thread, and lose much where it has to wait for a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    marks = "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n### Instruction:\nResponse "
    tokenizer = Tokenizer.train([(marks + " ".join([*ANSWERS, *ANSWERS.values()]) + " ") * 9], 320)
    tokenizer.save_pretrained(folder)
    model = GPT(GPTConfig.preset("micro", vocab_size=320, n_positions=96, resid_pdrop=0.1))
    model.save_pretrained(folder, tokenizer.eot_id)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "alpaca.json"
    path.write_text(json.dumps([{"instruction": q, "input": "", "output": a} for q, a in ANSWERS.items()]))
    return path


def options(base, data, out, *more):
    fixed = ["--val-data", data, "--precision", "fp32", "--batch-size", 1]
    return [
        "finetune",
        "instruct",
        "--model",
        base,
        "--data",
        data,
        "--out",
        out,
        "--template",
        "chatml",
        *fixed,
        *more,
    ]


@pytest.fixture(scope="module")
def run(base, data, tmp_path_factory):
    """A run that has learnt the answers; what it printed."""
    out = tmp_path_factory.mktemp("runs") / "chat"
    config = InstructConfig(
        out=out,
        model=base,
        data=data,
        val_data=data,
        template="chatml",
        epochs=60,
        batch_size=1,
        eval_interval=10,
        lr=5e-3,
        precision="fp32",
    )
    finetune_instruct(config)
    return out


def test_chat_says_what_was_learnt(cli, run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(["/reset\n" + q for q in ANSWERS])))
    code, text, _ = cli("chat", "--model", run, "--temperature", 0)
    assert code == 0
    assert text.splitlines() == list(ANSWERS.values())


def test_transformers_says_the_same(run):
    folder = run / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for question, answer in ANSWERS.items():
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        assert ids["input_ids"][0].tolist() == encode_prompt(Tokenizer.from_pretrained(folder), messages)
        new = model.generate(**ids, max_new_tokens=30, do_sample=False, pad_token_id=0)[0, ids["input_ids"].size(1) :]
        assert new[-1] == tokenizer.eos_token_id  # the end token is learnt
        assert tokenizer.decode(new[:-1]) == answer + "<|im_end|>"


def test_an_adapter_learns_it_too_and_peft_opens_it(cli, base, data, tmp_path):
    out = tmp_path / "run"
    args = ["--lora-rank", 8, "--epochs", 30, "--lr", 0.02, "--eval-interval", 20]
    before = (base / "model.safetensors").read_bytes()
    code, text, err = cli(*options(base, data, out, *args))
    assert code == 0, err
    for question, answer in ANSWERS.items():
        assert f": {question}\n  expected: {answer}\n  model:    {answer}\n" in text
    assert (base / "model.safetensors").read_bytes() == before
    assert not (out / "model/model.safetensors").exists()
    assert json.loads((out / "model/adapter_config.json").read_text())["lora_alpha"] == 16
    peft = pytest.importorskip("peft")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(out / "model")
    ids = torch.tensor([encode_prompt(Tokenizer.from_pretrained(out / "model"), dialogue("Who hides?", "")[:1])])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, GPT.from_pretrained(out)(ids), rtol=0, atol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(out / "model").chat_template == CHATML


def test_a_run_folder_holds_the_best_model_with_its_template(run):
    assert Tokenizer.from_pretrained(run / "model").chat_template == CHATML
    assert GPT.from_pretrained(run).config.resid_pdrop == 0.0
    val = {r["step"]: r["val_loss"] for r in read_metrics(run / "metrics.jsonl") if "val_loss" in r}
    best = min(list(val)[1:], key=val.get)
    assert val[best] < 0.1 < 4 < val[0]
    kept = run / f"checkpoints/step_{best}/model.safetensors"
    assert (run / "model/model.safetensors").read_bytes() == kept.read_bytes()
    assert json.loads((run / "config.json").read_text())["chat_template"] == CHATML


def test_from_the_command_line_with_held_out_dialogues(cli, base, tmp_path):
    records = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]}
        for i in range(20)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, records)))
    out = tmp_path / "run"
    args = ["finetune", "instruct", "--model", base, "--data", data, "--out", out, "--template", "chatml"]
    code, text, err = cli(*args, "--max-steps", 2, "--val-fraction", 0.2, "--precision", "fp32")
    assert code == 0, err
    assert "16 dialogues: " in text
    assert "held out: 4 dialogues" in text
    held_out = read_dialogues(out / "held_out.json")
    assert len(held_out) == 4
    assert all({"messages": d} in records for d in held_out)
    assert text.count("expected: ") == 3
    for dialogue in held_out[:3]:
        assert f": {dialogue[0]['content']}\n  expected: {dialogue[1]['content']}\n  model:    " in text
    assert f"fastgpt chat --model {out}" in text


LORA = ["--lora-rank", 4, "--lora-dropout", 0.2]


@pytest.mark.parametrize(
    "more", [[], LORA, [*LORA, "--quantize", "nf4", "--use-dora", "--use-rslora"]], ids=["all", "lora", "qdora"]
)
def test_resumed_it_goes_on_as_if_it_had_not_stopped(cli, base, data, tmp_path, more):
    steps = ["--eval-interval", 3, "--save-interval", 4, "--max-steps", 6]
    assert cli(*options(base, data, tmp_path / "whole", *steps, *more))[0] == 0
    whole = read_metrics(tmp_path / "whole/metrics.jsonl")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts/checkpoints/step_6")
    code, text, err = cli("finetune", "instruct", "--out", tmp_path / "parts", "--resume")
    assert code == 0, err
    assert "step_4" in text
    parts = read_metrics(tmp_path / "parts/metrics.jsonl")
    assert [r["loss"] for r in parts if "loss" in r] == [r["loss"] for r in whole if "loss" in r]
    assert [r["val_loss"] for r in parts if "val_loss" in r] == [r["val_loss"] for r in whole if "val_loss" in r]


def config(base, data, out, **changes):
    return InstructConfig(
        **{
            "out": out,
            "model": base,
            "data": data,
            "val_data": data,
            "template": "chatml",
            "precision": "fp32",
            **changes,
        }
    )


def test_only_responses_are_targets_unless_asked(base, data, tmp_path):
    task = InstructionTuning(config(base, data, tmp_path), None)
    tokenizer = task.tokenizer
    batch = task.data.next_batch(task.data.rows())
    assert task.weight(batch) == (batch.targets != -100).sum()
    said = tokenizer.decode(batch.targets[batch.targets != -100].tolist())
    assert sorted(said.split("<|im_end|><|endoftext|>")) == ["", *sorted(ANSWERS.values())]
    assert "user" not in said
    whole = InstructionTuning(config(base, data, tmp_path, train_on_prompt=True), None).next_batch()
    assert "user\nWho hides?" in tokenizer.decode(whole.targets[whole.targets != -100].tolist())


def test_frozen_weights_are_held_in_4_bits(base, data, tmp_path):
    task = InstructionTuning(config(base, data, tmp_path, lora_rank=4, quantize="nf4"), None)
    layers = adapted_layers(task.model)
    assert len(layers) == 8
    assert all(isinstance(layer.weight, ops.NF4Weight) for layer in layers.values())
    assert 0 < task.loss(task.next_batch()).item() < 10


def test_accumulated_gradients_are_those_of_one_batch(base, data, tmp_path):
    """Batches with different numbers of targets, weighed by them."""
    task = InstructionTuning(config(base, data, tmp_path, batch_size=1), None)
    rows = [task.next_batch() for _ in range(2)]
    rows[1].targets[:, :40] = -100
    assert rows[0].weight != rows[1].weight
    total = sum(batch.weight for batch in rows)
    mean = sum(task.loss(batch) * task.weight(batch) / total for batch in rows)
    sums = sum(task.model.loss(b.ids, b.targets, "sum", b.cu_seqlens) for b in rows)
    torch.testing.assert_close(mean, sums / total)


def dialogue(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_too_long_dialogues_are_cut_or_skipped_and_counted(base):
    tokenizer = Tokenizer.from_pretrained(base)
    tokenizer.chat_template = CHATML
    fits, long = dialogue("Who hides?", "Bo."), dialogue("Who hides?" * 30, "It is Bo.")
    hopeless = dialogue("Who hides?", "It is Bo." * 30)
    dialogues = [(f"row {i}", d) for i, d in enumerate([fits, long, hopeless, fits])]
    cut = prepare(tokenizer, dialogues, 64)
    assert (len(cut.examples), cut.cut, cut.skipped) == (3, 1, 1)
    assert cut.describe() == "3 dialogues, 1 of them cut at the left, 1 too long and skipped"
    ids, _ = encode_dialogue(tokenizer, long)
    assert cut.examples[1].ids == ids[-66:-1]  # all but the line end behind the end token
    assert tokenizer.decode(cut.examples[1].ids).endswith("It is Bo.<|im_end|><|endoftext|>")
    skipped = prepare(tokenizer, dialogues, 64, "skip")
    assert (len(skipped.examples), skipped.cut, skipped.skipped) == (2, 0, 2)
    with pytest.raises(UserError, match=r"row 2: the dialogue has \d+ tokens, its last response alone \d+, and the"):
        prepare(tokenizer, dialogues[2:3], 64)


def test_the_template_is_chosen(base, data, tmp_path):
    def template(**changes):
        return InstructionTuning(
            config(changes.pop("base", base), data, tmp_path, **changes), None
        ).tokenizer.chat_template

    assert template(template=None) == ALPACA
    own = tmp_path / "own"
    GPT.from_pretrained(base).save_pretrained(own)
    tokenizer = Tokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    tokenizer.save_pretrained(own)
    assert template(base=own, template=None) == template(base=own, template="tokenizer") == tokenizer.chat_template
    assert template(base=own, template="chatml") == CHATML


def test_a_signal_saves_and_makes_no_model(base, data, tmp_path, process):
    p = process(*options(base, data, tmp_path / "run", "--max-steps", 100_000))
    for line in p.stdout:
        if "step 0" in line:
            break
    p.send_signal(signal.SIGTERM)
    assert p.wait(60) == 128 + signal.SIGTERM
    assert list((tmp_path / "run/checkpoints").iterdir())
    assert not (tmp_path / "run/model").exists()
    assert "fastgpt finetune instruct --out" in (tmp_path / "run/log.txt").read_text()


def test_bad_input_gives_one_line(refused, base, data, tmp_path):
    out = tmp_path / "run"

    def line(*more, data=data, base=base):
        return refused(*options(base, data, out, *more))

    assert "no model at" in line(base=tmp_path / "none")
    assert "no such file" in line(data=tmp_path / "none.json")
    bad = tmp_path / "bad.json"
    bad.write_text('[{"instruction": "Hi", "output": "Ho"}, {"instruction": "Hi"}]')
    assert f"{bad}, row 2: the field 'output' is missing" in line(data=bad)
    assert "--quantize is of adapters: train them with --lora-rank 16" in line("--quantize", "nf4")
    assert "has no chat template: take --template" in line("--template", "tokenizer")
    assert "--block-size 97 is more than the 96 positions" in line("--block-size", 97)
    assert "the context is 8; none of the 3 dialogues fits" in line("--block-size", 8)
    assert "--block-size must be at least 1" in line("--block-size", 0)
    few = tmp_path / "few.json"
    few.write_text('[{"instruction": "Hi", "output": "Ho"}]')
    alone = ["finetune", "instruct", "--model", base, "--out", out]
    assert "has too few dialogues to hold some out" in refused(*alone, "--data", few)
    assert "--val-fraction must be above 0 and below 1" in refused(*alone, "--data", data, "--val-fraction", 0)
    own = tmp_path / "own"
    GPT.from_pretrained(base).save_pretrained(own)
    tokenizer = Tokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ raise_exception('roles must\nalternate') }}"
    tokenizer.save_pretrained(own)
    assert f"{data}, row 1: the chat template does not take this dialogue: roles must" in line(
        "--template", "tokenizer", base=own
    )
    tokenizer = Tokenizer(tokenizer.vocab | {b"qxqx": tokenizer.eot_id}, tokenizer.merges, {})
    tokenizer.save_pretrained(own)
    assert "has no end-of-text token" in line(base=own)
    Tokenizer.train(["abc " * 10], vocab_size=257).save_pretrained(own)
    assert "has 257 ids, the model 320" in line(base=own)
    adapter = tmp_path / "adapter"
    model = GPT.from_pretrained(base)
    apply_lora(model)
    save_adapter(model, adapter, base)
    assert "is an adapter, not a whole model: `fastgpt merge` it" in line(base=adapter)
    assert not out.exists()
