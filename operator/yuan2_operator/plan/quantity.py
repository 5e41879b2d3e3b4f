"""Kubernetes' resource quantities as numbers."""

from __future__ import annotations

from decimal import Decimal

_FACTORS = {
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    "k": Decimal(10**3),
    **{unit: Decimal(10 ** (3 * power)) for power, unit in enumerate("MGTPE", start=2)},
    **{f"{unit}i": Decimal(1024**power) for power, unit in enumerate("KMGTPE", start=1)},
}


def parse_quantity(text: str | int | float) -> Decimal:
    """`500m` is 0.5, `64Gi` is 68719476736, `1e3` is 1000; ValueError for anything else."""
    written = str(text).strip()
    digits = written.rstrip("KMGTPEinumk") if not written[-1:].isdigit() else written
    suffix = written[len(digits) :]
    try:
        return Decimal(digits) * (_FACTORS[suffix] if suffix else 1)
    except (ArithmeticError, KeyError) as error:
        raise ValueError(f"{written!r} is not a quantity such as 4, 500m or 64Gi") from error


def decimal_gigabytes(size: float) -> str:
    """Bytes as a quantity that people read: `3.9G`, `44G`."""
    return f"{size / 1e9:.{0 if size >= 9.95e9 else 1}f}G"
