"""Two processes under FSDP2, killed at random moments and resumed each time, end where an uninterrupted run does."""

import random
import time

import pytest

from hf_lookbehind.trainer.resume import last_complete_checkpoint
from tests.distributed import fsdp_workers as workers
from tests.models import max_difference
from tests.processes import TIMEOUT, run_group, start_group

KILLS = 10


def killed_after(folder, seconds):
    """Kill both processes so long after their training has begun."""
    begun = [folder / f"begun-{rank}" for rank in range(2)]
    for path in begun:
        path.unlink(missing_ok=True)
    children, deadline = start_group(workers.to_the_end, folder), time.monotonic() + TIMEOUT
    while not all(path.exists() for path in begun):
        assert time.monotonic() < deadline and all(child.is_alive() for child in children)
        time.sleep(0.01)
    time.sleep(seconds)
    for child in children:
        child.kill()
    for child in children:
        child.join()
    return [child.exitcode for child in children]


@pytest.mark.slow
def test_ten_kills_leave_no_trace(tmp_path):
    began = time.monotonic()
    expected = run_group(workers.to_the_end, tmp_path / "whole")
    step = (time.monotonic() - began) / workers.KILLED["max_steps"]
    folder, draw, reached = tmp_path / "killed", random.Random(0), []
    folder.mkdir()
    for _ in range(KILLS):
        assert killed_after(folder, draw.uniform(0, 3 * step)) == [-9, -9]
        reached.append(last_complete_checkpoint(folder))
    assert len(set(reached)) > 3, reached
    for (weights, steps), (whole, _) in zip(run_group(workers.to_the_end, folder), expected, strict=True):
        assert steps == workers.KILLED["max_steps"]
        assert max_difference(weights, whole) == 0.0
