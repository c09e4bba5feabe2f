"""The job of the guide runs under bash, with stand-ins for SLURM's commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import toy
from documents import blocks

from gdetkd_cli.engine.run_folder import RunFolder
from gdetkd_cli.recipe.load import dump_recipe


def test_the_job_writes_a_checkpoint_and_goes_back_into_the_queue(tmp_path: Path) -> None:
    ((_, script),) = [block for block in blocks("bash") if "#SBATCH" in block[1]]
    (tmp_path / "job.sh").write_text(script)
    (tmp_path / "my.yaml").write_text(dump_recipe(toy.recipe(steps=5000, checkpoint_every=5000)))
    commands = {
        "srun": 'exec "$@"',
        "scontrol": 'case "$1" in requeue) echo "$2" >> requeued;; *) echo 127.0.0.1;; esac',
        "torchrun": f'exec "{sys.executable}" -m torch.distributed.run --local-addr 127.0.0.1 "$@"',
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    given = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "node1"}
    environment = os.environ | given | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    run, log = RunFolder(tmp_path / "runs" / "student"), tmp_path / "log"
    with log.open("w") as output:
        job = subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=environment, stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + 200
            while not run.metrics_log.exists():
                assert job.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.01)
        finally:
            job.send_signal(signal.SIGUSR1)
            job.wait(timeout=300)
    (step,) = run.checkpoints().list_steps()
    assert f"stopped by SIGUSR1 after step {step}" in log.read_text()
    assert [line["step"] for line in run.read_log()] == list(range(1, step + 1))
    assert (tmp_path / "requeued").read_text() == "7\n"
