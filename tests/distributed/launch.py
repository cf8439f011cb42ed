"""Programs under real launchers: none of their processes outlives a test."""

import contextlib
import os
import re
import runpy
import shlex
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

from tests.processes import TIMEOUT, start_group

DOCS = Path(__file__).parents[2] / "docs"

# For the image program: a few exact steps whose batches are all full.
EXACT = (
    "--dtype float64 --max_steps 4 --max_train_samples 96 --train_val_split 0 --save_strategy no --disable_tqdm true"
).split()


def blocks(page, language):
    """The code blocks of a page of the documentation in one language."""
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def documented_commands(page):
    """Those that start processes."""
    commands = [shlex.split(block.replace("\\\n", " ")) for block in blocks(page, "bash")]
    return [command for command in commands if command[0] in ("torchrun", "accelerate")]


def run(commands, **environment):
    """Run commands side by side, `{folder: command}`, each in its folder. All must end well, and in time."""
    environment = os.environ | {
        # the launchers and the program that stand beside this Python
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
    } | environment  # fmt: skip
    started = {}
    try:
        for folder, command in commands.items():
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "log.txt", "w") as log:
                started[folder] = subprocess.Popen(
                    command, cwd=folder, env=environment | {"HF_HOME": str(folder / "hf")}, stdout=log, stderr=log
                )
        wait_for(started.values())
    finally:
        for process in started.values():
            process.terminate()  # those that still run: a launcher ends its processes, then itself
        for process in started.values():
            process.wait(60)
    for folder, process in started.items():
        assert process.returncode == 0, (folder / "log.txt").read_text()


def wait_for(processes):
    deadline = time.monotonic() + TIMEOUT
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0, deadline - time.monotonic()))


def run_script(script, folder, *flags, world=1):
    """A script in `world` processes as torchrun would start them; without its seconds of imports."""
    folder.mkdir()
    codes = exit_codes(start_group(_as_main, str(script), str(folder), flags, world=world))
    assert codes == [0] * world, f"exit codes {codes}"


def _as_main(script, folder, flags):
    os.chdir(folder)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")
    os._exit(0)


def exit_codes(children, timeout=TIMEOUT):
    """Of children that are given `timeout` seconds together; None for those that had to be killed then."""
    deadline = time.monotonic() + timeout
    for child in children:
        child.join(max(0, deadline - time.monotonic()))
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
        child.join()
    return codes


def one_process(folder):
    """Weights after the documented training, as one process with the same global batch."""
    from hf_lookbehind.scripts import run_image_classification  # seconds of imports, which children need not wait for

    torchrun = documented_commands("distributed.md")[0]
    flags = [*torchrun[torchrun.index("--dataset_name") :], *EXACT, "--per_device_train_batch_size", "32"]
    run_image_classification.train([*flags, "--output_dir", str(folder)])
    return load_file(folder / "model.safetensors")
