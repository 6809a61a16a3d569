"""Tokenizers and chat templates, against `tokenizers`, SentencePiece's rule written out, and transformers."""

import itertools
import json
import os
import random
import subprocess
import sys

import gguf
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxllm.text import TextStream, Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then the dog jumps over the fox.",
    "In 1998 there were 1998 of them; in 2024, 2024. 123456789 123456789 3.14159 3.14159",
    "def f(x):\n    return x + 1\n\n\nclass A:\n    def g(self):\n        return self.f(1) + 2\n",
    "Il était une fois à Noël; où est le café? Ça va, señor Ærøskøbing.",
    "你好世界、。世界你好。 안녕 세계. 😀 😀 👍",
    "don't can't we'll they're I'm you've he'd DON'T",
]
TEXTS = [
    "",
    " ",
    "hello",
    "   leading and trailing   ",
    "the 1998th fox, 123456789 times",
    "a\tb\r\n\n\n  c\x00d",
    "def f(x):\n        return x + 1",
    "你好世界、 😀👩‍👩‍👧 안녕",
    "Cafe\u0301 naïve ﬁ Ⅷ ½ ٣٤٥ ᚠᛇᚻ",
    "I'M don't\u2028x\u00a0y",
    "<|im_start|>user\nhi<|im_end|>\n <|im_end|> <|im_end",
]


def train_byte_level(pre=None):
    """Byte-level BPE. Without `pre`, merges cross spaces and digits: a missing split shows."""
    backend = Backend(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre, to_bytes]) if pre else to_bytes
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    return backend


def train_sentencepiece():
    """BPE over characters with byte fallback, built as Llama 2's tokenizer.json is."""
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False
    )
    backend.train_from_iterator(CORPUS[:4], trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in byte_tokens]
    backend = Backend.from_str(json.dumps(state))
    backend.pre_tokenizer = None  # type: ignore[assignment]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.post_processor = bos_processor("<s>", 1)
    return backend


def bos_processor(token, i):
    return processors.TemplateProcessing([token, "$A"], [token, "$A", token, "$B"], [(token, i)])


def metaspace(backend):
    """The same with the Metaspace decoder, as some tokenizer.json have it."""
    backend = Backend.from_str(backend.to_str())
    backend.decoder = decoders.Metaspace()
    return backend


