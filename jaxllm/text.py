"""Text <-> token ids, and the chat template.

Checkpoints are untrusted. Nothing here runs code that came with one: `tokenizers` interprets data, and chat
templates run in jinja2's sandbox with bounds on source and output. Their time is not bounded.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import Template, TemplateError, ext, nodes, parser, sandbox
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

if TYPE_CHECKING:
    import gguf  # a quarter of a second to import, and only its reader is passed in

# Special tokens that end a turn. A model whose template writes one stops at it, whatever its settings say.
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|eot|>")
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_MAX_TEMPLATE_CHARS = 128 * 1024  # the longest in use are about 20 KB
_MAX_CHAT_CHARS = 16 * 1024 * 1024  # a million tokens of context are about 4 MB

# How text is split before BPE is a fact of each family; GGUF names it in `tokenizer.ggml.pre`. "default",
# which converters write for a model they do not know, is taken for GPT-2's split, a part of ByteLevel.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {"llama-bpe": _LLAMA3_SPLIT, "qwen2": _LLAMA3_SPLIT.replace("{1,3}", "")}
_PRES = ("smollm", "gpt-2", "default", *_SPLITS)
# GGUF token types 2 unknown, 3 control and 4 user-defined are matched whole; 1 is normal, 5 unused, 6 a byte.
_IS_SPECIAL = {2: True, 3: True, 4: False}


class Tokenizer:
    """Text <-> token ids, plus the chat template and the ids that end an answer.

    vocab_size: one more than the largest id. A model's embedding may have more rows; those ids have no text.
    bos_id, eos_id: the ids that begin and end a text, or None.
    stop_ids: the ids that end an answer, of the sequence or of the turn. May be empty.
    chat_template: jinja2 source, or None for a model that was not made for chat.
    """

    def __init__(self, backend: Backend, special: dict[str, str], ends: Iterable[int], template: str | None):
        """`special`: tokens by their Hugging Face names ("eos_token": "</s>"), which also ends an answer."""
        backend.no_truncation()  # tokenizer.json may ask for either: it was saved during training
        backend.no_padding()
        ids = {name: i for name, t in special.items() if (i := backend.token_to_id(t)) is not None}
        added = {i: t.content for i, t in backend.get_added_tokens_decoder().items() if t.special}
        turn_ends = {i for i, t in added.items() if t in _END_OF_TURN and t in (template or "")}
        self.vocab_size: int = max(backend.get_vocab().values(), default=-1) + 1
        self.bos_id: int | None = ids.get("bos_token")
        self.eos_id: int | None = ids.get("eos_token")
        self.stop_ids: frozenset[int] = frozenset({*ends, *turn_ends, ids.get("eos_token", -1)} - {-1})
        self.chat_template = template
        self._backend = backend
        self._special = {name: special[name] for name in ids}
        self._special_ids = frozenset(added)
        self._byte_fallback = backend.decoder is not None and backend.decoder.decode(["<0x41>"]) == "A"

    @classmethod
    def from_dir(cls, path: str | pathlib.Path) -> Tokenizer:
        """Reads a Hugging Face directory, or one that `save` wrote. Raises FileNotFoundError without
        tokenizer.json, ValueError for a file that makes no sense.
        """
        path = pathlib.Path(path)
        if not (path / "tokenizer.json").is_file():
            raise FileNotFoundError(
                f"{path} should hold tokenizer.json (and tokenizer_config.json, generation_config.json). "
                "A tokenizer.model is not read: convert it with transformers' AutoTokenizer."
            )
        try:
            backend = Backend.from_file(str(path / "tokenizer.json"))
        except Exception as e:  # tokenizers raises no narrower type
            raise ValueError(f"{path / 'tokenizer.json'} is not what tokenizers can read: {e}") from e
        config = _read_json(path / "special_tokens_map.json") | _read_json(path / "tokenizer_config.json")
        special = {n: t.get("content") if isinstance(t := config.get(n), dict) else t for n in _NAMES}
        special = {name: token for name, token in special.items() if isinstance(token, str)}
        template = config.get("chat_template")
        if (path / "chat_template.jinja").is_file():
            template = (path / "chat_template.jinja").read_bytes().decode(errors="replace")
        elif isinstance(template, list):
            named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
            template = named[0].get("template") if named else None
        eos = _read_json(path / "generation_config.json").get("eos_token_id")
        eos = _read_json(path / "config.json").get("eos_token_id") if eos is None else eos
        ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(type(i) is int and i >= 0 for i in ends) or not isinstance(template, str | None):
            what = f"eos_token_id should hold ids, not {eos!r:.40}; chat_template text, not {template!r:.40}"
            raise ValueError(f"{path}: {what}.")
        return cls(backend, special, ends, template)

    @classmethod
    def from_gguf(cls, reader: gguf.GGUFReader) -> Tokenizer:
        """Rebuilds the tokenizer from GGUF metadata: byte-level BPE ("gpt2") or SentencePiece BPE ("llama").

        Defaults are those of llama.cpp: BOS is added by "llama" and by the pre-tokenizer "llama-bpe".
        Raises ValueError for other kinds, listing these, and for metadata that contradicts itself.
        """

        def read(name: str, kind: type, default: Any = None) -> Any:
            field = reader.fields.get(f"tokenizer.{name}")
            value = default if field is None else field.contents()
            some = value[:1] if isinstance(value, list) else [value]  # an array has one type
            is_kind = all(isinstance(v, kind | None) for v in some)
            if not is_kind or isinstance(value, list) != isinstance(default, list):
                raise ValueError(f"GGUF metadata tokenizer.{name} should be {kind.__name__}: {some!r:.40}.")
            return value

        def id_of(name: str, llama_default: int | None = None) -> int | None:
            i = read(f"ggml.{name}_token_id", int, llama_default if llama else None)
            if i is not None and not 0 <= i < len(tokens):
                raise ValueError(f"GGUF tokenizer: {name} is {i}, outside its {len(tokens)} tokens.")
            return i

        model, pre = read("ggml.model", str), read("ggml.pre", str, "default")
        llama = model == "llama"
        if not llama and (model != "gpt2" or pre not in _PRES):
            what = f"GGUF tokenizer {model!r} with pre-tokenizer {pre!r} is not supported"
            raise ValueError(f"{what}. Supported: 'llama', and 'gpt2' with one of {', '.join(_PRES)}.")
        tokens, kinds = read("ggml.tokens", str, []), read("ggml.token_type", int, [])
        vocab = {token: i for i, token in enumerate(tokens)}
        if not 0 < len(tokens) == len(vocab) == len(kinds):
            counts = f"{len(tokens)} tokens, {len(vocab)} of them distinct, and {len(kinds)} types"
            raise ValueError(f"GGUF tokenizer: {counts}. These numbers should be the same.")
        bos, eos, unk, pad = id_of("bos", 1), id_of("eos", 2), id_of("unknown", 0), id_of("padding")
        named = {"bos_token": bos, "eos_token": eos, "unk_token": unk, "pad_token": pad}
        special = {name: tokens[i] for name, i in named.items() if i is not None}
        ends = [i for i in (id_of("eot"), id_of("eom")) if i is not None]
        whole = [(t, _IS_SPECIAL[k]) for t, k in zip(tokens, kinds, strict=True) if k in _IS_SPECIAL]
        try:
            if llama:
                merges = _merges_from_scores(tokens, read("ggml.scores", float, []), kinds)
                prefix = read("ggml.add_space_prefix", bool, True)
                backend = _sentencepiece(vocab, merges, tokens[unk], prefix)
            else:
                merges = [tuple(merge.split(" ")) for merge in read("ggml.merges", str, [])]
                backend = _byte_level(vocab, merges, pre)
            backend.add_tokens([AddedToken(t, special=s, normalized=False) for t, s in whole])
            if read("ggml.add_bos_token", bool, llama or pre == "llama-bpe") and bos is not None:
                one, two = [tokens[bos], "$A"], [tokens[bos], "$A", tokens[bos], "$B"]
                backend.post_processor = processors.TemplateProcessing(one, two, [(tokens[bos], bos)])
        except Exception as e:  # tokenizers raises no narrower type
            raise ValueError(f"The GGUF tokenizer cannot be rebuilt: {e}") from e
        return cls(backend, special, ends, read("chat_template", str))

    def save(self, path: str | pathlib.Path) -> None:
        """Writes what `from_dir` and transformers' AutoTokenizer read. Replaces generation_config.json."""
        path = pathlib.Path(path)
        path.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(path / "tokenizer.json"))
        # By this class, transformers takes tokenizer.json as it is, whatever the model's family.
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        ids = {"bos_token_id": self.bos_id, "eos_token_id": sorted(self.stop_ids) or None}
        texts = {
            "tokenizer_config.json": json.dumps({**config, **self._special}, indent=2, ensure_ascii=False),
            "generation_config.json": json.dumps({k: v for k, v in ids.items() if v is not None}, indent=2),
            "special_tokens_map.json": None,  # the one that another tokenizer left
            "chat_template.jinja": self.chat_template,
        }
        for name, text in texts.items():
            (path / name).unlink(missing_ok=True)
            if text is not None:
                (path / name).write_text(text, encoding="utf-8", newline="")

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens written in it count as such, as in transformers. `add_special`
        adds what the model's tokenizer does: BOS, or nothing. Raises ValueError for half a surrogate pair.
        """
        text.encode()  # tokenizers would blame the type
        return self._backend.encode(text, add_special_tokens=add_special).ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of token ids. Raises ValueError for ids outside the vocabulary."""
        return self._backend.decode([self._check(i) for i in ids], skip_special_tokens=skip_special)

    def apply_chat(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation as the model was trained on it; encode it with `add_special=False`.

        messages: dicts of strings, with "role" and "content", the oldest first.
        add_generation_prompt: end with what opens the assistant's answer.
        Raises ValueError for other messages, without a template, and when the template fails or refuses.
        """
        if self.chat_template is None:
            raise ValueError("This model has no chat template: it completes text. Prompt it with plain text.")
        if not isinstance(messages, list) or not messages:
            raise ValueError(f"messages should be a list of at least one message, not {messages!r:.80}.")
        for n, message in enumerate(messages):
            strings = isinstance(message, dict) and all(isinstance(v, str) for v in message.values())
            if not strings or not {"role", "content"} <= message.keys():
                raise ValueError(f"messages[{n}] should be a dict of strings, with 'role' and 'content'.")
        names = {"messages": messages, "add_generation_prompt": add_generation_prompt, **self._special}
        pieces, size = [], 0
        try:
            for piece in _compile(self.chat_template).generate(names, tools=None, documents=None):
                pieces.append(piece)
                if (size := size + len(piece)) > _MAX_CHAT_CHARS:
                    raise TemplateError(f"it wrote more than {_MAX_CHAT_CHARS} characters")
        except Exception as e:  # a template is a program: it can fail in any way
            reason = str(e) if type(e) is TemplateError else f"{type(e).__name__}: {e}"
            raise ValueError(f"This model's chat template failed: {reason}") from e
        return "".join(pieces)

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins. See `apply_chat`."""
        return self.encode(self.apply_chat(messages), add_special=False)

    def stream(self, stop: Sequence[str] = ()) -> TextStream:
        """A detokenizer for one answer."""
        return TextStream(self, stop)

    def _check(self, token_id: int) -> int:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"Token id {token_id} is outside the vocabulary of {self.vocab_size}.")
        return int(token_id)


