"""`fastgpt eval`, as a user runs it."""

import json
import shutil

import pytest
import torch

from fastgpt import GPT, Tokenizer, UserError
from fastgpt.evaluate import EvalConfig, evaluate
from fastgpt.evaluate.judge import Judge
from fastgpt.evaluate.responses import respond
from fastgpt.template import TEMPLATES, encode_prompt

ARC = [
    {"question": "Who | what?", "choices": {"text": ["the sea", "Bo"], "label": ["A", "B"]}, "answerKey": k}
    for k in "ABAB"
]


@pytest.fixture
def arc(tmp_path):
    path = tmp_path / "arc.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in ARC))
    return path


@pytest.fixture
def fake_judge(monkeypatch):
    """A judge without a server, which gives 40 to every answer but Bo, which it does not score."""

    def ask(self, question):
        return "well" if "\nBo\n" in question else "40"

    monkeypatch.setattr(Judge, "ask", ask)
    return ["--judge-url", "http://localhost:1/v1", "--judge-model", "judge-1"]


def test_all_at_once(cli, taught, shards, arc, instructions, fake_judge, tmp_path):
    out = tmp_path / "deep" / "out"
    code, text, err = cli(
        "eval", "--model", taught, "--data", shards, "--choices", arc, arc, "--responses", instructions,
        *fake_judge, "--out", out, "--max-new-tokens", 40,
    )  # fmt: skip
    assert code == 0, err
    found = json.loads((out / "eval.json").read_text())
    assert found["model"] == str(taught)
    assert found["perplexity"]["perplexity"] > 1
    assert [c["format"] for c in found["choices"]] == ["arc", "arc"]
    assert found["choices"][0]["accuracy"] == 0.5  # each answer is right twice
    assert found["choices"][0]["accuracy_stderr"] == pytest.approx((0.25 / 3) ** 0.5)
    responses = found["responses"]
    assert [i["answer"] for i in responses["items"]] == ["Ada sees the sea.", "Two hats!", "Bo"]
    assert [i["prompt"] for i in responses["items"]] == ["Who sees the sea?", "What is hidden?", "Who is it?"]
    assert (responses["exact_match"], responses["rouge_l"], responses["cut"]) == (1, 1, 0)
    assert (responses["judge"], responses["unscored"]) == (40, 1)
    assert responses["items"][2]["judge_reply"] == "well"
    lines = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    assert lines == responses["items"]
    page = (out / "eval.md").read_text()
    assert page.startswith("# Evaluation of ")
    for part in ("## Perplexity", "## Multiple choice", "## Responses", "50.0 ± 28.9", "1 of 3", "Two hats!"):
        assert part in page
    for said in ("bits per byte", "raw 50.0 ± 28.9", "exact match 100.0, ROUGE-L 100.0, judge 40.0", str(out)):
        assert said in text
    assert found["perplexity"]["bits_per_byte"] == pytest.approx(
        float(text.split(" bits per byte")[0].split()[-1]), abs=1e-3
    )


def test_an_evaluation_is_not_overwritten(cli, refused, taught, arc, tmp_path):
    out = tmp_path / "out"
    args = ["eval", "--model", taught, "--choices", arc, "--out", out]
    assert cli(*args)[0] == 0
    before = (out / "eval.json").read_bytes()
    assert "already holds an evaluation" in refused(*args)
    assert (out / "eval.json").read_bytes() == before
    assert sorted(p.name for p in out.iterdir()) == ["eval.json", "eval.md"]


