import json
import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt import GPT, GPTConfig, Tokenizer, UserError
from fastgpt.evaluate.multiple_choice import Question, encode_pair, log_likelihoods, multiple_choice, read_questions

HELLASWAG = [
    {
        "ind": 24,
        "activity_label": "Feeding a cat",
        "ctx_a": "[header] How to see the sea [title] Find a hat.",
        "ctx_b": "ada",
        "ctx": "[header] How to see the sea [title] Find a hat. ada",
        "endings": ["likes  the sea.", "[substeps] hides two hats. Bo likes it.", "finds a cat", "sees Cy."],
        "label": "2",
    },
    {"ctx": "Bo finds " + "the sea and " * 30, "endings": ["a cat.", "two hats.", "Dee.", "the sea"], "label": 3},
]
ARC = [
    {
        "id": "1",
        "question": "What does Ada like?",
        "choices": {"text": ["a cat", "the whole sea", "hats"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    },
    {
        "question": {
            "stem": "Who hides?",
            "choices": [{"text": "Bo", "label": "1"}, {"text": "Cy", "label": "2"}, {"text": "Dée", "label": "3"}],
        },
        "answerKey": "3",
    },
]
MMLU = [
    {
        "question": " Two hats? ",
        "subject": "the_sea",
        "choices": ["a cat", "Ada", "the sea", "two hats"],
        "answer": 3,
    },
    {"question": "Bo?", "choices": ["a cat", "Ada", "the sea", "two hats"], "answer": "A"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(scope="module")
def model_dir(tokenizer_dir, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.from_pretrained(tokenizer_dir)
    model = GPT(GPTConfig.preset("micro", vocab_size=tokenizer.vocab_size))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder, tokenizer.eot_id)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(model_dir):
    return GPT.from_pretrained(model_dir), Tokenizer.from_pretrained(model_dir)


@pytest.fixture(scope="module")
def theirs(model_dir):
    hf = transformers.AutoModelForCausalLM.from_pretrained(model_dir).eval()
    return hf, transformers.AutoTokenizer.from_pretrained(model_dir)


def plain(hf, tokenizer, context, continuation):
    """One item at a time, with transformers alone: log p and the ids of context and continuation."""
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    whole = tokenizer.encode(stripped + continuation)
    n = len(tokenizer.encode(stripped))
    tokens = whole[n:]
    read = (whole[:n] + tokens)[:-1][-hf.config.n_positions :]
    with torch.no_grad():
        log_p = hf(torch.tensor([read])).logits[0].double().log_softmax(-1)
    return sum(log_p[-len(tokens) + i, t].item() for i, t in enumerate(tokens)), whole[:n], tokens


def test_each_log_likelihood_is_that_of_transformers(pair, theirs, tmp_path):
    model, tokenizer = pair
    requests, expected = [], []
    for name, rows in (("hellaswag", HELLASWAG), ("arc", ARC), ("mmlu", MMLU)):
        kind, questions = read_questions(write(tmp_path / "q.jsonl", rows))
        assert kind == name
        for q in questions:
            for choice in q.choices:
                log_p, context, continuation = plain(*theirs, q.context, f" {choice}")
                assert encode_pair(tokenizer, q.context, f" {choice}") == (context, continuation)
                requests.append((context, continuation))
                expected.append(log_p)
    assert any(len(a) + len(b) - 1 > model.config.n_positions for a, b in requests)
    assert len({len(b) for _, b in requests}) > 3
    for batch_size in (1, 3, 16):
        ours = torch.tensor(log_likelihoods(model, requests, batch_size))
        torch.testing.assert_close(ours, torch.tensor(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [HELLASWAG, ARC, MMLU])
def test_accuracy_is_that_of_the_plain_log_likelihoods(pair, theirs, tmp_path, rows):
    model, tokenizer = pair
    _, questions = read_questions(write(tmp_path / "q.jsonl", rows))
    raw, normalized = 0, 0
    for q in questions:
        scores = [plain(*theirs, q.context, f" {c}")[0] for c in q.choices]
        per_byte = [s / len(c.encode()) for s, c in zip(scores, q.choices, strict=True)]
        raw += scores[q.answer] == max(scores)
        normalized += per_byte[q.answer] == max(per_byte)
    result = multiple_choice(model, tokenizer, questions, batch_size=2)
    assert (result["accuracy"], result["accuracy_normalized"]) == (raw / 2, normalized / 2)
    assert result["questions"] == 2
    assert result["cut"] == sum(
        max(len(tokenizer.encode(f"{q.context} {c}")) for c in q.choices) - 1 > model.config.n_positions
        for q in questions
    )


def test_length_decides_between_raw_and_normalized(pair):
    """The right choice is one token's likelihood in a long text: raw prefers the short one, normalized the long."""
    model, tokenizer = pair
    choices = ["a", "a cat a cat a cat a cat a cat a cat"]
    (short, long) = log_likelihoods(model, [encode_pair(tokenizer, "Ada sees", f" {c}") for c in choices])
    assert short > long
    assert short / len(choices[0]) < long / len(choices[1])
    result = multiple_choice(
        model, tokenizer, [Question("x:1", "Ada sees", choices, 1)] * 4 + [Question("x:1", "Ada sees", choices, 0)]
    )
    assert result["accuracy"] == 0.2
    assert result["accuracy_normalized"] == 0.8
    assert result["accuracy_stderr"] == pytest.approx(math.sqrt(0.2 * 0.8 / 4))
    assert result["chance"] == 0.5


def test_texts_are_those_of_the_field(tmp_path):
    def questions(rows):
        return read_questions(write(tmp_path / "q.jsonl", rows))[1]

    first, second = questions(HELLASWAG)
    assert first.context == "Feeding a cat: How to see the sea. Find a hat. Ada"
    assert first.choices == ["likes the sea.", " hides two hats. Bo likes it.", "finds a cat", "sees Cy."]
    assert (first.answer, second.answer) == (2, 3)
    first, second = questions(ARC)
    assert first.context == "Question: What does Ada like?\nAnswer:"
    assert (first.choices, first.answer) == (["a cat", "the whole sea", "hats"], 1)
    assert (second.context, second.choices, second.answer) == ("Question: Who hides?\nAnswer:", ["Bo", "Cy", "Dée"], 2)
    first, second = questions(MMLU)
    assert first.context == (
        "The following are multiple choice questions (with answers) about the sea.\n\n"
        "Two hats?\nA. a cat\nB. Ada\nC. the sea\nD. two hats\nAnswer:"
    )
    assert second.context.startswith("The following are multiple choice questions (with answers).\n\nBo?\nA. a cat")
    assert (first.choices, first.answer, second.answer) == (["A", "B", "C", "D"], 3, 0)
    assert len(questions(MMLU * 5)) == 10
    assert len(read_questions(tmp_path / "q.jsonl", limit=3)[1]) == 3


tokenizer = Tokenizer.train(["ab abc. " * 20], vocab_size=260)


@given(st.text(max_size=20), st.text(min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_a_pair_is_the_whole_text_and_its_continuation_is_not_empty(context, continuation):
    before, after = encode_pair(tokenizer, context, continuation)
    assert before + after == tokenizer.encode(context + continuation)
    assert after


BAD = [
    ({"text": "x"}, "no multiple choice that is known, it has text"),
    ({**ARC[0], "answerKey": "D"}, "answerKey is 'D', but the choices are A, B, C"),
    ({"answerKey": "A", "choices": {"text": ["a"], "label": ["A"]}}, "question"),
    ({**ARC[0], "choices": {"text": ["a", "b"], "label": ["A"]}}, "2 in text but 1 in label"),
    ({**ARC[0], "choices": {"text": ["a", " "], "label": ["A", "B"]}}, "empty"),
    ({**ARC[0], "choices": {"text": ["a"], "label": ["B"]}}, "1 choices: there must be two"),
    ({**HELLASWAG[1], "label": ""}, "label is ''"),
    ({**HELLASWAG[1], "label": 4}, "label is 4, but the choices are 0, 1, 2, 3"),
    ({**HELLASWAG[1], "label": None}, "label must be"),
    ({**HELLASWAG[1], "endings": ["a", 2]}, "endings must be a list of texts"),
    ({**HELLASWAG[1], "ctx": "[header]"}, "empty"),
    ({**MMLU[0], "answer": "E"}, "answer is 'E', but the choices are A, B, C, D"),
    ({**MMLU[0], "answer": -1}, "answer is -1"),
]


@pytest.mark.parametrize(("row", "message"), BAD, ids=[m for _, m in BAD])
def test_a_bad_row_is_named(tmp_path, row, message):
    good = next((k for k in (ARC[0], HELLASWAG[1], MMLU[0]) if "text" not in row and k.keys() >= row.keys()), None)
    path = write(tmp_path / "bad.jsonl", [row] if good is None else [good, row])
    with pytest.raises(UserError) as error:
        read_questions(path)
    assert message in str(error.value)
    assert "bad.jsonl" in str(error.value)
    assert str(1 if good is None else 2) in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_files(tmp_path, pair):
    for content, message in ((b"", "holds no records"), (b"\xe9", "is no UTF-8 text"), (b"{", "is no JSON")):
        (tmp_path / "bad.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_questions(tmp_path / "bad.jsonl")
    with pytest.raises(UserError, match="no such file"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"x:7: a choice has .* tokens, the model reads at most 64"):
        multiple_choice(*pair, [Question("x:7", "Ada", ["a cat", "qz" * 100], 0)])
