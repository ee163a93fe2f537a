"""Brains as they come to a bundle's network, but with their tissues as they were, kept in a folder with raw maps.

For the scripts that compare what is done to an image before the network and to the map after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from measure_sites import lesion_of
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from torch import Tensor

from common.bundle import BUNDLES_DIR
from common.cohorts.table import read_cohort
from common.metrics import DetectionMetrics
from common.metrics.bootstrap import paired_difference
from common.transforms.tissue import StandardiseTissued
from common.weights import load_into, weights_sha256

Cohort = Annotated[Path, typer.Argument(help="Cohort CSV.")]
Method = Annotated[str, typer.Option("-m", "--method", help="Key of a bundle.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="The JSON.")]
Masks = Annotated[Path, typer.Option(help="Folder of lesion masks in MNI152 space, *.nii*.")]
Kept = Annotated[Path | None, typer.Option(help="Folder of prepared brains and raw maps.")]

VOXEL_ML = 0.008
RESAMPLES = 300
FIGURES = ("healthy_fp_share", "healthy_worst_share", "auprc", "voxel_recall_at_threshold")


@dataclass(frozen=True)
class Brain:
    """A subject of a cohort; image (1, H, W, D) in (0, 1], background 0; lesion (1, H, W, D) bool, none if healthy."""

    subject: str
    site: str
    split: str
    image: MetaTensor
    lesion: Tensor

    @property
    def inside(self) -> Tensor:
        """The brain, (1, H, W, D) bool."""
        return self.image.as_tensor() > 0


class PreparedBrains:
    """The brains of a cohort for a bundle, and the raw maps that its network makes of images.

    Args:
        method: key of a bundle whose preprocessing standardises tissues.
        folder: where brains and maps are kept, so that a stopped run goes on and variants share them; None keeps none.
    """

    def __init__(self, method: str, folder: Path | None) -> None:
        bundle = BUNDLES_DIR / method
        self.config = ConfigParser(ConfigParser.load_config_file(bundle / "configs" / "inference.json"))
        self.standardise = StandardiseTissued("image", self.config["preprocessing::tissue_modes"])
        self.config["preprocessing::tissue_modes"] = None
        self.preprocessing = self.config.get_parsed_content("preprocessing")
        self.method, self.folder, self.weights = method, folder, bundle / "models" / "model.pt"
        self.weights_sha256 = weights_sha256(self.weights)
        self._network: Any = None

    @property
    def network(self) -> Any:
        """The `VolumeDetector` with the shipped weights."""
        if self._network is None:
            # the weights check the preparation that they were trained with
            config = ConfigParser(ConfigParser.load_config_file(self.weights.parents[1] / "configs" / "inference.json"))
            self._network = config.get_parsed_content("network_def")
            load_into(self._network, self.weights)
            self._network.eval()
        return self._network

    def cohort(self, path: Path) -> list[dict[str, Any]]:
        """The validation and test items of a cohort of T1 images."""
        return [item for item in read_cohort(path, ["T1"]) if item["split"] in ("val", "test")]

    def __call__(self, item: dict[str, Any]) -> Brain:
        """Of an item of the cohort."""
        kept = self.kept("prepared", str(item["subject"]), lambda: self._prepare(item))
        image = MetaTensor(kept["image"], affine=kept["affine"])
        return Brain(str(item["subject"]), str(item.get("site", "")), str(item["split"]), image, kept["lesion"])

    def _prepare(self, item: dict[str, Any]) -> dict[str, Tensor]:
        data = self.preprocessing(item)
        image = data["image"]
        lesion = lesion_of(item, data, image.as_tensor() > 0)
        return {"image": image.as_tensor(), "affine": image.affine, "lesion": lesion}

    def raw_map(self, variant: str, subject: str, image: Tensor) -> tuple[Tensor, Tensor]:
        """The map (1, H, W, D) float of an image (1, H, W, D), before the normalisation, and its change, as large."""

        def detect() -> Tensor:
            found = self.network(torch.as_tensor(image)[None])[0]
            return torch.cat([found[:1], found[1:] - torch.as_tensor(image)]).half()

        kept = cast(Tensor, self.kept(f"{self.method}-{variant}", subject, detect)).float()
        return kept[:1], kept[1:]

    def kept(self, group: str, subject: str, make: Callable[[], Any]) -> Any:
        """Tensors of a subject from the folder; where they are not there, made and put there."""
        if self.folder is None:
            return make()
        path = self.folder / group / f"{subject}.pt"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(make(), path)
        return torch.load(path, weights_only=True)


def spread_masks(folder: Path, count: int) -> list[Path]:
    """The lesion masks of a folder, evenly thinned where there are more than `count`, which is above 0."""
    masks = sorted(folder.glob("*.nii*"))
    return masks[:: max(len(masks) // count, 1)]


def evaluated(pairs: Iterable[tuple[Brain, Tensor]], threshold: float) -> dict[str, dict[str, Any]]:
    """Per site what `DetectionMetrics` says of healthy brains and strokes with their maps (1, H, W, D)."""
    of_site: dict[str, DetectionMetrics] = {}
    for brain, anomaly_map in pairs:
        metrics = of_site.setdefault(brain.site, DetectionMetrics())
        scores, lesion, inside = anomaly_map[0].clamp(min=0), brain.lesion[0], brain.inside[0]
        metrics.update(brain.subject, scores, lesion, inside, threshold, voxel_ml=VOXEL_ML)
    return {site: metrics.compute(n_bootstrap=RESAMPLES) for site, metrics in of_site.items()}


def figures(result: dict[str, Any], other: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a table says of a result: `{"value", "ci95"}` each; and by how much its AUPRC exceeds that of another."""
    row = {name: result[name] for name in FIGURES}
    return row if other is None else row | {"auprc_difference": paired_difference(result, other, "auprc")}
