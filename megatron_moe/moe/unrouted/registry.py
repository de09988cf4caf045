"""Which sparse layers without a router there are: one line each."""

from megatron_moe.moe.unrouted.controller import ControllerLayer
from megatron_moe.moe.unrouted.keyed_memory import LowRankKeysLayer, VanillaMemoryLayer
from megatron_moe.moe.unrouted.product_keys import ProductKeysFFNLayer, ProductKeysLayer
from megatron_moe.moe.unrouted.smear import SmearLayer
from megatron_moe.moe.unrouted.soft_moe import SoftMoELayer
from megatron_moe.moe.unrouted.unrouted_layer import UnroutedLayer

UNROUTED: dict[str, type[UnroutedLayer]] = {
    "vanilla_memory": VanillaMemoryLayer,
    "low_rank_keys": LowRankKeysLayer,
    "product_keys": ProductKeysLayer,
    "product_keys_ffn": ProductKeysFFNLayer,
    "controller": ControllerLayer,
    "soft_moe": SoftMoELayer,
    "smear": SmearLayer,
}
