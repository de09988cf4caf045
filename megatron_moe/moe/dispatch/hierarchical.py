"""A token crosses once to each node that holds any of its experts, and goes to their ranks from there; and back.

    between nodes   one row for each (token, node), to the rank with the same place in that node
    inside a node   one row for each (token, rank), from there to the ranks that hold the experts
    back            answers are weighted and summed on their rank, then in the node; one row for each (token, node) home

The links between nodes are the slow ones. Of k experts that stand on D nodes D rows cross instead of k.
Taken as an idea from DeepSeek-V3 (arXiv:2412.19437, section 3.2.2).

A rank holds, between the two stages, at most one row for each token of the ranks with its place, whatever k is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.moe.dispatch.dispatcher import Dispatcher, ExpertBatch, NodeAxes
from megatron_moe.moe.dispatch.one_per_rank import OnePerRankDispatcher
from megatron_moe.moe.dispatch.visits import Visits, bring_home, send_visits
from megatron_moe.moe.plan import RoutingPlan
from megatron_moe.parallel.collectives import nothing
from megatron_moe.parallel.state import Axis


@dataclass(frozen=True)
class _WayHome:
    visits: Visits  # of nodes
    wide: torch.dtype  # of the weights
    inside: ExpertBatch


class HierarchicalDispatcher(Dispatcher):
    """Visits of nodes, and inside a node visits of ranks."""

    def __init__(self, num_experts: int, ep: Axis, etp: Axis, nodes: NodeAxes | None = None) -> None:
        super().__init__(num_experts, ep, etp)
        if nodes is None or nodes.between.size * nodes.inside.size != ep.size:
            raise ValueError(f"the axes of nodes do not make up the {ep.size} ranks of ep")
        self.between = nodes.between
        self.inside = OnePerRankDispatcher(num_experts // nodes.between.size, nodes.inside, etp)

    def dispatch(
        self, tokens: Tensor, plan: RoutingPlan, keys: Tensor | None = None, beside: Callable[[], None] = nothing
    ) -> ExpertBatch:
        arrival = send_visits(tokens, plan, self.between, keys, beside)
        inside = self.inside.dispatch(arrival.rows, arrival.plan, arrival.keys)
        way = _WayHome(arrival.visits, plan.combine_weights.dtype, inside)
        return ExpertBatch(inside.rows, inside.tokens_per_expert, inside.keys, way)

    def combine(self, answers: Tensor, batch: ExpertBatch) -> Tensor:
        way: _WayHome = batch.way_home
        return bring_home(self.inside.combine(answers, way.inside), way.visits, way.wide)
