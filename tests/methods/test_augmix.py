"""The views of MEMO against Pillow, one view and one operation after the other."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import RandomResizedCrop

from tta_lightning.methods import augmix as augmix_module
from tta_lightning.methods.augmix import OPERATIONS, augmix, draw

BILINEAR = Image.Resampling.BILINEAR
SIZES = pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])


def eight_bits(height, width, seed=0, low=0, high=256):
    """Random pixels [H, W, 3] and the same as an image [3, H, W] in [0, 1]."""
    pixels = np.random.default_rng(seed).integers(low, high, (height, width, 3), dtype=np.uint8)
    return pixels, torch.from_numpy(pixels).permute(2, 0, 1).double() / 255


def by_pillow(name, picture, level, sign):
    """An operation as AugMix defines it, 10 being the strongest level."""
    width, height = picture.size

    def affine(*numbers):
        return picture.transform(
            (width, height), Image.Transform.AFFINE, numbers, BILINEAR, fillcolor=(128,) * 3
        )

    match name:
        case "autocontrast":
            return ImageOps.autocontrast(picture)
        case "equalize":
            return ImageOps.equalize(picture)
        case "posterize":
            return ImageOps.posterize(picture, 4 - int(level * 4 / 10))
        case "solarize":
            return ImageOps.solarize(picture, 256 - int(level * 256 / 10))
        case "rotate":
            return picture.rotate(sign * int(level * 30 / 10), BILINEAR, fillcolor=(128,) * 3)
        case "shear_x":
            return affine(1, sign * level * 0.3 / 10, 0, 0, 1, 0)
        case "shear_y":
            return affine(1, 0, 0, sign * level * 0.3 / 10, 1, 0)
        case "translate_x":
            return affine(1, 0, sign * int(level * (width / 3) / 10), 0, 1, 0)
        case "translate_y":
            return affine(1, 0, 0, 0, 1, sign * int(level * (height / 3) / 10))
    raise AssertionError(name)


def mixed_by_pillow(picture, drawn, view):
    """The mixture of a view, from its crop, in [0, 1]."""
    mixture = 0.0
    for chain in range(3):
        made = picture
        for place in range(drawn.lengths[view, chain]):
            at = (view, chain, place)
            made = by_pillow(
                OPERATIONS[drawn.kinds[at]], made, drawn.levels[at], int(drawn.signs[at])
            )
        mixture = mixture + drawn.weights[view, chain] * np.asarray(made) / 255
    share = drawn.shares[view]
    return share * np.asarray(picture) / 255 + (1 - share) * mixture


@SIZES
def test_views_are_those_of_pillow(height, width):
    pixels, image = eight_bits(height, width)
    views = augmix(image, 40, np.random.default_rng([3, 5]))
    drawn = draw(40, height, width, np.random.default_rng([3, 5]), "pad")
    padded = ImageOps.expand(
        Image.fromarray(pixels), border=(width // 8, height // 8), fill=(0, 0, 0)
    )
    assert views.shape == (40, 3, height, width)
    for view, found in enumerate(views):
        top, left, high, wide = drawn.boxes[view].tolist()
        picture = padded.crop((left, top, left + wide, top + high))
        if drawn.flips[view]:
            picture = ImageOps.mirror(picture)
        expected = torch.from_numpy(mixed_by_pillow(picture, drawn, view)).permute(2, 0, 1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@SIZES
def test_views_of_resized_crops(height, width):
    """Pillow and torchvision resize to within a level of each other."""
    pixels, image = eight_bits(height, width)
    drawn = draw(20, height, width, np.random.default_rng([3, 5]), "resized")
    as_uint8 = torch.from_numpy(pixels).permute(2, 0, 1)
    crops = augmix_module._cropped(as_uint8, drawn, "resized")
    views = augmix(image, 20, np.random.default_rng([3, 5]), "resized")
    for view, (crop, found) in enumerate(zip(crops, views, strict=True)):
        top, left, high, wide = drawn.boxes[view].tolist()
        box = (left, top, left + wide, top + high)
        picture = Image.fromarray(pixels).crop(box).resize((width, height), BILINEAR)
        if drawn.flips[view]:
            picture = ImageOps.mirror(picture)
        ours = crop.permute(1, 2, 0).numpy()
        assert np.abs(ours.astype(int) - np.asarray(picture).astype(int)).max() <= 1
        expected = mixed_by_pillow(Image.fromarray(ours), drawn, view)
        expected = torch.from_numpy(expected).permute(2, 0, 1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("values", [(0, 256), (60, 140), (77, 78), (0, 2)])
def test_operations_are_those_of_pillow(name, values):
    """Also of a flat image, and at levels and sizes that no view of a small image has."""
    height, width = 96, 64
    pixels, _ = eight_bits(height, width, 1, *values)
    if name != "autocontrast":  # it is to see flat images
        pixels[:40] = pixels[:40] // 2
    levels, signs = np.linspace(0.1, 0.999, 6) ** 0.9, np.array([1, -1, 1, -1, 1, -1])
    images = torch.from_numpy(pixels).permute(2, 0, 1).expand(6, -1, -1, -1)
    found = augmix_module._operate(name, images, levels, signs)
    assert found.dtype == torch.uint8
    for made, level, sign in zip(found, levels, signs, strict=True):
        expected = by_pillow(name, Image.fromarray(pixels), float(level), int(sign))
        assert np.array_equal(made.permute(1, 2, 0).numpy(), np.asarray(expected))


class TestDraws:
    """Each bound on a frequency or a mean is five standard deviations away."""

    COUNT = 4000

    def drawn(self, crop="pad", height=32, width=32):
        return draw(self.COUNT, height, width, np.random.default_rng(0), crop)

    def test_each_operation_and_length_is_as_likely(self):
        drawn = self.drawn()
        for numbers, values in ((drawn.kinds, range(9)), (drawn.lengths, (1, 2, 3))):
            counts = np.array([(numbers == value).sum() for value in values])
            share = 1 / len(counts)
            assert counts.sum() == numbers.size
            spread = (numbers.size * share * (1 - share)) ** 0.5
            assert np.abs(counts - share * numbers.size).max() < 5 * spread

    def test_levels_and_signs(self):
        drawn = self.drawn()
        assert 0.1 <= drawn.levels.min() < 0.101
        assert 0.999 < drawn.levels.max() < 1
        assert abs(drawn.levels.mean() - 0.55) < 5 * (0.9 / 12**0.5) / drawn.levels.size**0.5
        assert set(np.unique(drawn.signs)) == {-1, 1}
        assert abs(drawn.signs.mean()) < 5 / drawn.signs.size**0.5
        assert abs(drawn.flips.mean() - 0.5) < 2.5 / self.COUNT**0.5

    def test_weights_are_uniform_on_the_simplex_and_shares_between_0_and_1(self):
        drawn = self.drawn()
        np.testing.assert_allclose(drawn.weights.sum(axis=1), 1)
        np.testing.assert_allclose(drawn.weights.mean(axis=0), 1 / 3, atol=0.02)
        np.testing.assert_allclose(drawn.weights.var(axis=0), 1 / 18, atol=0.01)
        assert abs(drawn.shares.mean() - 0.5) < 0.023
        assert abs(drawn.shares.var() - 1 / 12) < 0.006

    def test_shifts(self):
        boxes = self.drawn(height=24, width=40).boxes
        assert set(boxes[:, 0]) == set(range(7))  # 3 px on each side
        assert set(boxes[:, 1]) == set(range(11))  # 5 px
        assert (boxes[:, 2:] == [24, 40]).all()

    @pytest.mark.parametrize(("height", "width"), [(224, 224), (100, 150)])
    def test_boxes_fit_and_have_the_published_areas_and_ratios(self, height, width):
        boxes = self.drawn("resized", height, width).boxes
        top, left, high, wide = boxes.T
        assert (boxes[:, :2] >= 0).all()
        assert (top + high).max() == height
        assert (left + wide).max() == width
        assert top.min() == left.min() == 0
        area, ratio = high * wide / (height * width), wide / high
        assert 0.075 < area.min() < 0.1
        assert ratio.min() > 0.72
        assert ratio.max() < 1.38
        in_the_middle = (top + high / 2) / height, (left + wide / 2) / width
        assert all(abs(places.mean() - 0.5) < 0.02 for places in in_the_middle)
        slack = height - high
        assert ((top == slack) & (slack > 20)).any()  # the last place is reached as well

    @pytest.mark.parametrize(("height", "width"), [(224, 224), (100, 250)])
    def test_boxes_are_those_of_torchvision(self, height, width):
        torch.manual_seed(0)
        image = torch.zeros(3, height, width)
        theirs = np.array(
            [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(1500)]
        )
        ours = self.drawn("resized", height, width).boxes
        for column in range(4):
            for share in (0.1, 0.25, 0.5, 0.75, 0.9):
                both = [np.quantile(boxes[:, column], share) for boxes in (ours, theirs)]
                assert abs(both[0] - both[1]) < 0.06 * width, (column, share)

    @pytest.mark.parametrize(
        ("height", "width", "box"),
        [
            (1, 100, [0, 49, 1, 1]),
            (2, 100, [0, 48, 2, 3]),
            (100, 2, [48, 0, 3, 2]),
            (300, 3, [148, 0, 4, 3]),
        ],
    )
    def test_a_central_box_where_none_fits(self, height, width, box):
        """Eight hundredths of such an area are wider or higher than the image at any ratio."""
        boxes = self.drawn("resized", height, width).boxes
        assert (boxes == box).all()


def views_of(image, seed=0, crop="pad"):
    return augmix(image, 6, np.random.default_rng(seed), crop)


class TestViews:
    @pytest.mark.parametrize("crop", ["pad", "resized"])
    def test_are_drawn_by_the_generator_alone(self, crop):
        _, image = eight_bits(32, 32)
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        state, legacy = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
        kept = image.clone()
        first = views_of(image, 0, crop)
        assert torch.equal(torch.get_rng_state(), state)
        assert np.array_equal(np.random.get_state()[1], legacy[1])  # noqa: NPY002
        assert torch.equal(first, views_of(image, 0, crop))
        assert not torch.equal(first, views_of(image, 1, crop))
        assert torch.equal(image, kept)
        assert len({view.numpy().tobytes() for view in first}) == 6

    def test_keep_to_the_range_whatever_the_image(self):
        image = 3 * torch.randn(3, 32, 32)
        views = views_of(image)
        assert views.min() >= 0
        assert views.max() <= 1
        assert torch.equal(views, views_of(image.clamp(0, 1)))

    def test_round_to_eight_bits(self):
        _, image = eight_bits(32, 32)
        nudged = (image + 0.4 / 255).clamp(0, 1)
        assert torch.equal(views_of(image), views_of(nudged))
        nudged = (image + 0.6 / 255).clamp(0, 1)
        assert not torch.equal(views_of(image), views_of(nudged))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_have_the_dtype_of_the_image(self, dtype):
        pixels = (torch.arange(32 * 32 * 3).view(3, 32, 32) % 2).float()  # 0 and 1
        views = views_of(pixels.to(dtype))
        assert views.dtype == dtype
        assert torch.equal(views, views_of(pixels).to(dtype))  # rounded once

    def test_are_not_rounded_by_autocast(self):
        image = torch.rand(3, 32, 32)
        expected = views_of(image)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(views_of(image), expected)

    def test_have_no_graph(self):
        assert not views_of(torch.rand(3, 32, 32, requires_grad=True)).requires_grad
