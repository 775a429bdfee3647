"""Small random-weight models of Stable Diffusion's classes, made here: no test downloads anything."""

import copy
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: on tensors this small a second thread waits more than it works
if "-mgpu" in "".join(sys.argv):
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # before the first product, for the deterministic ones among the tests
else:  # tests are of the CPU, but for those of test_gpu.py
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
import torch

TRACKIO = tempfile.TemporaryDirectory()
os.environ["TRACKIO_DIR"] = TRACKIO.name  # before trackio is imported: not where its user has his runs

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from miniature import build  # noqa: E402
from plumbing.pipeline import pipeline_policy  # noqa: E402
from sampler import Policy, Schedule  # noqa: E402

SD_V1_4_SCHEDULER = dict(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    set_alpha_to_one=False,
    steps_offset=1,
    clip_sample=False,
    timestep_spacing="leading",
    prediction_type="epsilon",
)


def make_pipeline(seed: int = 0, channels: tuple[int, ...] = (16,)):
    """A StableDiffusionPipeline with a small untrained UNet whose output is of the size of the noise, as a trained one's is."""
    torch.manual_seed(seed)
    pipe = build.initial_pipeline(channels, width=16)
    torch.nn.init.normal_(pipe.unet.conv_out.weight, std=0.1)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_policy(pipe, num_steps=5, guidance_scale=3.0, scheduler=None, **settings) -> Policy:
    """The pipeline's policy, on its own schedule with changes to its config."""
    changed = copy.copy(pipe)
    changed.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config | (scheduler or {}))
    return pipeline_policy(changed, num_steps, guidance_scale=guidance_scale, **{"eta": 1.0} | settings)


def answering(schedule: Schedule, output: torch.Tensor) -> Policy:
    """A policy whose network puts out this, (M, C, H, W), whatever it is asked."""
    return Policy(lambda x_t, t, cond: output, schedule, tuple(output.shape[1:]), torch.device("cpu"))


@pytest.fixture
def pipe():
    return make_pipeline()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """The small pipeline as a folder, for the scripts."""
    folder = tmp_path_factory.mktemp("model") / "pipeline"
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def two_models(tmp_path_factory):
    """Two small pipelines, in the folders base and other."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "other")):
        make_pipeline(seed).save_pretrained(folder / name)
    return folder


@dataclass(frozen=True)
class OnTwo:
    """What came of a case on two processes: where it wrote, and of each process the exit code and stderr."""

    folder: Path
    codes: list[int]
    errors: list[str]

    def told_by_the_second(self) -> str:
        """The one line of error where only the second process has one, and both have ended by it."""
        assert self.codes == [2, 2] and "error" not in self.errors[0], self.errors
        (line,) = [line for line in self.errors[1].splitlines() if ": error" in line]
        assert "error in process 1 on" in line
        return line


@pytest.fixture(scope="session")
def on_two_processes(model_folder, two_models, tmp_path_factory) -> dict[str, OnTwo]:
    """All cases that want two processes, in one start of two agents of torchrun (tests/two_processes.py)."""
    workers_share = "PYTEST_XDIST_WORKER" in os.environ
    folder = tmp_path_factory.getbasetemp().parent / "two" if workers_share else tmp_path_factory.mktemp("two")
    with FileLock(f"{folder}.lock"):
        if not (folder / "cases.1.json").exists():
            run_on_two_processes(folder, model_folder, two_models)
    ranks = [json.loads((folder / f"cases.{rank}.json").read_text()) for rank in range(2)]
    return {
        name: OnTwo(folder / name, [rank[name]["code"] for rank in ranks], [rank[name]["errors"] for rank in ranks])
        for name in ranks[0]
    }


def run_on_two_processes(folder: Path, model_folder: Path, two_models: Path) -> None:
    import test_evaluate
    import test_lasro
    import test_methods
    import test_train

    folder.mkdir(exist_ok=True)
    cases = {"prdp": ("train", test_train.arguments(model_folder, folder / "prdp", "--epochs", "2", "--log_to", "tensorboard"))}
    for method in test_methods.FLAGS:
        cases[method] = ("train", test_methods.arguments(method, model_folder, folder / method, folder))
    cases["lasro"] = ("lasro", test_lasro.arguments(model_folder, folder / "lasro"))
    models = ["--models", f"base={two_models}/base", f"other={two_models}/other"]
    cases["evaluate"] = ("evaluate", [*test_evaluate.FLAGS, *models, "--output_dir", str(folder / "evaluate")])
    predicted = ["--runs", str(folder / "prdp"), *test_evaluate.PREDICTED, "--output_dir", str(folder / "predicted")]
    cases["predicted"] = ("evaluate", predicted)
    failing = ["--epochs", "2", "--eval_prompts", "", "--reward", "test_train:bad_on_one_rank"]
    cases["failing"] = ("train", test_train.arguments(model_folder, folder / "failing", *failing))
    cases["few"] = ("train", test_train.few(model_folder, folder / "few"))
    exhausting = ["--epochs", "3", "--eval_prompts", "", "--save_every", "100", "--reward", "test_train:exhausting"]
    cases["exhausting"] = ("train", test_train.arguments(model_folder, folder / "exhausting", *exhausting))
    alone = ["--epochs", "2", "--eval_prompts", "", "--reward", "test_train:exhausting_between_collectives"]
    cases["alone"] = ("train", test_train.arguments(model_folder, folder / "alone", *alone))
    (folder / "cases.json").write_text(json.dumps(cases))
    # As on two machines of one GPU each: an agent of torchrun on each, which meet at an address; here it is this machine's own.
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={free.getsockname()[1]}"]
    script, logs = ["tests/two_processes.py", str(folder / "cases.json")], [folder / f"agent{rank}.log" for rank in range(2)]
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *place, f"--node_rank={rank}", *script],
            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log.open("w"), stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]  # fmt: skip
    try:
        codes = [agent.wait(timeout=300) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # torchrun then ends the process it has started
    assert not any(codes), [log.read_text() for log in logs]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU, and is run by `make test-gpu` only")
