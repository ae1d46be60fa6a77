"""Writing files so that a kill or a full disk at any moment leaves what was there before, and nothing half-done."""

import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastgpt.errors import UserError

# What went wrong -> what to do. Anything else is a bug of ours and keeps its traceback.
_ADVICE = {
    errno.ENOSPC: "no space is left on the device: free some and run it again",
    errno.EDQUOT: "the disk quota is used up: free some and run it again",
    errno.EFBIG: "the file became too large for this disk or this process's limit: raise it and run it again",
    errno.EACCES: "permission denied: choose a folder that you may write to",
    errno.EPERM: "not permitted: choose a folder that you may write to",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.ENOTDIR: "a part of that path is a file, not a folder: choose another path",
    errno.EEXIST: "a file is there already: choose another path",
    errno.EISDIR: "that is a folder: choose another path",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
}
# safetensors and torch.save report a failed write as errors of their own, with the system's words somewhere in them.
_WORDS = {
    "no space left": errno.ENOSPC,
    "quota exceeded": errno.EDQUOT,
    "file too large": errno.EFBIG,
    "permission denied": errno.EACCES,
    "read-only file system": errno.EROFS,
    "unexpected pos": errno.ENOSPC,  # torch.save's zip writer, after any short write
    "write failed": errno.ENOSPC,
}


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns a failure of the system to write `path` into a UserError that names it and says what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        code = getattr(error, "errno", None)
        if not isinstance(error, OSError):
            text = f"{error} {error.__cause__ or error.__context__ or ''}".lower()
            code = next((c for words, c in _WORDS.items() if words in text), None)
        if code not in _ADVICE:
            raise
        raise UserError(f"cannot write {path}: {_ADVICE[code]}") from error


def fsync(path: Path) -> None:
    """Returns when a file or folder is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Replaces `path` by `content` in one step: another process sees the old file or the new one, whole.

    Raises:
        UserError: it could not be written; the old file is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with explained(path):
        try:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            fsync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def refuse_existing(path: Path) -> None:
    """Raises UserError where a new folder would replace anything."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists already and is not overwritten: remove it or choose another folder")


def publish(folder: Path, path: Path) -> None:
    """Makes a folder that is complete `path`, in one step, when all of it is on the disk."""
    for file in sorted(folder.rglob("*")):
        fsync(file)
    fsync(folder)
    os.replace(folder, path)  # an empty folder there is replaced
    fsync(path.parent)


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Holds the file `path` for this process, until it ends in whatever way.

    Raises:
        UserError: `busy`, if another process holds it.
    """
    if sys.platform == "win32":  # has no flock; two processes at once are not told apart there
        yield
        return
    import fcntl

    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(busy) from None
        except OSError:  # of a file system without locks
            pass
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise UserError(busy)  # who held it has finished, and removed it, in between
        yield


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """A folder to fill; it becomes `path`, whole and on the disk, when the block ends, and is removed if it fails.

    Raises:
        UserError: `path` exists and is not empty, or something could not be written.
    """
    path = Path(path)
    refuse_existing(path)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with explained(path):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            publish(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
