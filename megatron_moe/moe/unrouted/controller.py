"""A low-rank controller picks one cell in each small block of the hidden layer.

Source: "Sparse is Enough in Scaling Transformers", Jaszczur et al., arXiv:2111.12763, section 3.1 (sparse feed-forward
layer): scores x C1 C2 of low rank, one cell of each block of N by their maximum, trained with Gumbel noise and a
straight-through estimator. From memory: the noise and temperature 0.1 of the softmax behind the estimator. This
project's reading, exactly: with s the scores of a block and n its Gumbel noise, the chosen cell is argmax(s + n) in
training and argmax(s) in evaluation; forward the mask is that one-hot vector, backward it is softmax((s + n) /
temperature).

Guaranteed: one cell of each block, k = d_m / N for every token: perfectly balanced over blocks. Causal: a decision
reads one token only. No loss. Training computes all cells, because the estimator needs them; evaluation only what was
chosen.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.options import option
from megatron_moe.layers.context import ForwardContext
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.plan import TokenInfo
from megatron_moe.moe.unrouted.cell_choice import Gathered, gather_tokens
from megatron_moe.moe.unrouted.memory import MemoryLayer, activate, largest, plain_activation
from megatron_moe.moe.unrouted.unrouted_layer import Mixed
from megatron_moe.parallel.collectives import gather_for_partial, reduce_scatter


@dataclass(frozen=True, kw_only=True)
class ControllerOptions:
    """What controller alone can be told."""

    rank: int = option(16, "width of the controller's bottleneck", at_least=1)
    temperature: float = option(0.1, "of the softmax that the gradient passes through", above=0)
    gumbel_noise: bool = option(True, "draw a block's cell in training by its score instead of taking the best")


class ControllerLayer(MemoryLayer):
    """See the file's first lines."""

    Options = ControllerOptions
    facts = Facts(
        paper="Sparse is Enough, arXiv:2111.12763",
        chooses="token, by a low-rank controller",
        batch_independent=True,
        scores="argmax in each block of cells",
        weights="act(pre-activation)",
        capacity="dropless, one cell of each block",
        good_for="fast decoding of single tokens",
        example={"activation": "relu", "router_topk": 1, "router_options": {"rank": "5"}},
    )
    options: ControllerOptions

    def make_parameters(self) -> None:
        hidden = self.site.hidden_size
        self.is_random = self.options.gumbel_noise
        self.activation = plain_activation(self.config, self.site.activation)
        active = self.config.router_topk * self.site.ffn_size
        self.block = self.num_cells // active
        if self.num_cells % active or self.values.shape[0] % self.block:
            raise ConfigError(
                f"--num-experts {self.config.num_experts} with --moe-router-topk {self.config.router_topk} gives "
                f"blocks of {self.num_cells / active:g} cells, which the {self.values.shape[0]} cells of each of "
                f"--expert-model-parallel-size {self.ep.size} do not fall into; use a divisor."
            )
        self.keys = self.new_table(self.num_cells, hidden, self.site.init_std)
        self.control = self.new_table(self.num_cells, self.options.rank, self.options.rank**-0.5)
        self.down = self.new_weight((self.options.rank, hidden), hidden**-0.5)

    def mix(self, tokens: Tensor, info: TokenInfo, ctx: ForwardContext) -> Mixed:
        given = gather_tokens(tokens, info.is_padding, self.ep)
        short = gather_for_partial(tokens.to(self.site.wide) @ self.down.t(), self.ep, given.counts)
        scores = (short @ self.control.to(short.dtype).t()).unflatten(1, (-1, self.block))
        if info.train and self.options.gumbel_noise:
            scores = scores + self._gumbel(info, given.counts, scores)
        best = largest(scores, 1)
        cells = best.squeeze(2) + torch.arange(scores.shape[1], device=best.device) * self.block
        partial = self._train(given, scores, best) if info.train else self._evaluate(given, cells)
        answers = reduce_scatter(partial, self.ep, given.counts).to(tokens.dtype)
        cells = cells + self.first_cell
        used = self.uses(cells, ~given.is_padding[:, None].expand_as(cells))
        return Mixed(answers, self.report(info, used, {}))

    def _gumbel(self, info: TokenInfo, counts: list[int], scores: Tensor) -> Tensor:
        """(T', blocks, N) keyed by token and cell, wherever the cell is."""
        keys = self.ep.comm.all_gather(info.global_keys, counts)
        draws = info.random.at(stream="cells").uniform_rows(keys, self.num_cells)
        mine = draws[:, self.first_cell : self.first_cell + self.values.shape[0]]
        return -(-mine.log()).log().to(scores.dtype).view(scores.shape)

    def _inner(self, given: Gathered) -> Tensor:
        """(T', cells of this rank): what every cell would answer with."""
        return activate(self.activation, given.rows @ self.keys.to(given.rows.dtype).t())

    def _train(self, given: Gathered, scores: Tensor, best: Tensor) -> Tensor:
        soft = (scores / self.options.temperature).softmax(dim=2)
        hard = torch.zeros_like(soft).scatter(2, best, 1.0)
        mask = (hard + (soft - soft.detach())).flatten(1)
        return (self._inner(given) * mask.to(given.rows.dtype)) @ self.values

    def _evaluate(self, given: Gathered, cells: Tensor) -> Tensor:
        weights = self._inner(given).gather(1, cells)
        return self.sum_of_values(cells + self.first_cell, weights)
