"""What the metadata say is what there is. Their schema: `test_monai.py`."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest


def test_name_is_the_folder(metadata, bundle):
    assert metadata["name"] == bundle.name


def test_metadata_are_finished(metadata):
    assert "TODO" not in json.dumps(metadata)


def test_version_is_in_the_changelog(metadata):
    assert metadata["version"] in metadata["changelog"]


@pytest.mark.parametrize(
    ("key", "package"), [("monai_version", "monai"), ("pytorch_version", "torch"), ("numpy_version", "numpy")]
)
def test_main_versions_are_those_that_are_tested(key, package, metadata):
    assert metadata[key] == public(version(package))


def test_required_packages_are_those_that_are_tested(metadata):
    required = metadata["required_packages_version"]
    assert {"nibabel", "pytorch-ignite", "einops", "scipy"} <= set(required)
    assert required == {package: public(version(package)) for package in required}


def public(number):
    """2.13.0 for 2.13.0+cpu."""
    return number.split("+")[0]


def test_network_is_one_that_label_and_deploy_can_serve(metadata):
    formats = metadata["network_data_format"]
    image, pred = formats["inputs"]["image"], formats["outputs"]["pred"]
    shown = formats["post_processed_outputs"]["pred"]
    assert list(formats["inputs"]) == ["image"]
    assert list(formats["outputs"]) == ["pred"]
    assert [len(entry["spatial_shape"]) for entry in (image, pred, shown)] == [3, 3, 3]
    assert image["num_channels"] == len(metadata["modalities"])
    assert pred["num_channels"] == 1 + image["num_channels"]
    assert (shown["num_channels"], shown["dtype"]) == (1, "uint8")  # viewers ask for integers


def test_what_tools_read_is_there(metadata):
    assert metadata["modality"] in {"MR", "CT", "OP", "OPT"}  # DICOM's words; MONAI Deploy assumes CT without
    assert metadata["references"]
    assert "not a medical device" in metadata["intended_use"]


def test_what_a_user_chooses_by_is_there(metadata):
    assert metadata["space"] in {"native", "MNI152"}
    assert metadata["run_time"]
    assert metadata["weights_license"]


def test_space_is_where_the_network_works(metadata, inference):
    assert inference.get_parsed_content("preprocessing").settings["register"] is (metadata["space"] == "MNI152")
