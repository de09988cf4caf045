"""What every layer without a router is held to; tests/moe/unrouted/test_registry.py runs it over the registry."""

from dataclasses import replace
from typing import Any

import torch
from layers.contexts import context
from moe_rows import rows_of, token_info
from torch import Tensor, nn

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.methods import build_unrouted
from megatron_moe.moe.plan import TokenInfo
from megatron_moe.moe.unrouted.unrouted_layer import LayerSite, Mixed, UnroutedLayer
from megatron_moe.parallel.layout import materialise
from megatron_moe.parallel.state import ParallelState

ALONE = ParallelState.alone()
HIDDEN, LENGTH, SAMPLES = 6, 6, 3
PADDING = ((5, 0), (5, 2), (4, 2), (0, 1))  # (position, sample)
ROWS = torch.arange(LENGTH * SAMPLES)


def make_layer(
    fields: dict[str, Any], *, hidden: int = HIDDEN, state: ParallelState = ALONE, dtype: torch.dtype = torch.float64
) -> UnroutedLayer:
    """From fields of [moe], four experts of width 4 unless they say more; weights about as large as tokens are.

    The same on every layout.
    """
    squares = "num_subkeys" in fields.get("router_options", {})
    config = MoEConfig(**{"num_experts": 4, "ffn_hidden_size": None if squares else 4, **fields})
    site = LayerSite(
        index=0,
        hidden_size=hidden,
        ffn_size=config.ffn_hidden_size or 4,
        activation=config.activation or "swiglu",
        init_std=0.5,
        output_std=0.5,
        dtype=dtype,
        state=state,
    )
    layer = build_unrouted(config, site)
    materialise(layer, state, 7, torch.device("cpu"))
    return layer


