"""Prompts to answers on a multi-host slice: each host holds a copy of the model and answers its share of the prompts.

The same command runs on every host:
    tpu_setup/tpu run NAME --type v5e-16 --zone ZONE -- python src/tpu_setup/generate.py MODEL PROMPT [PROMPT ...]

Checked on two processes of a CPU; not yet measured on a slice.
"""

import argparse

import jax

import jaxllm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as for jaxllm generate")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--model-axis", type=int, default=1, help="chips that one copy is split over (default 1)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="default %(default)s")
    args = parser.parse_args()

    jax.distributed.initialize()  # Without arguments: a TPU VM knows its slice.
    chips = jax.local_devices()
    if args.model_axis < 1 or len(chips) % args.model_axis:
        raise SystemExit(f"--model-axis is {args.model_axis}; expected a divisor of the host's {len(chips)} chips.")
    mesh = jaxllm.make_mesh(data=len(chips) // args.model_axis, model=args.model_axis, devices=chips)
    host, hosts = jax.process_index(), jax.process_count()
    print(f"host {host} of {hosts}: {len(chips)} of {jax.device_count()} chips", flush=True)

    prompts = args.prompts[host::hosts]
    if not prompts:
        return
    engine = jaxllm.compile(jaxllm.load(args.model), batch=mesh.shape["data"], mesh=mesh)
    for prompt, result in zip(prompts, engine.generate(prompts, max_new_tokens=args.max_new_tokens), strict=True):
        print(f"{prompt!r}: {result.text!r}", flush=True)


if __name__ == "__main__":
    main()
