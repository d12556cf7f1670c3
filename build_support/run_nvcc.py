"""Runs nvcc, keeps its report in a log, and fails on what ptxas only warns about.

usage: run_nvcc.py LOG ALLOWED_SPILL_BYTES NVCC ARGUMENTS...

C75xx warnings mean that wgmma instructions were serialised, or setmaxnreg ignored; spilled
registers mean a tile does not fit. Both are wrong kernels, not slow ones to be shipped.
"""

import re
import subprocess
import sys

SPILL = re.compile(r"(\d+) bytes spill (?:stores|loads)")


def main(log: str, allowed: str, *command: str) -> int:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with open(log, "w") as file:
        file.write(result.stdout)
    bad = [
        line
        for line in result.stdout.splitlines()
        if "C75" in line or any(int(n) > int(allowed) for n in SPILL.findall(line))
    ]
    if result.returncode or bad:
        print(result.stdout if result.returncode else "\n".join(bad), file=sys.stderr)
        print(f"nvcc failed or reported the above for: {' '.join(command)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
