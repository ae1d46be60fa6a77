"""fastgpt chat: the dialogue's logic with answers that are given, and the command as a user runs it."""

import io
import json
import signal
import subprocess

import pytest
import torch

import fastgpt.chat
from fastgpt import GPT, GPTConfig, Tokenizer, UserError
from fastgpt.chat import Chat, converse, stream_answer, turn_ends
from fastgpt.finetune.dialogues import read_dialogues
from fastgpt.template import ALPACA, CHATML, encode_prompt

MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig.preset("micro", vocab_size=280, n_positions=192)).eval()


@pytest.fixture(scope="module")
def tokenizer():
    text = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nAda<|im_end|>\n<|im_start|>assistant\nsees<|im_end|>\n"
    tokenizer = Tokenizer.train([text * 9], 280)
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def says(monkeypatch, tokenizer):
    """Makes the model say given texts, one after the other; the list of the prompts that it was given."""
    prompts = []

    def script(*answers, with_tokenizer=tokenizer):
        left = list(answers)

        def stream(model, ids, max_new_tokens, **options):
            prompts.append(ids[0].tolist())
            new = with_tokenizer.encode(left.pop(0), allowed_special=with_tokenizer.special_tokens)
            for i in new[:max_new_tokens]:
                yield torch.tensor([i])

        monkeypatch.setattr(fastgpt.chat, "stream", stream)
        return prompts

    return script


def talk(chat, *lines):
    """What is written and what is said when these lines are typed; an exception is raised where a line would be."""
    left, written, said = list(lines), [], []

    def read():
        if not left:
            raise EOFError
        if isinstance(left[0], type):
            raise left.pop(0)
        return left.pop(0)

    converse(chat, read, written.append, said.append)
    return "".join(written), said


def test_what_ends_a_turn(tokenizer):
    eot = tokenizer.eot_id
    assert turn_ends(tokenizer) == ({eot}, ["<|im_end|>", "<|im_start|>user"])
    assert turn_ends(tokenizer, ALPACA) == ({eot}, ["### Instruction:"])
    marks = Tokenizer.train(["Ada"], 259, MARKS)
    assert turn_ends(marks, CHATML) == (set(marks.special_tokens.values()), ["user"])


@pytest.mark.parametrize(
    ("template", "made", "answer"),
    [
        (CHATML, "Ada<|im_end|><|endoftext|>\nmore", "Ada"),
        (CHATML, "Ada<|endoftext|>more", "Ada"),
        (CHATML, "A <|im_ends<|im_end|>", "A <|im_ends"),
        (CHATML, "Ada<|im_e", "Ada<|im_e"),
        (ALPACA, "Ada\n\n### Instruction:\nMore", "Ada\n\n"),
        (ALPACA, "é ### Inst", "é ### Inst"),
    ],
)
def test_an_answer_ends_where_the_turn_does(model, tokenizer, says, template, made, answer):
    says(made)
    pieces = list(stream_answer(model, tokenizer, tokenizer.encode("x"), template))
    assert "".join(pieces) == answer
    assert len(pieces) > 1


def test_an_answer_ends_with_the_context(model, tokenizer):
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "x" * 150}])
    answer = "".join(stream_answer(model, tokenizer, prompt, max_new_tokens=10_000, temperature=0))
    assert 0 < len(tokenizer.encode(answer)) <= 192 - len(prompt)
    with pytest.raises(UserError, match="the prompt has 192 tokens, which leaves no room for an answer in the 192"):
        next(stream_answer(model, tokenizer, [1] * 192))


