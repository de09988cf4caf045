"""The sparse feed-forward layers: which layers, how many experts, who chooses them and how many places they have."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.options import check_values, option, settings_of

# what changes nothing without --moe-expert-capacity-factor
PLACES = (
    "eval_capacity_factor",
    "token_drop_policy",
    "capacity_includes_k",
    "capacity_rounding",
    "min_capacity",
    "slot_priority",
)


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The sparse feed-forward layers: experts, router, capacity, dispatch."""

    flag_prefix: ClassVar[str] = "moe-"
    layers_flag: ClassVar[str] = "--num-layers"

    num_experts: int = option(0, "experts in an MoE layer; 0 = dense model", flag="--num-experts", at_least=0)
    layer_freq: str = option(
        "1",
        "which layers are sparse: N = the last of every N layers (2 = layers 1, 3, 5, ..., as in Switch), "
        "or one 0 or 1 for each layer: 0,1,0,1",
    )
    ffn_hidden_size: int | None = option(
        None, "inner width of one expert; none = that of a dense feed-forward layer", at_least=1
    )
    activation: str | None = option(
        None,
        "activation of the experts; none = that of the dense feed-forward layers",
        choices=("swiglu", "geglu", "geglu_tanh", "gelu", "relu"),
    )
    expert_bias: str = option(
        "none",
        "a learned vector of each expert after its activation, added or multiplied (ST-MoE, appendix C)",
        choices=("none", "additive", "multiplicative"),
    )
    expert_dropout: float = option(
        0.0, "share of an expert's inner features dropped in training; 0.4 in Switch's fine-tuning", at_least=0, below=1
    )
    extra_ffn: str = option(
        "none",
        "a dense feed-forward layer, with its own norm and residual, beside each sparse one (ST-MoE, appendix C)",
        choices=("none", "before", "after"),
    )
    router_type: str = option(
        "top_k", "who chooses the experts: a name of tools/list_routers.py, or path/to/file.py:ClassName"
    )
    router_topk: int = option(2, "experts per token; 1 in Switch, 2 in GShard and Mixtral, 8 in OLMoE", at_least=1)
    router_pre_softmax: bool = option(
        False, "softmax over all experts before the choice, not over the chosen ones after it"
    )
    aux_loss_coeff: float = option(0.0, "weight of the load-balance loss; 0.01 in Switch, ST-MoE and OLMoE", at_least=0)
    z_loss_coeff: float = option(0.0, "weight of the router z-loss; 0.001 in ST-MoE and OLMoE", at_least=0)
    expert_capacity_factor: float | None = option(
        None, "places per expert, in shares of an even split; 1.25 in ST-MoE; none = dropless", above=0
    )
    eval_capacity_factor: float | None = option(
        None, "the same in evaluation; 2.0 in ST-MoE; none = as in training", above=0
    )
    token_drop_policy: str = option(
        "position",
        "who is served when places run out: the earliest tokens, the largest weights, or the surest tokens "
        "(batch-prioritised routing, V-MoE and ST-MoE)",
        choices=("position", "probs", "bpr"),
    )
    capacity_includes_k: bool = option(
        True, "places grow with the experts per token, as in Megatron; not so in Mesh-TensorFlow and ST-MoE"
    )
    capacity_rounding: str = option("ceil", "how places become a whole number", choices=("ceil", "floor", "round"))
    min_capacity: int = option(0, "fewest places of an expert in a routing group; 4 in ST-MoE", at_least=0)
    slot_priority: str = option(
        "token_major",
        "token_major: a token's choices are served together (causal); k_major: all first choices before any second "
        "(GShard)",
        choices=("token_major", "k_major"),
    )
    shared_expert_intermediate_size: int | None = option(
        None, "inner width of an expert that every token visits; none = there is none", at_least=1
    )
    shared_expert_gate: bool = option(False, "weight the shared expert by a sigmoid of the token")
    shared_expert_overlap: bool = option(True, "run the shared expert while tokens travel to the others")
    token_dispatcher_type: str = option(
        "auto",
        "how tokens travel to their experts; auto = local on one expert rank, hierarchical where "
        "--expert-model-parallel-ranks-per-node makes several nodes, else alltoall or what suits the router",
        choices=("auto", "local", "alltoall", "allgather", "one_per_rank", "hierarchical"),
    )
    routing_group_samples: int = option(
        1, "consecutive samples of the global batch that share capacity and balance", at_least=1
    )
    router_options: dict[str, str] = option(
        {}, "what this router alone can be told, as name=value ...; given without any, forgets those of the recipe"
    )
    consistency_coeff: float | None = option(
        None,
        "see each sample twice in a step, and hold the two predictions together by this weight of their symmetric KL; "
        "5 in THOR's recipe; none = one pass",
        at_least=0,
    )
    consistency_cross_entropy: str = option(
        "sum", "the cross-entropies of the two passes, as in THOR, or their mean", choices=("sum", "mean")
    )
    aux_layer_reduction: str = option(
        "sum",
        "auxiliary losses of the layers: their sum (Switch, Mesh-TensorFlow, Megatron) or mean (t5x)",
        choices=("sum", "mean"),
    )
    allow_noncausal: bool = option(
        False, "accept a router that looks at later tokens in a causal model (expert choice does)"
    )

    def __post_init__(self) -> None:
        check_values(self)
        self._layer_pattern()
        if self.num_experts and self.router_topk > self.num_experts:
            raise ConfigError(
                f"{self.flag('router_topk')} {self.router_topk} asks for more experts than "
                f"{self.flag('num_experts')} {self.num_experts}; "
                f"use {self.num_experts} or fewer."
            )

    def moe_layers(self, num_layers: int) -> tuple[bool, ...]:
        """For each layer, by global index, whether it is sparse. ConfigError if a list has another length."""
        if not self.num_experts:
            return (False,) * num_layers
        pattern = self._layer_pattern()
        if isinstance(pattern, int):
            return tuple(index % pattern == pattern - 1 for index in range(num_layers))
        if len(pattern) != num_layers:
            raise ConfigError(
                f"{self.flag('layer_freq')} {self.layer_freq} names {len(pattern)} layers, but {self.layers_flag} is "
                f"{num_layers}; "
                f"write one 0 or 1 for each layer."
            )
        return pattern

    @classmethod
    def flag(cls, name: str) -> str:
        """How a field is written on the command line."""
        table: type = cls
        return settings_of(table)[name].flag

    def expert_ffn_size(self, dense_ffn_size: int) -> int:
        """Inner width of one expert, in a model whose dense layers have that one."""
        return self.ffn_hidden_size or dense_ffn_size

    def _layer_pattern(self) -> int | tuple[bool, ...]:
        """N of "every Nth layer", or one bool for each layer."""
        words = [word.strip() for word in self.layer_freq.strip("[] ").split(",")]
        if len(words) == 1 and words[0].isdecimal() and int(words[0]) >= 1:
            return int(words[0])
        if len(words) > 1 and set(words) <= {"0", "1"}:
            return tuple(word == "1" for word in words)
        raise ConfigError(
            f'{self.flag("layer_freq")} "{self.layer_freq}": expected a number N (the last of every N layers is '
            f"sparse), or one 0 or 1 for each layer: 0,1,0,1."
        )
