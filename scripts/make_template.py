"""Make the template that registration goes to: MNI152 without skull, at 2 mm.

    python scripts/make_template.py

Writes `mni152_T1_2mm.nii.gz` and `LICENSE` to `common/images/template`, from the template inside nilearn as
`make_sample.py` averages it: nothing is downloaded. The same versions of numpy and zlib write the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from make_sample import LICENSE, ROOT, nifti, template_2mm, write

TERMS = LICENSE[LICENSE.index("Copyright") :]
ABOUT = """\
mni152_T1_2mm.nii.gz is made from the ICBM 152 nonlinear symmetric template, version 2009a, as carried by nilearn
(skull-stripped T1, 1 mm). Changes by this project (scripts/make_template.py): averaged to 2 mm, cropped, and rounded to
integers; the brain is > 0. The changes are under the same terms.

"""


def make_template(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder.")] = ROOT / "common" / "images" / "template",
) -> None:
    """Write template (uint8, background 0, brain > 0) and licence to a folder."""
    template, affine = template_2mm()
    volume = np.maximum(np.rint(template), template > 0).astype(np.uint8)  # dark CSF stays in the brain
    output.mkdir(parents=True, exist_ok=True)
    write(output / "mni152_T1_2mm.nii.gz", nifti(volume, affine))
    write(output / "LICENSE", (ABOUT + TERMS).encode())


if __name__ == "__main__":
    typer.run(make_template)
