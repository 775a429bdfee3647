"""Seconds per epoch by phase, peak memory and utilisation, for several numbers of denoising steps T.

    python -m benchmarks.speed --preset toy                                               # the embedded model, T = 5 and T = 50
    python -m benchmarks.speed --num_steps 50 --preset large-hpsv2 --model FOLDER ...  # any flags of train.py, or rehearsal's

Runs train.py for a few epochs with one update each, in processes of their own, and takes those after the second (the first has
no reference pass, and with --compile the second compiles it). Prints a table and, with --output, writes it as JSON with
command, versions and machine.

Utilisation is the floating point operations that the phase needs, over its seconds, over what the same device reaches in one
large matrix product of the precision that the flags name (of as many devices as processes, if these are GPUs). The UNet's
operations are counted by torch in one forward pass; a backward pass is two of them (one if only adapters are trained), and what
gradient checkpointing computes again does not count.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from config import DTYPES, Config
from plumbing.errors import last_words, one_line_errors
from plumbing.flags import parse
from plumbing.pipeline import encode_prompts, load_pipeline, pipeline_policy
from plumbing.provenance import write_result
from plumbing.record import read_metrics
from plumbing.schedules import noise_schedule, scheduler_at

WARM = 2  # epochs that are not measured


@torch.no_grad()
def flops_of(run: Callable[[], object]) -> int:
    """Floating point operations of `run`; attention counts as its matrix products, which is how torch's counter knows it."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def flops_per_entry(config: Config, pipe) -> int:
    """Floating point operations of the UNet for one (trajectory, step), guidance included."""
    policy = pipeline_policy(pipe, config.num_steps, guidance_scale=config.guidance_scale, eta=config.eta)
    cond = encode_prompts(pipe, ["a prompt"])
    return flops_of(lambda: policy.denoise(torch.randn(1, *policy.latent_shape), torch.ones(1, dtype=torch.long), cond))


def ceiling(config: Config) -> float:
    """The most operations per second this device reached in a large matrix product of the run's precision."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = config.tf32
    dtype = DTYPES[config.autocast] or torch.float32
    side = 8192 if device.type == "cuda" else 512  # a CPU without instructions for bf16 takes minutes for more
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = min(Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads()).timeit(5).mean for _ in range(4))
    return 2 * side**3 / best


def passes(config: Config, S: int) -> dict[str, int]:
    """Passes of the UNet in every phase of an epoch, for one trajectory of S noisy steps; backward counts two, of adapters one.

    For PRDP with any K; for the others, whose updates are of a part of the table each, with K = 1.
    """
    K = config.updates_per_epoch
    reference = {"prdp": min(config.reference_steps, S) or S, "d3po": S}.get(config.method, 0)
    again = S if K > 1 else 0  # theta_old's table
    updates = K * (2 if config.lora_rank else 3) + K - 1  # before all but the first a table of theta
    return {"sample": config.num_steps, "reference": reference + again, "update": S * updates}


def noisy_steps(config: Config, scheduler) -> int:
    """S of a scheduler's schedule."""
    return len(noise_schedule(scheduler_at(scheduler, config.num_steps), config.eta).noisy)


def measure(processes: int, num_steps: int, epochs: int, flags: list[str], pipe, flops: int, most: float) -> dict:
    """One row of the table; ValueError with train.py's own message if it refuses the flags."""
    config = parse([*flags, "--num_steps", str(num_steps), "--updates_per_epoch", "1"])
    with tempfile.TemporaryDirectory() as folder:
        run, start = Path(folder) / "run", [sys.executable]
        if processes > 1:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [*start, str(Path(__file__).parent.parent / "train.py"), "--eval_prompts", "", *flags]
        command += ["--num_steps", str(num_steps), "--epochs", str(epochs), "--updates_per_epoch", "1", "--output_dir", str(run)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise ValueError(last_words(done.stderr))
        lines = read_metrics(run)[WARM - epochs :]
    phases = {phase: sum(line["seconds"][phase] for line in lines) / len(lines) for phase in lines[0]["seconds"]}
    if torch.cuda.is_available():
        most *= processes
    trajectories = config.prompts_per_epoch * config.images_per_prompt
    of_phase = passes(config, noisy_steps(config, pipe.scheduler))
    return {
        "processes": processes,
        "num_steps": num_steps,
        "seconds": phases,
        "seconds_per_epoch": sum(phases.values()),
        "utilisation": {phase: trajectories * n * flops / phases[phase] / most for phase, n in of_phase.items()}
        | {"epoch": trajectories * sum(of_phase.values()) * flops / sum(phases.values()) / most},
        "images_per_second": sum(line["images_per_second"] for line in lines) / len(lines),
        "peak_memory_gib": max(line["peak_memory_gib"] for line in lines),
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_steps", type=int, nargs="+", default=[5, 50], help="values of T")
    parser.add_argument("--epochs", type=int, default=4, help="of them the first two are not measured")
    parser.add_argument("--processes", type=int, nargs="+", default=[1], help="numbers of them, by torchrun where above 1")
    parser.add_argument(
        "--also", nargs="+", default=[], metavar="FLAGS", help="further rows, of the first T, with these flags too"
    )
    parser.add_argument("--output", default="", help="JSON file")
    arguments, flags = parser.parse_known_args(argv)
    with one_line_errors(ValueError, OSError):
        config = parse(flags)
        # In a process that ends, so that no memory of the GPU is held while epochs are measured.
        with ProcessPoolExecutor(1, get_context("spawn")) as child:
            most = child.submit(ceiling, config).result()
        how = {name: getattr(config, name) for name in ("resolution", "max_sequence_length")}
        pipe = load_pipeline(config.model, torch.device("cpu"), **how)
        speed = {"flops_per_entry": flops_per_entry(config, pipe), "flops_per_second_of_a_matrix_product": most}
        cases = [(processes, num_steps, "") for processes in arguments.processes for num_steps in arguments.num_steps]
        cases += [(arguments.processes[0], arguments.num_steps[0], also) for also in arguments.also]
        rows = [
            {"flags": also} | measure(processes, num_steps, arguments.epochs, [*flags, *also.split()], pipe, *speed.values())
            for processes, num_steps, also in cases
        ]
        if arguments.output:
            write_result(Path(arguments.output), "-m benchmarks.speed", argv, speed | {"results": rows})
    phases = list(rows[0]["seconds"])
    print(f"{speed['flops_per_entry'] / 1e9:.3g} GFLOP per trajectory and step; a matrix product reaches "
          f"{speed['flops_per_second_of_a_matrix_product'] / 1e12:.3g} TFLOP/s")  # fmt: skip
    print(f"| | processes | T | {' | '.join(f'{phase} s' for phase in phases)} | epoch s | images/s | peak GiB | utilisation |")
    print("|---" * (7 + len(phases)) + "|")
    for row in rows:
        seconds = " | ".join(f"{row['seconds'][phase]:.2f}" for phase in phases)
        print(f"| {row['flags']} | {row['processes']} | {row['num_steps']} | {seconds} | {row['seconds_per_epoch']:.2f} "
              f"| {row['images_per_second']:.1f} | {row['peak_memory_gib']:.3f} "
              f"| {', '.join(f'{phase} {100 * share:.0f} %' for phase, share in row['utilisation'].items())} |")  # fmt: skip
    peaks = [row["peak_memory_gib"] for row in rows[: len(arguments.num_steps)]]  # over T, all else equal
    print(f"peak memory differs by {100 * (max(peaks) / min(peaks) - 1):.1f} %")


if __name__ == "__main__":
    main(sys.argv[1:])
