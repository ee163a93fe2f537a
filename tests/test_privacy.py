"""Nothing leaves the machine, and nothing tells who the patient is."""

from __future__ import annotations

import gzip
import subprocess
import sys

import highdicom as hd
import nibabel as nib
import numpy as np

NAME = "Plantedname"

# the command with every way out of the machine closed
OFFLINE = """
import socket, sys
def refuse(*arguments, **settings):
    raise AssertionError("the network was asked for")
socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = refuse
socket.getaddrinfo = socket.create_connection = refuse
from common.cli import app
app(sys.argv[1:])
"""


def detect_offline(*arguments):
    """Run the command, which must succeed, and return what it said."""
    command = [sys.executable, "-c", OFFLINE, "detect", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def contents(folder):
    """Of all files, uncompressed."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {f.name: gzip.decompress(f.read_bytes()) if f.suffix == ".gz" else f.read_bytes() for f in files}


def test_no_network_and_no_name(phantom, save_nifti, tmp_path):
    shape, affine = phantom.grid(spacing_mm=(4, 4, 4))
    path = save_nifti(tmp_path / "scan.nii.gz", phantom.on_grid(shape, affine)[0], affine)
    nifti = nib.load(path)
    for field in ("descrip", "intent_name", "db_name", "aux_file"):
        nifti.header[field] = NAME.encode()
    nifti.header.extensions.append(nib.nifti1.Nifti1Extension("comment", NAME.encode()))
    nib.save(nifti, path)

    said = detect_offline(path, "-m", "mad_ad", "-o", tmp_path / "out")
    written = contents(tmp_path / "out")
    assert len(written) == 7
    assert not [name for name, content in written.items() if NAME.encode() in content]
    assert NAME not in said


def centre(volume, affine):
    """Of the values above 0, in mm."""
    return np.average(nib.affines.apply_affine(affine, np.argwhere(volume > 0)), axis=0, weights=volume[volume > 0])


def test_dicom_tells_no_name_but_to_dicom(write_series, tmp_path):
    """A Segmentation and a map that a PACS shall file need the patient; they lie where the scan does."""
    series = write_series(tmp_path / "series", plane="sagittal", slope=1, intercept=0)
    said = detect_offline(series.folder, "-m", "dae", "-o", tmp_path / "out", "--format", "dicom-seg", "--force")
    written = contents(tmp_path / "out")
    assert set(written) >= {"segmentation.dcm", "anomaly_map.dcm", "segmentation.nii.gz", "run.json", "status.tsv"}
    named = {name for name, content in written.items() if b"PLANTED" in content}
    assert named == {"segmentation.dcm", "anomaly_map.dcm"}
    assert "PLANTED" not in said + "".join(str(path) for path in (tmp_path / "out").rglob("*"))
    case = tmp_path / "out" / "series"
    nifti, dicom = nib.load(case / "anomaly_map.nii.gz"), hd.imread(case / "anomaly_map.dcm").get_volume()
    found = np.asarray(nifti.dataobj)
    assert found.any()
    places = centre(dicom.array, np.diag([-1, -1, 1, 1]) @ dicom.affine)
    assert np.allclose(places, centre(found, nifti.affine), atol=0.01)
