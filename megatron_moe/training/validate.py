"""What needs the registries to be checked: still before any rank joins."""

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.models.build import gpt_spec
from megatron_moe.models.depth import build_block
from megatron_moe.models.transformer import LayerSpec
from megatron_moe.moe.capacity import limit_is_causal
from megatron_moe.moe.methods import deciding_part, find_method
from megatron_moe.moe.routers.router import Router
from megatron_moe.moe.unrouted.unrouted_layer import UnroutedLayer
from megatron_moe.parallel.state import ParallelState


def validate(config: RunConfig) -> list[str]:
    """Raises ConfigError for a way of routing that is unknown, is told what it does not know, cannot run on the
    layout, or sees the future.

    Returns notes for the log.
    """
    sparse = [spec for spec in gpt_spec(config, config.model.vocab_size or 1).layers if spec.moe is not None]
    _check_nodes(sparse, config)
    notes = [note for spec in sparse for note in _check_layer(spec, config)]
    return list(dict.fromkeys(notes))


def _check_nodes(sparse: list[LayerSpec], config: RunConfig) -> None:
    """Nodes are told apart for rows that travel to experts."""
    per_node = config.parallel.expert_model_parallel_ranks_per_node
    kinds = [spec.moe.router_type for spec in sparse if spec.moe is not None]
    sending = [kind for kind in kinds if "token_dispatcher_type" not in find_method(kind).unused_fields]
    if per_node is not None and kinds and not sending:
        raise ConfigError(
            f"--expert-model-parallel-ranks-per-node {per_node} has no effect with the router {kinds[0]}, which sends "
            f"no rows to experts; leave it out."
        )


def _check_layer(spec: LayerSpec, config: RunConfig) -> list[str]:
    assert spec.moe is not None
    moe = spec.moe
    method = find_method(moe.router_type)
    method.check_layout(config.parallel)
    method_here = _decider(spec)
    if moe.consistency_coeff is not None and not method_here.is_random:
        raise ConfigError(
            f"--moe-consistency-coeff {moe.consistency_coeff:g} has no effect with the router {moe.router_type}, which "
            f"draws nothing while training, so that two passes agree; leave it out, or use thor."
        )
    if not spec.attention.causal:
        return []
    if not method_here.is_causal:
        problem = f"--moe-router-type {moe.router_type}"
        instead = "use a causal router (top_k, switch, gshard, st_moe; tools/list_routers.py names them all)"
    elif not limit_is_causal(moe, method.choices(moe)):
        problem = f"--moe-token-drop-policy {moe.token_drop_policy} with --moe-slot-priority {moe.slot_priority}"
        instead = "drop by position in token_major order"
    else:
        return []
    if not moe.allow_noncausal:
        raise ConfigError(
            f"{problem} looks at later tokens of a sequence, which a causal decoder must not; {instead}, or give "
            f"--moe-allow-noncausal to train a model that leaks."
        )
    return [f"{problem} sees later tokens: losses of this model are not comparable to those of causal ones"]


def _decider(spec: LayerSpec) -> Router | UnroutedLayer:
    """Who decides in a layer of that spec."""
    sparse = build_block(spec, ParallelState.alone()).sparse
    assert sparse is not None
    return deciding_part(sparse)
