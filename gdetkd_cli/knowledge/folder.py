"""The folder that ``gdetkd teach`` writes: everything that a student needs of a teacher, without the teacher's file.

key.json            what the answers depend on besides an image's pixels
teacher.json        class names, levels and kind of the teacher; written last, when the folder is complete
heads.safetensors   the weights behind its backbone, if its architecture is known
views/              features by the digest of the pixels of an image or of its mirror image
detections/         detections by the digest of the pixels
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from gdetkd_cli.detectors import catalog
from gdetkd_cli.detectors.probed import ProbedDetector, read_regions
from gdetkd_cli.detectors.protocol import Detector, Family, Finding, Observation, RegionView, View
from gdetkd_cli.detectors.torchvision.dense import DenseDetector
from gdetkd_cli.detectors.torchvision.two_stage import TwoStageDetector
from gdetkd_cli.detectors.transformers.detector import QueryDetector
from gdetkd_cli.errors import KnowledgeError, PairError, get_first_line
from gdetkd_cli.files import write_file, write_text
from gdetkd_cli.knowledge.store import DiskStore, Tell
from gdetkd_cli.knowledge.teacher import remember
from gdetkd_cli.structures import Batch, Detections, LevelSpec, Regions

TEACHER_FILE, KEY_FILE = "teacher.json", "key.json"
_HEADS_FILE = "heads.safetensors"
_KNOWN = (TwoStageDetector, DenseDetector, QueryDetector)


class _Facts(BaseModel):
    """The content of ``teacher.json``.

    Attributes:
        architecture: description of the detector whose heads are stored; None: only levels are.
        cells_per_side, finding: of a teacher of which only levels are known.
        mirrored: whether mirror images were taught, too.
    """

    model_config = ConfigDict(extra="forbid")

    classes: tuple[str, ...]
    levels: tuple[LevelSpec, ...] = Field(min_length=1)
    parameters: int
    detections: bool
    plain: bool
    mirrored: bool
    architecture: dict[str, Any] | None = None
    cells_per_side: float | None = None
    finding: Finding | None = None


class StoredLevels(Detector):
    """A teacher of unknown code of which only the levels are stored."""

    family: Family = "unknown"

    def __init__(
        self, *, class_names: tuple[str, ...], levels: tuple[LevelSpec, ...], cells_per_side: float, finding: Finding
    ) -> None:
        self.module: nn.Module = nn.Module()
        self.class_names = class_names
        self._levels, self._cells_per_side, self._finding = levels, cells_per_side, finding

    @property
    def levels(self) -> tuple[LevelSpec, ...]:
        return self._levels

    @property
    def finding(self) -> Finding:
        return self._finding

    @property
    def embedding_channels(self) -> int:
        return max(level.channels for level in self.levels)

    @property
    def embedding_source(self) -> str:
        return "mean of the pooled region"

    def forward_train(self, batch: Batch, *, candidates: bool = True) -> Observation:
        raise PairError("a knowledge folder can teach but cannot be trained; choose another student")

    def extract_features(self, batch: Batch) -> Observation:
        raise PairError("a knowledge folder cannot run the teacher; ask for images that it was taught with")

    def predict(self, images: list[Tensor]) -> list[Detections]:
        raise PairError("a knowledge folder cannot run the teacher; ask for images that it was taught with")

    def region_outputs(self, seen: Observation, regions: Regions, needs: frozenset[View]) -> RegionView:
        return read_regions(seen.pyramid, regions, needs, cells_per_side=self._cells_per_side)


def check_storable(teacher: Detector, architecture: dict[str, Any]) -> None:
    """Checks that a teacher can be rebuilt without its file.

    Raises:
        KnowledgeError: its heads are unknown code.
    """
    known = isinstance(teacher, _KNOWN) and _is_known(architecture)
    if not known and not (isinstance(teacher, ProbedDetector) and teacher.family == "unknown"):
        raise KnowledgeError(
            f"the heads of this {teacher.family} teacher ({type(teacher).__name__}) cannot be stored, so it cannot "
            "teach without its own code; use it with distill.teacher_cache: disk, or teach with an exported file of it"
        )


def _is_known(architecture: dict[str, Any]) -> bool:
    return architecture.get("kind") in ("torchvision", "composed", "transformers")


def write_teacher(
    folder: Path, teacher: Detector, architecture: dict[str, Any], *, detections: bool, plain: bool, mirrored: bool
) -> None:
    """Writes the heads and the facts of a teacher, which make the folder complete; earlier views stay in it."""
    if (folder / TEACHER_FILE).is_file():
        before = read_json(folder / TEACHER_FILE)
        plain, mirrored = plain or bool(before.get("plain")), mirrored or bool(before.get("mirrored"))
    facts = _Facts(
        classes=teacher.class_names,
        levels=teacher.levels,
        parameters=teacher.parameter_count,
        detections=detections,
        plain=plain,
        mirrored=mirrored,
    )
    if not isinstance(teacher, _KNOWN):
        assert isinstance(teacher, ProbedDetector)
        facts.cells_per_side, facts.finding = teacher.cells_per_side, teacher.finding
    else:
        facts.architecture = architecture
        heads = {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)  # DETR-like ones share tensors
            for name, value in teacher.module.state_dict().items()
            if "backbone" not in name.split(".")
        }
        content = save(heads)
        write_file(folder / _HEADS_FILE, lambda file: file.write(content), size=len(content))
    write_text(folder / TEACHER_FILE, facts.model_dump_json(indent=1))


def open_knowledge(folder: Path, tell: Tell) -> Detector:
    """Opens a complete folder as a teacher.

    Raises:
        KnowledgeError: the folder is none, incomplete or damaged.
        ModelError: the heads' architecture cannot be built.
    """
    if not (folder / KEY_FILE).is_file():
        raise KnowledgeError(f"{folder} has no {KEY_FILE}; expected a folder that `gdetkd teach` wrote")
    if not (folder / TEACHER_FILE).is_file():
        raise KnowledgeError(
            f"{folder} is incomplete, because `gdetkd teach` did not finish; run the same command again to continue it"
        )
    try:
        facts = _Facts.model_validate(read_json(folder / TEACHER_FILE))
        detector = _rebuild(folder, facts)
    except (ValidationError, TypeError, SafetensorError, OSError, RuntimeError) as error:
        raise KnowledgeError(
            f"{folder} is damaged ({get_first_line(error)}); remove its {TEACHER_FILE} and run `gdetkd teach` again"
        ) from error
    return remember(
        detector,
        DiskStore(folder / "views", None, tell),
        live=False,
        detections=DiskStore(folder / "detections", None, tell) if facts.detections else None,
        source=str(folder),
        parameters=facts.parameters,
        views=(facts.plain, facts.mirrored),
    )


def _rebuild(folder: Path, facts: _Facts) -> Detector:
    if facts.architecture is None:
        assert facts.cells_per_side is not None and facts.finding is not None
        return StoredLevels(
            class_names=facts.classes,
            levels=facts.levels,
            cells_per_side=facts.cells_per_side,
            finding=facts.finding,
        )
    if not _is_known(facts.architecture):
        raise KnowledgeError(
            f"{folder} names an architecture of unknown kind; expected torchvision, composed or transformers"
        )
    with torch.random.fork_rng(devices=[]):
        detector = catalog.build(facts.architecture, facts.classes)
    module = detector.module
    for parent in list(module.modules()):
        if "backbone" in dict(parent.named_children()):
            parent.backbone = nn.Identity()  # frees its memory; the levels are stored
    module.load_state_dict(load_file(folder / _HEADS_FILE))
    module.eval()
    # Where each kind of detector keeps the levels that it measured, here with fresh weights.
    vars(detector)["_levels" if isinstance(detector, QueryDetector) else "levels"] = facts.levels
    return detector


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object of a knowledge folder.

    Raises:
        KnowledgeError: the file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # a UnicodeDecodeError is one
        raise KnowledgeError(f"{path} is damaged ({error}); remove the folder and fill it again") from error
    if not isinstance(content, dict):
        raise KnowledgeError(f"{path} is damaged (no object); remove the folder and fill it again")
    return content
