"""What an MoE layer puts on the wire: counted on gloo ranks, beside the formula. Nothing is timed.

Every router runs on the same layout: all ranks share the experts, tokens are split evenly. A row is one token's hidden
state. Only what leaves its rank is counted; rows that a rank sends to itself do not travel. "Other" bytes go with the
rows: experts and weights of the assignments, and counts. Each layer makes four transfers: to the experts, home, and the
gradients of both.

Rows per token of one transfer, on R ranks that hold E experts, when every set of k experts is equally likely: k (R-1)/R
for one row per assignment, D (R-1)/R for one row per rank, D = R (1 - C(E-E/R, k) / C(E, k)) the ranks that k experts
stand on. SAM's experts stand on one rank, and D is 1, unless a group of W experts straddles s ranks: then
D = s (1 - C(W-W/s, k) / C(W, k)).

Between M nodes of N ranks, whose links are the slow ones: (M-1)/M times k or D. The hierarchical way sends one row per
node, D' (M-1)/M for the D' nodes that k experts stand on, and D (N-1)/N inside the nodes.

Examples:
    python tools/benchmark/wire_bytes.py
    python tools/benchmark/wire_bytes.py --nodes 2
    python tools/benchmark/wire_bytes.py --ranks 4 --experts 16 --topk 2 4 --json
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from math import comb

import torch
from torch import Tensor

from megatron_moe.config.errors import ConfigError, MegatronMoEError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.models.whole import plain_context
from megatron_moe.moe.dispatch.dispatcher import NodeAxes
from megatron_moe.moe.layer import build_dispatcher
from megatron_moe.moe.methods import build_router
from megatron_moe.moe.routers.router import Router, Site
from megatron_moe.moe.token_info import token_info
from megatron_moe.parallel.communicator import Communicator, Pending
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.launch import fork_ranks
from megatron_moe.parallel.layout import materialise
from megatron_moe.parallel.state import Axis, ParallelState

BY_NODE = "top_k, by node"  # on several nodes only
METHODS = ("switch", "top_k", "top_k, one per rank", BY_NODE, "sam flat", "sam hierarchical")
MOST_EXPERTS = 256  # so many logits differ in bfloat16


@dataclass(frozen=True)
class Case:
    """One router on the ranks; groups: of experts, for SAM only."""

    method: str
    experts: int
    choices: int
    groups: int | None

    def config(self) -> MoEConfig:
        fields: dict[str, object] = {"num_experts": self.experts, "router_topk": self.choices}
        if self.groups is not None:
            options = {"groups": str(self.groups), "mode": self.method.split()[1]}
            return MoEConfig(router_type="sam", router_options=options, **fields)  # type: ignore[arg-type]
        if self.method == "switch":
            return MoEConfig(router_type="switch", router_options={"jitter_eps": "0"}, **fields)  # type: ignore[arg-type]
        return MoEConfig(router_type="top_k", router_pre_softmax=True, **fields)  # type: ignore[arg-type]

    @property
    def dispatcher(self) -> str:
        if self.method == BY_NODE:
            return "hierarchical"
        return "alltoall" if self.method in ("switch", "top_k") else "one_per_rank"

    def formula(self, ranks: int, nodes: int = 1) -> float:
        """Rows per token that leave their rank in one transfer."""
        if self.dispatcher == "hierarchical":
            inside = ranks // nodes
            return self.between(ranks, nodes) + self._visited(ranks) * (inside - 1) / inside
        return self._visited(ranks) * (ranks - 1) / ranks

    def between(self, ranks: int, nodes: int) -> float:
        """Those of them that leave their node."""
        return self._visited(nodes if self.dispatcher == "hierarchical" else ranks) * (nodes - 1) / nodes

    def _visited(self, ranks: int) -> float:
        """Ranks, or nodes, to which a token travels; with all-to-all, as often as it has experts there."""
        if self.dispatcher == "alltoall":
            return float(self.choices)
        if self.groups is None:
            return ranks_of(self.choices, self.experts, ranks)
        return ranks_of(self.choices, self.experts // self.groups, max(1, ranks // self.groups))


@dataclass(frozen=True)
class Sent:
    """What left one rank, or all of them."""

    tokens: int
    visited: int  # (token, rank) pairs, the own rank included
    rows: tuple[int, ...]  # of each transfer
    between: tuple[int, ...]  # those of them that left their node
    row_bytes: int  # of all transfers
    other_bytes: int


def ranks_of(choices: int, experts: int, ranks: int) -> float:
    """Mean number of ranks that hold any of so many experts, drawn without replacement."""
    return ranks * (1 - comb(experts - experts // ranks, choices) / comb(experts, choices))


class Counting(Communicator):
    """Another communicator, of whose exchanges it notes the rows and bytes that leave this rank, and the rows that
    leave its node.
    """

    def __init__(self, axis: Axis, node: range, hidden_size: int) -> None:
        """node: the ranks of the axis that stand in this rank's node."""
        self._inner = axis.comm
        self._rank = axis.rank
        self._node = node
        self._hidden_size = hidden_size
        self.rows: list[int] = []
        self.between: list[int] = []
        self.row_bytes = 0
        self.other_bytes = 0

    def all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        leaving = sum(send) - send[self._rank]
        size = tensor[:1].nbytes * leaving if len(tensor) else 0
        if tensor.is_floating_point() and tensor.shape[1:] == (self._hidden_size,):
            self.rows.append(leaving)
            self.between.append(sum(send) - sum(send[rank] for rank in self._node))
            self.row_bytes += size
        else:
            self.other_bytes += size
        return self._inner.all_to_all(tensor, send, receive)

    def all_gather(self, tensor: Tensor, rows: Sequence[int]) -> Tensor:
        self.other_bytes += tensor.nbytes * (len(rows) - 1)
        return self._inner.all_gather(tensor, rows)

    def all_reduce_(self, tensor: Tensor, op: str = "sum") -> Tensor:
        raise RuntimeError("a dispatcher reduces nothing over ep")

    def reduce_scatter(self, tensor: Tensor, rows: Sequence[int]) -> Tensor:
        raise RuntimeError("a dispatcher reduces nothing over ep")

    def broadcast_(self, tensor: Tensor, source: int) -> Tensor:
        raise RuntimeError("a dispatcher broadcasts nothing over ep")

    def send(self, tensor: Tensor, to: int) -> Pending:
        raise RuntimeError("a dispatcher sends nothing to one rank of ep")

    def receive_(self, tensor: Tensor, source: int) -> Pending:
        raise RuntimeError("a dispatcher receives nothing from one rank of ep")

    def send_receive_(self, tensor: Tensor, to: int, received: Tensor, source: int) -> Pending:
        raise RuntimeError("a dispatcher sends nothing round the ranks of ep")

    def barrier(self) -> None:
        self._inner.barrier()


