"""How stored vectors are compared."""

from typing import Any

import pytest


def nearly(found: Any, wanted: Any) -> bool:
    """Equal but for the last digits of another machine's arithmetic."""
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(nearly(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(nearly, found, wanted))
    return bool(found == (pytest.approx(wanted, rel=1e-10, abs=1e-12) if isinstance(wanted, float) else wanted))
