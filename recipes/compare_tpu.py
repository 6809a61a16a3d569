"""A decode step of Llama-3.1 with int8 weights, compiled for a TPU slice: ours beside jax-llm-examples'.

Expected, with int8 caches: jaxllm 2.29 GB of arguments, 2.19 GB of memory a step and 3.60 ms of cycles, the other
3.33, 2.30 and 3.80; libtpu 0.0.42. The other's code is a checkout of github.com/jax-ml/jax-llm-examples, which needs
`etils` and `flatbuffers`, or is left out.
Nothing is run, and no TPU is needed; bytes are of one chip.
Run: python recipes/compare_tpu.py [--config CONFIG.json] [--target v5e:2x2] [--peer CHECKOUT/llama3]
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from jaxllm import hlo, hlo_cost, prediction, shard, targets
from jaxllm.compile import Lowering
from jaxllm.config import from_hf

HERE = Path(__file__).parent


def ours(cfg, target, sizes, batch, context, kv_dtype):
    mesh = shard.make_mesh(*sizes, devices=target.devices())
    cfg = dataclasses.replace(cfg, kv_dtype=kv_dtype)
    return Lowering(cfg, prediction.abstract_params(cfg, "int8"), batch, context, mesh).step()


def theirs(folder, config, target, sizes, batch, context, int8_cache):
    """Their decode step, with their shardings, on the same slice: x is the batch's axis, y that of the KV heads."""
    sys.path.insert(0, str(folder))
    from jax.sharding import AxisType
    from llama3_jax import model  # pyright: ignore[reportMissingImports]

    devices = target.devices()
    mesh = jax.make_mesh(sizes, ("x", "y", "z"), devices=devices, axis_types=(AxisType.Explicit,) * 3)
    cfg = dataclasses.replace(
        model.llama_to_jax_config(config), mesh=mesh, quant_layer=True, quant_cache=int8_cache, max_seq_len=context
    )

    def shapes(of):
        abstract, shardings = of

        def one(info, sharding):
            return jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding)

        return jax.tree.map(one, abstract, shardings, is_leaf=model.is_param)

    weights = shapes((model.Weights.abstract(cfg), model.Weights.shardings(cfg)))
    cache = shapes((model.KVCache.abstract(cfg, batch), model.KVCache.shardings(cfg, batch)))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None))
    tokens = jax.ShapeDtypeStruct((batch, 1), "int32", sharding=sharding)
    with jax.sharding.set_mesh(mesh):
        return model.decode_step.lower(tokens, weights, cache, cfg)


def row(name, lowered, target):
    began = time.perf_counter()
    with targets.uncached():
        compiled = lowered.compile()
    found = prediction.Program.of(compiled, time.perf_counter() - began)
    low, _, _ = prediction.interval(found, target)
    return {
        "name": name,
        "argument_bytes": found.argument_bytes,
        "temp_bytes": found.temp_bytes,
        "memory_bytes": found.low.memory_bytes,
        "roofline_ms": low * 1e3,
        "cycles_ms": found.low.cycles / target.chip.clock_hz * 1e3,
        "collectives": sum(found.low.collectives.values()),
        "collective_bytes": found.low.collective_bytes,
        "copies": sum(hlo_cost.moves_only(m, i) for m in [hlo.parse(compiled.as_text())] for _, i in m.executed()),
        "compile_s": found.compile_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "configs" / "llama-3.1-8b.json")
    parser.add_argument("--target", type=targets.parse, default="v5e:2x2")
    parser.add_argument("--mesh", default="1,4,1", help="data, model and share; x, y and z of theirs")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--peer", type=Path)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")

    config = json.loads(args.config.read_text())
    cfg = dataclasses.replace(from_hf(config), dtype="bfloat16")
    sizes = tuple(int(size) for size in args.mesh.split(","))
    shape = args.target, sizes, args.batch, args.context
    lowered = {f"ours, {kv or 'bfloat16'} cache": ours(cfg, *shape, kv) for kv in (None, "int8")}
    if args.peer:
        for kv in ("bfloat16", "int8"):
            lowered[f"jax-llm-examples, {kv} cache"] = theirs(args.peer, config, *shape, kv == "int8")
    rows = []
    for name, program in lowered.items():
        print(f"compiling {name}", file=sys.stderr, flush=True)
        rows.append(row(name, program, args.target))
    table = Table(
        caption=f"{args.config.stem}, int8 weights, {args.target}, batch {args.batch}, context {args.context}"
    )
    for column in ("", "arguments", "temporaries", "memory a step", "roofline", "cycles", "collectives", "copies"):
        table.add_column(column, justify="right" if column else "left")
    for r in rows:
        sizes = (
            f"{r['argument_bytes'] / 1e9:.2f} GB",
            f"{r['temp_bytes'] / 1e6:.1f} MB",
            f"{r['memory_bytes'] / 1e9:.2f} GB",
        )
        sums = f"{r['collectives']}, {r['collective_bytes'] / 1e6:.1f} MB"
        table.add_row(
            r["name"], *sizes, f"{r['roofline_ms']:.2f} ms", f"{r['cycles_ms']:.2f} ms", sums, str(r["copies"])
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
