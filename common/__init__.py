"""Unsupervised anomaly detection as MONAI bundles: the code that all bundles share."""

__version__ = "0.1.0"
