"""Everything that a map depends on beside the image: what tells a result from one of other settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..recorded import Recorded, describe, digest_of
from ..weights import weights_sha256
from .volume import VolumeDetector

OF_THE_IMAGE = ("strip", "brain_volume_ml")  # how the brain is found in an image: no calibration depends on it
OF_THE_SCORE = ("num_score_timesteps",)  # no map depends on it; the calibration of earlier weights names it


@dataclass(frozen=True)
class Fingerprint:
    """The settings of a run, as JSON holds them.

    network: of the `VolumeDetector`, with all that it is made of, networks and schedulers too.
    settings: of the preprocessing.
    seed: of the network.
    weights_sha256: digest of the weights file.
    of_map: what a calibration depends on: network and preprocessing, without what is at its default.
    """

    network: dict[str, Any]
    settings: dict[str, Any]
    seed: int
    weights_sha256: str
    of_map: dict[str, Any]

    @classmethod
    def of(cls, network: VolumeDetector, preprocessing: Recorded, weights: str | Path) -> Fingerprint:
        """Raises BundleError where the weights cannot be read."""
        return cls(
            network=describe(network),
            settings=preprocessing.settings,
            seed=network.seed,
            weights_sha256=weights_sha256(weights),
            of_map=of_map(network, preprocessing),
        )

    def record(self) -> dict[str, Any]:
        """For the JSON of a result."""
        return {
            "weights_sha256": self.weights_sha256,
            "seed": self.seed,
            "network": self.network,
            "settings": self.settings,
        }

    @property
    def digest(self) -> str:
        """Of all of them."""
        return digest_of(self.record())

    def calibration_warning(self, calibrated_with: Mapping[str, Any] | None) -> str | None:
        """One line where a calibration is of other settings than these; None too where it does not say of which."""
        if calibrated_with is None:
            return None
        if not (others := differences(of_map_alone(calibrated_with), self.of_map, "the default")):
            return None
        return (
            f"the calibration is of other settings ({'; '.join(others)}): the calibrated threshold and the percentile "
            "do not hold; use the settings it was made with, or run calibrate.json with these"
        )


def of_map(network: VolumeDetector, preprocessing: Recorded) -> dict[str, Any]:
    """See `Fingerprint`."""
    changed = {name: value for name, value in preprocessing.changed_settings.items() if name not in OF_THE_IMAGE}
    return {"network": of_map_alone(describe(network, only_changed=True)), "preprocessing": changed}


def of_map_alone(settings: Any) -> Any:
    """Settings, those of their parts too, without `OF_THE_SCORE`: older calibrations name them."""
    if not isinstance(settings, Mapping):
        return settings
    return {name: of_map_alone(value) for name, value in settings.items() if name not in OF_THE_SCORE}


def differences(before: Any, now: Any, missing: str, name: str = "") -> list[str]:
    """`name: VALUE before, VALUE now` of each setting that is not the same in two records.

    missing: what is said of a setting that one of them does not name.
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return [
            text
            for key in sorted({*before, *now})
            for text in differences(
                before.get(key, missing), now.get(key, missing), missing, f"{name}.{key}" if name else key
            )
        ]
    return [] if before == now else [f"{name}: {_short(before)} before, {_short(now)} now"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