def write_dir(path, backend, generation=None, template=None, **config):
    path.mkdir(parents=True, exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    if template is not None:
        config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def tokens_of(backend):
    return [backend.id_to_token(i) for i in range(backend.get_vocab_size())]


def gguf_reader(path, model, tokens, kinds, template=None, **metadata):
    """Reads back a GGUF file of tokenizer metadata only. None leaves a key out."""
    writer = gguf.GGUFWriter(path, "llama")
    arrays = {"tokens": tokens, "token_type": kinds}
    for name, value in (arrays | {"model": model} | metadata).items():
        key = f"tokenizer.ggml.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif value is not None:
            writer.add_string(key, value)
    if template is not None:
        writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.GGUFReader(path)


def byte_level_gguf(path, backend, pre, **metadata):
    merges = [" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    tokens = tokens_of(backend)
    kinds = [3 if token in SPECIAL else 1 for token in tokens]
    metadata = {"pre": pre, "merges": merges, "bos_token_id": 0, "eos_token_id": 2} | metadata
    return gguf_reader(path, "gpt2", tokens, kinds, **metadata)


def sentencepiece_gguf(path, backend, **metadata):
    tokens = tokens_of(backend)
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    metadata = {"scores": [-float(i) for i in range(len(tokens))]} | metadata
    return gguf_reader(path, "llama", tokens, kinds, **metadata)


@pytest.fixture(scope="module")
def byte_level():
    return train_byte_level(pre=pre_tokenizers.Digits(individual_digits=True))


@pytest.fixture(scope="module")
def sentencepiece():
    return train_sentencepiece()


@pytest.fixture(scope="module")
def any_tokenizer(byte_level, sentencepiece):
    backends = {"bytes": byte_level, "sentencepiece": sentencepiece, "metaspace": metaspace(sentencepiece)}
    return {name: Tokenizer(backend, {}, (), None) for name, backend in backends.items()}


KINDS = ["bytes", "sentencepiece", "metaspace"]


# --- A Hugging Face directory


def test_from_dir_is_the_backend(tmp_path, byte_level, sentencepiece):
    for name, backend, bos in (("a", byte_level, None), ("b", sentencepiece, 1)):
        tokenizer = Tokenizer.from_dir(write_dir(tmp_path / name, backend, bos_token="<s>", eos_token=None))
        assert (tokenizer.vocab_size, tokenizer.bos_id) == (backend.get_vocab_size(), bos)
        for text in TEXTS:
            ids = tokenizer.encode(text)
            assert ids == backend.encode(text).ids
            assert ids[:1] == [1] if bos else ids == tokenizer.encode(text, add_special=False)
            assert tokenizer.decode(ids) == backend.decode(ids)
            if not bos:
                assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.encode("the fox")[1:] == tokenizer.encode("the fox", add_special=False)


def test_special_tokens_in_text_are_special(any_tokenizer):
    tokenizer = any_tokenizer["bytes"]
    ids = tokenizer.encode("<|im_start|>user<|im_end|>")
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids) == "user"
    assert tokenizer.decode(ids, skip_special=False) == "<|im_start|>user<|im_end|>"


@pytest.mark.parametrize(
    ("generation", "model_config", "eos_token", "template", "expected"),
    [
        ({"eos_token_id": 2}, None, None, None, {2}),
        ({"eos_token_id": [0, 2]}, {"eos_token_id": 9}, None, None, {0, 2}),
        ({}, {"eos_token_id": [5]}, None, None, {5}),
        (None, None, "<|endoftext|>", None, {0}),
        (None, None, {"content": "<|endoftext|>", "lstrip": False}, None, {0}),
        ({"eos_token_id": 5}, None, "<|endoftext|>", None, {0, 5}),
        (None, None, "<|endoftext|>", "{{ '<|im_end|>' }}", {0, 2}),  # the turn's end, which no setting names
        (None, None, "no such token", "plain", set()),
    ],
)
def test_stop_ids(tmp_path, byte_level, generation, model_config, eos_token, template, expected):
    write_dir(tmp_path, byte_level, generation, template, eos_token=eos_token)
    if model_config is not None:
        (tmp_path / "config.json").write_text(json.dumps(model_config))
    assert Tokenizer.from_dir(tmp_path).stop_ids == expected


def test_special_tokens_map_names_what_the_config_does_not(tmp_path, byte_level):
    write_dir(tmp_path, byte_level, eos_token="<|im_end|>")
    names = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|endoftext|>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert (tokenizer.bos_id, tokenizer.stop_ids) == (1, {2})


def test_truncation_and_padding_of_training_are_off(tmp_path, byte_level):
    backend = Backend.from_str(byte_level.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    tokenizer = Tokenizer.from_dir(write_dir(tmp_path, backend))
    assert tokenizer.encode(CORPUS[0]) == byte_level.encode(CORPUS[0]).ids
    assert len(tokenizer.encode("a")) == 1


def test_where_the_template_is(tmp_path, byte_level):
    assert Tokenizer.from_dir(write_dir(tmp_path, byte_level)).chat_template is None
    write_dir(tmp_path, byte_level, template="one")
    assert Tokenizer.from_dir(tmp_path).chat_template == "one"
    listed = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "two"}]
    write_dir(tmp_path, byte_level, template=listed)
    assert Tokenizer.from_dir(tmp_path).chat_template == "two"
    (tmp_path / "chat_template.jinja").write_text("three é", encoding="utf-8")
    assert Tokenizer.from_dir(tmp_path).chat_template == "three é"


