"""Labelled test cohorts from folders of public images: a module and a line here for each kind.

Each is a function with the options of its command, `uad cohort KIND DATA_DIR -o DIR`, that writes DIR/cohort.csv.
"""

from __future__ import annotations

from collections.abc import Callable

from .glioma import make_glioma
from .headct_sprites import make_headct_sprites
from .healthy_lesions import IXI, NOVOSIBIRSK, lesion_cohort
from .oct import make_oct
from .patients import make_patients

KINDS: dict[str, Callable[..., None]] = {
    "ixi-lesions": lesion_cohort(IXI),
    "novosibirsk-lesions": lesion_cohort(NOVOSIBIRSK),
    "glioma": make_glioma,
    "headct-sprites": make_headct_sprites,
    "oct": make_oct,
    "patients": make_patients,
}
