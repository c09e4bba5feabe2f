"""The report's page by hand-made contents: every section, escaped text, and sentences for what is missing."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from gdetkd_cli.data.split import Split
from gdetkd_cli.data.synthetic import draw_split
from gdetkd_cli.evaluation.coco_metrics import evaluate_coco
from gdetkd_cli.report.contents import Contents, Role, Shown
from gdetkd_cli.report.write import write_report
from gdetkd_cli.structures import Detections

SCRIPT = "<script>alert('$x$')</script>"
PAIR = {
    "images": 6,
    "objects": 12,
    "matching": {
        "student_levels": ["stride 8", "stride 16"],
        "teacher_levels": ["stride 4", "stride 8"],
        "weights": [[0.75, 0.25], []],
        "objects": [12, 0],
        "by_size": {"small": [12, [0.75, 0.25]], "medium": [0, []], "large": [0, []]},
    },
    "similarity": {
        "edges": [-1.0, 0.0, 1.0],
        "matched": [1, 11],
        "unmatched": [100, 20],
        "matched_mean": 0.8,
        "unmatched_mean": -0.1,
    },
}


class Tags(HTMLParser):
    """Collects start tags, and the tags that are not closed in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def scenes() -> Split:
    split = draw_split(split="val", images=6, size=64, seed=0)
    return replace(split, class_names=(SCRIPT, *split.class_names[1:]))


def detect(split: Split, *, shift: float) -> dict[int, Detections]:
    """The true boxes, moved by some pixels."""
    return {
        record.image_id: Detections(
            record.boxes + shift, torch.linspace(0.9, 0.6, len(record.labels)), record.labels.clone()
        )
        for record in split.records
    }


def show(role: Role, split: Split, shift: float) -> Shown:
    found = detect(split, shift=shift)
    metrics = evaluate_coco(split.records, split.class_names, found).to_json()
    log: list[Mapping[str, Any]] = [{"step": step, "loss": 9.0 / step, "sgfi": 1.0 / step} for step in (1, 2, 3)]
    log += [{"step": step, "evaluation": {**metrics, "AP": step}} for step in (2, 3)]
    cost = {"parameters": 2_000_000, "size_mb": 8.0, "ms_per_image": 12.0}
    return Shown(role, f"runs/{SCRIPT}", metrics, found, log, cost)


def contents() -> Contents:
    split = scenes()
    return Contents(
        title=f"a {SCRIPT} run",
        shown=(show("teacher", split, 0.0), show("alone", split, 9.0), show("distilled", split, 2.0)),
        split=split,
        measured={"device": "cpu", "pair": PAIR},
        environment={"python": "3.11", "packages": {"gdetkd": "0.1.0", "torch": SCRIPT}},
        recipe=f"name: {SCRIPT}",
        command=f"gdetkd distill --recipe '{SCRIPT}'",
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(contents(), path)
    return path


def test_the_page_is_whole_and_alone(written: Path) -> None:
    html = written.read_text()
    tags = Tags()
    tags.feed(html)

    assert tags.open == []
    assert not {"script", "link", "iframe"} & {tag for tag, _ in tags.tags}
    assert [f"on{name}" for _, attributes in tags.tags for name in attributes if name.startswith("on")] == []
    sources = [
        value or "" for _, at in tags.tags for name, value in at.items() if name in ("src", "href", "xlink:href")
    ]
    assert sources
    assert all(source.startswith(("data:image/", "#")) for source in sources)
    assert not re.findall(r"url\((?!#)", html)
    assert len(html) < 5_000_000


def test_text_of_users_is_escaped(written: Path) -> None:
    html = written.read_text()

    assert "<script" not in html
    assert html.count("&lt;script&gt;") > 10  # title, class, path, version, recipe, command


def test_every_chart_has_words_and_follows_the_page(written: Path) -> None:
    html = written.read_text()
    charts = re.findall(r"<svg .*?</svg>", html, flags=re.DOTALL)

    assert len(charts) >= 14
    assert all(re.match(r'<svg role="img" aria-label="[^"]{10,}"', chart) for chart in charts)
    assert all("currentColor" in chart for chart in charts)
    assert "#000000" not in "".join(charts).replace("fill: #000000", "")  # on a dark page, black lines vanish
    images = re.findall(r"<img ([^>]*?)>", html)
    assert images
    assert all(re.match(r'alt="[^"]+"', image) for image in images)


def test_all_sections_have_their_numbers(written: Path) -> None:
    html = written.read_text()

    assert html.count("Left out") == 1  # the pyramids
    assert "95 % interval over the validation images" in html
    assert "does not cover the seed" in html
    assert "student level with the largest mean weight, by teacher level: stride 4: stride 8" in html.lower()
    assert "0.80 for the same region, -0.10 for different regions" in html
    assert re.search(r"2\.00 M</td><td>8\.0</td><td>12\.0", html)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    alone = Contents(title="run", shown=(Shown("alone", "runs/a"),), split=None, without_split="no such file.")
    write_report(alone, tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()

    assert html.count("Left out, because the validation images are not available: no such file.") == 4
    assert html.count("Left out, because the run was not measured after training") == 2
    assert "There is no gain to report" in html
    assert "No detector of this report was evaluated." in html


def test_detections_without_any_box_and_images_without_objects(tmp_path: Path) -> None:
    split = scenes()
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    blank = replace(split, records=[replace(record, truth=[]) for record in split.records])
    for own in (split, blank):
        found = {record.image_id: nothing for record in own.records}
        metrics = evaluate_coco(own.records, own.class_names, found).to_json()
        shown = tuple(Shown(role, "", metrics, found) for role in ("alone", "distilled"))  # type: ignore[arg-type]
        write_report(Contents(title="empty", shown=shown, split=own), tmp_path / "r.html")
        assert "Errors by type" in (tmp_path / "r.html").read_text()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_has_nothing_to_complain_about(written: Path, tmp_path: Path, dark: bool) -> None:
    shot = tmp_path / "shot.png"
    command = ["chromium", "--headless", "--no-sandbox", "--enable-logging=stderr", f"--screenshot={shot}"]
    command += ["--window-size=1000,3000", f"--user-data-dir={tmp_path}"]
    command += ["--blink-settings=preferredColorScheme=0"] * dark
    done = subprocess.run([*command, written.as_uri()], capture_output=True, text=True, timeout=300)

    assert shot.exists(), done.stderr
    assert "CONSOLE" not in done.stderr
