"""The view that CoTTA, RoTTA and ROID learn from, one change at a time."""

import colorsys
import math

import pytest
import torch

import tta_lightning.methods.augment as module
from tests.networks import make_batches
from tta_lightning.methods.augment import augment


def turn_hue(images, turns):
    """Hue of each pixel turned, by the standard library."""
    turned = torch.empty_like(images)
    for y in range(images.shape[2]):
        for x in range(images.shape[3]):
            hue, saturation, value = colorsys.rgb_to_hsv(*images[0, :, y, x].tolist())
            pixel = colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value)
            turned[0, :, y, x] = torch.tensor(pixel)
    return turned


class TestAugment:
    def test_autocast_changes_nothing(self):
        images = make_batches(1, 2)[0]
        for seed in range(3):
            expected = augment(images, torch.Generator().manual_seed(seed))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                view = augment(images, torch.Generator().manual_seed(seed))
            assert torch.equal(view, expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_computed_in_float32(self, dtype):
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(1, 3, 224, 224, generator=generator).to(dtype)
        for seed in range(4):
            view = augment(images, torch.Generator().manual_seed(seed))
            expected = augment(images.float(), torch.Generator().manual_seed(seed))
            assert view.isfinite().all()
            assert torch.equal(view, expected.to(dtype))

    def test_range_shape_and_kind(self):
        for shape, dtype in (((4, 3, 32, 32), torch.float32), ((2, 3, 9, 14), torch.float64)):
            generator = torch.Generator().manual_seed(0)
            images = torch.rand(shape, generator=generator, dtype=dtype) * 1.4 - 0.2
            kept = images.clone()
            for _ in range(10):
                view = augment(images, generator)
                assert view.shape == images.shape
                assert view.dtype == dtype
                assert view.min() >= 0
                assert view.max() <= 1
            assert torch.equal(images, kept)

    def test_the_generator_decides(self):
        images = make_batches(1, 2)[0]
        views = [augment(images, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
        assert torch.equal(views[0], views[1])
        assert not torch.equal(views[0], views[2])

    def test_flips_half_of_the_views_and_all_of_a_batch(self):
        images = torch.zeros(3, 3, 32, 32)
        images[..., 16:] = 1.0  # bright on the right
        generator, flipped = torch.Generator().manual_seed(0), 0
        for _ in range(100):
            view = augment(images, generator)
            right = (view[..., 20:] - view[..., :12]).mean(dim=(1, 2, 3)) > 0
            assert right.all() or not right.any()
            flipped += int(not right[0])
        assert 30 <= flipped <= 70  # four standard deviations

    def test_a_grey_image_shows_the_factors(self):
        # Of a uniform grey image geometry and blur leave nothing: brightness b, then gamma g, or
        # the other way round, give (0.3 b)^g or b 0.3^g; contrast mixes with the mean: no change.
        images = torch.full((1, 3, 32, 32), 0.3)
        generator = torch.Generator().manual_seed(0)
        views = torch.stack([augment(images, generator) for _ in range(400)])
        means = views.mean(dim=(1, 2, 3, 4))
        assert means.min() >= (0.3 * 0.6) ** 1.3 - 0.002
        assert means.max() <= 1.4 * 0.3**0.7 + 0.002
        assert means.min() < 0.15
        assert means.max() > 0.50
        assert views.flatten(1).std(dim=1).mean().item() == pytest.approx(0.005, rel=0.02)

    @pytest.mark.parametrize("end", [0, 1])
    @pytest.mark.parametrize("way", range(5))
    def test_each_change_of_colour(self, way, end):
        generator = torch.Generator().manual_seed(5)
        images = torch.rand(1, 3, 4, 5, generator=generator, dtype=torch.float64)
        grey = (torch.tensor([0.2989, 0.587, 0.114])[:, None, None] * images).sum(1, keepdim=True)
        low, high = [(0.6, 1.4), (0.7, 1.3), (0.5, 1.5), (-0.06, 0.06), (0.7, 1.3)][way]
        by = high if end else low
        expected = [
            by * images,
            by * images + (1 - by) * grey.mean(),
            by * images + (1 - by) * grey,
            turn_hue(images, by),
            images**by,
        ][way].clamp(0, 1)
        strength = [0.5] * 5  # in the middle nothing changes
        strength[way] = end
        changed = module._jitter(images, [0.1, 0.2, 0.3, 0.4, 0.5], strength)
        torch.testing.assert_close(changed, expected, rtol=0, atol=1e-6)

    def test_the_changes_of_colour_are_shuffled(self):
        images = torch.full((1, 3, 2, 2), 0.3)
        strength = [1.0, 0.5, 0.5, 0.5, 1.0]  # brightness 1.4, gamma 1.3
        first = module._jitter(images, [0.1, 0.2, 0.3, 0.4, 0.5], strength)
        last = module._jitter(images, [0.9, 0.2, 0.3, 0.4, 0.5], strength)
        torch.testing.assert_close(first, torch.full_like(images, (1.4 * 0.3) ** 1.3))
        torch.testing.assert_close(last, torch.full_like(images, 1.4 * 0.3**1.3))

    def test_edges_are_repeated_and_never_black(self):
        images = torch.ones(1, 3, 32, 32)
        generator = torch.Generator().manual_seed(0)
        for _ in range(50):  # brightness alone darkens white: the same everywhere
            view = augment(images, generator)
            assert view.min() > 0.6 - 0.03
            assert view.amax() - view.amin() < 0.05

    def test_shifts_rotates_and_scales_within_bounds(self):
        images = torch.zeros(1, 3, 64, 64)  # two blots, 28 px apart, in the middle
        images[..., 30:34, 16:20] = 1.0
        images[..., 30:34, 44:48] = 1.0
        generator, grid = torch.Generator().manual_seed(0), torch.arange(64.0) - 31.5
        shifts, angles, scales = [], [], []
        for _ in range(200):
            weight = (augment(images, generator)[0].mean(0) - 0.05).clamp(min=0)
            left, right = weight.clone(), weight.clone()
            left[:, 32:], right[:, :32] = 0, 0
            ends = [
                torch.stack([(w.sum(d) * grid).sum() / w.sum() for d in (0, 1)])
                for w in (left, right)
            ]
            x, y = (ends[1] - ends[0]).tolist()
            shifts.append((ends[0] + ends[1]).abs() / 2)
            angles.append(math.degrees(math.atan2(y, x)))
            scales.append(math.hypot(x, y) / 28)
        reach = torch.stack(shifts).amax(dim=0)
        assert (reach > 6.5).all()  # 1/16 of the padded side of 128 px is 8 px
        assert (reach < 8.5).all()
        assert -15.6 < min(angles) < -13
        assert 13 < max(angles) < 15.6
        assert 0.88 < min(scales) < 0.92
        assert 1.08 < max(scales) < 1.12

    def test_blurs_within_bounds(self, monkeypatch):
        drawn = []

        def blur(images, kernel, deviation):
            drawn.append(deviation)
            assert kernel == [5, 5]
            return images

        monkeypatch.setattr(module.F, "gaussian_blur", blur)
        generator = torch.Generator().manual_seed(0)
        for _ in range(100):
            augment(torch.zeros(1, 3, 8, 8), generator)
        assert all(down == right for down, right in drawn)
        assert 0.001 <= min(drawn)[0] < 0.02
        assert 0.48 < max(drawn)[0] <= 0.5

    def test_without_blur_and_noise_the_same_numbers_are_drawn(self):
        """The view is that of the full augmentation but for its last two changes."""
        images = torch.zeros(2, 3, 16, 16)
        images[:, :, 6:10, 6:10] = 1.0
        for seed in range(8):
            full, plain = (
                augment(images, torch.Generator().manual_seed(seed), blur_and_noise=both)
                for both in (True, False)
            )
            moved = (full - plain).abs()
            assert 0 < moved.mean() < 0.05
            assert torch.equal(plain[0], plain[1])  # no noise of its own
            assert not torch.equal(full[0], full[1])

    def test_padding_reflects_where_it_is_asked_to(self):
        """A white edge is repeated into the padding, or seen once more in the mirror."""
        images = torch.zeros(1, 3, 32, 32)
        images[..., :2] = 1.0
        white = {
            padding: sum(
                augment(images, torch.Generator().manual_seed(seed), padding, False).mean()
                for seed in range(40)
            )
            for padding in ("edge", "reflect")
        }
        assert white["reflect"] < 0.9 * white["edge"]
