"""Settings for Django's own tests, and a test runner that writes one line of JSON per test to COMPAT_RESULTS."""

import json
import os
import unittest

from django.test.runner import DiscoverRunner


def database(name: str) -> dict:
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": name,
        "HOST": os.environ["COMPAT_HOST"],
        "PORT": os.environ["COMPAT_PORT"],
        "USER": os.environ["COMPAT_USER"],
        "PASSWORD": os.environ["COMPAT_PASSWORD"],
    }


DATABASES = {
    "default": database(os.environ["COMPAT_DATABASE"]),
    "other": database("compat_other") | {"TEST": {"NAME": "test_other"}},
}
SECRET_KEY = "no secret: for tests only"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
USE_TZ = False
TEST_RUNNER = "django_settings.Runner"


class Result(unittest.TextTestResult):
    """Notes what became of each test; one failed subtest fails its test."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.outcomes = {}

    def note(self, test, outcome):
        name = test.id()
        if self.outcomes.get(name) != "failed":
            self.outcomes[name] = outcome

    def addSuccess(self, test):
        super().addSuccess(test)
        self.note(test, "passed")

    def addFailure(self, test, error):
        super().addFailure(test, error)
        self.note(test, "failed")

    def addError(self, test, error):
        super().addError(test, error)
        self.note(test, "failed")

    def addSubTest(self, test, subtest, error):
        super().addSubTest(test, subtest, error)
        if error is not None:
            self.note(test, "failed")

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self.note(test, "skipped")

    def addExpectedFailure(self, test, error):
        super().addExpectedFailure(test, error)
        self.note(test, "skipped")

    def addUnexpectedSuccess(self, test):
        super().addUnexpectedSuccess(test)
        self.note(test, "failed")


class Runner(DiscoverRunner):
    def get_resultclass(self):
        return Result

    def run_suite(self, suite, **options):
        result = super().run_suite(suite, **options)
        with open(os.environ["COMPAT_RESULTS"], "w") as out:
            for pair in result.outcomes.items():
                out.write(json.dumps(pair) + "\n")
        return result