def test_the_dialogue_is_what_the_model_reads(model, tokenizer, says):
    prompts = says("Ho<|im_end|>", "Ada.<|im_end|>")
    chat = Chat(model, tokenizer, system="Be brief. ")
    assert talk(chat, " Hi \n", "", "Who?") == ("Ho\nAda.\n", [])
    assert tokenizer.decode(prompts[1]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "Ho<|im_end|><|endoftext|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_oldest_turns_are_dropped_and_it_is_said_once(model, tokenizer, says):
    prompts = says(*["Ho " * 8] * 5)
    chat = Chat(model, tokenizer, system="Be brief", max_new_tokens=24)
    _, said = talk(chat, "One", "Two", "Three", "Four", "Five")
    assert said == ["(the dialogue is longer than the model reads: its oldest turns are no longer seen)"]
    assert all(len(prompt) + 24 <= 192 for prompt in prompts)
    texts = [tokenizer.decode(prompt) for prompt in prompts]
    assert all(text.startswith("<|im_start|>system\nBe brief") for text in texts)
    assert "One" in texts[0]
    assert "One" not in texts[-1]
    assert "Five" in texts[-1]
    assert [m["content"] for m in chat.turns[::2]] == ["One", "Two", "Three", "Four", "Five"]  # all is saved


def test_a_message_that_does_not_fit_is_said_and_forgotten(model, tokenizer, says):
    says("Ho<|im_end|>")
    chat = Chat(model, tokenizer)
    written, said = talk(chat, "x" * 200, "Hi")
    assert written == "Ho\n"
    assert "tokens, the model reads at most 192: shorten it" in said[0]
    assert [m["content"] for m in chat.turns] == ["Hi", "Ho"]


def test_a_long_message_may_take_the_answers_room(model, tokenizer, says):
    prompts = says("Ho<|im_end|>", "Ho<|im_end|>")
    chat = Chat(model, tokenizer)
    assert talk(chat, "Hi", "x" * 150)[0] == "Ho\nHo\n"
    assert 192 - 48 < len(prompts[1]) < 192
    assert "Hi" not in tokenizer.decode(prompts[1])


def test_commands(model, tokenizer, says, tmp_path):
    says("Ho<|im_end|>", "Ha<|im_end|>", "He<|im_end|>")
    chat = Chat(model, tokenizer, system="Be brief")
    path = tmp_path / "dialogues.jsonl"
    written, said = talk(
        chat,
        f"/save {path}",
        "Hi",
        "Hi again",
        f"/save {path}",
        "/reset",
        "/save",
        "/x",
        "/help",
        "Hey",
        f"/save {path}",
    )
    assert written == "Ho\nHa\nHe\n"
    assert said[0] == "(there is no dialogue to save yet)"
    assert said[1:4] == [f"(saved to {path})", "(a new dialogue)", "(name a file: /save FILE)"]
    assert said[4] == "(there is no /x: /help lists the commands)"
    assert "/reset" in said[5]
    dialogues = read_dialogues(path)
    assert [[m["content"] for m in d] for d in dialogues] == [
        ["Be brief", "Hi", "Ho", "Hi again", "Ha"],
        ["Be brief", "Hey", "He"],
    ]
    assert talk(chat, "/exit", "Hi") == ("", [])
    assert "cannot write" in talk(chat, f"/save {tmp_path / 'none' / 'x'}")[1][0]
    assert "cannot write" in talk(chat, f"/save {tmp_path}")[1][0]


def test_saving_keeps_what_a_file_had(model, tokenizer, says, tmp_path):
    says("Ho<|im_end|>")
    path = tmp_path / "dialogues.jsonl"
    path.write_text('{"a": 1}')
    talk(Chat(model, tokenizer), "Hi", f"/save {path}")
    first, second = path.read_text().splitlines()
    assert first == '{"a": 1}'
    assert json.loads(second)["messages"][1] == {"role": "assistant", "content": "Ho"}


def test_an_interrupt_stops_the_answer_and_not_the_program(model, tokenizer, says):
    says("Ada sees a cat.<|im_end|>", "Ho<|im_end|>")
    chat = Chat(model, tokenizer)
    lines, written, said = iter(["Hi", "Hi again"]), [], []

    def write(piece):
        written.append(piece)
        if len(written) == 3:
            raise KeyboardInterrupt

    def read():
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    converse(chat, read, write, said.append)
    assert [m["content"] for m in chat.turns][2:] == ["Hi again", "Ho"]
    assert 0 < len(chat.turns[1]["content"]) < len("Ada sees a cat.")
    assert "Ada sees a cat.".startswith(chat.turns[1]["content"])
    assert talk(chat, KeyboardInterrupt, "/exit") == ("\n", ["(/exit or Ctrl-D leaves)"])


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    model.save_pretrained(folder, tokenizer.eot_id)
    tokenizer.save_pretrained(folder)
    return folder


def test_piped_lines_are_answered(cli, folder, monkeypatch):
    def run(*args):
        monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n/none\nHo"))
        return cli("chat", "--model", folder, "--max-new-tokens", 5, *args)

    code, out, err = run("--seed", 3)
    assert code == 0
    assert out
    assert err == "(there is no /none: /help lists the commands)\n"
    assert run("--seed", 3)[1] == out
    assert run("--seed", 4)[1] != out


def test_ctrl_c_in_a_terminals_process(folder, process):
    p = process("chat", "--model", folder, "--max-new-tokens", 100_000, "--template", "alpaca", stdin=subprocess.PIPE)
    p.stdin.write("/none\n")
    p.stdin.flush()
    assert "there is no /none" in p.stderr.readline()  # it reads by now
    p.send_signal(signal.SIGINT)
    assert "/exit or Ctrl-D leaves" in p.stderr.readline()
    p.stdin.write("/exit\n")
    p.stdin.flush()
    assert p.wait(20) == 0


def test_bad_input_gives_one_line(refused, folder, tmp_path):
    assert "no model at" in refused("chat", "--model", tmp_path / "none")
    assert "temperature must be" in refused("chat", "--model", folder, "--temperature", -1)
    assert "max-new-tokens must be at least 1" in refused("chat", "--model", folder, "--max-new-tokens", 0)
    tokenizer = Tokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    GPT.from_pretrained(folder).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "has no chat template, so it was not taught to chat" in refused("chat", "--model", tmp_path)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    tokenizer.save_pretrained(tmp_path)
    assert "the chat template does not take this dialogue: no" in refused("chat", "--model", tmp_path)
