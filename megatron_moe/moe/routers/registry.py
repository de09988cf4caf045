"""Which routers there are: one line each."""

from megatron_moe.moe.routers.deepseek import DeepSeekRouter
from megatron_moe.moe.routers.deepseek_v3 import DeepSeekV3Router
from megatron_moe.moe.routers.expert_choice import ExpertChoiceRouter
from megatron_moe.moe.routers.gshard import GShardRouter
from megatron_moe.moe.routers.router import Router
from megatron_moe.moe.routers.st_moe import STMoERouter
from megatron_moe.moe.routers.switch import SwitchRouter
from megatron_moe.moe.routers.top_k import TopKRouter

ROUTERS: dict[str, type[Router]] = {
    "top_k": TopKRouter,
    "switch": SwitchRouter,
    "gshard": GShardRouter,
    "st_moe": STMoERouter,
    "deepseek": DeepSeekRouter,
    "deepseek_v3": DeepSeekV3Router,
    "expert_choice": ExpertChoiceRouter,
}
