"""SMEAR: one merged expert for each sample, exactly; what it draws."""

import pytest
import torch
from layer_checks import ALONE, HIDDEN
from layers.contexts import context
from moe.unrouted.soft_layers import EXPERTS, answers, draw, expert_by_hand, make_layer
from moe_rows import token_info

from megatron_moe.config.errors import ConfigError
from megatron_moe.moe.unrouted.smear import SmearLayer


def smear(**options: str) -> SmearLayer:
    layer = make_layer("smear", router_options=options)
    assert isinstance(layer, SmearLayer)
    return layer


def test_each_sample_has_the_expert_of_its_own_mean() -> None:
    layer, tokens = smear(), draw(8)
    info = token_info(4, 2, padding=[(3, 1)])
    found = answers(layer, tokens, info, samples=2)
    for sample in range(2):
        rows = [t for t in range(8) if info.sequences[t] == sample and not info.is_padding[t]]
        mean = torch.stack([tokens[t] for t in rows]).mean(dim=0)
        p = (layer.weight @ mean).softmax(dim=0)
        w1 = sum(p[e] * layer.experts.w1[e, 0] for e in range(EXPERTS))
        w2 = sum(p[e] * layer.experts.w2[e] for e in range(EXPERTS))
        for t in rows:
            torch.testing.assert_close(found[t], w2 @ torch.relu(w1 @ tokens[t]))


def test_a_share_of_one_is_that_expert() -> None:
    layer, tokens = smear(), draw(4)
    mean = tokens.mean(dim=0)
    with torch.no_grad():
        layer.weight.zero_()[1] = 1e4 * mean
    found = answers(layer, tokens, token_info(4), samples=1)
    for t in range(4):
        torch.testing.assert_close(found[t], expert_by_hand(layer, 1, tokens[t]))


def test_a_dropped_expert_has_no_part_and_the_others_share_its() -> None:
    layer, tokens = smear(expert_dropout="0.5"), draw(12)
    info = token_info(1, 12)
    shares = layer._shares(tokens.view(1, 12, HIDDEN), info)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(12, dtype=torch.float64))
    dropped = shares == 0
    assert len(dropped.unique(dim=0)) > 1  # each sample has a draw of its own
    assert dropped.any() and not dropped.all(dim=1).any()
    whole = layer._shares(tokens.view(1, 12, HIDDEN), token_info(1, 12, train=False))
    assert (whole > 0).all()
    kept = ~dropped
    torch.testing.assert_close(shares, whole * kept / (whole * kept).sum(dim=1, keepdim=True))
    again = layer._shares(tokens.view(1, 12, HIDDEN), info)
    assert torch.equal(shares, again)


def test_jitter_is_small_and_for_training() -> None:
    plain, shaken = smear(), smear(jitter_eps="0.1")
    tokens = draw(4)
    quiet = answers(plain, tokens, token_info(4), samples=1)
    assert torch.equal(quiet, answers(shaken, tokens, token_info(4, train=False), samples=1))
    moved = answers(shaken, tokens, token_info(4), samples=1)
    assert 0 < (moved - quiet).abs().max() < 0.5 * quiet.abs().max()
    assert shaken.is_random and not plain.is_random


def test_jitter_goes_both_ways() -> None:
    layer = smear(jitter_eps="0.1")
    with torch.no_grad():
        layer.weight.zero_()[0, 0] = 1.0
    shares = layer._shares(torch.ones(1, 400, HIDDEN, dtype=torch.float64), token_info(1, 400))
    factor = (shares[:, 0] / shares[:, 1]).log()
    assert 0.9 <= factor.min() < 0.91 and 1.09 < factor.max() <= 1.1
    # four standard deviations of the mean of 400 uniform draws
    assert factor.mean().item() == pytest.approx(1.0, abs=4 * 0.1 / 3**0.5 / 20)


def test_each_expert_is_charged_its_share_of_the_real_tokens() -> None:
    layer, tokens = smear(), draw(8)
    info = token_info(4, 2, padding=[(3, 1)])
    served = layer.mix(tokens, info, context(4, 2, ALONE)).report.stats["tokens_per_expert"]
    shares = layer._shares(tokens.view(4, 2, HIDDEN), info)
    torch.testing.assert_close(served, 4 * shares[0] + 3 * shares[1])


def test_what_has_no_effect_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"--moe-aux-loss-coeff 0.1 has no effect with the router smear"):
        make_layer("smear", aux_loss_coeff=0.1)
