"""The model card of a run: ``README.md`` in its folder, with the front matter that Hugging Face reads.

The card has no path of the user's machine: of files and folders, it has the last part of the name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gdetkd_cli import __version__, assembly
from gdetkd_cli.assembly.detector import DetectorSpec
from gdetkd_cli.engine.events import Note, Observer
from gdetkd_cli.engine.run_folder import RunFolder
from gdetkd_cli.files import write_text
from gdetkd_cli.recipe.schema import Data, SyntheticData
from gdetkd_cli.text import show_hidden

_METRICS = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L")
_IN_FRONT = {"AP": "AP at IoU 0.50:0.95", "AP50": "AP at IoU 0.50", "AP75": "AP at IoU 0.75"}
_MOST_CLASSES = 80  # that get a row of their own
_OURS = "<!-- gdetkd writes this page again if the run goes on. Remove this line to keep your changes. -->"
_FILL_IN = "*to be filled in*"
_PYTORCH = """\
import student
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

model = student.load("student.pt")
names = torch.load("student.pt", weights_only=True)["classes"]
image = pil_to_tensor(Image.open("street.jpg").convert("RGB")) / 255
with torch.no_grad():
    (found,) = model([image])
for box, score, label in zip(found["boxes"], found["scores"], found["labels"]):
    if score > 0.5:
        print(names[label - 1], float(score), box.tolist())"""
_TRANSFORMERS = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection

processor = AutoImageProcessor.from_pretrained("pretrained")
model = AutoModelForObjectDetection.from_pretrained("pretrained")
image = Image.open("street.jpg").convert("RGB")
with torch.no_grad():
    output = model(**processor(images=image, return_tensors="pt"))
(found,) = processor.post_process_object_detection(output, threshold=0.5, target_sizes=[image.size[::-1]])
for box, score, label in zip(found["boxes"], found["scores"], found["labels"]):
    print(model.config.id2label[int(label)], float(score), box.tolist())"""
_FACTORY = """\
import torch
from {module} import {function}

model = {function}()  # with the arguments of the training
model.load_state_dict(torch.load("student.pt", weights_only=True)["model"])
model.eval()"""
_ONNX = """\
import ast

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("student.onnx")
names = ast.literal_eval(session.get_modelmeta().custom_metadata_map["names"])
image = np.asarray(Image.open("street.jpg").convert("RGB"), dtype=np.float32).transpose(2, 0, 1) / 255
for box, score, label in zip(*session.run(["boxes", "scores", "labels"], {"image": image})):
    if score > 0.5:
        print(names[label - 1], float(score), box.tolist())"""


def add_card(folder: RunFolder, setup: assembly.TrainingSetup, observer: Observer) -> None:
    """Writes the card of a finished run, unless its reader has taken it over by removing the last line.

    A failure becomes a note, because the run itself is complete.
    """
    try:
        if folder.card.exists() and _OURS not in folder.card.read_text(encoding="utf-8"):
            observer(Note(f"{folder.card} is kept, because its last line was removed"))
            return
        write_text(folder.card, build_card(folder.read_metrics() or {}, setup))
    except Exception as error:
        observer(Note(f"{folder.card} could not be written: {type(error).__name__}: {error}"))


