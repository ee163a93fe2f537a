"""Every folder of `bundles/` is tested, with no test code of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigParser
from monai.utils import ensure_tuple

from common.bundle import BUNDLES_DIR, run_inference
from common.transforms.head import HeadPreprocessing
from common.weights import load_weights

HERE = Path(__file__).parent
BUNDLES = sorted(folder for folder in BUNDLES_DIR.iterdir() if folder.is_dir() and not folder.name.startswith("."))


@pytest.fixture(scope="session", params=BUNDLES, ids=lambda folder: folder.name)
def bundle(request):
    """The folder of a bundle; its name is the method's key."""
    return request.param


@pytest.fixture(scope="session")
def configs(bundle):
    """All JSON files of the bundle, by their names."""
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in (bundle / "configs").glob("*.json")}


@pytest.fixture(scope="session")
def metadata(configs):
    return configs["metadata.json"]


@pytest.fixture(scope="session")
def inference(bundle):
    """The parsed inference config; its items are made when they are asked for."""
    parser = ConfigParser()
    parser.read_config(bundle / "configs" / "inference.json")
    return parser


@pytest.fixture(scope="session")
def network(inference, bundle):
    """The `network_def` with the shipped weights."""
    network = inference.get_parsed_content("network_def")
    network.load_state_dict(load_weights(bundle / "models" / "model.pt"))
    return network.eval()


@dataclass(frozen=True)
class Sample:
    """The sample that the bundle's config names: a file per modality, and on their grid where to look and what for."""

    images: list[Path]
    foreground: np.ndarray  # (H, W, D) bool
    lesion: np.ndarray  # (H, W, D) bool
    prepared: dict


@pytest.fixture(scope="session")
def sample(inference, metadata):
    paths = inference.get_parsed_content("image")
    images = [Path(path) for path in ensure_tuple(paths)]
    assert len(images) == len(metadata["modalities"])
    first = images[0].name.removesuffix(".nii.gz")  # `a_T1` has its mask in `a_T1_mask` or `a_mask`
    masks = [f"{first}_mask.nii.gz", f"{first.removesuffix(metadata['modalities'][0])}mask.nii.gz"]
    mask = next(path for name in masks if (path := images[0].with_name(name)).is_file())
    prepared = inference.get_parsed_content("preprocessing")({"image": paths})
    lesion = np.asarray(nib.load(mask).dataobj) > 0
    return Sample(images, prepared["brain"].as_tensor()[0].numpy(), lesion, prepared)


@pytest.fixture(scope="session")
def slab(sample):
    """18 prepared slices of the sample, its middle in depth, (1, C, H, W, 18)."""
    prepared = sample.prepared["image"].as_tensor()
    middle = prepared.shape[-1] // 2
    return prepared[None, ..., middle - 9 : middle + 9]


@pytest.fixture(scope="session")
def slab_prediction(network, slab):
    return network(slab)


@pytest.fixture(scope="session")
def sample_case(bundle, tmp_path_factory):
    """The folder that the whole inference workflow writes for the sample that the package ships."""
    output = tmp_path_factory.mktemp(bundle.name)
    run_inference(bundle.name, ["inference.json"], output_dir=str(output))
    (case,) = output.iterdir()
    return case


@pytest.fixture(scope="session")
def bundle_cohort(inference, metadata, write_cohort, tmp_path_factory):
    """A cohort of what the bundle looks at: its modalities, and those that it learns from; brains or whole heads."""
    whole_head = isinstance(inference.get_parsed_content("preprocessing"), HeadPreprocessing)
    modalities = metadata.get("training_modalities", metadata["modalities"])
    return write_cohort(tmp_path_factory.mktemp("cohort"), modalities, whole_head)


@pytest.fixture(scope="session")
def monai_says(bundle, bundle_cohort, tmp_path_factory):
    """What MONAI's own checks say of the bundle: the error, or None, of each; in a process of their own."""
    work = tmp_path_factory.mktemp(f"{bundle.name}-monai")
    script, schema = HERE / "monai_checks.py", HERE / "meta_schema_20240725.json"
    command = [sys.executable, script, bundle, schema, bundle_cohort, work]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((work / "result.json").read_text(encoding="utf-8"))