def test_nothing_is_written_without_out(cli, taught, arc, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cli("eval", "--model", taught, "--choices", arc)[0] == 0
    assert not list((tmp_path / "here").iterdir())


def test_a_judge_that_fails_leaves_the_rest(refused, taught, instructions, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("fastgpt.evaluate.judge.time.sleep", lambda seconds: None)
    line = refused(
        "eval", "--model", taught, "--responses", instructions, "--out", tmp_path / "out", "--max-new-tokens", 40,
        "--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m",
    )  # fmt: skip
    assert "the judge at http://127.0.0.1:9/v1 cannot be reached" in line
    found = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert found["responses"]["exact_match"] == 1
    assert "judge" not in found["responses"]


def test_limit_takes_the_first(taught, arc, instructions):
    found = evaluate(EvalConfig(taught, choices=(arc,), responses=instructions, limit=1, max_new_tokens=1))
    assert found["choices"][0]["questions"] == 1
    assert found["choices"][0]["accuracy_stderr"] == 0
    assert found["responses"]["count"] == 1
    assert found["responses"]["items"][0]["expected"] == "Ada sees the sea."


@pytest.mark.parametrize("template", ["alpaca", "chatml"])
def test_a_response_is_what_generate_says_up_to_its_end(taught, template):
    model, tokenizer = GPT.from_pretrained(taught), Tokenizer.from_pretrained(taught)
    user, answer = {"role": "user", "content": "Who is it?"}, {"role": "assistant", "content": "Bo"}
    dialogues = [
        [user, answer],
        [{"role": "system", "content": "Be brief."}, user, answer, user, {"role": "assistant", "content": "Cy"}],
    ]
    items, cut = respond(model, tokenizer, dialogues, 30, TEMPLATES[template], batch_size=1)
    room = model.config.n_positions - 30
    for dialogue, item in zip(dialogues, items, strict=True):
        ids = encode_prompt(tokenizer, dialogue[:-1], TEMPLATES[template])[-room:]
        new = model.generate(torch.tensor([ids]), 30, temperature=0, eos_id=tokenizer.eot_id)[0, len(ids) :].tolist()
        said = tokenizer.decode(new).split("<|endoftext|>")[0]
        said = said.split("<|im_end|>" if template == "chatml" else "### Instruction:")[0]
        assert item["answer"] == said.strip()
        assert item["expected"] == dialogue[-1]["content"]
    assert cut == sum(len(encode_prompt(tokenizer, d[:-1], TEMPLATES[template])) > room for d in dialogues) > 0
    assert items[1]["prompt"] == "system: Be brief.\n\nuser: Who is it?\n\nassistant: Bo\n\nuser: Who is it?"


def test_what_a_model_says_cannot_break_the_page(taught):
    from fastgpt.evaluate.report import markdown

    item = {"prompt": "```\n# not a title", "expected": "a|b", "answer": "````", "exact_match": False, "rouge_l": 0.0}
    page = markdown(
        {
            "model": "a|b", "date": "d", "fastgpt": "1", "torch": "2", "device": "cpu", "limit": 7,
            "responses": {"file": "a|b", "count": 1, "exact_match": 0, "rouge_l": 0, "cut": 1, "items": [item]},
        }
    )  # fmt: skip
    assert "````text\n```\n# not a title\n````\n" in page
    assert "`````text\n````\n`````\n" in page
    assert "| a\\|b | 1 | 0.0 | 0.0 |" in page
    assert "1 of 1 prompts were too long" in page
    assert "the first 7 at the most" in page


def test_bad_input_gives_one_line(refused, taught, shards, arc, instructions, tmp_path):
    run = ["eval", "--model", taught]
    assert "nothing to evaluate: give --data, --choices or --responses" in refused(*run)
    assert "go together" in refused(*run, "--responses", instructions, "--judge-url", "http://x")
    assert "is for --responses" in refused(*run, "--data", shards, "--judge-url", "http://x", "--judge-model", "m")
    assert "must begin with http" in refused(
        *run, "--responses", instructions, "--judge-url", "ftp://x", "--judge-model", "m"
    )
    assert "--limit must be at least 1" in refused(*run, "--choices", arc, "--limit", 0)
    assert "no such file" in refused(*run, "--choices", arc, tmp_path / "none.jsonl")
    assert "no such file" in refused(*run, "--responses", tmp_path / "none.jsonl")
    assert "no model at" in refused("eval", "--model", tmp_path / "none", "--choices", arc)
    (tmp_path / "bad.jsonl").write_text('{"instruction": "x"}\n')
    assert "line 1: the field 'output' is missing" in refused(*run, "--responses", tmp_path / "bad.jsonl")
    shutil.copytree(taught, tmp_path / "bare")
    config = json.loads((tmp_path / "bare" / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "bare" / "tokenizer_config.json").write_text(json.dumps(config))
    line = refused("eval", "--model", tmp_path / "bare", "--responses", instructions)
    assert "has no chat template" in line
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(*run, "--choices", arc, "--out", tmp_path / "file" / "out")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(taught, arc, tmp_path):
    shutil.copytree(taught, tmp_path / "model")
    tokenizer = Tokenizer.from_pretrained(taught)
    more = Tokenizer(tokenizer.vocab, tokenizer.merges, {**tokenizer.special_tokens, "<|x|>": tokenizer.vocab_size})
    more.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="has 291 ids, the model 290"):
        evaluate(EvalConfig(tmp_path / "model", choices=(arc,)))
