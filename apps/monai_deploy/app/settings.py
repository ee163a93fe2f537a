"""What the application is told: paths on its command line, and the file of settings."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import yaml

from common.errors import BundleError, DicomError, OutputError, SettingError

HERE = Path(__file__).parent
CONFIG = Path(os.environ.get("HOLOSCAN_CONFIG_PATH", HERE / "app.yaml"))
STRIP = ("atlas", "deepbet", "hd-bet", "none")
WORDS = {"strip": f"set strip: {{}} in {CONFIG.name}"}  # how an error advises a setting here


@dataclass(frozen=True)
class Settings:
    """The part `detection` of app.yaml."""

    strip: str = "atlas"
    rules: str = "series_rules.json"
    deidentify: bool = False

    @classmethod
    def read(cls) -> Settings:
        """What the file gives, the rest as it is by default. Raises SettingError.

        The SDK's own reader takes a file that is no YAML for an empty one.
        """
        try:
            given = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["detection"]
            return cls.of(given or {})
        except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
            if isinstance(error, SettingError):
                raise
            fact = f"no settings in it ({type(error).__name__}: {' '.join(str(error).split())})"
            raise SettingError(CONFIG, fact, "write it like app.yaml of the application") from error

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Settings:
        """These settings. Raises SettingError."""
        known = {field.name: type(field.default) for field in fields(cls)}
        for name, value in given.items():
            if name not in known:
                raise SettingError(CONFIG, f"detection has no {name}", f"choose from {', '.join(known)}")
            if not isinstance(value, known[name]):
                raise SettingError(CONFIG, f"{name} is {value!r}", f"give a {known[name].__name__}")
        settings = cls(**given)
        if settings.strip not in STRIP:
            raise SettingError(CONFIG, f"strip is {settings.strip!r}", f"choose one of {', '.join(STRIP)}")
        return settings

    def rules_file(self) -> Path:
        """The file of rules: beside the file of settings, or else the application's own. Raises SettingError."""
        for folder in (CONFIG.parent, HERE):
            if (folder / self.rules).is_file():
                return folder / self.rules
        raise SettingError(CONFIG.parent / self.rules, "no such file of rules", f"say in {CONFIG.name} where it is")


def check_command_line(argv: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments that are the SDK's, and whether results are to be de-identified.

    Raises UADError where a path cannot be used, on which the SDK ends with its usage, or a traceback.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, default in (("input", "input"), ("output", "output"), ("model", "models")):
        parser.add_argument(
            f"-{name[0]}", f"--{name}", default=os.environ.get(f"HOLOSCAN_{name.upper()}_PATH", default)
        )
    parser.add_argument("--deidentify", action="store_true")
    given = parser.parse_known_args(argv[1:])[0]
    if not {"-h", "--help"} & set(argv):
        if not CONFIG.is_file():
            raise SettingError(CONFIG, "no such file of settings", "set HOLOSCAN_CONFIG_PATH to one, or unset it")
        if not Path(given.input).is_dir():
            raise DicomError(given.input, "no such folder", "give the folder of a DICOM study with -i")
        if not Path(given.model).exists():
            raise BundleError(given.model, "no such folder", "give the folder of one bundle with -m")
        check_output(Path(given.output))
    return [argument for argument in argv if argument != "--deidentify"], given.deidentify


def check_output(folder: Path) -> None:
    """Raises OutputError where a folder cannot be made, or nothing written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fact = f"cannot be written ({error.strerror or error})"
        raise OutputError(folder, fact, "choose another output folder with -o") from error
