"""Run the tests in the versions that people have, and write down what passed.

    python scripts/versions                    # all rows of rows.yaml; or: make test-versions
    python scripts/versions "Python 3.13"      # some of them; or: make test-versions ROWS='"Python 3.13"'

Each row is written to results.json as soon as it is done, and the table in docs/versions.md from all of them. The
environments are made in .venv/versions/ and removed again: some take 5 GB. Exit code 1 where a test failed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import yaml

from hf_lookbehind.report import format_table

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.json"
PAGE = ROOT / "docs" / "versions.md"
WORK = ROOT / ".venv" / "versions"

UV = [sys.executable, "-m", "uv", "pip"]  # quicker than pip by minutes where packages are large
SHOWN = ("torch", "transformers", "accelerate", "huggingface_hub", "datasets", "peft")
# What depends on these packages: the core, the Trainer, resume, precision, several processes.
TRAINER = [f"tests/trainer/test_{name}.py" for name in ("against_plain", "intact", "resume", "weights", "precision",
                                                      "side_effects")]  # fmt: skip
TESTS = ["tests/test_config.py", "tests/tensors", "tests/optim", *TRAINER, "tests/distributed/test_ddp.py",
         "tests/distributed/test_fsdp.py"]  # fmt: skip
TRAINING = [
    "image-classification", "--dataset_name", "digits", "--max_train_samples", "64", "--max_steps", "3", "--report_to",
    "none", "--output_dir",
]  # fmt: skip
VERSIONS = """
import importlib.metadata, json, platform, sys
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try: found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: pass
print(json.dumps(found))
"""


def run(command: list[Any], **environment: str) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(
        [*map(str, command)], env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT
    )
    return done.stdout


# ---- environments: the Python to run, and the path it is given ----


def make(row: Mapping[str, Any], folder: Path) -> tuple[Path, dict[str, str], dict[str, list[str]]]:
    """The environment of a row: its Python, variables, and what installing the wheel has changed in it."""
    if "overlay" in row:
        run([*UV, "install", "--quiet", "--python", sys.executable, "--no-deps", "--target", folder, *row["overlay"]])
        return Path(sys.executable), {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}, {}
    run([f"python{row['python']}" if "python" in row else sys.executable, "-m", "venv", folder])
    python = folder / "bin" / "python"
    pip = [*UV, "install", "--quiet", "--python", python]
    if row.get("lowest"):
        bounds = folder / "lowest.txt"
        resolve = [*UV, "compile", "--quiet", "--resolution", "lowest-direct", "--extra", "peft", "--python", python]
        run([*resolve, "--output-file", bounds, "pyproject.toml"])
        run([*pip, "-r", bounds])
    else:
        run([*pip, *row["packages"]])
    before = installed(python)
    run([*pip, ROOT])
    after = installed(python)
    changed = {name: [old, after.get(name, "")] for name, old in before.items() if after.get(name) != old}
    run([folder / "bin" / "hf-lookbehind", *TRAINING, folder / "trained"], **OFFLINE)
    # the tests are of this clone, and held to what there is
    kept = [f"{name}=={after[name]}" for name in ("torch", "transformers", "accelerate", "numpy")]
    run([*pip, *kept, "pytest", "pytest-xdist", f"--editable={ROOT}[lookahead,peft]"])
    return python, {}, changed


def installed(python: Path) -> dict[str, str]:
    return {p["name"]: p["version"] for p in json.loads(run([*UV, "list", "--python", python, "--format", "json"]))}


# ---- tests ----

OFFLINE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def measure(row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What the tests say in the environment of a row."""
    python, path, changed = make(row, folder)
    environment = os.environ | OFFLINE | path
    report, start = folder / "report.xml", time.monotonic()
    command = [python, "-m", "pytest", "-q", "-n", "2", "-m", "not slow", f"--junitxml={report}", *TESTS]
    done = subprocess.run([*map(str, command)], env=environment, check=False, cwd=ROOT)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ran no tests: it ended with {done.returncode}")
    result = {"versions": json.loads(run([python, "-c", VERSIONS, *SHOWN], **path)), **count(report)}
    if "overlay" not in row:
        result["replaced"] = changed
    return result | {"minutes": round((time.monotonic() - start) / 60, 1)}


def count(report: Path) -> dict[str, Any]:
    """Tests that passed, failed, and were skipped, these with the reason, in a report of pytest's."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [f"{case.get('classname')}::{case.get('name')}" for case in cases
              if case.find("failure") is not None or case.find("error") is not None]  # fmt: skip
    skipped = Counter(skip.get("message", "") for case in cases if (skip := case.find("skipped")) is not None)
    return {"passed": len(cases) - len(failed) - skipped.total(), "failed": failed, "skipped": dict(skipped)}


# ---- the page ----


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    rows = []
    for name, result in results.items():
        skipped = sum(result["skipped"].values())
        versions = {"python": "", **dict.fromkeys(SHOWN, ""), **result["versions"]}
        tests = {"passed": str(result["passed"]), "failed": str(len(result["failed"])), "skipped": str(skipped)}
        rows.append({"row": name, **versions, **tests})
    names = {column: column for column in rows[0]} | {"row": "tests in"}
    return format_table(rows, names)


def write_page(results: Mapping[str, Any], page: Path = PAGE) -> None:
    """Put the table between its two marks."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition("<!-- rows -->\n")
    after = rest.partition("<!-- end of rows -->")[2]
    page.write_text(f"{before}<!-- rows -->\n{table(results)}\n<!-- end of rows -->{after}", encoding="utf-8")


def main() -> int:
    rows = yaml.safe_load((HERE / "rows.yaml").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(map(repr, rows))}; default: all")
    names = parser.parse_args().rows or list(rows)
    for name in names:
        if name not in rows:
            parser.error(f"ROW {name!r} is not allowed: one of {', '.join(map(repr, rows))}")
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for name in names:
        folder = WORK / name.replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        try:
            results[name] = measure(rows[name], folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        results = {name: results[name] for name in rows if name in results}
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        write_page(results)
    return int(any(results[name]["failed"] for name in names))


if __name__ == "__main__":
    sys.exit(main())
