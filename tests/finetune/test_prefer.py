import json
import math
import shutil

import pytest
import torch
import transformers

from fastgpt import GPT, GPTConfig, Tokenizer, UserError
from fastgpt.finetune.prefer import (
    PreferConfig,
    PreferenceTuning,
    dpo_loss,
    finetune_prefer,
    prepare,
    read_preferences,
    sequence_log_probs,
)
from fastgpt.model.lora import set_adapter
from fastgpt.template import CHATML
from fastgpt.train.metrics import read_metrics

QUESTIONS = ["Who sees the cat?", "Who hides?", "What is red?", "Who is it?"]
# What is preferred can be learnt: the answer that is polite.
PAIRS = [
    {"prompt": f"{question} {i}", "chosen": f"It is {name}, please.", "rejected": f"{name}!"}
    for i, question in enumerate(QUESTIONS)
    for name in ("Ada", "Bo", "Cy", "Dee")
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    marks = "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n### Instruction:\nResponse "
    words = " ".join([*QUESTIONS, *(p["chosen"] for p in PAIRS)])
    tokenizer = Tokenizer.train([(marks + words + " ") * 9], 320)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    model = GPT(GPTConfig.preset("micro", vocab_size=320, n_positions=96, resid_pdrop=0.1))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    model.save_pretrained(folder, tokenizer.eot_id)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "pairs.jsonl", PAIRS)


def config(base, data, out, **changes):
    return PreferConfig(**{"out": out, "model": base, "data": data, "precision": "fp32", "seed": 1, **changes})


