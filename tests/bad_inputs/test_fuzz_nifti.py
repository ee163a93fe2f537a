"""Whatever stands in a NIfTI header: an image of a brain, or one typed error of one line; the file stays as it was."""

from __future__ import annotations

import io
import logging
import struct
import warnings

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import UADError
from common.images.check import CheckVolumed
from common.transforms.brain import BrainMaskd
from common.transforms.load import LoadImageCheckedd

EXAMPLES = 1000
SHAPE, SPACING_MM = (12, 14, 11), 12.5  # 1 l in 1,848 voxels
FORMATS = {"i1": "b", "u1": "B", "i2": "h", "u2": "H", "i4": "i", "i8": "q", "f4": "f", "f8": "d"}
# the fields of NIfTI-1 that say how voxels are read and where they are: name, offset, type, number of values
FIELDS = {
    "sizeof_hdr": (0, "i4", 1),
    "dim": (40, "i2", 8),
    "intent_code": (68, "i2", 1),
    "datatype": (70, "i2", 1),
    "bitpix": (72, "i2", 1),
    "pixdim": (76, "f4", 8),
    "vox_offset": (108, "f4", 1),
    "scl_slope": (112, "f4", 1),
    "scl_inter": (116, "f4", 1),
    "xyzt_units": (123, "u1", 1),
    "cal_max": (124, "f4", 1),
    "qform_code": (252, "i2", 1),
    "sform_code": (254, "i2", 1),
    "quatern": (256, "f4", 3),
    "qoffset": (268, "f4", 3),
    "srow_x": (280, "f4", 4),
    "srow_y": (296, "f4", 4),
    "srow_z": (312, "f4", 4),
    "magic": (344, "u1", 4),
    "extension": (348, "u1", 4),
}
USUAL = {
    "i2": st.sampled_from([-1, 0, 1, 2, 3, 4, 5, 7, 8, 11, 12, 14, 16, 32, 64, 128, 256, 512, 768, 1024, 2304, 32767]),
    "f4": st.sampled_from(
        [-np.inf, -1e30, -10, -1, -0.0, 1e-30, 0.1, 1, 1.0000003, 10, 352, 1e6, 1e38, np.inf, np.nan]
    ),
    "i4": st.sampled_from([-1, 0, 348, 540, 1543569408]),
    "u1": st.integers(0, 255),
}
ANY = {
    "i2": st.integers(-(2**15), 2**15 - 1),
    "f4": st.floats(width=32),
    "i4": st.integers(-(2**31), 2**31 - 1),
    "u1": st.integers(0, 255),
}


@st.composite
def change(draw):
    """Bytes to be written at a place of the header: one value of a field."""
    offset, kind, count = FIELDS[draw(st.sampled_from(sorted(FIELDS)))]
    code = FORMATS[kind]
    at = offset + struct.calcsize(code) * draw(st.integers(0, count - 1))
    return at, struct.pack(f"<{code}", draw(USUAL[kind] | ANY[kind]))


@pytest.fixture(scope="module")
def brain_file():
    """The bytes of a brain of 1 l as NIfTI-1, not compressed."""
    axes = np.meshgrid(*[np.linspace(-1, 1, size) for size in SHAPE], indexing="ij")
    random = np.random.default_rng(0)
    volume = np.where(np.linalg.norm(axes, axis=0) < 0.9, random.normal(100, 15, SHAPE), 0).astype(np.float32)
    nifti = nib.Nifti1Image(volume, np.diag([SPACING_MM] * 3 + [1.0]))
    nifti.set_qform(nifti.affine, code=1)
    file = io.BytesIO()
    nifti.to_file_map({"header": nib.FileHolder(fileobj=file), "image": nib.FileHolder(fileobj=file)})
    return file.getvalue()


@pytest.fixture(scope="module")
def outcomes():
    return {"usable": 0}


def prepare(path):
    """Load, check, and find the brain."""
    item = LoadImageCheckedd("image")({"image": str(path)})
    return BrainMaskd("image")(CheckVolumed("image")(item))


def assert_usable(item):
    """A finite image with a brain of a plausible size on its grid."""
    image, brain = item["image"].numpy(), item["brain"].numpy()
    assert image.shape == brain.shape
    assert np.isfinite(image).all()
    assert np.isfinite(np.asarray(item["image"].affine)).all()
    assert brain.any()


def test_untouched_is_usable(brain_file, tmp_path):
    (tmp_path / "scan.nii").write_bytes(brain_file)
    item = prepare(tmp_path / "scan.nii")
    assert_usable(item)
    assert 800 < float(item["brain"].sum()) * (SPACING_MM / 10) ** 3 < 2300


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_any_header_is_read_or_refused(brain_file, outcomes, tmp_path_factory):
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "scan.nii"

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(changes=st.lists(change(), min_size=1, max_size=3), cut=st.none() | st.integers(0, 400))
    def run(changes, cut):
        content = bytearray(brain_file)
        for at, value in changes:
            content[at : at + len(value)] = value
        if cut is not None:
            del content[-cut:]
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert_usable(prepare(path))
                outcomes["usable"] += 1
            except UADError as error:
                assert str(error) == f"{path}: {error.fact}; {error.remedy}"
                assert "\n" not in str(error)
                assert error.fact
                assert error.remedy
                name = type(error).__name__
                outcomes[name] = outcomes.get(name, 0) + 1
        assert path.read_bytes() == content
        assert [file.name for file in folder.iterdir()] == [path.name]

    run()
    assert sum(outcomes.values()) >= EXAMPLES
    assert outcomes["usable"] > EXAMPLES / 20  # the headers are not all nonsense
    assert len(outcomes) >= 4
    assert max(outcomes.values()) < 0.8 * sum(outcomes.values())
