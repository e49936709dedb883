"""The registry of datasets."""

import pytest

from maestro_scale import datasets


def test_every_known_dataset_has_a_consistent_spec():
    for name in datasets.known():
        spec = datasets.spec(name)
        assert spec.name == name
        for sensor in spec.sensors:
            source = spec.modality(sensor.source)
            assert sum(sensor.band_groups) == len(sensor.bands)
            assert max(sensor.bands) < len(source.bands)
            assert sensor.image_size % sensor.patch == 0
        for modality in spec.modalities:
            assert modality.size * modality.resolution_m == pytest.approx(spec.tile_m)


def test_an_unknown_name_gets_the_nearest_one():
    with pytest.raises(KeyError, match="did you mean 'treesatai_ts'"):
        datasets.spec("treesatai-ts")
