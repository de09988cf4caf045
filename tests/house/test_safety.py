"""Nothing is pickled, no string goes through a shell, no foreign code runs, no check is left out by python -O."""

import pytest
from goals import Trials

from tests.house.safety import pickles, remote_code, shells, skippable_checks
from tests.house.sources import PRODUCT, Rule, broken, files


def test_nothing_is_pickled() -> None:
    assert broken(pickles, files((".py",), PRODUCT)) == []


@pytest.mark.goal("R16", ci=1, nightly=1, what="no assert checks anything: python -O refuses what python refuses")
def test_no_check_is_an_assertion(trials: Trials) -> None:
    assert broken(skippable_checks, files((".py",), PRODUCT)) == []
    trials.add(1)


@pytest.mark.parametrize("rule", [shells, remote_code])
def test_every_file_keeps(rule: Rule) -> None:
    assert broken(rule, files((".py",))) == []


BAD = [
    (pickles, "import pickle"),
    (pickles, "from cloudpickle import dumps"),
    (pickles, "torch.load(path)"),
    (pickles, "torch.load(path, weights_only=False)"),
    (pickles, "torch.load(path, weights_only=trusted)"),
    (pickles, "torch.save(state, path)"),
    (pickles, "np.load(path, allow_pickle=True)"),
    (pickles, "pd.read_pickle(path)"),
    (shells, "subprocess.run(f'rm {path}', shell=True)"),
    (shells, "os.system('ls')"),
    (shells, "subprocess.getoutput('ls')"),
    (remote_code, "AutoModel.from_pretrained(path, trust_remote_code=True)"),
    (remote_code, "eval(text)"),
    (remote_code, "exec(text)"),
    (skippable_checks, "assert size > 0"),
    (skippable_checks, "assert found is not None and len(found) == 2"),
    (skippable_checks, "assert found is not None or size"),
    (skippable_checks, "assert read(path) is not None"),
    (skippable_checks, "assert not isinstance(found, str)"),
    (skippable_checks, "if __debug__: check(config)"),
]
GOOD = [
    (pickles, "torch.load(path, weights_only=True)\nnp.load(path, allow_pickle=False)\nsave_file(state, path)"),
    (shells, "subprocess.run(['rm', path], check=True, shell=False)"),
    (skippable_checks, "assert found is not None and self.part.other is not None\nassert isinstance(found, Found)"),
    (remote_code, "model.eval()\nAutoModel.from_pretrained(path, trust_remote_code=False)"),
]


@pytest.mark.parametrize(("rule", "source"), BAD)
def test_the_rule_bites(rule: Rule, source: str) -> None:
    assert len(rule(source)) == 1


@pytest.mark.parametrize(("rule", "source"), GOOD)
def test_the_rule_lets_good_code_pass(rule: Rule, source: str) -> None:
    assert rule(source) == []
