"""A bundle with other settings, as a command line names it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from monai.bundle import ConfigParser

from ..bundle import check_items, folder_of, parse_items, split_settings
from ..errors import BundleError


@dataclass(frozen=True)
class Variant:
    """A bundle, and items of its inference.json that are other than shipped.

    The threshold stays the calibrated one, unless an item gives another; the result's `warnings` say where that is not
    of these settings.
    """

    bundle: str  # its key, or the path of an inference.json
    items: tuple[str, ...] = ()  # ITEM=VALUE

    @classmethod
    def parse(cls, text: str) -> Variant:
        """From `BUNDLE[:ITEM=VALUE,...]`. Raises BundleError or SettingError."""
        bundle, items = split_settings(text)
        variant = cls(bundle, tuple(items))
        variant.parser()
        return variant

    @property
    def config(self) -> Path:
        """Its inference.json. Raises BundleError where there is none."""
        if not self.bundle.endswith(".json"):
            return folder_of(self.bundle) / "configs" / "inference.json"
        if not Path(self.bundle).is_file():
            raise BundleError(self.bundle, "no such file", "give the path of an inference.json")
        return Path(self.bundle)

    @property
    def name(self) -> str:
        """The bundle, or its folder, and what is other, but where the weights are."""
        folders = [part for part in self.config.resolve().parts[:-1] if part != "configs"]
        return " ".join([folders[-1], *(item for item in self.items if not item.startswith("weights="))])

    @property
    def key(self) -> str:
        """Its name in tables and folders of a benchmark."""
        return re.sub(r"[^\w.=+-]+", "_", " ".join([self.bundle, *self.items]))

    def parser(self) -> ConfigParser:
        """The config with the other items. Raises BundleError or SettingError."""
        parser, items = ConfigParser(), parse_items(self.items)
        parser.read_config(self.config)
        check_items(parser, items)
        for item, value in items.items():
            parser[item] = value
        return parser
