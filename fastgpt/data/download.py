"""The public texts, data and models that the lessons use: where they are and under which licence, and fetching them.

A file has its name only when its SHA-256 is the published one. Until then its bytes are in a hidden part-file beside
it, which the next call goes on with.
"""

import hashlib
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen
from zipfile import BadZipFile, ZipFile

from fastgpt.errors import UserError
from fastgpt.files import atomic_write, explained, fsync, locked, sha256_file

TIMEOUT = 20.0  # seconds without a byte
RETRY_AFTER = (1.0, 4.0)  # seconds to wait before asking again, where the server failed or the connection was cut
BLOCK = 1 << 16

Progress = Callable[[str, int, int | None], None]  # the file's name, bytes received, bytes in all where that is known


@dataclass(frozen=True)
class RemoteFile:
    """A published file: `size` in bytes and SHA-256 are those of what `name` will hold. If `url` is that of a zip, this
    is its `member`, however the zip was packed."""

    name: str
    url: str
    size: int
    sha256: str
    member: str | None = None

    def by_hand(self, folder: Path) -> Path:
        """Where the file that `url` names is taken from, if someone put it there."""
        return folder / (self.url.rsplit("/", 1)[1] if self.member else self.name)


@dataclass(frozen=True)
class RemoteSet:
    """Files that belong together, the licence they are under, and what they are for."""

    files: tuple[RemoteFile, ...]
    licence: str
    purpose: str

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)