def test_save_round_trips(tmp_path, byte_level, sentencepiece):
    first = Tokenizer(byte_level, {"eos_token": "<|im_end|>"}, {0, 2}, "{{ 'é' }}\r\n")
    second = Tokenizer(sentencepiece, {"bos_token": "<s>", "eos_token": "</s>"}, (), None)
    for tokenizer in (first, second):  # the second replaces all of the first
        tokenizer.save(tmp_path / "out")
        again = Tokenizer.from_dir(tmp_path / "out")
        for name in ("vocab_size", "bos_id", "stop_ids", "chat_template", "_special", "_special_ids"):
            assert getattr(again, name) == getattr(tokenizer, name)
        assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_a_directory_without_tokenizer_json(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(FileNotFoundError, match=r"(?s)should hold tokenizer\.json.*tokenizer\.model is not read"):
        Tokenizer.from_dir(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Tokenizer.from_dir(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}'),
        ("tokenizer_config.json", b"[1]"),
        ("tokenizer_config.json", b"\xff\xfe\x00"),
        ("special_tokens_map.json", b'{"a": '),
        ("generation_config.json", b"[" * 100_000),
        ("generation_config.json", b'{"eos_token_id": "2"}'),
        ("generation_config.json", b'{"eos_token_id": [2, null]}'),
        ("tokenizer_config.json", b'{"chat_template": {"default": "x"}}'),
    ],
)
def test_files_that_make_no_sense(tmp_path, byte_level, name, content):
    write_dir(tmp_path, byte_level)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=str(tmp_path)):
        Tokenizer.from_dir(tmp_path)


def test_ids_and_texts_that_are_none(any_tokenizer):
    for tokenizer in any_tokenizer.values():
        for i in (-1, tokenizer.vocab_size, 2**40):
            with pytest.raises(ValueError, match="outside the vocabulary"):
                tokenizer.decode([3, i])
        assert tokenizer.stream().push(tokenizer.vocab_size) == ""
        with pytest.raises(ValueError, match="surrogates"):
            tokenizer.encode("a\ud800b")


# --- GGUF


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["in", " ", "1", "9", "9", "8", ",", " don", "'t", "  ", " x"]),
        ("gpt-2", ["in", " 1998", ",", " don", "'t", "  ", " x"]),
        ("default", ["in", " 1998", ",", " don", "'t", "  ", " x"]),
        ("llama-bpe", ["in", " ", "199", "8", ",", " don", "'t", "  ", " x"]),
        ("qwen2", ["in", " ", "1", "9", "9", "8", ",", " don", "'t", "  ", " x"]),
    ],
)
def test_gguf_pre_tokenizers_split_as_their_families_do(tmp_path, pre, pieces):
    backend = train_byte_level()
    text = "".join(pieces)
    tokenizer = Tokenizer.from_gguf(byte_level_gguf(tmp_path / "m.gguf", backend, pre, add_bos_token=False))
    # BPE sees each piece alone, so the ids are those of the pieces, one after the other.
    assert tokenizer.encode(text) == [i for piece in pieces for i in backend.encode(piece).ids]
    assert tokenizer.encode(text) != backend.encode(text).ids
    for text in TEXTS:
        decoded = tokenizer.decode(tokenizer.encode(text), skip_special=False)
        assert decoded == (text.replace("e\u0301", "é") if pre == "qwen2" else text)


def test_gguf_byte_level_is_the_tokenizer_it_came_from(tmp_path, byte_level):
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend = Backend.from_str(byte_level.to_str())
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    reader = byte_level_gguf(tmp_path / "m.gguf", byte_level, "smollm", eot_token_id=0, template="{{ bos_token }}")
    tokenizer = Tokenizer.from_gguf(reader)
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (backend.get_vocab_size(), 0)
    assert tokenizer.stop_ids == {0, 2}
    assert tokenizer.apply_chat([{"role": "user", "content": "x"}]) == "<|endoftext|>"
    for text in TEXTS + CORPUS:
        assert tokenizer.encode(text) == backend.encode(text).ids
    tokenizer.save(tmp_path / "out")
    again = Tokenizer.from_dir(tmp_path / "out")
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert (again.stop_ids, again.bos_id) == (tokenizer.stop_ids, tokenizer.bos_id)


