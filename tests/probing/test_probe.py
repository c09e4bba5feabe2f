"""Probing finds the pyramid of unknown networks: a small twin of each kind of detector."""

from __future__ import annotations

import pytest
import torch
from forms import FORMATS, SIZE, build, run
from token_twins import KeysLikeAMap, StatisticsLikeAMap
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad
from twins import (
    DownToOneCell,
    Functional,
    NoNeck,
    OneConvolutionHeads,
    OneLevel,
    PatchMerging,
    PlainTransformer,
    Queries,
    SharedHead,
    Smoothed,
    Stems,
    TokenDecoder,
    Tokens,
    TokensAlone,
    TwoWay,
    Unused,
)

from gdetkd_cli.errors import ModelError, NoPyramidError
from gdetkd_cli.probing.formats.runner import ModuleRunner
from gdetkd_cli.probing.inputs import ModelInput
from gdetkd_cli.probing.pyramid import probe
from gdetkd_cli.probing.record import Output

NOT_SCRIPTED = (
    Functional,
    TwoWay,
    OneConvolutionHeads,
    Tokens,
    PatchMerging,
    TokenDecoder,
    Stems,
    Smoothed,
)
CALLS = {"exported": "(1, 3, H, W) tensor", "onnx": "(1, 3, H, W) tensor"}
# class -> channels and strides of its levels
TWINS: dict[type[nn.Module], list[tuple[int, int]]] = {
    SharedHead: [(16, 8), (16, 16), (16, 32)],
    TwoWay: [(8, 8), (12, 16), (16, 32)],
    OneConvolutionHeads: [(8, 8), (12, 16), (16, 32)],
    NoNeck: [(8, 8), (12, 16), (16, 32)],
    OneLevel: [(16, 32)],
    Functional: [(8, 8), (10, 16)],
    Tokens: [(12, 16), (16, 32)],
    PatchMerging: [(12, 8), (12, 16), (12, 32)],
    TokenDecoder: [(12, 8), (12, 16), (12, 32)],
    Stems: [(8, 8), (12, 16), (16, 32)],
    Smoothed: [(6, 8), (6, 16), (6, 32)],
    Unused: [(16, 32)],
    Queries: [(10, 32)],
    PlainTransformer: [(10, 16)],
    TokensAlone: [(12, 16)],
    KeysLikeAMap: [(10, 64)],
    StatisticsLikeAMap: [(12, 8), (12, 16), (12, 32)],
}
# A frozen graph does not contain module names, so the outputs of the head's stems are the levels.
FROZEN: dict[type[nn.Module], list[tuple[int, int]]] = {Stems: [(6, 8), (6, 16), (6, 32)]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.__name__)
def test_every_kind_in_every_format(twin: type[nn.Module], form: str) -> None:
    if form == "scripted" and twin in NOT_SCRIPTED:
        pytest.skip("TorchScript cannot script this model")
    found = run(FORMATS[form](build(twin)))
    expected = FROZEN.get(twin, TWINS[twin]) if form == "frozen" else TWINS[twin]

    assert [(level.channels, level.geometry.stride) for level in found.levels] == [
        (channels, pytest.approx((stride, stride), rel=1e-3)) for channels, stride in expected
    ]
    assert [level.shape for level in found.levels] == [(192 // stride, 256 // stride) for _, stride in expected]
    assert found.call.name == CALLS.get(form, "(N, 3, H, W) tensor")
    assert found.region_embedding is None


def test_levels_are_the_necks_outputs() -> None:
    assert [level.name for level in run(build(SharedHead)).levels] == ["neck.out3", "neck.out4", "neck.out5"]


def test_levels_are_the_heads_maps_not_the_bodys() -> None:
    """The bottom-up path's maps, not those of the top-down path or of the body."""
    model = build(TwoWay)
    kept: dict[str, Tensor] = {}
    for name in ("up3", "n4", "n5"):
        getattr(model, name).register_forward_hook(lambda _, __, out, name=name: kept.update({name: out}))
    found = run(model)

    assert [level.shape for level in found.levels] == [tuple(kept[name].shape[-2:]) for name in ("up3", "n4", "n5")]
    assert [level.name for level in found.levels] == ["up3.last.2", "n4.last.2", "n5.last.2"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["eager", "traced", "frozen"])
def test_a_level_of_one_cell_counts_and_an_average_does_not(form: str) -> None:
    fine, single = run(FORMATS[form](build(DownToOneCell))).levels

    assert (fine.channels, fine.shape, fine.geometry.stride) == (16, (6, 8), pytest.approx((32, 32), rel=1e-3))
    assert fine.geometry.offset == pytest.approx((0.5, 0.5), abs=0.1)
    assert (single.channels, single.shape) == (8, (1, 1))
    assert single.geometry.offset == pytest.approx((0.5 + 2.5 * 32, 0.5 + 3.5 * 32), abs=0.1)  # the window's middle


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["eager", "traced", "onnx"])
def test_cells_among_tokens(form: str) -> None:
    model = build(TokensAlone)
    converted = FORMATS[form](model)
    runner = ModuleRunner(converted) if isinstance(converted, nn.Module) else converted
    (level,) = probe(runner, SIZE, ModelInput()).levels
    image = torch.rand(3, *SIZE)
    network_input, (value,) = runner.read(run(converted).call, [image], [level.address])

    expected = model.tokens(image[None])[:, 2 : 2 + 12 * 16].transpose(1, 2).unflatten(2, (12, 16))
    torch.testing.assert_close(level.as_map(value, network_input.shape[-2:]), expected, rtol=1e-4, atol=1e-5)
    assert level.geometry.offset == pytest.approx((8, 8), abs=0.1)


class Letterbox(nn.Module):
    """Resizes to fit 128 x 128 pixels, and centres the image there."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: list[Tensor]) -> Tensor:
        batch = []
        for image in images:
            scale = 128 / max(image.shape[-2:])
            height, width = round(image.shape[-2] * scale), round(image.shape[-1] * scale)
            small = interpolate(image[None], size=(height, width), mode="bilinear", antialias=True)[0]
            top, left = (128 - height) // 2, (128 - width) // 2
            batch.append(pad(small, (left, 128 - width - left, top, 128 - height - top), value=0.5))
        return self.network(torch.stack(batch))


def test_geometry_through_a_letterbox() -> None:
    found = run(Letterbox(build(SharedHead)).eval())

    assert found.call.name == "list of (3, H, W) images"
    for level, stride in zip(found.levels, (8, 16, 32), strict=True):
        assert level.geometry.stride == pytest.approx((2 * stride, 2 * stride), rel=0.01)
        # Cell 0 is centred on the first pixel of a 128-pixel square, 16 of whose rows lie above the image.
        assert level.geometry.offset == pytest.approx((1 - 32, 1), abs=0.05 * stride)


@pytest.mark.parametrize("size", [(192, 256), (300, 200), (97, 131)])
def test_offsets_of_windows_by_hand(size: tuple[int, int]) -> None:
    """A 2 x 2 pool moves the first cell's centre by half a pixel; a valid convolution by its margin."""

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 5), nn.Conv2d(4, 4, 4, stride=4)
            self.head = nn.ModuleList(nn.Conv2d(4, 2, 1) for _ in range(2))

        def forward(self, x: Tensor) -> list[Tensor]:
            fine = torch.max_pool2d(self.a(x), 2)
            return [head(level).flatten(2) for head, level in zip(self.head, [fine, self.b(fine)], strict=True)]

    fine, coarse = run(build(Windows), size).levels
    assert fine.geometry.stride == pytest.approx((2, 2), rel=1e-3)
    assert fine.geometry.offset == pytest.approx((3, 3), abs=0.02)  # pixels 2 and 3 of 5-pixel windows
    assert coarse.geometry.stride == pytest.approx((8, 8), rel=1e-3)
    assert coarse.geometry.offset == pytest.approx((6, 6), abs=0.02)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", [form for form in FORMATS if form != "scripted"])
