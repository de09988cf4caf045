"""A card that fails in known ways, through an NVML with the names and numbers of nvidia-ml-py."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_moe.training.gpu_health import GpuHealth
from megatron_moe.training.gpu_monitor import GpuMonitor
from megatron_moe.training.xid import XID_LIMIT, XidEvents, explain_xid

CONSTANTS = {
    "NVML_MEMORY_ERROR_TYPE_CORRECTED": 0,
    "NVML_MEMORY_ERROR_TYPE_UNCORRECTED": 1,
    "NVML_VOLATILE_ECC": 0,
    "NVML_ERROR_NOT_SUPPORTED": 3,
    "NVML_ERROR_TIMEOUT": 10,
    "NVML_TEMPERATURE_GPU": 0,
    "nvmlEventTypeXidCriticalError": 8,
    "nvmlClocksThrottleReasonSwPowerCap": 4,
    "nvmlClocksThrottleReasonHwSlowdown": 8,
    "nvmlClocksThrottleReasonSwThermalSlowdown": 32,
    "nvmlClocksThrottleReasonHwThermalSlowdown": 64,
    "nvmlClocksThrottleReasonHwPowerBrakeSlowdown": 128,
}
FUNCTIONS = (
    "nvmlDeviceGetTotalEccErrors",
    "nvmlDeviceGetCurrentClocksThrottleReasons",
    "nvmlDeviceGetRemappedRows",
    "nvmlEventSetCreate",
    "nvmlDeviceRegisterEvents",
    "nvmlEventSetWait_v2",
)


class NVMLError(Exception):
    """As nvidia-ml-py raises it."""

    def __init__(self, value: int) -> None:
        super().__init__({3: "Not Supported", 10: "Timeout", 15: "GPU is lost"}[value])
        self.value = value


class Card(SimpleNamespace):
    """NVML for one card, whose state a test sets."""

    def __init__(self) -> None:
        super().__init__(**CONSTANTS)
        self.corrected = self.uncorrected = self.reasons = 0
        self.rows = (0, 0, 0, 0)
        self.events: list[tuple[int, int]] = []
        self.unsupported: set[str] = set()
        self.lost = False

    def _answer(self, function: str) -> None:
        if function in self.unsupported:
            raise NVMLError(3)

    def nvmlDeviceGetTotalEccErrors(self, handle: str, kind: int, counter: int) -> int:
        self._answer("nvmlDeviceGetTotalEccErrors")
        assert (handle, counter) == ("handle", 0)
        return self.uncorrected if kind == 1 else self.corrected

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        self._answer("nvmlDeviceGetCurrentClocksThrottleReasons")
        return self.reasons

    def nvmlDeviceGetRemappedRows(self, handle: str) -> tuple[int, int, int, int]:
        self._answer("nvmlDeviceGetRemappedRows")
        return self.rows

    def nvmlEventSetCreate(self) -> str:
        self._answer("nvmlEventSetCreate")
        return "events"

    def nvmlDeviceRegisterEvents(self, handle: str, kinds: int, events: str) -> None:
        self._answer("nvmlDeviceRegisterEvents")
        assert (handle, kinds, events) == ("handle", 8, "events")

    def nvmlEventSetWait_v2(self, events: str, milliseconds: int) -> SimpleNamespace:
        assert (events, milliseconds) == ("events", 0), "a step must not wait"
        if self.lost:
            raise NVMLError(15)
        if not self.events:
            raise NVMLError(10)
        kind, number = self.events.pop(0)
        return SimpleNamespace(eventType=kind, eventData=number)


@pytest.fixture
def card(caplog: pytest.LogCaptureFixture) -> Card:
    caplog.set_level(logging.INFO)
    return Card()


def health(card: Any) -> GpuHealth:
    return GpuHealth(card, "handle", "cuda:3 of node7")


def test_the_names_are_those_of_the_library() -> None:
    real = pytest.importorskip("pynvml")
    assert {name: getattr(real, name) for name in CONSTANTS} == CONSTANTS
    assert all(callable(getattr(real, name)) for name in FUNCTIONS)
    assert real.NVMLError(10).value == 10


def test_a_healthy_card_says_nothing(card: Card, caplog: pytest.LogCaptureFixture) -> None:
    watched = health(card)
    assert [watched.check() for _ in range(3)] == [{}, {}, {}]
    assert caplog.records == []


def test_only_new_uncorrected_errors_warn_once_with_card_count_and_advice(
    card: Card, caplog: pytest.LogCaptureFixture
) -> None:
    card.uncorrected, card.corrected = 5, 7
    watched = health(card)
    assert watched.check() == {"gpu ECC corrected": 7.0}
    assert caplog.records == []
    card.uncorrected = 8
    watched.check()
    watched.check()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "cuda:3 of node7: 3 new uncorrected ECC errors, 8 since" in caplog.text and "last checkpoint" in caplog.text


def test_xids_are_told_with_number_and_meaning(card: Card, caplog: pytest.LogCaptureFixture) -> None:
    watched = health(card)
    card.events = [(8, 79), (1, 5), (8, 31), (8, 999)]
    assert watched.check() == {"gpu Xid errors": 3.0}
    assert [record.getMessage().split(":")[2].strip() for record in caplog.records] == ["Xid 79", "Xid 31", "Xid 999"]
    assert "fallen off the bus" in caplog.text and "MMU fault" in caplog.text and "dmesg" in caplog.text
    caplog.clear()
    assert watched.check() == {"gpu Xid errors": 3.0}
    assert caplog.records == []


@pytest.mark.parametrize("number", [13, 31, 43, 45, 48, 63, 64, 74, 79, 92, 94, 95, 119])
def test_common_xids_have_a_meaning(number: int) -> None:
    assert explain_xid(number) != explain_xid(-1)


def test_a_storm_of_xids_neither_holds_up_the_step_nor_fills_the_log(
    card: Card, caplog: pytest.LogCaptureFixture
) -> None:
    watched = health(card)
    card.events = [(8, 92)] * (3 * XID_LIMIT)
    for _ in range(4):
        found = watched.check()
    assert found["gpu Xid errors"] == 3 * XID_LIMIT
    assert len(caplog.records) == XID_LIMIT


def test_a_slowdown_is_told_when_it_begins_and_ends(card: Card, caplog: pytest.LogCaptureFixture) -> None:
    watched = health(card)
    for reasons in (1, 1 | 64, 64, 64 | 8, 0, 0):
        card.reasons = reasons
        watched.check()
    said = [(record.levelname, record.getMessage().split(": ")[1:3]) for record in caplog.records]
    assert said == [
        ("WARNING", ["clocks are held down", "hardware thermal slowdown"]),
        ("WARNING", ["clocks are held down", "hardware slowdown (heat, or power outside its bounds)"]),
        ("INFO", ["clocks are free again", "hardware slowdown (heat, or power outside its bounds)"]),
        ("INFO", ["clocks are free again", "hardware thermal slowdown"]),
    ]


@pytest.mark.parametrize(("reason", "words", "level"), [(128, "power brake", "WARNING"), (4, "power cap", "INFO")])
def test_a_slowdown_that_comes_and_goes_is_told_three_times(
    card: Card, caplog: pytest.LogCaptureFixture, reason: int, words: str, level: str
) -> None:
    watched = health(card)
    for step in range(40):
        card.reasons = reason * (step % 2)
        watched.check()
    begins = [record for record in caplog.records if "held down" in record.getMessage()]
    assert len(begins) == 3 and all(words in record.getMessage() for record in begins)
    assert {record.levelname for record in begins} == {level}
    assert "not told again" in begins[-1].getMessage()


def test_rows_that_wait_or_cannot_be_replaced_are_told_once(card: Card, caplog: pytest.LogCaptureFixture) -> None:
    watched = health(card)
    for rows in ((1, 0, 0, 0), (1, 0, 1, 0), (1, 0, 1, 0), (1, 0, 1, 1), (1, 0, 1, 1)):
        card.rows = rows
        watched.check()
    assert len(caplog.records) == 2
    assert "wait to be replaced; reset it" in caplog.messages[0] and "could not be replaced" in caplog.messages[1]


def test_what_a_card_cannot_tell_is_passed_over(card: Card, caplog: pytest.LogCaptureFixture) -> None:
    card.unsupported = set(FUNCTIONS)
    watched = health(card)
    assert watched.check() == {}
    assert caplog.messages == ["Xid errors are not in the log: NVML says Not Supported"]


def test_an_older_library_without_these_functions_is_passed_over() -> None:
    assert health(SimpleNamespace()).check() == {}


def test_events_that_break_are_given_up_with_one_warning(card: Card, caplog: pytest.LogCaptureFixture) -> None:
    events = XidEvents(card, "handle")
    card.lost = True
    assert list(events.new()) == list(events.new()) == []
    assert caplog.messages == ["Xid errors are no more in the log: NVML says GPU is lost"]


def test_the_monitor_adds_the_counts_to_its_readings(card: Card) -> None:
    monitor = GpuMonitor(card, "handle", "cuda:0")
    card.events = [(8, 48)]
    card.corrected = 2
    card.reasons = 64
    assert monitor.read() == {
        "gpu throttle reasons": 64.0,
        "gpu ECC errors": 0.0,
        "gpu ECC corrected": 2.0,
        "gpu Xid errors": 1.0,
    }