def test_llama3_takes_a_whole_word_before_merges(tmp_path):
    backend = train_byte_level()
    merges = [" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    tokens = [*tokens_of(backend), "zqzq"]  # in the vocabulary, but no merge makes it
    kinds = [1] * len(tokens)
    for pre, expected in (("llama-bpe", [len(tokens) - 1]), ("gpt-2", backend.encode("zqzq").ids)):
        reader = gguf_reader(tmp_path / f"{pre}.gguf", "gpt2", tokens, kinds, pre=pre, merges=merges)
        assert Tokenizer.from_gguf(reader).encode("zqzq") == expected


def test_gguf_user_defined_tokens_are_matched_whole_and_shown(tmp_path, byte_level):
    tokens = [*tokens_of(byte_level), "<tool>", "[PAD]"]
    kinds = [1] * (len(tokens) - 2) + [4, 5]
    reader = gguf_reader(tmp_path / "m.gguf", "gpt2", tokens, kinds, pre="smollm", merges=["t h"])
    tokenizer = Tokenizer.from_gguf(reader)
    ids = tokenizer.encode("a<tool>[PAD]")
    assert len(tokens) - 2 in ids
    assert len(tokens) - 1 not in ids
    assert tokenizer.decode(ids) == "a<tool>[PAD]"


@pytest.mark.parametrize(
    ("model", "pre", "add_bos", "expected"),
    [
        ("gpt2", "smollm", None, False),
        ("gpt2", "qwen2", None, False),
        ("gpt2", "llama-bpe", None, True),
        ("gpt2", "llama-bpe", False, False),
        ("gpt2", "gpt-2", True, True),
        ("llama", None, None, True),
        ("llama", None, False, False),
    ],
)
def test_gguf_bos(tmp_path, byte_level, sentencepiece, model, pre, add_bos, expected):
    if model == "llama":
        reader = sentencepiece_gguf(tmp_path / "m.gguf", sentencepiece, add_bos_token=add_bos)
    else:
        reader = byte_level_gguf(tmp_path / "m.gguf", byte_level, pre, add_bos_token=add_bos)
    tokenizer = Tokenizer.from_gguf(reader)
    bos = [tokenizer.bos_id] if expected else []
    assert tokenizer.encode("x") == bos + tokenizer.encode("x", add_special=False)


def sentencepiece_rule(tokens, text):
    """What SentencePiece does: join the neighbours that make the best token until none do; then bytes."""
    rank = {token: i for i, token in enumerate(tokens) if i >= 259}  # scores fall with the id
    pieces = list(text.replace(" ", "▁"))
    while True:
        joined = [(rank.get(a + b, 10**9), i) for i, (a, b) in enumerate(itertools.pairwise(pieces))]
        best, i = min(joined, default=(10**9, 0))
        if best == 10**9:
            break
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    ids = ([rank[piece]] if piece in rank else [3 + b for b in piece.encode()] for piece in pieces)
    return [i for piece_ids in ids for i in piece_ids]


@pytest.mark.parametrize("prefix", [None, True, False])
def test_gguf_sentencepiece_follows_its_rule(tmp_path, sentencepiece, prefix):
    tokenizer = Tokenizer.from_gguf(sentencepiece_gguf(tmp_path / "m.gguf", sentencepiece, add_space_prefix=prefix))
    assert (tokenizer.bos_id, tokenizer.stop_ids) == (1, {2})
    rng = random.Random(0)
    words = " ".join(CORPUS).split(" ")
    texts = [" ".join(rng.choices(words, k=8)) for _ in range(50)] + TEXTS + CORPUS
    for text in texts:
        ids = tokenizer.encode(text, add_special=False)
        space = " " if text and prefix is not False else ""
        assert ids == sentencepiece_rule(tokens_of(sentencepiece), space + text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("</s>")[-1] == 2
    if prefix is not False:  # and tokenizer.json made from the same model says the same
        assert [tokenizer.encode(t) for t in texts] == [sentencepiece.encode(t).ids for t in texts]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "unigram"}, "not supported. Supported: 'llama', and 'gpt2' with one of .*smollm"),
        ({"pre": "falcon"}, "'falcon' is not supported"),
        ({"pre": 7}, "tokenizer.ggml.pre should be str"),
        ({"model": None}, "not supported"),
        ({"tokens": None}, "0 tokens"),
        ({"tokens": "abc"}, "tokenizer.ggml.tokens should be str"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens should be str"),
        ({"token_type": [1]}, "1 types"),
        ({"tokens": ["a"] * 700}, "1 of them distinct"),
        ({"merges": ["a b c"]}, "cannot be rebuilt"),
        ({"merges": ["Zz Yy"]}, "cannot be rebuilt"),
        ({"bos_token_id": 10**6}, "bos is 1000000, outside"),
        ({"eot_token_id": "2"}, "eot_token_id should be int"),
    ],
)
def test_gguf_metadata_that_makes_no_sense(tmp_path, byte_level, change, message):
    fields = {"model": "gpt2", "tokens": tokens_of(byte_level), "kinds": [1] * byte_level.get_vocab_size()}
    fields |= {"pre": "smollm", "merges": ["a b"]} | change
    fields["kinds"] = fields.pop("token_type", fields["kinds"])
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_gguf(gguf_reader(tmp_path / "m.gguf", **fields))


