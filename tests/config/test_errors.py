"""Exit codes are a promise to SLURM scripts: reliability.md section 6."""

import pytest

from megatron_moe.config import errors


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("ConfigError", 2),
        ("NonFiniteError", 16),
        ("SpikeError", 16),
        ("ReplicaError", 16),
        ("NoCheckpointError", 64),
        ("DataError", 65),
        ("CheckpointError", 65),
        ("StorageError", 74),
        ("PeerError", 86),
        ("HangError", 87),
        ("NoProgressError", 93),
    ],
)
def test_each_error_has_its_exit_code(name: str, code: int) -> None:
    error = getattr(errors, name)("told")
    assert isinstance(error, errors.MegatronMoEError)
    assert error.exit_code == code
    assert str(error) == "told"


def test_no_error_ends_in_success() -> None:
    assert errors.MegatronMoEError.exit_code != 0
    assert all(kind.exit_code != 0 for kind in errors.MegatronMoEError.__subclasses__())
