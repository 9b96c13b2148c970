"""The slot of the GPU, on a real Prefect server."""

import os
import subprocess
import sys

HOLD = """
import torch
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate

from flows.alignment import gpu

gpu.training_device = lambda: torch.device("cuda")
with get_client(sync_client=True) as client:
    def taken():
        return client.read_global_concurrency_limit_by_name("gpu").active_slots

    with gpu.gpu_slot("rl", True):
        print("no limit")
    client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name="gpu", limit=1))
    for step, fresh in (("rl", True), ("rl", False), ("register", True)):
        with gpu.gpu_slot(step, fresh):
            print(step, fresh, taken())
    print("after", taken())
    gpu.is_own = lambda: True
    with gpu.gpu_slot("rl", True):
        print("server of the runs", taken())
"""


def test_a_step_that_computes_on_the_gpu_holds_its_slot(prefect_api):
    done = subprocess.run(
        [sys.executable, "-c", HOLD],
        env={**os.environ, "PREFECT_API_URL": prefect_api},
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "no limit",
        "rl True 1",
        "rl False 0",
        "register True 0",
        "after 0",
        "server of the runs 0",
    ]