def draw(rows: int, seed: int = 0, *, hidden: int = HIDDEN) -> Tensor:
    """(rows, H) normal."""
    return torch.randn(rows, hidden, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ask(layer: UnroutedLayer, tokens: Tensor, info: TokenInfo | None = None, *, train: bool = True) -> Mixed:
    """tokens: (T, H), without further word one sample."""
    info = info or token_info(tokens.shape[0], train=train)
    return layer.mix(tokens, info, context(1, 1, ALONE))


def info_for(
    layer: UnroutedLayer,
    length: int = LENGTH,
    *,
    padding: tuple[tuple[int, int], ...] = PADDING,
    train: bool = True,
    seed: int = 1,
) -> TokenInfo:
    """Three samples, in the routing groups that the layer's configuration says."""
    group = layer.config.routing_group_samples
    return token_info(length, SAMPLES, group_samples=group, padding=padding, train=train, seed=seed)


def objective(mixed: Mixed, info: TokenInfo, rows: Tensor = ROWS) -> Tensor:
    """Every answer counts, each with a factor of its own, and every loss; padding does not, as in the whole layer."""
    real = mixed.answers.masked_fill(info.is_padding[:, None], 0.0)
    place = torch.arange(real.shape[1]) + real.shape[1] * rows[:, None]
    losses = [loss.share * loss.weight for loss in mixed.report.aux_losses.values()]
    return (real * torch.sin(1.0 + 3.0 * place)).sum() + sum(losses)


def numbers_of(mixed: Mixed) -> dict[str, Tensor]:
    """What is reported: sums over tokens, and shares of losses."""
    losses = {f"loss {name}": loss.share.detach() for name, loss in mixed.report.aux_losses.items()}
    return {**mixed.report.stats, **losses}


def assert_same_numbers(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=1e-10, atol=1e-12, msg=name)


class _Asked(nn.Module):
    """The layer's mix as a forward pass, so that functional_call may replace parameters."""

    def __init__(self, layer: UnroutedLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, tokens: Tensor, info: TokenInfo) -> Tensor:
        return objective(ask(self.layer, tokens, info), info, torch.arange(len(tokens)))


def check_gradient(layer: UnroutedLayer, *, train: bool) -> None:
    """Finite differences with respect to tokens and parameters, choices standing still."""
    info = info_for(layer, 2, padding=((1, 1),), train=train)
    names = [f"layer.{name}" for name, _ in layer.named_parameters()]

    def value(tokens: Tensor, *learned: Tensor) -> Tensor:
        named = dict(zip(names, learned, strict=True))
        return torch.func.functional_call(_Asked(layer), named, (tokens, info))

    assert torch.autograd.gradcheck(value, (draw(2 * SAMPLES).requires_grad_(), *layer.parameters()))


def check_reach(layer: UnroutedLayer) -> None:
    """The gradient reaches tokens, not padding, and all that is learned; a forward pass writes nothing."""
    info, tokens = info_for(layer), draw(len(ROWS)).requires_grad_()
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    before = dict(vars(layer))
    mixed = ask(layer, tokens, info)
    assert vars(layer) == before
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    objective(mixed, info).backward()
    assert tokens.grad is not None and tokens.grad.isfinite().all()
    assert tokens.grad[~info.is_padding].abs().sum(dim=1).all() and not tokens.grad[info.is_padding].any()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    assert not any(value.requires_grad for value in mixed.report.stats.values())


def check_padding(layer: UnroutedLayer, *, train: bool) -> None:
    """Neither the values of padding nor its presence changes an answer, a count or a loss."""
    info, tokens = info_for(layer, train=train), draw(len(ROWS))
    changed = tokens.clone()
    changed[info.is_padding] = 5.0 - 3.0 * changed[info.is_padding]
    first, second = ask(layer, tokens, info), ask(layer, changed, info)
    assert torch.equal(first.answers[~info.is_padding], second.answers[~info.is_padding])
    assert_same_numbers(numbers_of(second), numbers_of(first))
    assert int(first.report.stats["tokens"]) == len(ROWS) - len(PADDING)
    # rows at the end that hold nothing else, and no such rows
    short = info_for(layer, 4, padding=((3, 1),), train=train)
    ends = ((3, 1), *((position, sample) for position in (4, 5) for sample in range(SAMPLES)))
    long = ask(layer, tokens, info_for(layer, padding=ends, train=train))
    wanted = ask(layer, tokens[: 4 * SAMPLES], short)
    real = ~short.is_padding
    torch.testing.assert_close(long.answers[: 4 * SAMPLES][real], wanted.answers[real], rtol=1e-10, atol=1e-12)
    assert_same_numbers(numbers_of(long), numbers_of(wanted))


def leaks(layer: UnroutedLayer, *, train: bool, trials: int = 6) -> bool:
    """Whether another last token of a sequence ever changes the answer to an earlier one; never in another group."""
    info, tokens = info_for(layer, padding=(), train=train), draw(len(ROWS))
    first, found = ask(layer, tokens, info).answers, False
    for trial in range(trials):
        sample = trial % SAMPLES
        last = (info.positions == LENGTH - 1) & (info.sequences == sample)
        changed = tokens.clone()
        changed[last] = 3.0 * draw(1, 100 + trial)
        moved = (ask(layer, changed, info).answers != first).any(dim=1)
        assert moved[last].all()
        assert not moved[info.groups != info.sequence_groups[sample]].any()
        found = found or bool(moved[~last].any())
    return found


def check_repeats(layer: UnroutedLayer) -> None:
    """Evaluation draws nothing; training draws the same for the same seed and step, and others if it draws at all."""

    def answers(train: bool, seed: int = 1, step: int = 0) -> Tensor:
        info = info_for(layer, train=train, seed=seed)
        return ask(layer, draw(len(ROWS)), replace(info, random=info.random.at(step=step))).answers

    for train in (False, True):
        draws = train and layer.is_random
        assert torch.equal(answers(train), answers(train))
        assert torch.equal(answers(train), answers(train, seed=2)) is not draws
        assert torch.equal(answers(train), answers(train, step=1)) is not draws


def check_few(layer: UnroutedLayer, *, train: bool) -> None:
    """No token, one, fewer than experts, a sample of padding only."""
    whole = info_for(layer, padding=(), train=train)
    zeros = {name: torch.zeros_like(getattr(whole, name)) for name in ("group_tokens", "sequence_tokens")}
    tokens = draw(0).requires_grad_()
    mixed = ask(layer, tokens, replace(rows_of(whole, ROWS[:0]), **zeros))
    assert mixed.answers.shape == (0, HIDDEN)
    objective(mixed, rows_of(whole, ROWS[:0]), ROWS[:0]).backward()
    assert not int(mixed.report.stats["tokens"])
    for count in range(1, layer.config.num_experts):
        answers = ask(layer, draw(count), train=train).answers
        assert answers.shape == (count, HIDDEN) and answers.isfinite().all() and answers.any(dim=1).all()
    empty = tuple((position, sample) for position in range(LENGTH) for sample in (0, 2))
    mixed = ask(layer, draw(len(ROWS)), info_for(layer, padding=empty, train=train))
    assert mixed.answers.isfinite().all() and int(mixed.report.stats["tokens"]) == LENGTH


def check_equal(layer: UnroutedLayer, *, train: bool) -> None:
    """All tokens the same, or all zero: finite answers and gradients; if nothing is drawn, a group's are the same."""
    info = info_for(layer, padding=(), train=train)
    for row in (draw(1), torch.zeros(1, HIDDEN, dtype=torch.float64)):
        layer.zero_grad()
        tokens = row.expand(len(ROWS), -1).clone().requires_grad_()
        mixed = ask(layer, tokens, info)
        objective(mixed, info).backward()
        gradients = [leaf.grad for leaf in (tokens, *layer.parameters()) if leaf.grad is not None]
        assert all(found.isfinite().all() for found in (mixed.answers, *gradients))
        if not (train and layer.is_random):
            # the first row of each sample's group
            first = info.sequence_groups[info.sequences] * layer.config.routing_group_samples
            torch.testing.assert_close(mixed.answers, mixed.answers[first])


def check_nan(layer: UnroutedLayer, *, train: bool) -> None:
    """One token that is no number: seen in its own answer, and in others only where a layer mixes tokens by design."""
    info, tokens = info_for(layer, padding=(), train=train), draw(len(ROWS))
    odd = (info.positions == 2) & (info.sequences == 2)
    tokens[odd] = torch.nan
    answers = ask(layer, tokens, info).answers
    fine = answers.isfinite().all(dim=1)
    assert not fine[odd].any()
    assert fine[info.groups != info.groups[odd]].all()
    if layer.is_causal:
        assert fine[~odd].all()
