"""Write a NIfTI volume as a DICOM MR series, to try the application without a scanner.

    python apps/monai_deploy/make_dicom.py FOLDER [--image scan.nii.gz]

The default is the sample of the project: the MNI152 template with simulated lesions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from common.cohorts.table import sample_dir

SAMPLE = Path(sample_dir()) / "mni152_lesions_T1.nii.gz"


def main() -> None:
    """Write the series."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--image", type=Path, default=SAMPLE)
    arguments = parser.parse_args()
    write_series(nib.Nifti1Image.from_filename(arguments.image), arguments.folder)


def write_series(image: nib.Nifti1Image, folder: Path, **tags: object) -> None:
    """One file a slice, IM0001, ...: voxels as they are, which must fit into int16, where the affine says.

    tags: more DICOM keywords, or others of the defaults.
    """
    to_lps = ornt_transform(io_orientation(image.affine), axcodes2ornt("LPS"))  # as scanners store axial slices
    image = image.as_reoriented(to_lps)
    volume = np.asanyarray(image.dataobj).astype(np.int16)
    affine = np.diag([-1, -1, 1, 1]) @ image.affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    series = {
        "Modality": "MR",
        "SeriesDescription": "t1 mprage",
        "SeriesNumber": 3,
        "ImageType": ["ORIGINAL", "PRIMARY", "M"],
        "PatientName": "",
        "PatientID": "",
        "StudyInstanceUID": generate_uid(),
        "SeriesInstanceUID": generate_uid(),
        "FrameOfReferenceUID": generate_uid(),
        "PositionReferenceIndicator": "",
        "SliceThickness": f"{spacing[2]:.6g}",
        "Rows": volume.shape[1],
        "Columns": volume.shape[0],
        "PixelSpacing": [f"{spacing[1]:.9g}", f"{spacing[0]:.9g}"],  # between rows, then between columns
        "ImageOrientationPatient": [f"{value:.9g}" for value in (affine[:3, :2] / spacing[:2]).T.ravel()],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 1,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(volume.shape[2]):
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.InstanceNumber = MRImageStorage, generate_uid(), k + 1
        dataset.ImagePositionPatient = [f"{value:.9g}" for value in affine[:3, 3] + k * affine[:3, 2]]
        for keyword, value in (series | tags).items():
            setattr(dataset, keyword, value)
        dataset.PixelData = np.ascontiguousarray(volume[:, :, k].T).tobytes()
        dataset.save_as(folder / f"IM{k + 1:04d}", enforce_file_format=True)


if __name__ == "__main__":
    main()
