"""Every pair of axes equals one process in float64: what breaks only where two of them meet."""

import pytest
from ranks import run_on_ranks

from megatron_moe.certify.combinations import AXES, combinations
from megatron_moe.certify.tiny_model import tiny_config
from megatron_moe.certify.tiny_run import TOLERANCE, alone, outcome_of, run_all, worst_difference

# all layouts of a world size in one process start
pytestmark = pytest.mark.timeout(600)

PAIRS = combinations([values[:1] for values in AXES.values()], (2,))
MOE = {"router_type": "st_moe", "expert_capacity_factor": 1.0, "extra_ffn": "after", "aux_loss_coeff": 0.01}
MODEL = {
    "encoder_num_layers": 2,
    "position_embedding_type": "relative",
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
}
ENCODER = {"router_type": "expert_choice", "layer_freq": "1", "num_experts": 2}


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_every_pair_of_axes_equals_one_process(world_size: int) -> None:
    names = [name for name, layout in PAIRS.items() if layout.ranks == world_size]
    configs = [
        tiny_config(MOE, PAIRS[name].parallel, MODEL, PAIRS[name].micro_batch_size, encoder_moe=ENCODER)
        for name in names
    ]
    wanted = alone(tiny_config(MOE, {}, MODEL, encoder_moe=ENCODER))
    answers = run_on_ranks(world_size, run_all, configs)
    for number, name in enumerate(names):
        differences = worst_difference(outcome_of([rank[number] for rank in answers]), wanted)
        assert max(differences.values()) < TOLERANCE, f"{name}: {differences}"
