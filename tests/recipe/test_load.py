"""Recipes from YAML and ``--set``: what is read, and what each mistake says."""

from __future__ import annotations

from pathlib import Path

import pytest

from gdetkd_cli.errors import RecipeError
from gdetkd_cli.recipe import builtin
from gdetkd_cli.recipe.distillation import PredictionKD
from gdetkd_cli.recipe.load import load_data, load_recipe
from gdetkd_cli.recipe.schema import CocoData, SyntheticData


@pytest.fixture
def shipped(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of built-in recipes with one recipe, ``shapes/tiny``."""
    folder = tmp_path / "recipes"
    (folder / "shapes").mkdir(parents=True)
    (folder / "shapes" / "tiny.yaml").write_text(recipe.read_text())
    (folder / "README.md").write_text("not a recipe")
    monkeypatch.setattr(builtin, "find_recipes_folder", lambda: folder)
    return folder


def refusal(path: Path | str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


def test_reads_a_file_with_defaults(recipe: Path) -> None:
    read = load_recipe(recipe)
    assert (read.name, read.train.steps, read.train.batch_size) == ("tiny", 10, 8)


@pytest.mark.parametrize("text", ["{a: .nan}", "{a: [1, {b: -.inf}]}", "{a: {1: 2}}"])
def test_arguments_that_would_not_be_read_back_are_refused(recipe: Path, text: str) -> None:
    assert f"--set student.arguments={text}: student.arguments: input should be" in refusal(
        recipe, f"student.arguments={text}"
    )


@pytest.mark.parametrize("text", ["yes", "010", "1:30", ".inf", ".nan", "'12'", "1e400", "1000000000000", "-1"])
def test_what_is_no_usable_number_is_refused(recipe: Path, text: str) -> None:
    for field in ("train.steps", "train.optimizer.lr", "student.pyramid_channels"):
        assert f"--set {field}={text}: {field}: input should be" in refusal(recipe, f"{field}={text}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 2000, "nested more than 30 levels deep"),
        ("&a [*a]", "a block contains itself through its anchor"),
        (
            "{a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1], "
            + ", ".join(
                f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]"
                for before, name in zip("abcd", "bcde", strict=True)
            )
            + "}",
            "more than 10000 values, with every alias written out",
        ),
        ("!!bool maybe", "'maybe' is not true or false"),
    ],
    ids=["deep", "recursive", "exploding", "tag"],
)
def test_yaml_without_end_is_refused(recipe: Path, text: str, reason: str) -> None:
    assert refusal(recipe, f"student.arguments={text}").endswith(f"the value is not valid YAML: {reason}")


@pytest.mark.parametrize("text", ["3e-4", "3E-4", "3.0e-4", ".3e-3", "0.0003"])
def test_reads_every_spelling_of_a_number(recipe: Path, text: str) -> None:
    assert load_recipe(recipe, [f"train.optimizer.lr={text}"]).train.optimizer.lr == pytest.approx(3e-4)


def test_reads_anchors_and_merges(recipe: Path, tmp_path: Path) -> None:
    text = recipe.read_text().replace(
        "student:", "teacher: &net\n  arch: composed\n  backbone: resnet50\n  head: fcos\nstudent:"
    )
    text = text.replace("  arch: composed\n  backbone: resnet18\n  head: fcos\ntrain", "  <<: *net\n  width: 16\ntrain")
    read = load_recipe(written(tmp_path, text))
    assert read.teacher is not None
    assert read.student == read.teacher.model_copy(update={"width": 16})


def test_an_override_below_an_anchor_changes_one_field_only(recipe: Path, tmp_path: Path) -> None:
    text = recipe.read_text().replace("student:", "student: &net").replace("train:", "teacher: *net\ntrain:")
    read = load_recipe(written(tmp_path, text), ["student.head=retinanet"])
    assert read.teacher is not None
    assert (read.student.model_dump()["head"], read.teacher.model_dump()["head"]) == ("retinanet", "fcos")


def test_dates_and_byte_order_marks_do_no_harm(recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(recipe.read_text().replace("name: tiny", "name: 2026-01-31"), encoding="utf-8-sig")
    assert load_recipe(path).name == "2026-01-31"


def test_a_builtin_recipe_is_known_by_name(shipped: Path) -> None:
    assert load_recipe("shapes/tiny").name == "tiny"
    assert builtin.list_builtin() == [
        builtin.BuiltinRecipe("shapes/tiny", shipped / "shapes" / "tiny.yaml", "A tiny recipe")
    ]


def test_a_recipe_without_comments_has_no_title(shipped: Path) -> None:
    (shipped / "bare.yaml").write_text("name: x\n")
    assert [r.title for r in builtin.list_builtin() if r.name == "bare"] == [""]


def test_recipes_folder_is_the_checkout_or_the_installed_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "PACKAGE", tmp_path / "gdetkd_cli")
    assert builtin.find_recipes_folder() == tmp_path / "recipes"
    (tmp_path / "gdetkd_cli" / "builtin_recipes").mkdir(parents=True)
    assert builtin.find_recipes_folder() == tmp_path / "gdetkd_cli" / "builtin_recipes"


def test_overrides_are_yaml_and_apply_in_order(recipe: Path) -> None:
    read = load_recipe(recipe, ["train.steps=5", "train.steps=7", "train.clip_norm=null", "augment.flip=0"])
    assert (read.train.steps, read.train.clip_norm, read.augment.flip) == (7, None, 0.0)


def test_an_override_reaches_into_a_list(recipe: Path) -> None:
    read = load_recipe(recipe, ["train.schedule={milestones: [0.1, 0.9]}", "train.schedule.milestones.0=0.5"])
    assert read.train.schedule.milestones == [0.5, 0.9]


def test_an_override_below_null_makes_the_mapping(recipe: Path) -> None:
    read = load_recipe(recipe, ["distill=null", "distill.class_kd.weight=2"])
    assert read.distill is not None
    assert read.distill.class_kd == PredictionKD(weight=2.0)


def test_nothing_after_the_sign_is_null(recipe: Path) -> None:
    assert load_recipe(recipe, ["student.weights="]).student.weights is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.steps", "--set train.steps: expected field=value, for example --set train.steps=2000"),
        (".x=1", "--set .x=1: expected field=value, for example --set train.steps=2000"),
        ("name=[", "--set name=[: the value is not valid YAML: expected the node content, but found '<stream end>'"),
        (
            "train.steps.x=1",
            "--set train.steps.x=1: train.steps is 10, which has no fields; "
            "set the whole block: --set 'train.steps={x: ...}'",
        ),
        (
            "train.schedule.milestones.0=1",
            (
                "--set train.schedule.milestones.0=1: the recipe does not contain the list "
                "train.schedule.milestones; "
                "set the whole list: --set 'train.schedule.milestones=[...]'"
            ),
        ),
        ("train.steps=0", "--set train.steps=0: train.steps: input should be greater than 0 (got 0)"),
        ("train.step=9", "--set train.step=9: train.step: unknown field; did you mean steps?"),
        ("train={}", "--set train={}: train.steps: this field is required"),
        (
            "foo.bar=1",
            (
                "--set foo.bar=1: foo: unknown field; expected one of: "
                "name, seed, data, augment, student, teacher, distill, train, runtime"
            ),
        ),
    ],
)
def test_mistakes_in_an_override_name_it(recipe: Path, override: str, sentence: str) -> None:
    assert refusal(recipe, override) == sentence


@pytest.mark.parametrize(
    ("whole", "override", "expected"),
    [
        ("[0.5]", "1", "train.schedule.milestones is a list of length 1; expected an index from 0 to 0, got 1"),
        ("[0.5]", "x", "train.schedule.milestones is a list of length 1; expected an index from 0 to 0, got x"),
        ("[]", "0", "train.schedule.milestones is a list of length 0; it has no index 0"),
    ],
)
def test_a_list_has_only_its_own_indices(recipe: Path, whole: str, override: str, expected: str) -> None:
    element = f"train.schedule.milestones.{override}=1"
    assert refusal(recipe, f"train.schedule.milestones={whole}", element) == f"--set {element}: {expected}"


def test_each_problem_has_its_line_and_the_path_that_was_typed(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """\
# comment
name: a b
data: {format: cocoo}
student:
  arch: composed
  hed: fcos
  backbone: resnet18
  blocks:
    - 1
    - 0
    - 1
    - 1
distill:
  class_kd:
    weight: -1
  box_kd: maybe
  head_transfer: maybe
  sgfi: 3
  ckd: {queue: many, gamma: 0.1, queeu: 2}
train:
  batch_size: 1.5
  lr: 3
""",
    )
    expected = [
        "2: name: string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$' (got 'a b')",
        "3: data.format: input should be one of 'synthetic', 'coco', 'yolo', 'voc', 'bdd100k', 'folder' (got 'cocoo')",
        "4: student.head: this field is required",
        "6: student.hed: unknown field; did you mean head?",
        "10: student.blocks.1: input should be greater than 0 (got 0)",
        "15: distill.class_kd.weight: input should be greater than or equal to 0 (got -1)",
        "16: distill.box_kd: input should be a mapping of fields or 'auto' (got 'maybe')",
        "17: distill.head_transfer: input should be a valid boolean or 'auto' (got 'maybe')",
        "18: distill.sgfi: input should be a mapping of fields (got 3)",
        "19: distill.ckd.queeu: unknown field; did you mean queue?",
        "19: distill.ckd.queue: input should be a whole number (got 'many')",
        "20: train.steps: this field is required",
        "21: train.batch_size: input should be a whole number (got 1.5)",
        (
            "22: train.lr: unknown field; expected one of: steps, batch_size, accumulate, reference_batch, optimizer, "
            "schedule, clip_norm, log_every, evaluate_every, checkpoint_every, "
            "keep_checkpoints, ema, stop_after"
        ),
    ]
    assert set(refusal(path).splitlines()) == {f"{path}:{line}" for line in expected}


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        ("3", "student: input should be a mapping of fields (got 3)"),
        ("{name: x}", "student.arch: this field is required"),
        (
            "{arch: torchvision, name: x, argumnts: {}}",
            "student.argumnts: unknown field; did you mean arguments?",
        ),
        (
            "{arch: composed, backbone: resnet18, head: fcos, image_size: [800, 600]}",
            "student: image_size must be [short side, maximum long side], each at least 32 pixels; got [800, 600]",
        ),
        (
            "{arch: composed, backbone: resnet18, head: fcos, pyramid_levels: [1, 9]}",
            "student: pyramid_levels must be [first, last], first in 2-5 and last in 5-7; got [1, 9]",
        ),
    ],
)
def test_problems_of_a_detector_block(recipe: Path, block: str, sentence: str) -> None:
    assert refusal(recipe, f"student={block}") == f"--set student={block}: {sentence}"


def test_a_long_value_is_cut(recipe: Path) -> None:
    message = refusal(recipe, f"train.steps={'x' * 200}")
    assert message.endswith("(got '" + "x" * 56 + "...)")


def test_a_wrong_value_behind_a_merge_has_the_anchors_line(recipe: Path, tmp_path: Path) -> None:
    text = recipe.read_text().replace("  head: fcos\n", "  head: fcos\n  pyramid_channels: 0\n")
    text = text.replace("student:", "student: &net").replace("train:", "teacher: {<<: *net}\ntrain:")
    path = written(tmp_path, text)
    problem = "input should be greater than 0 (got 0)"
    assert refusal(path).splitlines() == [
        f"{path}:10: student.pyramid_channels: {problem}",
        f"{path}:10: teacher.pyramid_channels: {problem}",
    ]


def test_a_missing_recipe_names_close_ones(shipped: Path) -> None:
    assert refusal("shapes/tinny") == (
        "no recipe file or built-in recipe is named shapes/tinny; did you mean shapes/tiny?"
    )
    assert refusal("nowhere.yaml") == (
        "no recipe file or built-in recipe is named nowhere.yaml; to list the built-in recipes, run: gdetkd recipe list"
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "{path} is empty; to create a recipe, run: gdetkd recipe init"),
        (b"# only a comment\n", "{path} is empty; to create a recipe, run: gdetkd recipe init"),
        (b"- a\n", "{path}: expected a mapping of fields (name: ..., data: ...), got a list"),
        (b"hello\n", "{path}: expected a mapping of fields (name: ..., data: ...), got a single value"),
        (b"name: \xff\n", "{path} is not UTF-8 text (byte 6); a recipe is a YAML file"),
        (b"name: x\ndata: [\n", "{path}:3: not valid YAML: expected the node content, but found '<stream end>'"),
        (b"name: x\nname: y\n", "{path}:2: not valid YAML: the key 'name' appears twice"),
        (b"a: {b: 1, c: 2,\n  b: 3}\n", "{path}:2: not valid YAML: the key 'b' appears twice"),
        (
            b"name: !!python/name:os.system\n",
            (
                "{path}:1: not valid YAML: could not determine a constructor for the tag "
                "'tag:yaml.org,2002:python/name:os.system'"
            ),
        ),
        (b"a: 1\n--- \nb: 2\n", "{path}:2: not valid YAML: but found another document"),
        (b"a: \x07\n", "{path}: not valid YAML: unacceptable character #x0007: special characters are not allowed"),
        (b"a: !!int x\n", "{path}: not valid YAML: invalid literal for int() with base 10: 'x'"),
    ],
)
def test_an_unreadable_recipe_is_one_sentence(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    assert refusal(path) == sentence.format(path=path)


def test_a_folder_is_no_recipe(tmp_path: Path, shipped: Path) -> None:
    assert refusal(tmp_path) == (
        f"{tmp_path} is a folder; expected a recipe file (YAML), or a name from: gdetkd recipe list"
    )


def test_a_file_that_cannot_be_opened(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: object, **kwargs: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", denied)
    assert refusal(recipe) == f"cannot read {recipe}: Permission denied"


# --------------------------------------------------------------------------------------------------------- --data


def test_data_from_a_recipe_or_a_folder(recipe: Path, tmp_path: Path) -> None:
    assert load_data(str(recipe)) == SyntheticData()
    (tmp_path / "val.json").write_text("{}")
    assert load_data(str(tmp_path)) == CocoData(format="coco", root=tmp_path)
