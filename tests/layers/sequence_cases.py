"""What every core over cut sequences is held to: the softmax of whole sequences, written out, and its gradients."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_moe.layers.attention_core import AttentionCore, Sight
from megatron_moe.layers.context import SequenceView
from megatron_moe.layers.context_parallel import context_rows
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.state import Axis, ParallelState
from tests.layers.contexts import CPU, context

S, SOURCE, B, GROUPS, PER_GROUP, WIDTH = 16, 24, 2, 2, 2, 3


@dataclass(frozen=True)
class Case:
    """One kind of attention; source: keys of another stream."""

    causal: bool = True
    packed: bool = False
    prefix: bool = False
    bias: int = 0  # samples of it: 1 for all, or B; 0 = none
    source: bool = False
    groups: int = GROUPS
    per_group: int = PER_GROUP


CASES = {
    "causal": Case(),
    "full": Case(causal=False),
    "causal, packed and padded": Case(packed=True),
    "full, packed and padded": Case(causal=False, packed=True),
    "prefix": Case(prefix=True),
    "prefix, packed and padded": Case(prefix=True, packed=True),
    "causal with a bias": Case(bias=1),
    "full with a bias": Case(causal=False, bias=1),
    "a bias for each sample, a prefix, packed and padded": Case(bias=B, prefix=True, packed=True),
    "another stream": Case(causal=False, source=True),
    "another stream, packed and padded": Case(causal=False, source=True, packed=True),
    "one group of four heads": Case(groups=1, per_group=4, bias=1),
    "four groups of one head": Case(groups=4, per_group=1, packed=True),
    "four groups of three heads": Case(groups=4, per_group=3, bias=1),
}


def segments_of(length: int) -> Tensor:
    """(S, 2): three documents whose borders are no chunks' borders; one document and padding."""
    found = torch.zeros(length, B, dtype=torch.int32)
    found[length // 4 + 1 :, 0] = 1
    found[length - 5 :, 0] = 2
    found[length - 3 :, 1] = -1
    return found


def view_of(length: int, case: Case, state: ParallelState) -> SequenceView:
    view = context(length, B, state, segments=segments_of(length) if case.packed else None).view
    if not case.prefix:
        return view
    prefix = torch.zeros(length, B, dtype=torch.bool)
    prefix[: length // 2 + 1, 0] = True
    prefix[length - 5 : length - 2, 0] = True
    prefix[:2, 1] = True
    return replace(view, prefix=prefix)


@dataclass(frozen=True)
class Whole:
    """Inputs of all ranks together, and the gradient of the answer."""

    query: Tensor  # (S, B, G, q, D)
    key: Tensor  # (S', B, G, D)
    value: Tensor
    bias: Tensor | None  # (1 or B, heads, S, S')
    cotangent: Tensor

    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in (self.query, self.key, self.value, self.bias) if tensor is not None]


def draw(case: Case, dtype: torch.dtype = torch.float64) -> Whole:
    generator = torch.Generator().manual_seed(3)
    keys, heads = SOURCE if case.source else S, case.groups * case.per_group

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return Whole(
        query=2 * normal(S, B, case.groups, case.per_group, WIDTH),
        key=2 * normal(keys, B, case.groups, WIDTH),
        value=normal(keys, B, case.groups, WIDTH),
        bias=normal(case.bias, heads, S, keys) if case.bias else None,
        cotangent=normal(S, B, case.groups, case.per_group, WIDTH),
    )


def allowed(case: Case, queries: SequenceView, keys: SequenceView) -> Tensor:
    """(B, S, S') bool, one pair after another."""
    found = torch.zeros(B, queries.length, keys.length, dtype=torch.bool)
    for sample in range(B):
        for row in range(queries.length):
            for column in range(keys.length):
                ahead = case.causal and column > row
                chosen = keys.prefix is not None and bool(keys.prefix[column, sample])
                same = queries.segments[row, sample] == keys.segments[column, sample]
                found[sample, row, column] = bool(same) and (not ahead or chosen)
    return found


def slow_answer(case: Case, whole: Whole) -> list[Tensor]:
    """The answer, and gradients of query, key, value and bias, from all scores at once."""
    alone = ParallelState.alone()
    queries = view_of(S, case, alone)
    keys = view_of(SOURCE, case, alone) if case.source else queries
    inputs = [tensor.detach().requires_grad_() for tensor in whole.leaves()]
    scores = torch.einsum("sbgqd,tbgd->bgqst", inputs[0], inputs[1]) / math.sqrt(WIDTH)
    if case.bias:
        scores = scores + inputs[3].view(-1, case.groups, case.per_group, *inputs[3].shape[2:])
    scores = scores.masked_fill(~allowed(case, queries, keys)[:, None, None], -math.inf)
    answer = torch.einsum("bgqst,tbgd->sbgqd", scores.softmax(dim=-1), inputs[2])
    return [answer.detach(), *torch.autograd.grad((answer * whole.cotangent).sum(), inputs)]


def answer_of_rank(core: AttentionCore, case: Case, whole: Whole, state: ParallelState) -> list[Tensor]:
    """The same five of this rank's rows, from the core."""
    queries = view_of(S, case, state)
    keys = view_of(SOURCE, case, state) if case.source else queries
    cuts = [queries.rows, keys.rows, keys.rows]
    inputs = [tensor[rows].requires_grad_() for tensor, rows in zip(whole.leaves(), cuts, strict=False)]
    if whole.bias is not None:
        inputs.append(whole.bias[:, :, queries.rows].requires_grad_())
    bias = inputs[3] if whole.bias is not None else None
    answer = core(*inputs[:3], Sight(queries, keys, case.causal, bias))
    gradients = torch.autograd.grad((answer * whole.cotangent[queries.rows]).sum(), inputs)
    return [answer.detach(), *gradients]


def worst_errors(rank: int, world_size: int, make: Callable[[Axis], AttentionCore]) -> dict[str, float]:
    """On this rank, for each case: the largest difference of the answer and of all gradients."""
    state = ParallelState.distributed(Grid(world_size, cp=world_size))
    found = {}
    for name, case in CASES.items():
        whole = draw(case)
        wanted, mine = slow_answer(case, whole), answer_of_rank(make(state.cp), case, whole, state)
        rows = [context_rows(tensor.shape[0], world_size, rank, CPU) for tensor in wanted[:4]]
        cut = [tensor[held] for tensor, held in zip(wanted[:4], rows, strict=True)]
        if case.bias:
            cut.append(wanted[4][:, :, rows[0]])
        # the largest of tensors, for Python's max passes over what is no number
        found[name] = float(torch.stack([(a - b).abs().max() for a, b in zip(mine, cut, strict=True)]).max())
    return found
