#!/bin/sh
# For the tests of pages in a browser, Chromium; for those of GGUF files, llama.cpp as npm has it.
set -eu
cd "$(dirname "$0")"
export DEBIAN_FRONTEND=noninteractive
missing=""
dpkg -s chromium chromium-driver >/dev/null 2>&1 || missing="chromium chromium-driver"
command -v npm >/dev/null || missing="$missing nodejs npm"
if [ -n "$missing" ]; then
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends $missing
fi
cd llama_cpp
test -d node_modules/node-llama-cpp || npm install --no-package-lock --omit=optional --ignore-scripts --no-audit --no-fund
