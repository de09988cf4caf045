"""What must not change between the halves of a run, and where a run may save."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_moe.checkpoint.load import CheckpointReader
from megatron_moe.config.checkpoint import CheckpointConfig
from megatron_moe.config.errors import ConfigError, StorageError
from megatron_moe.training.resume import check_place_to_save, check_same_data, check_same_run
from tests.end_to_end.tiny_job import job

CORPUS = Path("tokens")


def saved(**changes: dict[str, Any]) -> CheckpointReader:
    """As much of a checkpoint as the checks read."""
    text = job(CORPUS, **changes).to_json()
    read = SimpleNamespace(folder=Path("saved/step_00000004"), config_json=text, data={"tokenizer": "t"})
    return cast(CheckpointReader, read)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"seed": 5}}, ["--seed was 1234 and is 5"]),
        ({"data": {"seq_length": 16}}, ["--seq-length was 8 and is 16"]),
        ({"data": {"objective": "prefix_lm"}}, ['--objective was "causal" and is "prefix_lm"']),
        ({"data": {"split": "50,50,0"}}, ["--split was [0.9, 0.1, 0.0] and is [0.5, 0.5, 0.0]"]),
        ({"data": {"data_path": ["1", "a", "3", "b"]}}, ["--data-path was none and is [1.0, 3.0]"]),
        ({"model": {"activation": "geglu"}}, ['--activation was "swiglu" and is "geglu"']),
        ({"model": {"num_query_groups": None}}, ["--num-query-groups was 2 and is 4"]),
        ({"moe": {"layer_freq": "1"}}, ["--moe-layer-freq was [false, true] and is [true, true]"]),
        (
            {"model": {"encoder_num_layers": 2}, "encoder_moe": {"num_experts": 4}},
            ["--encoder-num-layers was 0 and is 2"],
        ),
        (
            {"moe": {"router_options": {"topk_scaling_factor": "2.5"}}},
            ["--moe-router-options was {", '"topk_scaling_factor": 1.0', "and is {", '"topk_scaling_factor": 2.5'],
        ),
        (
            {"moe": {"router_topk": 1}, "model": {"rotary_base": 5e5}},
            ["--rotary-base", "; --moe-router-topk was 2 and"],
        ),
    ],
)
def test_all_that_makes_another_run_is_named(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError, match="saved/step_00000004 is another one") as caught:
        check_same_run(saved(), job(CORPUS, **changes))
    for word in [*words, "--finetune"]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"train_iters": 50, "micro_batch_size": 2, "eval_interval": 5}},
        {"parallel": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}},
        {"optimizer": {"lr": 0.5}, "logging": {"log_interval": 7}},
        {"moe": {"layer_freq": "0,1", "aux_loss_coeff": 0.5, "z_loss_coeff": 0.0}},
        {"model": {"kv_channels": 4, "max_position_embeddings": 8}, "data": {"split": "9,1"}},
    ],
)
def test_the_rest_may_change_and_the_same_may_be_written_otherwise(changes: dict[str, Any]) -> None:
    check_same_run(saved(), job(CORPUS, **changes))


def test_a_routers_losses_may_weigh_otherwise_but_its_choice_may_not_change() -> None:
    def sam(**options: str) -> dict[str, Any]:
        return {"moe": {"router_type": "sam", "router_options": {"groups": "2", **options}}}

    before = saved(**sam())
    check_same_run(before, job(CORPUS, **sam(align_coeff="0.1", renormalise="false")))
    with pytest.raises(ConfigError, match='--moe-router-options was .*"groups": 2'):
        check_same_run(before, job(CORPUS, **sam(groups="4")))


def test_the_experts_of_an_encoder_are_compared_as_well() -> None:
    def encoder(**moe: Any) -> dict[str, Any]:
        return {"model": {"encoder_num_layers": 2}, "encoder_moe": {"num_experts": 4, **moe}}

    before = saved(**encoder())
    check_same_run(before, job(CORPUS, **encoder(aux_loss_coeff=0.1)))
    with pytest.raises(ConfigError, match="--encoder-moe-router-topk was 2 and is 1"):
        check_same_run(before, job(CORPUS, **encoder(router_topk=1)))


@pytest.mark.parametrize(
    ("name", "value"), [("noise_density", 0.3), ("mean_noise_span_length", 2.0), ("vocab_extra_ids", 20)]
)
def test_a_run_goes_on_with_the_same_noise(name: str, value: float) -> None:
    def spans(**data: Any) -> dict[str, Any]:
        return {
            "model": {"encoder_num_layers": 2, "vocab_size": 161},
            "data": {"objective": "span_corruption", "seq_length": 24, **data},
        }

    before = saved(**spans())
    check_same_run(before, job(CORPUS, **spans()))
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} was .* and is {value}"):
        check_same_run(before, job(CORPUS, **spans(**{name: value})))


def test_another_tokenizer_is_refused_and_one_that_was_not_noted_is_not() -> None:
    check_same_data(saved(), {"tokenizer": "t", "training corpus": "c"})
    with pytest.raises(ConfigError, match=r"another tokenizer \(its fingerprint was t and is u\)\. .*--finetune"):
        check_same_data(saved(), {"tokenizer": "u"})


def test_every_input_that_changed_is_named_with_both_fingerprints() -> None:
    before = {"tokenizer": "t1", "training corpus": "c1", "training text": "w1"}
    reader = saved()
    reader.data.clear()
    reader.data.update(before)
    check_same_data(reader, before)
    # a corpus that lost its hashes, or has them only now, is no other one
    check_same_data(reader, {"tokenizer": "t1", "training corpus": "c1"})
    for name, value in before.items():
        with pytest.raises(ConfigError, match=rf"another {name} \(its fingerprint was {value} and is x\)\. "):
            check_same_data(reader, before | {name: "x"})
    with pytest.raises(ConfigError, match=r"another tokenizer \(.* t1 and is x\) and another training corpus \(.* c1"):
        check_same_data(reader, before | {"tokenizer": "x", "training corpus": "x"})


def place(path: Path, **values: Any) -> CheckpointConfig:
    return CheckpointConfig(save=str(path), **values)


def test_a_place_with_later_steps_of_another_run_is_refused(tmp_path: Path) -> None:
    check_place_to_save(place(tmp_path / "new" / "deep"), step=0)
    (tmp_path / "step_00000100").mkdir()
    for refused in (place(tmp_path), place(tmp_path, load=str(tmp_path), finetune=True)):
        with pytest.raises(ConfigError, match="step 100 already, and this run is at step 0"):
            check_place_to_save(refused, step=0)
    with pytest.raises(ConfigError, match="is at step 50"):
        check_place_to_save(place(tmp_path, load="latest", ckpt_step=50), step=50)
    check_place_to_save(place(tmp_path, load="latest"), step=50)  # 100 was broken, or 50 would not be the newest
    check_place_to_save(place(tmp_path, load="elsewhere"), step=100)


def test_a_place_that_cannot_be_written_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "file/below", "dangling"):
        with pytest.raises(StorageError, match="is no directory that this process may write to"):
            check_place_to_save(place(tmp_path / name), step=0)