# --- Streams


def random_ids(tokenizer, rng, n):
    """Any ids, but mostly single bytes: the hard case of both decoders."""
    near_start = min(tokenizer.vocab_size, 262)
    return [rng.randrange(rng.choice([near_start, tokenizer.vocab_size])) for _ in range(n)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_says_what_decode_says(any_tokenizer, kind):
    tokenizer = any_tokenizer[kind]
    rng = random.Random(0)
    for n in range(2000):
        ids = random_ids(tokenizer, rng, n % 40)
        stream = tokenizer.stream()
        parts = [stream.push(i) for i in ids]
        assert "".join(parts) == stream.text
        parts.append(stream.flush())
        assert "".join(parts) == tokenizer.decode(ids) == stream.text, ids
        assert not stream.stopped


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_stream_of_text_has_no_broken_characters(any_tokenizer, kind):
    tokenizer = any_tokenizer[kind]
    for text in [*TEXTS, "\ufffd", "a\ufffd\ufffdb", "\u2581 \u2581"]:
        ids = tokenizer.encode(text, add_special=False)
        stream = tokenizer.stream()
        parts = [stream.push(i) for i in ids] + [stream.flush()]
        assert "".join(parts) == tokenizer.decode(ids)
        assert sum(part.count("\ufffd") for part in parts) == text.count("\ufffd")


def test_characters_in_single_bytes_come_whole(byte_level):
    tokenizer = Tokenizer(byte_level, {}, (), None)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for offset in range(12):  # wherever the window of the last tokens happens to be cut
        text = "a" * offset + "😀é한" * 4
        ids = [byte_level.token_to_id(c) for c in to_bytes.pre_tokenize_str(text)[0][0]]
        stream = tokenizer.stream()
        assert [part for i in ids if (part := stream.push(i))] == list(text)


def test_text_comes_as_soon_as_it_is_final(any_tokenizer):
    tokenizer = any_tokenizer["bytes"]
    tiger = [tokenizer.encode(c)[0] for c in "abc"]
    assert [tokenizer.stream().push(i) for i in tiger] == ["a", "b", "c"]
    stream = tokenizer.stream()
    first, *rest = tokenizer.encode("ᚠ")  # three tokens for one character
    assert rest
    assert [stream.push(first), *map(stream.push, rest)] == [""] * len(rest) + ["ᚠ"]
    stream.push(first)  # an invalid byte comes out once it cannot become a character
    assert stream.push(tiger[0]) == "\ufffda"


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_costs_the_same_late_as_early(any_tokenizer, kind, monkeypatch):
    tokenizer = any_tokenizer[kind]
    decoded = []
    plain = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: decoded.append(len(ids)) or plain(ids))
    ids = random_ids(tokenizer, random.Random(1), 2000)
    bad = tokenizer.encode("\x80é", add_special=False)[-1:] * 2000  # never a character, never final
    for sequence in (ids, bad):
        decoded.clear()
        stream = tokenizer.stream(stop=["never"])
        for i in sequence:
            stream.push(i)
        stream.flush()
        assert sum(decoded) <= 12 * len(sequence)


def stopped_text(text, stops):
    """The rule, character by character: the first stop string to be complete cuts the text."""
    for n in range(len(text) + 1):
        begins = [n - len(stop) for stop in stops if text[:n].endswith(stop)]
        if begins:
            return text[: min(begins)], True
    return text, False


def test_stop_strings_do_not_depend_on_tokens(any_tokenizer):
    rng = random.Random(0)
    stopped = 0
    for n in range(1500):
        tokenizer = any_tokenizer[KINDS[n % 2]]
        text = "".join(rng.choices("aab \nthe", k=n % 30))
        ids = tokenizer.encode(text, add_special=False)
        stops = ["".join(rng.choices("aab \nthe", k=rng.randint(1, 5))) for _ in range(rng.randint(1, 3))]
        stream = TextStream(tokenizer, stops)
        parts = []
        for i in ids:
            parts.append(stream.push(i))
            assert stopped_text(text, stops)[0].startswith(stream.text)
        parts.append(stream.flush())
        assert ("".join(parts), stream.stopped) == stopped_text(text, stops)
        assert stream.text == "".join(parts)
        stopped += stream.stopped
    assert 100 < stopped < 1400