class TextStream:
    """Detokenizes one answer, token by token.

    What `push` and `flush` return, joined, is `text`: `tokenizer.decode(ids)` up to the first stop string (of
    several, the one complete first); `stopped` says whether one came. A character comes out when all of it is
    in; invalid bytes come out as U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.stopped = False
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self._stop:
            raise ValueError("A stop string should not be empty: it would end every answer before it begins.")
        self._tokenizer = tokenizer
        self._window: list[int] = []  # the last ids: decoders look at what is before and after a token
        self._done = 0  # how many characters of the window's text are out
        self._held = ""  # text that may begin a stop string
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """Everything returned so far."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> str:
        """Takes one id and returns the text that became final, often "". After a stop string, always ""."""
        tokenizer, window = self._tokenizer, self._window
        # An embedding may have rows beyond the vocabulary; a model can draw one, and it says nothing.
        token = tokenizer._backend.id_to_token(token_id) if token_id >= 0 else None
        if self.stopped or not token or token_id in tokenizer._special_ids:
            return ""  # `decode` skips these as well, and they are no context for what follows
        window.append(token_id)
        if tokenizer._byte_fallback and len(token) == 6 and token.startswith("<0x"):
            return ""  # a run of byte tokens is decoded as one: a bad byte at its end voids all of it
        text = tokenizer.decode(window)
        final = len(text) - text.endswith("\ufffd")  # only the last can be a character that is not all in
        new, self._done = text[self._done : final], final
        if len(window) > 8:
            # Four tokens are context enough: a character has at most three bytes before its last, and a
            # decoder that drops a leading space drops one that is out.
            del window[:-4]
            self._done = len(tokenizer.decode(window)) - (len(text) - final)
        return self._release(new)

    def flush(self) -> str:
        """Ends the answer and returns what was held back."""
        text = "" if self.stopped else self._tokenizer.decode(self._window)[self._done :]
        self._window, self._done = [], 0
        return self._release(text, last=True)

    def _release(self, new: str, last: bool = False) -> str:
        text, self._held = self._held + new, ""
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            text = text[: min(found)[1]]
        elif not last:
            begun = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
            keep = len(text) - max(begun, default=0)
            text, self._held = text[:keep], text[keep:]
        self._pieces.append(text)
        return text


