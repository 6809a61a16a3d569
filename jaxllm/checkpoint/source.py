"""Which reader a path is for."""

from __future__ import annotations

from pathlib import Path

from jaxllm.checkpoint import hf, native
from jaxllm.checkpoint.place import Place
from jaxllm.checkpoint.reader import Reader


def open_path(path: Path, *, origin: str, dtype: str | None = None, place: Place | None = None) -> Reader:
    """Opens what is at `path`, reading and checking headers alone; see `checkpoint.load_path`.

    place: where weights are put when they are read; on the default device by default.
    """
    path = path.absolute()
    if path.is_file() and path.suffix == ".gguf":
        from jaxllm.checkpoint import gguf  # the library takes a quarter of a second

        return gguf.reader(path, origin=origin, dtype=dtype, place=place)
    if (path / native.MANIFEST).is_file():
        return native.reader(path, dtype=dtype, place=place)
    if (path / "config.json").is_file():
        return hf.reader(path, origin=origin, dtype=dtype, place=place)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    ggufs = sorted(file.name for file in path.glob("*.gguf")) if path.is_dir() else []
    hint = f" Give one of its files: {', '.join(ggufs[:4])}." if ggufs else ""
    raise ValueError(
        f"{path} is no model: expected a directory with {native.MANIFEST} or config.json, or a .gguf file.{hint}"
    )