def test_the_stop_string_that_is_complete_first_counts():
    backend = Backend(models.BPE(vocab={"abcd": 0, "a": 1, "b": 2, "c": 3, "d": 4}, merges=[]))
    backend.decoder = decoders.Fuse()
    for ids in ([0], [1, 2, 3, 4]):  # one token that holds both, or one a character
        stream = Tokenizer(backend, {}, (), None).stream(stop=["abcd", "bc"])
        assert "".join(map(stream.push, ids)) == stream.text == "a"


def test_a_stopped_stream_is_silent(any_tokenizer):
    tokenizer = any_tokenizer["bytes"]
    stream = tokenizer.stream(stop=["\nUser:"])
    parts = [stream.push(i) for i in tokenizer.encode("Hi.\nUse it.\nUser: and more")]
    assert "".join(parts) == stream.text == "Hi.\nUse it."
    assert stream.stopped
    assert not any("\nUser" in part for part in parts)
    assert stream.push(tokenizer.encode("a")[0]) == stream.flush() == ""
    with pytest.raises(ValueError, match="stop string should not be empty"):
        tokenizer.stream(stop=["a", ""])


def test_what_a_stop_string_held_back_comes_at_the_end(any_tokenizer):
    stream = any_tokenizer["bytes"].stream(stop="###")  # one string is one stop, not three
    for i in any_tokenizer["bytes"].encode("a##"):
        stream.push(i)
    assert stream.text == "a"
    assert stream.flush() == "##"
    assert not stream.stopped


# --- Chat templates

CHATML = """{% for message in messages %}
    {% if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nBe kind & brief.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA3_STYLE = """{{- bos_token }}
{%- if tools is not none %}{{ raise_exception('no tools here') }}{% endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- set ns = namespace(system='') %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{{- ns.system + eos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL_STYLE = """{{ bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}
{%- endif %}{% endfor %}"""

EVERYTHING = """{% for message in messages %}
{% if message.role == 'system' %}{% continue %}{% endif %}
{% if message.role == 'assistant' %}
{% generation %}
{{ message | tojson }}
{% endgeneration %}
{% else %}
{{ message | tojson(indent=2) }} {{ {'b': [1, none, true], 'a': "é<>&'"} | tojson }}
{% endif %}
{% if loop.index > 3 %}{% break %}{% endif %}
{% endfor %}
{% if documents %}never{% endif %}{{ pad_token }}{{ messages | map(attribute='role') | join(', ') }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}   """

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3_STYLE, "mistral": MISTRAL_STYLE, "everything": EVERYTHING}
TALK = [
    {"role": "user", "content": "  What's <b>2 & 2</b>? 😀 "},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Ça va?\n{{ 7 * 7 }}"},
]
SYSTEM = [{"role": "system", "content": "Be brief."}]


def chat_tokenizer(backend, template, **special):
    return Tokenizer(backend, {"eos_token": "<|im_end|>", **special}, (), template)


def test_chatml(byte_level):
    tokenizer = chat_tokenizer(byte_level, CHATML)
    text = tokenizer.apply_chat(TALK[2:])
    assert text == (
        "<|im_start|>system\nBe kind & brief.<|im_end|>\n"
        "<|im_start|>user\nÇa va?\n{{ 7 * 7 }}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.apply_chat(TALK[2:], add_generation_prompt=False) == text.removesuffix("<|im_start|>assistant\n")
    ids = tokenizer.encode(text, add_special=False)
    assert (ids.count(1), ids.count(2)) == (3, 2)


def test_tojson_writes_text_as_it_is(byte_level):
    tokenizer = chat_tokenizer(byte_level, "{{ messages[0] | tojson }}{{ [1] | tojson(indent=1) }}")
    text = tokenizer.apply_chat([{"role": "user", "content": "é <'&\""}])
    assert text == '{"role": "user", "content": "é <\'&\\""}[\n 1\n]'


def test_a_template_may_refuse(byte_level):
    tokenizer = chat_tokenizer(byte_level, MISTRAL_STYLE)
    with pytest.raises(ValueError, match="chat template failed: Conversation roles must alternate"):
        tokenizer.apply_chat(TALK[1:])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ messages[0].role.nothing.more }}", "UndefinedError"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ strftime_now.__globals__['json'] }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% set _ = messages[0].update(role='x') %}", "SecurityError"),
        ("{% for i in range(10**9) %}x{% endfor %}", "OverflowError"),
        ("{% for i in range(9999) %}{{ 'x' * 99999 }}{% endfor %}", "more than 16777216 characters"),
        ("{% include 'a' %}", "TypeError"),
        ("x" * 200_000, "200000 characters; 131072 are allowed"),
        ("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}", "RecursionError"),
    ],
)
def test_templates_that_fail(byte_level, template, message):
    with pytest.raises(ValueError, match=f"chat template failed: .*{message}"):
        chat_tokenizer(byte_level, template).apply_chat(TALK)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        "hi",
        ["hi"],
        [{"role": "user"}],
        [{"content": "hi"}],
        [{"role": "user", "content": None}],
        [*TALK, {"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        [{"role": "user", "content": "hi", "tool_calls": []}],
    ],
)
def test_messages_of_another_form(byte_level, messages):
    with pytest.raises(ValueError, match=r"^messages"):
        chat_tokenizer(byte_level, CHATML).apply_chat(messages)


