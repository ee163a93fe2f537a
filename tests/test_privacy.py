"""Nothing leaves the machine, and nothing tells who the patient is."""

from __future__ import annotations

import gzip
import subprocess
import sys

import nibabel as nib

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


def test_no_network_and_no_name(phantom, save_nifti, tmp_path):
    shape, affine = phantom.grid(spacing_mm=(4, 4, 4))
    path = save_nifti(tmp_path / "scan.nii.gz", phantom.on_grid(shape, affine)[0], affine)
    nifti = nib.load(path)
    for field in ("descrip", "intent_name", "db_name", "aux_file"):
        nifti.header[field] = NAME.encode()
    nifti.header.extensions.append(nib.nifti1.Nifti1Extension("comment", NAME.encode()))
    nib.save(nifti, path)

    command = [sys.executable, "-c", OFFLINE, "detect", path, "-m", "mad_ad", "-o", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(written) == 7
    for file in written:
        content = file.read_bytes()
        content = gzip.decompress(content) if file.suffix == ".gz" else content
        assert NAME.encode() not in content, file
    assert NAME not in done.stdout + done.stderr
