from pathlib import Path

import pytest
import tokenizers

from fastgpt import Tokenizer, UserError
from fastgpt.tokenizer import BYTE_IDS

# Without any special token spelled out: transformers would make the token of it.
TEXT = Path(__file__).read_text().replace("<", "{") + "Größe naïve 数学 数字 😀 'll we've 3.14159  \t\r\n\n\n  end " * 5
HARD = [
    "",
    "  two  spaces  \n\n \n\t x\r\n\r\nCRLF\r\n",
    "'s 'S 'll 'LL don't DON'T ''s",
    "١٢٣ ⅷ ² ½ 1e-5 0x1F 12345",
    "e\u0301 \u00e9 \u0301 \u200d\u200b\ufeff\u00a0x\u3000y\u2028z\u0085w",
    "👩‍👩‍👧‍👦 नमस्ते สวัสดี مرحبا 안녕하세요 你好",
    "a" * 1000 + " " * 1000 + "\n" * 1000 + "\x00\x7f\U0010ffff",
]


@pytest.fixture(scope="session")
def trained():
    return Tokenizer.train([TEXT], vocab_size=500, special_tokens=("<|endoftext|>", "<|user|>"))


def hf(tokenizer, folder):
    """The same tokenizer as transformers and as the tokenizers library read it from the disk."""
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_ids_are_bytes_then_merges_then_specials(trained):
    assert trained.vocab_size == 500
    assert trained.token_bytes(BYTE_IDS[65]) == b"A"
    assert sorted(BYTE_IDS) == list(range(256))
    assert trained.special_tokens == {"<|endoftext|>": 498, "<|user|>": 499}
    assert trained.eot_id == 498
    assert all(trained.token_bytes(i) == left + right for i, (left, right) in enumerate(trained.merges, 256))
    assert len(trained.encode(TEXT)) < 0.6 * len(TEXT.encode())


def test_all_bytes_decode_and_broken_utf8_is_replaced(trained):
    assert trained.decode_bytes(BYTE_IDS) == bytes(range(256))
    assert trained.decode([BYTE_IDS[0xFF], BYTE_IDS[65]]) == "\ufffdA"


def test_special_tokens_come_only_when_asked_for(trained):
    text = "a<|endoftext|>b<|user|>"
    plain = trained.encode(text)
    assert not {498, 499} & set(plain)
    assert trained.decode(plain) == text
    asked = trained.encode(text, allowed_special=["<|endoftext|>"])
    assert asked.count(498) == 1
    assert 499 not in asked
    with pytest.raises(UserError, match="nothing is no special token"):
        trained.encode(text, allowed_special={"nothing"})


def test_saved_and_loaded_is_the_same(trained, tmp_path):
    trained.save_pretrained(tmp_path / "new/folder")
    for path in (tmp_path / "new/folder", tmp_path / "new/folder/tokenizer.json"):
        again = Tokenizer.from_pretrained(path)
        assert again.hash == trained.hash
        assert again.encode(TEXT) == trained.encode(TEXT)
        assert again.special_tokens == trained.special_tokens
    other = Tokenizer.train([TEXT], vocab_size=499, special_tokens=("<|endoftext|>", "<|user|>"))
    assert other.hash != trained.hash


def test_opens_beside_a_gpt2_config_too(trained, tmp_path):
    from fastgpt import GPT, GPTConfig

    GPT(GPTConfig.preset("micro", vocab_size=trained.vocab_size)).save_pretrained(tmp_path, trained.eot_id)
    auto, _ = hf(trained, tmp_path)
    assert auto(TEXT)["input_ids"] == trained.encode(TEXT)
    assert auto.eos_token_id == trained.eot_id


CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
CL100K += r"|\s*[\r\n]+|\s+(?!\S)|\s+"


def made_by_the_tokenizers_library(specials_first, pattern=None):
    pre = tokenizers.pre_tokenizers
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = pre.Split(tokenizers.Regex(pattern), "isolated") if pattern else None
    made.pre_tokenizer = pre.Sequence([split, byte_level]) if split else byte_level
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<pad>"] if specials_first else [],
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    return made


@pytest.mark.parametrize("specials_first", [False, True])
@pytest.mark.parametrize("pattern", [None, CL100K], ids=["gpt2", "cl100k"])
def test_opens_what_the_tokenizers_library_trained(specials_first, pattern, tmp_path):
    """With the special tokens first, ids are not in the order of the merges."""
    theirs = made_by_the_tokenizers_library(specials_first, pattern)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_pretrained(tmp_path)
    assert ours.vocab_size == theirs.get_vocab_size() == 400
    assert ours.eot_id == (0 if specials_first else None)
    for text in [TEXT, *HARD]:
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    assert hf(ours, tmp_path / "again")[1].encode(TEXT).ids == ours.encode(TEXT)


def test_training_refuses_what_cannot_be_made():
    with pytest.raises(UserError, match="must be at least 257"):
        Tokenizer.train(["some text"], vocab_size=100)
    with pytest.raises(UserError, match=r"only enough for 26\d ids, not for --vocab-size 5,000"):
        Tokenizer.train(["some text"], vocab_size=5000)
    with pytest.raises(UserError, match="different from each other"):
        Tokenizer.train(["some text"], vocab_size=300, special_tokens=("<a>", "<a>"))


def test_ids_beyond_the_vocabulary(trained):
    for bad in (500, -1):
        with pytest.raises(UserError, match=f"no token has the id {bad}: the vocabulary has ids below 500"):
            trained.decode([65, bad])
