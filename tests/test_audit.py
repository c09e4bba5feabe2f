"""``make test`` fails for a known vulnerability, and not where no service can be reached."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BAD = '{"name": "a", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}'
GOOD = '{"name": "b", "version": "1", "vulns": []}'
SKIPPED = '{"name": "c", "skip_reason": "not found"}'
NOT_CHECKED = "vulnerabilities: not checked, because no service that knows the packages can be reached"


@pytest.mark.parametrize(
    ("fake", "code", "last"),
    [
        (f"print('''{{\"dependencies\": [{GOOD}, {SKIPPED}]}}''')", 0, "vulnerabilities: 0 in 1 packages; 1 unknown"),
        (f"print('''{{\"dependencies\": [{BAD}, {GOOD}]}}''')", 1, "vulnerabilities: 1 in 2 packages; 0 unknown"),
        (f"print('''{{\"dependencies\": [{SKIPPED}]}}''')", 0, NOT_CHECKED),
        ("raise ConnectionError('x')", 0, NOT_CHECKED),
        ("raise ValueError('x')", 1, "ValueError: x"),
    ],
)
def test_the_audit(fake: str, code: int, last: str, tmp_path: Path) -> None:
    (tmp_path / "pip_audit.py").write_text(fake)
    command = [sys.executable, str(Path(__file__).with_name("audit.py"))]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stdout.strip().splitlines()[-1].startswith(last)
    assert ("a 1: CVE-1, fixed in 2" in done.stdout) == (code == 1 and "CVE" in fake)
