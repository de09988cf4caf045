"""What every layer is told of a forward pass, so that nothing is written to self."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_moe.layers.parallel_linear import TensorSplit
from megatron_moe.layers.weight_gradients import WeightGradients
from megatron_moe.parallel.random import KeyedRandom
from megatron_moe.parallel.state import Axis


class KeyValueCache(Protocol):
    """Keys and values of earlier tokens, one store for each layer (decoding only)."""

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add (S, B, G, D) of the new tokens; returns all so far, (past + S, B, G, D)."""

    def append_kept(self, layer: int, kept: Tensor) -> Tensor:
        """Add (S, B) bool, which of the new tokens may be seen, before their keys; returns all so far, (past + S, B).

        Only for layers that pass some tokens by.
        """

    def keep(self, layer: int, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Keys and values of the encoder's output, (S', B, G, D) each, made at the first call."""


@dataclass(frozen=True)
class SequenceView:
    """The tokens of one stream of a microbatch, S sequence, B samples: whole on every rank, a few integers."""

    tokens: Tensor  # (S, B) int64 vocabulary ids
    positions: Tensor  # (S, B) int64 for position embeddings; may restart in packed documents
    segments: Tensor  # (S, B) int32 document in the sample; -1 = padding
    sample_ids: Tensor  # (B,) int64 place in the run's sample order
    rows: Tensor  # (S/cp,) int64: which sequence indices this context-parallel rank holds, in its order
    segmented: bool  # False: one segment and no padding everywhere, known on the host
    start: int = 0  # sequence index of row 0 (decoding)
    before: Tensor | None = None  # (B,) int64 id of the token before row 0 in its document (decoding)
    num_passes: int = 1  # 2: the samples stand here twice, one pass after the other
    prefix: Tensor | None = None  # (S, B) bool: tokens that all tokens of their document see; None = there are none

    @property
    def length(self) -> int:
        return self.tokens.shape[0]

    @property
    def num_samples(self) -> int:
        return self.tokens.shape[1]

    @property
    def samples_of_a_pass(self) -> int:
        return self.tokens.shape[1] // self.num_passes

    @property
    def num_rows(self) -> int:
        """Sequence rows of this context-parallel rank."""
        return self.rows.shape[0]


@dataclass(frozen=True)
class ForwardContext:
    """One forward pass of one microbatch."""

    view: SequenceView
    random: KeyedRandom  # at (seed, step); layers add stream and layer
    train: bool
    sequence_parallel: bool  # a choice of this pass: decoding one token turns it off
    tensor_overlap: bool = False  # collectives over tp travel beside the products that use or make them
    weight_gradients: WeightGradients | None = None
    await_weights: Callable[[int | None], None] | None = None  # called before a layer (None: before what is in none)
    cache: KeyValueCache | None = None
    with_logits: bool = True  # False: the last stage stops before the product with the vocabulary
    bias: Tensor | None = None  # (1 or B, heads/tp, S/cp, S') added to the scores of self-attention
    source: SequenceView | None = None  # the encoder's stream
    encoded: bool = False  # the cache holds what cross-attention looks at already: the encoder need not run
    memory: Tensor | None = None  # its output: (S'/(cp·tp), B, H) under sequence parallelism, else (S'/cp, B, H)

    def split_over(self, tp: Axis) -> TensorSplit:
        """How the products of this pass are shared over tp."""
        return TensorSplit(tp, self.view.num_rows, self.sequence_parallel, self.tensor_overlap)
