"""The campaign of kills counts what it interrupts, and sees a run that does not go on as it should."""

import json

import pytest

from benchmarks import faults

RUN = """
import json, sys, time
from pathlib import Path
run, epochs = Path(sys.argv[-1]), 5
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
for old in (run / "checkpoints").glob("*.unfinished"):
    old.rmdir()
done = len(list((run / "checkpoints").glob("epoch_*")))
lines = [{"epoch": 0, "eval_reward": 0.0}]
lines += [{"epoch": epoch, "eval_reward": FORGETS} for epoch in range(1, done + 1)]
record = run / "metrics.jsonl"
def write():
    (run / "new").write_text("".join(json.dumps(line) + "\\n" for line in lines))
    (run / "new").replace(record)
write()
for epoch in range(done + 1, epochs + 1):
    time.sleep(0.02)
    lines.append({"epoch": epoch, "eval_reward": None})
    write()
    save = run / "checkpoints" / f"epoch_{epoch:06d}.unfinished"
    save.mkdir()
    time.sleep(0.2)
    save.rename(save.with_suffix(""))
    time.sleep(0.35)
    lines[-1]["eval_reward"] = 1.0 * epoch
    write()
weights = run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
weights.parent.mkdir(parents=True)
weights.write_bytes(b"the end")
"""


@pytest.mark.parametrize("forgets, equal", [("1.0 * epoch", True), ("2.0 * epoch", False)])
def test_kills_are_counted_where_they_fell_and_results_compared(forgets, equal, tmp_path, monkeypatch, capsys):
    (tmp_path / "run.py").write_text(RUN.replace("FORGETS", forgets))
    monkeypatch.setattr(faults, "SCENES", {"a run": str(tmp_path / "run.py")})
    argv = ["--kills", "5", "--folder", str(tmp_path / "runs"), "--output", str(tmp_path / "faults.json")]
    if equal:
        faults.main(argv)
    else:
        with pytest.raises(SystemExit, match="has ended otherwise"):
            faults.main(argv)
    count = json.loads((tmp_path / "faults.json").read_text())["results"]["a run"]
    assert count["kills"] == count["save"] + count["evaluation"] + count["neither"] == 5
    assert count["save"] >= 1 and count["evaluation"] >= 1
    assert count["finished"] >= 1 and count["equal"] == (count["finished"] if equal else 0)
    assert "| a run | 5 |" in capsys.readouterr().out


def test_a_run_that_fails_by_itself_is_no_kill(tmp_path, monkeypatch, capsys):
    (tmp_path / "run.py").write_text("raise SystemExit('it does not begin')")
    monkeypatch.setattr(faults, "SCENES", {"a run": str(tmp_path / "run.py")})
    with pytest.raises(SystemExit) as stopped:
        faults.main(["--kills", "1", "--folder", str(tmp_path / "runs"), "--output", str(tmp_path / "faults.json")])
    assert stopped.value.code == 2 and "a run ended by itself with exit code 1: it does not begin" in capsys.readouterr().err
