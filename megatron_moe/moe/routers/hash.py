"""Hash layers: the token's id alone names its expert, by a map that is fixed before training.

Source: Roller et al., arXiv:2106.04426, section 3: hashing the current token with a random or a balanced table, or the
previous token; MultiHash. `mod` (id modulo E) is the hash of Expert Choice (arXiv:2202.09368, section 4.6) and ReMoE
(arXiv:2412.14711, section 4.2) in their comparisons.
- random: each id draws its expert evenly.   balanced: the most frequent id first, each to the expert with the least
  load so far; ids that never occur go where the fewest ids are.   previous: a random table of the id before the token
  in its document; the first token of a document has a row of its own.
- Each layer draws a table of its own from the run's seed. The balanced table of MultiHash's first slice follows from
  the counts alone and is the same in every layer, and so is `mod`.
This project's reading of MultiHash (--moe-router-topk N above 1, as the default 2 is; give 1 for the plain layer): an
expert is cut along its inner width into N slices, and slice j is taken from the expert that hash function j names.
--num-experts counts slices, --moe-ffn-hidden-size is the width of one: slice j of expert h is block h · N + j. So E/N
experts are hashed to, and what the slices answer is added up; the paper cuts the output matrix otherwise.

Guaranteed: weight 1, N different blocks, no parameters, no loss, nothing random; the plan depends on ids only, so a
token keeps its experts through the whole training. Causal: it reads no later id. The paper has no capacity; one can be
set by --moe-expert-capacity-factor, and drops by position.

The table is saved with the checkpoint, and what is loaded replaces what was made. token_counts is read once, when the
router is made: where the file is not there, the table must come from a checkpoint, and a run that did not load one
stops before its first step. A file that changed since does not change the table of a resumed run.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.options import option
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.plan import RoutingPlan, TokenInfo
from megatron_moe.moe.routers.hash_tables import balanced_table, known_ids, random_table, read_counts
from megatron_moe.moe.routers.router import Router
from megatron_moe.parallel.random import KeyedRandom

logger = logging.getLogger(__name__)

UNKNOWN = -1  # no block: an entry that only a checkpoint can fill


@dataclass(frozen=True, kw_only=True)
class HashOptions:
    """What hash alone can be told."""

    table: str = option(
        "random",
        "what names a token's expert: a random table of ids, one balanced by token_counts, the id modulo E, or a "
        "random table of the previous token's id",
        choices=("random", "balanced", "mod", "previous"),
    )
    token_counts: str | None = option(
        None, "for balanced: .npy or .json file with the number of times that each id occurs"
    )


class HashRouter(Router):
    """See the file's first lines."""

    Options = HashOptions
    is_causal = True
    facts = Facts(
        paper="Hash Layers, arXiv:2106.04426",
        chooses="nobody",
        batch_independent=True,
        scores="none",
        weights="1",
        capacity="dropless",
        good_for="a baseline that learns no routing: fixed experts by token id, no parameters, no loss",
    )
    unused_fields: ClassVar[tuple[str, ...]] = (
        "router_pre_softmax",
        "aux_loss_coeff",
        "z_loss_coeff",
        "token_drop_policy",
        "slot_priority",  # a slice is asked by one choice only
    )
    options: HashOptions
    table: Tensor  # (ids, N) int64: the blocks of each id; not there for mod

    def setup(self) -> None:
        self.num_slices = self.config.router_topk
        self.num_hashed = self.config.num_experts // self.num_slices
        self._check()
        self.counts_missing = False
        if self.options.table != "mod":
            self.new_state("table", self._first_table())

    def _check(self) -> None:
        """Raises ConfigError."""
        table, given = self.options.table, self.options.token_counts
        if self.config.num_experts % self.num_slices:
            raise ConfigError(
                f"--num-experts {self.config.num_experts} cannot be cut into experts of {self.num_slices} slices, one "
                f"for each hash function; use a multiple of {self.num_slices}, or --moe-router-topk 1."
            )
        if table == "mod" and self.num_slices > 1:
            raise ConfigError(
                f"--moe-router-options table=mod is one hash function, but --moe-router-topk {self.num_slices} asks "
                f"for {self.num_slices}; use --moe-router-topk 1, or another table."
            )
        if table == "balanced" and given is None:
            raise ConfigError(
                "--moe-router-options table=balanced needs token_counts=FILE, the number of times that each id occurs; "
                "tools/inspect_dataset.py PREFIX --token-counts FILE.npy writes it."
            )
        if table != "balanced" and given is not None:
            raise ConfigError(
                f"--moe-router-options token_counts={given} has no effect with table={table}; leave it out, or use "
                f"table=balanced."
            )

    def _first_table(self) -> Tensor:
        """(ids, N) int64 blocks."""
        random = KeyedRandom(self.site.seed, stream=f"hash/{self.options.table}", layer=self.site.layer)
        num_ids = self.site.vocab_size
        if self.options.table == "balanced":
            place = self.options.token_counts
            assert place is not None
            if not Path(place).exists():
                self.counts_missing = True
                logger.warning("token_counts=%s is not there: the table must come from a checkpoint", place)
                return torch.full((num_ids, self.num_slices), UNKNOWN)
            hashed = balanced_table(read_counts(place, num_ids), self.num_slices, self.num_hashed, random)
        else:
            num_rows = num_ids + 1 if self.options.table == "previous" else num_ids
            hashed = random_table(num_rows, self.num_slices, self.num_hashed, random)
        return hashed * self.num_slices + torch.arange(self.num_slices)

    @classmethod
    def choices(cls, config: MoEConfig) -> int:
        """Slices of one token."""
        return config.router_topk

    def before_step(self, progress: float) -> None:
        """Raises ConfigError if neither the file nor a checkpoint has filled the table."""
        if self.counts_missing and bool((self.table == UNKNOWN).any()):
            raise ConfigError(
                f"--moe-router-options token_counts={self.options.token_counts}: there is no such file, and no "
                f"checkpoint was loaded that has the table; give the file."
            )

    def forward(self, tokens: Tensor, info: TokenInfo) -> RoutingPlan:
        """tokens: (T, H), not looked at."""
        if self.options.table == "mod":
            expert_ids = known_ids(info.ids, info)[:, None] % self.num_hashed
        elif self.options.table == "previous":
            expert_ids = self.table[known_ids(info.previous_ids + 1, info)]
        else:
            expert_ids = self.table[known_ids(info.ids, info)]
        return self.plan(expert_ids, torch.ones_like(expert_ids, dtype=self.dtype), info)
