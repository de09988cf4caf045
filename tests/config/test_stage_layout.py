"""The string of --pipeline-model-parallel-layout, by hand."""

import pytest

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.stage_layout import stage_contents

READ = {
    "EttL": ["EttL"],
    "E|tt|L": ["E", "tt", "L"],
    "Et*3|(tt|)*2,t|L": ["Ettt", "tt", "tt", "t", "L"],
    # DeepSeek-V3 in Megatron's notes, 61 layers on 32 stages, without its extra prediction
    "Et*3|(tt|)*29,L": ["Ettt", *["tt"] * 29, "L"],
    "E,t * 2 | (t|)*3 t, L": ["Ett", "t", "t", "t", "tL"],
    "E((t|)*2,t)*2|L": ["Et", "t", "tt", "t", "t", "L"],
    "E*1(e|)*2t*2|L": ["Ee", "e", "tt", "L"],
    "Ee|et*11L": ["Ee", "e" + "t" * 11 + "L"],
}
WRONG = {
    "": "'' is empty; use E (embedding), e and t (a layer of encoder and decoder), L (loss)",
    "Et*3|(tt|)*29,m|L": "'m' at character 15 is multi-token prediction, which there is none of here; leave it out.",
    "Et|dt|L": "'d' at character 4 means nothing; use E (embedding)",
    "tt|L": "'t' at character 1 comes first; the first stage begins with E, the embedding.",
    "Et|tt": "'t' at character 5 comes last; the last stage ends with L, the loss.",
    "EtL|t": "'t' at character 5 comes last",
    "EtL|L": "'L' at character 3 is not the end; only the last stage ends with L.",
    "Ee|Et|L": "'E' at character 4 is a second embedding; where a decoder follows an encoder it embeds by itself.",
    "Et|et|L": "'e' at character 4 is a layer of the encoder behind one of the decoder; write e before t.",
    "E||tL": "'|' at character 3 ends a stage that holds nothing; give it a layer, or leave it out.",
    "|EtL": "'|' at character 1 ends a stage that holds nothing",
    "Et|L|": "'|' at character 5 is followed by nothing; end the last stage with L.",
    "E(t|L": "'(' at character 2 is never closed; write ) behind what belongs together.",
    "E(t|))L": "')' at character 6 closes nothing; leave it out.",
    "Et*|L": "'*' at character 3 wants a number of 1 or more behind it.",
    "Et*0|L": "'*' at character 3 wants a number of 1 or more behind it.",
    "E*2tL": "'E' at character 1 is a second embedding",
}


@pytest.mark.parametrize("text", READ)
def test_a_layout_is_written_out(text: str) -> None:
    assert stage_contents(text) == READ[text]


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_layout_is_refused_with_its_place(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        stage_contents(text)
    assert str(caught.value).startswith("--pipeline-model-parallel-layout ") and str(caught.value).endswith(".")
    assert WRONG[text] in str(caught.value)
