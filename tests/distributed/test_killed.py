"""Two processes that are killed at random moments and resumed each time end where an uninterrupted run does."""

import importlib.util
import random
import time

import pytest

from hf_lookbehind.trainer.resume import last_complete_checkpoint
from tests.distributed import fsdp_workers, zero
from tests.models import max_difference
from tests.processes import TIMEOUT, run_group, start_group

KILLS, STEPS = 10, 40

pytestmark = pytest.mark.slow


def test_ten_kills_under_fsdp2_leave_no_trace(tmp_path):
    _assert_no_trace(fsdp_workers.to_the_end, tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="`make test-deepspeed` has DeepSpeed")
def test_ten_kills_under_zero_3_leave_no_trace(tmp_path):
    _assert_no_trace(zero.to_the_end, tmp_path)


def _assert_no_trace(to_the_end, folder):
    """`to_the_end(folder, steps)` trains from the last complete checkpoint; gives the weights and the steps done."""
    expected = run_group(to_the_end, folder / "whole", STEPS)
    step = (time.time() - (folder / "whole" / "begun-0").stat().st_mtime) / STEPS
    folder, draw, reached = folder / "killed", random.Random(0), []
    folder.mkdir()
    for _ in range(KILLS):
        assert _killed_after(to_the_end, folder, draw.uniform(0, 2 * step)) == [-9, -9]
        reached.append(last_complete_checkpoint(folder))
    assert len(set(reached)) > 3, reached
    for (weights, done), (whole, _) in zip(run_group(to_the_end, folder, STEPS), expected, strict=True):
        assert done == STEPS
        assert max_difference(weights, whole) == 0.0


def _killed_after(to_the_end, folder, seconds):
    """Kill both processes so long after their training has begun."""
    begun = [folder / f"begun-{rank}" for rank in range(2)]
    for path in begun:
        path.unlink(missing_ok=True)
    children, deadline = start_group(to_the_end, folder, STEPS), time.monotonic() + TIMEOUT
    while not all(path.exists() for path in begun):
        assert time.monotonic() < deadline and all(child.is_alive() for child in children)
        time.sleep(0.01)
    time.sleep(seconds)
    for child in children:
        child.kill()
    for child in children:
        child.join()
    return [child.exitcode for child in children]
