"""Text to calibrate and to measure on, from files: plain text, JSON lines, or a directory of both."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SUFFIXES = (".txt", ".md", ".jsonl")  # what is read of a directory
_BLOCK = 1 << 20  # bytes
_MAX_LINE = 64 << 20  # bytes of a JSON line; longer ones are hostile or no lines


def read_text(path: str | Path, max_chars: int | None = None, field: str | None = None) -> str:
    """The text of a file or directory, which must be UTF-8.

    path: a .jsonl file, whose records are joined by blank lines; any other file, as it is; or a directory: every .txt,
        .md and .jsonl file below it, in the order of their paths, joined by blank lines.
    max_chars: only the beginning is read, however large the file.
    field: of each JSON line, the field that holds its text; by default "text", or the contents of "messages" joined by
        blank lines, or the only field that is a string.

    Raises FileNotFoundError, and ValueError for what is not UTF-8, a JSON line that has no such text (with its number)
    and where there is no text at all.
    """
    path = Path(path)
    if max_chars is not None and max_chars < 1:
        raise ValueError(f"max_chars is {max_chars}; expected a positive number of characters, or None for all.")
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; expected a text file, a .jsonl file or a directory of {', '.join(SUFFIXES)} files."
        )
    pieces, left = [], max_chars
    for piece in _pieces(path, field):
        pieces.append(piece[:left])
        if left is not None and (left := left - len(piece)) <= 0:
            break
    text = "".join(pieces)
    if not text.strip():
        raise ValueError(f"{path} holds no text.")
    return text


def _pieces(path: Path, field: str | None) -> Iterator[str]:
    """The text, piece by piece."""
    if not path.is_dir():
        yield from _records(path, field) if path.suffix.lower() == ".jsonl" else _blocks(path)
        return
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise ValueError(f"{path} has no file named {', '.join('*' + suffix for suffix in SUFFIXES)} in or below it.")
    for n, file in enumerate(files):
        yield "\n\n" if n else ""
        yield from _pieces(file, field)


def _blocks(path: Path) -> Iterator[str]:
    """A text file, its line ends as "\\n", without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    carried = ""  # a carriage return whose line feed may be in the next block
    with path.open("rb") as file:
        while True:
            block = file.read(_BLOCK)
            try:
                text = carried + decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, error) from error
            carried = "\r" if block and text.endswith("\r") else ""
            yield text.removesuffix(carried).replace("\r\n", "\n").replace("\r", "\n")
            if not block:
                return


def _records(path: Path, field: str | None) -> Iterator[str]:
    """The text of each JSON line, and what joins them."""
    with path.open("rb") as file:
        number, joint = 0, ""
        while line := file.readline(_MAX_LINE + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > _MAX_LINE:
                raise ValueError(f"{where} is longer than {_MAX_LINE >> 20} MiB; is this a file of JSON lines?")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                record = _text_of(json.loads(text), field)
                record.encode()  # JSON can hold half a surrogate pair, which is no text
            except UnicodeDecodeError as error:
                raise _not_utf8(where, error) from error
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: {error}") from error
            yield joint + record
            joint = "\n\n"


def _text_of(record: Any, field: str | None) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"{type(record).__name__} {record!r:.40}; expected a JSON object with a text.")
    strings = [name for name, value in record.items() if isinstance(value, str)]
    messages = record.get("messages")
    if field is not None or "text" in record:
        if (name := field or "text") in strings:
            return record[name]
        raise ValueError(f"the field {name!r} should hold a text; those that do: {strings}.")
    if isinstance(messages, list):
        contents = [message.get("content") for message in messages if isinstance(message, dict)]
        contents = [content for content in contents if isinstance(content, str)]
        if not contents or len(contents) < len(messages):
            raise ValueError('"messages" should be a list of objects, each with a text as "content".')
        return "\n\n".join(contents)
    if len(strings) != 1:
        raise ValueError(
            f'expected a field "text", a list "messages" or one field that is a text; there are {[*record]}, '
            f"of which {strings} are. Name one with `field`."
        )
    return record[strings[0]]


def _not_utf8(where: str | Path, error: UnicodeDecodeError) -> ValueError:
    byte = error.object[error.start]
    return ValueError(f"{where} is not UTF-8 text: byte 0x{byte:02x}, {error.reason}. Convert it to UTF-8 first.")
