"""Compiled programs as bytes: the compiler's own form of them, without pickle, and what jax needs around it."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from jaxllm.kernels import cpu

Program = Callable[..., Any]


def serialize(compiled: Any) -> bytes:
    """Of what `Lowering` gave, compiled."""
    return compiled.runtime_executable().serialize()


def deserialize(blob: bytes, devices: Sequence[Any]) -> Any:
    """What `serialize` was given, on the devices that it was compiled for; Python's lock is free meanwhile.

    The bytes are machine code, and are trusted: they must be known to come from somebody who is. On a CPU,
    `environment` has been called before: it loads the kernels that the code may refer to.
    """
    return devices[0].client.deserialize_executable(blob, executable_devices=_device_list(devices))


def _device_list(devices: Sequence[Any]) -> Any:
    from jax._src.lib import xla_client  # pyright: ignore[reportPrivateImportUsage]

    return xla_client.DeviceList(tuple(devices))


def callable_program(loaded: Any, arguments: Any, results: Any, donated: int | None, devices: Sequence[Any]) -> Program:
    """What `deserialize` gave, ready to be called.

    arguments, results: shapes and shardings, as of `Lowering.signature`. donated: which argument is.
    """
    # jax reads and writes executables with pickle only. What it makes of one is the same object in the releases that
    # are supported (0.10 to 0.12), and bundles of other releases are refused.
    from jax._src import core, stages
    from jax._src.interpreters import pxla

    donations = jax.tree.map(lambda _: False, arguments)
    if donated is not None:
        donations = (
            *donations[:donated],
            jax.tree.map(lambda _: True, arguments[donated]),
            *donations[donated + 1 :],
        )

    def abstract(leaf: Any) -> Any:
        return core.ShapedArray(leaf.shape, leaf.dtype)

    def where(leaf: Any) -> Any:
        return leaf.sharding or SingleDeviceSharding(devices[0])

    taken, given = jax.tree.leaves(arguments), jax.tree.leaves(results)
    program = pxla.UnloadedMeshExecutable(
        xla_executable=loaded,
        device_list=_device_list(devices),
        backend=devices[0].client,
        input_avals=[abstract(leaf) for leaf in taken],
        input_shardings=[where(leaf) for leaf in taken],
        output_avals=[abstract(leaf) for leaf in given],
        output_shardings=[where(leaf) for leaf in given],
        committed=len(devices) > 1,
        name="program",
        unordered_effects=[],
        ordered_effects=[],
        keepalive=[],
        host_callbacks=[],
        kept_var_idx=set(range(len(taken))),
        mut=None,
        xla_in_layouts=[None] * len(taken),
        dispatch_in_layouts=[None] * len(taken),
        xla_out_layouts=[None] * len(given),
        all_args_info=None,
        pgle_profiler=None,
    ).load()
    info = jax.tree.map(lambda leaf, gone: stages.ArgInfo(abstract(leaf), gone), arguments, donations)
    return stages.Compiled(program, [], (info, {}), jax.tree.structure(results), no_kwargs=True)


def environment(devices: Sequence[Any]) -> dict[str, Any]:
    """What an executable for these devices depends on, as JSON: they, and the versions of what compiled it."""
    kind = devices[0].platform
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    found: dict[str, Any] = {"platform": kind, "device_kind": devices[0].device_kind} | versions
    found["hosts"] = [device.process_index for device in devices]
    if kind == "tpu":
        where = [[*device.coords, device.core_on_chip] for device in devices]
        return found | {"libtpu": importlib.metadata.version("libtpu"), "coords": where}
    if kind == "cpu":
        return found | {"cpu": _cpu(), "kernels": cpu.version()}
    return found | {"runtime": devices[0].client.platform_version}


@functools.cache
def _cpu() -> str:
    """Names the instructions of this CPU: XLA compiles for all that it has."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else [platform.processor()]
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    return f"{platform.machine()} {hashlib.sha256(flags.encode()).hexdigest()[:16]}"
