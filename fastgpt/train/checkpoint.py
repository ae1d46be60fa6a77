"""Checkpoints: `checkpoints/step_<n>/` is a model folder (what transformers opens) plus `training_state/`.

One is written whole under another name, fsynced and renamed, so a kill at any moment leaves the last good one. Which
one is the newest is found by looking; nothing points at it that could be wrong. `training_state/manifest.json` holds
the size and SHA-256 of every other file, so a damaged checkpoint is told from a good one before it is loaded.

`training_state/state.pt` has all that a resumed run needs beside the model. Of a run on several ranks, the optimizer's
tensors and the random states are in `training_state/ranks/` instead (see sharded.py). Either is read by any number of
ranks.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastgpt.errors import UserError
from fastgpt.files import atomic_dir, sha256_file

STATE = Path("training_state") / "state.pt"
MANIFEST = Path("training_state") / "manifest.json"
RANKS = Path("training_state") / "ranks"


def steps(run: Path) -> dict[int, Path]:
    """The run's checkpoints by step, in order; half-written ones have another name and do not count."""
    found = {}
    for folder in (run / "checkpoints").glob("step_*"):
        if match := re.fullmatch(r"step_(\d+)", folder.name):
            found[int(match[1])] = folder
    return dict(sorted(found.items()))


def path(run: Path, step: int) -> Path:
    """Where the checkpoint of that step is, or would be."""
    return run / "checkpoints" / f"step_{step}"


def is_good(folder: Path) -> bool:
    """Whether it is there and undamaged."""
    return folder.exists() and not _damage(folder)


def save(
    run: Path,
    step: int,
    write_model: Callable[[Path], None],
    state: dict[str, Any],
    keep: int,
    best: int | None = None,
    ranks: Path | None = None,
) -> Path:
    """Writes checkpoints/step_<step>/ and then removes all but the newest `keep` and that of step `best`.

    Args:
        write_model: writes the model folder's files into the folder that it is given.
        state: tensors, numbers, strings, and lists and dicts of them; `load` gives it back.
        ranks: the folder that the ranks wrote side by side, which becomes a part of the checkpoint.

    Raises:
        UserError: it could not be written (a full disk, no permission); what was there before is untouched.
    """
    folder = path(run, step)
    if is_good(folder):  # stopped again before its first step: a run's step is the same however it came there
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    with atomic_dir(folder) as partial:
        write_model(partial)
        (partial / STATE).parent.mkdir()
        torch.save(state, partial / STATE)
        if ranks:
            ranks.rename(partial / RANKS)
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        manifest = {
            "step": step,
            "files": {
                p.relative_to(partial).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in files
            },
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for old, its_folder in list(steps(run).items())[:-keep]:
        if old != best:
            shutil.rmtree(its_folder, ignore_errors=True)
    return folder


def remove_unfinished(run: Path) -> None:
    """Removes what a killed run left half-written."""
    for folder in (run / "checkpoints").glob("step_*.tmp-*"):
        shutil.rmtree(folder, ignore_errors=True)
    for file in run.glob("*.tmp-*"):
        if file.is_file():
            file.unlink()


def newest(run: Path) -> tuple[int, Path] | None:
    """The newest checkpoint, checked; None if the run has none yet.

    Raises:
        UserError: it is damaged; the line names the file, and the older checkpoint that can be taken instead.
    """
    found = steps(run)
    if not found:
        return None
    step, folder = found.popitem()
    if damage := _damage(folder):
        older = f"to go on from step {max(found)}" if found else "to start again from step 0"
        raise UserError(f"checkpoint {folder} is damaged: {damage}; move it out of the way {older}")
    return step, folder


def _damage(folder: Path) -> str | None:
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, OSError):
        return f"{MANIFEST} cannot be read"
    for name, want in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != want["bytes"]:
            return f"{name} has {file.stat().st_size:,} bytes, not {want['bytes']:,}"
        if sha256_file(file) != want["sha256"]:
            return f"the content of {name} has changed"
    return None


def load_state(folder: Path) -> dict[str, Any]:
    """The training state of a checkpoint that `newest` found good; read without running any code from it."""
    return torch.load(folder / STATE, map_location="cpu", weights_only=True)