def build_card(metrics: Mapping[str, Any], setup: assembly.TrainingSetup) -> str:
    """Returns the text of the card.

    Args:
        metrics: the content of ``metrics.json``.
        setup: of the run, after its last step.
    """
    sections = {
        "Licence": _write_licence(setup),
        "Data": _write_data(setup),
        "Training": _write_training(metrics, setup),
        "Results": _write_results(metrics, labelled="val" in setup.labels),
        "Use": _write_use(setup),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"---\n{_write_front_matter(metrics, setup)}\n---\n\n{_write_summary(setup)}\n\n{body}\n\n{_OURS}\n"


def _write_front_matter(metrics: Mapping[str, Any], setup: assembly.TrainingSetup) -> str:
    from huggingface_hub import EvalResult, ModelCardData  # a requirement of accelerate

    data = re.sub(r"[^\w.-]+", "-", _name_data(setup.recipe.data))
    results = [
        EvalResult(
            task_type="object-detection",
            dataset_type=data,
            dataset_name=data,
            dataset_split="validation",
            metric_type="mean_average_precision",
            metric_name=title,
            metric_value=round(metrics[name], 2),
        )
        for name, title in _IN_FRONT.items()
        if metrics.get(name) is not None
    ]
    card = ModelCardData(
        model_name=setup.recipe.name,
        library_name="gdetkd",
        pipeline_tag="object-detection",
        tags=["object-detection", "pytorch", *(["knowledge-distillation"] if setup.pair else [])],
        license="other",
        license_name="fill-in",
        license_link="LICENSE",
        datasets=[data],
        metrics=["mean_average_precision"] if results else None,
        eval_results=results or None,
    )
    return card.to_yaml().strip()


def _write_summary(setup: assembly.TrainingSetup) -> str:
    detector, teacher = setup.student.detector, setup.recipe.teacher
    origin = f"distilled from {_name(teacher)}" if setup.pair and teacher else "trained without a teacher"
    return (
        f"# {_escape(setup.recipe.name)}\n\n"
        f"An object detector, {_name(setup.recipe.student)}, with {detector.parameter_count / 1e6:.2f} M parameters "
        f"and {len(detector.class_names)} classes, {origin}. gdetkd {__version__} wrote this page at the end of the "
        "run.\n\n"
        f"Intended use and limits: {_FILL_IN}"
    )


def _write_licence(setup: assembly.TrainingSetup) -> str:
    parts = ["this model", f"the data ({_escape(_name_data(setup.recipe.data))})"]
    if setup.pair and setup.recipe.teacher:
        parts.append(f"the teacher ({_name(setup.recipe.teacher)})")
    start = [getattr(setup.recipe.student, name, None) for name in ("weights", "backbone_weights", "model")]
    parts += [f"the weights that training started from ({_escape(_shorten(name))})" for name in start if name]
    intro = "Fill in this table and the `license` fields above before you publish the model."
    return f"{intro}\n\n{_write_table(('of', 'licence'), [(part, _FILL_IN) for part in parts])}"


def _write_data(setup: assembly.TrainingSetup) -> str:
    data, names = setup.recipe.data, setup.student.detector.class_names
    rows = [
        ("name", _escape(_name_data(data))),
        ("format", data.format),
        ("training images", f"{setup.image_counts['train']:,}"),
        ("validation images", f"{setup.image_counts['val']:,}"),
        ("classes", ", ".join(map(_escape, names))),
    ]
    return _write_table(("", ""), rows)


def _write_training(metrics: Mapping[str, Any], setup: assembly.TrainingSetup) -> str:
    recipe, settings = setup.recipe, setup.compute.settings
    train, processes = recipe.train, setup.compute.accelerator.num_processes
    rows = [
        ("steps", f"{metrics.get('steps', train.steps):,}"),
        ("images per step", str(train.images_per_step * processes)),
        ("optimizer", f"{train.optimizer.name}, learning rate {train.optimizer.lr:g}, {train.schedule.name} schedule"),
        ("seed", str(recipe.seed)),
        ("device and precision", f"{settings.device}, {settings.precision}"),
    ]
    words = "Plain training, without a teacher."
    if setup.pair is not None and recipe.teacher is not None:
        terms = [f"{term.name} (weight {term.weight:g})" for term in setup.pair.terms if term.weight is not None]
        words = (
            f"Knowledge distillation from {_name(recipe.teacher)}, a {setup.pair.kind} pair. "
            "[G-DetKD](https://arxiv.org/abs/2108.07482) is the source of the terms sgfi, ckd, class\\_kd and box\\_kd."
        )
        rows += [("terms", _escape(", ".join(terms))), ("head transfer", _escape(setup.pair.head_transfer))]
    return f"{words}\n\n{_write_table(('', ''), rows)}"


def _write_results(metrics: Mapping[str, Any], *, labelled: bool) -> str:
    """Returns the tables of AP; ``labelled``: the truth of the validation images is the teacher's."""
    if metrics.get("AP") is None:
        return "The student was not evaluated: it has no known detections, or the validation images have no objects."
    overall = _write_table(_METRICS, [[_format(metrics.get(name)) for name in _METRICS]])
    by_class = metrics["per_class"]
    rows = [(_escape(name), _format(value)) for name, value in by_class.items()]
    table = f"\n\n{_write_table(('class', 'AP'), rows)}" if len(rows) <= _MOST_CLASSES else ""
    truth = " The teacher labelled these images, so AP measures agreement with the teacher." if labelled else ""
    return (
        f"COCO metrics of `student.pt` on {metrics['images']:,} validation images, in 0-100. AP_S, AP_M and AP_L are "
        f"of objects below 32 x 32 pixels, between, and above 96 x 96.{truth}\n\n{overall}{table}"
    )


def _write_use(setup: assembly.TrainingSetup) -> str:
    description = setup.student.description
    match description["kind"]:
        case "transformers":
            title, code = "With transformers alone", _TRANSFORMERS
        case "factory":
            module, _, function = description["factory"].partition(":")
            title, code = "In PyTorch", _FACTORY.format(module=module, function=function)
        case _:
            title, code = "In PyTorch, without gdetkd (`student/` has the code)", _PYTORCH
    return (
        "In this folder, with gdetkd:\n\n```sh\ngdetkd predict . street.jpg --save drawn\n```\n\n"
        f"{title}:\n\n```python\n{code}\n```\n\n"
        "With onnxruntime alone, after `gdetkd export . --onnx`; boxes are x1, y1, x2, y2 in pixels of the image:\n\n"
        f"```python\n{_ONNX}\n```"
    )


def _name(spec: DetectorSpec) -> str:
    """A detector's title in Markdown, without folders."""
    return _escape(_shorten(assembly.format_title(spec)))


def _name_data(data: Data) -> str:
    return "gdetkd built-in scenes" if isinstance(data, SyntheticData) else data.root.resolve().name


def _shorten(name: str) -> str:
    """The last part of a path, and of a run's file the run's name; other names stay."""
    path = Path(name)
    if not (path.is_absolute() or path.exists()):
        return name
    return path.resolve().parent.name if path.name == "student.pt" else path.resolve().name


def _format(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _escape(text: str) -> str:
    """Text of any source as plain words in Markdown."""
    return re.sub(r"([\\`*_\[\]<>|#~$])", r"\\\1", show_hidden(text))


def _write_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))
