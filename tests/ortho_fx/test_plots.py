"""The palette: a colour for each basis, apart from the others for every reader."""

import itertools

import numpy as np
import pytest

from ortho_fx.bases import OURS
from ortho_fx.plots import STOCK, colour_of, line_styles

COLOURS = {basis.name: basis.colour for basis in OURS}

# What readers without one kind of cone see of linear red, green and blue: Machado, Oliveira and Fernandes, "A
# physiologically-based model for simulation of color vision deficiency", 2009, at full severity.
SIGHT = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
# Ottosson, "A perceptual color space for image processing", 2020: linear RGB to cones, and their roots to Oklab.
CONES = [
    [0.41222147, 0.53633254, 0.05144599],
    [0.21190350, 0.68069955, 0.10739696],
    [0.08830246, 0.28171884, 0.62997870],
]
OKLAB = [
    [0.21045426, 0.79361779, -0.00407205],
    [1.97799850, -2.42859221, 0.45059371],
    [0.02590404, 0.78277177, -0.80867577],
]


def linear(colour):
    values = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def seen(colour, sight):
    return OKLAB @ np.cbrt(CONES @ np.clip(sight @ linear(colour), 0, 1))


def cie_lab(colour, sight):
    """CIE 1976 L*a*b* under D65, from the XYZ of linear sRGB."""
    xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    relative = xyz @ np.clip(sight @ linear(colour), 0, 1) / [0.9505, 1.0, 1.089]
    f = np.where(relative > (6 / 29) ** 3, np.cbrt(relative), relative * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize(
    ("sight", "smallest"), [("normal", 19.0), ("protanopia", 9.1), ("deuteranopia", 12.9), ("tritanopia", 16.1)]
)
def test_the_smallest_cie_distance_of_two_colours(sight, smallest):
    # In Delta E of 1976; a difference of about 2.3 is just seen.
    pairs = itertools.combinations([*COLOURS.values(), STOCK], 2)
    distances = [np.linalg.norm(cie_lab(one, SIGHT[sight]) - cie_lab(other, SIGHT[sight])) for one, other in pairs]
    assert min(distances) == pytest.approx(smallest, abs=0.05)


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_are_apart_for_every_reader(sight):
    # The closest two of Okabe and Ito's colours, green and purple, are 0.076 apart.
    for one, other in itertools.combinations([*COLOURS.values(), STOCK], 2):
        assert np.linalg.norm(seen(one, SIGHT[sight]) - seen(other, SIGHT[sight])) > 0.075, (one, other)


@pytest.mark.parametrize("colour", [*COLOURS.values(), STOCK])
def test_a_line_is_seen_on_white(colour):
    assert 1.05 / (linear(colour) @ [0.2126, 0.7152, 0.0722] + 0.05) > 2.2


def test_labels_have_the_colour_of_their_basis():
    for label in ("tropical", "tropical 5", "tropical:5,lr=0.1", "tropical5"):
        assert colour_of(label) == COLOURS["tropical"]
    assert colour_of("tropical_rational:6") == COLOURS["tropical_rational"]
    assert colour_of("gelu") == colour_of("relu,lr=0.1") == colour_of("") == STOCK


def test_lines_of_one_colour_differ():
    styles = line_styles(["gelu", *(f"fourier:{n}" for n in range(1, 13)), "hermite:3"])
    assert len({str(style) for style in styles}) == 14
    assert [styles[place]["color"] for place in (0, 1, 6, 13)] == [
        STOCK,
        COLOURS["fourier"],
        COLOURS["fourier"],
        COLOURS["hermite"],
    ]
    assert styles[7] == {"color": "#66C5AB", "ls": "-"}
