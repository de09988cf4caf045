"""Optional libraries: imported when asked for, and named with the line that installs them when missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from megatron_moe.config.errors import ConfigError


def require(name: str, extra: str) -> ModuleType:
    """The module `name`, which the extra `extra` of setup.py brings; ConfigError says how to install it if absent.

    A library that is there but fails to import one of its own parts says which part, so nobody reinstalls in vain.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package
        problem = "is not installed" if missing else f"cannot be imported ({error})"
        raise ConfigError(
            f"the library '{name}' is needed here and {problem}; install it with: pip install \"megatron_moe[{extra}]\""
        ) from error
