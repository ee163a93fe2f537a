"""Measure how a bundle of brain T1 carries over to other scanners, with each step of its normalisation on and off.

    python scripts/measure_sites.py COHORT.csv -m KEY -o OUT.json [--maps DIR] [--as-learned]

COHORT has the columns site, split, T1 and lesion, and subjects that are named like `SUBJECT-KIND` where a lesion was
put in. The healthy subjects of the split `val` give the threshold (and the atlas) of each variant, those of `test` are
measured: the share of a healthy brain above the threshold, the recall of lesion voxels, AUPRC by kind of lesion, all on
the network's grid; of what is shipped also by how much its AUPRC of strokes exceeds those of the free baselines on the
same volumes, in the same resamples. `--as-learned` leaves the standardisation of tissues out. `--maps` keeps the raw
maps, so that a stopped run goes on; each is a file of tensors. In place of a bundle KEY may be a free baseline,
`darkness_minus_atlas`, `brightness_minus_atlas` or `mirrored_minus_atlas`, on the images that `dae` would see.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from make_methods_table import BASELINES
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import SpatialResample
from torch import Tensor

from common.bundle import BUNDLES_DIR
from common.cohorts.table import read_cohort
from common.detection.method import foreground_of
from common.detection.normalisation import WithinSubjectNormalisation
from common.errors import one_line
from common.metrics import DetectionMetrics
from common.metrics.baselines import QUANTITIES, AboveHealthyAtlas
from common.metrics.bootstrap import paired_difference
from common.report.benchmark_table import cell
from common.results.case import versions
from common.transforms.load import load_lesion
from common.weights import load_into, weights_sha256
from common.workflows.calibrate import threshold_of
from common.workflows.evaluation import write_result

SHARE = 0.01  # of the healthy brain that may exceed the threshold, where `calibrate.json` says no other
RESAMPLES = 300
STEPS, RAW = "1, 2, 3, 4", "raw map"  # of the normalisation that is shipped, and without it
UNSIGNED = "1, 2, 3, 4, no sign"  # where darker and brighter are shipped as two parts
BOXES = "1, 2, 3, 4, boxes"  # the same places by the boxes around the brains
OFF: dict[str, Any] = {"healthy_atlas": False, "contralateral_weight": 0.0, "smoothing_vox": 0.0}
VARIANTS: dict[str, dict[str, Any] | None] = {  # what each has other than the bundle
    RAW: None,
    "1": OFF,
    "1, 2": OFF | {"healthy_atlas": True},
    "1, 2, 3": OFF | {"healthy_atlas": True, "contralateral_weight": 0.5},
    "1, 2, 4": {"contralateral_weight": 0.0},
    STEPS: {},
    "1, 2, 3, 4, w = 0.75": {"contralateral_weight": 0.75},
    BOXES: {"registration": False},
    UNSIGNED: {"signed_smoothing_vox": 0.0},
}

Item = dict[str, Any]  # of the cohort
Results = dict[str, dict[str, dict[str, Any]]]  # by site and group of lesions, what `DetectionMetrics` says
Volume = dict[str, Tensor]  # map (1, H, W, D), its change (C, H, W, D), brain and lesion (1, H, W, D) bool


def main(
    cohort: Annotated[Path, typer.Argument(help="Cohort CSV.")],
    method: Annotated[str, typer.Option("-m", "--method", help="Key of a bundle, or of a free baseline.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The JSON.")],
    maps: Annotated[Path | None, typer.Option(help="Folder of the raw maps.")] = None,
    as_learned: Annotated[bool, typer.Option("--as-learned", help="No standardisation of tissues.")] = False,
    first: Annotated[int | None, typer.Option(help="Only so many test subjects of each site.")] = None,
) -> None:
    """Print a line a variant and site, and write all figures as JSON."""
    items = read_cohort(cohort, ["T1"])
    healthy = [item for item in items if item["split"] == "val" and "lesion" not in item]
    tested = first_subjects([item for item in items if item["split"] == "test"], first)
    about: dict[str, Any] = {"key": method, "standardised": not as_learned, "calibrated_on": len(healthy)}
    about["tested"] = subjects_by_site(tested)
    images = RawMaps("dae", as_learned, maps, images=True)
    references, measured = [images(item) for item in healthy], [(item, images(item)) for item in tested]
    free: dict[str, Results] = {}
    if method in QUANTITIES:
        results, shipped = {RAW: of_baseline(method, references, measured)}, RAW
        about |= {"false_positive_share": SHARE, "weights_sha256": None}
    else:
        free = {key: of_baseline(key, references, measured) for key in BASELINES}
        volumes = RawMaps(method, as_learned, maps)
        results = of_bundle(volumes, healthy, tested)
        shipped = STEPS if "normalisation" in volumes.config else RAW
        about |= {"false_positive_share": volumes.share, "weights_sha256": volumes.weights_sha256}
    rows = {name: {site: figures(groups) for site, groups in sites.items()} for name, sites in results.items()}
    for name, sites in rows.items():
        for site, row in sites.items():
            print(name, site, *(f"{key} {cell(value)}" for key, value in row.items()))
    for site, groups in results[shipped].items():
        for key, sites in free.items():
            difference = paired_difference(groups["strokes"], sites[site]["strokes"], "auprc")
            rows[shipped][site][f"auprc_strokes_minus_{key}"] = difference
            print(site, "minus", key, cell(difference))
    about |= {"shipped": shipped, "seed": 0, "versions": versions()}
    write_result(about | {"variants": rows}, output)


def of_bundle(volumes: RawMaps, healthy: list[Item], tested: list[Item]) -> dict[str, Results]:
    """The results of each variant."""
    shipped = dict(volumes.config.get("normalisation") or {})
    shipped.pop("_target_", None)
    is_signed = bool(shipped.get("signed_smoothing_vox"))
    references, measured = [volumes(item) for item in healthy], [(item, volumes(item)) for item in tested]
    results = {}
    for name, other in VARIANTS.items():
        if is_signed or name != UNSIGNED:
            settings = None if other is None else shipped | other
            results[name] = measure(settings, references, measured, volumes.share)
    return results


def of_baseline(key: str, healthy: list[Volume], tested: list[tuple[Item, Volume]]) -> Results:
    """The results of a free baseline, its atlas and threshold of the healthy; the maps of the volumes are images."""
    above = AboveHealthyAtlas(QUANTITIES[key])
    above.fit([(volume["map"].float(), volume["brain"]) for volume in healthy])

    def mapped(volume: Volume) -> Volume:
        return volume | {"map": above(volume["map"].float(), volume["brain"])}

    return measure(None, [mapped(volume) for volume in healthy], [(item, mapped(v)) for item, v in tested], SHARE)


class RawMaps:
    """The map of a subject before it is normalised, from a folder or from the network; or the image that it is of."""

    def __init__(self, method: str, as_learned: bool, folder: Path | None, images: bool = False) -> None:
        bundle = BUNDLES_DIR / method
        config = ConfigParser(ConfigParser.load_config_file(bundle / "configs" / "inference.json"))
        if as_learned:
            config["preprocessing::tissue_modes"] = None
        self.config, self.weights = config, bundle / "models" / "model.pt"
        calibrate = ConfigParser.load_config_file(bundle / "configs" / "calibrate.json")
        self.share = calibrate["task"].get("false_positive_share", SHARE)
        self.images = images
        name = "images" if images else method
        self.folder = None if folder is None else folder / (f"{name}-as-learned" if as_learned else name)
        self.weights_sha256 = weights_sha256(self.weights)
        self.network: Any = None

    def __call__(self, item: Item) -> Volume:
        """Of an item of the cohort."""
        path = None if self.folder is None else self.folder / f"{item['subject']}.pt"
        if path is not None and path.is_file():
            return torch.load(path, weights_only=True)
        volume = self._detect(item)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(volume, path)
        return volume

    @torch.no_grad()
    def _detect(self, item: Item) -> Volume:
        if self.network is None and not self.images:
            self.network = self.config.get_parsed_content("network_def")
            load_into(self.network, self.weights)
            self.network.eval()
        data = self.config.get_parsed_content("preprocessing")(item)
        image = data["image"]
        brain = foreground_of(image.as_tensor()[None])[0]
        lesion = lesion_of(item, data, brain)
        values = image.as_tensor()
        found = torch.cat([values, values]) if self.images else self.network(values[None])[0]
        return {"map": found[:1].half(), "change": (found[1:] - values).half(), "brain": brain, "lesion": lesion}


def lesion_of(item: Item, data: dict[str, Any], brain: Tensor) -> Tensor:
    """The lesion of an item on the grid of its prepared image, within the brain (1, H, W, D) bool; none if healthy."""
    if "lesion" not in item:
        return torch.zeros_like(brain)
    return on_grid(load_lesion(str(item["lesion"]), data["brain"]), data["image"]) & brain


def on_grid(mask: MetaTensor, image: MetaTensor) -> Tensor:
    """A mask (1, H, W, D) on the grid of a prepared image, where it fills half of a voxel or more."""
    resample = SpatialResample(mode="bilinear", padding_mode="zeros")
    moved = resample((mask > 0).float(), dst_affine=image.affine, spatial_size=image.shape[1:])
    return torch.as_tensor(moved.as_tensor()) >= 0.5


def first_subjects(items: list[Item], count: int | None) -> list[Item]:
    """The items of the first subjects of each site, healthy and with each kind of lesion; all for None."""
    first = {site: subjects[:count] for site, subjects in subjects_by_site(items).items()}
    return [item for item in items if subject_and_kind(item)[0] in first[str(item.get("site", ""))]]


def subjects_by_site(items: list[Item]) -> dict[str, list[str]]:
    """`{"ixi": ["IXI048", ...]}`, in the order of the cohort."""
    found: dict[str, list[str]] = {}
    for item in items:
        subjects = found.setdefault(str(item.get("site", "")), [])
        subject, _ = subject_and_kind(item)
        if subject not in subjects:
            subjects.append(subject)
    return found


def subject_and_kind(item: Item) -> tuple[str, str]:
    """`IXI048`, `acute_stroke` of the subject `IXI048-acute_stroke`; a healthy one has no kind."""
    if "lesion" not in item:
        return str(item["subject"]), ""
    subject, _, kind = str(item["subject"]).rpartition("-")
    return subject, kind


def measure(
    settings: dict[str, Any] | None, healthy: list[Volume], tested: list[tuple[Item, Volume]], share: float
) -> Results:
    """The results of a variant of the normalisation; share: of the healthy brain, above the threshold."""
    normalisation = None if settings is None else WithinSubjectNormalisation(**settings)
    if normalisation is None:
        values = [volume["map"][volume["brain"]].float().numpy() for volume in healthy]
    else:
        values = normalisation.fit([normalisation.healthy_map(*of_volume(volume)) for volume in healthy])
    threshold = threshold_of(values, share)
    of_site: dict[str, dict[str, DetectionMetrics]] = {}
    for item, volume in tested:
        anomaly_map = volume["map"].float()
        if normalisation is not None:
            anomaly_map = normalisation(*of_volume(volume))[0].clamp(min=0)
        kind = subject_and_kind(item)[1]
        lesion = volume["lesion"][0] if kind else None
        groups = {"strokes" if kind.endswith("stroke") else kind, kind} if kind else {"strokes"}
        for group in groups:
            metrics = of_site.setdefault(str(item.get("site", "")), {}).setdefault(group, DetectionMetrics())
            metrics.update(str(item["subject"]), anomaly_map[0], lesion, volume["brain"][0], threshold, voxel_ml=0.008)
    return {
        site: {group: metrics.compute(n_bootstrap=RESAMPLES) for group, metrics in groups.items()}
        for site, groups in of_site.items()
    }


def of_volume(volume: Volume) -> tuple[Tensor, Tensor, Tensor]:
    """What a normalisation takes."""
    return volume["map"].float(), volume["brain"], volume["change"].float()


def figures(groups: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """AUPRC and recall by kind of lesion; the healthy, and whole volumes, from the group of the strokes."""
    row: dict[str, Any] = {}
    for group, result in groups.items():
        if group == "strokes":
            row["healthy_share"], row["healthy_worst_share"] = result["healthy_fp_share"], result["healthy_worst_share"]
            row["volume_auroc_cluster"] = result["volume_auroc_cluster"]
        row[f"auprc_{group}"], row[f"recall_{group}"] = result["auprc"], result["voxel_recall_at_threshold"]
    return row


if __name__ == "__main__":
    typer.run(one_line(main))
