import errno
import resource
import subprocess
import sys

import pytest

from fastgpt.errors import UserError
from fastgpt.files import atomic_dir, atomic_write, explained, sha256_file


def test_atomic_write_replaces_or_leaves_alone(tmp_path):
    path = tmp_path / "a.txt"
    atomic_write(path, "one")
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    with pytest.raises(TypeError):
        atomic_write(path, 5)
    assert path.read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_atomic_dir_appears_whole(tmp_path):
    with atomic_dir(tmp_path / "deep/out") as folder:
        (folder / "sub").mkdir()
        (folder / "sub/file").write_text("x")
        assert not (tmp_path / "deep/out").exists()
    assert (tmp_path / "deep/out/sub/file").read_text() == "x"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


def test_atomic_dir_leaves_nothing_of_a_failure(tmp_path):
    def fail_midway():
        with atomic_dir(tmp_path / "out") as folder:
            (folder / "file").write_text("x")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail_midway()
    assert not list(tmp_path.iterdir())


def test_atomic_dir_overwrites_nothing(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_dir(tmp_path / "out") as folder:  # an empty folder is nothing
        (folder / "file").write_text("x")
    for path in (tmp_path / "out", tmp_path / "out/file"):
        with pytest.raises(UserError, match="exists already"), atomic_dir(path):
            pass
    assert (tmp_path / "out/file").read_text() == "x"


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_text("good")
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from fastgpt.files import atomic_write
atomic_write({str(path)!r}, b"x" * 5000)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"UserError: cannot write {path}: the file became too large" in done.stderr
    assert path.read_text() == "good"
    assert len(list(tmp_path.iterdir())) == 1
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "x"), "no space is left"),
        (PermissionError(errno.EACCES, "x"), "permission denied"),
        (RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0"), "no space is left"),
        (RuntimeError("Error while serializing: IoError(Os { message: No space left on device })"), "no space is left"),
        (RuntimeError("I/O error: File too large (os error 27)"), "too large"),
    ],
)
def test_what_went_wrong_is_said_with_what_to_do(error, words):
    with pytest.raises(UserError, match=f"cannot write there: .*{words}"), explained("there"):
        raise error


def test_other_errors_keep_their_traceback():
    with pytest.raises(KeyError), explained("there"):
        raise KeyError("a bug")


def test_sha256(tmp_path):
    (tmp_path / "abc").write_text("abc")
    assert sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