def test_without_a_template(byte_level):
    with pytest.raises(ValueError, match=r"no chat template.*plain text"):
        chat_tokenizer(byte_level, None).apply_chat(TALK)


# --- Other engines, and none of them


@pytest.fixture(scope="module")
def auto_tokenizer():
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    yield transformers.AutoTokenizer.from_pretrained
    patch.undo()


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "gguf"])
def test_transformers_reads_the_same_ids(tmp_path, byte_level, sentencepiece, auto_tokenizer, kind):
    if kind == "gguf":
        reader = byte_level_gguf(tmp_path / "m.gguf", byte_level, "llama-bpe")
        directories = []
        tokenizer = Tokenizer.from_gguf(reader)
    else:
        backend = byte_level if kind == "bytes" else sentencepiece
        directories = [write_dir(tmp_path / "given", backend, bos_token="<s>", eos_token="</s>")] * (kind != "bytes")
        directories += [write_dir(tmp_path / "bytes", backend, eos_token="<|im_end|>")] * (kind == "bytes")
        tokenizer = Tokenizer.from_dir(directories[0])
    tokenizer.save(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text('{"model_type": "llama"}')  # as an export has it
    for directory in [*directories, tmp_path / "saved"]:
        peer = auto_tokenizer(directory)
        assert peer.bos_token_id == tokenizer.bos_id
        assert {peer.eos_token_id} == tokenizer.stop_ids
        for text in TEXTS + CORPUS:
            ids = tokenizer.encode(text)
            assert peer.encode(text) == ids
            assert peer.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special=False)
            assert peer.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


@pytest.mark.peer
@pytest.mark.parametrize("name", TEMPLATES)
def test_transformers_writes_the_same_chat(tmp_path, byte_level, auto_tokenizer, name):
    special = {"bos_token": "<|im_start|>", "pad_token": "<|endoftext|>"}
    tokenizer = chat_tokenizer(byte_level, TEMPLATES[name], **special)
    tokenizer.save(tmp_path)
    peer = auto_tokenizer(tmp_path)
    for talk in (TALK, TALK[:1], SYSTEM + TALK):
        if name == "mistral" and talk[0]["role"] == "system":
            continue
        for prompt in (True, False):
            expected = peer.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt)
            assert tokenizer.apply_chat(talk, add_generation_prompt=prompt) == expected
            ids = peer.apply_chat_template(talk, add_generation_prompt=prompt, return_dict=False)
            assert tokenizer.encode(expected, add_special=False) == ids


def test_importing_it_is_light_and_forking_is_quiet(tmp_path, byte_level):
    write_dir(tmp_path, byte_level)
    code = (
        "import os, sys\n"
        "from jaxllm.text import Tokenizer\n"
        f"tokenizer = Tokenizer.from_dir({str(tmp_path)!r})\n"
        "tokenizer.encode('the fox ' * 10000)\n"
        "if os.fork() == 0:\n"
        "    tokenizer.encode('the fox'); os._exit(0)\n"
        "os.wait()\n"
        "print([m for m in ('torch', 'transformers', 'gguf') if m in sys.modules])\n"
    )
    env = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
