"""Memory and time of what comes from hidden states against the plain path, value and gradients.

    python benchmarks/logprobs.py [--b 8 --t 512 --d 512 --v 65536 --dtype float32 --chunk 4096 --tied --pairs 5]

Memory is the compiler's peak of temporary buffers. The two programs take turns, and the ratio of their medians is
printed; at the size above a pair of log-probs takes 12 to 25 seconds on two CPU cores.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from rlhf_jax import kl, logprobs

MIB = 2**20


def quantities(args: argparse.Namespace) -> dict:
    """(plain, from hidden states) by name, each a function of (hidden, unembedding, ref_hidden, ref_unembedding)."""
    tokens = jax.random.randint(jax.random.key(1), (args.b, args.t), 0, args.v)
    options = {"chunk": args.chunk, "tied": args.tied}

    def logits(hidden, table):
        return jnp.matmul(hidden, table.T if args.tied else table, preferred_element_type=jnp.float32)

    return {
        "logps": (
            lambda h, u, *_: logprobs.token_logps(logits(h, u), tokens),
            lambda h, u, *_: logprobs.from_hidden(h, u, tokens, **options),
        ),
        "entropy": (
            lambda h, u, *_: logprobs.entropy(logits(h, u)),
            lambda h, u, *_: logprobs.entropy_from_hidden(h, u, **options),
        ),
        "kl": (
            lambda h, u, r, w: kl.exact(logits(h, u), logits(r, w)),
            lambda h, u, r, w: kl.exact_from_hidden(h, u, r, w, **options),
        ),
    }


def compiled(fn, arrays, weights):
    """Value and the policy's gradients of a weighted sum, as a program."""
    total = jax.value_and_grad(lambda *arrays: jnp.sum(fn(*arrays) * weights), argnums=(0, 1))
    return jax.jit(total).lower(*arrays).compile()


def seconds(program, arrays) -> float:
    """Of one run."""
    start = time.perf_counter()
    jax.block_until_ready(program(*arrays))
    return time.perf_counter() - start


def main() -> None:
    """Print a line a quantity."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("b", 8), ("t", 512), ("d", 512), ("v", 65_536), ("pairs", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--only", nargs="+", default=["logps", "entropy", "kl"], metavar="QUANTITY")
    args = parser.parse_args()
    keys = jax.random.split(jax.random.key(0), 5)
    table = (args.v, args.d) if args.tied else (args.d, args.v)
    shapes = ((args.b, args.t, args.d), table) * 2
    arrays = [jax.random.normal(k, s, args.dtype) for k, s in zip(keys, shapes, strict=False)]
    arrays[1::2] = [x * args.d**-0.5 for x in arrays[1::2]]
    weights = jax.random.normal(keys[4], (args.b, args.t))
    for name in args.only:
        programs = [compiled(fn, arrays, weights) for fn in quantities(args)[name]]
        memory = [program.memory_analysis().temp_size_in_bytes for program in programs]
        for program in programs:
            seconds(program, arrays)  # the first run sets its buffers up
        turns = [[seconds(program, arrays) for program in programs] for _ in range(args.pairs)]
        plain, sliced = (statistics.median(column) for column in zip(*turns, strict=True))
        print(
            f"{name}: temporary memory {memory[0] / MIB:.1f} -> {memory[1] / MIB:.1f} MiB"
            f" (1/{memory[0] / memory[1]:.1f}), time {plain:.3f} -> {sliced:.3f} s"
            f" (ratio {sliced / plain:.2f}, medians of {args.pairs} pairs)",
            flush=True,
        )


if __name__ == "__main__":
    main()
