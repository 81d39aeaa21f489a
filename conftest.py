"""The docstrings of a room that needs a library are run where it is installed."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("lightning") else ["glora/integrations/lightning.py"]
