"""What a run depends on beside its config: versions, the device, threads, the code's revision."""

import json
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastgpt
from fastgpt.bench.environment import device_name


def environment(device: torch.device) -> dict[str, Any]:
    """As config.json has it. `git` is there where fastgpt is imported from a checkout."""
    found: dict[str, Any] = {
        "versions": {
            "fastgpt": fastgpt.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
        "device_name": device_name(device.type),
        "threads": torch.get_num_threads(),
    }
    if revision := git_revision(Path(fastgpt.__file__).parents[1]):
        found["git"] = revision
    return found


@cache
def git_revision(root: Path) -> dict[str, Any] | None:
    """The commit that the checkout `root` is at, and whether its tracked files differ from it; None if it is none."""
    if not (root / ".git").exists():  # an installed package may lie within somebody's checkout of something else
        return None

    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", root, *command], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return {
            "revision": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):  # no git here, or it does not trust the folder
        return None


def differences(run: Path, now: dict[str, Any]) -> list[str]:
    """How `now` differs from what the config.json of a run says, if it has one: ["torch 2.11 -> 2.13", ...].

    Args:
        run: a run folder, or its config.json.
    """
    try:
        was = json.loads((run if run.is_file() else run / "config.json").read_text())
    except FileNotFoundError:
        return []
    before, after = _flat(was), _flat(now)
    return [f"{name} {before[name]} -> {after[name]}" for name in after if before.get(name, after[name]) != after[name]]


def saved_ranks(run: Path) -> int:
    """How many ranks made the steps of a run folder, by its config.json."""
    return int(json.loads((run / "config.json").read_text()).get("ranks", 1))


def _flat(environment: dict[str, Any]) -> dict[str, str]:
    """Both in config.json's form."""
    git = environment.get("git", {})
    return {
        **environment.get("versions", {}),
        **{name: str(environment[name]) for name in ("device_name", "threads", "data_sha256") if name in environment},
        **({"git": git["revision"][:10] + ("-dirty" if git["dirty"] else "")} if git else {}),
    }
