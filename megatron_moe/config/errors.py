"""Every error that a person is meant to read, each with the exit code that SLURM and scripts decide by.

MegatronMoEError
├── ConfigError         2    the command line, the recipe or a relation between options is wrong
├── DataError           65   a corpus, tokenizer or index file is broken
├── CheckpointError     65   a checkpoint is broken and no fall-back is allowed
├── NoCheckpointError   64   a checkpoint was required and there is no valid one
├── StorageError        74   the disk is full or failing; the last good checkpoint is kept
├── PeerError           86   another rank died or a collective failed
├── HangError           87   the ranks made no progress for too long
├── NoProgressError     93   several attempts in a row ended without a newer checkpoint
├── NonFiniteError      16   a loss or gradient is NaN or infinite
├── SpikeError          16   loss or gradient norm leapt in too many steps in a row
└── ReplicaError        16   ranks that must hold the same numbers do not
"""

from __future__ import annotations

from typing import ClassVar


class MegatronMoEError(Exception):
    """One paragraph for a person: what was given, what is needed, what to change. Main programs exit with its code."""

    exit_code: ClassVar[int] = 1


class ConfigError(MegatronMoEError):
    """A flag, a recipe or a relation between options is wrong; nothing has been written."""

    exit_code: ClassVar[int] = 2


class NonFiniteError(MegatronMoEError):
    """A loss or gradient is NaN or infinite: a suspected fault, worth a run on other machines."""

    exit_code: ClassVar[int] = 16


class SpikeError(MegatronMoEError):
    """The loss or the gradient norm leapt far above those of the steps before; the step was not learnt from."""

    exit_code: ClassVar[int] = 16


class ReplicaError(MegatronMoEError):
    """Ranks that must hold the same numbers do not: a suspected fault of one of them.

    16, not 17: no result was computed twice and rejected, and the last good checkpoint is worth a start elsewhere.
    """

    exit_code: ClassVar[int] = 16


class NoCheckpointError(MegatronMoEError):
    """A checkpoint was required and no valid one was found."""

    exit_code: ClassVar[int] = 64


class DataError(MegatronMoEError):
    """A corpus, an index or a tokenizer file is broken."""

    exit_code: ClassVar[int] = 65


class CheckpointError(MegatronMoEError):
    """A checkpoint is broken, or belongs to another model, and falling back is not allowed."""

    exit_code: ClassVar[int] = 65


class StorageError(MegatronMoEError):
    """Storage is full or failing; the last good checkpoint is kept."""

    exit_code: ClassVar[int] = 74


class PeerError(MegatronMoEError):
    """Another rank died, or a collective failed."""

    exit_code: ClassVar[int] = 86


class HangError(MegatronMoEError):
    """The ranks made no progress for longer than they may: one of them hangs, and the others wait for it."""

    exit_code: ClassVar[int] = 87


class NoProgressError(MegatronMoEError):
    """Several attempts in a row ended without a newer checkpoint: starting again as it is would end the same way."""

    exit_code: ClassVar[int] = 93
