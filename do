#!/bin/sh
# ./do example   fine-tunes a sentence transformer on real questions and merges it (minutes on two cores; needs PyPI)
# ./do tests     runs the tests
# Each is complete from a fresh clone: it makes an environment of its own, .venv, and installs what it needs.
set -e
cd "$(dirname "$0")"
case "$1" in
    example) extras=examples ;;
    tests) extras=dev,interop ;;
    *) sed -n '2,4s/^# //p' "$0"; exit 2 ;;
esac
python3 -m venv .venv
.venv/bin/pip install --quiet -c constraints.txt -e ".[$extras]"
if [ "$1" = example ]; then
    .venv/bin/python examples/finetune_text.py
else
    .venv/bin/python -m pytest -n 2
fi
