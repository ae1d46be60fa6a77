"""Byte-level BPE tokenizers: trained here, GPT-2's own, or any Hugging Face `tokenizer.json` of the kind.

tiktoken does the encoding, from our merges. It wants token numbers ("ranks") in the order of the merges; a file may
give the ids in another order, so ranks and ids are kept apart where they differ.

tiktoken merges any two neighbours that spell a token; Hugging Face only the pair that the merge names. For merges that
a BPE was trained to, these are the same: a stretch of text between two boundaries that no merge has crossed evolves as
if it stood alone, so wherever the token's bytes stand between boundaries they stand as the same two parts.
"""

import codecs
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken

from fastgpt.bpe import count_words, train_merges
from fastgpt.errors import UserError
from fastgpt.files import atomic_write

# How GPT-2 splits text into words before BPE (Radford et al. 2019).
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same splits without backtracking, which a million spaces in a row would overflow the stack of.
_FAST_PATTERN = {
    GPT2_PATTERN: r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
}
END_OF_TEXT = "<|endoftext|>"


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
# GPT-2 numbers the 256 bytes by their characters.
BYTE_IDS = [sorted(CHARACTER).index(character) for character in CHARACTER]


class Tokenizer:
    """A byte-level BPE: any text to ids and back, without loss.

    Made by `Tokenizer.train`, `Tokenizer.from_pretrained` or `Tokenizer.from_gpt2_files`.

    Args:
        vocab: the id of each token that is no special one; all 256 single bytes among them.
        merges: the pairs of tokens that become one, in the order in which they are merged.
        special_tokens: the ids of whole tokens that no text makes, unless asked for.
        pattern: how text is split into words; merges never cross one.
        chat_template: Jinja source that turns a dialogue into text (`fastgpt.template`), if it has one; it decides no
            text's ids and is not part of `hash`.
    """

    def __init__(
        self,
        vocab: dict[bytes, int],
        merges: Sequence[tuple[bytes, bytes]],
        special_tokens: dict[str, int],
        pattern: str = GPT2_PATTERN,
        chat_template: str | None = None,
    ) -> None:
        self.chat_template = chat_template
        self.vocab = vocab
        self.merges = list(merges)
        self.special_tokens = special_tokens
        self.pattern = pattern
        self._bytes = {i: token for token, i in vocab.items()} | {i: s.encode() for s, i in special_tokens.items()}
        if len(self._bytes) != len(vocab) + len(special_tokens):
            raise ValueError("two tokens have the same id")
        missing = [b for b in range(256) if bytes([b]) not in vocab]
        if missing:
            raise ValueError(f"the token of the single byte 0x{missing[0]:02x} is missing")
        by_rank = sorted((bytes([b]) for b in range(256)), key=vocab.__getitem__)
        for left, right in self.merges:
            if left not in vocab or right not in vocab or left + right not in vocab:
                raise ValueError(f"the merge of {left!r} and {right!r} names a token that is not in the vocabulary")
            by_rank.append(left + right)
        ranks = {token: rank for rank, token in enumerate(by_rank)}
        if len(ranks) != len(by_rank):
            raise ValueError("two merges make the same token")
        specials = sorted(special_tokens, key=special_tokens.__getitem__)
        ids = [vocab[token] for token in by_rank] + [special_tokens[s] for s in specials]
        self._ids = None if ids == list(range(len(ids))) else ids  # rank -> id, where they differ
        self._encoding = tiktoken.Encoding(
            "fastgpt",
            pat_str=_FAST_PATTERN.get(pattern, pattern),
            mergeable_ranks=ranks,
            special_tokens={s: len(by_rank) + i for i, s in enumerate(specials)},
        )

    @property
    def vocab_size(self) -> int:
        """The largest id + 1: how many rows a model's embedding needs."""
        return max(self._bytes) + 1

    @property
    def eot_id(self) -> int | None:
        """The id that ends a document: of `<|endoftext|>`, else of the only special token, else None."""
        if END_OF_TEXT in self.special_tokens or len(self.special_tokens) != 1:
            return self.special_tokens.get(END_OF_TEXT)
        return next(iter(self.special_tokens.values()))

    @cached_property
    def hash(self) -> str:
        """SHA-256 of all that decides ids; two tokenizers with the same hash encode every text alike."""
        content = {
            "vocab": sorted((token.hex(), i) for token, i in self.vocab.items()),
            "merges": [(left.hex(), right.hex()) for left, right in self.merges],
            "special_tokens": sorted(self.special_tokens.items()),
            "pattern": self.pattern,
        }
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """The ids of a text.

        Args:
            allowed_special: special tokens that may be made where the text spells them; otherwise it is plain text.

        Raises:
            UserError: a name in `allowed_special` is no special token.
        """
        if allowed_special:
            if unknown := set(allowed_special) - set(self.special_tokens):
                have = ", ".join(self.special_tokens) or "none"
                raise UserError(f"{min(unknown)} is no special token of this tokenizer: it has {have}")
            ranks = self._encoding.encode(text, allowed_special=set(allowed_special), disallowed_special=())
        else:
            ranks = self._encoding.encode_ordinary(text)
        return ranks if self._ids is None else [self._ids[r] for r in ranks]

    def encode_batch(self, texts: list[str], threads: int = 2) -> list[list[int]]:
        """`encode` of each text, in threads."""
        batch = self._encoding.encode_ordinary_batch(texts, num_threads=threads)
        return batch if self._ids is None else [[self._ids[r] for r in ranks] for ranks in batch]

    def encode_to_numpy(self, texts: Iterable[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """`encode` of each text, as arrays: making a Python number of each id would take a tenth of the time.

        Returns:
            The ids of all texts, one behind the other, and how many are each text's.
        """
        found = []
        for text in texts:
            try:
                ranks = self._encoding.encode_to_numpy(text, disallowed_special=())
            except UnicodeEncodeError:
                ranks = self._encoding.encode_to_numpy(without_surrogates(text), disallowed_special=())
            found.append(ranks)
        lengths = np.fromiter(map(len, found), np.int64, len(found))
        ranks = np.concatenate(found) if found else np.empty(0, np.uint32)
        return (ranks if self._ids is None else np.array(self._ids, np.uint32)[ranks]), lengths

    @property
    def can_cut(self) -> bool:
        """Whether a text can be cut between a letter and a space without changing its ids.

        That is known of GPT-2's and cl100k's split patterns (`fastgpt.data.read` says why).
        """
        return self.pattern in _FAST_PATTERN

    def mismatch(self, vocab_size: int, folder: str | Path) -> UserError:
        """What to raise where the model beside this tokenizer, in `folder`, has a vocabulary of another size."""
        return UserError(
            f"the tokenizer in {folder} has {self.vocab_size:,} ids, the model {vocab_size:,}: "
            "put the tokenizer.json there that the model was trained with"
        )

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token; a special token's name."""
        try:
            return self._bytes[token_id]
        except KeyError:
            raise UserError(f"no token has the id {token_id}: the vocabulary has ids below {self.vocab_size}") from None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.token_bytes(i) for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD.

        Raises:
            UserError: an id is not in the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", "replace")

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        special_tokens: Sequence[str] = (END_OF_TEXT,),
        progress: Callable[[int], None] | None = None,
    ) -> "Tokenizer":
        """Trains a BPE with GPT-2's split pattern.

        Ids are the 256 bytes in GPT-2's order, then the merges, then the special tokens.

        Args:
            texts: read once, one at a time.
            vocab_size: all ids together.
            progress: called after each merge with how many there are.

        Raises:
            UserError: `vocab_size` leaves no room, or the texts have too few pairs for so many.
        """
        least = 256 + len(special_tokens)
        if vocab_size < least:
            raise UserError(
                f"--vocab-size must be at least {least} (256 bytes and the special tokens), got {vocab_size}"
            )
        if len(set(special_tokens)) != len(special_tokens) or "" in special_tokens:
            raise UserError("special tokens must be different from each other and not empty")
        merges = train_merges(count_words(texts, GPT2_PATTERN), vocab_size - least, BYTE_IDS, progress)
        if len(merges) < vocab_size - least:
            raise UserError(
                f"the text has only enough for {least + len(merges):,} ids, not for --vocab-size {vocab_size:,}: "
                "give more text, or ask for fewer"
            )
        tokens = sorted((bytes([b]) for b in range(256)), key=lambda b: BYTE_IDS[b[0]])
        pairs = []
        for left, right in merges:
            pairs.append((tokens[left], tokens[right]))
            tokens.append(tokens[left] + tokens[right])
        vocab = {token: i for i, token in enumerate(tokens)}
        specials = {s: len(vocab) + i for i, s in enumerate(special_tokens)}
        return cls(vocab, pairs, specials)

    @classmethod
    def from_gpt2_files(cls, vocab_bpe: str | Path, encoder_json: str | Path) -> "Tokenizer":
        """GPT-2's tokenizer from the two files that it was published as.

        Raises:
            UserError: a file is missing or is not what it should be.
        """
        vocab = _read_json(Path(encoder_json))
        lines = _read_text(Path(vocab_bpe)).split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        return _build(
            cls, vocab, merges, {s: vocab[s] for s in (END_OF_TEXT,) if s in vocab}, GPT2_PATTERN, encoder_json
        )

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Tokenizer":
        """Reads the `tokenizer.json` of a byte-level BPE: a folder that holds one, or the file.

        The chat template is read from beside it: `chat_template.jinja`, else `tokenizer_config.json`'s.

        Raises:
            UserError: it is missing or damaged, or something in it is not computed here; names the file and the field.
        """
        path = Path(path)
        if path.is_dir() or path.suffix != ".json":
            if not (path / "tokenizer.json").is_file():
                raise UserError(
                    f"no tokenizer at {path}: there is no tokenizer.json; train one with `fastgpt tokenizer train`"
                )
            path = path / "tokenizer.json"
        content = _read_json(path)
        model = content.get("model")
        if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or "merges" not in model:
            raise UserError(
                f"{path}: the model's type is {(model or {}).get('type')!r}, only a byte-level BPE can be loaded"
            )
        for field, value in (("normalizer", content.get("normalizer")), ("dropout", model.get("dropout"))):
            if value:
                kind = value.get("type", value) if isinstance(value, dict) else value
                raise UserError(f"{path}: {field} is {kind!r}, only none can be loaded")
        for field in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(field):
                raise UserError(f"{path}: {field} is {model[field]!r}, only a byte-level BPE without it can be loaded")
        specials = {}
        for token in content.get("added_tokens") or []:
            if not token.get("special"):
                raise UserError(
                    f"{path}: the added token {token.get('content')!r} is not special, which cannot be loaded"
                )
            specials[token["content"]] = token["id"]
        tokenizer = _build(cls, model["vocab"], model["merges"], specials, _split_pattern(content, path), path)
        tokenizer.chat_template = _chat_template(path.parent)
        return tokenizer

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json (with the chat template); transformers' AutoTokenizer then
        gives the same ids."""
        folder = Path(folder)
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        pre_tokenizer: dict[str, Any] = byte_level
        if self.pattern != GPT2_PATTERN:
            split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
            pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, {**byte_level, "use_regex": False}]}
        vocab = {_spell(token): i for token, i in self.vocab.items()} | self.special_tokens
        specials = sorted(self.special_tokens.items(), key=lambda item: item[1])
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        content = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, "content": s, **flags} for s, i in specials],
            "normalizer": None,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
                "merges": [f"{_spell(left)} {_spell(right)}" for left, right in self.merges],
            },
        }
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if self.eot_id is not None:
            end = self.token_bytes(self.eot_id).decode()
            config |= {"bos_token": end, "eos_token": end}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / "tokenizer.json", json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        atomic_write(folder / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=1) + "\n")


def _spell(token: bytes) -> str:
    return "".join(CHARACTER[b] for b in token)


def _unspell(token: str) -> bytes:
    return bytes(BYTE[character] for character in token)


def _build(
    cls: type[Tokenizer], vocab: Any, merges: Any, specials: dict[str, int], pattern: str, source: str | Path
) -> Tokenizer:
    """A tokenizer from tokens as files spell them; anything wrong with them is the file's fault."""
    try:
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        tokens = {_unspell(token): i for token, i in vocab.items() if token not in specials}
        return cls(tokens, [(_unspell(left), _unspell(right)) for left, right in pairs], specials, pattern)
    except KeyError as error:
        raise UserError(f"{source}: the character {error} stands for no byte: this is no byte-level BPE") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{source} is no byte-level BPE that can be loaded: {error}") from None


def _split_pattern(content: dict[str, Any], path: Path) -> str:
    """The split pattern of a tokenizer.json's pre_tokenizer."""
    pre = content.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    kinds = [step.get("type") for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or kinds[:-1] not in ([], ["Split"]):
        raise UserError(f"{path}: pre_tokenizer is {' + '.join(map(str, kinds)) or None}, only ByteLevel can be loaded")
    if steps[-1].get("add_prefix_space", True):
        raise UserError(f"{path}: pre_tokenizer.add_prefix_space is True, only False can be loaded")
    by_byte_level = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and by_byte_level:
        return GPT2_PATTERN
    pattern = steps[0].get("pattern", {}).get("Regex")
    if by_byte_level or pattern is None or steps[0].get("behavior") != "Isolated" or steps[0].get("invert"):
        raise UserError(f"{path}: pre_tokenizer is no single split by a regular expression, which cannot be loaded")
    return pattern


def _chat_template(folder: Path) -> str | None:
    """The chat template of a tokenizer's folder; of several that have names, the default one."""
    if (folder / "chat_template.jinja").is_file():
        return _read_text(folder / "chat_template.jinja")
    if not (folder / "tokenizer_config.json").is_file():
        return None
    template = _read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        template = next((t.get("template") for t in template if t.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: give the path of a tokenizer's file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is damaged: it is no JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it is no JSON object")
    return content


def without_surrogates(text: str) -> str:
    """The text with its surrogates paired, or replaced by U+FFFD where they are alone, as tiktoken does it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class StreamDecoder:
    """Text from ids that come one at a time: a character is given out when its last byte has come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is left of an unfinished character."""
        return self._decoder.decode(b"", final=True)
