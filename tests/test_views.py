"""The augmentations of MT3 against naive ones, one pixel at a time, and the statistics of draws."""

import colorsys
import math

import pytest
import torch
from torch.nn import functional as F

from tta_lightning.errors import InputError
from tta_lightning.views import (
    ViewOptions,
    crop_and_resize,
    generator,
    grey,
    jitter,
    shift_together,
    ssl_views,
    supervised_views,
)

OPTIONS = ViewOptions()


def random_images(*shape, seed=0, dtype=torch.float64):
    draws = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=draws, dtype=torch.float64).to(dtype)


# Crops --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(12, 12), (9, 14), (14, 9)])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_every_crop_is_resized_as_by_interpolate(height, width, dtype, error):
    (image,) = random_images(1, 3, height, width, dtype=dtype)
    places = [
        (top, left, side)
        for side in range(1, min(height, width) + 1)
        for top in range(height - side + 1)
        for left in range(width - side + 1)
    ]
    top, left, side = torch.tensor(places, dtype=torch.float64).T
    ours = crop_and_resize(image.expand(len(places), -1, -1, -1), top, left, side)
    assert ours.dtype == dtype
    for view, (y, x, s) in zip(ours, places, strict=True):
        crop = image[None, :, y : y + s, x : x + s]
        expected = F.interpolate(crop, (height, width), mode="bilinear", align_corners=False)
        torch.testing.assert_close(view, expected[0], rtol=0, atol=error)


def test_every_published_crop_side_at_its_corners():
    image = random_images(3, 32, 32, dtype=torch.float32)
    places = [(c, d, s) for s in range(20, 33) for c in (0, 32 - s) for d in (0, 32 - s)]
    ours = crop_and_resize(image.expand(len(places), -1, -1, -1), *torch.tensor(places).T)
    for view, (y, x, s) in zip(ours, places, strict=True):
        crop = image[None, :, y : y + s, x : x + s]
        expected = F.interpolate(crop, (32, 32), mode="bilinear", align_corners=False)
        torch.testing.assert_close(view, expected[0], rtol=0, atol=1e-5)


def test_the_whole_image_stays_bit_for_bit():
    images = random_images(2, 3, 8, 8)
    zeros = torch.zeros(2)
    assert torch.equal(crop_and_resize(images, zeros, zeros, zeros + 8), images)


@pytest.mark.parametrize("views", ["ssl", "task"])
def test_autocast_does_not_touch_the_views(views):
    images = random_images(64, 3, 16, 16, dtype=torch.float32)

    def drawn():
        if views == "ssl":
            return ssl_views(images, generator(0), OPTIONS)
        shifted = [shift_together(images, generator(n), OPTIONS) for n in range(12)]
        return torch.stack(shifted)  # two of them blurred or so

    with torch.autocast("cpu", torch.bfloat16):
        under = drawn()
    assert under.dtype == torch.float32
    assert torch.equal(under, drawn())


# Colours ------------------------------------------------------------------------------------------


