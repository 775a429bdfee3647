"""One command for a day with a GPU: what only a GPU can show, each part in less than eight minutes and kept as a JSON file.

    python -m benchmarks.gpu --output results/gpu                                  # goes on; what failed is done again
    python -m benchmarks.gpu --output runs/gpu-rehearsed --shape tiny              # everything tiny, on a CPU as well

Stable Diffusion v1.4's shape and a full-sized HPSv2 of random weights (benchmarks.rehearsal, made first, 6 GB), at the
paper's large-scale settings but for 4 prompts an epoch instead of 64 and T = 10 instead of 50 (fp32: 2, TF32: 4), and adapters of
the flows' shapes by their presets (about 7 and 34 GB):

    tests           those marked gpu, each with its outcome
    rounding        how far log-ratios at unchanged weights are from 0, by precision
    speed ...       seconds by phase, pictures a second, utilisation, peak memory (benchmarks.speed), by precision and option
    recipe ...      two epochs of docs/stable-diffusion.md's recipes in a memory of that size, and what was derived
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import torch

from benchmarks import memory
from plumbing.describe import rounding
from plumbing.errors import last_words, one_line_errors
from plumbing.flags import parse
from plumbing.jobs import file_name
from plumbing.pipeline import encode_prompts, load_pipeline, pipeline_policy
from plumbing.provenance import provenance, write_result
from plumbing.record import read_metrics
from sampler import sample_trajectories

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 480  # seconds of a part
GOAL = 0.45  # of the measured rate of bf16 over an epoch
SPEED = {  # name: T and flags
    "bf16": (10, ""),
    "bf16, channels_last": (10, "--channels_last True"),
    "bf16, compile": (10, "--compile True"),
    "bf16, compile, channels_last": (10, "--compile True --channels_last True"),
    "bf16, batches of 32": (10, "--sample_batch_size 32 --log_prob_batch_size 32 --train_batch_size 16"),
    "bf16, auto": (10, "--sample_batch_size auto --log_prob_batch_size auto --train_batch_size auto"),
    "bf16, adapters": (10, "--lora_rank 16"),
    "bf16, reference on a tenth": (10, "--reference_steps 1"),
    "tf32": (4, "--autocast no --tf32 True"),
    "fp32": (2, "--autocast no"),
}
FLOWS = {"sd3.5-medium": "sd3.5-medium-no-t5", "flux-dev": "flux-dev"}  # presets and their shapes
CAPS = {"every weight, 24 GB": 24e9, "adapters, 12 GB": 12e9}  # bytes


def call(command: list[str], limit: int = LIMIT, **environment: str) -> dict:
    """Runs it in the project's root -> seconds, and where it did not end well, in `limit` seconds, the last line it said."""
    began, pipe, environment = time.monotonic(), subprocess.PIPE, os.environ | environment
    process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True, env=environment)
    try:
        stdout, stderr = process.communicate(timeout=limit)
        failure = None if process.returncode == 0 else last_words(stderr.strip() or stdout)
    except subprocess.TimeoutExpired:
        failure = f"not finished after {limit} seconds"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with what it has started, as a compiler's workers
            process.communicate()
    return {"seconds": round(time.monotonic() - began), "failure": failure}


