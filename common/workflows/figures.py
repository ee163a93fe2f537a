"""A method's stages on one slice of a scan, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..bundle import load_workflow, metadata
from ..cohorts.cases import find_cases
from ..detection.volume import padded, slice_seeds
from ..errors import SettingError
from ..files import replacing
from ..images.check import typed_errors
from ..outputs import Inputs, check_file
from ..report.stages import save_stages, stages
from ..weights import load_into

PNG = b"\x89PNG"


def draw_stages(bundle: str, images: Sequence[Path], output: Path, index: int | None, **override: Any) -> None:
    """Write the PNG of a bundle's stages on an axial slice of a scan, on the network's grid.

    Args:
        images: the scan, of several modalities a file each.
        index: of the slice on the network's grid, from below; None for the middle one of those with foreground.
        override: items of the bundle's inference.json.
    Raises UADError.
    """
    is_png = output.is_file() and output.read_bytes()[:4] == PNG
    Inputs(images).check([output])
    check_file(output, is_png, "an earlier picture")
    with typed_errors():
        content = load_workflow(bundle, ["inference.json"], **override).parser.get_parsed_content
        network, preprocessing, device = content("network_def"), content("preprocessing"), content("device")
        load_into(network, content("weights"))
        (case,) = find_cases(list(images), metadata(bundle)["modalities"])
        volume = preprocessing(case)["image"]
        slices = volume.as_tensor().movedim(-1, 0)
    used = (slices > 0).flatten(1).any(1).nonzero().flatten().tolist()
    chosen = used[len(used) // 2] if index is None else index
    if chosen not in used:
        raise SettingError("slice", f"slice {chosen} shows nothing", f"choose one of {used[0]} to {used[-1]}")
    seeds = slice_seeds(network.seed, torch.tensor([chosen]))
    detector = network.to(device).eval().detector
    rows = stages(detector, padded(slices[chosen : chosen + 1], detector.size_divisor).to(device), seeds)
    middle = torch.tensor([*((size - 1) / 2 for size in slices.shape[2:]), chosen, 1.0], dtype=torch.float64)
    z_mm = float(volume.affine[2].double() @ middle)
    with replacing(output) as temporary:
        save_stages(rows, temporary, f"{bundle}: {case['subject']}, slice {chosen} (z = {z_mm:.0f} mm)")
