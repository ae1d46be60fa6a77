"""The `fastgpt` command with small batches, each of them journalled: python -m tests.data.preparer COMMAND...

So that a kill finds it at any of many moments of a second.
"""

from fastgpt import files
from fastgpt.data import encode, preparation, read, shards


def small_batches(set_attribute=setattr, journal_seconds=3.0):
    """Batches of 1,500 bytes; of a text or line 6,000 are kept whole, of a corpus 4,000 are held back."""
    set_attribute(read, "BATCH_BYTES", 1500)
    set_attribute(read, "TEXT_BYTES", 6000)
    set_attribute(read, "LINE_BYTES", 6000)
    set_attribute(encode, "FEW_BATCHES", 2)
    set_attribute(preparation, "HELD_BACK", 4000)
    set_attribute(preparation, "JOURNAL_SECONDS", journal_seconds)


if __name__ == "__main__":
    from fastgpt.cli import main

    small_batches(journal_seconds=0.0)
    files.fsync = shards.fsync = lambda path: None  # a kill loses nothing that was written
    main()