def test_explicit_padding_by_hand(form: str) -> None:
    """Two cells before and one behind, then a window of 4 in steps of 4: cell 0 is centred on the corner."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 4, stride=4), nn.Conv2d(4, 4, 3, stride=2)
            self.head = nn.ModuleList(nn.Conv2d(4, 2, 1) for _ in range(2))

        def forward(self, x: Tensor) -> list[Tensor]:
            fine = self.a(pad(x, (2, 1, 2, 1)))
            coarse = self.b(pad(fine, (1, 1, 1, 1)))
            return [head(level).flatten(2) for head, level in zip(self.head, [fine, coarse], strict=True)]

    fine, coarse = run(FORMATS[form](build(Padded))).levels
    assert fine.geometry.stride == pytest.approx((4, 4), rel=1e-3)
    assert fine.geometry.offset == pytest.approx((0, 0), abs=0.02)
    assert coarse.geometry.stride == pytest.approx((8, 8), rel=1e-3)
    assert coarse.geometry.offset == pytest.approx((0, 0), abs=0.02)


def test_the_runners_up_are_the_bodys_maps() -> None:
    found = run(build(TwoWay))

    assert found.confidence == 0.95
    assert [names for names, _ in found.alternatives] == [("body.c3.2", "body.c4.2", "body.c5.2")]
    shared = run(build(SharedHead))
    assert shared.confidence == 0.95
    assert any("body's last map" in why for _, why in shared.alternatives)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("form", "names"),
    [
        ("eager", ("body.c4.2", "body.c3.2")),
        ("exported", ("silu_2", "silu_1")),
        ("traced", ("silu:2", "silu:1")),
    ],
)
def test_chosen_levels(form: str, names: tuple[str, ...]) -> None:
    model = build(TwoWay)
    runner = FORMATS[form](model)
    runner = runner if form == "exported" else ModuleRunner(runner)
    found = probe(runner, SIZE, ModelInput(), names)

    assert [level.name for level in found.levels] == [names[1], names[0]]  # fine to coarse
    assert [level.cells.stride for level in found.levels] == [(8, 8), (16, 16)]
    assert (found.reason, found.confidence, found.alternatives) == ("chosen by you", 1.0, ())
    image = torch.rand(3, *SIZE)
    with torch.no_grad():
        c3, c4, _ = model.body(image[None])
    _, maps = runner.read(found.call, [image], [level.address for level in found.levels])
    for ours, theirs in zip(maps, (c3, c4), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore")
def test_invalid_choices() -> None:
    runner = ModuleRunner(build(SharedHead))
    with pytest.raises(ModelError, match=r"no value named 'neck\.out9'; similar names: neck\.out\d"):
        probe(runner, SIZE, ModelInput(), ["neck.out9"])
    with pytest.raises(ModelError, match=r"3 values are named 'tower\.0'; .* by its call: convolution:\d+, "):
        probe(ModuleRunner(torch.jit.script(build(SharedHead)).eval()), SIZE, ModelInput(), ["tower.0"])
    with pytest.raises(NoPyramidError, match=r"of shape 1 x 10 x \d+, is not a feature map"):
        probe(runner, SIZE, ModelInput(), ["cat:3"])


def test_the_second_call_and_the_elements_of_a_tuple_have_names() -> None:
    assert Output("neck", 0, 1, 3).name == "neck.1"
    assert Output("neck", 1, 0, 1).name == "neck:1"
    assert Output("neck", 0, 0).name == "neck"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("form", "names", "modules"),
    [
        ("eager", ["up3.last.2", "n4.last.2", "n5.last.2"], ["", "", ""]),
        ("traced", ["silu:9", "silu:13", "silu:17"], ["after up3.last.1", "after n4.last.1", "after n5.last.1"]),
        ("frozen", ["silu:9", "silu:13", "silu:17"], ["", "", ""]),
        ("exported", ["silu_9", "silu_13", "silu_17"], ["up3.last.2", "n4.last.2", "n5.last.2"]),
    ],
)
def test_modules_of_levels(form: str, names: list[str], modules: list[str]) -> None:
    found = run(FORMATS[form](build(TwoWay)))
    assert [(level.name, level.module) for level in found.levels] == list(zip(names, modules, strict=True))


@pytest.mark.filterwarnings("ignore")
def test_levels_of_an_exported_program_chosen_by_module() -> None:
    runner = FORMATS["exported"](build(TwoWay))
    chosen = probe(runner, SIZE, ModelInput(), ["n5", "up3.last", "n4.last.2"])
    assert [level.address for level in chosen.levels] == [level.address for level in run(runner).levels]
    with pytest.raises(ModelError, match=r"3 values are named 'tower'; choose one by its call: "):
        probe(FORMATS["exported"](build(SharedHead)), SIZE, ModelInput(), ["tower"])
