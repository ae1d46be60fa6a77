import json
import re

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt import GPT, GPTConfig, Tokenizer, UserError
from fastgpt.template import ALPACA, CHATML, INPUT, encode_dialogue, encode_prompt, render

# Without {% generation %}: what the responses are must be found by rendering prefixes.
PLAIN = r"""{{ bos_token }}{{ strftime_now('%Y') }}{{ tools is none }}{% for message in messages %}
    {% if message['role'] == 'user' %}
[INST] {{ message['content'] | trim }} [/INST]
    {%- elif message['role'] == 'assistant' %}
 {{ message['content'] }}{{ eos_token }}
    {%- else %}
<<SYS>> {{ message | tojson }} <</SYS>>{% continue %}
    {% endif %}
{% endfor %}"""
TEMPLATES = {"alpaca": ALPACA, "chatml": CHATML, "plain": PLAIN}
SPECIALS = {"one": ["<|endoftext|>"], "marks": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]}

texts = st.text(max_size=20) | st.sampled_from(
    [
        "Ada sees",
        " a  cat \n",
        "<|im_end|>",
        "<|endoftext|>",
        "{{ messages }}",
        "{% raw %}",
        "\ufdd0\ufdd1",
        "é<b>&'",
        "\r\n",
    ]
)


@st.composite
def dialogues(draw):
    messages = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        user = draw(texts) + draw(st.just("") | texts.map(lambda text: INPUT + text))
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": draw(texts)}]
    return messages


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Ours and transformers' tokenizer of one folder, by the names of its special tokens and its template."""
    made = {}
    for specials, names in SPECIALS.items():
        tokenizer = Tokenizer.train(["Ada sees a cat. Instruction: say what Bo sees. Response: " * 9], 280, names)
        for name, source in TEMPLATES.items():
            folder = tmp_path_factory.mktemp(f"{specials}-{name}")
            tokenizer.chat_template = source
            tokenizer.save_pretrained(folder)
            GPT(GPTConfig.preset("micro", vocab_size=280)).save_pretrained(folder, tokenizer.eot_id)
            ours = Tokenizer.from_pretrained(folder)
            made[specials, name] = ours, transformers.AutoTokenizer.from_pretrained(folder)
    return made


@pytest.mark.parametrize("specials", SPECIALS)
@pytest.mark.parametrize("name", TEMPLATES)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_agrees_with_transformers_token_for_token(both, specials, name, data):
    ours, theirs = both[specials, name]
    messages = data.draw(dialogues())
    if name == "plain":  # an empty response would be told from nothing
        messages = [{**m, "content": m["content"] or "x"} for m in messages]
    assert render(ours, messages) == theirs.apply_chat_template(messages, tokenize=False)
    prompt = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert encode_prompt(ours, messages[:-1]) == prompt
    ids, trained = encode_dialogue(ours, messages)
    if name == "plain":
        assert ids == theirs.apply_chat_template(messages, return_dict=False)
    else:
        want = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert ids == want["input_ids"]
        assert trained == list(map(bool, want["assistant_masks"]))


@pytest.fixture
def tokenizer():
    return Tokenizer.train(["Ada sees a cat. " * 9], 262, ["<|endoftext|>"])


def dialogue(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def trained_text(tokenizer, messages, template):
    ids, trained = encode_dialogue(tokenizer, messages, template)
    runs = re.findall("1+", "".join("1" if t else " " for t in trained))
    return tokenizer.decode(i for i, t in zip(ids, trained, strict=True) if t), len(runs)


def test_only_responses_and_their_ends_are_trained(tokenizer):
    messages = dialogue("Who?", "Ada.", "And?", "Bo.")
    end = "<|endoftext|>"
    assert trained_text(tokenizer, messages, ALPACA) == (f"Ada.{end}Bo.{end}", 2)
    assert trained_text(tokenizer, messages, CHATML) == (f"Ada.<|im_end|>{end}Bo.<|im_end|>{end}", 2)
    assert trained_text(tokenizer, messages, PLAIN) == (f" Ada.{end} Bo.{end}", 2)


def test_alpaca_prints_the_published_prompt(tokenizer):
    assert render(tokenizer, dialogue("Say hi.", "Hi."), ALPACA) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hi.\n\n### Response:\nHi.<|endoftext|>"
    )
    assert render(tokenizer, dialogue("Add." + INPUT + "1 and 2"), ALPACA, add_generation_prompt=True) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n"
    )
    system = [{"role": "system", "content": "Be brief."}]
    assert render(tokenizer, system + dialogue("Hi", "Ho", "Hi"), ALPACA) == (
        "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHo<|endoftext|>\n\n### Instruction:\nHi"
    )


def test_a_prompt_is_how_its_dialogue_begins(tokenizer):
    for template in TEMPLATES.values():
        messages = dialogue("Hi", "Ho", "Who?", "Ada")
        for i in (1, 3):
            prompt = render(tokenizer, messages[:i], template, add_generation_prompt=True)
            assert render(tokenizer, messages, template).startswith(prompt)


def test_the_template_is_read_from_either_file_and_written_back(tokenizer, tmp_path):
    plain = tokenizer.hash
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer.hash == plain
    assert Tokenizer.from_pretrained(tmp_path).chat_template == CHATML
    assert Tokenizer.from_pretrained(tmp_path / "tokenizer.json").chat_template == CHATML
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": ALPACA}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    assert Tokenizer.from_pretrained(tmp_path).chat_template == ALPACA
    (tmp_path / "chat_template.jinja").write_text(PLAIN)
    assert Tokenizer.from_pretrained(tmp_path).chat_template == PLAIN
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.from_pretrained(tmp_path).chat_template is None


@pytest.mark.parametrize(
    ("template", "line"),
    [
        (None, "this tokenizer has no chat template"),
        ("{% if %}", "the chat template cannot be read: line 1"),
        ("{{ raise_exception('only two\nturns') }}", "the chat template does not take this dialogue: only two"),
        ("{{ messages[0].content + nothing }}", "'nothing' is undefined"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "the chat template does not take this dialogue"),
        ("{{ messages[0].content }}", "prints no assistant message"),
        (
            "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
            "does not print message 2 behind those before",
        ),
    ],
)
def test_a_template_that_cannot_be_used_gives_a_line(tokenizer, template, line):
    with pytest.raises(UserError) as error:
        encode_dialogue(tokenizer, dialogue("Hi", "Ho"), template)
    assert line in str(error.value)
    assert "\n" not in str(error.value)
