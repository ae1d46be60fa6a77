"""What a tokenizer's files say: Hugging Face's `tokenizer.json`, or the two files that GPT-2 was published with.

Only a byte-level BPE is read. What a file asks for beyond that (a normalizer, a prefix space, tokens of another model)
is refused by name: ids that differ from the file's author's would be worse than no ids.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from reprlib import Repr
from typing import Any, TypeVar

from fastgpt.errors import UserError

END_OF_TEXT = "<|endoftext|>"
# The merges and the ids: as GPT-2 was published, and as Hugging Face's old folders name the same two.
TWO_FILES = (("vocab.bpe", "encoder.json"), ("merges.txt", "vocab.json"))

T = TypeVar("T")
Json = dict[str, Any]

_repr = Repr()
_repr.maxlevel = 1
short = _repr.repr  # of anything that a file may hold, so that it fits into a line


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in vocab.bpe and tokenizer.json.

    Bytes that are printable in Latin-1 stand for themselves; the others take the characters from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    characters = {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(others)}
    return [characters[b] for b in range(256)]


CHARACTER = _byte_characters()
BYTE = {character: byte for byte, character in enumerate(CHARACTER)}


def spell(token: bytes) -> str:
    return "".join(CHARACTER[b] for b in token)


def unspell(token: str) -> bytes:
    """Raises KeyError where a character stands for no byte."""
    return bytes(BYTE[character] for character in token)


@dataclass
class TokenizerFile:
    """A tokenizer as its files have it; `source` names them, `pattern` None means GPT-2's."""

    source: str
    vocab: dict[bytes, int]
    merges: list[tuple[bytes, bytes]]
    special_tokens: dict[str, int]
    pattern: str | None = None
    chat_template: str | None = None


def read_tokenizer(path: Path) -> TokenizerFile:
    """Reads a folder with a tokenizer.json, else with one of TWO_FILES; or a tokenizer.json itself.

    Raises:
        UserError: there is none, it is damaged, or something in it is not computed here; names the file and the field.
    """
    try:
        if path.suffix == ".json" and not path.is_dir():
            return read_tokenizer_json(path)
        if (path / "tokenizer.json").is_file():
            return read_tokenizer_json(path / "tokenizer.json")
        for merges, vocab in TWO_FILES:
            if (path / merges).is_file() and (path / vocab).is_file():
                return read_two_files(path / merges, path / vocab)
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise UserError(f"no tokenizer at {short(str(path))}: {error.strerror}") from None
    raise UserError(f"no tokenizer at {path}: there is no tokenizer.json; train one with `fastgpt tokenizer train`")


def read_two_files(vocab_bpe: Path, encoder_json: Path) -> TokenizerFile:
    """GPT-2's: a text file of merges, one a line, and a JSON object of ids."""
    vocab = _read_json(encoder_json)
    lines = _read_text(vocab_bpe).splitlines()
    if lines and lines[0].startswith("#version"):
        lines = lines[1:]
    specials = {END_OF_TEXT: vocab[END_OF_TEXT]} if END_OF_TEXT in vocab else {}
    merges = _merges([line for line in lines if line], vocab_bpe)
    return TokenizerFile(
        f"{vocab_bpe} with {encoder_json.name}",
        _tokens(vocab, merges, specials, encoder_json),
        merges,
        specials,
        chat_template=_chat_template(vocab_bpe.parent),
    )


def read_tokenizer_json(path: Path) -> TokenizerFile:
    content = _read_json(path)
    model = _field(content, "model", dict, path)
    if (kind := model.get("type", "BPE")) != "BPE":
        raise UserError(f"{path}: the model's type is {short(kind)}, only a byte-level BPE can be loaded")
    for where, name in (
        (model, "byte_fallback"),
        (model, "continuing_subword_prefix"),
        (model, "end_of_word_suffix"),
        (model, "dropout"),
        (content, "normalizer"),
    ):
        if value := where.get(name):
            kind = value.get("type", value) if isinstance(value, dict) else value
            raise UserError(f"{path}: {name} is {short(kind)}, only a byte-level BPE without it can be loaded")
    specials: dict[str, int] = {}
    for token in _field(content, "added_tokens", list, path, []):
        name = _field(token, "content", str, path)
        if not token.get("special"):
            raise UserError(f"{path}: the added token {short(name)} is not special, which cannot be loaded")
        token_id = _field(token, "id", int, path)
        if specials.setdefault(name, token_id) != token_id:
            raise UserError(f"{path}: the special token {short(name)} has two ids, {specials[name]} and {token_id}")
    merges = _merges(_field(model, "merges", list, path), path)
    vocab = _tokens(_field(model, "vocab", dict, path), merges, specials, path)
    if model.get("ignore_merges"):  # whole words that are tokens are taken without any merge
        made = {left + right for left, right in merges}
        if whole := [token for token in vocab if len(token) > 1 and token not in made]:
            raise UserError(f"{path}: ignore_merges is true and no merge makes the token {short(whole[0])}")
    return TokenizerFile(str(path), vocab, merges, specials, _split_pattern(content, path), _chat_template(path.parent))


