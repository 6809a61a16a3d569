"""The command that trains: distill."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from typing import Any

import jaxllm
from jaxllm.cli import common
from jaxllm.fit import CURVE, LOG, keep_freed_memory, plot, read_log
from jaxllm.lm import LM
from jaxllm.textfiles import read_text


def distill(args: argparse.Namespace) -> dict[str, Any]:
    common.check_out(args.out)
    keep_freed_memory()
    training = jaxllm.Training(
        steps=args.steps,
        batch=args.batch,
        accumulate=args.accumulate,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        seed=args.seed,
        rank=args.rank,
        remat=args.remat,
    )
    objective = jaxllm.Objective(args.divergence, args.temperature, args.beta, args.ce, args.hidden, args.attention)
    layer_map = None if args.layer_map is None else _layer_map(args.layer_map)
    text = read_text(args.text)
    heldout = None if args.heldout is None else read_text(args.heldout)
    run = args.out.parent / f"{args.out.name}.run"
    if run.exists() and not args.resume:
        raise FileExistsError(f"{run} holds a run already. Go on with it by --resume, or remove it.")
    mesh = common.mesh(args.mesh)
    student, teacher = (common.load(name, args.dtype, mesh) for name in (args.student, args.teacher))
    trained: LM = jaxllm.distill(
        teacher,
        text,
        training,
        objective,
        heldout=heldout,
        length=args.tokens,
        top_k=args.top_k,
        quantize=args.quantize,
        sparsity=args.sparsity,
        layer_map=layer_map,
        on_policy=args.on_policy,
        mesh=mesh,
        path=run,
        resume=args.resume,
        save_every=args.save_every,
        keep=args.keep,
        log=common.log,
    )(student)
    plot(read_log(run / LOG), run / CURVE)
    jaxllm.save(trained, args.out)
    shutil.copyfile(run / CURVE, args.out / CURVE)
    before, after = trained.ledger[-1].args["heldout_loss"]
    common.log(f"saved {args.out}; held-out loss {before:.4f} before, {after:.4f} after; {run} may be removed")
    print(f"held-out loss {before:.4f} -> {after:.4f} (step {trained.ledger[-1].args['best_step']} of {args.steps})")
    return {
        "out": str(args.out),
        "heldout_loss": [before, after],
        "ledger": [dataclasses.asdict(entry) for entry in trained.ledger],
    }


def _layer_map(spec: str) -> dict[int, int]:
    try:
        return dict(tuple(map(int, item.split("="))) for item in spec.split(","))  # pyright: ignore
    except ValueError:
        raise ValueError(f"--layer-map is {spec!r}; expected STUDENT=TEACHER,…: 0=1,1=3.") from None
