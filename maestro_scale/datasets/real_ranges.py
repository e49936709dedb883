"""Recorded values of real data for the statistics of :mod:`maestro_scale.datasets.statistics`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RealRange:
    """The lowest and the highest value of real tiles, and where it comes from.

    ``of_forest``: the value depends on what covers the ground, and forest alone was measured.
    """

    low: float
    high: float
    source: str
    of_forest: bool = False

    def contains(self, value: float) -> bool:
        """Whether a value is within the range, at the two decimals to which ranges were recorded."""
        return self.low - 0.005 <= value <= self.high + 0.005

    def side(self, value: float) -> Literal["inside", "below", "above"]:
        """Where a value lies."""
        return "inside" if self.contains(value) else "below" if value < self.low else "above"


# Two tiles of TreeSatAI-TS, whose values were recorded before statistics.py existed. The other sources are of the six
# tiles in tests/data of github.com/IGNF/MAESTRO at 932f0e3, three of birch and three of oak, one of them also recorded;
# measured by statistics.py. The radar of the four tiles of 2017 is left out: their files interleave VV and VH within an
# image (both have the same mean, and all four tiles show the same pattern).
_TWO = "two tiles, recorded"
_SIX, _BIRCH, _RADAR = "six tiles", "the three of birch", "the two of 2019"
SOURCES = (
    "real: tiles of TreeSatAI-TS; 'two tiles, recorded' are in the project's notes of measurements, the others are of "
    "the six in the tests of the authors' code"
)
"""The line below a table of ranges."""

REAL_RANGES: Mapping[str, RealRange] = {
    # The real tile of the tests has .65 as the correlation of neighbours (six tiles: .59 to .73). As covariance over
    # variance of the window it would be .60 (.54 to .65), which leaves the recorded range.
    "optical_autocorrelation": RealRange(0.58, 0.77, _TWO),
    # Six tiles: .19 to .45, and .19 to .59; 4,435 real Landsat patches, visible and near infrared: -.04 to .34.
    "residual_visible_nir": RealRange(0.16, 0.29, _TWO),
    "residual_swir_nir": RealRange(0.15, 0.27, _TWO),
    "residual_visible_swir": RealRange(0.42, 0.69, _SIX),
    "residual_within_groups": RealRange(0.71, 0.81, _SIX),  # Landsat: .77 to .79
    # One number, 12.7, was recorded for visible bands: the range is that of the tiles of birch (all six: 6.5 to
    # 13.4). The six tiles have 3.8 to 12.9 in near, 3.8 to 11.7 in short-wave infrared.
    "deviation_visible": RealRange(10.77, 13.38, _BIRCH),
    "deviation_nir": RealRange(7.97, 11.0, _TWO),
    "deviation_swir": RealRange(7.0, 13.0, _TWO),
    # One number, .15, was recorded. The targets of groups move by .18 to .27 in the six tiles.
    "movement_patch": RealRange(0.137, 0.190, _SIX),
    "movement_patch_group": RealRange(0.20, 0.26, _TWO),
    "optical_kept": RealRange(0.25, 0.70, _SIX),
    "season_ndvi": RealRange(0.22, 0.37, _SIX, of_forest=True),
    "lowest_ndvi": RealRange(0.52, 0.56, _SIX, of_forest=True),
    "radar_autocorrelation": RealRange(0.34, 0.48, _TWO),
    # .57 is the descending orbit of the tile of the tests with its repeated dates, which are copies: without them .14,
    # and .20 in the ascending orbit; the mean of both orbits is .17, and .10 in the other tile of 2019.
    "radar_kept": RealRange(0.15, 0.57, _TWO),
    "radar_deviation": RealRange(2.22, 2.47, _RADAR),
    "radar_movement": RealRange(1.06, 1.50, _RADAR),
    "image_autocorrelation": RealRange(0.61, 0.75, _SIX, of_forest=True),
    "image_deviation": RealRange(17.6, 37.9, _SIX, of_forest=True),
}
"""The recorded range of each statistic: low, high, source."""
