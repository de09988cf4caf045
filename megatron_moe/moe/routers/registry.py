"""Which routers there are: one line each."""

from megatron_moe.moe.routers.avg_k import AvgKRouter
from megatron_moe.moe.routers.base import BaseRouter
from megatron_moe.moe.routers.deepseek import DeepSeekRouter
from megatron_moe.moe.routers.deepseek_v3 import DeepSeekV3Router
from megatron_moe.moe.routers.ec_cap import ECCapRouter
from megatron_moe.moe.routers.expert_choice import ExpertChoiceRouter
from megatron_moe.moe.routers.expert_choice_position import ExpertChoicePositionRouter
from megatron_moe.moe.routers.expert_choice_threshold import ExpertChoiceThresholdRouter
from megatron_moe.moe.routers.gshard import GShardRouter
from megatron_moe.moe.routers.hash import HashRouter
from megatron_moe.moe.routers.m6_t import M6TRouter
from megatron_moe.moe.routers.mixture_of_depths import MixtureOfDepthsRouter
from megatron_moe.moe.routers.noisy_top_k import NoisyTopKRouter
from megatron_moe.moe.routers.rand_hash import RandHashRouter
from megatron_moe.moe.routers.remoe import ReMoERouter
from megatron_moe.moe.routers.router import Router
from megatron_moe.moe.routers.sam import SAMRouter
from megatron_moe.moe.routers.sinkhorn import SinkhornRouter
from megatron_moe.moe.routers.st_moe import STMoERouter
from megatron_moe.moe.routers.switch import SwitchRouter
from megatron_moe.moe.routers.thor import ThorRouter
from megatron_moe.moe.routers.top_k import TopKRouter

ROUTERS: dict[str, type[Router]] = {
    "top_k": TopKRouter,
    "noisy_top_k": NoisyTopKRouter,
    "switch": SwitchRouter,
    "gshard": GShardRouter,
    "st_moe": STMoERouter,
    "m6_t": M6TRouter,
    "sam": SAMRouter,
    "deepseek": DeepSeekRouter,
    "deepseek_v3": DeepSeekV3Router,
    "base": BaseRouter,
    "sinkhorn": SinkhornRouter,
    "hash": HashRouter,
    "rand_hash": RandHashRouter,
    "avg_k": AvgKRouter,
    "thor": ThorRouter,
    "remoe": ReMoERouter,
    "expert_choice": ExpertChoiceRouter,
    "expert_choice_position": ExpertChoicePositionRouter,
    "expert_choice_threshold": ExpertChoiceThresholdRouter,
    "ec_cap": ECCapRouter,
    "mixture_of_depths": MixtureOfDepthsRouter,
}
