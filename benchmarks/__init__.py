"""What glora costs, counted and timed side by side with its peers. Needs the extra `benchmarks`.

`python -m benchmarks.layer` measures one layer, `benchmarks.model` a transformer, `benchmarks.route` a mixed batch, and
`benchmarks.report` draws the plots from the CSV. `benchmarks.counting` counts matrix products and saved bytes exactly,
for tests too. `benchmarks.accuracy` asks whether GLoRA helps: it trains on real texts. `benchmarks.accuracy.parity`
trains beside PEFT; `benchmarks.accuracy.memory` measures the memory of a step.
"""
