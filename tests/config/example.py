"""A small valid run, and changes to it, for the tests of this room."""

from typing import Any

from megatron_moe.config.run import RunConfig

DENSE: dict[str, Any] = {
    "model.num_layers": 4,
    "model.hidden_size": 64,
    "model.num_attention_heads": 8,
    "model.vocab_size": 256,
    "data.seq_length": 32,
    "training.global_batch_size": 8,
    "training.train_iters": 100,
    "optimizer.lr": 1e-3,
}
SPARSE: dict[str, Any] = {**DENSE, "moe.num_experts": 8}
DENSE_FLAGS = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 8 --vocab-size 256 --seq-length 32 "
    "--global-batch-size 8 --train-iters 100 --lr 1e-3"
).split()


def tables(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{"moe.router_topk": 2} as {"moe": {"router_topk": 2}}; a value "unset" is left out."""
    nested: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        if value != "unset":
            nested.setdefault(section, {})[name] = value
    return nested


def dense(changes: dict[str, Any] | None = None) -> RunConfig:
    """The dense run with changes."""
    return RunConfig.from_dict(tables({**DENSE, **(changes or {})}))


def sparse(changes: dict[str, Any] | None = None) -> RunConfig:
    """The run with 8 experts in every layer, with changes."""
    return RunConfig.from_dict(tables({**SPARSE, **(changes or {})}))


def toml(values: dict[str, Any]) -> str:
    """The values as a recipe: numbers, booleans, strings, lists of strings."""
    lines = []
    for section, table in tables(values).items():
        lines.append(f"[{section}]")
        for name, value in table.items():
            written = str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
            lines.append(f"{name} = {written}")
    return "\n".join(lines) + "\n"