def plain_log_prob(hf, tokenizer, prompt, answer):
    """The sum over the answer's tokens, its end included, from transformers' logits."""
    messages = [{"role": "user", "content": prompt}]
    before = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    messages.append({"role": "assistant", "content": answer})
    ids = tokenizer.apply_chat_template(messages)["input_ids"]
    ids = ids[: ids.index(tokenizer.eos_token_id) + 1]
    assert ids[: len(before)] == before
    log_p = hf(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    return sum(log_p[i - 1, ids[i]] for i in range(len(before), len(ids)))


@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (0.3, 0.2)])
def test_the_loss_and_its_gradient_are_the_papers(base, data, beta, smoothing):
    """In float64 from transformers' logits; the model differs from its reference."""
    tokenizer = Tokenizer.from_pretrained(base)
    preferences = read_preferences(data)[::6]
    examples = [side for pair in prepare(tokenizer, preferences, 96).examples for side in pair]
    reference = GPT.from_pretrained(base)
    model = GPT.from_pretrained(base).train()
    model.set_dropout(0.0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
        log_q = sequence_log_probs(reference, examples).view(-1, 2)
    log_p = sequence_log_probs(model, examples).view(-1, 2)
    losses, margins = dpo_loss(log_p[:, 0], log_p[:, 1], log_q[:, 0], log_q[:, 1], beta, smoothing)
    losses.mean().backward()

    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    hf_reference = transformers.AutoModelForCausalLM.from_pretrained(base).double().eval()
    hf = transformers.AutoModelForCausalLM.from_pretrained(base).double().eval()
    ours = dict(model.named_parameters())
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    for name, p in hf.named_parameters():
        source = ours[name].detach()[: p.size(0)] if "wte" in name else ours[name].detach()
        p.data = (source.T if name.endswith(turned) else source).double().contiguous()
    expected = []
    for preference in preferences:
        prompt = preference.chosen[0]["content"]
        sides = [d[1]["content"] for d in (preference.chosen, preference.rejected)]
        with torch.no_grad():
            q_w, q_l = (plain_log_prob(hf_reference, hf_tokenizer, prompt, side) for side in sides)
        p_w, p_l = (plain_log_prob(hf, hf_tokenizer, prompt, side) for side in sides)
        h = beta * (p_w - q_w) - beta * (p_l - q_l)
        loss = -(1 - smoothing) * torch.log(1 / (1 + torch.exp(-h))) - smoothing * torch.log(1 / (1 + torch.exp(h)))
        expected.append((loss, h))
    expected_losses, expected_margins = (torch.stack(column) for column in zip(*expected, strict=True))
    torch.testing.assert_close(losses.double(), expected_losses, rtol=0, atol=1e-5)
    torch.testing.assert_close(margins.double(), expected_margins, rtol=0, atol=1e-5)
    assert margins.abs().max() > 0.1
    expected_losses.mean().backward()
    for name, p in hf.named_parameters():
        gradient = ours[name].grad[: p.size(0)] if "wte" in name else ours[name].grad
        gradient = gradient.T if name.endswith(turned) else gradient
        torch.testing.assert_close(gradient.double(), p.grad, rtol=1e-4, atol=1e-5)


def test_what_is_preferred_is_learnt(base, data, tmp_path, cli):
    args = ["finetune", "prefer", "--model", base, "--data", data, "--out", tmp_path / "run", "--precision", "fp32"]
    code, text, err = cli(*args, "--epochs", 5, "--lr", 1e-3, "--val-fraction", 0.25, "--eval-interval", 5)
    assert code == 0, err
    assert "12 pairs; held out: 4 pairs" in text
    found = [r for r in read_metrics(tmp_path / "run/metrics.jsonl") if "val_loss" in r]
    assert found[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found[0]["val_reward_margin"] == pytest.approx(0, abs=1e-5)
    assert "train_reward_accuracy" not in found[0]
    assert found[-1]["val_reward_accuracy"] == 1
    assert found[-1]["train_reward_accuracy"] == 1
    assert found[-1]["val_reward_margin"] > found[1]["val_reward_margin"] > 0.01
    assert found[-1]["train_reward_margin"] > found[1]["train_reward_margin"]
    assert found[-1]["val_loss"] < 0.6
    assert "val reward accuracy 1.0000" in text
    # And the model that is written prefers them.
    model, tokenizer = GPT.from_pretrained(tmp_path / "run"), Tokenizer.from_pretrained(tmp_path / "run/model")
    examples = [side for pair in prepare(tokenizer, read_preferences(data), 96).examples for side in pair]
    with torch.no_grad():
        gain = (sequence_log_probs(model, examples) - sequence_log_probs(GPT.from_pretrained(base), examples)).view(
            -1, 2
        )
    assert (gain[:, 0] > gain[:, 1]).all()
    assert tokenizer.chat_template == CHATML


def test_an_adapter_alone_is_trained_and_its_base_is_the_reference(base, data, tmp_path):
    task = PreferenceTuning(config(base, data, tmp_path / "x", lora_rank=4), None)
    assert {n.rsplit(".", 1)[1] for n, p in task.model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert task.config.lr == pytest.approx(10 * PreferenceTuning(config(base, data, tmp_path / "x"), None).config.lr)
    out = tmp_path / "run"
    finetune_prefer(config(base, data, out, lora_rank=4, epochs=3, lr=3e-3))
    found = [r for r in read_metrics(out / "metrics.jsonl") if "val_loss" in r]
    assert found[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found[-1]["val_loss"] < 0.6
    assert sorted(p.name for p in (out / "model").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    trained = GPT.from_pretrained(out)
    examples = [side for pair in task.pairs.examples for side in pair]
    with torch.no_grad():
        learnt = sequence_log_probs(trained, examples).view(-1, 2)
        set_adapter(trained, None)
        torch.testing.assert_close(sequence_log_probs(trained, examples).view(-1, 2), task.reference)
    assert (learnt - task.reference).abs().min() > 0


@pytest.mark.parametrize("rank", [0, 2])
def test_resumed_it_goes_on_as_if_it_had_not_stopped(cli, base, data, tmp_path, rank):
    args = ["finetune", "prefer", "--model", base, "--data", data, "--precision", "fp32", "--lr", 1e-3]
    args += ["--max-steps", 6, "--eval-interval", 3, "--save-interval", 2, "--lora-rank", rank]
    if rank:
        args += ["--lora-dropout", 0.2]
    assert cli(*args, "--out", tmp_path / "whole")[0] == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for step in (3, 6):
        shutil.rmtree(tmp_path / f"parts/checkpoints/step_{step}", ignore_errors=True)
    code, text, err = cli("finetune", "prefer", "--out", tmp_path / "parts", "--resume")
    assert code == 0, err
    assert f"resumed from {tmp_path / 'parts/checkpoints/step_4'}" in text

    def figures(run):
        names = ("loss", "val_loss", "val_reward_margin", "train_reward_margin")
        return [[r[n] for n in names if n in r] for r in read_metrics(tmp_path / run / "metrics.jsonl")]

    assert figures("parts") == figures("whole")
    assert len({tuple(f) for f in figures("whole")}) > 6


USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "Who?"), ("assistant", "Bo."), ("assistant", "Cy.")))
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Who?", "chosen": "Bo.", "rejected": "Cy."},
        {"prompt": [USER], "chosen": "Bo.", "rejected": "Cy."},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Who?", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score": 3},
        {"instruction": "Who?", "input": "", "output": "Dee.", "chosen": "Bo.", "rejected": "Cy."},
    ],
)
def test_pairs_come_in_several_forms(tmp_path, record):
    (found,) = read_preferences(write(tmp_path / "pairs.jsonl", [record]))
    assert (found.prompt, found.chosen, found.rejected) == (1, [USER, GOOD], [USER, BAD])


def test_the_prompt_is_what_both_begin_with_and_only_the_answers_count(base, tmp_path):
    tokenizer = Tokenizer.from_pretrained(base)
    before = [SYSTEM, USER, GOOD]
    again = {"role": "user", "content": "Sure?"}
    record = {
        "chosen": [*before, USER, BAD, again, GOOD],
        "rejected": [*before, USER, GOOD, again, GOOD],
    }
    (found,) = read_preferences(write(tmp_path / "pairs.jsonl", [record]))
    assert found.prompt == 4
    ((chosen, rejected),) = prepare(tokenizer, [found], 200).examples
    for side, said in ((chosen, ("Cy.", "Bo.")), (rejected, ("Bo.", "Bo."))):
        trained = tokenizer.decode(i for i, t in zip(side.ids, side.trained, strict=True) if t)
        assert trained == "".join(f"{text}<|im_end|><|endoftext|>" for text in said)


