"""Nothing is pickled, no string goes through a shell, no foreign code runs, no check is left out by python -O."""

import pytest
from goals import Trials

from tests.house.floors import imports
from tests.house.safety import PICKLE_FILE, pickles, remote_code, shells, skippable_checks
from tests.house.sources import PRODUCT, ROOT, Rule, broken, files

# who may import the loaders: the child process, and what it alone is made of
CHILD = {"megatron_moe/convert/megatron/opener.py", "megatron_moe/convert/megatron/metadata.py"}


def test_nothing_is_pickled_but_by_the_loaders_of_the_converters_child() -> None:
    found = broken(pickles, files((".py",), PRODUCT))
    assert [line for line in found if not line.startswith(f"{PICKLE_FILE}:")] == []
    assert len(found) == 1
    assert "import of pickle" in found[0]


def test_the_loaders_of_pickles_are_imported_by_the_child_alone() -> None:
    """What the child is made of is imported by nothing else, so no other process can open a pickle."""
    places = {path.relative_to(ROOT).with_suffix(""): path for path in files((".py",), PRODUCT)}
    modules = {".".join(place.parts): path for place, path in places.items()}
    closed = {PICKLE_FILE, *CHILD}
    names = {file.removesuffix(".py").replace("/", ".") for file in closed}
    for module, path in modules.items():
        if str(path.relative_to(ROOT)) not in closed:
            told = {item.name for item in imports(path.read_text(encoding="utf-8"), module)}
            assert not {one for one in told if any(one == name or one.startswith(f"{name}.") for name in names)}, module


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
