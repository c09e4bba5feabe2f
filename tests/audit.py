"""Looks up known vulnerabilities of the pinned packages with pip-audit. Fails for one, not without a service."""

from __future__ import annotations

import json
import subprocess
import sys

OPTIONS = "--requirement constraints.txt --no-deps --disable-pip --format json --progress-spinner off --timeout 10"
UNREACHABLE = ("ConnectionError", "ProxyError", "SSLError", "Timeout", "HTTPError", "ServiceError")


def audit() -> int:
    """Prints one line, and one per vulnerability; returns the exit code."""
    command = [sys.executable, "-m", "pip_audit", *OPTIONS.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = (done.stderr.strip().splitlines() or [""])[-1]
    if not done.stdout and not any(name in last for name in UNREACHABLE):
        print(done.stderr)
        return 1
    packages = json.loads(done.stdout)["dependencies"] if done.stdout else []
    known = [one for one in packages if "vulns" in one]
    if not known:
        print("vulnerabilities: not checked, because no service that knows the packages can be reached")
        return 0
    found = [(one, bug) for one in known for bug in one["vulns"]]
    for one, bug in found:
        fixed = ", ".join(bug["fix_versions"]) or "no version"
        print(f"{one['name']} {one['version']}: {bug['id']}, fixed in {fixed}")
    print(
        f"vulnerabilities: {len(found)} in {len(known)} packages; {len(packages) - len(known)} unknown to the service"
    )
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(audit())