def jitter_by_hand(image, brightness, contrast, saturation, hue):
    """Every pixel through the standard library, with HSV as TensorFlow extends it.

    Brightness and contrast may leave [0, 1]. Saturation is then clipped to [0, 1] after its factor,
    and a pixel without any positive channel has none.
    """
    image = (image + brightness).tolist()
    height, width = len(image[0]), len(image[0][0])
    for channel in image:
        mean = math.fsum(math.fsum(row) for row in channel) / (height * width)
        channel[:] = [[(value - mean) * contrast + mean for value in row] for row in channel]
    result = torch.empty(3, height, width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            pixel = [channel[y][x] for channel in image]
            value, spread = max(pixel), max(pixel) - min(pixel)
            # the hue knows neither shifts nor scales
            scaled = [(p - min(pixel)) / spread if spread else 0.0 for p in pixel]
            turns = (colorsys.rgb_to_hsv(*scaled)[0] + hue) % 1
            share = min(1.0, max(0.0, spread / value * saturation)) if value > 0 else 0.0
            changed = colorsys.hsv_to_rgb(turns, share, value)
            result[:, y, x] = torch.tensor(changed, dtype=torch.float64).clamp(0, 1)
    return result


@pytest.mark.parametrize(
    ("brightness", "contrast", "saturation", "hue"),
    [
        (0.0, 1.0, 1.0, 0.0),
        (0.16, 1.0, 1.0, 0.0),
        (-0.16, 1.0, 1.0, 0.0),
        (0.0, 1.16, 1.0, 0.0),
        (0.0, 0.84, 1.0, 0.0),
        (0.0, 1.0, 1.16, 0.0),
        (0.0, 1.0, 0.84, 0.0),
        (0.0, 1.0, 1.0, 0.04),
        (0.0, 1.0, 1.0, -0.04),
        (0.13, 1.14, 1.12, 0.037),
        (-0.15, 1.16, 1.16, -0.04),
        (-0.15, 0.85, 0.9, 0.02),
        (0.6, 1.9, 2.5, 0.45),  # far beyond what is drawn: most pixels leave [0, 1] in between
        (-0.6, 1.9, 2.5, -0.45),
    ],
)
def test_jitter_equals_a_naive_one(brightness, contrast, saturation, hue):
    images = random_images(2, 3, 7, 6, seed=3)
    images[0, :, 0, 0] = 0.4  # grey
    images[0, :, 0, 1] = 0.0
    images[0, :, 0, 2] = torch.tensor([0.9, 0.9, 0.1])  # two channels share the top
    images[0, :, 0, 3] = torch.tensor([0.1, 0.9, 0.9])
    images[0, :, 0, 4] = torch.tensor([0.9, 0.1, 0.9])
    images[1] = images[1] * 0.6 + torch.tensor([0.4, 0.0, 0.2]).view(3, 1, 1)
    given = [torch.full((2,), n, dtype=torch.float64) for n in (brightness, contrast)]
    given += [torch.full((2,), n, dtype=torch.float64) for n in (saturation, hue)]
    ours = jitter(images, *given)
    for image, view in zip(images, ours, strict=True):
        expected = jitter_by_hand(image, brightness, contrast, saturation, hue)
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-12)


def test_each_image_has_its_own_jitter():
    images = random_images(4, 3, 5, 5)
    amounts = random_images(4, 4, seed=1) * 0.3
    together = jitter(images, *(amounts + torch.tensor([[0.0], [1], [1], [0]])))
    for n in range(4):
        b, c, s, h = amounts[:, n].tolist()
        expected = jitter_by_hand(images[n], b, 1 + c, 1 + s, h)
        torch.testing.assert_close(together[n], expected, rtol=0, atol=1e-12)


def test_jitter_by_hand_computed_figures():
    # one pixel, so that it is the mean of its channel and contrast changes nothing
    pixel = torch.tensor([0.8, 0.4, 0.2], dtype=torch.float64).view(1, 3, 1, 1)
    one = torch.ones(1, dtype=torch.float64)
    brighter = jitter(pixel, 0.1 * one, 3 * one, one, 0 * one)
    assert brighter.flatten().tolist() == pytest.approx([0.9, 0.5, 0.3])  # added
    paler = jitter(pixel, 0 * one, one, 0.5 * one, 0 * one)  # S from 3/4 to 3/8
    assert paler.flatten().tolist() == pytest.approx([0.8, 0.6, 0.5])
    turned = jitter(pixel, 0 * one, one, one, one / 3)  # red becomes green
    assert turned.flatten().tolist() == pytest.approx([0.2, 0.8, 0.4])


def test_grey_is_the_weighted_sum():
    images = torch.eye(3, dtype=torch.float64).view(3, 3, 1, 1)
    expected = torch.tensor([0.2989, 0.587, 0.114], dtype=torch.float64)
    for channel in grey(images).flatten(1).T:
        torch.testing.assert_close(channel, expected)


# Statistics of the draws --------------------------------------------------------------------------

MANY = 1500
LUMINANCE = 0.2989 + 0.587 + 0.114  # of white: what the third of the weights leaves out


