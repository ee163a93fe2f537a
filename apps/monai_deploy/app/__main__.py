"""`python apps/monai_deploy/app -i DICOM_FOLDER -m BUNDLE -o OUTPUT_FOLDER`; exit code 3 where an input is to blame."""

from __future__ import annotations

import logging
import os
import sys

os.environ.setdefault("HOLOSCAN_LOG_LEVEL", "OFF")  # read when it is imported; it logs the traceback of every error

from app import AnomalyApp
from settings import WORDS

from common.errors import UADError, settings_said_as

if __name__ == "__main__":
    logging.disable(logging.ERROR)  # the SDK's messages name files and quote tags, which may tell who the patient is
    with settings_said_as(WORDS):
        try:
            AnomalyApp().run()
        except UADError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            sys.exit(3)
