import pytest

from ortho_fx import ExpansionConfig, OrthoFxError


def test_degree_defaults_by_basis():
    degrees = {
        basis: ExpansionConfig(basis).degree for basis in ("hermite", "fourier", "tropical", "tropical_rational")
    }
    assert degrees == {"hermite": 3, "fourier": 5, "tropical": 5, "tropical_rational": 6}


def test_round_trip_and_hash():
    config = ExpansionConfig("fourier", 4, "paper")
    for each in (config, ExpansionConfig("fourier", 4, tied=True)):
        assert ExpansionConfig.from_dict(each.to_dict()) == each
    assert len({config, ExpansionConfig("fourier", 4, "paper")}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"basis": "bessel"}, "basis must be one of hermite, fourier, tropical, tropical_rational; got 'bessel'"),
        ({"degree": 33}, "degree of hermite must be an integer from 1 to 32; got 33"),
        ({"basis": "fourier", "degree": 0}, "degree of fourier must be an integer from 1 to 64; got 0"),
        ({"degree": 2.5}, "degree of hermite must be an integer from 1 to 32; got 2.5"),
        ({"degree": True}, "degree of hermite must be an integer from 1 to 32; got True"),
        ({"tied": True}, "tied is for the frequencies of fourier; hermite has none"),
        ({"basis": "tropical", "tied": True}, "tied is for the frequencies of fourier; tropical has none"),
        ({"basis": "fourier", "tied": 1}, "tied must be True or False; got 1"),
        ({"init": "zeros"}, "init must be one of stable, paper, calibrated, fit; got 'zeros'"),
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
