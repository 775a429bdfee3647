"""The whole loop on a small random-weight pipeline: processes, resuming, interruption, and what users get wrong."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import ROOT
from diffusers import StableDiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file

import train
from miniature import build
from miniature.world import alignment
from plumbing import checkpoint, processes, run, trainable

TINY = "--preset toy --prompts toy-small --prompts_per_epoch 4 --images_per_prompt 3 --learning_rate 1e-3 --eval_every 2".split()
EVALUATION = str(ROOT / "tests" / "prompts.txt")
CLOCK_AND_MEMORY = ("seconds", "images_per_second", "peak_memory_gib")
ONE_THREAD = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
SEVERAL_UPDATES = [*TINY, "--updates_per_epoch", "3", "--clip_range", "3e-3", "--guidance_scale", "3"]


def arguments(model_folder, run, *more):
    return [*SEVERAL_UPDATES, "--eval_prompts", EVALUATION, "--model", str(model_folder), "--output_dir", str(run), *more]


def few(model_folder, run):
    """An epoch of one prompt's three pictures, evaluated on one prompt."""
    prompt = run.with_suffix(".txt")
    prompt.write_text("a red ring on a black background\n")
    return arguments(
        model_folder, run, "--epochs", "1", "--updates_per_epoch", "1", "--prompts_per_epoch", "1", "--eval_prompts", str(prompt)
    )


