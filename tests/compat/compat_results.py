"""A plugin for pytest: one line of JSON per test to COMPAT_RESULTS as soon as it has ended, so that a run which is cut
short has results too. A test that is reported twice (its clean-up failed) counts as its worst."""

import json
import os


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        outcome = "skipped" if hasattr(report, "wasxfail") else report.outcome
        with open(os.environ["COMPAT_RESULTS"], "a") as out:
            out.write(json.dumps((report.nodeid, outcome)) + "\n")