def groups_for(experts: int, choices: int, ranks: int) -> int:
    """As many groups as ranks, or the most that hold so many experts each and do not cut across ranks unevenly."""
    return max(g for g in range(1, ranks + 1) if ranks % g == 0 and experts % g == 0 and choices <= experts // g)


def cases_of(experts: Sequence[int], choices: Sequence[int], ranks: int, nodes: int = 1) -> list[Case]:
    """All methods for all pairs that can be; ConfigError for experts that cannot be split."""
    found = []
    for number in experts:
        if number % ranks or not ranks <= number <= MOST_EXPERTS:
            raise ConfigError(
                f"--experts {number}: expected a multiple of --ranks {ranks}, at most {MOST_EXPERTS}; "
                f"use {ranks} or {2 * ranks}."
            )
        for k in (k for k in choices if k <= number):
            groups = groups_for(number, k, ranks)
            for method in METHODS:
                # one group, or one expert in each, is no choice in two steps
                pointless = method == "sam hierarchical" and groups in (1, number)
                if not pointless and (method != BY_NODE or nodes > 1) and (method != "switch" or k == 1):
                    found.append(Case(method, number, k, groups if method.startswith("sam") else None))
    return found


def even_tokens(case: Case, tokens: int, hidden_size: int, ranks: int, seed: int) -> Tensor:
    """(tokens, H) whose first features are logits of the experts, then of the groups, and treat all ranks alike.

    Every order of the experts is equally likely; with each token come its images under ranks - 1 shifts that carry
    every rank into every other, and groups into groups. So the rows of each method are those of the formula, to the
    last one, where only D is a matter of chance.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = case.groups or ranks
    straddled = max(1, ranks // groups)
    first = torch.rand(tokens // ranks, case.experts, generator=generator).argsort(dim=1) / 8
    second = torch.rand(tokens // ranks, groups, generator=generator).argsort(dim=1) / 8
    blocks = first.view(-1, ranks // straddled, straddled, case.experts // ranks)
    of_groups = second.view(-1, ranks // straddled, groups * straddled // ranks)
    images = []
    for shift in range(ranks):
        outer, inner = divmod(shift, straddled)
        experts = blocks.roll((outer, inner), (1, 2)).flatten(1)
        images.append(torch.cat([experts, of_groups.roll(outer, 1).flatten(1)], dim=1))
    logits = torch.cat(images)
    rest = hidden_size - logits.shape[1]
    return torch.cat([logits, torch.randn(len(logits), rest, generator=generator)], dim=1).to(torch.bfloat16)


def reading_router(case: Case, hidden_size: int) -> Router:
    """A router whose logits are the first features of a token."""
    router = build_router(case.config(), hidden_size, Site(ParallelState.alone().tp_cp))
    materialise(router, ParallelState.alone(), 0, torch.device("cpu"))
    features = torch.eye(hidden_size)
    with torch.no_grad():
        router.get_parameter("weight").copy_(features[: case.experts])
        for name, parameter in router.named_parameters():
            if name == "group_weight":
                parameter.copy_(features[case.experts : case.experts + len(parameter)])
    return router


def send_once(case: Case, state: ParallelState, tokens: int, hidden_size: int) -> Sent:
    """One forward and backward pass, with experts that answer what they are asked."""
    ep, inside = state.ep, state.ep_local.size
    node = ep.rank // inside
    alone = ParallelState.alone()
    flat = Counting(ep, range(node * inside, (node + 1) * inside), hidden_size)
    between = Counting(state.ep_node, range(node, node + 1), hidden_size)
    within = Counting(state.ep_local, range(inside), hidden_size)
    hidden = even_tokens(case, tokens, hidden_size, ep.size, ep.rank).requires_grad_()
    ctx = replace(plain_context(torch.zeros(1, tokens, dtype=torch.int64)), train=True)
    plan = reading_router(case, hidden_size)(hidden, token_info(ctx, alone.tp, 0, 1))
    nodes = NodeAxes(replace(state.ep_node, comm=between), replace(state.ep_local, comm=within))
    dispatcher = build_dispatcher(case.dispatcher, case.experts, replace(ep, comm=flat), alone.etp, nodes=nodes)
    batch = dispatcher.dispatch(hidden, plan)
    dispatcher.combine(batch.rows * 1, batch).sum().backward()
    pairs = plan.token_ids * ep.size + plan.expert_ids // (case.experts // ep.size)
    used = (between, within) if case.dispatcher == "hierarchical" else (flat,)
    return Sent(
        tokens=tokens,
        visited=len(pairs.unique()),
        rows=in_each(part.rows for part in used),
        between=in_each(part.between for part in used),
        row_bytes=sum(part.row_bytes for part in used),
        other_bytes=sum(part.other_bytes for part in used),
    )


def in_each(parts: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """The sum of all parts for each transfer; along an axis of one rank there was none."""
    return tuple(sum(rows) for rows in zip_longest(*parts, fillvalue=0))


def send_all(
    rank: int, ranks: int, cases: Sequence[Case], tokens: int, hidden_size: int, nodes: int = 1
) -> list[Sent]:
    """Every case on this rank."""
    state = ParallelState.distributed(Grid(ranks, ep=ranks, ep_ranks_per_node=ranks // nodes))
    return [send_once(case, state, tokens, hidden_size) for case in cases]


def counted(cases: Sequence[Case], given: argparse.Namespace) -> list[Sent]:
    """What left all ranks together, for each case; starts them once."""
    with warnings.catch_warnings():
        # Python 3.12 warns of forking beside threads; the children use none of them
        warnings.simplefilter("ignore", DeprecationWarning)
        answers = fork_ranks(given.ranks, send_all, cases, given.tokens, given.hidden_size, given.nodes)
    found = []
    for parts in zip(*answers, strict=True):
        found.append(
            Sent(
                tokens=sum(part.tokens for part in parts),
                visited=sum(part.visited for part in parts),
                rows=in_each(part.rows for part in parts),
                between=in_each(part.between for part in parts),
                row_bytes=sum(part.row_bytes for part in parts),
                other_bytes=sum(part.other_bytes for part in parts),
            )
        )
    return found


def lines_of(cases: Sequence[Case], sent: Sequence[Sent], ranks: int, nodes: int) -> list[dict[str, object]]:
    """One line for each case: rows per token of one transfer, bytes per token of all four."""
    return [
        {
            **asdict(case),
            "dispatcher": case.dispatcher,
            "rows_per_token": what.rows[0] / what.tokens,
            "formula": case.formula(ranks, nodes),
            "rows_between_nodes": what.between[0] / what.tokens,
            "formula_between_nodes": case.between(ranks, nodes),
            "row_bytes_per_token": what.row_bytes / what.tokens,
            "other_bytes_per_token": what.other_bytes / what.tokens,
        }
        for case, what in zip(cases, sent, strict=True)
    ]


def table(lines: Sequence[dict[str, object]], given: argparse.Namespace) -> str:
    """Markdown."""
    text = [
        f"{given.ranks} ranks, {given.tokens} tokens each, hidden width {given.hidden_size}, bfloat16. Rows that leave "
        "their rank, per token and transfer; bytes of all four transfers, per token. "
        "Rows to oneself are not counted.\n",
    ]
    heads = ["E", "k", "method", "groups", "rows", "formula", "bytes of rows", "other bytes"]
    if given.nodes > 1:
        heads[6:6] = ["between nodes", "formula"]
    text += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for line in lines:
        rows = f"{line['rows_per_token']:.3f} | {line['formula']:.3f}"
        if given.nodes > 1:
            rows += f" | {line['rows_between_nodes']:.3f} | {line['formula_between_nodes']:.3f}"
        sizes = f"{line['row_bytes_per_token']:,.0f} | {line['other_bytes_per_token']:,.0f}"
        groups = line["groups"] or "-"
        text.append(f"| {line['experts']} | {line['choices']} | {line['method']} | {groups} | {rows} | {sizes} |")
    return "\n".join(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ranks", type=int, default=8, help="ranks that share the experts, all on this machine")
    parser.add_argument("--nodes", type=int, default=1, help="that the ranks are taken to stand on")
    parser.add_argument("--experts", nargs="+", type=int, default=[8, 16, 64])
    parser.add_argument("--topk", nargs="+", type=int, default=[1, 2, 4, 8], help="experts per token")
    parser.add_argument("--tokens", type=int, default=512, help="of each rank, a multiple of --ranks")
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--json", action="store_true", help="a list of lines instead of a table")
    return parser.parse_args(arguments)


def check(given: argparse.Namespace) -> None:
    """Raises ConfigError."""
    if given.ranks < 2:
        raise ConfigError(f"--ranks {given.ranks}: nothing leaves a rank alone; use 2 or more.")
    if given.nodes < 1 or given.ranks % given.nodes:
        raise ConfigError(f"--nodes {given.nodes}: expected a number that divides --ranks {given.ranks}.")
    if given.tokens < given.ranks or given.tokens % given.ranks:
        raise ConfigError(f"--tokens {given.tokens}: expected a multiple of --ranks {given.ranks}.")
    if min(given.topk) < 1:
        raise ConfigError(f"--topk {min(given.topk)}: expected an integer of at least 1.")
    if given.hidden_size < max(given.experts) + given.ranks:
        needed = max(given.experts) + given.ranks
        raise ConfigError(f"--hidden-size {given.hidden_size} is too narrow for the logits; use {needed} or more.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    given = parse(arguments)
    # forked ranks cannot share a pool of threads
    torch.set_num_threads(1)
    try:
        check(given)
        cases = cases_of(given.experts, given.topk, given.ranks, given.nodes)
        lines = lines_of(cases, counted(cases, given), given.ranks, given.nodes)
    except MegatronMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(lines, indent=2) if given.json else table(lines, given))
    return 0


if __name__ == "__main__":
    sys.exit(main())
