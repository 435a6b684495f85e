#!/bin/sh
# Debian packages for the tests of pages in a browser.
set -eu
export DEBIAN_FRONTEND=noninteractive
dpkg -s chromium chromium-driver >/dev/null 2>&1 && exit 0
apt-get update -qq
apt-get install -y -qq --no-install-recommends chromium chromium-driver
