"""Our decisions are those of st-moe-pytorch, mixture-of-experts, DeepSpeed and fairseq's router in transformers 4.57.

Optional: `bash tests/third_party/run.sh` makes an environment with these packages and runs this folder.
"""

from typing import Any

import pytest
import torch
from third_party.given import EXPERTS, HIDDEN, TOKENS, decide, table_of, tokens_and_weight

from megatron_moe.config.moe import MoEConfig

SEEDS = range(6)
# ours is float64; some of theirs is float32 throughout
CLOSE = {"rtol": 1e-6, "atol": 1e-7}


def config_of(router: str, **fields: Any) -> MoEConfig:
    return MoEConfig(num_experts=EXPERTS, router_type=router, **fields)


MESH = {"capacity_includes_k": False, "capacity_rounding": "floor", "min_capacity": 4, "slot_priority": "k_major"}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("top_n", "factor"), [(2, 1.25), (2, 0.6), (3, 0.8)])
def test_combine_tensors_of_st_moe_pytorch(seed: int, top_n: int, factor: float) -> None:
    package = pytest.importorskip("st_moe_pytorch.st_moe_pytorch")
    tokens, weight = tokens_and_weight(seed)
    # a threshold of almost nothing uses every expert, whatever is drawn
    gate = package.TopNGating(HIDDEN, EXPERTS, top_n=top_n, threshold_train=1e-9, capacity_factor_train=factor).double()
    with torch.no_grad():
        gate.to_gates.weight.copy_(weight)
    _, combine, _, z_loss = gate(tokens[None])
    config = config_of(
        "st_moe",
        router_topk=top_n,
        expert_capacity_factor=factor,
        router_options={"train_policy": "all"},
        z_loss_coeff=0.001,
        aux_loss_coeff=0.01,
        **MESH,
    )
    plan = decide(config, tokens, weight)
    torch.testing.assert_close(table_of(plan), combine[0].sum(dim=-1).detach(), **CLOSE)
    assert plan.aux_losses["z_loss"].share.item() / TOKENS == pytest.approx(z_loss.item(), rel=1e-9)
    # that package counts its balance loss after dropping, the paper before: no comparison


@pytest.mark.parametrize("seed", SEEDS)
# its threshold policy multiplies tensors whose shapes do not fit
@pytest.mark.parametrize("policy", ["all", "none"])
def test_combine_tensors_and_balance_loss_of_mixture_of_experts(seed: int, policy: str) -> None:
    package = pytest.importorskip("mixture_of_experts.mixture_of_experts")
    tokens, weight = tokens_and_weight(seed)
    gate = package.Top2Gating(HIDDEN, EXPERTS, second_policy_train=policy, capacity_factor_train=1.0).double()
    with torch.no_grad():
        gate.w_gating.copy_(weight.t())
    _, combine, balance = gate(tokens[None])
    config = config_of(
        "st_moe",
        expert_capacity_factor=1.0,
        router_options={"train_policy": policy},
        aux_loss_coeff=0.01,
        **MESH,
    )
    plan = decide(config, tokens, weight)
    torch.testing.assert_close(table_of(plan), combine[0].sum(dim=-1).detach(), **CLOSE)
    assert plan.aux_losses["load_balance_loss"].share.item() == pytest.approx(balance.item(), rel=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_top_2_of_deepspeed(seed: int, factor: float) -> None:
    package = pytest.importorskip("deepspeed.moe.sharded_moe")
    tokens, weight = tokens_and_weight(seed)
    logits = (tokens @ weight.t()).float()
    balance, combine, _, _ = package.top2gating(logits, factor, 1, top2_2nd_expert_sampling=False)
    config = config_of(
        "gshard",
        expert_capacity_factor=factor,
        slot_priority="k_major",
        router_options={"second_policy": "all", "renormalise": "after_drop"},
        aux_loss_coeff=0.01,
    )
    plan = decide(config, tokens, weight)
    torch.testing.assert_close(table_of(plan), combine.sum(dim=-1).double(), **CLOSE)
    assert plan.aux_losses["load_balance_loss"].share.item() == pytest.approx(balance.item(), rel=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("policy", ["probs", "position"])
def test_top_k_of_deepspeed(seed: int, policy: str) -> None:
    package = pytest.importorskip("deepspeed.moe.sharded_moe")
    tokens, weight = tokens_and_weight(seed)
    balance, _, kept, _ = package.topkgating(tokens @ weight.t(), 2, 0.7, 1, drop_policy=policy)
    config = config_of(
        "top_k",
        router_pre_softmax=True,
        expert_capacity_factor=0.7,
        token_drop_policy=policy,
        aux_loss_coeff=0.01,
    )
    plan = decide(config, tokens, weight)
    # theirs divides what is left of a token's weights by its sum: who is served is the same
    assert torch.equal(plan.mask(), kept.any(dim=-1))
    # it counts all k choices and divides by k, as Megatron does
    assert plan.aux_losses["load_balance_loss"].share.item() == pytest.approx(balance.item(), rel=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("prioritised", [False, True])
@pytest.mark.parametrize("before", [True, False])
def test_fairseqs_top_2_in_transformers(seed: int, prioritised: bool, before: bool) -> None:
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) != 4:
        pytest.skip("transformers 5 routes NLLB-MoE wrongly; 4.57.6 is the oracle")
    module = pytest.importorskip("transformers.models.nllb_moe.modeling_nllb_moe")
    tokens, weight = tokens_and_weight(seed)
    settings = transformers.NllbMoeConfig(
        hidden_size=HIDDEN,
        num_experts=EXPERTS,
        router_dtype="float32",
        second_expert_policy="all",
        normalize_router_prob_before_dropping=before,
        batch_prioritized_routing=prioritised,
        expert_capacity=8,
        moe_eval_capacity_token_fraction=0.0,
    )
    router = module.NllbMoeTop2Router(settings)
    _, combine = router.route_tokens((tokens @ weight.t()).float())
    config = config_of(
        "gshard",
        expert_capacity_factor=8 * EXPERTS / TOKENS / 2,
        slot_priority="k_major",
        token_drop_policy="bpr" if prioritised else "position",
        router_options={"second_policy": "all", "renormalise": "before_drop" if before else "after_drop"},
    )
    torch.testing.assert_close(table_of(decide(config, tokens, weight)), combine.double(), **CLOSE)