def metrics(run: Path) -> list[dict]:
    """The record without what the machine decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK_AND_MEMORY} for line in lines]


def weights(run: Path) -> dict[str, torch.Tensor]:
    file = run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    return loaded(file, file.stat().st_mtime_ns)


@functools.lru_cache(4)
def loaded(file: Path, written: int) -> dict[str, torch.Tensor]:
    return load_file(file)


@pytest.fixture(scope="module")
def finished(model_folder, tmp_path_factory):
    """Two uninterrupted epochs in one process."""
    run = tmp_path_factory.mktemp("run") / "finished"
    train.main(arguments(model_folder, run, "--epochs", "2"))
    return run


def test_run_folder_and_record(finished, model_folder):
    lines = metrics(finished)
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert lines[0]["eval_reward"] is not None and lines[2]["eval_reward"] is not None
    assert lines[1]["kl_nats"] == 0  # theta_old is still the reference
    assert lines[2]["kl_nats"] != 0
    assert 0 < lines[2]["clip_fraction"] < 1
    assert 0 <= lines[2]["log_prob_drift"] < 1e-5
    assert (finished / "reward.png").stat().st_size > 1000
    assert sorted(path.name for path in (finished / "samples").iterdir()) == ["epoch_000000.png", "epoch_000002.png"]
    seconds = json.loads((finished / "metrics.jsonl").read_text().splitlines()[2])["seconds"]
    assert set(seconds) == {"sample", "reward", "reference", "update", "evaluate"}
    assert not list(finished.rglob("*.unfinished"))


def test_result_opens_with_plain_diffusers_and_is_what_was_trained(finished, model_folder):
    pipe = StableDiffusionPipeline.from_pretrained(finished / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a red circle on a blue background", num_inference_steps=2, output_type="pt").images
    assert picture.shape == (1, 3, 32, 32) and picture.isfinite().all()
    saved = load_file(checkpoint.all_checkpoints(finished)[-1] / "weights.safetensors")
    before = load_file(model_folder / "unet" / "diffusion_pytorch_model.safetensors")
    for name, tensor in weights(finished).items():
        assert torch.equal(tensor, saved[name])
    assert any(not torch.equal(saved[name], before[name]) for name in saved)


def test_two_processes_equal_one(finished, model_folder, on_two_processes):
    two = on_two_processes["prdp"]
    run = two.folder
    assert two.codes == [0, 0], two.errors
    start = load_file(model_folder / "unet" / "diffusion_pytorch_model.safetensors")
    one, two = (torch.cat([(weights(folder)[n] - t).flatten() for n, t in start.items()]) for folder in (finished, run))
    # Adam makes steps even of the rounding of gradients that should be zero (biases before a normalisation): a few percent.
    assert (two - one).norm() < 0.1 * one.norm()
    for a, b in zip(metrics(run), metrics(finished), strict=True):
        assert a["eval_reward"] == pytest.approx(b["eval_reward"], abs=1e-4)
        if a["epoch"]:
            assert a["reward_mean"] == pytest.approx(b["reward_mean"], abs=1e-5)
            assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-2)


@pytest.fixture
def asked(monkeypatch) -> list[int | None]:
    """Of every table that train() asks for the number of its entries, None for all of them."""
    numbers, log_prob_table = [], train.log_prob_table

    def counting(policy, trajectories, batch_size, entries=None):
        numbers.append(None if entries is None else entries.sum().item())
        return log_prob_table(policy, trajectories, batch_size, entries)

    monkeypatch.setattr(train, "log_prob_table", counting)
    return numbers


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--updates_per_epoch 1", []),
        ("--updates_per_epoch 3", [None, 48, 48]),  # theta_old's in the batches of the updates, and one for each that follows
        ("--updates_per_epoch 1 --offline", [None]),
        ("--method ddpo --updates_per_epoch 3", [16, 16]),  # theta_old's is that of sampling
    ],
)
def test_no_table_is_made_that_nobody_needs(flags, expected, asked, model_folder, tmp_path):
    train.main(arguments(model_folder, tmp_path / "run", "--epochs", "1", "--eval_prompts", "", *flags.split()))
    assert asked == expected


def test_reference_steps_cost_less_and_all_of_them_are_none_the_less(asked, model_folder, tmp_path):
    for steps in ("0", "1", "4"):
        more = ["--epochs", "2", "--updates_per_epoch", "1", "--reference_steps", steps]
        train.main(arguments(model_folder, tmp_path / steps, *more))
    usual, one, all_steps = (metrics(tmp_path / steps)[2] for steps in ("0", "1", "4"))
    assert asked == [48, 12, 48]  # in the second epochs; in the first theta is the reference
    assert all_steps["loss"] == pytest.approx(usual["loss"], rel=1e-9)
    assert all_steps["kl_nats"] == pytest.approx(usual["kl_nats"], rel=1e-6)
    assert one["kl_nats"] != pytest.approx(usual["kl_nats"], rel=1e-3)


def test_resumed_equals_uninterrupted_bit_for_bit(finished, model_folder, tmp_path):
    run = tmp_path / "resumed"
    train.main(arguments(model_folder, run, "--epochs", "1"))
    (run / "metrics.jsonl").open("a").write(json.dumps({"epoch": 2, "eval_reward": 9.0}) + "\n")  # after the checkpoint
    train.main(["--resume", str(run), "--epochs", "2"])
    assert metrics(run)[2] == metrics(finished)[2]
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, weights(finished)[name]), name


def bad_on_one_rank(images, prompts):
    """Fails in the second of two processes only."""
    if os.environ["RANK"] == "1":
        raise KeyError("lost")
    return alignment(images, prompts)


def test_failing_reward_in_one_process_stops_all_with_one_message(on_two_processes):
    line = on_two_processes["failing"].told_by_the_second()
    assert "test_train:bad_on_one_rank" in line and "raised KeyError" in line


def exhausting(images, prompts):
    """The toy reward. From the second epoch on the second of two processes is out of memory in its next backward pass."""
    exhausting.calls = getattr(exhausting, "calls", 0) + 1
    usual = torch.nn.GroupNorm.forward

    def full(self, x):
        if not torch.is_grad_enabled():
            return usual(self, x)
        torch.nn.GroupNorm.forward = usual
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 79.15 GiB.")

    if os.environ["RANK"] == "1" and exhausting.calls == 2:
        torch.nn.GroupNorm.forward = full
    return alignment(images, prompts)


def test_memory_that_ends_in_one_process_stops_all_and_the_epochs_before_are_saved(on_two_processes):
    two = on_two_processes["exhausting"]
    line = two.told_by_the_second()
    assert "Tried to allocate 2.00 GiB" in line and "lower --train_batch_size" in line
    assert checkpoint.read_state(two.folder)["epoch"] == len(metrics(two.folder)) - 1 == 1


def exhausting_between_collectives(images, prompts):
    """The toy reward. Then the second of two processes is out of memory where the first does not wait for it."""

    def rounding(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")

    if os.environ["RANK"] == "1":
        run.rounding = rounding
    return alignment(images, prompts)


def test_an_error_of_one_process_between_collectives_reaches_the_others(on_two_processes):
    two = on_two_processes["alone"]
    assert "Tried to allocate 3.00 GiB" in two.told_by_the_second()
    assert checkpoint.read_state(two.folder)["epoch"] == 0


def exhausting_with_a_slow_disk(images, prompts):
    """The same, and the first process takes some seconds to save."""
    save = checkpoint.save
    if not hasattr(exhausting, "calls"):
        checkpoint.save = lambda *arguments: (time.sleep(3), save(*arguments))
    return exhausting(images, prompts)


def test_torchrun_does_not_end_the_process_that_saves(model_folder, tmp_path):
    flags = ["--epochs", "3", "--eval_prompts", "", "--save_every", "100", "--reward", "test_train:exhausting_with_a_slow_disk"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    command += arguments(model_folder, tmp_path / "run", *flags)
    done = subprocess.run(command, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert len([line for line in done.stderr.splitlines() if "error in process 1 on" in line]) == 1
    assert "stopped after epoch 1 of 3; the same command goes on" in done.stderr
    assert checkpoint.read_state(tmp_path / "run")["epoch"] == 1


@pytest.mark.parametrize("flags, passes, saved", [
    ("--updates_per_epoch 2", 2, True),  # the first update of the second epoch has not been made
    ("--updates_per_epoch 2", 3, False),  # it has been, and the weights are no epoch's
    ("--method ddpo --updates_per_epoch 2", 2, False),  # DDPO has remembered rewards of the second epoch
])  # fmt: skip
def test_what_an_update_has_begun_to_change_is_not_saved(flags, passes, saved, capsys, model_folder, tmp_path, monkeypatch):
    usual, left = train.backward_through_table, [None] * passes

    def backward_through_table(*arguments):
        if not left:
            raise torch.OutOfMemoryError("CUDA out of memory")
        left.pop()
        return usual(*arguments)

    monkeypatch.setattr(train, "backward_through_table", backward_through_table)
    argv = arguments(model_folder, tmp_path / "run", "--epochs", "3", "--eval_prompts", "", "--save_every", "100", *flags.split())
    assert "CUDA out of memory: lower --train_batch_size" in refused(capsys, argv)
    assert [checkpoint.epoch_of(folder) for folder in checkpoint.all_checkpoints(tmp_path / "run")] == [1] * saved


def test_fewer_prompts_and_trajectories_than_processes_could_share_evenly(on_two_processes, model_folder, tmp_path):
    two = on_two_processes["few"]
    assert two.codes == [0, 0], two.errors
    train.main(few(model_folder, tmp_path / "one"))
    for one, other in zip(metrics(tmp_path / "one"), metrics(two.folder), strict=True):
        assert one["eval_reward"] == pytest.approx(other["eval_reward"], abs=1e-5)
    assert one["reward_mean"] == pytest.approx(other["reward_mean"], abs=1e-5)
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    pictures = [plt.imread(folder / "samples" / "epoch_000001.png") for folder in (tmp_path / "one", two.folder)]
    assert abs(pictures[0] - pictures[1]).max() < 0.02


def slow_reward(images, prompts):
    """The toy reward, at a speed at which Ctrl-C can be aimed."""
    time.sleep(0.3)
    return alignment(images, prompts)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_the_same_command_goes_on(number, code, model_folder, tmp_path, capsys):
    run = tmp_path / "stopped"
    flags = ["--reward", "test_train:slow_reward", "--sample_batch_size", "4", "--eval_prompts", "", "--save_every", "1000"]
    # What was started in the background ignores Ctrl-C, and so would its children.
    ctrl_c_works = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        [sys.executable, "train.py", *arguments(model_folder, run, "--epochs", "1000", *flags)],
        cwd=ROOT, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=ctrl_c_works,
    )  # fmt: skip
    deadline = time.time() + 120
    while not ((run / "metrics.jsonl").exists() and len(metrics(run)) > 1) and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in errors, errors[-2000:]
    epochs = len(metrics(run)) - 1
    assert f"stopped after epoch {epochs} of 1000; the same command goes on" in errors
    assert checkpoint.read_state(run)["epoch"] == epochs >= 1
    sys.path.append(str(ROOT / "tests"))
    train.main(arguments(model_folder, run, "--epochs", str(epochs + 1), *flags))
    assert f"{run} goes on from epoch_{epochs:06d}" in capsys.readouterr().err
    assert [line["epoch"] for line in metrics(run)] == list(range(epochs + 2))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_wait_for_the_end_of_the_updates(number):
    """And a second one, in whatever the first has begun, changes nothing."""
    usual, done = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)], []
    with processes.handled_by(processes.interrupt):
        with pytest.raises(KeyboardInterrupt) as stopped, processes.uninterrupted():
            os.kill(os.getpid(), number)
            done.append("updates")
        os.kill(os.getpid(), number)
        done.append("save")
    assert done == ["updates", "save"] and stopped.value.args == (number,)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == usual


def test_epoch_of_equal_rewards_changes_nothing_but_the_decay(model_folder, tmp_path):
    (tmp_path / "flat.py").write_text("import torch\ndef flat(images, prompts):\n    return torch.ones(len(images))\n")
    sys.path.append(str(tmp_path))
    run = tmp_path / "run"
    flags = ["--epochs", "1", "--eval_prompts", "", "--reward", "flat:flat", "--weight_decay", "0"]
    train.main(arguments(model_folder, run, *flags))
    before = load_file(model_folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert metrics(run)[1]["loss"] == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(run).items())


def test_autocast_trains_and_reports_its_drift(model_folder, tmp_path):
    run = tmp_path / "run"
    flags = ["--epochs", "1", "--eval_prompts", "", "--autocast", "bf16", "--train_batch_size", "7"]
    train.main(arguments(model_folder, run, *flags))
    assert 0 <= metrics(run)[1]["log_prob_drift"] < 0.05
    assert metrics(run)[1]["grad_norm"] > 0
    assert all(tensor.dtype == torch.float32 for tensor in weights(run).values())


def test_batch_arithmetic_is_printed_and_right(capsys, model_folder, tmp_path):
    train.main(arguments(model_folder, tmp_path / "run", "--epochs", "1", "--eval_prompts", ""))
    printed = capsys.readouterr().err
    assert "4 of 45 prompts x 3 images = 12 trajectories x 4 steps = 48 log-probs" in printed
    assert "4 prompts x 3 = 12 pairs" in printed
    assert "48 log-probs each = 0 micro-batches of 64 and one of 48" in printed
    assert "clip_range 0.003 is 2.3 nats a step" in printed


def refused(capsys, argv) -> str:
    """Runs train.py on wrong input: exit code 2 and one line, which is returned."""
    with pytest.raises(SystemExit) as stopped:
        train.main([str(argument) for argument in argv])
    assert stopped.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1 and "Traceback" not in errors[0]
    return errors[0]


def test_wrong_settings(capsys, tmp_path, model_folder, monkeypatch):
    base = arguments(model_folder, tmp_path / "run", "--epochs", "1")
    monkeypatch.setitem(sys.modules, "wandb", None)
    (tmp_path / "torn_reward.py").write_text("def f(images, prompts:\n")
    monkeypatch.syspath_prepend(tmp_path)
    for more, message in [
        (["--preset", "tpy"], "unknown preset 'tpy': use small-hpsv2"),
        (["--lora_rank", "-1"], "lora_rank must be at least 0"),
        (["--lora_rank", "4", "--reference_on_cpu"], "there is no second UNet"),
        (["--reward_weights", "hps=x", "--reward", "hpsv2"], "use NAME=PATH with a name of hpsv2"),
        (["--log_to", "wandb"], "needs a package: pip install wandb"),
        (["--rewrad", "x"], "did you mean --reward?"),
        (["--epochs", "many"], "invalid int value: 'many'"),
        (["--log_prob_reduction", "max"], "choose from"),
        (["--reward", "niceness"], "unknown reward 'niceness': use jpeg-compressibility"),
        (["--reward", "toy-alignment=much"], "'much' is not a number"),
        (["--reward", "no_module:f"], "No module named 'no_module'"),
        (["--reward", "math:nothing"], "no attribute 'nothing'"),
        (["--reward", "math:pi"], "not a function"),
        (["--reward", "torn_reward:f"], "reward 'torn_reward:f': SyntaxError: "),
        (["--reward_weights", "nope=FILE"], "reward weights 'nope=FILE': use NAME=PATH with a name of hpsv2"),
        (["--eta", "3"], "asks for more noise than a step of this schedule leaves"),
        (["--save_minutes", "-1"], "save_minutes must be at least 0"),
        (["--method", "magic"], "invalid choice: 'magic' (choose from"),
        (["--method", "d3po"], "use --shared_x_T and an even --images_per_prompt"),
        (["--method", "d3po", "--shared_x_T"], "use --shared_x_T and an even --images_per_prompt"),
        (
            ["--method", "d3po", "--shared_x_T", "--images_per_prompt", "2", "--clip_range", "1"],
            "clip_range must be below 1 for d3po",
        ),
        (["--method", "ddpo", "--score_function"], "score_function is for updates_per_epoch=1, not 3"),
        (["--reference_steps", "2"], "--updates_per_epoch 1 (the maximum of Eq. 18 makes"),
        (["--updates_per_epoch", "1", "--method", "ddpo", "--reference_steps", "2"], "reference_steps is for --method prdp"),
        (["--updates_per_epoch", "1", "--reference_steps", "99"], "reference_steps must be between 0 and num_steps="),
        (["--method", "ddpo", "--offline"], "offline: ddpo is for pictures that theta_old has drawn"),
        (["--method", "ddpo", "--updates_per_epoch", "13"], "updates_per_epoch=13: ddpo has only 12 disjoint parts of an epoch"),
        (["--method", "dpok", "--reference_on_cpu"], "reference_on_cpu: dpok asks the reference at every step"),
        (["--method", "grpo", "--images_per_prompt", "1"], "images_per_prompt must be at least 2"),
        (["--method", "grpo", "--kl_weight", "-1"], "kl_weight must be a positive number, not -1.0"),
        (["--method", "grpo", "--offline"], "offline: grpo is for pictures that theta_old has drawn"),
        (["--method", "grpo", "--updates_per_epoch", "13"], "updates_per_epoch=13: grpo has only 12 disjoint parts of an epoch"),
        (["--method", "grpo", "--reference_on_cpu"], "reference_on_cpu: grpo asks the reference at every step"),
        (["--method", "ddpo", "--statistics_size", "0"], "statistics_size must be at least 1, not 0"),
        (["--method", "ddpo", "--advantage_limit", "0"], "advantage_limit must be a positive number, not 0.0"),
        (["--reward_statistics", "none"], "invalid choice: 'none' (choose from"),
        (["--model", str(tmp_path)], "cannot load a pipeline from the folder"),
        (["--model", "/no/such/model"], "no model '/no/such/model': use toy"),
        (["--prompts", "no-such.txt"], "no prompt set or file 'no-such.txt': use animals"),
        (["--images_per_prompt", "1"], "images_per_prompt must be at least 2"),
        (["--eta", "0"], "eta must be > 0"),
        (["--num_steps", "1001"], "between 1 and 1000"),
        (["--num_steps", "0"], "num_steps must be at least 1"),
        (["--kl_weight", "0"], "kl_weight must be a positive number"),
        (["--learning_rate", "nan"], "learning_rate must be a positive number"),
        (["--seed", "-1"], "seed must be at least 0"),
    ]:
        assert message in refused(capsys, [*base, *more]), more
    monkeypatch.setattr(train, "WORLD_SIZE", 13)
    assert "prompts_per_epoch=4 x images_per_prompt=3 are fewer trajectories than the 13 processes" in refused(capsys, base)


def test_wrong_prompt_files(capsys, tmp_path, model_folder):
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    for name, message in (("empty.txt", "has no prompts"), ("latin.txt", "utf-8")):
        assert message in refused(capsys, [*arguments(model_folder, tmp_path / "run"), "--prompts", tmp_path / name])


def test_failing_rewards_lose_nothing(capsys, tmp_path, model_folder):
    (tmp_path / "bad_rewards.py").write_text(
        "import torch\ncalls = 0\n"
        "def broken(images, prompts):\n    return 1 / 0\n"
        "def short(images, prompts):\n    return torch.ones(1)\n"
        "def late_nan(images, prompts):\n    global calls\n    calls += 1\n"
        "    scores = torch.rand(len(prompts))\n    scores[-1] = float('nan') if calls > 3 else 0\n    return scores\n"
    )
    sys.path.append(str(tmp_path))
    for name, message in (("broken", "raised ZeroDivisionError"), ("short", "returned shape (1,)"), ("late_nan", "returned nan")):
        run = tmp_path / name
        flags = ["--reward", f"bad_rewards:{name}", "--epochs", "9", "--eval_prompts", "", "--save_every", "100"]
        line = refused(capsys, arguments(model_folder, run, *flags))
        assert message in line and f"bad_rewards:{name}" in line and "background'" in line  # the reward and the prompt
    assert checkpoint.read_state(tmp_path / "late_nan")["epoch"] == len(metrics(tmp_path / "late_nan")) - 1 >= 1


def test_non_finite_loss_stops(capsys, tmp_path, model_folder):
    flags = ["--eval_prompts", "", "--kl_weight", "1e-30"]
    assert "gradient norm inf in epoch 1" in refused(capsys, arguments(model_folder, tmp_path / "run", *flags))


def test_wrong_checkpoints(capsys, tmp_path, model_folder, finished, monkeypatch):
    assert "no checkpoint under" in refused(capsys, ["--resume", tmp_path / "nowhere"])
    assert "cannot resume" in refused(capsys, ["--resume", finished, "--learning_rate", "1"])
    line = refused(capsys, arguments(model_folder, finished, "--learning_rate", "1"))
    assert f"{finished} already holds a run, choose another --output_dir to begin one: learning_rate=1.0" in line

    def copied(name):
        run = shutil.copytree(finished, tmp_path / name)
        return run, checkpoint.all_checkpoints(run)[-1]

    with monkeypatch.context() as patch:
        patch.setattr(processes, "all_succeed", lambda produce: [produce(), ""])
        line = refused(capsys, ["--resume", copied("other")[0], "--epochs", "3"])
        assert "holds a run for some processes and none for others" in line

    run, folder = copied("damaged")
    whole = (folder / "weights.safetensors").read_bytes()
    (folder / "weights.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "damaged checkpoint" in refused(capsys, ["--resume", run, "--epochs", "3"])
    (folder / "weights.safetensors").unlink()
    assert "damaged checkpoint" in refused(capsys, ["--resume", run, "--epochs", "3"])
    (folder / "state.json").write_text('{"epoch": ')
    assert "damaged checkpoint" in refused(capsys, ["--resume", run, "--epochs", "3"])

    run, folder = copied("foreign")
    state = json.loads((folder / "state.json").read_text())
    state["config"]["model"] = str(other_model(tmp_path))
    (folder / "state.json").write_text(json.dumps(state))
    checkpoint.write_sums(folder)
    assert "foreign checkpoint" in refused(capsys, ["--resume", run, "--epochs", "3"])


@pytest.mark.parametrize(
    "name, flipped",
    [("weights.safetensors", None), ("state.safetensors", None), ("state.json", b"0.0001"), ("state.json", b'"seed": 0')],
)
def test_the_checkpoint_before_serves_where_the_newest_is_damaged(name, flipped, finished, model_folder, tmp_path, capsys):
    run = tmp_path / "flipped"
    train.main(arguments(model_folder, run, "--epochs", "2", "--save_every", "1"))
    first, newest = checkpoint.all_checkpoints(run)
    file = newest / name
    content = bytearray(file.read_bytes())
    content[content.rindex(flipped) + len(flipped) - 1 if flipped else -1] ^= 1  # of the optimiser's settings, and of the run's
    file.write_bytes(content)
    train.main(arguments(model_folder, run, "--epochs", "2"))
    said = capsys.readouterr().err
    assert f"damaged checkpoint {newest}: {name} is not what was written" in said
    assert f"the one before serves\n{run} goes on from {first.name}" in said
    assert metrics(run) == metrics(finished)
    assert all(torch.equal(tensor, weights(finished)[name]) for name, tensor in weights(run).items())
    assert checkpoint.all_checkpoints(run) == [first, newest] and not list(run.glob("checkpoints/*.damaged"))


def test_an_evaluation_that_was_stopped_is_made_when_the_run_goes_on(finished, model_folder, tmp_path, monkeypatch):
    """Its epoch has been saved before; it is evaluated first, by the same weights."""
    run, flags = tmp_path / "run", ["--epochs", "2", "--eval_every", "1"]
    with monkeypatch.context() as patch:
        evaluate = train.Run.all_evaluate
        patch.setattr(train.Run, "all_evaluate", lambda self: evaluate(self) if self.completed == 0 else signal.raise_signal(15))
        with pytest.raises(KeyboardInterrupt) as stopped:
            train.main(arguments(model_folder, run, *flags))
    assert (
        stopped.value.args == (signal.SIGTERM,)
        and checkpoint.read_state(run)["epoch"] == 1
        and metrics(run)[1]["eval_reward"] is None
    )
    train.main(arguments(model_folder, run, *flags))
    train.main(arguments(model_folder, tmp_path / "uninterrupted", *flags))
    assert metrics(run) == metrics(tmp_path / "uninterrupted") and metrics(run)[1]["eval_reward"] is not None


def test_another_number_of_processes_is_told_of(finished, model_folder, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "of_two")
    state = checkpoint.all_checkpoints(run)[-1] / "state.json"
    state.write_text(state.read_text().replace('"processes": 1', '"processes": 2'))
    checkpoint.write_sums(state.parent)
    train.main(arguments(model_folder, run, "--epochs", "2"))
    said = capsys.readouterr().err
    assert "saved by 2 processes, continued by 1" in said and "up to rounding, not bit for bit" in said
    train.main(arguments(model_folder, finished, "--epochs", "2"))
    assert "processes, continued by" not in capsys.readouterr().err


def test_a_full_disk_leaves_the_last_checkpoint(finished, model_folder, tmp_path, capsys, monkeypatch):
    run = shutil.copytree(finished, tmp_path / "full")
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*.*")}
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
        line = refused(capsys, arguments(model_folder, run, "--epochs", "3"))
    assert f"the disk of {run} has 0.00" in line and "two that are kept and one being written" in line

    def full(tensors, path):
        path.write_bytes(b"a part")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        line = refused(capsys, arguments(model_folder, run, "--epochs", "3"))
    assert "No space left on device" in line and f"{run / 'checkpoints' / 'epoch_000002'} is whole" in line
    assert {path: path.read_bytes() for path in (run / "checkpoints").rglob("*.*")} == before

    def full_too(self):
        if self.completed == 3:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:  # the record fails first, and then the save of what it stopped
        patch.setattr(checkpoint, "save_file", full)
        patch.setattr(train.Run, "write_metrics", full_too)
        line = refused(capsys, arguments(model_folder, run, "--epochs", "3"))
    assert "cannot save a checkpoint" in line and f"{run / 'checkpoints' / 'epoch_000002'} is whole" in line


def test_a_full_disk_at_the_end_leaves_the_last_checkpoint(model_folder, tmp_path, capsys, monkeypatch):
    argv = arguments(model_folder, tmp_path / "run", "--epochs", "1", "--eval_prompts", "")

    def full(*arguments):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(trainable, "save_pipeline", full)
        line = refused(capsys, argv)
    assert "cannot save the result: I/O error: No space left" in line and "epoch_000001 is whole, and the same command" in line
    train.main(argv)
    assert weights(tmp_path / "run")


def test_minutes_bound_what_a_kill_can_lose(model_folder, tmp_path, monkeypatch):
    saved, save = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda run, epoch, *rest: saved.append(epoch) or save(run, epoch, *rest))
    flags = ["--updates_per_epoch", "1", "--epochs", "3", "--save_every", "100", "--eval_prompts", ""]
    for minutes, expected in (("1e-9", [1, 2, 3]), ("60", [3]), ("0", [3])):
        saved.clear()
        train.main(arguments(model_folder, tmp_path / minutes, *flags, "--save_minutes", minutes))
        assert saved == expected, minutes

    def slow(self):  # an evaluation of two hours, after the first epoch
        self.saved_at -= 7200 if self.completed == 1 else 0
        return {"eval_reward": 0.0}

    saved.clear()
    monkeypatch.setattr(train.Run, "all_evaluate", slow)
    flags = ["--updates_per_epoch", "1", "--epochs", "3", "--save_every", "100", "--eval_every", "1"]
    train.main(arguments(model_folder, tmp_path / "evaluated", *flags))
    assert saved == [1, 3]


def other_model(tmp_path) -> Path:
    """A pipeline with wider layers."""
    folder = tmp_path / "other"
    build.initial_pipeline(channels=(16, 16), width=16).save_pretrained(folder)
    return folder


def test_unwritable_output_folder(capsys, tmp_path, model_folder):
    (tmp_path / "file").write_text("not a folder")
    line = refused(capsys, [*SEVERAL_UPDATES, "--model", model_folder, "--output_dir", tmp_path / "file" / "run"])
    assert "Not a directory" in line and "file" in line
