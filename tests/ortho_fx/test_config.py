import json
from dataclasses import replace

import pytest

from ortho_fx import ExpansionConfig, OrthoFxError
from ortho_fx.bases import BASES
from ortho_fx.config import INITS, SiteConfig, configs_of


def test_degree_defaults_by_basis():
    degrees = {
        basis: ExpansionConfig(basis).degree for basis in ("hermite", "fourier", "tropical", "tropical_rational")
    }
    assert degrees == {"hermite": 3, "fourier": 5, "tropical": 5, "tropical_rational": 6}


def test_a_degree_without_a_basis_is_that_of_a_polynomial():
    assert ExpansionConfig() == ExpansionConfig(None, None) == ExpansionConfig("fourier", 5)
    assert ExpansionConfig(degree=4) == ExpansionConfig.of({"degree": 4}) == ExpansionConfig("hermite", 4)
    # A config has its basis once it is made, so another degree is one of the same basis.
    assert replace(ExpansionConfig(), degree=4) == ExpansionConfig("fourier", 4)


def test_round_trip_and_hash():
    config = ExpansionConfig("fourier", 4, "paper")
    for each in (config, ExpansionConfig("fourier", 4, tied=True)):
        assert ExpansionConfig.from_dict(each.to_dict()) == each
    assert len({config, ExpansionConfig("fourier", 4, "paper")}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"basis": "bessel"}, f"basis must be one of {', '.join(BASES)}; got 'bessel'"),
        ({"basis": "hermite", "degree": 33}, "degree of hermite must be an integer from 1 to 32; got 33"),
        ({"basis": "fourier", "degree": 0}, "degree of fourier must be an integer from 1 to 64; got 0"),
        ({"degree": 33}, "degree of hermite must be an integer from 1 to 32; got 33"),
        ({"degree": 2.5}, "degree of hermite must be an integer from 1 to 32; got 2.5"),
        ({"degree": True}, "degree of hermite must be an integer from 1 to 32; got True"),
        ({"basis": "hermite", "tied": True}, "tied is for the frequencies of fourier; hermite has none"),
        ({"basis": "tropical", "tied": True}, "tied is for the frequencies of fourier; tropical has none"),
        ({"basis": "fourier", "tied": 1}, "tied must be True or False; got 1"),
        ({"init": "zeros"}, f"init must be one of {', '.join(INITS)}, depth:L or preset:FILE; got 'zeros'"),
        ({"init": "depth:0"}, "init depth:L needs the number of layers L, from 1 to 10000; got 'depth:0'"),
        ({"init": "depth:deep"}, "init depth:L needs the number of layers L, from 1 to 10000; got 'depth:deep'"),
        (
            {"init": "depth:9", "gated": True},
            "init 'depth:9' is for layers without gates; got gated=True: use init 'stable'",
        ),
    ],
)
def test_wrong_values_are_named(arguments, message):
    with pytest.raises(OrthoFxError) as caught:
        ExpansionConfig(**arguments)
    assert str(caught.value) == message


def test_tied_frequencies_are_one_number_to_learn():
    free, tied = ExpansionConfig("fourier", 5), ExpansionConfig("fourier", 5, tied=True)
    assert (free.size, tied.size) == (16, 12)
    assert str(tied) == "fourier 5 tied"


def test_unknown_fields_and_versions_are_named():
    with pytest.raises(OrthoFxError, match=r"^unknown option 'degre'; options are basis, degree, init, gr"):
        ExpansionConfig.from_dict({"degre": 3})
    with pytest.raises(OrthoFxError, match="version 2; this release reads version 1"):
        ExpansionConfig.from_dict({"version": 2})


def test_short_forms():
    config = ExpansionConfig("hermite", 4)
    assert [ExpansionConfig.of(value) for value in (config, "hermite4", "hermite 4", config.to_dict())] == [config] * 4
    assert ExpansionConfig.of("tropical_rational") == ExpansionConfig("tropical_rational")
    with pytest.raises(OrthoFxError, match=r"^degree of hermite must be an integer from 1 to 32; got 99$"):
        ExpansionConfig.of("hermite99")


def test_a_map_is_a_config_or_maps_patterns_to_configs():
    fourier = ExpansionConfig("fourier", 4)
    assert configs_of({"basis": "fourier", "degree": 4}) == fourier
    assert configs_of({"degree": 4}) == ExpansionConfig("hermite", 4)
    assert configs_of({"act": "fourier4", "degree": fourier}) == {"act": fourier, "degree": fourier}
    assert configs_of({"act": {"basis": "fourier", "degree": 4}, "*": None}) == {"act": fourier, "*": None}


def test_the_config_of_a_site_is_read_as_it_was_written():
    channels = SiteConfig(ExpansionConfig("fourier", granularity="group:2"), 8, -1)
    frozen = SiteConfig(ExpansionConfig(clamp=2.0), form="polynomial", sizes=(("monomial_coefficients", (4,)),))
    for each in (SiteConfig(ExpansionConfig()), channels, frozen):
        assert SiteConfig.from_dict(json.loads(json.dumps(each.to_dict()))) == each


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": "8"}, "channels must be an integer; got '8'"),
        ({"channels": 7}, "7 channels do not divide into 2 groups"),
        ({"channels": None}, "granularity 'group:2' needs the number of channels"),
        ({"frozen": {"form": "waves"}}, "frozen must hold the form and the sizes of its constants; got {'form': 'wave"),
    ],
)
def test_a_wrong_config_of_a_site_is_named(change, message):
    values = SiteConfig(ExpansionConfig("fourier", granularity="group:2"), 8, -1).to_dict()
    with pytest.raises(OrthoFxError) as caught:
        SiteConfig.from_dict(values | change)
    assert str(caught.value).startswith(message)
