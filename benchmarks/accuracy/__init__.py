"""Does GLoRA help? Methods of fine-tuning on real texts, at equal numbers of parameters: `python -m benchmarks.accuracy`."""
