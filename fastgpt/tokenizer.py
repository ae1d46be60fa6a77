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
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import regex
import tiktoken

from fastgpt.bpe import PATTERNS, learn_merges
from fastgpt.errors import UserError
from fastgpt.files import atomic_write
from fastgpt.tokenizer_file import (
    BYTE,
    CHARACTER,
    END_OF_TEXT,
    TokenizerFile,
    read_tokenizer,
    read_two_files,
    short,
    spell,
    unspell,
)

GPT2_PATTERN, CL100K_PATTERN = PATTERNS["gpt2"], PATTERNS["cl100k"]
# The same splits without backtracking, of which tiktoken bears a million steps a word. Of a run of white space the last
# is left to the word behind it: \s+(?!\S) would step back through a long run; here a step goes over 200 characters.
_WHITE_SPACE = r"\s++$|\s{1,200}(?=\s\S)|\s(?=\S)|(?:\s{200}(?=\s))++(?:\s(?=\s))*+"
_FAST_PATTERN = {
    GPT2_PATTERN: r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|" + _WHITE_SPACE,
    CL100K_PATTERN: r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s*[\r\n]|" + _WHITE_SPACE,
}
# A split pattern must take all of this, and so, as far as it can be told from one text, all of any text.
_PROBE = "It's 10\u00bd \t\r\n\n  naïve e\u0301 数学 'LL __x__ \0\x7f\u200d\ufeff\ue000😀<|>\u3000 "
# No vocabulary comes near it, and a model's embedding with so many rows would fill any memory.
_MOST_IDS = 2**24
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

    Raises:
        UserError: what would not encode every text, or would not be the same when saved and read again.
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
        _check_specials(special_tokens, vocab)
        self._bytes = _by_id([*vocab.items(), *((s.encode(), i) for s, i in special_tokens.items())])
        by_rank = _by_rank(vocab, self.merges)
        specials = sorted(special_tokens, key=special_tokens.__getitem__)
        ids = [vocab[token] for token in by_rank] + [special_tokens[s] for s in specials]
        self._ids = None if ids == list(range(len(ids))) else ids  # rank -> id, where they differ
        self._encoding = _encoding(pattern, by_rank, specials)

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
        """The ids of a text. A lone surrogate, which is no character, becomes U+FFFD.

        Args:
            allowed_special: special tokens that may be made where the text spells them; otherwise it is plain text.
                Where one begins like another, the longest is made.

        Raises:
            UserError: a name in `allowed_special` is no special token.
        """
        if allowed_special:
            if unknown := set(allowed_special) - set(self.special_tokens):
                have = ", ".join(self.special_tokens) or "none"
                raise UserError(f"{min(unknown)} is no special token of this tokenizer: it has {have}")
            longest_first = sorted(allowed_special, key=len, reverse=True)
            parts = regex.split(f"({'|'.join(map(regex.escape, longest_first))})", text)  # every second is special
            return [
                i for n, part in enumerate(parts) for i in ([self.special_tokens[part]] if n % 2 else self.encode(part))
            ]
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
        pattern: Literal["gpt2", "cl100k"] = "gpt2",
    ) -> "Tokenizer":
        """Trains a BPE, in C++ threads where the native trainer was built.

        Ids are the 256 bytes in GPT-2's order, then the merges, then the special tokens.

        Args:
            texts: read once, one at a time.
            vocab_size: all ids together.
            progress: called now and then while merging, and at its end, with how many merges there are.
            pattern: how text is split into words: as GPT-2 does, or as GPT-4's cl100k does, which keeps numbers to
                three digits and line ends with what is before them.

        Raises:
            UserError: `vocab_size` leaves no room, or the texts have too few pairs for so many.
        """
        if pattern not in PATTERNS:
            raise UserError(f"no split pattern {pattern!r}: it is {' or '.join(PATTERNS)}")
        least = 256 + len(special_tokens)
        if vocab_size < least:
            raise UserError(
                f"--vocab-size must be at least {least} (256 bytes and the special tokens), got {vocab_size}"
            )
        if len(set(special_tokens)) != len(special_tokens) or "" in special_tokens:
            raise UserError("special tokens must be different from each other and not empty")
        merges = learn_merges(texts, pattern, vocab_size - least, BYTE_IDS, progress)
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
        return cls(vocab, pairs, specials, PATTERNS[pattern])

    @classmethod
    def from_gpt2_files(cls, vocab_bpe: str | Path, encoder_json: str | Path) -> "Tokenizer":
        """GPT-2's tokenizer from the two files that it was published as.

        Raises:
            UserError: a file is missing or is not what it should be.
        """
        return cls._from_file(read_two_files(Path(vocab_bpe), Path(encoder_json)))

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Tokenizer":
        """Reads a byte-level BPE: a `tokenizer.json` or a folder that holds one, or that holds GPT-2's two files.

        The two are vocab.bpe and encoder.json, or merges.txt and vocab.json. The chat template is read from beside
        them: `chat_template.jinja`, else `tokenizer_config.json`'s.

        Raises:
            UserError: it is missing or damaged, or something in it is not computed here; names the file and the field.
        """
        return cls._from_file(read_tokenizer(Path(path)))

    @classmethod
    def _from_file(cls, file: TokenizerFile) -> "Tokenizer":
        pattern = file.pattern or GPT2_PATTERN
        try:
            return cls(file.vocab, file.merges, file.special_tokens, pattern, file.chat_template)
        except UserError as error:
            raise UserError(f"{file.source}: {error}") from None

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json (with the chat template); transformers' AutoTokenizer then
        gives the same ids."""
        folder = Path(folder)
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        pre_tokenizer: dict[str, Any] = byte_level
        if self.pattern != GPT2_PATTERN:
            split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
            pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, {**byte_level, "use_regex": False}]}
        vocab = {spell(token): i for token, i in self.vocab.items()} | self.special_tokens
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
                "merges": [f"{spell(left)} {spell(right)}" for left, right in self.merges],
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


def _check_specials(special_tokens: dict[str, int], vocab: dict[bytes, int]) -> None:
    for name in special_tokens:
        try:
            ordinary = name.encode() in vocab or (BYTE.keys() >= set(name) and unspell(name) in vocab)
        except UnicodeEncodeError:
            raise UserError(f"the special token {short(name)} is no text: it has a lone surrogate") from None
        if not name:
            raise UserError("a special token is empty")
        if ordinary:
            raise UserError(f"the special token {short(name)} is an ordinary token too")


def _by_id(tokens: list[tuple[bytes, Any]]) -> dict[int, bytes]:
    """Token by id; refuses what is no id, or is the id of two."""
    found: dict[int, bytes] = {}
    for token, token_id in tokens:
        if type(token_id) is not int or not 0 <= token_id < _MOST_IDS:
            raise UserError(
                f"the token {short(token)} has the id {short(token_id)}: "
                f"ids are whole numbers from 0 to {_MOST_IDS - 1:,}"
            )
        if found.setdefault(token_id, token) != token:
            raise UserError(f"two tokens have the same id {token_id}: {short(found[token_id])} and {short(token)}")
    return found


def _by_rank(vocab: dict[bytes, int], merges: list[tuple[bytes, bytes]]) -> list[bytes]:
    """The 256 bytes in the order of their ids, then what each merge makes."""
    singles = [bytes([b]) for b in range(256)]
    if missing := [f"0x{token.hex()}" for token in singles if token not in vocab]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"no token for the single byte {', '.join(missing[:3])}{more}: this is no byte-level BPE")
    if b"" in vocab:
        raise UserError("a token is empty")
    by_rank, made = sorted(singles, key=vocab.__getitem__), set(singles)
    for left, right in merges:
        token = left + right
        if token not in vocab or left not in made or right not in made:
            raise UserError(
                f"the merge of {short(left)} and {short(right)} names a token that is not in the vocabulary, "
                "or that only a later merge makes"
            )
        if token in made:
            raise UserError(f"two merges make the same token {short(token)}")
        made.add(token)
        by_rank.append(token)
    return by_rank


def _encoding(pattern: str, by_rank: list[bytes], specials: list[str]) -> tiktoken.Encoding:
    try:
        pieces = [match[0] for match in regex.finditer(pattern, _PROBE)]
        encoding = tiktoken.Encoding(
            "fastgpt",
            pat_str=_FAST_PATTERN.get(pattern) or pattern.replace(r"\s+(?!\S)|\s+", _WHITE_SPACE),
            mergeable_ranks={token: rank for rank, token in enumerate(by_rank)},
            special_tokens={s: len(by_rank) + i for i, s in enumerate(specials)},
        )
    except (regex.error, ValueError) as error:
        message = " ".join(str(error).split())  # one line
        raise UserError(f"the split pattern {short(pattern)} cannot be read: {message}") from None
    if "" in pieces or "".join(pieces) != _PROBE:
        raise UserError(f"the split pattern {short(pattern)} leaves out a part of the text")
    return encoding


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
