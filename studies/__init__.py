"""Studies of the method, and not of the library: does it help, and how is it best started?

Each has one command, keeps every run in a file of `studies/results` (`studies.store`), and goes on where it was
stopped. `python -m studies.accuracy` trains classifiers of texts and images, `python -m studies.causal` a language
model, and `python -m studies.search` asks whether a search for ranks pays at equal compute: hours each. `python -m
studies.extraction` takes minutes: it fits adapters to what full fine-tuning changed. With `--report` they run nothing,
and make their tables and plots from the runs that are there.
"""