def run_tests(options) -> dict:
    report = options.folder / "tests.xml"
    report.unlink(missing_ok=True)
    outcome = call([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--junitxml", str(report), "tests/test_gpu.py"])
    tests = {}
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        found = [child.get("message", "") for child in case if child.tag in ("failure", "error", "skipped")]
        tests[case.get("name")] = found[0].splitlines()[0] if found else "passed"
    return outcome | {"tests": tests}


def measure_rounding(model: Path, steps: int) -> dict[str, float]:
    """Of four trajectories drawn in each precision."""
    device, largest = torch.device("cuda" if torch.cuda.is_available() else "cpu"), {}
    for name, autocast, tf32 in (("fp32", "no", False), ("tf32", "no", True), ("bf16", "bf16", False)):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        pipe = load_pipeline(str(model), device)
        policy = pipeline_policy(pipe, steps, guidance_scale=5.0, eta=1.0, autocast=autocast)
        drawn = sample_trajectories(policy, encode_prompts(pipe, ["a photo of a cat"] * 4), [(0, 0, 0, b) for b in range(4)], 4)
        largest[name] = rounding(policy, drawn, 4).max().item()
        del pipe, policy, drawn
    return largest


def run_rounding(options) -> dict:
    """In a process that ends, so that none of the GPU's memory is held while the other parts run."""
    file, model = options.folder / "rounding.json", options.folder / "rehearsal" / "pipeline"
    code = (
        "import json, pathlib; from benchmarks.gpu import measure_rounding\n"
        f"largest = measure_rounding({str(model)!r}, {options.steps})\n"
        f"pathlib.Path({str(file)!r}).write_text(json.dumps(largest))"
    )
    file.unlink(missing_ok=True)
    outcome = call([sys.executable, "-c", code])
    return outcome | ({"largest": json.loads(file.read_text())} if file.exists() else {})


def measure_speed(steps: int, flags: list[str], options, limit: int = LIMIT) -> dict:
    file = options.folder / "speed.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.speed", "--epochs", "3", "--output", str(file)]
    flags = [*options.flags, "--num_steps", str(min(steps, options.steps)), *flags]
    outcome = call([*command, *flags], limit, TMPDIR=str(options.folder))  # its runs, with checkpoints of 14 GB
    return outcome | (json.loads(file.read_text()) if file.exists() else {})


def make(folder: Path, shape: str, rewards: list[str], dtype: str = "fp32") -> dict:
    """A rehearsal's files, made on the GPU if there is one, in a process that ends."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = "tiny" if shape.startswith("tiny") else "full"
    flags = ["--pipeline", shape, "--rewards", size, "--only", *rewards, "--device", device, "--dtype", dtype]
    return call([sys.executable, "-m", "benchmarks.rehearsal", str(folder), *flags])


def measure_flow(preset: str, options) -> dict:
    """Three steps, which is the least of which two have noise."""
    folder = options.folder / "flow"
    shutil.rmtree(folder, ignore_errors=True)
    made = make(folder, ("tiny-" if options.shape == "tiny" else "") + FLOWS[preset], [], "bf16")
    if made["failure"]:
        return made
    flags = ["--preset", preset, "--prompts", "hpdv2-train", "--reward", "hpsv2", "--model", str(folder / "pipeline")]
    if options.shape == "tiny":
        flags += ["--resolution", "64"]
    try:
        outcome = measure_speed(3, [*flags, "--prompts_per_epoch", "2"], options, LIMIT - made["seconds"])
        return outcome | {"seconds_to_make": made["seconds"]}
    finally:
        shutil.rmtree(folder)


def run_recipe(name: str, options) -> dict:
    """Two epochs, so that the reference is asked and the optimiser has its moments, in no more memory than the recipe's."""
    run, recipe = options.folder / f"run of {name}", memory.RECIPES[name].split()[2:]  # all of them begin with the preset
    shutil.rmtree(run, ignore_errors=True)
    flags = [*options.flags, *recipe, "--eval_prompts=", "--epochs", "2", "--num_steps", str(min(10, options.steps))]
    flags += ["--output_dir", str(run)]
    capped = (
        "import runpy, sys, torch\n"
        "if torch.cuda.is_available():\n"
        f"    torch.cuda.set_per_process_memory_fraction(min(1, {CAPS[name]} / torch.cuda.mem_get_info()[1]))\n"
        f"sys.argv = ['train.py', *{flags!r}]\n"
        "runpy.run_path('train.py', run_name='__main__')"
    )
    outcome = call([sys.executable, "-c", capped])
    lines = read_metrics(run)[1:] if (run / "metrics.jsonl").exists() else []
    peak = max((line["peak_memory_gib"] for line in lines), default=None)
    derived = memory.derive(parse(flags), options.shape)
    most = max(derived[phase] for phase in ("sample", "reward", "reference", "update"))
    return outcome | {"cap_bytes": CAPS[name], "derived_gib": most, "measured_gib": peak}


def parts(options) -> dict:
    return {
        "tests": lambda: run_tests(options),
        "rounding": lambda: run_rounding(options),
        **{f"speed {name}": lambda do=do: measure_speed(do[0], do[1].split(), options) for name, do in SPEED.items()},
        **{f"recipe {name}": lambda name=name: run_recipe(name, options) for name in CAPS},
        **{f"speed {preset}": lambda preset=preset: measure_flow(preset, options) for preset in FLOWS},
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu"), help="of models and runs")
    parser.add_argument("--shape", choices=("full", "tiny"), default="full")
    parser.add_argument("--parts", nargs="+", metavar="PART", default=[], help="some of them, in this order; by default all")
    options = parser.parse_args(argv)
    options.folder, options.steps = options.folder.absolute(), 10 if options.shape == "full" else 3
    with one_line_errors(ValueError, OSError):
        everything = parts(options)
        if unknown := [name for name in options.parts if name not in everything]:
            raise ValueError(f"no part {unknown[0]!r}: use {', '.join(everything)}")
        if options.shape == "full" and not torch.cuda.is_available():
            raise ValueError("there is no GPU: --shape tiny shows the command on a CPU")
        for folder in (options.output, options.folder):
            folder.mkdir(parents=True, exist_ok=True)
        made = options.folder / "rehearsal"
        weights = ["--reward_weights", f"hpsv2={made / 'rewards' / 'hpsv2'}"]
        settings = "--preset large-hpsv2 --prompts_per_epoch 4"
        if options.shape == "tiny":  # a preset that does not ask for a GPU
            settings = (
                "--preset toy --reward hpsv2 --guidance_scale 5 --autocast bf16 --prompts_per_epoch 2 --images_per_prompt 2"
            )
        files = ["--model", str(made / "pipeline"), "--prompts_dir", str(made / "prompts"), *weights]
        options.flags = [*settings.split(), *files]
        for name in options.parts or everything:
            run = everything[name]
            file = options.output / f"{file_name(name)}.json"
            if not is_done(file):
                if name != "tests" and not (options.folder / "made").exists():
                    shutil.rmtree(made, ignore_errors=True)
                    if failure := make(made, options.shape, ["hpsv2"])["failure"]:
                        raise ValueError(f"no models were made: {failure}")
                    (options.folder / "made").touch()
                write_result(file, "-m benchmarks.gpu", argv, {"part": name} | run())
            result = json.loads(file.read_text())
            print(f"{name}: {summary(result)}", flush=True)


def is_done(file: Path) -> bool:
    """Whether a part's result is there, without a failure, and of this machine and these versions."""
    known, this = json.loads(file.read_text()) if file.exists() else {"failure": "no result"}, provenance("", [])
    return known["failure"] is None and all(known[key] == this[key] for key in ("versions", "machine"))


def summary(result: dict) -> str:
    """A part's outcome in a line."""
    if result["failure"]:
        return f"FAILED: {result['failure']}"
    if "tests" in result:
        outcomes = list(result["tests"].values())
        return f"{outcomes.count('passed')} passed, the others: {[said for said in outcomes if said != 'passed']}"
    if "largest" in result:
        return ", ".join(f"{name} {value:.2g}" for name, value in result["largest"].items())
    if "derived_gib" in result:
        return f"{result['measured_gib']:.1f} GiB measured, {result['derived_gib']:.1f} derived"
    (row,) = result["results"]
    return (
        f"{row['seconds_per_epoch']:.1f} s an epoch, {row['images_per_second']:.2f} images/s, {row['peak_memory_gib']:.1f} GiB, "
        f"{100 * row['utilisation']['epoch']:.0f} % of the measured rate (goal: {100 * GOAL:.0f} % in bf16)"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
