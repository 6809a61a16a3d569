import json
import time

import pytest

from jaxllm import textfiles
from jaxllm.textfiles import read_text


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def lines(*records):
    return "\n".join(json.dumps(record) for record in records)


def test_a_text_file_is_read_as_it_is(tmp_path):
    text = "Il était une fois\n\n 你好 😀 \n"
    assert read_text(write(tmp_path / "a.txt", text)) == text
    assert read_text(str(write(tmp_path / "no_suffix", text))) == text
    assert read_text(write(tmp_path / "bom.txt", b"\xef\xbb\xbf" + text.encode())) == text


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1000])
def test_blocks_cut_no_character_and_no_line_end(tmp_path, monkeypatch, block):
    monkeypatch.setattr(textfiles, "_BLOCK", block)
    path = write(tmp_path / "a.txt", "\ufeffé\r\n你\r\r\n😀\n\r")
    assert read_text(path) == path.read_text(encoding="utf-8-sig") == "é\n你\n\n😀\n\n"
    for limit in range(1, 9):
        assert read_text(path, limit) == "é\n你\n\n😀\n\n"[:limit]


def test_json_lines(tmp_path):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    path = write(
        tmp_path / "a.jsonl",
        lines({"text": "one", "title": "T"}, {"messages": chat, "id": "7"}, {"body": "three", "id": 7}) + "\n\n",
    )
    assert read_text(path) == "one\n\nHi\n\nHello.\n\nthree"
    two = write(tmp_path / "two.JSONL", lines({"question": "Q", "answer": "A"}, {"question": "Q2", "answer": "A2"}))
    assert read_text(two, field="answer") == "A\n\nA2"


def test_a_directory_is_its_files_in_order(tmp_path):
    write(tmp_path / "b.txt", "two")
    write(tmp_path / "a" / "z.md", "one")
    write(tmp_path / "c.jsonl", lines({"text": "three"}))
    write(tmp_path / "a" / "ignored.bin", b"\xff\xff")
    assert read_text(tmp_path) == "one\n\ntwo\n\nthree"
    assert read_text(tmp_path, 6) == "one\n\nt"


def test_only_the_beginning_of_a_large_file_is_read(tmp_path):
    path = tmp_path / "large.txt"
    with path.open("wb") as file:
        file.write(b"The beginning. ")
        file.truncate(1 << 36)  # sparse: 64 GB that could not be held
    start = time.perf_counter()
    assert read_text(path, 15) == "The beginning. "
    broken = write(tmp_path / "a.jsonl", lines({"text": "fine"}) + "\n{broken")
    assert read_text(broken, 3) == "fin"  # what is not needed is not looked at
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": ', "line 2: .*char"),
        ("[1]", "line 1: list .*expected a JSON object"),
        ('{"text": 3, "title": "T"}', "line 1: the field 'text' should hold a text; those that do: .'title'"),
        ('\n{"a": "x", "b": "y"}', r"line 2: .*\['a', 'b'\].* Name one with `field`"),
        ('{"a": 1}', r"line 1: .*\['a'\]"),
        ('{"messages": [{"role": "user", "content": null}]}', 'line 1: "messages" should be'),
        ('{"messages": []}', 'line 1: "messages" should be'),
        ('{"text": "\\ud800"}', "line 1: .*surrogates"),
        (b'{"text": "\xff"}', "line 1 is not UTF-8 text: byte 0xff"),
        ("[" * 100_000, "line 1: .*recursion"),
        ("\n\n", "holds no text"),
    ],
)
def test_bad_json_lines_are_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"a\.jsonl.*{message}"):
        read_text(write(tmp_path / "a.jsonl", content))


def test_a_field_that_a_line_lacks_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"line 1: the field 'body' should hold a text; those that do: \['text'\]"):
        read_text(write(tmp_path / "a.jsonl", lines({"text": "x"})), field="body")


def test_lines_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(textfiles, "_MAX_LINE", 1 << 20)
    with pytest.raises(ValueError, match="line 1 is longer than 1 MiB"):
        read_text(write(tmp_path / "a.jsonl", lines({"text": "x" * (1 << 20)})))


@pytest.mark.parametrize("content", ["", "  \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match=r"a\.txt holds no text"):
        read_text(write(tmp_path / "a.txt", content))


@pytest.mark.parametrize("content", [b"caf\xe9 au lait", "text".encode("utf-16"), b"ends within \xe4\xbd"])
def test_what_is_not_utf8_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text: byte 0x.*Convert it"):
        read_text(write(tmp_path / "a.txt", content))


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing does not exist; expected a text file"):
        read_text(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"has no file named \*\.txt, \*\.md, \*\.jsonl"):
        read_text(tmp_path)
    with pytest.raises(ValueError, match="max_chars is 0"):
        read_text(tmp_path, 0)
