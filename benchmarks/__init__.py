"""What glora costs, counted and timed side by side with its peers. Needs the extra `benchmarks`.

`python -m benchmarks.layer` measures one layer, `benchmarks.model` a transformer, `benchmarks.route` a mixed batch,
`benchmarks.scale` how costs grow, `benchmarks.families` and `benchmarks.search` real architectures and a supernet, and
`benchmarks.report` draws the plots of a layer from its CSV; products and saved bytes are counted exactly, by what
the tests count with (`tests.helpers.counting`). `benchmarks.load` measures files, and `benchmarks.device` is the
prepared run for whoever has a CUDA device: correctness, steps, memory, decoding. Whether the method helps is asked in
`studies`.
"""
