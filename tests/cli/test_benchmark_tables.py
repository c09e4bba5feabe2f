"""The tables in docs/benchmarks/ agree with the finished trials."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "tables.py"

TRIALS = """recipe,method,steps,seed,AP,AP50,AP75,AP_S,AP_M,AP_L,seconds_per_step,peak_memory_mb
toy,none,10,0,10.0,0,0,1.0,2.0,3.0,0.1,100
toy,none,10,1,20.0,0,0,3.0,4.0,5.0,0.2,200
toy,sgfi,10,1,26.0,0,0,7.0,8.0,9.0,0.3,300
toy,sgfi,20,0,50.0,0,0,7.0,8.0,9.0,0.3,300
toy,pkd,10,0,12.0,0,0,1.0,2.0,3.0,0.1,100
toy,pkd,10,1,23.0,0,0,3.0,4.0,5.0,0.2,200
toy,cwd,10,0,12.0,0,0,1.0,2.0,3.0,0.1,100
toy,cwd,10,1,23.0,0,0,3.0,4.0,5.0,0.2,200
"""
INTERVALS = (
    "method,steps,image_deviation,images,fold_deviation,folds\nsgfi,10,1.0,200,,\nsgfi,20,1,200,,\npkd,10,0.0,200,,\n"
)


@pytest.mark.parametrize("script", ["tables.py", "advise.py"])
def test_the_pages_are_up_to_date(script: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def load_script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tables() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        yield load_script("tables", patch)


def test_answers_are_compared_with_whole_runs(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Ten steps: plain 15.0, sgfi 26.0 and pkd 17.5; of 20 steps there is no plain training."""
    advise = load_script("advise", monkeypatch)
    assert advise.rank_correlation([(1, 10), (2, 20), (3, 15)]) == 0.5  # 1 - 6 (0 + 1 + 1) / (3 x 8)
    monkeypatch.setattr(advise, "TRIALS", folder)
    plain, sgfi, pkd, _ = advise.read_rows("toy", 10)
    assert (plain.mean, plain.difference) == (15.0, None)
    assert (sgfi.mean, sgfi.difference, sgfi.image_deviation) == (26.0, 6.0, 1.0)  # with seed 1 alone
    assert pkd.difference == 2.5
    outcome = advise.compare(advise.Pair("toy", 60.0, ("toy", 10), ("toy", 10)))
    assert (outcome.verdict.method, outcome.whole["pkd"]) == ("sgfi", 2.5)
    assert outcome.predict("pkd") == pytest.approx(2.5)  # no longer than the short run
    assert advise.compare(advise.Pair("toy", 60.0, ("toy", 20), ("toy", 20))) is None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "toy.csv").write_text(TRIALS)
    (tmp_path / "toy-intervals.csv").write_text(INTERVALS)
    return tmp_path


@pytest.mark.parametrize(("name", "least"), [("scenes.md", 6), ("photographs.md", 4)])
def test_a_page_has_tables(tables: ModuleType, name: str, least: int) -> None:
    (page,) = (page for page in tables.PAGES if page.name == name)
    text = page.read_text("utf-8")
    assert text.count("<!-- end -->") == len(tables.BLOCK.findall(text)) >= least  # a misspelt block is not updated


def test_methods(tables: ModuleType, folder: Path) -> None:
    page = "a\n<!-- methods of toy at 10: none = plain, sgfi, ckd, pkd, cwd -->\nold\n<!-- end -->\nb\n"
    kept, header, rule, none, sgfi, ckd, pkd, cwd, *rest = tables.render_page(page, folder).splitlines()[1:]

    assert kept == "<!-- methods of toy at 10: none = plain, sgfi, ckd, pkd, cwd -->"
    assert header.startswith("| 10 steps | AP by seed |") and set(rule) <= set("|- ")
    assert "| gain over `none` (95 % over seeds and images) |" in header
    assert none == "| plain | 10.0 / 20.0 | 15.0 ± 7.1 | 2.0 / 3.0 / 4.0 |  | 150 | 150 |"
    # The gain is over the common seed; one seed has no interval.
    assert sgfi == "| `sgfi` | not run / 26.0 | 26.0 | 7.0 / 8.0 / 9.0 | +6.0 | 300 | 300 |"
    # Gains of 2 and 3: s / sqrt(2) = 0.5, and t(1) = 12.706.
    assert "| +2.5 (-3.9 to +8.9) |" in pkd
    assert "| +2.5 |" in cwd  # its deviation over images is not known
    assert ckd == "| `ckd` | not run |  |  |  |  |  |"
    assert rest == ["<!-- end -->", "b"]


def test_gains_over_folds(tables: ModuleType, folder: Path) -> None:
    (folder / "toy-intervals.csv").write_text(f"{','.join(tables.INTERVAL_FIELDS)}\npkd,10,,14,1.0,4\n")
    page = "<!-- methods of toy at 10: pkd -->\n<!-- end -->"
    _, header, _, pkd, _ = tables.render_page(page, folder).splitlines()
    assert "(95 % over folds)" in header
    assert "| +2.5 (+0.9 to +4.1) |" in pkd  # t(3) / sqrt(4) = 1.591


def test_budgets(tables: ModuleType, folder: Path) -> None:
    page = "<!-- budgets of toy at 10, 2000, 20: none, sgfi = SGFI -->\n<!-- end -->"
    assert tables.render_page(page, folder).splitlines()[1:-1] == [
        "| AP after ... steps | 10 | 2,000 | 20 |",
        "| --- | --- | --- | --- |",
        "| `none` | 10.0 / 20.0 | not run | not run |",
        "| SGFI | not run / 26.0 | not run | 50.0 |",
    ]


def test_trials_are_added_and_replaced(tables: ModuleType, folder: Path) -> None:
    names = ("method", "steps", "seed", "AP")
    fresh = [dict(zip(names, row, strict=True)) for row in (("sgfi", "10", "1", "27"), ("ckd", "10", "0", "5"))]
    tables.add_rows(folder / "toy.csv", fresh, names, "")
    tables.add_rows(folder / "toy.csv", fresh[:1], names, "@30")

    assert (folder / "toy.csv").read_text().split() == [
        "method,steps,seed,AP",
        "ckd,10,0,5",
        "cwd,10,0,12.0",
        "cwd,10,1,23.0",
        "none,10,0,10.0",
        "none,10,1,20.0",
        "pkd,10,0,12.0",
        "pkd,10,1,23.0",
        "sgfi,10,1,27",
        "sgfi@30,10,1,27",
        "sgfi,20,0,50.0",
    ]
