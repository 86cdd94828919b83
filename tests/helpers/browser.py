"""Headless Chromium, for tests of pages."""

import shutil
from contextlib import contextmanager

import pytest


@contextmanager
def chromium():
    """Yield a selenium driver of headless Chromium. Skip the test if selenium, Chromium or chromedriver is missing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    program, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not (program and driver):
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    flags = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking")
    for flag in (*flags, "--window-size=1200,1000"):
        options.add_argument(flag)
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as browser:
        yield browser
