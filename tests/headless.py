"""A browser for the tests marked `browser`."""

import os
import shutil
from pathlib import Path

import pytest


def chrome(profile: Path):
    """Headless Chromium that keeps what pages write to the console; without it the test is skipped, but on CI it fails."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (browser and driver):
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    quiet = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync"
    for flag in (*quiet.split(), "window-size=1400,900", f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    return webdriver.Chrome(options, webdriver.ChromeService(driver))