def _byte_level(vocab: dict[str, int], merges: Any, pre: str) -> Backend:
    """BPE over bytes."""
    backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    first = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    if pre in _SPLITS:
        first = [pre_tokenizers.Split(Regex(_SPLITS[pre]), "isolated")]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in _SPLITS)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*first, to_bytes])
    backend.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    return backend


def _sentencepiece(vocab: dict[str, int], merges: Any, unk: str, prefix: bool) -> Backend:
    """BPE over characters. Spaces are U+2581, with `prefix` one comes first; unknown characters are bytes."""
    bpe = models.BPE(vocab=vocab, merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=True)
    backend = Backend(bpe)
    first, last = [normalizers.Prepend("▁")] * prefix, [decoders.Strip(" ", 1, 0)] * prefix
    backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges_from_scores(tokens: list[str], scores: list[float], kinds: list[int]) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, the best score first: the order SentencePiece joins in."""
    # The ways are quadratic in the length. Real tokens have under 200 characters; hostile ones stay unjoined.
    normal = {t for t, kind in zip(tokens, kinds, strict=True) if kind == 1 and len(t) <= 4096}
    merges = []
    for _, token in sorted(zip(scores, tokens, strict=True), key=lambda pair: -pair[0]):
        halves = ((token[:n], token[n:]) for n in range(1, len(token))) if token in normal else ()
        merges += [pair for pair in halves if pair[0] in normal and pair[1] in normal]
    return merges


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    """The object in `file`; {} where there is no such file."""
    try:
        return dict(json.loads(file.read_bytes())) if file.is_file() else {}
    except (ValueError, TypeError, RecursionError) as e:
        raise ValueError(f"{file} does not hold a JSON object: {e}") from e


class _GenerationTag(ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> Template:
    """A chat template, with the names, filters, tags and treatment of blanks that transformers has."""
    if len(source) > _MAX_TEMPLATE_CHARS:
        raise TemplateError(f"it has {len(source)} characters; {_MAX_TEMPLATE_CHARS} are allowed")
    tags = [_GenerationTag, ext.loopcontrols]
    env = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=tags)
    env.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)  # jinja2's own writes HTML
    env.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
    return env.from_string(source)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
