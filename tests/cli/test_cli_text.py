"""fastgpt tokenizer train|show, data prepare, generate, as a user runs them."""

import pytest

from fastgpt import GPT, GPTConfig, Tokenizer


@pytest.fixture(scope="module")
def model_dir(tokenizer_dir, tmp_path_factory):
    import torch

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.from_pretrained(tokenizer_dir)
    model = GPT(GPTConfig.preset("micro", vocab_size=tokenizer.vocab_size))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    model.save_pretrained(folder, tokenizer.eot_id)
    tokenizer.save_pretrained(folder)
    return folder


def test_tokenizer_train_then_show_then_prepare(cli, corpus, tmp_path):
    tok, data = tmp_path / "tok", tmp_path / "data"
    code, text, err = cli("tokenizer", "train", "--input", corpus, "--vocab-size", 280, "--out", tok)
    assert code == 0, err
    assert "280 ids from" in text
    assert "12 files" in text
    code, text, _ = cli("tokenizer", "show", "--tokenizer", tok, "Ada sees the sea.")
    assert code == 0
    assert "Ada sees the sea." in text.replace("│", "").replace("·", " ")
    assert f"{len(Tokenizer.from_pretrained(tok).encode('Ada sees the sea.'))} tokens, 17 characters" in text
    code, text, _ = cli("data", "prepare", "--input", corpus, "--tokenizer", tok, "--out", data, "--val-fraction", 0.2)
    assert code == 0
    assert "train" in text
    assert (data / "meta.json").exists()


def test_bad_files_stop_or_are_counted(cli, refused, corpus, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / "zero.bin").write_bytes(b"\0\0")
    args = ["tokenizer", "train", "--input", corpus, tmp_path, "--vocab-size", 280, "--out", tmp_path / "tok"]
    assert "bad.txt is no UTF-8 text: byte 3 is 0xe9" in refused(*args)
    assert not (tmp_path / "tok").exists()
    code, text, _ = cli(*args, "--skip-bad")
    assert code == 0
    assert "skipped: " in text
    assert "(and 1 more)" in text


def test_standard_input_goes_through_a_pipe(process, corpus, tokenizer_dir, tmp_path):
    args = ["data", "prepare", "--input", "-", "--format", "text", "--tokenizer", tokenizer_dir, "--out"]
    p = process(*args, tmp_path / "out", stdin=(corpus / "story_0.txt").open())
    out, err = p.communicate()
    assert p.returncode == 0, err
    assert "uint16 shards in" in out


def test_what_exists_is_not_overwritten(refused, corpus, shards, tokenizer_dir):
    before = (tokenizer_dir / "tokenizer.json").read_bytes()
    assert "already holds a tokenizer" in refused(
        "tokenizer", "train", "--input", corpus, "--vocab-size", 280, "--out", tokenizer_dir
    )
    assert (tokenizer_dir / "tokenizer.json").read_bytes() == before
    assert "exists already" in refused(
        "data", "prepare", "--input", corpus, "--tokenizer", tokenizer_dir, "--out", shards
    )


def test_bad_input_gives_one_line(refused, corpus, tokenizer_dir, tmp_path):
    out = tmp_path / "out"
    prepare = ["data", "prepare", "--tokenizer", tokenizer_dir, "--out", out]
    assert "no such file or folder: " in refused(*prepare, "--input", tmp_path / "none")
    assert "either --input or --dataset" in refused(*prepare)
    assert "--workers must be at least 1" in refused(*prepare, "--input", corpus, "--workers", 0)
    (tmp_path / "empty.txt").write_text("")
    assert "the corpus is empty" in refused(*prepare, "--input", tmp_path / "empty.txt")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    train = ["tokenizer", "train", "--vocab-size", "300", "--out", tmp_path / "tok"]
    for command in (prepare, train):
        assert "is empty: no file has any text; skipped 1, the first" in refused(
            *command, "--input", tmp_path / "bad.txt", "--skip-bad"
        )
    assert "no tokenizer at" in refused("data", "prepare", "--input", corpus, "--tokenizer", tmp_path, "--out", out)
    assert not out.exists()
    train = ["tokenizer", "train", "--out", out, "--vocab-size", 300]
    assert "the corpus is empty" in refused(*train, "--input", tmp_path / "empty.txt")
    (tmp_path / "short.txt").write_text("ab")
    assert "only enough for 258 ids" in refused(*train, "--input", tmp_path / "short.txt")
    assert "no such file" in refused(*train, "--input", tmp_path / "none")


