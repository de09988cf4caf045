"""Files and functions are short, nothing is global, captions are captions, nothing is left unfinished."""

import pytest

from tests.house import shape
from tests.house.sources import PRODUCT, ROOT, Rule, broken, files

RULES_FOR_ALL = [
    shape.long_file,
    shape.long_functions,
    shape.global_statements,
    shape.rewritten_constants,
    shape.unfinished,
]
RULES_FOR_PRODUCT = [shape.module_state, shape.not_implemented]


@pytest.mark.parametrize("rule", RULES_FOR_ALL)
def test_every_file_keeps(rule: Rule) -> None:
    assert broken(rule, files((".py",))) == []


@pytest.mark.parametrize("rule", RULES_FOR_PRODUCT)
def test_every_product_file_keeps(rule: Rule) -> None:
    assert broken(rule, files((".py",), PRODUCT)) == []


def test_scripts_are_short_too() -> None:
    assert broken(shape.long_file, files((".sh", ".sbatch"))) == []


def test_every_room_has_a_caption_and_nothing_more() -> None:
    package = ROOT / "megatron_moe"
    rooms = {path.parent for path in files((".py",), ("megatron_moe",))}
    assert sorted(room for room in rooms if not (room / "__init__.py").is_file()) == []
    assert broken(shape.caption_only, (path for path in files((".py",)) if path.name == "__init__.py")) == []
    assert package in rooms


BAD = [
    (shape.long_file, "x = 1\n" * 401),
    (shape.long_functions, "def f():\n" + "    x = 1\n" * 60),
    (shape.global_statements, "x = 1\ndef f():\n    global x\n    x = 2"),
    (shape.module_state, "cache = {}"),
    (shape.module_state, "seen: set[int] = set()"),
    (shape.module_state, "import collections\n_groups = collections.defaultdict(list)"),
    (shape.module_state, "Table = [n for n in range(3)]"),
    (shape.rewritten_constants, "CACHE = {}\ndef f(k, v):\n    CACHE[k] = v"),
    (shape.rewritten_constants, "from megatron_moe.moe.routers.registry import ROUTERS\nROUTERS.update(mine=1)"),
    (shape.rewritten_constants, "import registry\ndel registry.ROUTERS['switch']"),
    (shape.rewritten_constants, "NAMES = []\nNAMES += ['a']"),
    (shape.caption_only, '"""Room."""\n\nfrom os import path\n'),
    (shape.caption_only, ""),
    (shape.caption_only, '"""Room.\n\nWith a story."""\n'),
    (shape.unfinished, "x = 1  # TODO: later"),
    (shape.unfinished, "# FIXME"),
    (shape.not_implemented, "def f():\n    raise NotImplementedError"),
    (shape.not_implemented, "raise NotImplementedError('no')"),
]
GOOD = [
    (shape.long_file, "x = 1\n" * 400),
    (shape.long_functions, "def f():\n" + "    x = 1\n" * 59),
    (shape.module_state, "ROUTERS = {'switch': 1}\nletters = ('a', 'b')\n__all__ = ['a']"),
    (shape.module_state, "def f():\n    seen = set()"),
    (shape.rewritten_constants, "W = zeros()\nW[0] = 1\nseen = []\nseen.append(W)\nGOLDEN.sort(dim=1)"),
    (shape.caption_only, '"""Room."""\n'),
    (shape.unfinished, "# TODO(12): later\nx = 'TODO'"),
]


@pytest.mark.parametrize(("rule", "source"), BAD)
def test_the_rule_bites(rule: Rule, source: str) -> None:
    assert len(rule(source)) == 1


@pytest.mark.parametrize(("rule", "source"), GOOD)
def test_the_rule_lets_good_code_pass(rule: Rule, source: str) -> None:
    assert rule(source) == []
