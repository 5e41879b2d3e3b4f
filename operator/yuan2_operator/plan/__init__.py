"""Spec, prior status and settings become a frozen plan; no input or output here."""
