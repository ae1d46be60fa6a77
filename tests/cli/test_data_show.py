"""fastgpt data show, as a user runs it."""

import json
import shutil

import pytest

from fastgpt.data import TokenDataset


def test_statistics_and_picture(cli, shards, tmp_path):
    meta = json.loads((shards / "meta.json").read_text())
    code, out, err = cli("data", "show", "--data", shards, "--out", tmp_path / "lengths.png")
    assert code == 0, err
    assert f"{meta['format']}, uint16" in out
    assert f"tokenizer: 290 ids, hash {meta['tokenizer_hash'][:12]}" in out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    for split, part in meta["splits"].items():
        figures = [f"{part[key]:,}" for key in ("documents", "tokens", "bytes")]
        assert [split, *figures, f"{part['bytes'] / part['tokens']:.2f}", "1"] in rows
    assert "█" * 40 in out
    assert f"occur among the {meta['splits']['train']['tokens']:,} tokens of train" in out
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert "documents of val, in tokens: shortest " in cli("data", "show", "--data", shards, "--split", "val")[1]


def test_a_window_shows_its_documents_and_where_it_is(cli, shards):
    data = TokenDataset.open(shards, "train")
    second = int(data.document_starts[1])
    code, out, err = cli("data", "show", "--data", shards, "--at", second - 3, "--length", 10)
    assert code == 0, err
    assert f"tokens {second - 3:,} to {second + 6:,} of {len(data):,} of train" in out
    assert f"document 0, {second:,} tokens with its end, tokens {second - 3:,} to {second - 1:,} of it:" in out
    first, rest = out.split("document 1, ")
    assert first.rstrip().endswith("<|endoftext|>")
    assert "tokens 0 to 6 of it:" in rest
    assert rest.count("│") + rest.count("⏎\n") >= 6


def test_a_document_is_shown_whole(cli, shards, corpus):
    data = TokenDataset.open(shards, "val")
    code, out, err = cli("data", "show", "--data", shards, "--split", "val", "--document", 0, "--length", 100_000)
    assert code == 0, err
    tokens = out.split(" tokens with its end:\n")[1]
    text = tokens.replace("│", "").replace("⏎\n", "\n").replace("·", " ").removesuffix("<|endoftext|>\n")
    assert text in [path.read_text() for path in corpus.iterdir()]
    assert len(data) > 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--split", "test"], "no split 'test'"),
        (["--at", "100000000"], "--at must be at least 0 and below"),
        (["--at", "5", "--document", "1"], "only one of them"),
        (["--document", "1", "--out", "x.png"], "only one of them"),
        (["--document", "-1"], "--document must be at least 0"),
        (["--at", "0", "--length", "0"], "--length must be at least 1"),
        (["--out", "lengths.gif"], "--out must end in .png"),
    ],
)
def test_bad_options_give_one_line(refused, shards, args, words):
    assert words in refused("data", "show", "--data", shards, *args)


def test_damaged_folders_give_one_line(refused, shards, tmp_path):
    assert "no token shards at" in refused("data", "show", "--data", tmp_path / "none")
    folder = tmp_path / "data"
    shutil.copytree(shards, folder)
    (folder / "train_00000.bin").write_bytes(b"half")
    assert "prepare the data again" in refused("data", "show", "--data", folder)
    (folder / "meta.json").write_text('{"format": ')
    assert "meta.json is damaged" in refused("data", "show", "--data", folder)
