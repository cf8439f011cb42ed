"""One process dies, fails or hangs in the middle of an iteration: the others end too, and nothing is lost."""

import signal
import time
from pathlib import Path

import pytest
import torch

from hf_lookbehind.trainer.resume import last_complete_checkpoint
from tests.distributed.failing import PASSES, SAVED, STEPS, fail, failing_run, hang, kill, whole_run
from tests.distributed.launch import exit_codes
from tests.models import max_difference
from tests.processes import run_group, start_group

# seconds: of the process group, and for the first process to end after the second has failed
TIMEOUT = 60


def run_until_failure(output_dir, failure, a_pass, timeout=TIMEOUT):
    """Exit codes of both processes, and the seconds from the failure of the second to the end of the first."""
    first, second = start_group(failing_run, output_dir, failure, a_pass, timeout)
    try:
        (code,) = exit_codes([first], timeout=3 * TIMEOUT)
        ended = time.time()
    finally:
        (other_code,) = exit_codes([second], timeout=0 if failure is hang else TIMEOUT)
    return (code, other_code), ended - float(Path(output_dir, "failed_at").read_text())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    weights, _ = run_group(whole_run, tmp_path_factory.mktemp("uninterrupted"))
    return weights


def assert_nothing_is_lost(output_dir, uninterrupted, survivors):
    for rank in survivors:
        left = torch.load(Path(output_dir, f"left-{rank}.pt"))
        assert max_difference(left, uninterrupted[SAVED]) == 0.0
    assert last_complete_checkpoint(output_dir) == str(output_dir / f"checkpoint-{SAVED}")
    for resumed in run_group(whole_run, output_dir, True):
        assert min(resumed) == SAVED + 1
        assert max_difference(resumed[STEPS], uninterrupted[STEPS]) == 0.0


@pytest.mark.parametrize("a_pass", [0, pytest.param(2, marks=pytest.mark.slow), PASSES - 1])
def test_a_killed_process_ends_the_other_and_the_run_resumes_exactly(tmp_path, uninterrupted, a_pass):
    codes, seconds = run_until_failure(tmp_path, kill, a_pass)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, None) and seconds < TIMEOUT
    assert_nothing_is_lost(tmp_path, uninterrupted, survivors=[0])


@pytest.mark.parametrize("a_pass", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_an_exception_in_one_process_ends_the_other_and_the_run_resumes_exactly(tmp_path, uninterrupted, a_pass):
    codes, seconds = run_until_failure(tmp_path, fail, a_pass)
    assert codes[1] not in (0, None)
    assert codes[0] not in (0, None) and seconds < TIMEOUT
    assert_nothing_is_lost(tmp_path, uninterrupted, survivors=[0, 1])


@pytest.mark.slow
def test_a_process_that_hangs_is_given_up_after_the_timeout(tmp_path, uninterrupted):
    codes, seconds = run_until_failure(tmp_path, hang, a_pass=2, timeout=15)
    assert codes[0] not in (0, None) and 14 <= seconds < TIMEOUT
    assert_nothing_is_lost(tmp_path, uninterrupted, survivors=[0])
