"""Run the GPU tests, then every kernel under compute-sanitizer; append the outcome to data/results/gpu_tests.jsonl."""

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from sat_lib.common import files
from sat_lib.common.device import pick_device, stamp

TOOLS = ("memcheck", "racecheck", "initcheck")


class Outcomes:
    """A pytest plugin that counts what became of the tests, and names those that failed."""

    def __init__(self):
        self.counts, self.failures = Counter(), []

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += report.when == "call" or report.outcome == "skipped" or report.failed
        if report.failed:
            self.failures.append(report.nodeid)
            print(f"\nFAILED {report.nodeid}", flush=True)  # now, in case the rest is cut off


def main() -> int:
    device = pick_device("cuda")
    outcomes, start = Outcomes(), time.perf_counter()
    status = pytest.main(["-q", "-m", "gpu", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[outcomes])
    result = dict(outcomes.counts) | {"failures": outcomes.failures}
    result |= {"seconds": round(time.perf_counter() - start), "pytest_status": int(status)}
    for tool in TOOLS:
        calls = str(Path(__file__).with_name("sanitizer_calls.py"))
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", sys.executable, calls]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if "SUMMARY" in line or line == "every kernel ran"]
        result[tool] = {"status": done.returncode, "said": lines}
        print(tool, result[tool], flush=True)
        if done.returncode:
            print(done.stdout[-3000:], done.stderr[-2000:], flush=True)
    row = {"experiment": "gpu_tests", "case": {"tests": "all marked gpu", "sanitizer": "tests/sanitizer_calls.py"}}
    row |= {"result": result, "stamp": stamp(device)}
    files.append_row(files.ROOT / "data/results/gpu_tests.jsonl", row)
    return int(status or any(result[tool]["status"] for tool in TOOLS))


if __name__ == "__main__":
    sys.exit(main())
