"""What glora costs, counted and timed side by side with its peers. Needs the extra `benchmarks`.

`python -m benchmarks.layer` measures one layer and `python -m benchmarks.model` a transformer; `benchmarks.counting`
counts matrix products and saved bytes exactly, for tests too.
"""