class Drawn:
    """What happened to many views, read off five images that were given the same draws.

    The draws of a view do not depend on its image. None of the values is clipped.
    """

    def __init__(self):
        one = torch.full((3, 32, 32), 0.5, dtype=torch.float64)
        colour = one * torch.tensor([1.2, 0.8, 0.6]).view(3, 1, 1)
        halves = one.clone()
        halves[:, :, 16:] = 0.4  # every crop sees both
        rows = one * (0.8 + 0.4 * torch.arange(32, dtype=torch.float64) / 32).view(32, 1)
        red, green, blue = self.views(colour)[:, :, 0, 0].T
        self.is_grey = (red == green) & (green == blue)
        self.white = 1 - (1 - LUMINANCE) * self.is_grey.double()
        self.brightness = self.views(one)[:, 0, 0, 0] / self.white - 0.5
        self.is_jittered = self.brightness.abs() > 1e-12
        seen = self.views(halves)[:, 0].flatten(1) / self.white[:, None]
        self.contrast = (seen.amax(1) - seen.amin(1)) / 0.1
        down, across = self.plain(rows), self.plain(rows.mT).mT  # ramps along the last but one
        slope = (down[:, 20, 0] - down[:, 12, 0]) / 8 / (0.2 / 32)
        self.is_flipped = slope < 0
        self.sides = 32 * slope.abs()
        first = torch.where(self.is_flipped, down[:, -1, 0], down[:, 0, 0])
        self.tops = (first - 0.4) / (0.2 / 32)
        self.widths = 32 * (across[:, 20, 0] - across[:, 12, 0]) / 8 / (0.2 / 32)
        self.lefts = (across[:, 0, 0] - 0.4) / (0.2 / 32)
        self.colours = torch.stack([red, green, blue], 1)[self.is_jittered & ~self.is_grey]

    @staticmethod
    def views(image):
        some = image.expand(100, -1, -1, -1)  # not all at once: memory is slow
        return torch.cat([ssl_views(some, generator(7, n), OPTIONS) for n in range(MANY // 100)])

    def plain(self, image):
        """Views of a grey image [3, 32, 32] with their jitter taken out again: [V, 32, 32]."""
        views = self.views(image)[:, 0] / self.white.view(-1, 1, 1)
        mean = views.mean(dim=(1, 2), keepdim=True)
        straight = (views - mean) / self.contrast.view(-1, 1, 1) + mean
        return straight - self.brightness.view(-1, 1, 1)

    def hsv(self):
        return torch.tensor(
            [colorsys.rgb_to_hsv(*pixel) for pixel in self.colours.tolist()], dtype=torch.float64
        ).T


@pytest.fixture(scope="module")
def drawn():
    return Drawn()


def assert_uniform(values, low, high):
    """No bin of eight is further from its share than luck allows, and nothing lies outside."""
    assert low <= values.min()
    assert values.max() <= high
    counts = torch.histc(values, 8, low, high)
    expected = len(values) / 8
    assert ((counts - expected).square() / expected).sum() < 24.3  # 7 degrees of freedom, p = 0.001


def test_the_crops_have_every_side_and_place(drawn):
    for found in (drawn.sides, drawn.widths, drawn.tops, drawn.lefts):
        torch.testing.assert_close(found, found.round(), rtol=0, atol=1e-6)
    sides = drawn.sides.round().long()
    assert torch.equal(sides, drawn.widths.round().long())  # squares
    counts = torch.bincount(sides, minlength=33)
    assert counts.nonzero().flatten().tolist() == list(range(20, 32))
    expected = MANY / 12
    assert ((counts[20:32] - expected).square() / expected).sum() < 31.3  # 11 degrees, p = 0.001
    for starts in (drawn.tops.round(), drawn.lefts.round()):
        for side in range(20, 32):
            places = starts[sides == side].long()
            counts = torch.bincount(places)
            assert len(counts) == 33 - side  # from the first to the last place
            expected = len(places) / len(counts)
            assert counts.min() > expected - 4 * math.sqrt(expected)
            assert counts.max() < expected + 4 * math.sqrt(expected)


@pytest.mark.parametrize(
    ("happened", "probability"), [("is_flipped", 0.5), ("is_jittered", 0.8), ("is_grey", 0.2)]
)
def test_probabilities(drawn, happened, probability):
    share = getattr(drawn, happened).double().mean().item()
    deviation = math.sqrt(probability * (1 - probability) / MANY)
    assert share == pytest.approx(probability, abs=3.5 * deviation)


def test_the_jitter_is_uniform(drawn):
    jittered = drawn.is_jittered
    assert_uniform(drawn.brightness[jittered], -0.16, 0.16)
    assert_uniform(drawn.contrast[jittered], 0.84, 1.16)
    torch.testing.assert_close(
        drawn.contrast[~jittered], torch.ones_like(drawn.contrast[~jittered])
    )
    hue, saturation, value = drawn.hsv()
    torch.testing.assert_close(value - 0.6, drawn.brightness[jittered & ~drawn.is_grey])
    plain = 0.3 / value  # brightness moves all channels, so the spread stays
    assert_uniform(saturation / plain, 0.84, 1.16)
    of_colour = colorsys.rgb_to_hsv(0.6, 0.4, 0.3)[0]
    turned = hue - of_colour
    turned = torch.where(turned > 0.5, turned - 1, turned)
    assert_uniform(turned, -0.04, 0.04)


def test_the_draws_are_independent(drawn):
    jittered = drawn.is_jittered & ~drawn.is_grey
    hue, saturation, value = drawn.hsv()
    hue = torch.where(hue > 0.5, hue - 1, hue)
    place = tuple((n + 0.5) / (33 - drawn.sides) for n in (drawn.tops, drawn.lefts))
    everywhere = (drawn.sides, *place, drawn.is_flipped, drawn.is_jittered, drawn.is_grey)
    amounts = (drawn.brightness[jittered], drawn.contrast[jittered], saturation * value, hue)
    others = (drawn.sides, *place, drawn.is_flipped)
    for fields in (everywhere, (*amounts, *(field[jittered] for field in others))):
        table = torch.stack([field.double() for field in fields])
        related = torch.corrcoef(table) - torch.eye(len(table))
        assert related.abs().max() < 4.5 / math.sqrt(table.shape[1])


def test_no_view_is_mirrored(drawn):
    assert drawn.widths.min() > 19.99  # a mirrored ramp falls
    assert drawn.sides.max() < 31.01


def test_views_are_in_range_and_of_the_shape_and_type_of_the_images():
    for dtype in (torch.float32, torch.float64):
        images = random_images(200, 3, 14, 20, dtype=dtype)
        images[:50] = images[:50].round()
        views = ssl_views(images, generator(0), OPTIONS)
        assert views.dtype == dtype
        assert views.shape == images.shape
        assert 0 <= views.min() < 0.01
        assert 0.99 < views.max() <= 1


def test_views_without_flips_are_never_upside_down():
    ramp = torch.linspace(0.3, 0.7, 32, dtype=torch.float64)[:, None].expand(3, 32, 32)
    images = ramp.expand(300, -1, -1, -1)
    never, sometimes = (
        ssl_views(images, generator(4), ViewOptions(flips=flips)) for flips in (False, True)
    )
    falls = sometimes[:, 0, 0, 0] > sometimes[:, 0, -1, 0]
    assert 100 < falls.sum() < 200
    upright = torch.where(falls.view(-1, 1, 1, 1), sometimes.flip(2), sometimes)
    torch.testing.assert_close(upright, never, rtol=0, atol=1e-13)


def test_the_options_choose_the_crop():
    ramp = torch.linspace(0.3, 0.7, 32, dtype=torch.float64)[:, None].expand(3, 32, 32)
    views = ssl_views(ramp.expand(200, -1, -1, -1), generator(4), ViewOptions((4, 6), flips=False))
    spread = views[:, 0, -1, 0] - views[:, 0, 0, 0]  # times the contrast, 0.84 to 1.16
    assert spread.max() <= 1.16 * 5 / 31 * 0.4
    assert spread.min() >= 0.84 * 3 / 31 * 0.4 * LUMINANCE


# Supervised views ---------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [1, 2])
def test_supervised_views_are_shifts_with_zeros_around(padding):
    image = random_images(3, 6, 9) + 0.1
    views = supervised_views(image.expand(600, -1, -1, -1), generator(0), padding)
    padded = torch.zeros(3, 6 + 2 * padding, 9 + 2 * padding, dtype=torch.float64)
    padded[:, padding : padding + 6, padding : padding + 9] = image
    places = [(y, x) for y in range(2 * padding + 1) for x in range(2 * padding + 1)]
    known = {padded[:, y : y + 6, x : x + 9].numpy().tobytes(): (y, x) for y, x in places}
    found = [known[view.numpy().tobytes()] for view in views]
    counts = torch.tensor([found.count(place) for place in places])
    expected = 600 / len(places)
    assert ((counts - expected).abs() < 4 * math.sqrt(expected)).all()


def test_two_pixels_are_the_published_padding():
    image = random_images(3, 6, 6)
    views = supervised_views(image.expand(50, -1, -1, -1), generator(0))
    assert torch.equal(views, supervised_views(image.expand(50, -1, -1, -1), generator(0), 2))


# The shift of a task ------------------------------------------------------------------------------


def shift_by_hand(image, key, flips=True):
    """A_task of an image [3, H, W] without its noise, and the noise's deviation."""
    up, mirror, blur, brightness, deviation = torch.rand(5, generator=generator(*key)).tolist()
    happened = [flips and up < 0.5, flips and mirror < 0.5, blur < 0.2]
    channels = image.tolist()
    if happened[0]:
        channels = [rows[::-1] for rows in channels]
    if happened[1]:
        channels = [[row[::-1] for row in rows] for rows in channels]
    if happened[2]:
        weights = [math.exp(-(d**2) / 2) for d in (-1, 0, 1)]
        weights = [w / sum(weights) for w in weights]
        height, width = len(channels[0]), len(channels[0][0])

        def at(rows, y, x):  # reflected: the pixel at the edge is not repeated
            y = height - 1 - abs(height - 1 - abs(y))
            x = width - 1 - abs(width - 1 - abs(x))
            return rows[y][x]

        channels = [
            [
                [
                    sum(
                        weights[dy + 1] * weights[dx + 1] * at(rows, y + dy, x + dx)
                        for dy in (-1, 0, 1)
                        for dx in (-1, 0, 1)
                    )
                    for x in range(width)
                ]
                for y in range(height)
            ]
            for rows in channels
        ]
    shifted = torch.tensor(channels, dtype=torch.float64) + 0.4 * brightness - 0.2
    return shifted, 0.02 * deviation, happened


@pytest.mark.parametrize("flips", [True, False])
def test_t17_all_images_of_a_task_share_one_shift(flips):
    images = 0.3 + 0.4 * random_images(4, 3, 3, 10, 12)  # nothing is clipped but for the noise
    seen, deviations = set(), []
    for number in range(40):
        shifted = shift_together(images, generator(0, number), ViewOptions(flips=flips))
        assert shifted.shape == images.shape
        noise = []
        for before, after in zip(images.flatten(0, 1), shifted.flatten(0, 1), strict=True):
            expected, deviation, happened = shift_by_hand(before, (0, number), flips)
            noise.append(after - expected)
        noise = torch.stack(noise)
        assert noise.std() == pytest.approx(deviation, rel=0.06)
        assert noise.abs().max() < 5.5 * deviation
        if number < 5:  # each pixel of each image has noise of its own
            related = torch.corrcoef(noise.flatten(1)) - torch.eye(len(noise))
            assert related.abs().max() < 5 / math.sqrt(360)
        deviations.append(deviation)
        seen.add(tuple(happened))
    assert len(set(deviations)) == 40  # different across tasks
    flipped = [(up, mirror) for up in (False, True) for mirror in (False, True)]
    assert {each[:2] for each in seen} == (set(flipped) if flips else {(False, False)})
    assert {each[2] for each in seen} == {False, True}


def test_t17_shifts_stay_in_range():
    images = random_images(3, 8, 3, 12, 12, dtype=torch.float32)
    brightened = [shift_together(images, generator(1, n), OPTIONS) for n in range(20)]
    for shifted in brightened:
        assert shifted.dtype == torch.float32
        assert shifted.min() >= 0
        assert shifted.max() <= 1
    assert any((shifted == 0).any() for shifted in brightened)
    assert any((shifted == 1).any() for shifted in brightened)


def test_t17_how_often_tasks_are_shifted():
    (image,) = 0.4 + 0.2 * random_images(1, 3, 4, 4)
    kinds = [image, image.flip(1), image.flip(2), image.flip(1).flip(2)]
    blurred, places, brightness = 0, [0] * 4, []
    for number in range(2000):
        shifted = shift_together(image, generator(2, number), OPTIONS)
        brightness.append((shifted - image.mean()).mean().item())
        centred = [(shifted - kind - (shifted - kind).mean()).std().item() for kind in kinds]
        if min(centred) > 0.025:  # the noise alone has at most 0.02
            blurred += 1
        else:
            places[centred.index(min(centred))] += 1
    assert blurred == pytest.approx(400, abs=4 * math.sqrt(2000 * 0.16))
    assert places == pytest.approx([400] * 4, abs=4 * math.sqrt(2000 * 0.16))
    amounts = torch.tensor(brightness)
    assert amounts.mean().abs() < 0.01
    assert amounts.std() == pytest.approx(0.4 / math.sqrt(12), rel=0.05)
    assert amounts.abs().max() < 0.22


# Seeds and arguments ------------------------------------------------------------------------------

AUGMENTATIONS = {
    "ssl": lambda images, draws: ssl_views(images, draws, OPTIONS),
    "supervised": supervised_views,
    "task": lambda images, draws: shift_together(images, draws, OPTIONS),
}


@pytest.mark.parametrize("augment", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_the_key_decides_the_views(augment):
    images = random_images(6, 3, 12, 12, dtype=torch.float32)
    before = images.clone()
    torch.manual_seed(0)
    first = augment(images, generator(3, 1, 4))
    torch.manual_seed(1)  # the global seed has no say
    assert torch.equal(augment(images, generator(3, 1, 4)), first)
    for other in ((3, 1, 5), (4, 1, 3), (3, 1), (3, 14), (3, 1, 4, 0, 1)):
        assert not torch.equal(augment(images, generator(*other)), first)
    assert torch.equal(images, before)
    with torch.inference_mode():
        assert torch.equal(augment(images, generator(3, 1, 4)), first)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # as a trainer of this precision does
    try:
        assert torch.equal(augment(images, generator(3, 1, 4)), first)
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((32, 32), (20, 31)), ((8, 8), (5, 7)), ((224, 300), (140, 223)), ((300, 224), (140, 223))],
)
def test_the_published_sides_and_those_of_other_images(shape, expected):
    assert OPTIONS.sides(torch.zeros(2, 3, *shape)) == expected


def test_the_crop_that_was_asked_for():
    assert ViewOptions((3, 8)).sides(torch.zeros(1, 3, 8, 9)) == (3, 8)
    assert ViewOptions((4, 4)).sides(torch.zeros(1, 3, 8, 9)) == (4, 4)


@pytest.mark.parametrize(
    ("crop", "shape", "message"),
    [
        ((0, 5), (32, 32), r"crop = \(0, 5\) is out of range"),
        ((-3, 5), (32, 32), r"crop = \(-3, 5\) is out of range"),
        ((31, 20), (32, 32), r"crop = \(31, 20\) is out of range"),
        ((20,), (32, 32), r"crop = \(20,\) is out of range"),
        ((20, 31, 32), (32, 32), r"crop = \(20, 31, 32\) is out of range"),
        ((20.5, 31), (32, 32), r"crop = \(20.5, 31\) is out of range"),
        (20, (32, 32), "crop = 20 is out of range"),
        ((20, 31), (28, 40), "crops of 20 to 31 px, but the images have 28 x 40 px"),
        ((20, 31), (40, 30), "crops of 20 to 31 px, but the images have 40 x 30 px"),
        (None, (1, 8), "the images have 1 x 8 px"),
    ],
)
def test_crops_that_are_not_possible(crop, shape, message):
    with pytest.raises(InputError, match=message):
        ssl_views(torch.zeros(2, 3, *shape), generator(0), ViewOptions(crop))


def test_a_shorter_key_is_another_one():
    """numpy takes the zeros at the end of a seed for nothing."""
    drawn = {float(torch.rand((), generator=generator(*key))) for key in ((0, 5), (0, 5, 0), (0,))}
    assert len(drawn) == 3
