# csrc/bpe/module.cpp

from collections.abc import Callable, Iterable

def train(
    texts: Iterable[str],
    cl100k: bool,
    classes: bytes,
    merges: int,
    byte_ids: list[int],
    threads: int,
    progress: Callable[[int], None] | None,
) -> list[tuple[int, int]]: ...
def split(text: str, cl100k: bool, classes: bytes) -> list[bytes]: ...