def test_long_prompts_are_cut_alike_and_counted(base, tmp_path):
    tokenizer = Tokenizer.from_pretrained(base)
    rows = [
        {"prompt": "Who?", "chosen": "Bo.", "rejected": "Cy."},
        {"prompt": "Who hides? " * 30, "chosen": "It is Bo, please.", "rejected": "Cy."},
        {"prompt": "Who?", "chosen": "Bo.", "rejected": "Cy and Bo. " * 30},
    ]
    pairs = prepare(tokenizer, read_preferences(write(tmp_path / "pairs.jsonl", rows)), 60)
    assert pairs.describe() == "2 pairs, 1 of them cut at the left, 1 skipped, whose answers alone are too long"
    chosen, rejected = pairs.examples[1]
    assert chosen.length == 60
    start = chosen.trained.index(True)
    assert chosen.ids[:start] == rejected.ids[:start]
    assert rejected.trained.index(True) == start
    assert tokenizer.decode(chosen.ids).endswith("assistant\nIt is Bo, please.<|im_end|><|endoftext|>")
    with pytest.raises(UserError, match=r"line 3: its answers alone do not fit into the 60 tokens"):
        prepare(tokenizer, read_preferences(tmp_path / "pairs.jsonl")[2:], 60)


BAD_ROWS = [
    ({"prompt": "Who?", "chosen": "Bo."}, "the field 'rejected' is missing (it has 'prompt', 'chosen')"),
    ({"chosen": "Bo.", "rejected": "Cy."}, "the field 'prompt' is missing"),
    ({"prompt": "Who?", "chosen": "Bo.", "rejected": " "}, "the field 'rejected' is empty"),
    ({"prompt": "Who?", "chosen": 3, "rejected": "Cy."}, "the field 'chosen' must be a text or a list of messages"),
    ({"prompt": "Who?", "chosen": ["Bo."], "rejected": "Cy."}, "the field 'chosen' must be a text or a list"),
    ({"prompt": "Who?", "chosen": [], "rejected": "Cy."}, "the field 'chosen' must be a text or a list of messages"),
    ({"prompt": "Who?", "chosen": "Bo.", "rejected": "Bo. "}, "chosen and rejected are the same: remove that pair"),
    ({"prompt": " ", "chosen": "Bo.", "rejected": "Cy."}, "'content' is empty"),
    ({"chosen": [USER, GOOD], "rejected": [USER]}, "no assistant answers it"),
    ({"chosen": [USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, "must begin with the same prompt"),
    (
        {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, {**USER, "content": "So?"}, GOOD]},
        "must begin with the same prompt",
    ),
    ({"prompt": [GOOD], "chosen": "Bo.", "rejected": "Cy."}, "the order of roles makes no sense"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=[m for _, m in BAD_ROWS])
def test_a_bad_row_is_named(refused, base, tmp_path, row, message):
    path = write(tmp_path / "pairs.jsonl", [PAIRS[0], row])
    line = refused("finetune", "prefer", "--model", base, "--data", path, "--out", tmp_path / "run")
    assert f"{path}, line 2" in line
    assert message in line
    assert not (tmp_path / "run").exists()


def test_bad_input_gives_one_line(refused, cli, base, data, tmp_path):
    def line(*more, data=data, base=base):
        return refused("finetune", "prefer", "--model", base, "--data", data, "--out", tmp_path / "run", *more)

    assert "no model at" in line(base=tmp_path / "none")
    assert "no such file" in line(data=tmp_path / "none.json")
    assert "--beta must be above 0" in line("--beta", 0)
    assert "--label-smoothing must be at least 0 and below 0.5" in line("--label-smoothing", 0.5)
    assert "--val-fraction must be above 0" in line("--val-fraction", 0)
    assert "--block-size 97 is more than the 96 positions" in line("--block-size", 97)
    assert "has too few pairs to hold some out: it has 1" in line(data=write(tmp_path / "one.jsonl", PAIRS[:1]))
    other = tmp_path / "other"
    fast = ["--max-steps", 1, "--lora-rank", 2, "--precision", "fp32"]
    assert cli("finetune", "prefer", "--model", base, "--data", data, "--out", other, *fast)[0] == 0
    assert "is an adapter, not a whole model" in line(base=other)
    less = write(tmp_path / "less.jsonl", PAIRS[:8])
    copy = tmp_path / "copy.jsonl"
    shutil.copyfile(data, copy)
    assert cli("finetune", "prefer", "--model", base, "--data", copy, "--out", tmp_path / "a", *fast)[0] == 0
    shutil.copyfile(less, copy)
    again = refused("finetune", "prefer", "--out", tmp_path / "a", "--resume", "--max-steps", 2)
    assert "is not the file that the run was started on: it gives 7 pairs where there were 14" in again
    assert not (tmp_path / "run").exists()
