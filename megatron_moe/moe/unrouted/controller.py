"""A low-rank controller picks one cell in each small block of the hidden layer.

Source: "Sparse is Enough in Scaling Transformers", Jaszczur et al., arXiv:2111.12763, section 3.1 (sparse feed-forward
layer): scores x C1 C2 of low rank, one cell of each block of N by their maximum, trained with Gumbel noise and a
straight-through estimator. From memory: the noise, and the temperature 0.1 of the softmax behind the estimator. This
project's reading, exactly: with s the scores of a block and n its Gumbel noise (none in evaluation), the layer answers
Σ_blocks act(x K_c^T) V_c with c = argmax(s + n), of equals the lowest. That is Σ m_j act(x K_j^T) V_j with m the
one-hot vector of c; backward, dm/ds is taken to be that of softmax((s + n) / temperature), and nothing else changes.

Guaranteed: one cell of each block, k = d_m / N for every token: perfectly balanced over blocks. Noise is keyed by token
and cell. Causal: a decision reads one token only. No loss. Training computes all d_m cells, because the estimator
needs what the others would have answered; evaluation sums only the chosen ones, and multiplies with their keys only
where that is less to read than all keys, which is when fewer tokens come together than a block has cells (decoding).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.options import option
from megatron_moe.layers.context import ForwardContext
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.plan import TokenInfo
from megatron_moe.moe.unrouted.cell_choice import Gathered, gather_tokens
from megatron_moe.moe.unrouted.memory import CellOptions, MemoryLayer, Reads, activate, plain_activation
from megatron_moe.moe.unrouted.unrouted_layer import Mixed
from megatron_moe.parallel.collectives import gather_for_partial, reduce_scatter
from megatron_moe.parallel.random import KeyedRandom

_CHUNK = 1 << 22  # draws at a time


@dataclass(frozen=True, kw_only=True)
class ControllerOptions(CellOptions):
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
        rank, hidden = self.options.rank, self.site.hidden_size
        self.is_random = self.options.gumbel_noise
        self.activation = plain_activation(self.config, self.site.activation)
        self.block = self._block()
        self.keys = self.new_table(hidden, self.site.init_std)
        self.control = self.new_table(rank, float(rank**-0.5))
        self.down = self.new_weight((rank, hidden), float(hidden**-0.5))

    def _block(self) -> int:
        """N. A block lies within the cells of one expert, and so on one rank, however many ranks there are."""
        active = self.active_cells(self.options.active_cells, "active_cells")
        run = self.num_cells // self.config.num_experts
        if self.num_cells % active or run % (self.num_cells // active):
            raise ConfigError(
                f"--moe-router-type controller: {self.num_cells} cells with {active} active ones (--moe-router-topk x "
                f"--moe-ffn-hidden-size, or --moe-router-options active_cells) make blocks of "
                f"{self.num_cells / active:g}, which must be a whole number and divide the {run} cells of an expert; "
                f"use another number of active cells."
            )
        return self.num_cells // active

    def forward_flops(self, length: int) -> float:
        """All keys and values: the estimator wants what the cells that were not chosen would have answered."""
        return 4.0 * self.site.hidden_size * self.num_cells

    def mix(self, tokens: Tensor, info: TokenInfo, ctx: ForwardContext) -> Mixed:
        given = gather_tokens(tokens, info.is_padding, self.ep)
        short = gather_for_partial(tokens.to(self.site.wide) @ self.down.t(), self.ep, given.counts)
        scores = (short @ self.control.to(short.dtype).t()).unflatten(1, (-1, self.block))
        if info.train and self.options.gumbel_noise:
            keys = self.ep.comm.all_gather(info.global_keys, given.counts)
            scores = scores + self._gumbel(info.random.at(stream="cells"), keys, scores)
        best = scores.detach().argmax(dim=2)  # the first of equals
        cells = best + self.first_cell + self.block * torch.arange(best.shape[1], device=best.device)
        partial = self._train(given, scores, best) if info.train else self._evaluate(given, cells)
        answers = reduce_scatter(partial, self.ep, given.counts)
        used = self.uses(cells, ~given.is_padding[:, None].expand_as(cells))
        return Mixed(answers, self.report(info, used, {}))

    def _gumbel(self, random: KeyedRandom, keys: Tensor, scores: Tensor) -> Tensor:
        """(T', blocks, N) by token and cell, wherever the cell is.   keys: (T',)."""
        cells = self.first_cell + torch.arange(self.values.shape[0], device=keys.device)
        # as KeyedRandom.uniform_rows, but for this rank's columns only
        by_token = random.bits(keys).split(max(1, _CHUNK // len(cells)))
        noise = [-(-random.uniform(part[:, None] + cells).log()).log().to(scores.dtype) for part in by_token]
        return torch.cat(noise).view(scores.shape)

    def _train(self, given: Gathered, scores: Tensor, best: Tensor) -> Tensor:
        inner = activate(self.activation, given.rows @ self.keys.t())
        mask: Tensor = _StraightThrough.apply(scores, best, self.options.temperature)
        return (inner * mask.flatten(1).to(inner.dtype)) @ self.values

    def _evaluate(self, given: Gathered, cells: Tensor) -> Tensor:
        """cells: (T', blocks) of this rank, in the whole memory."""
        tokens, blocks = cells.shape
        local = cells - self.first_cell
        if tokens < self.block:
            # fewer keys are read than there are
            inner = torch.einsum("th,tkh->tk", given.rows, self.keys[local])
        else:
            inner = (given.rows @ self.keys.t()).gather(1, local)
        first = blocks * torch.arange(tokens, device=cells.device)
        weights = activate(self.activation, inner.flatten())
        return self.sum_of_values(Reads(local.flatten(), first, weights))


class _StraightThrough(Function):
    """Forward the one-hot vector of `best`, backward the softmax of scores / temperature."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, best: Tensor, temperature: float) -> Tensor:
        soft = (scores / temperature).softmax(dim=2)
        ctx.save_for_backward(soft)
        ctx.temperature = temperature
        return torch.zeros_like(soft).scatter_(2, best[..., None], 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (soft,) = ctx.saved_tensors
        mean = (grad * soft).sum(dim=2, keepdim=True)
        return soft * (grad - mean) / ctx.temperature, None, None