_CHAR_RNN = "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
_BOOK = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/28c65cdfbc3338e2e040016eea4b7fdf556e4d57"
_GPT2_FILES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
_GPT2_HUB = "https://huggingface.co/openai-community/gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e"
_ENCODER = (1_042_301, "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783")
_MERGES = (456_318, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5")

SETS = {
    "tiny-shakespeare": RemoteSet(
        (
            RemoteFile(
                "tiny_shakespeare.txt",
                f"{_CHAR_RNN}/data/tinyshakespeare/input.txt",
                1_115_394,
                "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            ),
        ),
        "public domain, from karpathy/char-rnn (MIT)",
        "a text to train a tokenizer and a model on",
    ),
    "sms-spam": RemoteSet(
        (
            RemoteFile(
                "sms_spam.tsv",
                "https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",
                477_907,
                "7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d",
                member="SMSSpamCollection",
            ),
        ),
        "CC BY 4.0: Almeida and Hidalgo, SMS Spam Collection, UCI, doi.org/10.24432/C5CC84",
        "5,574 messages, spam or ham, for `fastgpt finetune classify`",
    ),
    "instructions": RemoteSet(
        (
            RemoteFile(
                "instruction-data.json",
                f"{_BOOK}/ch07/01_main-chapter-code/instruction-data.json",
                203_524,
                "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944",
            ),
        ),
        "Apache-2.0: Raschka, LLMs-from-scratch",
        "1,100 instructions with answers (Alpaca format), for `fastgpt finetune instruct`",
    ),
    "gpt2-tokenizer": RemoteSet(
        (
            RemoteFile("vocab.bpe", f"{_GPT2_FILES}/vocab.bpe", *_MERGES),
            RemoteFile("encoder.json", f"{_GPT2_FILES}/encoder.json", *_ENCODER),
        ),
        "modified MIT: OpenAI, gpt-2",
        "GPT-2's tokenizer: a folder for every --tokenizer",
    ),
    "gpt2": RemoteSet(
        (
            RemoteFile(
                "config.json",
                f"{_GPT2_HUB}/config.json",
                665,
                "0daed7749b4f02b8f76240d5444551d7b08712dab4d0adb8239c56ba823bb7b4",
            ),
            RemoteFile("merges.txt", f"{_GPT2_HUB}/merges.txt", *_MERGES),
            RemoteFile("vocab.json", f"{_GPT2_HUB}/vocab.json", *_ENCODER),
            RemoteFile(
                "model.safetensors",
                f"{_GPT2_HUB}/model.safetensors",
                548_105_171,
                "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
            ),
        ),
        "modified MIT: OpenAI, gpt-2",
        "GPT-2 124M with its tokenizer: a folder for every --model",
    ),
}


def remote_set(name: str) -> RemoteSet:
    """The set of that name.

    Raises:
        UserError: there is none.
    """
    if name not in SETS:
        raise UserError(f"no set is called {name}: take {', '.join(SETS)}")
    return SETS[name]


def download(file: RemoteFile, folder: Path, progress: Progress | None = None) -> bool:
    """Sees that `folder` has the file; returns whether it had to be received.

    A file that someone put there (`RemoteFile.by_hand`) is taken when its SHA-256 is right.

    Raises:
        UserError: no network, not the published file, or no place to write it; the message says what to do. A file that
            was there is left as it is; one that was received and is wrong is removed.
    """
    path, by_hand = folder / file.name, file.by_hand(folder)
    part = folder / f".{file.name}.part"
    with explained(path):
        folder.mkdir(parents=True, exist_ok=True)
        for there in (path, by_hand):
            if there.exists():
                if not _publish(there, path, file):
                    raise UserError(
                        f"{there} is not the published file (SHA-256 {file.sha256}): remove it and run this again, "
                        f"or put there what {file.url} has"
                    )
                return False
        with locked(part, f"another process is downloading {path}: wait for it"):
            _receive(file, part, by_hand, progress)
            if not _publish(part, path, file):
                part.unlink()
                raise UserError(
                    f"what {file.url} gave is not the published file (SHA-256 {file.sha256}) and was removed: "
                    f"run this again, or put the right one at {by_hand}"
                )
            part.unlink(missing_ok=True)  # an archive's
    return True


def _publish(found: Path, path: Path, file: RemoteFile) -> bool:
    """Makes `path` of the found file or archive; returns whether the checksum allowed it."""
    if file.member and found != path:
        try:
            with ZipFile(found) as archive, archive.open(file.member) as member:
                content = member.read(file.size + 1)  # no more, whatever the archive claims
        except (BadZipFile, KeyError, RuntimeError, zlib.error, EOFError):  # none, without it, encrypted, damaged
            return False
        right = hashlib.sha256(content).hexdigest() == file.sha256
        if right:
            atomic_write(path, content)
        return right
    right = sha256_file(found) == file.sha256
    if right and found != path:
        fsync(found)
        os.replace(found, path)
        fsync(path.parent)
    return right


def _receive(file: RemoteFile, part: Path, by_hand: Path, progress: Progress | None) -> None:
    """Goes on with `part` until it has all that the server has."""
    for pause in (*RETRY_AFTER, None):
        try:
            _receive_once(file, part, progress)
            return
        except (OSError, HTTPException) as error:
            failed = error.code >= 500 if isinstance(error, HTTPError) else not isinstance(error, URLError)
            if failed and pause is not None:
                time.sleep(pause)
                continue
            if not part.stat().st_size:
                part.unlink()
            raise UserError(
                f"cannot download {file.url} ({_reason(error)}): run this again where it can be reached, "
                f"or put that file at {by_hand}"
            ) from None


def _receive_once(file: RemoteFile, part: Path, progress: Progress | None) -> None:
    start = part.stat().st_size
    try:
        response = urlopen(Request(file.url, headers={"Range": f"bytes={start}-"} if start else {}), timeout=TIMEOUT)
    except HTTPError as error:
        if start and error.code == 416:  # it was stopped between the last byte and the checksum
            return
        raise
    with response:
        resumed = response.status == 206
        received = start if resumed else 0
        total = None if response.length is None else received + response.length
        with explained(part), open(part, "ab" if resumed else "wb") as out:
            while block := response.read(BLOCK):
                out.write(block)
                received += len(block)
                if progress:
                    progress(file.name, received, total)
    if total is not None and received < total:  # which http.client does not report
        raise ConnectionError(f"the connection ended after {received:,} of {total:,} bytes")


def _reason(error: OSError | HTTPException) -> str:
    if isinstance(error, HTTPError):
        return f"the server says {error.code} {error.reason}"
    reason = error.reason if isinstance(error, URLError) else error
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return " ".join(text.split())
