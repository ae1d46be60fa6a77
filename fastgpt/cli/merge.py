"""fastgpt merge"""

from pathlib import Path

from fastgpt.model.adapter import merge_adapter


def merge(*, adapter: Path, out: Path, model: str | None = None) -> None:
    """Merge a LoRA adapter into its base and write the result as a whole model folder.

    Args:
        adapter: PEFT folder, as the fine-tuning commands and PEFT write it.
        out: Folder to make; it appears when all is done.
        model: The base to merge into; the one that the adapter names if not given.
    """
    base = merge_adapter(adapter, out, model)
    print(f"{out}: {base} with {adapter} merged into it")