def sample(cli, model, *args):
    code, text, err = cli("generate", "--model", model, "--prompt", "Ada ", *args)
    assert code == 0, err
    return text


def test_generate_is_seeded_and_greedy_needs_no_cache(cli, model_dir):
    greedy = ["--temperature", 0, "--max-new-tokens", 90]  # beyond the 64 positions too
    assert sample(cli, model_dir, *greedy) == sample(cli, model_dir, *greedy, "--no-cache")
    assert sample(cli, model_dir, "--seed", 1) == sample(cli, model_dir, "--seed", 1)
    assert sample(cli, model_dir, "--seed", 1) != sample(cli, model_dir, "--seed", 2)
    assert sample(cli, model_dir, *greedy).startswith("Ada ")


def test_generate_says_what_the_model_says(cli, model_dir):
    import torch

    tokenizer, model = Tokenizer.from_pretrained(model_dir), GPT.from_pretrained(model_dir)
    ids = model.generate(torch.tensor([tokenizer.encode("Ada ")]), 20, temperature=0, eos_id=tokenizer.eot_id)[
        0
    ].tolist()
    ids = ids[: ids.index(tokenizer.eot_id)] if tokenizer.eot_id in ids else ids
    assert sample(cli, model_dir, "--temperature", 0, "--max-new-tokens", 20) == tokenizer.decode(ids) + "\n"


def test_several_samples_are_told_apart(cli, model_dir):
    text = sample(cli, model_dir, "--num-samples", 3, "--seed", 5, "--max-new-tokens", 10)
    assert [f"sample {i}" in text for i in (1, 2, 3, 4)] == [True, True, True, False]
    assert text.count("Ada ") >= 3


def test_text_comes_as_it_is_made(model_dir, process):
    p = process("generate", "--model", model_dir, "--prompt", "Ada ", "--max-new-tokens", 100_000_000, "--top-k", 20)
    assert p.stdout.read(4) == "Ada "
    assert p.stdout.read(20)
    assert p.poll() is None


def test_generate_without_a_prompt_starts_a_document(cli, model_dir):
    code, _, _ = cli("generate", "--model", model_dir, "--max-new-tokens", 5)
    assert code == 0


def test_generates_bad_input_gives_one_line(refused, model_dir, tmp_path):
    import shutil

    assert "no model at" in refused("generate", "--model", tmp_path / "none")
    assert "it has no config.json" in refused("generate", "--model", tmp_path)
    assert "the model reads at most 64: shorten it" in refused("generate", "--model", model_dir, "--prompt", "qx" * 500)
    assert "temperature must be" in refused("generate", "--model", model_dir, "--temperature", -1)
    assert "top-p must be" in refused("generate", "--model", model_dir, "--top-p", 2)
    assert "--num-samples" in refused("generate", "--model", model_dir, "--num-samples", 0)
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    Tokenizer.train(["abc " * 10], vocab_size=257).save_pretrained(folder)
    line = refused("generate", "--model", folder)
    assert "has 257 ids, the model 290" in line
    (folder / "tokenizer.json").unlink()
    assert "there is no tokenizer.json" in refused("generate", "--model", folder)
    (folder / "model.safetensors").write_bytes(b"half")
    assert "no tokenizer" in refused("generate", "--model", folder)
