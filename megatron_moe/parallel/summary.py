"""What torchrun's summary says of a rank that failed: our paragraph, where it would point to its documentation."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path


def note_for_torchrun(message: str, environment: Mapping[str, str]) -> None:
    """Write the file that torchrun reads when this rank ends; nothing without torchrun, or when that cannot be written.

    torchrun prints the callstack, and takes the rank with the earliest second for the cause.
    """
    path = environment.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    about = {"py_callstack": message, "timestamp": str(int(time.time()))}
    with suppress(OSError):
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": about}}))
