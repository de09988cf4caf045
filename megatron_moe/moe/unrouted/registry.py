"""Which sparse layers without a router there are: one line each."""

from megatron_moe.moe.unrouted.unrouted_layer import UnroutedLayer

UNROUTED: dict[str, type[UnroutedLayer]] = {}
