"""The Transformer itself: its widths, its attention, its vocabulary."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.options import REQUIRED, check_values, option


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The Transformer: widths, attention, normalisation, vocabulary."""

    flag_prefix: ClassVar[str] = ""

    num_layers: int = option(
        REQUIRED, "Transformer layers in the whole model; in the decoder, where there is an encoder too", at_least=1
    )
    encoder_num_layers: int = option(
        0, "layers of the encoder, whose output every decoder layer looks at (T5); 0 = there is none", at_least=0
    )
    hidden_size: int = option(REQUIRED, "width of the residual stream", at_least=1)
    ffn_hidden_size: int | None = option(
        None, "inner width of a dense feed-forward layer; none = 4 x hidden size", at_least=1
    )
    num_attention_heads: int = option(REQUIRED, "query heads in a layer", at_least=1)
    num_query_groups: int | None = option(
        None, "key-value heads, each shared by a group of query heads; none = one per query head", at_least=1
    )
    kv_channels: int | None = option(
        None, "width of one attention head; none = hidden size / attention heads", at_least=1
    )
    max_position_embeddings: int | None = option(
        None, "longest sequence that the model is declared for, in tokens; none = the sequence length", at_least=1
    )
    position_embedding_type: str = option(
        "rope", "how positions enter the attention", choices=("rope", "relative", "none")
    )
    relative_attention_num_buckets: int = option(
        32, "distances that relative positions tell apart; 32 in T5", at_least=2
    )
    relative_attention_max_distance: int = option(128, "distances from here on share one bucket; 128 in T5", at_least=1)
    rotary_base: float = option(10000.0, "base of the rotary wavelengths; 10000 in RoFormer", above=1)
    rotary_percent: float = option(1.0, "share of each head that is rotated", above=0, at_most=1)
    normalization: str = option("RMSNorm", "kind of normalisation", choices=("RMSNorm", "LayerNorm"))
    norm_epsilon: float = option(1e-5, "added to the variance before the square root", above=0)
    activation: str = option(
        "swiglu",
        "feed-forward activation; swiglu and geglu have a gate projection; geglu_tanh: GELU by tanh, as in T5 v1.1",
        choices=("swiglu", "geglu", "geglu_tanh", "gelu", "relu"),
        shortcuts={"--swiglu": "swiglu", "--geglu": "geglu", "--gelu": "gelu", "--relu": "relu"},
    )
    qk_layernorm: str = option(
        "none",
        "normalise queries and keys: in each head (Qwen3), or over the whole projection (OLMoE); the bare flag = head",
        choices=("none", "head", "projection"),
        const="head",
    )
    untie_embeddings_and_output_weights: bool = option(
        False, "give the output head a weight of its own instead of the embedding's"
    )
    vocab_size: int | None = option(None, "token ids before padding; none = as many as the tokenizer has", at_least=1)
    make_vocab_size_divisible_by: int = option(
        128, "pad the vocabulary to a multiple of this, the same on every layout", at_least=1
    )
    init_method_std: float = option(
        0.02, "standard deviation of the initial weights; 0.02 in GPT-2 and OLMoE", at_least=0
    )

    def __post_init__(self) -> None:
        check_values(self)
        heads, groups = self.num_attention_heads, self.groups
        if self.kv_channels is None and self.hidden_size % heads:
            raise ConfigError(
                f"--hidden-size {self.hidden_size} cannot be split over --num-attention-heads {heads}; "
                f"use a multiple of {heads}, or give the width of a head with --kv-channels."
            )
        if heads % groups:
            raise ConfigError(
                f"--num-attention-heads {heads} cannot be shared by --num-query-groups {groups}; "
                f"use a number of groups that divides {heads}."
            )
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets % 4 or distance <= buckets // 2:
            raise ConfigError(
                f"--relative-attention-num-buckets {buckets} and --relative-attention-max-distance {distance}: "
                f"expected a multiple of 4, and a distance of more than half as much; 32 and 128 in T5."
            )
        if self.position_embedding_type == "rope" and (self.rotary_dim < 2 or self.rotary_dim % 2):
            raise ConfigError(
                f"rotary embedding turns pairs, but --rotary-percent {self.rotary_percent:g} of a head of width "
                f"{self.head_dim} is {self.rotary_dim}; change --kv-channels or --rotary-percent so that it is even."
            )

    @property
    def all_layers(self) -> int:
        """Of encoder and decoder together."""
        return self.encoder_num_layers + self.num_layers

    @property
    def head_dim(self) -> int:
        """Width D of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def groups(self) -> int:
        """Number G of key-value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        """Inner width F of a dense feed-forward layer."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def rotary_dim(self) -> int:
        """How many channels of a head are rotated, from the first one on."""
        return int(self.head_dim * self.rotary_percent)

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Rows of the embedding for so many token ids; does not depend on the layout."""
        multiple = self.make_vocab_size_divisible_by
        return -(-vocab_size // multiple) * multiple
