"""Every way of routing, on each axis alone, equals one process in float64; dropless and with few places.

One process start for each world size runs them all. test_layouts.py crosses some of them with more layouts.
"""

from typing import Any

import pytest
from ranks import run_on_ranks

from megatron_moe.certify.layouts import ETP, LAYOUTS
from megatron_moe.certify.tiny_model import GLOBAL_BATCH, tiny_config
from megatron_moe.certify.tiny_run import TOLERANCE, Outcome, alone, outcome_of, run_all, worst_difference
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.moe.methods import METHODS
from megatron_moe.moe.routers.router import Router
from megatron_moe.report.router_list import example_fields
from megatron_moe.training.validate import validate

# all models of a world size in one process start: minutes, not seconds
pytestmark = pytest.mark.timeout(1200)

Fields = dict[str, Any]

AXES = (
    *("micro-batches of 2", "recomputation", "TP 2 with sequence parallelism", "TP 2", "CP 2", "PP 2"),
    *("EP 2", "EP 4", "ETP 2", "DP 2 with ZeRO-1"),
)
# the only layouts that may be refused, and why
MAY_REFUSE = {
    ("smear", "EP"): "all experts are merged on each rank",
    ("smear", "ETP"): "all experts are merged on each rank",
    ("mixture_of_depths", "CP"): "a sequence's best tokens are chosen on one rank",
    ("mixture_of_depths", "EP"): "there is one expert, a block",
    ("mixture_of_depths", "ETP"): "the block is split over tp",
    **{
        (name, "ETP"): "tables are split by rows over ep"
        for name in ("vanilla_memory", "low_rank_keys", "product_keys", "product_keys_ffn", "controller")
    },
}


def fields_of(name: str) -> Fields:
    """The router's example, and the two losses where it has them."""
    found = example_fields(name)
    for coefficient, value in (("aux_loss_coeff", 0.01), ("z_loss_coeff", 0.001)):
        if coefficient not in METHODS[name].unused_fields:
            found[coefficient] = value
    return found


def variants() -> dict[str, Fields]:
    """Each method as in its example; routers that know places also with few of them."""
    found = {}
    for name, method in METHODS.items():
        found[name] = fields_of(name)
        knows_places = issubclass(method, Router) and "expert_capacity_factor" not in method.unused_fields
        # thor's draws send all tokens that share one to one expert, and it refuses places with that reason
        if knows_places and name != "thor":
            found[f"{name}, few places"] = {**found[name], "expert_capacity_factor": 0.7}
    return found


VARIANTS = variants()


def group_of(moe: Fields) -> int:
    return int(moe.get("routing_group_samples", 1))


def config_on(moe: Fields, layout: str) -> RunConfig | None:
    """None where the layout's ranks hold too few samples for a routing group."""
    known = LAYOUTS[layout]
    if known.samples_of_a_rank(GLOBAL_BATCH) < group_of(moe):
        return None
    parallel = dict(known.parallel)
    if layout.startswith("TP") and (moe["router_type"], "ETP") in MAY_REFUSE:
        parallel[ETP] = 1
    config = tiny_config(moe, parallel, {}, max(known.micro_batch_size, group_of(moe)))
    validate(config)
    return config


def runnable(world_size: int) -> dict[tuple[str, str], RunConfig]:
    """(variant, layout) -> configuration; what is refused must be among those that may be."""
    found = {}
    for layout in AXES:
        for name, moe in VARIANTS.items():
            if LAYOUTS[layout].ranks != world_size:
                continue
            try:
                config = config_on(moe, layout)
            except ConfigError as error:
                assert (moe["router_type"], layout.split()[0]) in MAY_REFUSE, f"{name} on {layout}: {error}"
                continue
            if config is not None:
                found[name, layout] = config
    return found


@pytest.fixture(scope="module")
def wanted() -> dict[str, Outcome]:
    """Each variant on one process, by microbatches of its routing group."""
    return {name: alone(tiny_config(moe, {}, {}, group_of(moe))) for name, moe in VARIANTS.items()}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_router_is_the_same_on_every_axis(world_size: int, wanted: dict[str, Outcome]) -> None:
    cases = runnable(world_size)
    answers = run_on_ranks(world_size, run_all, list(cases.values()))
    wrong = {}
    for number, (name, layout) in enumerate(cases):
        differences = worst_difference(outcome_of([rank[number] for rank in answers]), wanted[name])
        if max(differences.values()) >= TOLERANCE:
            wrong[name, layout] = differences
    assert not wrong


def test_only_what_may_be_refused_is_refused() -> None:
    ran = {key for world_size in (1, 2, 4) for key in runnable(world_size)}
    for name, moe in VARIANTS.items():
        for layout in AXES:
            refused = (moe["router_type"], layout.split()[0]) in MAY_REFUSE
            too_small = LAYOUTS[layout].samples_of_a_rank(GLOBAL_BATCH) < group_of(moe)
            assert ((name, layout) in ran) is not (refused or too_small), (name, layout)