def _field(where: Any, name: str, kind: type[T], path: Path, default: T | None = None) -> T:
    """A field of a JSON object, which must be of this kind; `default` where it is missing or null."""
    value = where.get(name) if isinstance(where, dict) else None
    if value is None and default is not None:
        return default
    if not isinstance(value, kind):
        names = {dict: "an object", list: "a list", str: "a text", int: "a whole number", bool: "true or false"}
        raise UserError(f"{path} is damaged: {name} should be {names[kind]}, it is {short(value)}")
    return value


def _tokens(vocab: Json, merges: list[tuple[bytes, bytes]], specials: dict[str, int], path: Path) -> dict[bytes, int]:
    """The ordinary tokens of a vocabulary. Special ones stand in it too, as they are and not spelled in bytes: they are
    left out, unless a merge makes the same, which the tokenizer then refuses."""
    ordinary = {bytes([b]) for b in range(256)} | {left + right for left, right in merges}
    tokens = {}
    for token, token_id in vocab.items():
        if token in specials:
            if token_id != specials[token]:
                raise UserError(
                    f"{path}: the special token {short(token)} has the id {short(specials[token])}, "
                    f"and {short(token_id)} in the vocabulary"
                )
            if not BYTE.keys() >= set(token) or unspell(token) not in ordinary:
                continue
        try:
            tokens[unspell(token)] = token_id
        except KeyError as error:
            raise UserError(
                f"{path}: the character {error} of the token {short(token)} stands for no byte: "
                "this is no byte-level BPE"
            ) from None
    return tokens


def _merges(merges: list[Any], path: Path) -> list[tuple[bytes, bytes]]:
    """The pairs of a list of merges, each "left right" or ["left", "right"]."""
    pairs = []
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise UserError(f"{path}: the merge {short(merge)} is no pair of tokens")
        try:
            pairs.append((unspell(parts[0]), unspell(parts[1])))
        except KeyError as error:
            raise UserError(
                f"{path}: the character {error} of the merge {short(merge)} stands for no byte: "
                "this is no byte-level BPE"
            ) from None
    return pairs


def _split_pattern(content: Json, path: Path) -> str | None:
    """The split pattern of a tokenizer.json's pre_tokenizer; None for the one that ByteLevel has by itself, GPT-2's."""
    pre = _field(content, "pre_tokenizer", dict, path, {})
    steps = _field(pre, "pretokenizers", list, path) if pre.get("type") == "Sequence" else [pre]
    kinds = [_field(step, "type", str, path, "none") for step in steps]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise UserError(f"{path}: pre_tokenizer is {short(' + '.join(kinds))}, only ByteLevel can be loaded")
    byte_level = steps[-1]
    if _field(byte_level, "add_prefix_space", bool, path, True):
        raise UserError(f"{path}: pre_tokenizer.add_prefix_space is true, only false can be loaded")
    splits_itself = _field(byte_level, "use_regex", bool, path, True)
    if len(steps) == 1 and splits_itself:
        return None
    split = steps[0]
    pattern = _field(split, "pattern", dict, path, {}).get("Regex")
    if splits_itself or pattern is None or split.get("behavior") != "Isolated" or split.get("invert"):
        raise UserError(f"{path}: pre_tokenizer is no single split by a regular expression, which cannot be loaded")
    return _field(split["pattern"], "Regex", str, path)


def _chat_template(folder: Path) -> str | None:
    """The chat template of a tokenizer's folder; of several that have names, the default one."""
    if (folder / "chat_template.jinja").is_file():
        return _read_text(folder / "chat_template.jinja")
    if not (folder / "tokenizer_config.json").is_file():
        return None
    template = _read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: give the path of a tokenizer's file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read: it is no UTF-8 text from byte {error.start:,} on") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _read_json(path: Path) -> Json:
    try:
        content = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it is no JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it is no JSON object")
    return content
