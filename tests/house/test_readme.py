"""What the README says is what is there: flags, the table of routers, the example."""

import json
import re

import pytest

from megatron_moe.certify.combinations import layouts
from megatron_moe.certify.tiny_run import TOLERANCE
from megatron_moe.config.run import RunConfig
from tests.faults.table import table
from tests.house.sources import ROOT
from tools.list_routers import main as list_routers

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


def test_every_flag_of_the_readme_exists(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        RunConfig.load(["--help"])
    known = set(FLAG.findall(capsys.readouterr().out))
    # other commands state their flags in their own sources
    sources = ("tools/**/*.py", "tools/**/*.sh", "examples/**/*.*", "tests/faults/*.sh")
    for path in (path for pattern in sources for path in ROOT.glob(pattern)):
        if path.suffix in (".py", ".sh", ".sbatch"):
            known |= set(FLAG.findall(path.read_text(encoding="utf-8")))
    named = set(FLAG.findall((ROOT / "README.md").read_text(encoding="utf-8")))
    assert named and named - known == set()


def test_the_table_of_routers_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    columns = re.search(r"list_routers\.py --markdown --columns ([\w,]+)`", text)
    table = re.search(r"<!-- list_routers -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert columns and table
    assert list_routers(["--markdown", "--columns", columns.group(1)]) == 0
    assert capsys.readouterr().out.strip() == table.group(1).strip()


def test_the_certificate_in_the_readme_has_every_layout() -> None:
    """Its figures are those of a run that takes minutes; which layouts it is of, is checked here."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- certify -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert table
    rows = [line.strip("| ").split(" | ") for line in table.group(1).splitlines()[2:]]
    assert [row[0] for row in rows] == list(layouts("default"))
    assert all(float(figure) < TOLERANCE for row in rows for figure in row[1:] if figure not in ("cannot run", "-"))


def test_the_router_in_the_readme_is_the_file_beside_it() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert shown and shown.group(1) == (ROOT / "examples" / "router" / "cosine_router.py").read_text(encoding="utf-8")


def test_the_table_of_goals_is_that_of_the_last_run_and_no_goal_is_missing() -> None:
    """`bash tests/faults/run.sh --json` wrote the counts."""
    marked = [path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py")]
    tried = {goal for text in marked if "mark.goal(" in text for goal in re.findall(r'"(R\d+)"', text)}
    newest = max((ROOT / "tests" / "faults" / "results").glob("*-goals.json"))
    counts = json.loads(newest.read_text(encoding="utf-8"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- goals -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert shown and shown.group(1) == table(counts)
    assert {row["goal"] for row in counts["rows"]} == tried and all(row["passed"] for row in counts["rows"])
    assert f"{counts['date']}, seed {counts['seed']}" in text
