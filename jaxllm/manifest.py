"""A file that says what a directory is made of, so that nobody goes on with something else in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def claim(file: Path, made_of: Mapping[str, Any]) -> None:
    """Writes `made_of`, JSON values by name, whole or not at all; does nothing where the same is there already.

    Raises ValueError where something else is, or nothing that can be read.
    """
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        half = file.with_suffix(".half")
        half.write_text(json.dumps(made_of, indent=1) + "\n")
        half.replace(file)
        return
    try:
        there = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}. Remove {file.parent} to begin anew.") from error
    if other := [name for name in made_of if there.get(name) != made_of[name]]:
        raise ValueError(
            f"{file.parent} was made with another {other[0]}: {there.get(other[0])}, not {made_of[other[0]]}. Give the "
            "same to go on with it, or remove it, or choose another directory."
        )
