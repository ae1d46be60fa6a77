"""Writes a tokenizer as GPT-2's was published."""

import json

from fastgpt.tokenizer_file import spell


def write_two_files(tokenizer, folder, merges="vocab.bpe", vocab="encoder.json"):
    pairs = [f"{spell(left)} {spell(right)}\n" for left, right in tokenizer.merges]
    (folder / merges).write_text("#version: 0.2\n" + "".join(pairs))
    ids = {spell(token): i for token, i in tokenizer.vocab.items()} | tokenizer.special_tokens
    (folder / vocab).write_text(json.dumps(ids))
    return folder
